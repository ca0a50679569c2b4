"""What the precisions of exported files do to figures, verdicts and milliseconds, as Markdown.

python -m benchmarks.precisions --checkpoints '{"default, screw": "runs/version_0/checkpoints/last.ckpt"}'

Each checkpoint is exported in float32 and in int8, also where `patchad export` refuses that, and both files score the
test images of the checkpoint's own data. Milliseconds are those of the graph, of both in turns. Rows are kept in a CSV:
the same command goes on where the last one ended.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import auto_cli

import patchad
from benchmarks.products import append, read_rows
from benchmarks.speed import quiet
from patchad import PatchDetector, PyramidDataModule
from patchad.errors import PatchadError
from patchad.export import export
from patchad.metrics import AnomalyMetrics
from patchad.precision import Harm, in_int8
from patchad.pyramid import crop_resize
from patchad.runtime import ExportedDetector
from patchad.timing import alternate
from patchad.types import Prediction

COLUMNS = (
    "checkpoint",
    "precision",
    "detection / segmentation",
    "PRO",
    "verdicts that differ",
    "of them to false alarms / to misses",
    "painted defects: AUROC",
    "painted defects: verdicts that differ",
    "ms, 1 image",
    "ms, 8 images",
    "patchad export",
)


class Row(NamedTuple):
    """A file on the test images of its checkpoint.

    Attributes:
        name: of the checkpoint.
        precision: of the file.
        detection: AUROC in %.
        segmentation: AUROC in %.
        pro: in %.
        changed: verdicts that differ from those of the file in float32.
        alarms: of them, normal images that are anomalous now.
        misses: of them, defects that are normal now.
        images: of how many.
        painted: AUROC in % of painted defects.
        painted_changed: verdicts on them, and on normal images, that differ.
        painted_images: of how many.
        one: milliseconds of one image.
        eight: milliseconds of eight.
        state: whether `patchad export` writes it.
    """

    name: str
    precision: str
    detection: float
    segmentation: float
    pro: float
    changed: int
    alarms: int
    misses: int
    images: int
    painted: float
    painted_changed: int
    painted_images: int
    one: float
    eight: float
    state: str

    def markdown(self) -> str:
        """One line of the table."""
        cells = (
            self.name,
            self.precision,
            f"{self.detection:.1f} / {self.segmentation:.1f}",
            f"{self.pro:.1f}",
            f"{self.changed} of {self.images}",
            f"{self.alarms} / {self.misses}",
            f"{self.painted:.1f}",
            f"{self.painted_changed} of {self.painted_images}",
            f"{self.one:.1f}",
            f"{self.eight:.1f}",
            self.state,
        )
        return f"| {' | '.join(cells)} |"


class Tested(NamedTuple):
    """What a file says of the test images: figures in %, and verdicts and labels of each."""

    figures: Mapping[str, float]
    anomalous: torch.Tensor
    label: torch.Tensor


@quiet()
def main(
    checkpoints: dict[str, Path],
    folder: Path = Path("runs/precisions"),
    repeats: int = 20,
    results: Path = Path("precisions.csv"),
) -> None:
    """Measures what is missing, and prints the table.

    Args:
        checkpoints: what `patchad fit` wrote, by the name that a row has.
        folder: where files are exported to, and removed from again.
        repeats: timed runs of each file.
        results: the CSV.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in checkpoints.items():
        if name not in {row.name for row in read_rows(results, Row)}:
            for row in measured(name, path, folder, repeats):
                append(results, row)
    print(f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n")
    print(*(row.markdown() for row in read_rows(results, Row) if row.name in checkpoints), sep="\n")


@torch.no_grad()
def measured(name: str, path: Path, folder: Path, repeats: int) -> list[Row]:
    """The rows of one checkpoint."""
    detector, data = PatchDetector.load_from_checkpoint(path), PyramidDataModule.load_from_checkpoint(path)
    exact = detector.model.eval()
    reduced, moves = in_int8(exact, data, detector.fitted)
    try:
        moves.check()
        state = "written"
    except PatchadError:
        state = "refused"
    places = {precision: folder / f"{precision}.patchad" for precision in ("float32", "int8")}
    for model, place in zip((exact, reduced), places.values(), strict=True):
        export(model, place, path)
    files = {precision: patchad.load(place) for precision, place in places.items()}
    data.setup("test")
    found = {precision: tested(file, data) for precision, file in files.items()}
    times = timed(files, data, repeats)
    for place in places.values():
        place.unlink()
    exactly = moves._replace(auroc=moves.exact_auroc, changed=0)
    painted = {"float32": (exactly, "written"), "int8": (moves, state)}
    before = found["float32"].anomalous
    return [
        row(name, precision, found[precision], before, *painted[precision], *times[precision]) for precision in files
    ]


def row(
    name: str, precision: str, found: Tested, before: torch.Tensor, moves: Harm, state: str, one: float, eight: float
) -> Row:
    """The row of one file, with the verdicts of that in float32."""
    now, label = found.anomalous, found.label
    return Row(
        name=name,
        precision=precision,
        detection=100 * found.figures["detection_auroc"],
        segmentation=100 * found.figures["segmentation_auroc"],
        pro=100 * found.figures["pro"],
        changed=int((now != before).sum()),
        alarms=int((now & ~before & (label == 0)).sum()),
        misses=int((~now & before & (label == 1)).sum()),
        images=len(label),
        painted=moves.auroc,
        painted_changed=moves.changed,
        painted_images=moves.images,
        one=one,
        eight=eight,
        state=state,
    )


def tested(file: ExportedDetector, data: PyramidDataModule) -> Tested:
    """Scores all test images by a file."""
    metrics, verdicts, labels = AnomalyMetrics((), full=True, defects=data.defects), [], []
    for batch in data.test_dataloader():
        placed = [(image.numpy(), tuple(size)) for image, size in zip(batch.image, batch.content.tolist(), strict=True)]
        scores, maps = map(torch.from_numpy, file.run(placed, [None] * len(placed)))
        verdicts.append(scores > file.threshold)
        labels.append(batch.label)
        size = (batch.mask.shape[1], batch.mask.shape[2])
        prediction = Prediction(scores, verdicts[-1], maps, {}, {})
        metrics.update(prediction, batch, {"combined": crop_resize(maps, batch.content, size)})
    figures = {figure: float(value) for figure, value in metrics.compute().items()}
    return Tested(figures, torch.cat(verdicts), torch.cat(labels))


def timed(files: Mapping[str, ExportedDetector], data: PyramidDataModule, repeats: int) -> dict[str, list[float]]:
    """Median milliseconds of one and of eight images in the graph of each file, of all in turns."""
    items = [data.test_set[number] for number in range(8)]
    placed = [(item.image.numpy(), tuple(item.content.tolist())) for item in items]
    tasks = {
        (precision, count): partial(file.run, placed[:count], [None] * count)
        for precision, file in files.items()
        for count in (1, 8)
    }
    times = alternate(tasks, repeats)
    return {precision: [float(np.median(times[precision, count])) for count in (1, 8)] for precision in files}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
