"""Milliseconds of the files that patchad exports beside its peers', in every form, in one process, as Markdown.

pip install ".[bench]"
python -m benchmarks.speed

The peers are anomalib's, eager and as the files that they export themselves. Ratios are to the fastest form of each,
also where that is OpenVINO's own choice of precision, bfloat16 where the CPU has it. Of ours only forms in float32
count: scores in bfloat16 are wrong. Weights are random, but for EfficientNet-Lite0: they do not change the time. Images
are synthetic, and banks are as large as those of a fit of `FITTED` images.
"""

import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import auto_cli
from torch import Tensor

import patchad
from patchad import PatchModel, PyramidDataModule
from patchad.canvas import Canvas, Size
from patchad.cli import CONFIGS
from patchad.data.synthetic import write_synthetic
from patchad.engines import processor
from patchad.export import export
from patchad.lists import divide
from patchad.memory import MemoryBank
from patchad.models import VGG16, EfficientNetLite0, LearnedEncoder
from patchad.models.backbones import Backbone
from patchad.scoring import Scorer
from patchad.stages import stage_table
from patchad.timing import CPU, alternate, best_rate, measure_stages, peak_memory, reset_peak_memory

SIZE = 256
FITTED, SHOWN = 320, 16
"""Images of the fit that banks are as large as (MVTec AD's screw), and images whose patches they are made of."""
CORESET = int(0.1 * 209 * 32 * 32)
"""Vectors of PatchCore's bank: 10 % of the patches of 209 images."""
LEARNED_MODEL = yaml.safe_load((CONFIGS / "learned.yaml").read_text())["model"]["init_args"]
OURS: Mapping[str, Callable[[], PatchModel]] = {
    "default": lambda: fitted((384, 384)),
    "fast": lambda: fitted((SIZE, SIZE)),
    "learned": lambda: filled(EfficientNetLite0()),
    "learned VGG16": lambda: filled(VGG16(weights="none")),
}
"""`--config` of each name, the last with another backbone."""
PEERS = ("PaDiM ResNet18", "PatchCore ResNet18", "PatchCore WideResNet50", "EfficientAD-S")
EAGER, EXACT, CHOSEN = "eager", ("ONNX Runtime", "OpenVINO, float32"), "OpenVINO, default"
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""What speeds up networks, of what a CPU may have."""

Ways = dict[str, Callable[[], object]]
"""The forms in which a method runs, on images of its own."""
Form = tuple[str, str]
"""A method, and the way in which it runs."""
Setting = tuple[int, int]
"""Threads, and images at once."""
Runs = list[dict[Form, list[float]]]
"""Milliseconds of each form, of each round."""


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of exporters would drown the tables; as a decorator, too."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


@quiet()
@torch.inference_mode()
def main(
    repeats: int = 20,
    rounds: int = 2,
    ours: tuple[str, ...] = ("default", "fast"),
    peers: tuple[str, ...] = PEERS,
    files: tuple[Path, ...] = (),
    batch_sizes: tuple[int, ...] = (1, 8),
    threads: tuple[int, ...] = (1, 2),
    memory_of: str | None = None,
) -> None:
    """Prints stages over their floors, times of all forms in turns with those of each peer, ratios and memory.

    Args:
        repeats: alternating runs of each form.
        rounds: how often all of it is measured.
        ours: of `OURS`.
        peers: of `PEERS`, one after the other, since together they do not fit into the memory of small machines.
        files: what `patchad export` wrote, of real fits, in place of `ours`; without stages.
        batch_sizes: images at once.
        threads: of the CPU.
        memory_of: only score a batch of 8 with this method and print the peak memory of the process in MB.
    """
    if memory_of is not None:
        return print(memory(memory_of))
    print(f"{machine()}\n")
    models = {} if files else {name: OURS[name]() for name in ours}
    for name, model in models.items():
        for count in threads:
            print_stages(name, model, batch_sizes, count, repeats)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            export(model, Path(folder) / f"{name}.patchad")
        paths = files or [Path(folder) / f"{name}.patchad" for name in models]
        opened = {count: [Ours(path, count, models.get(path.stem)) for path in paths] for count in threads}
        measured: dict[tuple[str, Setting], Runs] = {}
        for rival in peers:
            for setting, runs in beside(rival, opened, batch_sizes, repeats, rounds):
                print_times(runs, setting)
                measured[rival, setting] = runs
    print_ratios(measured, [path.stem for path in paths])
    print_memory([*models, *peers])


def beside(
    rival: str, opened: Mapping[int, Sequence["Ours"]], batch_sizes: Sequence[int], repeats: int, rounds: int
) -> Iterator[tuple[Setting, Runs]]:
    """All forms of ours and of one peer, timed in turns for each size of batch and number of threads.

    Args:
        rival: the peer.
        opened: ours, by threads.
        batch_sizes: images at once.
        repeats: alternating runs of each form.
        rounds: how often all of it is measured.
    """
    model = peer(rival)
    for batch in batch_sizes:
        images = synthetic_images(batch)
        with tempfile.TemporaryDirectory() as folder:
            path = write_peer(model, images, Path(folder) / "peer.onnx")
            for threads, files in opened.items():
                torch.set_num_threads(threads)
                tasks: dict[Form, Callable[[], object]] = {(rival, EAGER): partial(model.model, images)}
                tasks |= {(rival, way): run for way, run in peer_ways(path, images, threads).items()}
                tasks |= {(file.name, way): run for file in files for way, run in file.ways(batch).items()}
                yield (threads, batch), [alternate(tasks, repeats) for _ in range(rounds)]
                tasks.clear()  # before the next are opened


def machine() -> str:
    """Its processor and the versions of what runs on it."""
    told = processor()
    names = [told["model name"], *(f"{name} {told[name]}" for name in ("cpu family", "model") if name in told)]
    features = [name for name in FEATURES if name in told.get("flags", "").split()]
    versions = [f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino", "anomalib")]
    return "; ".join([", ".join([*names, f"{os.cpu_count()} cores"]), " ".join(features), ", ".join(versions)])


def synthetic_images(count: int, size: int = SIZE) -> Tensor:
    """The first test images of the synthetic product, `[count, 3, size, size]`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "product"
        write_synthetic(root, train=2, test_normal=count, test_defective=7, size=size)
        data = PyramidDataModule(root, image_size=(size, size), num_workers=0)
        data.setup("test")
        return torch.stack([data.test_set[number].image for number in range(count)])


@torch.inference_mode()
def fitted(size: Size) -> PatchModel:
    """The model of `--config default` on square images, its banks as large as a fit of `FITTED` images makes them."""
    model = PatchModel().eval()
    model.canvas = Canvas(size)
    images = synthetic_images(SHOWN, size[0])
    model.encoder.observe(model.encoder.observable(images))
    for standardize in model.encoder.standardizers.values():
        standardize.finish(lambda moments: moments)
    generator = torch.Generator().manual_seed(0)
    for side, embeddings in model.embed(images).items():
        vectors, bank = embeddings.movedim(1, 3).flatten(0, 2), model.bank(side)
        count = min(FITTED * len(vectors) // SHOWN, bank.max_vectors or FITTED * len(vectors))
        chosen = vectors[torch.randint(len(vectors), (count,), generator=generator)]
        fill(bank, chosen + 0.1 * vectors.std(0) * torch.randn(chosen.shape, generator=generator))
    noise = torch.rand(2, 3, *size, generator=generator)
    model.calibrate(model.distances(noise, content(noise)), torch.tensor([True, True]))
    return model


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
    generator = torch.Generator().manual_seed(0)
    for side in model.sides:
        count, dim = model.bank(side).max_vectors or 10_000, model.encoder.patch_encoder(side).dim
        fill(model.bank(side), torch.rand(count, dim, generator=generator) * 2 - 1)
    return model


def fill(bank: MemoryBank, vectors: Tensor) -> None:
    """Gives a bank these vectors, with random levels."""
    bank.vectors, bank.keys = vectors, torch.zeros(len(vectors), 2, dtype=torch.int64)
    bank.levels = torch.rand(len(vectors), generator=torch.Generator().manual_seed(0))
    if bank.exact_most is not None and len(vectors) > bank.exact_most:
        bank.lists = divide(vectors)


def content(images: Tensor) -> Tensor:
    """Height x width of each image, all of it content."""
    return torch.tensor(images.shape[2:]).expand(len(images), 2)


class Ours:
    """A file that `patchad export` wrote, opened in every form.

    Args:
        path: the file.
        threads: of the CPU.
        model: that it was made of, which runs eager; None leaves that out.
    """

    def __init__(self, path: Path, threads: int, model: PatchModel | None) -> None:
        self.name, self.model = path.stem, model
        runtimes = zip(EXACT, ("onnxruntime", "openvino"), strict=True)
        self.exact = {way: patchad.load(path, threads, runtime=runtime) for way, runtime in runtimes}
        self.chosen = compiled(path, threads)
        self.size = self.exact[EXACT[0]].canvas.image_size

    def ways(self, batch: int) -> Ways:
        """All forms on that many images of the size that the file reads."""
        images = synthetic_images(batch, max(self.size))[:, :, : self.size[0], : self.size[1]]
        arrays, everything = list(images.numpy()), content(images)
        inputs = {"image": np.stack(arrays), "content": everything.numpy()}
        eager: Ways = {} if self.model is None else {EAGER: partial(self.model, images, everything)}
        exact = {way: partial(detector.score, arrays) for way, detector in self.exact.items()}
        return {**eager, **exact, CHOSEN: partial(self.chosen, inputs)}


def compiled(path: Path, threads: int | None, **settings: str) -> Any:
    """A graph in OpenVINO, for the least time of one batch; which precision it takes is its own choice."""
    from openvino import Core  # type: ignore[reportMissingImports]  # of the extra bench

    given = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    return Core().compile_model(path, "CPU", {"PERFORMANCE_HINT": "LATENCY", **given, **settings})


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


def write_peer(model: Any, images: Tensor, path: Path) -> Path:
    """The file of a model of anomalib, as its `to_onnx` writes it, for batches of that size."""
    with torch.no_grad():
        torch.onnx.export(model, (images.contiguous(),), path, dynamo=True, verbose=False)
    return path


def peer_ways(path: Path, images: Tensor, threads: int | None = None) -> Ways:
    """A peer's file in both runtimes, on these images."""
    import onnxruntime

    array, options = images.numpy(), onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options)
    inputs = {session.get_inputs()[0].name: array}
    exact, chosen = compiled(path, threads, INFERENCE_PRECISION_HINT="f32"), compiled(path, threads)
    runs = (lambda: session.run(None, inputs), lambda: exact(array))
    return {**dict(zip(EXACT, runs, strict=True)), CHOSEN: lambda: chosen(array)}


def print_stages(name: str, model: PatchModel, batch_sizes: Sequence[int], threads: int, repeats: int) -> None:
    """The stages of one model, eager, over what they would take at the best rate of so many threads."""
    torch.set_num_threads(threads)
    rate = best_rate(CPU)
    assert model.canvas is not None
    for batch in batch_sizes:
        images = synthetic_images(batch, model.canvas.image_size[0])
        rows = measure_stages(model, images, content(images), repeats, rate)
        vectors = ", ".join(f"{len(bank)}" for bank in model.memory_banks.values())
        print(f"{name}, eager: {images.shape[2]} pixels; {vectors} vectors", end="; ")
        print(f"batch {batch}, threads {threads}, best rate measured {rate / 1e9:.0f} GFLOP/s\n")
        print(stage_table(rows), "", sep="\n", flush=True)


def print_times(runs: Runs, setting: Setting) -> None:
    """One row per form: what each round measured."""
    threads, batch = setting
    print(f"batch {batch}, threads {threads}\n\n| method | runs in | median ms | 95th percentile ms | images/s |")
    print("|---|---|---|---|---|")
    for form in runs[0]:
        medians = [float(np.median(times[form])) for times in runs]
        slow = [float(np.percentile(times[form], 95)) for times in runs]
        rates = [1e3 * batch / median for median in medians]
        cells = (", ".join(f"{value:.1f}" for value in values) for values in (medians, slow, rates))
        print(f"| {' | '.join([*form, *cells])} |")
    print(flush=True)


def print_ratios(measured: Mapping[tuple[str, Setting], Runs], ours: Sequence[str]) -> None:
    """Milliseconds of our fastest form in float32 over those of the fastest form of each peer."""
    rivals = list(dict.fromkeys(rival for rival, _ in measured))
    print(f"| ours over | threads | batch | {' | '.join(rivals)} |\n|---|---|---|{'---|' * len(rivals)}")
    for setting in dict.fromkeys(setting for _, setting in measured):
        for name in ours:
            cells = [ratios(measured[rival, setting], name, rival) for rival in rivals]
            print(f"| {' | '.join([name, *map(str, setting), *cells])} |")
    print()


def ratios(runs: Runs, name: str, rival: str) -> str:
    """The ratio of each round, and the forms that the last is of."""
    found, ways = [], ""
    for times in runs:
        medians = {form: float(np.median(values)) for form, values in times.items()}
        own = min(EXACT, key=lambda way: medians[name, way])
        theirs = min((way for method, way in medians if method == rival), key=lambda way: medians[rival, way])
        found.append(f"{medians[name, own] / medians[rival, theirs]:.2f}")
        ways = f"{own} over {theirs}"
    return f"{', '.join(found)} ({ways})"


def memory(name: str) -> str:
    """Peak memory of this process in MB in scoring a batch of 8, eager."""
    model = OURS[name]() if name in OURS else peer(name).model
    own = isinstance(model, PatchModel) and model.canvas
    images = synthetic_images(8, own.image_size[0] if own else SIZE)
    reset_peak_memory(CPU)
    model(images)
    return f"{peak_memory(CPU):.0f}"


def print_memory(names: Sequence[str]) -> None:
    """Peak memory of each method in a process of its own."""
    print("| method, eager, batch 8 | peak memory of the process in MB |\n|---|---|")
    for name in names:
        command = [sys.executable, "-m", "benchmarks.speed", "--memory_of", name]
        print(f"| {name} | {subprocess.run(command, capture_output=True, text=True).stdout.strip()} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
