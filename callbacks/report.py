"""`patchad test` -> a page of all images, and a contact sheet: image, truth, heat map, verdict."""

import math
import re
from bisect import insort

from pytorch_lightning import Trainer

from patchad.callbacks.page import MOST_PICTURES, Findings, page
from patchad.callbacks.pictures import SheetEntry, sheet
from patchad.callbacks.provenance import provenance
from patchad.callbacks.publish import publish_images, publish_picture, publish_table
from patchad.callbacks.rows import Rows
from patchad.callbacks.summary import print_summary
from patchad.callbacks.thumbnails import Thumbnails, thumbnails
from patchad.conformal import Limits
from patchad.data.doubts import Doubts, of_all_processes
from patchad.detector import Detector
from patchad.errors import check_range
from patchad.files import write_whole
from patchad.results import Row
from patchad.types import NORMAL, ImageBatch, Prediction


class Report(Rows):
    """Writes `report.html` and `contact_sheet.png` into the run folder of a test.

    The page holds all images, failures first (the pictures of the first `MOST_PICTURES`), and needs no other file. The
    sheet shows the extremes: of each defect type, and of the normal images, those of the lowest and of the highest
    scores, so that what was missed and what was called anomalous by mistake is seen beside what was found.

    Args:
        images_per_defect: images shown on the sheet of each defect type, and of the normal ones.
    """

    def __init__(self, images_per_defect: int = 2) -> None:
        check_range({"images_per_defect": images_per_defect}, 0)
        self.images_per_defect = images_per_defect

    def on_test_start(self, trainer: Trainer, pl_module: Detector) -> None:
        """Starts with nothing to show."""
        self.begin(trainer)
        self.entries: dict[str, list[SheetEntry]] = {}
        self.pictures: list[tuple[Row, Thumbnails]] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Detector,
        outputs: Prediction,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the rows of a batch."""
        self.take(trainer, pl_module, outputs, batch)

    def show(self, trainer: Trainer, row: Row, entry: SheetEntry, limits: Limits) -> None:
        """Keeps small pictures of the first images, and those of the lowest and highest scores of each defect type."""
        insort(self.pictures, (row, thumbnails(entry, limits.map_threshold)), key=lambda kept: kept[0].order)
        del self.pictures[MOST_PICTURES:]
        entries = self.entries.setdefault(entry.defect, [])
        entries.append(entry)
        entries.sort(key=lambda entry: entry.score)
        if len(entries) > self.images_per_defect:
            del entries[self.images_per_defect // 2]

    def on_test_end(self, trainer: Trainer, pl_module: Detector) -> None:
        """Writes rows, page and sheet, the last from the images of the first process; prints the figures."""
        rows = self.finish(trainer)
        pictures = {row.path: files for kept in of_all_processes(self.pictures) for row, files in kept}
        if not trainer.is_global_zero:
            return
        self._write_sheet(trainer, pl_module)
        findings = self._findings(trainer, pl_module, rows, pictures)
        text = page(findings).encode(errors="backslashreplace")  # a file may have a name that is no text
        write_whole(self.folder / "report.html", lambda part: part.write_bytes(text))
        publish_table(trainer, ("part", "detection_auroc", "segmentation_auroc"), findings.aurocs, "aurocs")
        publish_images(trainer, rows, pictures)
        print_summary(findings.metrics, rows, findings.target_fpr)
        print(f"report: {self.folder / 'report.html'}\nscores: {self.folder / 'scores.csv'}")

    def _write_sheet(self, trainer: Trainer, detector: Detector) -> None:
        order = sorted(self.entries, key=lambda defect: (defect != NORMAL, defect))
        picture = sheet([entry for defect in order for entry in self.entries[defect]], detector.scorer.limits)
        publish_picture(trainer, self.folder / "contact_sheet.png", picture, "contact_sheet")

    def _findings(
        self, trainer: Trainer, detector: Detector, rows: list[Row], pictures: dict[str, Thumbnails]
    ) -> Findings:
        scorer, overlap = detector.scorer, detector.metrics.overlap_curve
        metrics = {name.removeprefix("test/"): float(value) for name, value in trainer.callback_metrics.items()}
        return Findings(
            title=f"patchad test: {trainer.datamodule.root.resolve().name}",  # type: ignore[attr-defined]
            metrics=metrics,
            aurocs=aurocs(metrics),
            rows=rows,
            pictures=pictures,
            limits=scorer.limits,
            target_fpr=scorer.target_fpr,
            normals=scorer.normals.tolist(),
            overlap=[] if overlap is None else list(zip(overlap.x.tolist(), overlap.y.tolist(), strict=True)),
            doubts=sentences(detector.doubts),
            checkpoint=str(trainer.ckpt_path),
            provenance=provenance(trainer, detector, self._source),
            updates=detector.model.updates,
        )


def sentences(doubts: Doubts) -> list[tuple[str, list[str]]]:
    """What makes figures doubtful, and the paths of the images that it is about."""
    count = len(doubts.digests)
    return [(f"{len(paths)} of {count} images {doubt}", sorted(paths)) for doubt, paths in sorted(doubts.paths.items())]


def aurocs(metrics: dict[str, float]) -> list[tuple[str, float, float]]:
    """Detection and segmentation AUROC (nan where there is none): all, each defect type, each side alone."""
    kinds = ("detection_auroc", "segmentation_auroc")
    ends = list(dict.fromkeys(name.removeprefix(kind) for kind in kinds for name in metrics if name.startswith(kind)))
    names = [re.sub("^_side_", "side ", end).removeprefix("_defect_") or "all" for end in ends]
    values = ([metrics.get(kind + end, math.nan) for end in ends] for kind in kinds)
    return list(zip(names, *values, strict=True))
