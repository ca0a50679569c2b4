"""Files -> tensors: decoding, size, padding."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from patchad.types import PatchadError, Size

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""Lower case; files are matched in any case."""


def read_image(path: Path) -> Float[Tensor, "3 height width"]:
    """RGB in [0, 1] of an image file, turned as its EXIF orientation says.

    Grey images get three equal channels, 16-bit grey is divided by 65535, floating-point files are taken as they are,
    alpha is dropped.

    Raises:
        PatchadError: if the file cannot be read, or a floating-point file leaves [0, 1].
    """
    values = torch.from_numpy(to_float(decode(path), path))
    return values.expand(3, -1, -1).contiguous() if values.ndim == 2 else values.permute(2, 0, 1).contiguous()


def decode(path: Path) -> Image.Image:
    """The decoded file, upright.

    Raises:
        PatchadError: if it is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise PatchadError(f"cannot read image {path}: {error}") from error


def to_float(image: Image.Image, path: Path) -> np.ndarray:
    """Float32 in [0, 1]: `[height, width]` of grey images, `[height, width, 3]` of all others.

    Raises:
        PatchadError: if a floating-point image leaves [0, 1].
    """
    if image.mode.startswith("I"):  # 16-bit grey: I;16, I;16B or, widened, I
        return np.asarray(image).astype(np.float32) / 65535
    if image.mode == "F":
        values = np.array(image, dtype=np.float32)
        if not (values.min() >= 0 and values.max() <= 1):
            raise PatchadError(f"{path} holds values from {values.min():g} to {values.max():g}; scale them to [0, 1]")
        return values
    grey = image.mode in ("1", "L")
    return np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32) / 255


def read_mask(path: Path, size: Size) -> Bool[Tensor, "height width"]:
    """True on defects: where the mask file is above 128 (of 255), at the file's own size.

    Args:
        path: of the mask.
        size: height x width of its image in pixels.

    Raises:
        PatchadError: if the file cannot be read or has another size than its image.
    """
    values = read_image(path).mean(0)
    if values.shape != size:
        raise PatchadError(
            f"mask {path} has {values.shape[0]} x {values.shape[1]} pixels (height x width), "
            f"its image has {size[0]} x {size[1]}"
        )
    return values > 128 / 255


def fit(
    image: Float[Tensor, "3 height width"], size: Size, keep_aspect: bool = True
) -> tuple[Float[Tensor, "3 new_height new_width"], Size]:
    """The image at another size, and the height x width of its content there.

    With `keep_aspect` the content lies top left and its last row and column are repeated up to `size`; an image that
    has the size already is returned as it is.

    Args:
        image: RGB.
        size: height x width in pixels.
        keep_aspect: pad instead of distorting.

    Example:
        >>> fit(torch.zeros(3, 100, 200), (256, 256))[1]
        (128, 256)
    """
    height, width = image.shape[1:]
    content = size
    if keep_aspect:
        scale = min(size[0] / height, size[1] / width)
        content = max(1, round(height * scale)), max(1, round(width * scale))
    if content != (height, width):
        image = F.interpolate(image[None], content, mode="bilinear", align_corners=False, antialias=True)[0]
    padding = (0, size[1] - content[1], 0, size[0] - content[0])
    return F.pad(image[None], padding, mode="replicate")[0], content


def resize_mask(mask: Bool[Tensor, "height width"], size: Size) -> Bool[Tensor, "new_height new_width"]:
    """The mask at another size, nearest pixels."""
    return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0] > 0.5
