"""Mask files -> truth: where the defects are, at any size, and what makes a mask doubtful."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import label as label_components
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor
from torch.nn import functional as F

from patchad.canvas import Size
from patchad.decoding import MAX_MEGAPIXELS
from patchad.errors import PatchadError
from patchad.images import read_image

HALF = 128 / 255
"""Of white; what is above it is a defect."""
EIGHT_NEIGHBOURS = np.ones((3, 3))
FLAT = 2 / 255
"""Most that neighbours differ within an area; at an edge, smooth or not, they differ by more."""
MOST_GREY = 0.01
"""Share of the pixels above 0, or of all pixels of a region, that may lie in grey areas."""
DARKEST_GREY = 0.1
"""Of white; a JPEG file's black and white may be off by less."""


def read_mask(path: Path, size: Size, max_megapixels: float = MAX_MEGAPIXELS) -> Float[Tensor, "height width"]:
    """Brightness of a mask file in [0, 1], at the file's own size; defects are above `HALF`.

    Args:
        path: of the mask.
        size: height x width of its image in pixels.
        max_megapixels: a larger mask is refused.

    Raises:
        PatchadError: if the file cannot be read, has another size than its image, or marks defects by small numbers.
    """
    levels = read_image(path, max_megapixels).mean(0)
    if levels.shape != size:
        raise PatchadError(
            f"mask {path} has {levels.shape[0]} x {levels.shape[1]} pixels (height x width), "
            f"its image has {size[0]} x {size[1]}"
        )
    if levels.any() and not (levels > HALF).any():
        raise PatchadError(f"mask {path} has pixels above 0, but none above half of white; mark defects white")
    return levels


def read_region(path: Path, max_megapixels: float = MAX_MEGAPIXELS) -> Bool[np.ndarray, "height width"]:
    """What a mask file says is judged: True where it is white.

    Args:
        path: of the mask.
        max_megapixels: a larger mask is refused.

    Raises:
        PatchadError: if the file cannot be read, has grey areas, or no white.
    """
    levels = read_image(path, max_megapixels).mean(0)
    white = levels > HALF
    if not white.any():
        raise PatchadError(f"region {path} has no white: nothing would be judged; mark white what is judged")
    grey = (levels > DARKEST_GREY) & (levels < 1 - DARKEST_GREY) & flat(levels)
    if grey.float().mean() > MOST_GREY:
        raise PatchadError(f"region {path} has grey areas: mark white what is judged, and black what is not")
    return white.numpy()


def resize_mask(mask: Bool[Tensor, "height width"], size: Size) -> Bool[Tensor, "new_height new_width"]:
    """The mask at another size, nearest pixels; a defect that these miss keeps every pixel that it touches.

    Defects are the 8-connected components, as in `PerRegionOverlap`.
    """
    nearest = nearest_pixels(mask.float(), size) > 0
    if not mask.any() or (size[0] >= mask.shape[0] and size[1] >= mask.shape[1]):
        return nearest
    components = np.zeros(mask.shape, np.int32)
    label_components(mask.numpy(), EIGHT_NEIGHBOURS, output=components)
    kept = nearest_pixels(torch.from_numpy(components).double(), size).unique().numpy()
    missed = np.setdiff1d(components, [0, *kept])
    rows, columns = (torch.from_numpy(places) for places in np.nonzero(np.isin(components, missed)))
    nearest[rows * size[0] // mask.shape[0], columns * size[1] // mask.shape[1]] = True
    return nearest


def nearest_pixels(values: Float[Tensor, "height width"], size: Size) -> Float[Tensor, "new_height new_width"]:
    """Values at another size, each that of the nearest pixel."""
    return F.interpolate(values[None, None], size, mode="nearest-exact")[0, 0]


def mask_doubts(
    levels: Float[Tensor, "height width"],
    inner: Float[Tensor, "height width"],
    resized: Bool[Tensor, "new_height new_width"],
) -> Iterator[str]:
    """What is odd about the mask of a defective image, as the end of a sentence about such images.

    Args:
        levels: as `read_mask` gives them.
        inner: the same, 0 where the image is not judged.
        resized: the mask at which figures are computed, as `resize_mask` gives it.
    """
    size = (resized.shape[0], resized.shape[1])
    mask = inner > HALF
    if not mask.any() and (levels > HALF).any():
        yield "have defects outside of the region alone: they count as defective, but nothing there is judged"
    elif not mask.any():
        yield "have an empty mask, so that every pixel counts as normal"
    if (levels > HALF).float().mean() > 0.5:
        yield "have a mask that is white on more than half of it: defects are white, is it inverted?"
    if grey_share(levels) > MOST_GREY:
        yield "have a mask with grey areas, which count as normal: only what is above half of white is a defect"
    if not torch.equal(resized, nearest_pixels(mask.float(), size) > 0):
        yield (
            f"have defects that fall between the pixels of metric_size {size[0]} x {size[1]}: they count as the pixels "
            "that they touch"
        )


def grey_share(levels: Float[Tensor, "height width"]) -> float:
    """Share of the pixels above 0 that are no defect and away from an edge: their neighbours are as grey."""
    marked = levels > 0
    grey = marked & (levels <= HALF)
    if grey.sum() <= MOST_GREY * marked.sum():
        return 0.0
    return float((grey & flat(levels)).sum() / marked.sum())


def flat(levels: Float[Tensor, "height width"]) -> Bool[Tensor, "height width"]:
    """What lies away from an edge: its neighbours are as bright."""
    values = levels.numpy()
    return torch.from_numpy(maximum_filter(values, 3) - minimum_filter(values, 3) <= FLAT)
