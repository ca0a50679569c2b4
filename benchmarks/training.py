"""Seconds and peak memory of a fit: of patchad, and of its peers by anomalib's own engine, as Markdown.

pip install ".[bench]"
python -m benchmarks.training --data ../shared/data/mvtec_ad_256/bottle

Each fit is a process of its own, which is timed from its start to its end; all run in turns. Weights of the peers are
random: that does not change the time. EfficientAD would take weights and images from elsewhere: of it, some steps are
timed, and multiplied by how many its default has.
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse import auto_cli

from benchmarks.speed import SIZE, peer, quiet
from benchmarks.tables import in_process

OURS = {"default": [], "fast": ["--config", "fast"]}
PEERS = {
    "PaDiM ResNet18": ("Padim", {"backbone": "resnet18"}),
    "PatchCore ResNet18": ("Patchcore", {"backbone": "resnet18"}),
    "PatchCore WideResNet50": ("Patchcore", {"backbone": "wide_resnet50_2"}),
}
"""What anomalib calls them; all else is its default, such as PatchCore's coreset of 10 %."""
STEPPED, STEPS = "EfficientAD-S", 70_000
"""Steps of its default (Batzner et al., WACV 2024), each of one image and one of ImageNet."""


class Fit(NamedTuple):
    """What one fit took: seconds by the clock and of the processors, and the peak memory of its process in MB."""

    seconds: float
    processors: float
    megabytes: float


def main(
    data: Path = Path("../shared/data/mvtec_ad_256/bottle"),
    methods: tuple[str, ...] = (*OURS, *PEERS, STEPPED),
    rounds: int = 2,
    steps: int = 20,
    options: tuple[str, ...] = (),
    alone: str | None = None,
) -> None:
    """Fits, and prints the table.

    Args:
        data: a product in MVTec AD's layout.
        methods: which are fitted.
        rounds: how often each.
        steps: of EfficientAD, that are timed.
        options: of `patchad fit`.
        alone: only fit this peer, here.
    """
    if alone is not None:
        return fit_peer(alone, data)
    known = [name for name in methods if name != STEPPED]
    fits: dict[str, list[Fit]] = {name: [] for name in known}
    for _ in range(rounds):
        for name in known:
            fits[name].append(fitted(name, data, options))
            print(f"{name}: {fits[name][-1].seconds:.1f} s", file=sys.stderr, flush=True)
    print(f"{data.name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; the fastest of {rounds} fits\n")
    print(*table(fits), sep="\n")
    if STEPPED in methods:
        seconds = step_seconds(steps)
        print(
            f"\n{STEPPED}: {seconds:.2f} s a step, the median of {steps}; {STEPS} steps {seconds * STEPS / 3600:.0f} h"
        )


def fitted(name: str, data: Path, options: Sequence[str]) -> Fit:
    """Runs one fit."""
    with tempfile.TemporaryDirectory() as folder:
        if name in OURS:
            place = [f"--trainer.logger.save_dir={folder}", f"--trainer.default_root_dir={folder}"]
            arguments = ["patchad", "fit", *OURS[name], f"--data.root={data}", *place, *options]
        else:
            arguments = ["benchmarks.training", f"--data={data}", f"--alone={name}"]
        before = processor_seconds()
        ran = in_process([sys.executable, "-m", *arguments])
        return Fit(ran.seconds, processor_seconds() - before, ran.megabytes)


def processor_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(fits: dict[str, list[Fit]]) -> list[str]:
    """Markdown, of the fastest fit of each method, with the default's time over that of each."""
    best = {name: min(runs) for name, runs in fits.items()}
    lines = ["| method | seconds | of the processors | peak memory, MB | default over it |", "|---|---|---|---|---|"]
    for name, fit in best.items():
        over = f"{best['default'].seconds / fit.seconds:.2f}" if "default" in best else "-"
        lines.append(f"| {name} | {fit.seconds:.1f} | {fit.processors:.1f} | {fit.megabytes:.0f} | {over} |")
    return lines


@quiet()
def fit_peer(name: str, data: Path) -> None:
    """Fits a peer as anomalib does."""
    from anomalib import models  # type: ignore[reportMissingImports]  # of the extra bench
    from anomalib.data import MVTecAD  # type: ignore[reportMissingImports]  # the same
    from anomalib.engine import Engine  # type: ignore[reportMissingImports]  # the same

    kind, settings = PEERS[name]
    images: Any = MVTecAD(root=data.parent, category=data.name, num_workers=os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(accelerator="cpu", default_root_dir=folder, logger=False)
        engine.fit(getattr(models, kind)(pre_trained=False, **settings), datamodule=images)


def step_seconds(count: int) -> float:
    """The median time of a step of EfficientAD, after one that warms up."""
    model = peer(STEPPED).model.train()
    trained = [*model.student.parameters(), *model.ae.parameters()]
    optimizer, times = torch.optim.Adam(trained), []
    image, other = torch.rand(2, 1, 3, SIZE, SIZE)
    for _ in range(count + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.stack(model(batch=image, batch_imagenet=other)).sum().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
