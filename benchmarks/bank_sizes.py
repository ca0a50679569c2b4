"""AUROC against the size of the memory bank, as Markdown.

python -m benchmarks.bank_sizes --ckpt_path runs/version_0/checkpoints/last.ckpt

Every image is embedded once; then each bank is filled, calibrated and tested as `patchad fit` and `patchad test` do.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from patchad import PatchModel
from patchad.canvas import Size
from patchad.data import PyramidDataModule
from patchad.memory import MemoryBank, Reduction
from patchad.metrics import COMBINED, AnomalyMetrics
from patchad.model import Distances
from patchad.pyramid import crop_resize
from patchad.types import ImageBatch

Embedded = list[tuple[ImageBatch, dict[int, Tensor]]]


@torch.inference_mode()
def main(
    ckpt_path: Path,
    sizes: tuple[int, ...] = (300, 1000, 3000, 10_000, 30_000),
    reductions: tuple[Reduction, ...] = ("random", "kcenter", "kmeans"),
    everything: bool = True,
    exactly: bool = False,
    metric_size: Size | None = None,
    baseline: float | None = None,
) -> None:
    """Prints one row for each size and reduction.

    Args:
        ckpt_path: a fitted detector; its data settings are used again.
        sizes: most vectors per side.
        reductions: how they are chosen.
        everything: also keep all vectors.
        exactly: compare with all vectors of each bank, also of one that is searched in lists otherwise.
        metric_size: height x width of the masks in pixels; by default as fitted.
        baseline: of the banks; by default as fitted.
    """
    model = PatchModel.load(ckpt_path)
    data = PyramidDataModule.load_from_checkpoint(ckpt_path)
    data.metric_size = metric_size or data.metric_size
    data.setup("fit")
    loaders = data.normal_dataloader(), data.test_dataloader()
    normals, test = (embed(model, loader) for loader in loaders)
    level = model.bank(model.sides[0]).baseline if baseline is None else baseline
    print("| vectors per side | chosen by | detection / segmentation | filling | test without embedding |")
    print("|---|---|---|---|---|")
    banks: list[tuple[int | None, Reduction]] = [(None, "random")] if everything else []
    for size in sorted(sizes, reverse=True):
        banks.extend((size, reduction) for reduction in reductions)
    for size, reduction in banks:
        start = time.perf_counter()
        for side in model.sides:
            model.banks[str(side)] = MemoryBank(side, size, reduction, level, model.bank(side).seed)
        fill(model, normals, data.normal_set.things, exactly)
        filled = time.perf_counter()
        calibrate(model, normals, data)
        calibrated = time.perf_counter()
        figures = evaluate(model, test, data.image_size)
        seconds = f"{filled - start:.1f} s | {time.perf_counter() - calibrated:.1f} s"
        aurocs = " / ".join(f"{100 * figures[f'{kind}_auroc']:.2f}" for kind in ("detection", "segmentation"))
        kept = ", ".join(str(len(model.bank(side))) for side in model.sides)
        name = reduction if size else "all"
        print(f"| {kept} | {name}{', searched exactly' if exactly else ''} | {aurocs} | {seconds} |", flush=True)


def embed(model: PatchModel, batches: Iterable[ImageBatch]) -> Embedded:
    """Embeddings of every image, kept without the images."""
    return [(batch._replace(image=torch.empty(0)), model.embed(batch.image)) for batch in batches]


def fill(model: PatchModel, normals: Embedded, things: Tensor, exactly: bool) -> None:
    """Fills the banks."""
    model.remember(normals, things)
    for side in model.sides if exactly else ():
        bank = model.bank(side)
        bank.lists = bank.lists[:0]


def calibrate(model: PatchModel, normals: Embedded, data: PyramidDataModule) -> None:
    """Sets the scales and the threshold."""
    size, unseen = data.image_size, data.held_out | (not model.learns)
    parts = [model.nearest(embeddings, batch.content, size, batch.thing) for batch, embeddings in normals]
    sides = {side: torch.cat([part.sides[side] for part in parts]) for side in model.sides}
    model.calibrate(Distances(sides, torch.cat([part.content for part in parts]), *size), unseen)


def evaluate(model: PatchModel, images: Embedded, size: Size) -> dict[str, Tensor]:
    """AUROCs of the combined map."""
    metrics = AnomalyMetrics(sides=())
    for batch, embeddings in images:
        prediction = model.score(model.nearest(embeddings, batch.content, size))
        resized = crop_resize(prediction.map, batch.content, (batch.mask.shape[1], batch.mask.shape[2]))
        metrics.update(prediction, batch, {COMBINED: resized})
    return metrics.compute()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
