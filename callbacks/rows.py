"""What `patchad test` and `patchad predict` say of each image -> scores.csv."""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer

from patchad.callbacks.pictures import SheetEntry, sheet_entry
from patchad.callbacks.publish import run_folder
from patchad.checkpoint import checksum
from patchad.conformal import Limits, p_values
from patchad.data.datamodule import PyramidDataModule
from patchad.data.doubts import of_all_processes
from patchad.detector import Detector
from patchad.results import Label, Row, Scored, Source, append_rows, row_of, unreadable, write_rows
from patchad.runtime import region_above
from patchad.types import ImageBatch, Prediction

LABELS: dict[int, Label] = {0: "normal", 1: "anomalous", -1: ""}
"""The words for the labels of a batch."""


class Rows(Callback):
    """Keeps one row of each image, and writes `scores.csv`, failures first. Subclasses also show the images (`show`).

    Rows are kept in a file as they come, so that a command that ends in an error leaves those found until then. One
    thread makes and shows those of a batch while the next is scored.

    Attributes:
        folder: where `scores.csv` goes.
        rows: of the images that this process has scored.
    """

    folder: Path
    rows: list[Row]
    _kept: Path
    _source: Source
    _writer: ThreadPoolExecutor
    _written: Future[None] | None

    def begin(self, trainer: Trainer, folder: str = "") -> None:
        """Starts with no rows.

        Args:
            trainer: of the run.
            folder: below that of the run.
        """
        self.folder, self.rows = run_folder(trainer) / folder, []
        # one thread of OpenMP there: where these are more than cores, all of them sleep between two pieces of work
        self._writer, self._written = ThreadPoolExecutor(1, initializer=partial(torch.set_num_threads, 1)), None
        self._kept = self.folder / f".{trainer.global_rank}.csv.part"
        self._kept.unlink(missing_ok=True)
        model = checksum(Path(trainer.ckpt_path)) if trainer.ckpt_path else ""
        self._source = Source(model, version("patchad"), datetime.now().astimezone().isoformat(timespec="seconds"))

    def take(self, trainer: Trainer, detector: Detector, prediction: Prediction, batch: ImageBatch) -> None:
        """Begins to keep the rows of a batch, when those of the one before are kept."""
        self._wait()
        self._written = self._writer.submit(self._keep, trainer, detector, prediction, batch)

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def _keep(self, trainer: Trainer, detector: Detector, prediction: Prediction, batch: ImageBatch) -> None:
        limits, rows = detector.scorer.limits, []
        data: PyramidDataModule = trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.predict_set if trainer.predicting else data.test_set
        shares = p_values(prediction.score.cpu().numpy(), detector.scorer.normals.cpu().numpy()).tolist()
        for number, error in enumerate(batch.error):
            path, defect = batch.path[number], batch.defect[number]
            if error:
                rows.append(unreadable(path, error, limits, self._source, defect))
                continue
            size = (int(batch.size[number, 0]), int(batch.size[number, 1]))
            height, width = batch.content[number].tolist()
            values = prediction.map[number, :height, :width].cpu().numpy()
            region = region_above(values, size, limits.map_threshold, dataset.judged(int(batch.number[number]), size))
            score = float(prediction.score[number])
            verdict = limits.verdict(score)
            scored = Scored(score, verdict == "anomalous", verdict, shares[number], values)
            label = LABELS[int(batch.label[number])]
            rows.append(row_of(path, scored, limits, self._source, label, defect, region))
            self.show(trainer, rows[-1], sheet_entry(prediction, batch, number), limits)
        append_rows(self._kept, rows)
        self.rows += rows

    def show(self, trainer: Trainer, row: Row, entry: SheetEntry, limits: Limits) -> None:
        """Shows an image that was scored.

        Args:
            trainer: of the run.
            row: what is said of it.
            entry: its pixels, its truth and its map, at the size at which it was scored.
            limits: of the detector.
        """

    def finish(self, trainer: Trainer) -> list[Row]:
        """Writes `scores.csv`; returns the rows of all processes, failures first."""
        self._wait()
        self._writer.shutdown()
        rows = sorted((row for rows in of_all_processes(self.rows) for row in rows), key=lambda row: row.order)
        if trainer.is_global_zero:
            write_rows(self.folder / "scores.csv", rows)
        self._kept.unlink(missing_ok=True)
        return rows

    def on_exception(self, trainer: Trainer, pl_module: Detector, exception: BaseException) -> None:
        """Leaves the rows kept until then: they cost no further space, should the disk be full."""
        if hasattr(self, "_writer"):
            self._writer.shutdown()
        if getattr(self, "rows", None) and self._kept.is_file():
            rest = "" if trainer.world_size == 1 else f"-{trainer.global_rank}"
            scores = self._kept.replace(self.folder / f"scores{rest}.csv")
            print(f"scores of the {len(self.rows)} images until then: {scores}", file=sys.stderr)
