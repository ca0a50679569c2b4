"""Where to look: the mask of what is judged of an image, and images of which the rest tells nothing. Without torch."""

import base64
import functools
import io
from typing import Any

import numpy as np
from PIL import Image

from patchad.canvas import EACH, Canvas, Size
from patchad.errors import PatchadError

TEXT = "data:image/png;base64,"
"""What the text of a mask begins with: it is a URL (RFC 2397) that holds its file."""


def as_text(mask: np.ndarray) -> str:
    """A mask, bool `[height, width]`, as text that JSON, YAML and checkpoints hold: a PNG file of one bit, in base64.

    Example:
        >>> of_text(as_text(np.eye(3, dtype=bool))).tolist()
        [[True, False, False], [False, True, False], [False, False, True]]
    """
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG", optimize=True)
    return TEXT + base64.b64encode(file.getvalue()).decode()


@functools.lru_cache
def of_text(text: str) -> np.ndarray:
    """The mask of a text that `as_text` gave.

    Raises:
        PatchadError: if it is none.
    """
    try:
        file = io.BytesIO(base64.b64decode(text.removeprefix(TEXT), validate=True))
        with Image.open(file, formats=("PNG",)) as image:
            mask = np.asarray(image.convert("L")) > 0
    except (ValueError, OSError, SyntaxError) as error:
        raise PatchadError("the region of the detector is damaged: fit again") from error
    mask.flags.writeable = False  # all images share it
    return mask


def judged(canvas: Canvas, size: Size, given: Any = None) -> np.ndarray | None:
    """The mask of what is judged of an image, bool `[height, width]`; None where that is all of it.

    Args:
        canvas: of the detector.
        size: height x width of the image in pixels.
        given: the image's own mask, an array of that form.

    Raises:
        PatchadError: if the mask is missing, is none, marks nothing or has another size, or the detector takes none.
    """
    if canvas.region is None:
        if given is not None:
            raise PatchadError("a region was given, but the detector was fitted without: give --data.region to its fit")
        return None
    if given is None:
        if canvas.region == EACH:
            raise PatchadError(
                "the detector was fitted with a mask for each image: give this one's region, too, a bool array of its "
                "height x width (in Python), or --data.region FOLDER"
            )
        given = of_text(canvas.region)
    if not isinstance(given, np.ndarray) or given.dtype != bool or given.ndim != 2:
        raise PatchadError("a region must be a bool array [height, width], True where the image is judged")
    check_fits(given, size)
    if not given.any():
        raise PatchadError("the region is black everywhere: nothing would be judged; what is judged is white")
    return given.view(np.uint8) > 0  # of Pillow's, True is 255, which others count as that


def check_fits(mask: np.ndarray, size: Size, image: str = "the image") -> None:
    """Raises PatchadError unless a mask has the size of its image, which an error calls by that name."""
    if mask.shape != tuple(size):
        raise PatchadError(
            f"the region has {mask.shape[0]} x {mask.shape[1]} pixels (height x width), {image} has "
            f"{size[0]} x {size[1]}: give a mask of the size of the images"
        )


def blank(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The image `[channels, height, width]`, of which what is not judged has the mean colour of what is.

    So nothing around the region changes a bit of what a network with a wide field makes of it, or of the brightness
    of the image; and of all constant colours this one makes the faintest edge.

    Args:
        image: of floating point.
        mask: what is judged, bool `[height, width]`; None where that is all.

    Example:
        >>> blank(np.array([[[0.2, 0.4, 9.0]]]), np.array([[True, True, False]])).round(2).tolist()
        [[[0.2, 0.4, 0.3]]]
    """
    if mask is None or mask.all():
        return image
    mean = image[:, mask].mean(axis=1, dtype=np.float64).astype(image.dtype)
    return np.where(mask, image, mean[:, None, None])


def within(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """A map `[height, width]` where an image is judged, and 0 elsewhere; a mask of None leaves it as it is."""
    return values if mask is None else np.where(mask, values, np.float32(0))


def fitted(mask: np.ndarray, content: Size, size: Size) -> np.ndarray:
    """The mask on the canvas: what touches a judged pixel of the image is judged, and nothing of the padding.

    Args:
        mask: bool `[height, width]`.
        content: height x width that the image takes up on the canvas, top left, in pixels.
        size: height x width of the canvas.

    Returns:
        Bool, of that size.

    Example:
        >>> fitted(np.array([[True, False, False, False]]), content=(2, 2), size=(2, 3)).astype(int)
        array([[1, 0, 0],
               [1, 0, 0]])
    """
    rows, columns = (np.arange(count) * length // count for count, length in zip(content, mask.shape, strict=True))
    touched = np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, axis=0), columns, axis=1)
    return np.pad(touched, ((0, size[0] - content[0]), (0, size[1] - content[1])))
