"""Where results go: files in the run folder and, where one is used, the wandb dashboard."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import WandbLogger

from patchad.files import write_whole


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run; all processes must ask."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def publish_picture(trainer: Trainer, path: Path, picture: Image.Image, key: str) -> None:
    """Writes a PNG file, and shows it on dashboards.

    Args:
        trainer: whose loggers are asked.
        path: the file.
        picture: what to write.
        key: its name on dashboards.
    """
    write_whole(path, lambda part: picture.save(part, format="PNG"))
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture])


def publish_table(trainer: Trainer, columns: Sequence[str], rows: Sequence[Sequence[object]], key: str) -> None:
    """Shows a table on dashboards."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(key, columns=list(columns), data=[list(row) for row in rows])
