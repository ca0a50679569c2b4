"""Checkpoints of the last epoch."""

from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from patchad.detector import Detector


class LastCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint after each validation; it also saves the end of a fit that no validation followed.

    So the last epoch is saved where `max_epochs` is no multiple of `check_val_every_n_epoch`, and what was fitted
    where nothing is learned. Nothing is chosen by a metric. Ctrl-C and errors leave a checkpoint, too, but not one of
    nan.

    Args:
        dirpath: the folder; by default `checkpoints` in that of the run.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        super().__init__(dirpath, filename="last", enable_version_counter=False, save_on_exception=True)
        self.saved_at: int | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Detector, checkpoint: dict[str, Any]) -> None:
        """Notes the step."""
        self.saved_at = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: Detector, exception: BaseException) -> None:
        """Saves what was learned, unless it is nan: the checkpoint before is worth more then."""
        if all(parameter.isfinite().all() for parameter in pl_module.parameters()):
            super().on_exception(trainer, pl_module, exception)

    def on_fit_end(self, trainer: Trainer, pl_module: Detector) -> None:
        """Saves what no validation saved."""
        if self.saved_at != trainer.global_step and not getattr(trainer, "fast_dev_run", False):
            self.best_model_path = self.format_checkpoint_name({})
            trainer.save_checkpoint(self.best_model_path)
