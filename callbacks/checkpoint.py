"""Checkpoints of the last epoch."""

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from patchad.module import PatchDetector


class LastCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint of the last epoch; it also saves where no step was taken (`max_epochs: 0`).

    Nothing is chosen by a metric. Ctrl-C and errors leave a checkpoint, too.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False, save_on_exception=True)

    def on_fit_end(self, trainer: Trainer, pl_module: PatchDetector) -> None:
        """Saves what no epoch saved."""
        if not self.best_model_path and not getattr(trainer, "fast_dev_run", False):
            path = self.format_checkpoint_name({})
            trainer.save_checkpoint(path)
            self.best_model_path = path
