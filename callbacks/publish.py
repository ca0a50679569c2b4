"""Where results go: files in the run folder and, where one is used, the wandb dashboard."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from patchad.files import write_whole


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
    write_whole(path, lambda part: picture.save(part, format="PNG"))
    for logger in dashboards(trainer):
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture])
        else:
            logger.experiment.add_image(key, np.asarray(picture), trainer.global_step, dataformats="HWC")


def publish_table(trainer: Trainer, columns: Sequence[str], rows: Sequence[Sequence[object]], key: str) -> None:
    """Shows a table on dashboards."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(key, columns=list(columns), data=[list(row) for row in rows])
