"""Milliseconds of a training step of `--config paper`, in several forms, in turns, as Markdown.

python -m benchmarks.steps --device cuda

Beside the time stands how many operations Python starts (those of ATen, as the profiler counts them): what a GPU waits
for. A step takes 64 pyramids of three sides, 256 patches each, of images of 256 x 256 pixels. Weights of VGG16 are
random and images synthetic, which does not change the time. An epoch of transistor's 213 images has 333 such steps; it
is reckoned from the median, and holds once pseudo-labels are reassigned as well.
"""

import itertools
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import auto_cli
from lightning_fabric.utilities import move_data_to_device
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import quiet
from patchad import Learning, PatchDetector, PyramidDataModule
from patchad.data.synthetic import write_synthetic
from patchad.models import VGG16, LearnedEncoder
from patchad.timing import alternate
from patchad.types import PyramidBatch, PyramidPlan

STEPS = 333
"""Of an epoch of transistor: 213 images, drawn 100 times, 64 at once."""


class Form(NamedTuple):
    """How a step is computed.

    Attributes:
        precision: of convolutions; torch takes TF32 for float32 on a GPU.
        compiled: whether it is one graph.
    """

    precision: torch.dtype
    compiled: bool


FORMS: Mapping[str, Form] = {
    "float32": Form(torch.float32, False),
    "bfloat16": Form(torch.bfloat16, False),
    "float32, compiled": Form(torch.float32, True),
    "bfloat16, compiled": Form(torch.bfloat16, True),
}


@quiet()
def main(
    device: str = "cpu", forms: tuple[str, ...] = tuple(FORMS), pyramids: int = 64, repeats: int = 10, workers: int = 0
) -> None:
    """Prints the table.

    Args:
        device: where it runs.
        forms: of a step.
        pyramids: in a batch, at least 13, so that four batches fill 50 clusters.
        repeats: timed steps.
        workers: processes that draw pyramids.
    """
    place = torch.device(device)
    where = (
        torch.cuda.get_device_name(place) if place.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as folder:
        data = images(Path(folder), pyramids, workers)
        batches = [move_data_to_device(batch, place) for batch in itertools.islice(data.train_dataloader(), 4)]
        tasks: dict[str, Callable[[], object]] = {name: steps(FORMS[name], data, batches, place) for name in forms}
        loader = itertools.chain.from_iterable(itertools.repeat(data.train_dataloader()))
        tasks["drawing pyramids, one process"] = lambda: next(loader)
        times = alternate(tasks, repeats, place)
        started = {name: operations(task) for name, task in tasks.items()}
    print(f"{where}, {pyramids} pyramids a step\n")
    print("| form | step, ms | epoch of transistor, s | operations started |\n|---|---|---|---|")
    for name, measured in times.items():
        median = float(np.median(measured))
        print(f"| {name} | {median:.1f} | {median * STEPS / 1e3:.1f} | {started[name]} |")


def images(folder: Path, pyramids: int, workers: int) -> PyramidDataModule:
    """Images as `--config paper` draws them."""
    write_synthetic(folder / "product", train=16, test_normal=2, test_defective=7, size=256)
    data = PyramidDataModule(
        folder / "product",
        image_size=256,
        batch_size=pyramids,
        pyramids_per_image=1,
        draws_per_epoch=100,
        shift=0,
        colour_deviation=0.02,
        noise_deviation=0.02,
        num_workers=workers,
        held_out_fraction=0.0,
        validate_on="none",
    )
    data.prepare_data()
    data.setup("fit")
    data.plan = PyramidPlan(dict.fromkeys((64, 32, 16), 1), resident=True)
    return data


def steps(form: Form, data: PyramidDataModule, batches: list[PyramidBatch], device: torch.device) -> Callable[[], None]:
    """A function that makes one step after the other, with pseudo-labels."""
    detector = PatchDetector(
        VGG16(weights="none", trainable="all"),
        partial(LearnedEncoder, standardized=False, shortcut=False),
        mode="sliding",
        taps={64: "relu5_3", 32: "relu3_3", 16: "relu2_2"},
        scoring_strides={64: 16, 32: 4, 16: 4},
        learning=partial(Learning, learning_rate=1e-5, compiled=form.compiled),
    ).to(device)
    assert detector.learning is not None
    features = detector.learning.features
    paths = [str(sample.path) for sample in data.train_set.samples]
    features.open(paths, "", data.image_size, False, data.augmentations)
    for number in range(len(data.train_set)):
        nothing = torch.zeros(1, dtype=torch.long, device=device)
        features.keep(nothing + number, nothing, nothing, data.train_set[number].image[None].to(device), nothing)
    detector.learning.reassign_pseudo_labels(batches, lambda centroids: centroids)
    optimizer, turns = detector.configure_optimizers()[0], itertools.count()

    def step() -> None:
        number = next(turns)
        batch = batches[number % len(batches)]
        with torch.autocast(device.type, form.precision, enabled=form.precision != torch.float32):
            loss, _ = detector._step(features.read(batch, (0, number)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def operations(task: Callable[[], object]) -> int:
    """How many operations of ATen a task starts that no other one starts."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        task()
    events = [event for event in recorded.events() or () if event.name.startswith("aten::")]
    return sum(event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::") for event in events)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
