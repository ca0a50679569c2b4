"""Milliseconds per image of patchad and of its peers, on the same images in one process, in turns, as Markdown.

pip install ".[bench]"
python -m benchmarks.speed

Each is timed as it runs in torch (eager), and in the files that it exports itself; claims are made against the faster.
Weights are random, but for EfficientNet-Lite0: they do not change the time. Images are synthetic, 256 x 256.
"""

import copy
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from jsonargparse import auto_cli
from torch import Tensor

import patchad
from patchad import PatchModel, PyramidDataModule
from patchad.canvas import Canvas
from patchad.cli import CONFIGS
from patchad.data.synthetic import write_synthetic
from patchad.export import export
from patchad.memory import MemoryBank
from patchad.models import VGG16, EfficientNetLite0, LearnedEncoder
from patchad.models.backbones import Backbone
from patchad.scoring import Scorer
from patchad.stages import stage_table
from patchad.timing import alternate, best_rate, measure_stages, peak_memory

SIZE, BATCHES = 256, (1, 8)
CORESET = int(0.1 * 209 * 32 * 32)
"""Vectors of PatchCore's bank: 10 % of the patches of 209 images."""
LEARNED_MODEL, PAPER_MODEL = (
    yaml.safe_load((CONFIGS / name).read_text())["model"]["init_args"] for name in ("learned.yaml", "paper.yaml")
)
"""The settings that these configurations give the detector."""
OURS: Mapping[str, Callable[[], PatchModel]] = {
    "learned VGG16, 3 sides": lambda: filled(VGG16(weights="none")),
    "learned VGG16, 2 sides": lambda: filled(VGG16(weights="none"), sides=(64, 32)),
    "learned Lite0, 3 sides": lambda: filled(EfficientNetLite0()),
    "learned Lite0, 2 sides": lambda: filled(EfficientNetLite0(), sides=(64, 32)),
    "learned Lite0, 3 sides, 1000 vectors": lambda: filled(EfficientNetLite0(), max_vectors=1000),
    "learned Lite0, 2 sides, 1000 vectors": lambda: filled(EfficientNetLite0(), sides=(64, 32), max_vectors=1000),
}
PEERS = ("PaDiM ResNet18", "PatchCore ResNet18", "PatchCore WideResNet50", "EfficientAD-S")
DEFAULT = "OpenVINO, default"


class Form(NamedTuple):
    """A method, one way in which it runs, and the images that it gets at once."""

    method: str
    way: str
    batch: int


Tasks = dict[Form, Callable[[], object]]


@torch.inference_mode()
def main(
    repeats: int = 10,
    rounds: int = 2,
    sliding: int = 1,
    methods: tuple[str, ...] = (*OURS, *PEERS),
    memory_of: str | None = None,
) -> None:
    """Prints stage tables, times, ratios and memory.

    Args:
        repeats: alternating runs of each.
        rounds: how often all of it is measured.
        sliding: runs of sliding mode, which takes minutes; 0 leaves it out.
        methods: which are measured.
        memory_of: only score a batch of 8 with this method and print the peak memory of the process in MB.
    """
    quiet()
    images = synthetic_images(max(BATCHES))
    if memory_of is not None:
        return print(memory(memory_of, images))
    rate = best_rate(torch.device("cpu"))
    print(f"best float32 rate measured: {rate / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads\n")
    models = {name: make() for name, make in OURS.items() if name in methods}
    for name, model in models.items():
        for batch in BATCHES:
            print_stages(name, model, images[:batch], repeats, rate)
    makers = {name: partial(ours, name, model) for name, model in models.items()}
    makers |= {name: partial(theirs, name) for name in PEERS if name in methods}
    tasks: Tasks = {}
    for make in makers.values():
        tasks |= make(images[:1])
    for number in range(rounds):
        print(f"round {number + 1}\n")
        times = alternate(tasks, repeats)
        print_times(times)
        print_ratios({form: float(np.median(runs)) for form, runs in times.items()})
    tasks.clear()
    for make in makers.values():  # one method at a time: together they do not fit into the memory of small machines
        print_times(alternate(make(images[:8]), max(3, repeats // 3)))
    print_memory(list(methods))
    if sliding:
        print_sliding("VGG16, 3 sides", images[:1], sliding)
        paper = {"scoring_strides": PAPER_MODEL["scoring_strides"]}
        print_sliding("VGG16, 3 sides, the paper's strides", images[:1], sliding, **paper)


def quiet() -> None:
    """Warnings of exporters would drown the tables."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def synthetic_images(count: int) -> Tensor:
    """The first test images of the synthetic product, `[count, 3, SIZE, SIZE]`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "product"
        write_synthetic(root, train=2, test_normal=count, test_defective=7, size=SIZE)
        data = PyramidDataModule(root, image_size=(SIZE, SIZE), num_workers=0)
        data.setup("test")
        return torch.stack([data.test_set[number].image for number in range(count)])


def filled(backbone: Backbone, max_vectors: int | None = None, **settings: Any) -> PatchModel:
    """A model as `--config learned`, with random vectors in its banks, as many as it keeps at most.

    Args:
        backbone: image -> feature maps.
        max_vectors: most vectors per side; by default as in that configuration.
        settings: further ones of the model.
    """
    given = {} if max_vectors is None else {"max_vectors": max_vectors}
    bank = partial(MemoryBank, **{**LEARNED_MODEL["bank"]["init_args"], **given})
    scorer = partial(Scorer, **LEARNED_MODEL["scorer"]["init_args"])
    model = PatchModel(backbone, LearnedEncoder, bank=bank, scorer=scorer, **settings).eval()
    model.canvas = Canvas((SIZE, SIZE))
    fill(model)
    return model


def fill(model: PatchModel) -> None:
    """Random vectors for the banks."""
    generator = torch.Generator().manual_seed(0)
    for side in model.sides:
        bank = model.bank(side)
        count, dim = bank.max_vectors or 10_000, model.encoder.patch_encoder(side).dim
        bank.vectors = torch.rand(count, dim, generator=generator) * 2 - 1
        bank.keys = torch.zeros(count, 2, dtype=torch.int64)
        bank.levels = torch.rand(count, generator=generator)


def content(images: Tensor) -> Tensor:
    """Height x width of each image, all of it content."""
    return torch.tensor(images.shape[2:]).expand(len(images), 2)


def print_stages(name: str, model: PatchModel, images: Tensor, repeats: int, rate: float) -> None:
    """The stages of one model, eager."""
    rows = measure_stages(model, images, content(images), repeats, rate)
    print(f"{name}, batch {len(images)}, eager\n", stage_table(rows), "", sep="\n")


def ours(name: str, model: PatchModel, images: Tensor) -> Tasks:
    """A model of patchad on a batch: eager, its encoders compiled, and the file that `patchad export` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.patchad"
        export(model, path)
        exported, graph = patchad.load(path), path.read_bytes()
    arrays, everything = list(images.permute(0, 2, 3, 1).numpy()), content(images)
    compiled = copy.deepcopy(model)
    compiled.encoder.forward = torch.compile(compiled.encoder.forward)
    inputs = {"image": images.numpy(), "content": everything.numpy()}
    ways = {
        "eager": partial(model, images, everything),
        "torch.compile": partial(compiled, images, everything),
        "ONNX Runtime": partial(exported.score, arrays),
        **in_openvino(graph, inputs),
    }
    return {Form(name, way, len(images)): run for way, run in ways.items()}


def in_openvino(graph: str | bytes, inputs: Any) -> dict[str, Callable[[], object]]:
    """An ONNX graph in OpenVINO, in float32 and as it comes, which may be in bfloat16."""
    import openvino  # type: ignore[reportMissingImports]  # of the extra bench

    core, settings = openvino.Core(), {"PERFORMANCE_HINT": "LATENCY"}
    read = core.read_model(graph)
    default = core.compile_model(read, "CPU", settings)
    exact = core.compile_model(read, "CPU", {**settings, "INFERENCE_PRECISION_HINT": "f32"})
    return {"OpenVINO, float32": lambda: exact(inputs), DEFAULT: lambda: default(inputs)}


def peer(name: str) -> Any:
    """A model of anomalib with random weights, ready to score."""
    from anomalib.models import EfficientAd, Padim, Patchcore  # type: ignore[reportMissingImports]  # of the extra bench

    if name == "EfficientAD-S":
        return EfficientAd(model_size="small").eval()
    if name == "PaDiM ResNet18":
        padim = Padim(backbone="resnet18", pre_trained=False).train()
        with torch.no_grad():
            for _ in range(2):
                padim.model(torch.rand(16, 3, SIZE, SIZE))
        padim.model.fit()
        return padim.eval()
    backbone, dim = ("resnet18", 384) if name.endswith("18") else ("wide_resnet50_2", 1536)
    patchcore = Patchcore(backbone=backbone, pre_trained=False, layers=["layer2", "layer3"]).eval()
    patchcore.model.memory_bank = torch.rand(CORESET, dim)  # type: ignore[union-attr]
    return patchcore


def theirs(name: str, images: Tensor) -> Tasks:
    """A model of anomalib on a batch: eager, and its ONNX file in both runtimes."""
    model, images = peer(name), images.contiguous()
    eager: Tasks = {Form(name, "eager", len(images)): partial(model.model, images)}
    return eager | {Form(name, way, len(images)): run for way, run in exported_ways(model, images).items()}


def exported_ways(model: Any, images: Tensor) -> dict[str, Callable[[], object]]:
    """The file that anomalib's `to_onnx` writes, for one size of batch, in both runtimes."""
    import onnxruntime

    array = images.numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with torch.no_grad():
            torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path))
        openvino = in_openvino(str(path), array)
    name = session.get_inputs()[0].name
    return {"ONNX Runtime": lambda: session.run(None, {name: array}), **openvino}


def print_times(times: Mapping[Form, list[float]]) -> None:
    """One row per method, way and batch."""
    print("\n| method | runs in | batch | median ms | 95th percentile ms | images/s |\n|---|---|---|---|---|---|")
    for form, runs in times.items():
        median, slow = np.median(runs), np.percentile(runs, 95)
        rate = 1e3 * form.batch / median
        print(f"| {form.method} | {form.way} | {form.batch} | {median:.1f} | {slow:.1f} | {rate:.1f} |")


def print_ratios(medians: Mapping[Form, float]) -> None:
    """Our fastest way over that of the fastest peer, with and without reduced precision; nothing without a peer."""
    peers = [form for form in medians if form.method in PEERS]
    if not peers:
        return
    print("\n| method, batch 1 | runs in | over the fastest peer, float32 | over the fastest peer |")
    print("|---|---|---|---|")
    exact = [form for form in peers if form.way != DEFAULT]
    for name in (name for name in OURS if any(form.method == name for form in medians)):
        own = min((form for form in medians if form.method == name), key=lambda form: medians[form])
        cells = []
        for group in (exact, peers):
            rival = min(group, key=lambda form: medians[form])
            cells.append(f"{medians[own] / medians[rival]:.2f} ({rival.method}, {rival.way})")
        print(f"| {name} | {own.way} | {' | '.join(cells)} |")
    print()


def memory(name: str, images: Tensor) -> str:
    """Peak memory of this process in MB after a batch of 8, eager."""
    model = OURS[name]() if name in OURS else peer(name).model
    model(images)
    return f"{peak_memory(torch.device('cpu')):.0f}"


def print_memory(names: list[str]) -> None:
    """Peak memory of each method in a process of its own."""
    print("| method, eager, batch 8 | peak memory of the process in MB |\n|---|---|")
    for name in names:
        command = [sys.executable, "-m", "benchmarks.speed", "--memory_of", name]
        print(f"| {name} | {subprocess.run(command, capture_output=True, text=True).stdout.strip()} |")
    print()


def print_sliding(name: str, image: Tensor, runs: int, **settings: Any) -> None:
    """Sliding beside dense, eager, in turns."""
    models = {mode: filled(VGG16(weights="none"), mode=mode, **settings) for mode in ("dense", "sliding")}
    times = alternate({mode: partial(model, image, content(image)) for mode, model in models.items()}, runs)
    dense, sliding = (float(np.median(times[mode])) for mode in models)
    print(f"{name}, eager: dense {dense:.0f} ms, sliding {sliding:.0f} ms, {sliding / dense:.0f} times")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
