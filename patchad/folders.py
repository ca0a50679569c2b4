"""Which files of a folder are images, without torch."""

import os
from collections.abc import Container, Iterator
from pathlib import Path

from patchad.errors import PatchadError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
"""Lower case; files are matched in any case."""


def images_below(root: Path) -> list[Path]:
    """Every image file below a folder, sorted; hidden files and folders are skipped.

    Raises:
        PatchadError: if the folder is missing, has none, or is one that patchad writes to.
    """
    if not root.is_dir():
        raise PatchadError(f"data.root {root} does not exist or is no folder")
    if is_run(root):
        raise PatchadError(
            f"{root} has the config.yaml of a run of patchad, whose pictures are no images of the product; keep images "
            "and runs apart"
        )
    named = (path for path in files_below(root) if is_image(path) and not is_hidden(path.relative_to(root)))
    images = sorted(path for path in named if not is_special(path))
    if not images:
        raise PatchadError(f"no images below {root} (looked for {', '.join(IMAGE_SUFFIXES)})")
    stems = {path.with_suffix("") for path in images}
    return [path for path in images if not is_mask_beside(path, stems)]


def files_below(root: Path) -> Iterator[Path]:
    """What lies below a folder and is none.

    Linked folders are entered, but not those that lead back up, and neither are run folders of patchad: their pictures
    are no images of the product.
    """
    for place, inner, names in os.walk(root, followlinks=True):
        folder, parents = Path(place), Path(os.path.abspath(place)).parents
        if folder.resolve() in (parent.resolve() for parent in parents) or is_run(folder):
            inner.clear()
            continue
        yield from (folder / name for name in names)


def is_run(folder: Path) -> bool:
    """Whether a command of patchad wrote its config and pictures there."""
    config = folder / "config.yaml"
    return config.is_file() and config.read_bytes().startswith(b"# pytorch_lightning==")


def is_special(path: Path) -> bool:
    """Whether something is there that is no file, such as a device; a link to nothing is an image that is missing."""
    return path.exists() and not path.is_file()


def is_mask_beside(path: Path, stems: Container[Path]) -> bool:
    """Whether a file is the mask of an image in its folder; `stems` are paths of images without suffix."""
    image = path.stem.removesuffix("_mask")
    return image != path.stem and path.with_name(image) in stems


def is_hidden(path: Path) -> bool:
    """Whether a relative path names something hidden."""
    return any(part.startswith(".") for part in path.parts)


def is_image(path: Path) -> bool:
    """Whether a path has the name of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES
