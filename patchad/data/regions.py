"""Which mask says where to look: one for all images, or one for each, by its name."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from patchad.canvas import EACH, Canvas
from patchad.data.layouts import find_mask, images_below
from patchad.errors import PatchadError
from patchad.images import native_size
from patchad.masks import read_region
from patchad.region import TEXT, as_text, check_fits, of_text
from patchad.spec import digest
from patchad.types import Sample

SHOWN = 3
"""Files that an error names, of any number."""


def kept(region: str | Path | None, max_megapixels: float) -> str | None:
    """What a checkpoint keeps of the option `data.region`: a mask for all images as text, or the folder of masks.

    A mask that is white everywhere is none.

    Args:
        region: path of a mask, or of a folder of masks, or what this returned.
        max_megapixels: a larger mask is refused.

    Raises:
        PatchadError: if there is a file that is no mask of a region.
    """
    if region is None or is_text(region) or not Path(region).is_file():
        return region and str(region)
    mask = read_region(Path(region), max_megapixels)
    return None if mask.all() else as_text(mask)


def is_text(region: str | Path) -> bool:
    """Whether it is a mask for all images, as `kept` returns it."""
    return str(region).startswith(TEXT)


def of_canvas(region: str | None) -> str | None:
    """What a canvas is told (see `Canvas`) of a region as `kept` gave it."""
    return region if region is None or is_text(region) else EACH


def short(region: str | None) -> str | None:
    """What tells the regions of canvases apart, short enough to be told."""
    return region and (digest(region) if is_text(region) else EACH)


def canvas_key(canvas: Canvas, samples: Sequence[Sample]) -> str:
    """What tells apart canvases on which samples look differently, by their own masks, too."""
    masks = [hashlib.sha256(sample.region.read_bytes()).hexdigest() for sample in samples if sample.region]
    return f"{canvas._replace(region=short(canvas.region))} {digest(masks)}"


def with_regions(samples: list[Sample], root: Path, region: str | None, strict: bool = False) -> list[Sample]:
    """Samples, each with its mask, where each has one: that of its path below the root, or of its name alone.

    Args:
        samples: of the root.
        root: of the images.
        region: what `kept` gave, perhaps a folder of masks, each named as its image, with or without `_mask`.
        strict: whether each mask must fit an image.

    Raises:
        PatchadError: if there is no folder, an image has no mask, or a mask fits two images, or none; it names them. Or
            if the mask for all has another size than the first image; others are told of as they are read.
    """
    if region is None:
        return samples
    if is_text(region):
        for sample in samples[:1]:
            check_size(of_text(region), sample.path)
        return samples
    folder = Path(str(region))
    if not folder.is_dir():
        raise PatchadError(f"data.region {folder} does not exist; give a mask, or a folder of masks")
    masks = {sample.path: mask_of(sample.path, root, folder) for sample in samples}
    refuse([path for path, mask in masks.items() if mask is None], f"have no mask in data.region {folder}")
    images: dict[Path, Path] = {}
    for path, mask in masks.items():
        if mask is not None and images.setdefault(mask, path) != path:
            raise PatchadError(
                f"region {mask} fits both {images[mask]} and {path}: arrange masks in folders as the images are"
            )
    if strict:
        unused = [path for path in images_below(folder) if path not in images]
        refuse(unused, f"in data.region fit no image of {root}")
    return [sample._replace(region=masks[sample.path]) for sample in samples]


def check_size(mask: np.ndarray, path: Path) -> None:
    """Raises PatchadError unless a mask has the size of an image file, if that can be read."""
    try:
        size = native_size(path)
    except PatchadError:  # which is told with all others
        return
    check_fits(mask, size, str(path))


def mask_of(path: Path, root: Path, folder: Path) -> Path | None:
    """The mask of an image, or None."""
    inner = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    return find_mask(folder / inner.with_suffix("")) or find_mask(folder / path.stem)


def refuse(paths: Sequence[Path], reason: str) -> None:
    """Raises PatchadError that names the first of some paths, if there are any, and says what is wrong with them."""
    if paths:
        more = ", ..." if len(paths) > SHOWN else ""
        raise PatchadError(f"{len(paths)} files {reason}: {', '.join(map(str, paths[:SHOWN]))}{more}")
