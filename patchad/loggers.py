"""Where a run writes: a folder that no other run has, however close they began."""

import itertools
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger


class RunLogger(CSVLogger):
    """Lightning's CSVLogger, whose folder `version_<N>` is what takes its number.

    Lightning lists the folders there are and makes the next one later: two runs that begin in the same instant would
    write into one. Here a number holds once its folder was made, at which one of them fails and goes on to the next. Of
    the processes of a run the first does it, and Lightning tells the others. A version that is given stays as it is.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loggers = [RunLogger(folder, name=None, version=given) for given in (None, None, "mine")]
        ...     [os.path.basename(logger.experiment.log_dir) for logger in loggers]
        ['version_0', 'version_1', 'mine']
    """

    @property
    def version(self) -> int | str:
        """The one that is taken, or would be the next."""
        return self._get_next_version() if self._version is None else self._version

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's, which writes; Lightning asks for it before anything else may."""
        if self._version is None:
            self._version = next(filter(self._takes, itertools.count(self._get_next_version())))
        return super().experiment

    def _takes(self, number: int) -> bool:
        """Makes the folder of a number, in one step; False where there is one."""
        try:
            self._fs.makedirs(os.path.join(self.root_dir, f"version_{number}"), exist_ok=False)
        except FileExistsError:
            return False
        return True

    def finalize(self, status: str) -> None:
        """Lightning's; a run that failed before it wrote anything leaves no folder."""
        if status != "failed":
            return super().finalize(status)
        with suppress(OSError):  # what failed before is told
            super().finalize(status)
        with suppress(OSError):  # there is something in it
            if self._experiment is not None:
                self._fs.rmdir(self.log_dir)


def join(loggers: Iterable[Logger], group: Callable[[], str], job: str) -> None:
    """Lets wandb show the runs of one model together, unless the user has named a group.

    Args:
        loggers: whose runs have not begun: wandb takes a group at the beginning alone.
        group: gives its name; it is asked by wandb alone, for it may have to read a checkpoint.
        job: what the run does, such as `fit`.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            options = logger._wandb_init
            options["job_type"] = options.get("job_type") or job
            if "WANDB_RUN_GROUP" not in os.environ:
                options["group"] = options.get("group") or group()
