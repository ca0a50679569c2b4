"""Image files -> pixels, without torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from patchad.canvas import Canvas, Size, content_size
from patchad.errors import PatchadError

Image.MAX_IMAGE_PIXELS = None  # a line camera's may have more than Pillow's 179 million; ours is below
MAX_MEGAPIXELS = 500.0
"""Millions of pixels of the largest image that is decoded; 500 take 6 GB as float32."""
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
"""Of Pillow; of others, such as EPS, some start another program."""
SAMPLE_FORMAT, SIGNED = 339, 2
"""The TIFF tag, and what it says of whole numbers that may be negative."""
ORIENTATION = 0x0112
"""The EXIF tag."""
REDUCTIONS = (8, 4, 2)
"""By which libjpeg decodes at a part of the size: it computes the means of so many rows and columns, and no others."""
MARGIN = 2
"""Rows and columns that a reduced image keeps for each of the canvas, at least.

With 1 edges are softer, which moves scores further (benchmarks/tried.md, "Folders of many files").
"""


class Picture(NamedTuple):
    """An image, perhaps decoded at a part of its file's size.

    Attributes:
        pixels: float32 in [0, 1].
        size: height x width of the upright image in the file, in pixels.
    """

    pixels: np.ndarray
    size: Size


def read_picture(path: Path, canvas: Canvas, max_megapixels: float = MAX_MEGAPIXELS) -> Picture:
    """The pixels of an image file, of a large JPEG file fewer than it has, but enough for a canvas.

    Such a file is decoded at an eighth, a quarter or a half of its size: at the smallest that divides both sides, so
    that no place moves, and leaves `MARGIN` rows and columns for each of the canvas. All commands decode by this rule.
    Where a region is judged, nothing is reduced: what lies around it would be mixed in.

    Args:
        path: of the file.
        canvas: what the image is brought to.
        max_megapixels: a larger image is refused by what its header says.

    Returns:
        Pixels as `read_pixels` gives them.

    Raises:
        PatchadError: as `read_pixels` does.
    """
    image, size = decode(path, max_megapixels, canvas)
    return Picture(to_float(image, path), size)


def read_pixels(path: Path, max_megapixels: float = MAX_MEGAPIXELS) -> np.ndarray:
    """The pixels of an image file, turned as its EXIF orientation says.

    16-bit grey is divided by 65535, floating-point files are taken as they are, alpha is dropped.

    Args:
        path: of the file.
        max_megapixels: a larger image is refused by what its header says.

    Returns:
        Float32 in [0, 1]: `[height, width]` of grey images, RGB `[height, width, 3]` of all others.

    Raises:
        PatchadError: if the file cannot be read or is too large, its numbers leave [0, 1] or 16 bits, its colours have
            16 bits, or it has several pages.
    """
    return to_float(decode(path, max_megapixels)[0], path)


def decode(
    path: Path, max_megapixels: float = MAX_MEGAPIXELS, canvas: Canvas | None = None
) -> tuple[Image.Image, Size]:
    """The decoded file, upright, and height x width in pixels of what it holds.

    Args:
        path: of the file.
        max_megapixels: a larger image is refused.
        canvas: what the image may be reduced for; by default it is not.

    Raises:
        PatchadError: if it is missing, truncated, no image or too large, has several pages, or colours of 16 bits.
    """
    with opened(path, max_megapixels) as image:
        check_pages(image, path)
        deep = has_deep_colour(image)
        by = 1 if canvas is None else reduction(image, canvas)
        image.draft(None, (image.width // by, image.height // by))
        image.load()
        upright = ImageOps.exif_transpose(image)
    if deep:
        raise PatchadError(
            f"{path} has colours of 16 bits, which cannot be read; save it with 8 bits, or as 16-bit grey"
        )
    return upright, (upright.height * by, upright.width * by)


def reduction(image: ImageFile.ImageFile, canvas: Canvas) -> int:
    """By how much an opened file is decoded smaller than it is; see `read_picture`."""
    if image.format not in ("JPEG", "MPO") or canvas.region is not None:
        return 1
    native = upright_size(image)
    content = content_size(native, canvas.image_size, canvas.keep_aspect)
    lengths = list(zip(native, content, strict=True))
    fits = (by for by in REDUCTIONS if all(not has % by and has // by >= MARGIN * wanted for has, wanted in lengths))
    return next(fits, 1)


def upright_size(image: ImageFile.ImageFile) -> Size:
    """Height x width of an opened file when it is turned as its EXIF orientation says."""
    turned = image.getexif().get(ORIENTATION, 1) >= 5  # a quarter turn, mirrored or not
    return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def opened(path: Path, max_megapixels: float) -> Iterator[ImageFile.ImageFile]:
    """An image file of which the header was read.

    Raises:
        PatchadError: if it, or what is done with it, shows that it is no image that can be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height / 1e6 > max_megapixels:
                raise PatchadError(
                    f"{path} has {image.height} x {image.width} pixels (height x width), more than "
                    f"{max_megapixels:g} million: raise data.max_megapixels if memory holds it"
                )
            yield image
    except PatchadError:
        raise
    except UnidentifiedImageError as error:
        raise PatchadError(f"cannot read image {path}: it is none of {', '.join(FORMATS)}, or damaged") from error
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise PatchadError(f"cannot read image {path}: {error}") from error


def check_pages(image: ImageFile.ImageFile, path: Path) -> None:
    """Raises PatchadError if a file has more than one page or frame, or signed bytes, which Pillow wraps.

    The further frames of a JPEG file (MPO) are previews of the first, or the other eye's.
    """
    if image.format != "MPO" and (pages := getattr(image, "n_frames", 1)) > 1:
        raise PatchadError(f"{path} has {pages} pages, of which one would be read; save each as a file")
    if image.format == "TIFF" and image.mode == "L" and SIGNED in image.tag_v2.get(SAMPLE_FORMAT, ()):  # type: ignore[attr-defined]
        raise PatchadError(f"{path} holds signed numbers of 8 bits; save unsigned ones")


def has_deep_colour(image: ImageFile.ImageFile) -> bool:
    """Whether an opened file has colours of 16 bits, of which Pillow keeps 8: of a camera's 12 bits, 4 are left."""
    return image.mode[0] not in "IF" and any(";16" in str(tile[3]) for tile in image.tile)  # such as "RGB;16B"


def to_float(image: Image.Image, path: Path) -> np.ndarray:
    """Float32 in [0, 1]: `[height, width]` of grey images, `[height, width, 3]` of all others.

    Raises:
        PatchadError: if a floating-point image leaves [0, 1], or one of whole numbers 16 bits, or it holds nan.
    """
    if image.mode.startswith(("I", "F")):
        values, most = np.asarray(image), 1 if image.mode == "F" else 65535  # 16-bit grey: I;16, I;16B or, widened, I
        if not np.isfinite(values).all():
            raise PatchadError(f"{path} holds nan or infinite values; give them a number in [0, {most}]")
        if not (values.min() >= 0 and values.max() <= most):
            raise PatchadError(
                f"{path} holds values from {values.min():g} to {values.max():g}; scale them to [0, {most}]"
            )
        return values.astype(np.float32) / np.float32(most)
    grey = image.mode in ("1", "L")
    values = np.array(image.convert("L" if grey else "RGB"), dtype=np.float32)
    values /= 255
    return values
