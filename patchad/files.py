"""Files that are whole or not there: written under a temporary name and renamed."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import numpy as np


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name of its own, since another process may write the same, and renames it.

    Args:
        path: the file; its folder is made.
        write: writes to the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}.part")  # shorter than the longest name that there may be
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises OSError unless a file can be made beside the path: before the work of what is to be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes an array as a file of NumPy's.

    Args:
        path: the file; its folder is made.
        values: of any shape and type.
    """

    def write(part: Path) -> None:
        with part.open("wb") as file:  # to a path, numpy.save would append .npy
            np.save(file, values)

    write_whole(path, write)
