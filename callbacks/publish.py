"""Where results go: files in the run folder and, where one is used, the wandb dashboard."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from patchad.callbacks.thumbnails import Thumbnails
from patchad.files import write_picture
from patchad.results import Row

MOST_PICTURES = 200
"""Images whose pictures a table on a dashboard has."""


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run; all processes must ask."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def dashboards(trainer: Trainer) -> Iterator[WandbLogger | TensorBoardLogger]:
    """The loggers that show more than figures."""
    return (logger for logger in trainer.loggers if isinstance(logger, (WandbLogger, TensorBoardLogger)))


def publish_picture(trainer: Trainer, path: Path, picture: Image.Image, key: str) -> None:
    """Writes a PNG file, and shows it on dashboards.

    Args:
        trainer: whose loggers are asked.
        path: the file.
        picture: what to write.
        key: its name on dashboards.
    """
    write_picture(path, picture)
    for logger in dashboards(trainer):
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture])
        else:
            logger.experiment.add_image(key, np.asarray(picture), trainer.global_step, dataformats="HWC")


def publish_images(trainer: Trainer, rows: Sequence[Row], pictures: Mapping[str, Thumbnails]) -> None:
    """Shows a table of the images of a test, a histogram of their scores, the ROC and the verdicts on wandb.

    Args:
        trainer: whose loggers are asked.
        rows: of the images, failures first.
        pictures: of them, by path; the table has those of the first `MOST_PICTURES`.
    """
    import wandb  # a third of a second, which other commands save

    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            table = wandb.Table(columns=[*Row._fields, "image", "heat map"])
            for number, row in enumerate(rows):
                files = pictures.get(row.path) if number < MOST_PICTURES else None
                table.add_data(*row, *(map(wandb.Image, shown(files)) if files else (None, None)))
            logger.experiment.log({"images": table, **plots(rows)})


def plots(rows: Sequence[Row]) -> dict[str, Any]:
    """Wandb's plots of a test: histogram, ROC and confusion matrix, of images whose label is known."""
    import wandb

    known = [row for row in rows if row.label and row.score is not None]
    if not known:
        return {}
    scores = wandb.Table(columns=["label", "score"], data=[[row.label, row.score] for row in known])
    names = ["normal", "review", "anomalous"]
    labels, verdicts = ([names.index(getattr(row, name)) for row in known] for name in ("label", "verdict"))
    found: dict[str, Any] = {
        "scores": wandb.plot.histogram(scores, "score", title="Scores"),
        "verdicts": wandb.plot.confusion_matrix(y_true=labels, preds=verdicts, class_names=names, title="Verdicts"),
    }
    if len(set(labels)) == 2:
        curve = wandb.Table(columns=["false alarms", "defects found"], data=roc(known))
        found["roc"] = wandb.plot.line(curve, "false alarms", "defects found", title="ROC")
    return found


def roc(rows: Sequence[Row]) -> list[list[float]]:
    """Rates of false alarms and of found defects at each threshold, of images of both labels."""
    scores = np.array([row.score for row in rows], dtype=float)
    normal = np.array([row.label == "normal" for row in rows])
    thresholds = [np.inf, *np.unique(scores)[::-1]]
    return [[float((scores[part] >= limit).mean()) for part in (normal, ~normal)] for limit in thresholds]


def shown(files: Thumbnails) -> tuple[Image.Image, Image.Image]:
    """An image with its outlines, and its heat map."""
    image = Image.open(io.BytesIO(files.image)).convert("RGB")
    for file in filter(None, (files.truth, files.found)):
        outline = Image.open(io.BytesIO(file)).convert("RGBA").resize(image.size)
        image.paste(outline, mask=outline)
    return image, Image.open(io.BytesIO(files.heat)).convert("RGB")


def publish_table(trainer: Trainer, columns: Sequence[str], rows: Sequence[Sequence[object]], key: str) -> None:
    """Shows a table on dashboards."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(key, columns=list(columns), data=[list(row) for row in rows])
