"""Geometry only: where patches sit, which are compared, and how their values are folded back to pixels.

A side of K pixels is scored at positions `stride` pixels apart; the patch at position (row, column) covers the pixels
`[row * stride, row * stride + K)` x `[column * stride, column * stride + K)`.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from patchad.canvas import Size
from patchad.errors import PatchadError
from patchad.types import DIRECTIONS, Pyramid, Region

WINDOW = 3
"""Sides of the window that holds all pyramids of an image; a smaller one is faster."""


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


def cut(
    maps: Float[Tensor, "batch channels rows columns"], corners: Int[Tensor, "batch 2"], size: Size
) -> Float[Tensor, "batch channels new_rows new_columns"]:
    """One window of each map.

    Args:
        maps: images or feature maps.
        corners: top left of the windows, in cells of the maps.
        size: rows x columns of the windows.
    """
    places = zip(maps, corners.tolist(), strict=True)
    return torch.stack([values[:, top : top + size[0], left : left + size[1]] for values, (top, left) in places])


def cut_patches(
    image: Float[Tensor, "images channels height width"],
    corners: Int[Tensor, "batch patches 2"],
    size: Size,
    numbers: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch patches channels rows columns"]:
    """Any number of patches of each image, by one gather, without waiting for a GPU.

    Args:
        image: without a gradient, which would be slow here; `cut` has one.
        corners: top left of the patches in pixels.
        size: rows x columns of the patches.
        numbers: of the image that each row of corners is of; by default one after the other.

    Example:
        >>> cut_patches(torch.arange(9.0).view(1, 1, 3, 3), torch.tensor([[[0, 1]]]), size=(2, 2))
        tensor([[[[[1., 2.],
                   [4., 5.]]]]])
    """
    patches = image.unfold(2, size[0], 1).unfold(3, size[1], 1).permute(0, 2, 3, 1, 4, 5)  # a view: nothing is copied
    numbers = torch.arange(len(image), device=image.device) if numbers is None else numbers
    return patches[numbers[:, None], corners[..., 0], corners[..., 1]]


def cut_grid(
    image: Float[Tensor, "batch channels height width"], side: int, stride: int
) -> Float[Tensor, "patches channels side side"]:
    """The patches at every multiple of the stride, image by image, row by row."""
    patches = image.unfold(2, side, stride).unfold(3, side, stride)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def round_up(length: int, multiple: int) -> int:
    """The next multiple.

    Example:
        >>> round_up(250, 16), round_up(256, 16)
        (256, 256)
    """
    return -(-length // multiple) * multiple


class Span(NamedTuple):
    """A part of an axis, in pixels, and what surrounds it.

    Attributes:
        start: first pixel of the part.
        stop: pixel behind its last.
        outer_start: first pixel with the margin, where there is one.
        outer_stop: pixel behind the last with the margin.
    """

    start: int
    stop: int
    outer_start: int
    outer_stop: int


def spans(length: int, tile: int, margin: int) -> list[Span]:
    """An axis cut into tiles, each with a margin that ends at the ends of the axis.

    Example:
        >>> spans(100, tile=64, margin=16)
        [Span(start=0, stop=64, outer_start=0, outer_stop=80), Span(start=64, stop=100, outer_start=48, outer_stop=100)]
    """
    parts = ((start, min(start + tile, length)) for start in range(0, length, tile))
    return [Span(start, stop, max(0, start - margin), min(length, stop + margin)) for start, stop in parts]


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


def touching(region: Region, grid: Size, side: int, stride: int) -> Bool[Tensor, "batch rows columns"]:
    """Which patches lie on what is judged of an image: `inside`, for regions of any form.

    Each pixel belongs to the patch in whose middle, one stride wide, it lies; at the edges of the image to the first or
    the last one. A patch counts when a judged pixel belongs to it. So every judged pixel is covered by a patch that
    counts, and of a patch that counts about half is judged, but where the region is smaller or has corners.

    Args:
        region: True where an image is judged.
        grid: rows x columns of positions.
        side: side of a patch in pixels.
        stride: distance between patches in pixels.
    """
    middle = side - max(side // 2, stride)
    rows, columns = (
        belonging(length, count, middle, stride, region.device)
        for length, count in zip(region.shape[1:], grid, strict=True)
    )
    return rows @ region.float() @ columns.mT > 0


def belonging(length: int, count: int, middle: int, stride: int, device: torch.device) -> Float[Tensor, "count length"]:
    """1 where a pixel in a row belongs to a patch: it lies `middle` pixels behind its first, or up to a stride more."""
    patch = ((torch.arange(length, device=device) - middle) // stride).clamp(0, count - 1)
    return (patch == torch.arange(count, device=device)[:, None]).float()


def covering_sums(
    values: Float[Tensor, "batch rows columns"], width: int
) -> Float[Tensor, "batch more_rows more_columns"]:
    """Per cell of stride x stride pixels, the sum of the values of the patches that cover it.

    Args:
        values: one number per patch position.
        width: rows, and columns, of cells that a patch covers.
    """
    with torch.autocast(values.device.type, enabled=False):  # reduced precision would round the map
        return F.conv_transpose2d(values[:, None], values.new_ones(1, 1, width, width))[:, 0]


def fold(
    values: Float[Tensor, "batch rows columns"],
    counted: Bool[Tensor, "batch rows columns"],
    side: int,
    stride: int,
    cell: int = 1,
) -> Float[Tensor, "batch height width"]:
    """Per cell of pixels, the mean value of the counted patches that cover it; 0 where none does.

    Source: supplement of Tsai et al. (WACV 2022); patch distances are averaged where patches overlap.

    Args:
        values: one number per patch position.
        counted: the patches that take part, see `inside`.
        side: side of a patch in pixels, a multiple of the stride.
        stride: distance between patches in pixels, a multiple of the cell.
        cell: height and width in pixels of what has one value; all pixels of a stride are covered alike.
    """
    weight, width = counted.to(values.dtype), side // stride
    means = covering_sums(values * weight, width) / covering_sums(weight, width).clamp(min=1)
    return enlarge(means, stride // cell)


def enlarge(maps: Float[Tensor, "batch rows columns"], times: int) -> Float[Tensor, "batch more_rows more_columns"]:
    """Each value that many times in each direction."""
    return F.interpolate(maps[:, None], scale_factor=float(times))[:, 0] if times > 1 else maps


def at_pixels(maps: Float[Tensor, "batch rows columns"], cell: int, size: Size) -> Float[Tensor, "batch height width"]:
    """Maps of cells of that height and width at the pixels of images of that size, whose edge cells may cross."""
    return enlarge(maps, cell)[:, : size[0], : size[1]]


def covered(
    mask: Bool[Tensor, "batch height width"], grid: Size, side: int, stride: int
) -> Float[Tensor, "batch rows columns"]:
    """Share of each patch that a mask covers; what lies beyond the mask is not covered.

    Args:
        mask: of whole images.
        grid: rows x columns of patches.
        side: side of a patch in pixels.
        stride: distance between patches in pixels.

    Example:
        >>> covered(torch.tensor([[[True, False], [False, False]]]), (1, 2), side=2, stride=1)
        tensor([[[0.2500, 0.0000]]])
    """
    missing = [(count - 1) * stride + side - length for count, length in zip(grid, mask.shape[1:], strict=True)]
    padded = F.pad(mask.float(), (0, missing[1], 0, missing[0]))
    return F.avg_pool2d(padded[:, None], side, stride)[:, 0]


def mirror(
    images: Float[Tensor, "batch channels height width"], content: Int[Tensor, "batch 2"], axes: tuple[int, ...]
) -> Float[Tensor, "batch channels height width"]:
    """Each image with its content reversed along some axes, and what is beside the content padded by the new edge.

    Args:
        images: their content lies top left.
        content: its height x width in pixels.
        axes: of an image `[channels, height, width]`.

    Example:
        >>> mirror(torch.tensor([[[[1.0, 2.0, 2.0]]]]), torch.tensor([[1, 2]]), axes=(2,))
        tensor([[[[2., 1., 1.]]]])
    """
    height, width = images.shape[2:]
    mirrored = []
    for image, (rows, columns) in zip(images, content.tolist(), strict=True):
        reversed_content = image[None, :, :rows, :columns].flip([axis + 1 for axis in axes])
        mirrored.append(F.pad(reversed_content, (0, width - columns, 0, height - rows), mode="replicate"))
    return torch.cat(mirrored)


def crop_resize(
    maps: Float[Tensor, "batch height width"], content: Int[Tensor, "batch 2"], size: Size
) -> Float[Tensor, "batch new_height new_width"]:
    """Each map's content alone, resized to one size (bilinear), so that padding is never looked at."""
    sizes = content.tolist()
    cropped = [values[None, None, :height, :width] for values, (height, width) in zip(maps, sizes, strict=True)]
    return torch.cat([F.interpolate(values, size, mode="bilinear", align_corners=False) for values in cropped])[:, 0]


def fits_pyramids(size: Size, side: int) -> bool:
    """Whether neighbours and far patches of a side fit an image (height x width in pixels): it needs two sides.

    Example:
        >>> fits_pyramids((128, 128), side=64), fits_pyramids((127, 128), side=64)
        (True, False)
    """
    return min(size) >= 2 * side


def sample_pyramids(
    size: Size,
    content: Size,
    side: int,
    grid: int,
    count: int,
    shift: Size,
    generator: np.random.Generator,
    start: Size = (0, 0),
    directions: int = DIRECTIONS,
) -> Pyramid:
    """Draws the pyramids of one side in one image, without the batch axis.

    Source: supplement of Tsai et al. (WACV 2022) and its loss definitions: neighbours lie 3K/4 to K pixels away in one
    of 12 directions, near patches up to K/16, far patches 3K/2 to 7K/4, for patches of side K. The neighbour's
    direction and distance are drawn first and never changed; near and far are drawn among those that fit beside it (a
    far one moves closer, to no less than K, where it must); the place of the whole is drawn last, uniformly where all
    of it fits. Nothing is clipped. Where neighbours do not fit the image (see `fits_pyramids`), all are the anchor.

    Args:
        size: height x width of the image in pixels.
        content: height x width of what patches lie on; they leave it only if it is too small for them.
        side: side of a patch in pixels.
        grid: distance between allowed positions in pixels; all displacements are rounded to it.
        count: pyramids to draw.
        shift: rows x columns in pixels by which the second view's content is moved against the first's.
        generator: draws everything.
        start: top left corner of what patches lie on, in pixels.
        directions: in which a neighbour may lie.

    Raises:
        PatchadError: if the shift leaves them no room.
    """
    area = np.array([round_up(length, grid) for length in size])  # images are padded at least to the next cell
    limit = np.minimum(area, np.maximum(np.array(content) // grid * grid, WINDOW * side))  # where the window may lie
    extent = np.array(window_size(size, side, grid))
    offset = (np.array(start) - np.maximum(extent - np.array(content), 0) // 2) // grid * grid
    window, room = _draw_up_to(limit - extent, grid, generator) + offset.clip(0, area - limit), extent - side
    direction = generator.integers(directions, size=count)
    origin = np.zeros((count, 2), dtype=np.int64)
    if not fits_pyramids((int(extent[0]), int(extent[1])), side):
        anchor = _draw_up_to(origin + room, grid, generator)
        return _pyramid(window, anchor, anchor, anchor, anchor, direction)
    neighbour = displacements(direction, generator.uniform(0.75 * side, side, size=count), grid, directions)
    far = _draw_far(neighbour, side, grid, room, generator)
    near = _draw_fitting(_near_candidates(side, grid), np.stack([origin, neighbour, far]), room, generator)
    movement = -np.round(np.array(shift) / grid).astype(np.int64) * grid if extent.min() >= WINDOW * side else origin
    offsets = np.stack([origin, near + movement, far + movement, neighbour + movement])
    low, slack = offsets.min(0), room - (offsets.max(0) - offsets.min(0))
    if slack.min() < 0:
        raise PatchadError(f"data.shift leaves no room for the pyramids of side {side}; lower it")
    anchor = _draw_up_to(slack, grid, generator) - low
    return _pyramid(window, *(anchor + offset for offset in offsets), direction)


def window_size(size: Size, side: int, grid: int) -> Size:
    """Height x width in pixels of the window that holds the pyramids of an image of that size."""
    height, width = (min(round_up(length, grid), WINDOW * side) for length in size)
    return height, width


def displacements(
    direction: Int[np.ndarray, "*draws"], distance: Float[np.ndarray, "*draws"], grid: int, directions: int = DIRECTIONS
) -> Int[np.ndarray, "*draws 2"]:
    """Rows and columns in pixels, rounded to the grid, of steps of some distance in one of the directions.

    Directions are evenly spaced: 0 points along the rows, a quarter of them along the columns.
    """
    angle = direction * (2 * np.pi / directions)
    step = distance[..., None] * np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    return np.round(step / grid).astype(np.int64) * grid


def _draw_up_to(most: np.ndarray, grid: int, generator: np.random.Generator) -> np.ndarray:
    """Multiples of the grid from 0 to `most`, uniformly."""
    return generator.integers(0, most // grid, endpoint=True) * grid


@functools.cache
def _near_candidates(side: int, grid: int) -> Int[np.ndarray, "candidates 2"]:
    """Every displacement of at most K/16 rows and columns but none; or no displacement, where the grid is coarser."""
    steps = np.arange(-(side // 16 // grid), side // 16 // grid + 1) * grid
    candidates = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    return candidates[candidates.any(1)] if len(candidates) > 1 else candidates


def _draw_far(
    neighbour: Int[np.ndarray, "count 2"], side: int, grid: int, room: np.ndarray, generator: np.random.Generator
) -> Int[np.ndarray, "count 2"]:
    """At 3K/2 to 7K/4 in any direction that fits beside the neighbour, or else as far as one fits, but at least K."""
    count, nearer = len(neighbour), np.linspace(0, 1, 4)
    drawn = generator.uniform(1.5 * side, 1.75 * side, size=count)[:, None]
    distance = np.repeat((drawn + (side - drawn) * nearer)[:, :, None], DIRECTIONS, axis=2)
    candidates = displacements(np.broadcast_to(np.arange(DIRECTIONS), distance.shape), distance, grid)
    fitting = _fits(candidates, np.stack([np.zeros_like(neighbour), neighbour])[:, :, None, None], room)
    fitting &= candidates[..., 0] ** 2 + candidates[..., 1] ** 2 >= side**2
    first = fitting.any(2).argmax(1)
    rows = np.arange(count)
    return candidates[rows, first, _choose(fitting[rows, first], generator)]


def _draw_fitting(
    candidates: Int[np.ndarray, "candidates 2"], taken: np.ndarray, room: np.ndarray, generator: np.random.Generator
) -> Int[np.ndarray, "count 2"]:
    choices = np.broadcast_to(candidates, (taken.shape[1], *candidates.shape))
    return candidates[_choose(_fits(choices, taken[:, :, None], room), generator)]


def _fits(candidates: np.ndarray, taken: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Whether a candidate lies in one window with what is taken (first axis), `room` pixels of free play."""
    low, high = np.minimum(candidates, taken.min(0)), np.maximum(candidates, taken.max(0))
    fitting = high - low <= room
    return fitting[..., 0] & fitting[..., 1]


def _choose(allowed: Bool[np.ndarray, "count choices"], generator: np.random.Generator) -> Int[np.ndarray, " count"]:
    """One of the allowed choices of each row, uniformly."""
    return np.where(allowed, generator.random(allowed.shape), -1).argmax(1)


def _pyramid(*fields: np.ndarray) -> Pyramid:
    return Pyramid(*(torch.from_numpy(np.ascontiguousarray(field)) for field in fields))
