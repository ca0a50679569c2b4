"""`patchad test` -> a page with the metrics and a contact sheet: image, truth, heat map, verdict."""

import html
import math
import re
from collections.abc import Sequence

from pytorch_lightning import Trainer

from patchad.callbacks.pictures import SheetEntry, sheet
from patchad.callbacks.publish import publish_picture, publish_table
from patchad.callbacks.rows import Rows
from patchad.callbacks.summary import print_summary
from patchad.conformal import Limits
from patchad.detector import Detector
from patchad.errors import check_range
from patchad.files import write_whole
from patchad.results import Row
from patchad.types import NORMAL, ImageBatch, Prediction


class Report(Rows):
    """Writes `report.html` and `contact_sheet.png` into the run folder of a test.

    The sheet shows the extremes: of each defect type, and of the normal images, those of the lowest and of the highest
    scores, so that what was missed and what was called anomalous by mistake is seen beside what was found.

    Args:
        images_per_defect: images shown of each defect type, and of the normal ones.
    """

    def __init__(self, images_per_defect: int = 2) -> None:
        check_range({"images_per_defect": images_per_defect}, 0)
        self.images_per_defect = images_per_defect

    def on_test_start(self, trainer: Trainer, pl_module: Detector) -> None:
        """Starts with nothing to show."""
        self.begin(trainer)
        self.entries: dict[str, list[SheetEntry]] = {}

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
        """Keeps the images of the lowest and highest scores of each defect type, sorted by score."""
        entries = self.entries.setdefault(entry.defect, [])
        entries.append(entry)
        entries.sort(key=lambda entry: entry.score)
        if len(entries) > self.images_per_defect:
            del entries[self.images_per_defect // 2]

    def on_test_end(self, trainer: Trainer, pl_module: Detector) -> None:
        """Writes rows, page and sheet, the latter from the images of the first process; prints the figures."""
        rows, scorer = self.finish(trainer), pl_module.scorer
        if not trainer.is_global_zero:
            return
        order = sorted(self.entries, key=lambda defect: (defect != NORMAL, defect))
        picture = sheet([entry for defect in order for entry in self.entries[defect]], scorer.limits)
        publish_picture(trainer, self.folder / "contact_sheet.png", picture, "contact_sheet")
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        page = report_page(metrics, scorer.limits.threshold, len(pl_module.doubts.errors))
        write_whole(self.folder / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
        publish_table(trainer, ("part", "detection_auroc", "segmentation_auroc"), aurocs(metrics), "aurocs")
        print_summary({name.removeprefix("test/"): value for name, value in metrics.items()}, rows, scorer.target_fpr)
        print(f"report: {self.folder / 'report.html'}\nscores: {self.folder / 'scores.csv'}")


def aurocs(metrics: dict[str, float]) -> list[tuple[str, float, float]]:
    """Detection and segmentation AUROC (nan where there is none): all, each defect type, each side alone."""
    kinds = ("test/detection_auroc", "test/segmentation_auroc")
    ends = list(dict.fromkeys(name.removeprefix(kind) for kind in kinds for name in metrics if name.startswith(kind)))
    names = [re.sub("^_side_", "side ", end).removeprefix("_defect_") or "all" for end in ends]
    values = ([metrics.get(kind + end, math.nan) for end in ends] for kind in kinds)
    return list(zip(names, *values, strict=True))


def report_page(metrics: dict[str, float], threshold: float, unreadable: int = 0) -> str:
    """The page: tables of the metrics, in percent, and the contact sheet.

    Args:
        metrics: by name.
        threshold: of the scores.
        unreadable: how many images are left out, because they could not be read.
    """
    other_metrics = [(name.removeprefix("test/"), value) for name, value in metrics.items() if "auroc" not in name]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>patchad test</title>
<style>body {{ font: 15px sans-serif; margin: 2em; }} td, th {{ padding: 2px 1em; border-bottom: 1px solid #ddd; }}
th {{ text-align: left; }} td + td {{ text-align: right; }} img {{ max-width: 100%; }}</style>
</head><body>
<h1>patchad test</h1>
{f"<p>{unreadable} images could not be read and are left out.</p>" if unreadable else ""}
<table>
<tr><th>AUROC in %</th><th>detection</th><th>segmentation</th></tr>
{table_rows(aurocs(metrics))}
</table>
<p>Sides alone: their own maps, not smoothed.</p>
<h2>Other metrics</h2>
<table>
<tr><th></th><th>in %</th></tr>
{table_rows(other_metrics)}
</table>
<h2>Contact sheet</h2>
<p>Of each defect type, and of the normal images, those of the lowest and of the highest scores. The threshold,
{threshold:.4g}, comes from normal training images only. Heat maps are blue up to the mean of these and red where the
map reaches the threshold; maps are smoothed, scores are not, so a small defect may be found without red.</p>
<img src="contact_sheet.png" alt="image, truth, heat map and verdict of some test images">
</body></html>
"""


def table_rows(rows: Sequence[tuple[str, *tuple[float, ...]]]) -> str:
    """Rows of a table: a name and fractions, as percentages, empty where there is none."""
    cells = [
        [html.escape(name), *("" if math.isnan(value) else f"{100 * value:.1f}" for value in values)]
        for name, *values in rows
    ]
    return "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
