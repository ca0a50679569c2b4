"""Where a run writes: a folder that no other run has, however close they began."""

import itertools
import os
from contextlib import suppress
from functools import partial

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers import CSVLogger


class RunLogger(CSVLogger):
    """Lightning's CSVLogger, whose folder `version_<N>` is made when its number is taken.

    Lightning lists the folders there are and makes the next one later: two runs that begin in the same instant would
    write into one. Here the making, at which one of them fails, is what takes the number. Of the processes of a run the
    first does it, and Lightning tells the others. A version that is given stays as it is.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [RunLogger(folder, name=None, version=given).version for given in (None, None, "mine")]
        [0, 1, 'mine']
    """

    def finalize(self, status: str) -> None:
        """Lightning's; a run that failed before it wrote anything leaves no folder."""
        super().finalize(status)
        if status == "failed" and self._experiment is not None:
            with suppress(OSError):  # there is something in it
                self._fs.rmdir(self.log_dir)

    def _get_next_version(self) -> int:
        numbers = itertools.count(super()._get_next_version())
        return next(number for number in numbers if self._takes(number))

    @partial(rank_zero_only, default=True)  # further processes make none
    def _takes(self, number: int) -> bool:
        """Makes the folder of a number, in one step; False where there is one."""
        try:
            self._fs.makedirs(os.path.join(self.root_dir, f"version_{number}"), exist_ok=False)
        except FileExistsError:
            return False
        return True
