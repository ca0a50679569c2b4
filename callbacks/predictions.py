"""`patchad predict` -> scores.csv, and a heat map and a float32 map per image."""

import csv
import hashlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities import rank_zero_info

from patchad.callbacks.pictures import colour
from patchad.callbacks.publish import run_folder
from patchad.data.doubts import of_all_processes
from patchad.detector import Detector
from patchad.files import write_array, write_whole
from patchad.pyramid import crop_resize
from patchad.types import ImageBatch, Prediction

LONGEST_NAME = 255
"""Bytes of the name of a file."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What begins a cell that a spreadsheet runs."""


class Row(NamedTuple):
    """A line of scores.csv; an image that could not be read has the reason alone."""

    path: str
    score: float
    p_value: float
    verdict: str
    reason: str = ""


class Predictions(Callback):
    """Writes what `patchad predict` found into `predictions/` of the run folder.

    `scores.csv` holds path, score, p-value (`Scorer.p_value`) and verdict of each image; below `maps/`, in the folders
    of the images, lie a heat map (PNG: blue up to the mean of normal images, red from the threshold upwards) and the
    map itself (`.npy`, float32 `[height, width]`), both at the size of the image's file.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def on_predict_start(self, trainer: Trainer, pl_module: Detector) -> None:
        """Starts with no rows."""
        self.folder = run_folder(trainer) / "predictions"
        self.rows, self.kept = [], self.folder / f".{trainer.global_rank}.csv.part"
        self.kept.unlink(missing_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Detector,
        outputs: Prediction,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the maps of a batch, and keeps its scores."""
        root, scorer = Path(trainer.datamodule.root), pl_module.scorer  # type: ignore[attr-defined]
        limits, p_values = (scorer.normal_level, float(scorer.threshold)), scorer.p_value(outputs.score)
        rows = []
        for number, (name, error) in enumerate(zip(batch.path, batch.error, strict=True)):
            if error:
                rows.append(Row(name, math.nan, math.nan, "unreadable", error))
                continue
            size = (int(batch.size[number, 0]), int(batch.size[number, 1]))
            values = crop_resize(outputs.map[number, None], batch.content[number, None], size)[0].cpu().numpy()
            write_maps(self.folder / "maps" / Path(name).relative_to(root), values, limits)
            verdict = "anomalous" if outputs.anomalous[number] else "normal"
            rows.append(Row(name, float(outputs.score[number]), float(p_values[number]), verdict))
        append_scores(self.kept, rows)
        self.rows += rows

    def on_exception(self, trainer: Trainer, pl_module: Detector, exception: BaseException) -> None:
        """Leaves the scores kept until then: they cost no further space, should the disk be full."""
        if self.rows and trainer.predicting:
            rest = "" if trainer.world_size == 1 else f"-{trainer.global_rank}"
            scores = self.kept.replace(self.folder / f"scores{rest}.csv")
            print(f"scores of the {len(self.rows)} images until then: {scores}", file=sys.stderr)

    def on_predict_end(self, trainer: Trainer, pl_module: Detector) -> None:
        """Writes scores.csv, the rows of all processes sorted by path."""
        rows = sorted(row for rows in of_all_processes(self.rows) for row in rows)
        if trainer.is_global_zero:
            write_scores(self.folder / "scores.csv", rows)
            rank_zero_info(f"predictions: {self.folder}")
        self.kept.unlink(missing_ok=True)


def write_scores(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV."""
    write_whole(path, lambda part: append_scores(part, rows))


def append_scores(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a CSV, which begins with the names of the columns."""
    begins = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:  # any name of a file
        writer = csv.writer(file)
        if begins:
            writer.writerow(Row._fields)
        writer.writerows(map(cells, rows))


def cells(row: Row) -> tuple[str, ...]:
    """A row as text; no number where there is none."""
    numbers = ("", "") if math.isnan(row.score) else (repr(row.score), f"{row.p_value:.4g}")
    return cell(row.path), *numbers, row.verdict, cell(row.reason)


def cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: an apostrophe stands before what would begin one.

    Source: OWASP, CSV Injection, https://owasp.org/www-community/attacks/CSV_Injection

    Example:
        >>> cell("=cmd.png"), cell("images/a.png")
        ("'=cmd.png", 'images/a.png')
    """
    return f"'{text}" if text.startswith(FORMULA) else text


def write_maps(path: Path, values: np.ndarray, limits: tuple[float, float]) -> None:
    """Writes `<name>.npy` and `<name>.heatmap.png`, the file's suffix kept in the name so that no two collide."""
    heat_map = Image.fromarray(colour(values, *limits))
    write_array(path.with_name(map_name(path.name, ".npy")), values.astype(np.float32))
    write_whole(path.with_name(map_name(path.name, ".heatmap.png")), lambda part: heat_map.save(part, format="PNG"))


def map_name(name: str, ending: str) -> str:
    """The name of an image with an ending; of what would be too long, a part and a hash that tells images apart.

    Example:
        >>> map_name("a.png", ".npy"), len(map_name(250 * "a", ".npy"))
        ('a.png.npy', 254)
    """
    whole = os.fsencode(name)
    if len(whole) + len(ending) <= LONGEST_NAME:
        return f"{name}{ending}"
    mark = f"-{hashlib.sha256(whole).hexdigest()[:8]}{ending}"
    return f"{os.fsdecode(whole[: LONGEST_NAME - len(mark)])}{mark}"
