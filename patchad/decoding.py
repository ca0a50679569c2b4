"""Image files -> pixels, without torch."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from patchad.errors import PatchadError

Image.MAX_IMAGE_PIXELS = None  # files are the user's own; a line camera's may have more than Pillow's 179 million


def read_pixels(path: Path) -> np.ndarray:
    """The pixels of an image file, turned as its EXIF orientation says.

    16-bit grey is divided by 65535, floating-point files are taken as they are, alpha is dropped.

    Returns:
        Float32 in [0, 1]: `[height, width]` of grey images, RGB `[height, width, 3]` of all others.

    Raises:
        PatchadError: if the file cannot be read, its numbers leave [0, 1] or 16 bits, or its colours have 16 bits.
    """
    return to_float(decode(path), path)


def decode(path: Path) -> Image.Image:
    """The decoded file, upright.

    Raises:
        PatchadError: if it is missing, truncated or no image, or has colours of 16 bits.
    """
    try:
        with Image.open(path) as image:
            deep = has_deep_colour(image)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise PatchadError(f"cannot read image {path}: {error}") from error
    if deep:
        raise PatchadError(
            f"{path} has colours of 16 bits, which cannot be read; save it with 8 bits, or as 16-bit grey"
        )
    return upright


def has_deep_colour(image: ImageFile.ImageFile) -> bool:
    """Whether an opened file has colours of 16 bits, of which Pillow keeps 8: of a camera's 12 bits, 4 are left."""
    return image.mode[0] not in "IF" and any(";16" in str(tile[3]) for tile in image.tile)  # such as "RGB;16B"


def to_float(image: Image.Image, path: Path) -> np.ndarray:
    """Float32 in [0, 1]: `[height, width]` of grey images, `[height, width, 3]` of all others.

    Raises:
        PatchadError: if a floating-point image leaves [0, 1], or one of whole numbers 16 bits.
    """
    if image.mode.startswith(("I", "F")):
        values, most = np.asarray(image), 1 if image.mode == "F" else 65535  # 16-bit grey: I;16, I;16B or, widened, I
        if not (values.min() >= 0 and values.max() <= most):
            raise PatchadError(
                f"{path} holds values from {values.min():g} to {values.max():g}; scale them to [0, {most}]"
            )
        return values.astype(np.float32) / np.float32(most)
    grey = image.mode in ("1", "L")
    return np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32) / 255
