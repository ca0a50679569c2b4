"""A folder that fills -> its images, each once and whole. No torch is needed."""

import os
import stat
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

from patchad.errors import PatchadError
from patchad.folders import IMAGE_SUFFIXES

STILL = 1.0
"""Seconds for which size and time of change of a file stand still before it is taken to be whole."""


class State(NamedTuple):
    """What is seen of a file that arrives.

    Attributes:
        size: in bytes.
        changed: when, in nanoseconds of the file system's clock.
        since: when it was first seen so, in seconds of `Arrivals.look`.
    """

    size: int
    changed: int
    since: float


class Arrivals:
    """The images that arrive in a folder and those below it; hidden ones and linked folders are skipped.

    Args:
        folder: where they arrive.
        seen: paths that are done; the caller adds to them.
    """

    def __init__(self, folder: Path, seen: set[str]) -> None:
        self._folder, self._seen = folder, seen
        self._waiting: dict[str, State] = {}

    def look(self, now: float) -> tuple[list[str], list[str]]:
        """Paths of those that are whole, the one that changed first in front, and of those that are gone again.

        Args:
            now: in seconds of a clock that is never set.

        Raises:
            PatchadError: if the folder is gone.
        """
        if not self._folder.is_dir():
            raise PatchadError(f"{self._folder} is no longer there")
        new = unseen(self._folder, self._seen)
        states = {path: state for path in new if (state := self._state(path, now))}
        gone = sorted(self._waiting.keys() - states.keys() - self._seen)
        self._waiting = states
        whole = (path for path, state in states.items() if now - state.since >= STILL)
        return sorted(whole, key=lambda path: (states[path].changed, path)), gone

    def _state(self, path: str, now: float) -> State | None:
        """What is seen of a file; None if there is none."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        before = self._waiting.get(path)
        same = before and (before.size, before.changed) == (found.st_size, found.st_mtime_ns)
        return State(found.st_size, found.st_mtime_ns, before.since if before and same else now)


def unseen(folder: Path, seen: Container[str]) -> Iterator[str]:
    """Paths below a folder that are not seen and have the name of an image; quick, since nearly all are seen."""
    folders = [str(folder)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except FileNotFoundError:
            continue  # a folder that went on the way
        for entry in entries:
            if entry.path in seen or entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                yield entry.path
