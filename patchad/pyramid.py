"""Geometry only: where patches sit, and how their values are folded back to pixels.

A side of K pixels is scored at positions `stride` pixels apart; the patch at position (row, column) covers the pixels
`[row * stride, row * stride + K)` x `[column * stride, column * stride + K)`.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from patchad.types import PatchadError, Size


def positions(size: Size, side: int, stride: int) -> Size:
    """Rows x columns of patch positions in an image.

    Args:
        size: height x width of the image in pixels.
        side: side of a patch in pixels.
        stride: distance between patches in pixels.

    Raises:
        PatchadError: if no patch fits.

    Example:
        >>> positions((256, 256), side=64, stride=16)
        (13, 13)
    """
    if min(size) < side:
        raise PatchadError(
            f"side {side} does not fit an image of {size[0]} x {size[1]} pixels (height x width); "
            f"set image_size to at least {side}"
        )
    return (size[0] - side) // stride + 1, (size[1] - side) // stride + 1


def pad_to_multiple(
    image: Float[Tensor, "batch channels height width"], multiple: int
) -> Float[Tensor, "batch channels padded_height padded_width"]:
    """The image with its right and bottom edge repeated up to the next multiple of `multiple` pixels.

    Example:
        >>> pad_to_multiple(torch.zeros(1, 3, 250, 256), 16).shape
        torch.Size([1, 3, 256, 256])
    """
    height, width = image.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(image, (0, right, 0, bottom), mode="replicate") if bottom or right else image


def common_multiple(strides: Iterable[int]) -> int:
    """The size in pixels that every stride divides."""
    return math.lcm(*strides)


def inside(content: Int[Tensor, "batch 2"], grid: Size, side: int, stride: int) -> Bool[Tensor, "batch rows columns"]:
    """Which patches lie on the content of an image rather than on its padding.

    A patch counts when its centre is on the content (or, for strides above half a side, when it is needed to cover the
    last pixel), so that every pixel of the content is covered by a patch that counts.

    Args:
        content: height x width of each image's content, top left, in pixels.
        grid: rows x columns of positions.
        side: side of a patch in pixels.
        stride: distance between patches in pixels.
    """
    limit = (content - side + max(side // 2, stride)).clamp(min=1)
    top = torch.arange(grid[0], device=content.device) * stride
    left = torch.arange(grid[1], device=content.device) * stride
    return (top < limit[:, :1])[:, :, None] & (left < limit[:, 1:])[:, None, :]


def spread(values: Float[Tensor, "batch rows columns"], side: int, stride: int) -> Float[Tensor, "batch height width"]:
    """Per pixel, the sum of the values of the patches that cover it (a box filter, one axis after the other)."""
    ones = values.new_ones(1, 1, side, 1)
    rows = F.conv_transpose2d(values[:, None], ones, stride=(stride, 1))
    return F.conv_transpose2d(rows, ones.transpose(2, 3), stride=(1, stride))[:, 0]


def fold(
    values: Float[Tensor, "batch rows columns"], counted: Bool[Tensor, "batch rows columns"], side: int, stride: int
) -> Float[Tensor, "batch height width"]:
    """Per pixel, the mean value of the counted patches that cover it; 0 where none does.

    Source: supplement of Tsai et al. (WACV 2022); patch distances are averaged where patches overlap.

    Args:
        values: one number per patch position.
        counted: the patches that take part, see `inside`.
        side: side of a patch in pixels.
        stride: distance between patches in pixels.
    """
    weight = counted.to(values.dtype)
    return spread(values * weight, side, stride) / spread(weight, side, stride).clamp(min=1)


def crop_resize(
    maps: Float[Tensor, "batch height width"], content: Int[Tensor, "batch 2"], size: Size
) -> Float[Tensor, "batch new_height new_width"]:
    """Each map's content alone, resized to one size (bilinear), so that padding is never looked at."""
    cropped = [one[None, None, :height, :width] for one, (height, width) in zip(maps, content.tolist(), strict=True)]
    return torch.cat([F.interpolate(one, size, mode="bilinear", align_corners=False) for one in cropped])[:, 0]
