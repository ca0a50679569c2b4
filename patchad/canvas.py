"""How images are fitted to the size and light that a detector reads: arithmetic alone, without torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Size = tuple[int, int]
"""Height x width in pixels."""
DARKEST = 1 / 255
"""Mean of an image below which it is not made brighter still: there is nothing to see in it."""
EACH = "each"
"""What stands for a region where each image has one of its own."""


class Canvas(NamedTuple):
    """What images of any size and light are brought to before a detector reads them.

    Attributes:
        image_size: height x width in pixels.
        keep_aspect: pad the right or bottom edge; otherwise distort.
        brightness: mean to which the pixels of each image are scaled; None leaves them.
        region: what of each image is judged: a mask as text (`patchad.region.as_text`), `EACH` where each image has a
            mask of its own, or None for all of it.
    """

    image_size: Size
    keep_aspect: bool = True
    brightness: float | None = None
    region: str | None = None

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Canvas":
        """The canvas of what JSON or a checkpoint keeps of one.

        Example:
            >>> Canvas.of([[256, 128], True, None, None])
            Canvas(image_size=(256, 128), keep_aspect=True, brightness=None, region=None)
        """
        (height, width), *rest = values
        return cls((height, width), *rest)


def content_size(native: Size, size: Size, keep_aspect: bool) -> Size:
    """Height x width that an image takes up within `size`, in pixels; at least 2, since torch cannot shrink to 1.

    Example:
        >>> content_size((100, 200), (256, 256), keep_aspect=True)
        (128, 256)
    """
    if not keep_aspect:
        return size
    scale = min(size[0] / native[0], size[1] / native[1])
    return max(2, round(native[0] * scale)), max(2, round(native[1] * scale))


def gain(mean: float, brightness: float | None) -> float:
    """What the pixels of an image are multiplied with, as by a longer exposure or a stronger lamp.

    Args:
        mean: of the image's pixels and channels, in [0, 1].
        brightness: the mean that is wanted; None leaves the image as it is.

    Example:
        >>> gain(0.2, 0.4)
        2.0
    """
    return 1.0 if brightness is None else brightness / max(mean, DARKEST)
