"""A fit that may be stopped at any moment, goes on where it was, and ends by itself when its time is up."""

import math
import time
from pathlib import Path

from pytorch_lightning import Trainer

from patchad.callbacks import LastCheckpoint
from patchad.detector import Detector


class Progress(LastCheckpoint):
    """Also saves what was learned between validations, without what is normal, and ends a fit after a deadline.

    Banks of a million patches take as long to be filled as several epochs to be learned, and scores alone need them.
    So a checkpoint between validations has empty ones: a fit goes on with it, but nothing is scored. The end of a fit,
    by the deadline, too, replaces it by a whole one. A fit ends between two epochs, for then it goes on bit for bit.

    Args:
        dirpath: the folder; by default `checkpoints` in that of the run.
        every: seconds between two such checkpoints at least.
        deadline: seconds since 1970 after which no epoch begins.
    """

    def __init__(self, dirpath: str | Path | None = None, every: float = 60, deadline: float = math.inf) -> None:
        super().__init__(dirpath)
        self.every, self.deadline, self._saved = every, deadline, time.time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Detector) -> None:
        """Saves, if it is time, and nothing was saved by the validation of this epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        now = time.time()
        if self.saved_at != trainer.global_step and now >= self._saved + self.every:
            self._save_what_was_learned(trainer, pl_module)
            self._saved = time.time()
        trainer.should_stop = trainer.should_stop or now > self.deadline

    def _save_what_was_learned(self, trainer: Trainer, pl_module: Detector) -> None:
        for bank in pl_module.model.memory_banks.values():
            bank.clear()  # what it holds is of older weights
        pl_module._known_at = trainer.global_step  # else it would be filled
        trainer.save_checkpoint(self.format_checkpoint_name({}))
        pl_module._known_at = self.saved_at = None  # the end of a fit fills it, and saves once more
