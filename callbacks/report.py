"""`patchad test` -> a page with the metrics and a contact sheet: image, truth, heat map, verdict."""

import html
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities import rank_zero_info

from patchad.callbacks.pictures import colour, contact_sheet, overlay, to_rgb
from patchad.module import PatchDetector
from patchad.pyramid import crop_resize
from patchad.types import NORMAL, ImageBatch, Prediction


class Shown(NamedTuple):
    """What the contact sheet shows of one image."""

    name: str
    defect: str
    score: float
    anomalous: bool
    image: np.ndarray
    truth: np.ndarray
    map: np.ndarray


class Report(Callback):
    """Writes `report.html` and `contact_sheet.png` into the run folder of a test.

    Args:
        images_per_defect: images shown of each defect type, and of the normal ones.
    """

    def __init__(self, images_per_defect: int = 2) -> None:
        self.images_per_defect = images_per_defect

    def on_test_start(self, trainer: Trainer, pl_module: PatchDetector) -> None:
        """Starts with nothing to show."""
        self.shown: dict[str, list[Shown]] = {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: PatchDetector,
        outputs: Prediction,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the first images of each defect type."""
        for number, defect in enumerate(batch.defect):
            kept = self.shown.setdefault(defect, [])
            if len(kept) < self.images_per_defect:
                kept.append(show(outputs, batch, number))

    def on_test_end(self, trainer: Trainer, pl_module: PatchDetector) -> None:
        """Writes the page, from the images of the first process."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir asks the first process: all must ask
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        scorer = pl_module.scorer
        threshold = float(scorer.threshold)
        sheet = self.sheet(scorer.normal_level, threshold)
        replace_with(folder / "contact_sheet.png", lambda part: sheet.save(part, format="PNG"))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        page = report_page(metrics, threshold)
        replace_with(folder / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
        rank_zero_info(f"report: {folder / 'report.html'}")

    def sheet(self, low: float, threshold: float) -> Image.Image:
        """The contact sheet, normal images first; heat maps are blue up to `low`, red from the threshold upwards."""
        order = sorted(self.shown, key=lambda defect: (defect != NORMAL, defect))
        rows = [row(shown, low, threshold) for defect in order for shown in self.shown[defect]]
        return contact_sheet(rows, ("image", "truth", "heat map", "image + heat map"))


def show(prediction: Prediction, batch: ImageBatch, number: int) -> Shown:
    """One image of a batch, at the size of its content."""
    height, width = batch.content[number].tolist()
    content = torch.tensor([[height, width]])
    values = crop_resize(prediction.map[number, None].cpu(), content, (height, width))[0].numpy()
    truth = Image.fromarray(batch.mask[number].cpu().numpy()).resize((width, height), Image.Resampling.NEAREST)
    path = Path(batch.path[number])
    return Shown(
        name=f"{path.parent.name}/{path.name}",
        defect=batch.defect[number],
        score=float(prediction.score[number]),
        anomalous=bool(prediction.anomalous[number]),
        image=to_rgb(batch.image[number, :, :height, :width]),
        truth=np.asarray(truth, dtype=np.uint8)[:, :, None].repeat(3, axis=2) * 255,
        map=values,
    )


def row(shown: Shown, low: float, threshold: float) -> tuple[str, list[np.ndarray]]:
    """Caption and panels of one image."""
    verdict = "anomalous" if shown.anomalous else "normal"
    right = shown.anomalous == (shown.defect != NORMAL)
    text = f"{shown.name}\nscore {shown.score:.4g}\nthreshold {threshold:.4g}\nverdict: {verdict}"
    heat = colour(shown.map, low, threshold)
    caption = text if right else f"{text}\nWRONG"
    return caption, [shown.image, shown.truth, heat, overlay(shown.image, heat)]


def report_page(metrics: dict[str, float], threshold: float) -> str:
    """The page: a table of the metrics and the contact sheet."""
    lines = "\n".join(f"<tr><td>{html.escape(name)}</td><td>{value:.4f}</td></tr>" for name, value in metrics.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>patchad test</title>
<style>body {{ font: 15px sans-serif; margin: 2em; }} td {{ padding: 2px 1em; border-bottom: 1px solid #ddd; }}</style>
</head><body>
<h1>patchad test</h1>
<p>Threshold {threshold:.4g}, from calibration normals only. Heat maps are blue up to the mean of
calibration normals and red where the map reaches the threshold.</p>
<table>
{lines}
</table>
<h2>Contact sheet</h2>
<img src="contact_sheet.png" alt="image, truth, heat map and verdict of some test images">
</body></html>
"""


def replace_with(path: Path, write) -> None:  # noqa: ANN001
    """Writes a file under a temporary name and renames it."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)
