"""Files -> tensors: size, light, padding, augmentation."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from patchad.canvas import Canvas, Size, content_size, gain
from patchad.decoding import MAX_MEGAPIXELS, decode, opened, read_picture, read_pixels, upright_size
from patchad.region import fitted


def read_image(path: Path, max_megapixels: float = MAX_MEGAPIXELS) -> Float[Tensor, "3 height width"]:
    """RGB in [0, 1] of an image file, as `read_pixels` reads it; grey images get three equal channels.

    Raises:
        PatchadError: as `read_pixels` does.
    """
    return in_channels(read_pixels(path, max_megapixels))


def read_for_canvas(
    path: Path, canvas: Canvas, max_megapixels: float = MAX_MEGAPIXELS
) -> tuple[Float[Tensor, "3 height width"], Size]:
    """The same, with as many pixels as a canvas needs, and height x width in pixels of the file: see `read_picture`.

    Raises:
        PatchadError: as `read_pixels` does.
    """
    picture = read_picture(path, canvas, max_megapixels)
    return in_channels(picture.pixels), picture.size


def in_channels(pixels: np.ndarray) -> Float[Tensor, "3 height width"]:
    """What `read_pixels` gave, as three channels."""
    values = torch.from_numpy(pixels)
    return values.expand(3, -1, -1).contiguous() if values.ndim == 2 else values.permute(2, 0, 1).contiguous()


def on_canvas(
    image: Float[Tensor, "3 height width"], canvas: Canvas
) -> tuple[Float[Tensor, "3 new_height new_width"], Size]:
    """The image at the size and in the light of a canvas, and the height x width of its content there.

    With `keep_aspect` the content lies top left and its last row and column are repeated up to the size; an image that
    has the size already keeps its pixels, but for the light. A `brightness` may bring some pixels above 1.

    Args:
        image: RGB.
        canvas: what it is brought to.

    Example:
        >>> on_canvas(torch.zeros(3, 100, 200), Canvas((256, 256)))[1]
        (128, 256)
    """
    height, width = image.shape[1:]
    size = canvas.image_size
    content = content_size((height, width), size, canvas.keep_aspect)
    if content != (height, width):
        image = F.interpolate(image[None], content, mode="bilinear", align_corners=False, antialias=True)[0]
    image = image * gain(float(image.mean()), canvas.brightness)
    padding = (0, size[1] - content[1], 0, size[0] - content[0])
    return F.pad(image[None], padding, mode="replicate")[0], content


def region_on_canvas(mask: np.ndarray, content: Size, size: Size) -> Bool[Tensor, "new_height new_width"]:
    """`patchad.region.fitted`, as a tensor."""
    return torch.from_numpy(fitted(mask, content, size))


def native_size(path: Path, max_megapixels: float = MAX_MEGAPIXELS) -> Size:
    """Height x width of the upright image in a file, in pixels.

    The header tells it; a PNG file is decoded, because its orientation may stand behind the pixels, and so is a TIFF
    file, because versions of Pillow differ in whether its header's size is upright.

    Raises:
        PatchadError: if the file is missing, no image, or too large.
    """
    if path.suffix.lower() in (".tif", ".tiff"):
        return decode(path, max_megapixels)[1]
    with opened(path, max_megapixels) as image:
        return upright_size(image)


class Augmentations(NamedTuple):
    """How far views of an image may differ from it.

    Attributes:
        shift: most rows and columns in pixels by which a view is moved.
        colour: deviation of what is added to each channel, of [0, 1]; 0.02 in the paper.
        noise: deviation of what is added to each pixel and channel, of [0, 1]; 0.02 in the paper.
    """

    shift: int = 2
    colour: float = 0.0
    noise: float = 0.0


class View(NamedTuple):
    """How one view of an image differs from it.

    Attributes:
        shift: rows x columns in pixels by which the content moves up and left.
        colour: added to each channel.
        noise: deviation of what is added to each pixel and channel.
        seed: of the noise.
    """

    shift: Size
    colour: np.ndarray
    noise: float
    seed: tuple[int, ...]


def draw_view(seed: tuple[int, ...], most: Augmentations) -> View:
    """A view, drawn from the seed alone."""
    generator = np.random.default_rng(seed)
    down, right = generator.integers(-most.shift, most.shift, size=2, endpoint=True).tolist()
    colour = generator.normal(0, most.colour, 3).astype(np.float32)
    return View((down, right), colour, most.noise, (*seed, 1))


def augment(image: Float[Tensor, "3 height width"], view: View) -> Float[Tensor, "3 height width"]:
    """A view of an image: moved (edges are repeated), each channel shifted, noise added; values may leave [0, 1].

    Source: Tsai et al., WACV 2022: random shifts of each channel and additive noise.
    """
    height, width = image.shape[1:]
    margin = max(map(abs, view.shift))
    padded = F.pad(image[None], (margin,) * 4, mode="replicate")[0]
    top, left = (margin + step for step in view.shift)
    moved = padded[:, top : top + height, left : left + width] + torch.from_numpy(view.colour)[:, None, None]
    if not view.noise:
        return moved
    noise = np.random.default_rng(view.seed).standard_normal(tuple(image.shape), dtype=np.float32)
    return moved + torch.from_numpy(noise) * view.noise
