"""What stands out in an image without learning: the cues of MCue, and the saliency that they make together.

Source: Huang, Qiu, Yuan, Surface defect saliency of magnetic tile, The Visual Computer 36, 2020,
https://doi.org/10.1007/s00371-018-1588-5, and its authors' MCueSal2.py, https://github.com/qiucongying/Mcue.

Every cue is of matrices, pooling and differences, so that exported files compute it. That changes some of the authors'
steps; each function names its own.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from patchad.scoring import content_pixels, gaussian
from patchad.types import Region

GREY = 1 / 255
"""One level of grey, the least that counts as a contrast."""
NEIGHBOURHOODS = (0.02, 0.05, 0.08)
"""Deviations of Gaussians over the shorter side of an image: the authors' windows of 1/8, 5/16 and 1/2 of it."""
DARKER = 15 * GREY
"""By how much a pixel must be darker than its neighbourhood."""
Grey = Float[Tensor, "batch height width"]


def saliency(
    image: Float[Tensor, "batch 3 height width"], content: Int[Tensor, "batch 2"], region: Region | None
) -> Grey:
    """MCue: how much each pixel stands out by five cues together, in [0, 1]; 0 where an image is not judged.

    Args:
        image: RGB in [0, 1].
        content: height x width of each image's content, top left, in pixels.
        region: True where an image is judged; by default that is its content.

    Example:
        >>> spot = torch.full((1, 3, 64, 64), 0.6)
        >>> spot[:, :, 40:44, 20:24] = 0.2
        >>> saliency(spot, torch.tensor([[64, 64]]), None)[0, 42, 22] > 0.5
        tensor(True)
    """
    with torch.autocast(image.device.type, enabled=False):  # reduced precision would round phases away
        grey = image.float().mean(1)
        on_it = content_pixels(content, *grey.shape[1:], region=region) > 0
        around = [gaussian(grey, content, share * min(grey.shape[1:]), region=region) for share in NEIGHBOURHOODS]
        textured = 3 * over_highest(irregularity(grey).where(on_it, 0), GREY)
        contrast = over_highest(torch.stack([(mean - grey).abs() for mean in around]).sum(0).where(on_it, 0), GREY)
        combined = textured + contrast + structure(grey, content, region)
        darker = 1 + 3 * ((around[1] - grey - DARKER) / GREY).clamp(0, 1)
        enclosed = over_highest((enclosure(grey) + enclosure(-grey)).where(on_it, 0), GREY).square()
        return (gaussian(enclosed, content, 1.0, region=region) * darker * combined / 4).clamp(0, 1).where(on_it, 0)


def over_highest(values: Grey, least: float) -> Grey:
    """Values of each image over their highest one, or over the least that may be."""
    return values / values.amax((1, 2), keepdim=True).clamp(min=least)


def irregularity(grey: Grey) -> Grey:
    """What no regular texture has (PHOT: Aiger and Talbot, CVPR 2010): the image of its phases alone, squared.

    The authors divide the Fourier spectrum by its magnitude. Here that is the spectrum of the image beside its mirror
    images, which has no edge where the image ends: a cosine transform, with signs for phases (Hou, Harel, Koch, Image
    signature, PAMI 2012). One level of grey is added to the magnitude, so that rounding errors have no sign.
    """
    rows, columns = (cosines(length, grey) for length in grey.shape[1:])
    spectrum = rows @ (grey - grey.mean((1, 2), keepdim=True)) @ columns.mT
    signs = rows.mT @ (spectrum / (spectrum.abs() + GREY)) @ columns
    whole = torch.tensor([grey.shape[1:]], device=grey.device).expand(grey.shape[0], 2)
    smoothed = gaussian(signs, whole, 1.7)
    return (smoothed - smoothed.mean((1, 2), keepdim=True)).square()


def cosines(length: int, like: Tensor) -> Float[Tensor, "length length"]:
    """The orthonormal cosine transform (DCT-II) as a matrix: no FFT is exported."""
    place = torch.arange(length, dtype=torch.float64)
    waves = (math.pi / length * place[:, None] * (place + 0.5)).cos() * math.sqrt(2 / length)
    waves[0] *= math.sqrt(0.5)
    return waves.to(like)


def structure(grey: Grey, content: Int[Tensor, "batch 2"], region: Region | None) -> Grey:
    """Edges and corners: trace and anisotropy of the structure tensor, each over its highest value, averaged.

    The authors shrink the image to a quarter; here 5 x 5 pixels are averaged around each.
    """
    coarse = F.avg_pool2d(F.pad(grey[:, None], (3, 3, 3, 3), mode="replicate"), 5, stride=1)[:, 0]
    down, right = (coarse[:, 2:, 1:-1] - coarse[:, :-2, 1:-1]) / 2, (coarse[:, 1:-1, 2:] - coarse[:, 1:-1, :-2]) / 2
    products = (down.square(), right.square(), down * right)
    down, right, mixed = (gaussian(values, content, 4.0, region=region) for values in products)
    anisotropy = (down - right).square() + 4 * mixed.square()
    return (over_highest(anisotropy, GREY**4) + over_highest(down + right, GREY**2)) / 2


def enclosure(grey: Grey) -> Grey:
    """How much darker a pixel is than what surrounds it: a boolean map saliency (Zhang and Sclaroff, ICCV 2013).

    At a threshold, a dark pixel counts as surrounded where it cannot be reached from the edge of the image. Summed over
    all thresholds, that is by how much the lowest barrier to the edge is brighter. The authors flood 80 thresholds from
    the edge along any path; here along the four straight ones.
    """
    rows, columns = (brightest(grey.mT).mT, brightest(grey))
    height, width = grey.shape[1:]
    rays = (rows[:, :height], rows[:, height - 1 :], columns[:, :, :width], columns[:, :, width - 1 :])
    barrier = rays[0]
    for ray in rays[1:]:
        barrier = torch.minimum(barrier, ray)
    return barrier - grey


def brightest(grey: Grey) -> Float[Tensor, "batch height places"]:
    """The highest value from each pixel to the left edge, and then from each to the right edge; the last is the first.

    Example:
        >>> brightest(torch.tensor([[[1.0, 3.0, 2.0]]]))
        tensor([[[1., 3., 3., 3., 2.]]])
    """
    width = grey.shape[2]
    return F.max_pool1d(F.pad(grey, (width - 1, width - 1), mode="replicate"), width, stride=1)
