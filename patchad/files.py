"""Files that are whole or not there: written under a temporary name and renamed."""

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image

LONGEST_NAME = 255
"""Bytes of the name of a file."""
COMPRESSION = 3
"""Level of zlib for pictures: those of photographs take as many bytes as at 6, its default, in 0.4 of the time."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name of its own, since another process may write the same, and renames it.

    Args:
        path: the file; its folder is made.
        write: writes to the path that it is given.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{uuid4().hex}.part")  # shorter than the longest name that there may be
        try:
            write(part)
            flush(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file where the system refuses what was done for it under another name."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_below_here(folder: Path) -> bool:
    """Whether a folder lies below the current one, by what its name says."""
    return not folder.is_absolute() and ".." not in folder.parts


def flush(path: Path) -> None:
    """Waits until the disk has the file: before that, a rename might leave an empty one where power fails."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def check_writable(path: Path) -> None:
    """Raises OSError unless a file can be made beside the path: before the work of what is to be written."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes an array as a file of NumPy's.

    Args:
        path: the file; its folder is made.
        values: of any shape and type.
    """
    content = io.BytesIO()
    np.save(content, values)
    write_whole(path, lambda part: part.write_bytes(content.getbuffer()))


def write_picture(path: Path, picture: Image.Image) -> None:
    """Writes a picture as a PNG file.

    Args:
        path: the file; its folder is made.
        picture: of any mode that PNG knows.
    """
    write_whole(path, lambda part: picture.save(part, format="PNG", compress_level=COMPRESSION))


def map_name(name: str, ending: str) -> str:
    """The name of an image with an ending; of what would be too long, a part and a hash that tells images apart.

    The suffix of the image stays in the name, so that no two collide.

    Example:
        >>> map_name("a.png", ".npy"), len(map_name(250 * "a", ".npy"))
        ('a.png.npy', 254)
    """
    whole = os.fsencode(name)
    if len(whole) + len(ending) <= LONGEST_NAME:
        return f"{name}{ending}"
    mark = f"-{hashlib.sha256(whole).hexdigest()[:8]}{ending}"
    return f"{os.fsdecode(whole[: LONGEST_NAME - len(mark)])}{mark}"
