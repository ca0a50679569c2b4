"""Rows that are measured one after the other while there is time, and kept as CSV, whole or not."""

import csv
import datetime
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import kills
from benchmarks.products import append, commit, read_rows
from benchmarks.tables import AUROCS, Fitted, Images, NoWeightsError, apart, by_epoch, fit, tested

NO_TIME, NO_WEIGHTS = "not run: time", "not run: no weights"
CURVES = "curves.csv"


class Row(NamedTuple):
    """A system on a data set, seed 0; rates in %, nan where there are none.

    Attributes:
        date: of the test.
        commit: of the code.
        machine: processor, cores, and the GPU that was used.
        name: of the system.
        data: name of the data set.
        configuration: its hash, as in `benchmarks.tables`.
        state: how many of its epochs were learned, or why it was not run.
        detection: AUROC of images after the last epoch.
        segmentation: AUROC of pixels after the last epoch.
        pro: per-region overlap.
        best_detection: AUROC of images after the epoch that is best on test, of those that were looked at.
        best_segmentation: AUROC of pixels after that epoch.
        best_epoch: its number; 0 where none was looked at.
        parts: detection / segmentation of each defect and side.
        milliseconds: per image, eager, batch 1.
        fit_megabytes: peak memory of the fit on the machine, not on its GPU.
        checkpoint_megabytes: size of the checkpoint.
        fit_seconds: of the fit, in all its parts.
        test_seconds: of the test.
    """

    date: str
    commit: str
    machine: str
    name: str
    data: str
    configuration: str
    state: str
    detection: float = math.nan
    segmentation: float = math.nan
    pro: float = math.nan
    best_detection: float = math.nan
    best_segmentation: float = math.nan
    best_epoch: int = 0
    parts: str = ""
    milliseconds: float = math.nan
    fit_megabytes: float = math.nan
    checkpoint_megabytes: float = math.nan
    fit_seconds: float = math.nan
    test_seconds: float = math.nan

    @property
    def measured(self) -> bool:
        """Whether there are figures, of a whole fit or not."""
        return self.state.endswith(" epochs")

    @property
    def done(self) -> bool:
        """Whether there are those of a whole fit."""
        return self.measured and len(set(self.state.split()[:3:2])) == 1


def measure(
    tasks: Iterable[tuple[dict[str, Any], Images]],
    results: Path,
    weights: Path,
    folder: Path,
    minutes: float,
    options: Sequence[str] = (),
    validations: int = 1,
) -> None:
    """Measures rows in their order while there is time; a row that is whole in the CSV is left as it is.

    No epoch and no row begins after the deadline. The row that is under way is then tested as it is, which takes its
    own time, and goes on when this is called again. A row that fails is noted, and does not stop the others.

    Args:
        tasks: rows as in tables.yaml, each with a data set.
        results: the CSV.
        weights: folder of files of weights.
        folder: where runs are kept.
        minutes: until the deadline.
        options: further ones for every fit.
        validations: how often each fit is measured on the test images; 1 is never before its end.
    """
    deadline = time.time() + 60 * minutes
    for row, images in tasks:
        known = latest(results, row["name"], images.name)
        if known.done:
            continue
        if time.time() >= deadline:
            return
        try:
            fitted = fit(row, images, 0, weights, folder, validations, options, deadline)
            found = tested_row(row, images, fitted)
        except NoWeightsError:
            found = about(row["name"], images.name, NO_WEIGHTS)
        except RuntimeError as error:
            print(error)
            found = about(row["name"], images.name, f"failed: {reason(error)}")
        if found.measured or found.state != known.state:
            append(results, found)
        print(f"{found.name}, {found.data}: {found.state}", flush=True)


def reason(error: Exception) -> str:
    """What a command said last, but for its memory."""
    return str(error).strip().splitlines()[-2:][0]


def tested_row(row: dict[str, Any], images: Images, fitted: Fitted) -> Row:
    """The figures of a fit, whose curves are written beside it."""
    write_curves(fitted.home)
    result = tested(row, fitted)
    best = result.best or {}
    detection, segmentation = (result.metrics.get(name, math.nan) for name in AUROCS)
    return about(row["name"], images.name, f"{fitted.epochs} of {fitted.of} epochs")._replace(
        configuration=result.configuration,
        detection=detection,
        segmentation=segmentation,
        pro=result.metrics.get("pro", math.nan),
        best_detection=best.get(AUROCS[0], math.nan),
        best_segmentation=best.get(AUROCS[1], math.nan),
        best_epoch=min(int(best.get("epoch", 0)), fitted.epochs),  # where nothing is learned, one is looked at
        parts=apart([result.metrics]),
        milliseconds=result.milliseconds,
        fit_megabytes=fitted.megabytes,
        checkpoint_megabytes=fitted.checkpoint.stat().st_size / 1e6,
        fit_seconds=result.seconds[0],
        test_seconds=result.seconds[1],
    )


def about(name: str, data: str, state: str) -> Row:
    """A row without figures."""
    return Row(str(datetime.date.today()), commit(), machine(), name, data, "", state)


def machine() -> str:
    """Its processor, cores, and GPU."""
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([kills.machine(), *gpu])


def latest(results: Path, name: str, data: str) -> Row:
    """What a CSV has of a row last: that it was not run for want of time where it has nothing."""
    rows = [row for row in read_rows(results, Row) if (row.name, row.data) == (name, data)]
    return rows[-1] if rows else Row("", "", "", name, data, "", NO_TIME)


def write_curves(home: Path) -> None:
    """What was logged of each epoch, as CSV: losses, shares of directions told right, AUROCs on test."""
    epochs = by_epoch(home)
    names = sorted({name for figures in epochs.values() for name in figures})
    with (home / CURVES).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["epoch", *names])
        writer.writerows([epoch, *(figures.get(name, "") for name in names)] for epoch, figures in epochs.items())


def figures(detection: float, segmentation: float) -> str:
    """A pair of rates; a dash for one that is not known.

    Example:
        >>> figures(98.14, math.nan)
        '98.1 / -'
    """
    return " / ".join("-" if math.isnan(value) else f"{value:.1f}" for value in (detection, segmentation))
