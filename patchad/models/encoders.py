"""Images -> embeddings of the patches of all sides.

A `PyramidEncoder` runs the backbone and the `PatchEncoder` of each side, in one of two modes: `DenseEncoder` passes the
whole image through the backbone once, `SlidingEncoder` each patch on its own.
"""

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from patchad.canvas import Size
from patchad.checkpoint import take_sizes
from patchad.errors import PatchadError, check_range
from patchad.models.backbones import Backbone, Tap, receptive_radius
from patchad.models.patches import PatchEncoder, PatchEncoderFactory, Standardize, check_side
from patchad.pyramid import (
    cut,
    cut_grid,
    cut_patches,
    inside,
    pad_to_multiple,
    positions,
    round_up,
    spans,
    touching,
    window_size,
)
from patchad.types import Region


class MeanImage(nn.Module):
    """The mean of the training images, subtracted from each image as in the paper; nothing until it is measured."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(0))
        self._moments = torch.zeros((), dtype=torch.float64)

    @property
    def ready(self) -> bool:
        """Whether it was measured."""
        return bool(len(self.mean))

    def observe(self, image: Float[Tensor, "batch 3 height width"]) -> None:
        """Takes note of images, all of one size."""
        summed = image.double().sum(0).cpu()
        self._moments = self._moments + torch.stack([torch.full_like(summed, len(image)), summed])

    def finish(self, total: Callable[[Tensor], Tensor]) -> None:
        """Turns what was observed into the mean; `total` sums a tensor over all processes."""
        count, summed = total(self._moments)
        self.mean = (summed / count).float().to(self.mean.device)

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """The image minus the mean.

        Raises:
            PatchadError: if the image has another size than the training images.
        """
        if self.ready and image.shape[1:] != self.mean.shape:
            raise PatchadError(
                f"the mean image has {self.mean.shape[1]} x {self.mean.shape[2]} pixels (height x width), this image "
                f"{image.shape[2]} x {image.shape[3]}; give all images the image_size of the fit"
            )
        return image - self.mean if self.ready else image

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        take_sizes(self, state_dict, prefix, ("mean",))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PyramidEncoder(nn.Module, ABC):
    """Embeddings of the patches of every side.

    Args:
        backbone: image -> feature maps.
        patch_encoder: makes the encoder of one side.
        sides: sides in pixels.
        taps: tap for each side; by default the backbone's own.
        scoring_strides: distance between scored patches for each side in pixels, a multiple of its grid (`grids`); by
            default the largest multiple of the tap's stride up to 8 and half a side that divides the side, or else the
            tap's stride.
        subtract_mean_image: subtract the mean training image, as in the paper, instead of the backbone's normalisation.
        tile: a larger image (height or width in pixels) passes the backbone in tiles of that size; None never.

    Raises:
        PatchadError: if a tap is unknown, a stride does not fit, or no side reads a layer that is to be trained.
    """

    def __init__(
        self,
        backbone: Backbone,
        patch_encoder: PatchEncoderFactory,
        sides: Sequence[int],
        taps: Mapping[int, str] | None = None,
        scoring_strides: Mapping[int, int] | None = None,
        subtract_mean_image: bool = False,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        check_range({"tile": tile}, 1)
        check_sides(sides)
        self.tile = tile
        self.backbone, self.mean_image = backbone, MeanImage() if subtract_mean_image else None
        self.sides = tuple(sides)
        self.tap_names = {side: tap_name(backbone, side, taps or {}) for side in self.sides}
        self.taps = {side: backbone.tap(name) for side, name in self.tap_names.items()}
        self._freeze_what_is_never_run()
        for side, tap in self.taps.items():
            check_side(side, tap)
        chosen = scoring_strides or {}
        self.strides = {side: chosen.get(side, default_stride(side, self.taps[side])) for side in self.sides}
        for side, grid in self.grids.items():
            check_stride(side, self.strides[side], grid)
        self.encoders = nn.ModuleDict({str(side): patch_encoder(side, self.taps[side]) for side in self.sides})
        self.multiple = math.lcm(*self.strides.values(), *(tap.stride for tap in self.taps.values()))

    def _freeze_what_is_never_run(self) -> None:
        read = set(self.backbone.until(self.tap_names.values()).parameters())
        if not self.backbone.frozen and not any(parameter.requires_grad for parameter in read):
            deepest = max(self.sides, key=lambda side: self.taps[side].layer)
            raise PatchadError(
                "backbone.trainable trains nothing of the backbone: no side reads a layer behind "
                f"{self.tap_names[deepest]}; name an earlier one, or give none"
            )
        for parameter in set(self.backbone.parameters()) - read:
            parameter.requires_grad_(False)

    @property
    @abstractmethod
    def grids(self) -> dict[int, int]:
        """Distance in pixels between the places where a patch may lie, by side."""

    @abstractmethod
    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """Embeddings of each side, `[batch, dim, rows, columns]`, rows x columns as in `grid`.

        Args:
            image: RGB in [0, 1].

        Raises:
            PatchadError: if a side does not fit the image.
        """

    @abstractmethod
    def observable(self, image: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """What the encoders of each side read in an image, `[maps, channels, rows, columns]`."""

    @abstractmethod
    def windows(
        self, image: Float[Tensor, "batch 3 height width"], corners: Mapping[int, Int[Tensor, "batch 2"]]
    ) -> dict[int, Tensor]:
        """What `embed` needs of one window of each image, by side.

        Args:
            image: RGB in [0, 1].
            corners: of the windows in pixels.
        """

    @abstractmethod
    def embed(
        self, side: int, window: Tensor, positions: Int[Tensor, "batch patches 2"]
    ) -> Float[Tensor, "batch patches dim"]:
        """Embeddings of patches within windows.

        Args:
            side: side of the patches in pixels.
            window: what `windows` gave for that side.
            positions: top left corners within the window in pixels, multiples of the side's grid.
        """

    def prepare(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """What the backbone gets: the image, or something that it normalises to the image minus the mean image."""
        if self.mean_image is None:
            return image
        return self.mean_image(image) * self.backbone.input_deviation + self.backbone.input_mean

    @property
    def unit(self) -> Tensor:
        """What 1 of an image becomes in `prepare`, `[3, 1, 1]`."""
        deviation = self.backbone.input_deviation
        return torch.ones_like(deviation) if self.mean_image is None else deviation

    def patch_encoder(self, side: int) -> PatchEncoder:
        """The encoder of a side."""
        encoder = self.encoders[str(side)]
        assert isinstance(encoder, PatchEncoder)
        return encoder

    def grid(self, size: Size, side: int) -> Size:
        """Rows x columns of scored positions of a side in an image of that size (height x width, pixels)."""
        return positions(self.padded(size), side, self.strides[side])

    def padded(self, size: Size) -> Size:
        """Height x width in pixels to which images of that size are padded, so that all strides divide them."""
        return round_up(size[0], self.multiple), round_up(size[1], self.multiple)

    def counted(
        self, content: Int[Tensor, "batch 2"], values: Tensor, side: int, region: Region | None = None
    ) -> Bool[Tensor, "batch rows columns"]:
        """Which patches of a side, one for each of the last two axes of `values`, lie on what is judged of an image.

        Args:
            content: height x width of each image's content, top left, in pixels.
            values: of the patches, such as embeddings.
            side: of the patches in pixels.
            region: True where an image is judged; by default that is the content.
        """
        grid = (values.shape[-2], values.shape[-1])
        if region is None:
            return inside(content, grid, side, self.strides[side])
        return touching(region, grid, side, self.strides[side])

    def check_size(self, image: Float[Tensor, "batch 3 height width"]) -> None:
        """Raises PatchadError if a side does not fit the image."""
        for side in self.sides:
            self.grid((image.shape[-2], image.shape[-1]), side)

    @property
    def standardizers(self) -> dict[int, Standardize]:
        """The standardised sides."""
        modules = {side: self.patch_encoder(side).standardize for side in self.sides}
        return {side: standardize for side, standardize in modules.items() if standardize is not None}

    def observe(self, features: Mapping[int, Tensor]) -> None:
        """Lets the standardised sides take note of what their encoders read."""
        for side, standardize in self.standardizers.items():
            standardize.observe(features[side])


class DenseEncoder(PyramidEncoder):
    """One backbone pass over the whole image feeds all sides; a patch sees its surroundings through the backbone."""

    @property
    def grids(self) -> dict[int, int]:
        """The strides of the taps."""
        return {side: tap.stride for side, tap in self.taps.items()}

    def features(self, image: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """The feature map of each side's tap, `[batch, channels, rows, columns]`; of a larger image tile by tile."""
        prepared = pad_to_multiple(self.prepare(image), self.multiple)
        if self.tile is None or max(prepared.shape[2:]) <= self.tile:
            return self._by_side(self._features(prepared))
        return self._by_side(self._features_in_tiles(prepared, self.tile))

    observable = features

    def _features(self, prepared: Tensor) -> dict[str, Tensor]:
        names = set(self.tap_names.values())
        if prepared.device.type != "cpu" or torch.compiler.is_exporting() or not self.backbone.frozen:
            return self.backbone(prepared, names)
        maps = [self.backbone(image, names) for image in prepared.split(1)]  # the next one uses the same memory again
        return {name: torch.cat([features[name] for features in maps]) for name in names}

    def _by_side(self, maps: Mapping[str, Tensor]) -> dict[int, Tensor]:
        return {side: maps[name] for side, name in self.tap_names.items()}

    def _features_in_tiles(self, prepared: Tensor, tile: int) -> dict[str, Tensor]:
        rows, columns = (spans(length, round_up(tile, self.multiple), self.margin) for length in prepared.shape[2:])
        maps: dict[str, Tensor] = {}
        for row, column in itertools.product(rows, columns):
            part = prepared[:, :, row.outer_start : row.outer_stop, column.outer_start : column.outer_stop]
            for name, values in self._features(part).items():
                stride = self.backbone.taps[name].stride
                shape = *values.shape[:2], prepared.shape[2] // stride, prepared.shape[3] // stride
                whole = maps.setdefault(name, values.new_empty(shape))
                inner = whole[:, :, row.start // stride : row.stop // stride]
                inner = inner[:, :, :, column.start // stride : column.stop // stride]
                top, left = (row.start - row.outer_start) // stride, (column.start - column.outer_start) // stride
                inner.copy_(values[:, :, top : top + inner.shape[2], left : left + inner.shape[3]])
        return maps

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """Embeddings at every scoring position."""
        self.check_size(image)
        return self.embed_features(self.features(image))

    def embed_features(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Embeddings at every scoring position, `[batch, dim, rows, columns]` by side, from what `features` gave."""
        steps = {side: self.strides[side] // self.taps[side].stride for side in self.sides}
        return {side: self.patch_encoder(side)(features[side], steps[side]) for side in self.sides}

    @functools.cached_property
    def margin(self) -> int:
        """Pixels around a tile that its features see: the receptive field's radius, on the grid.

        Raises:
            PatchadError: if there is no such margin, since a feature sees all of the image.
        """
        radius = receptive_radius(self.backbone, set(self.tap_names.values()))
        if radius is None:
            raise PatchadError(
                f"tile {self.tile} is smaller than the image, and {self.backbone.title} sees the whole image at once "
                "(attention, or squeeze-and-excitation): give --model.tile null, or a smaller data.image_size"
            )
        return round_up(radius, self.multiple)

    def windows(
        self, image: Float[Tensor, "batch 3 height width"], corners: Mapping[int, Int[Tensor, "batch 2"]]
    ) -> dict[int, Tensor]:
        """The windows of the taps, `[batch, channels, rows, columns]`."""
        features, size = self.features(image), (image.shape[2], image.shape[3])
        extents = {side: window_size(size, side, grid) for side, grid in self.grids.items()}
        return {
            side: cut(features[side], corners[side] // grid, (extents[side][0] // grid, extents[side][1] // grid))
            for side, grid in self.grids.items()
        }

    def embed(
        self, side: int, window: Tensor, positions: Int[Tensor, "batch patches 2"]
    ) -> Float[Tensor, "batch patches dim"]:
        """Every place of the window is embedded at once; the asked ones are picked."""
        embeddings = self.patch_encoder(side)(window, 1)
        cells = positions // self.grids[side]
        places = cells[..., 0] * embeddings.shape[3] + cells[..., 1]
        flat = embeddings.flatten(2)
        return flat.gather(2, places[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)


class SlidingEncoder(PyramidEncoder):
    """Each patch passes the backbone on its own, as in the paper; slow, and at any pixel."""

    patches_at_once = 512

    @property
    def grids(self) -> dict[int, int]:
        """One pixel."""
        return dict.fromkeys(self.sides, 1)

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """Embeddings at every scoring position."""
        self.check_size(image)
        padded, embedded = pad_to_multiple(self.prepare(image), self.multiple), {}
        for side, stride in self.strides.items():
            rows, columns = self.grid((image.shape[2], image.shape[3]), side)
            # an exported graph takes all images at once, since it does not know how many there are
            images = [padded] if torch.compiler.is_exporting() else padded.split(1)
            embeddings = torch.cat([self.encode(side, cut_grid(image, side, stride)) for image in images])
            embedded[side] = embeddings.unflatten(0, (image.shape[0], rows, columns)).permute(0, 3, 1, 2)
        return embedded

    def observable(self, image: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """The taps of patches side by side."""
        prepared = self.prepare(image)
        return {side: self._features(side, cut_grid(prepared, side, side)) for side in self.sides}

    def windows(
        self, image: Float[Tensor, "batch 3 height width"], corners: Mapping[int, Int[Tensor, "batch 2"]]
    ) -> dict[int, Tensor]:
        """The windows of the image, `[batch, 3, height, width]`."""
        prepared, size = self.prepare(image), (image.shape[2], image.shape[3])
        return {
            side: cut_patches(prepared, corners[side][:, None], window_size(size, side, 1))[:, 0] for side in self.sides
        }

    def embed(
        self, side: int, window: Tensor, positions: Int[Tensor, "batch patches 2"]
    ) -> Float[Tensor, "batch patches dim"]:
        """The asked patches are cut out and embedded."""
        patches = cut_patches(window, positions, (side, side))
        return self.encode(side, patches.flatten(0, 1)).unflatten(0, positions.shape[:2])

    def _features(self, side: int, patches: Float[Tensor, "patches 3 side side"]) -> Tensor:
        name = self.tap_names[side]
        return self.backbone(patches, [name])[name]

    def encode(self, side: int, patches: Float[Tensor, "patches 3 side side"]) -> Float[Tensor, "patches dim"]:
        """Embeddings of patches of prepared images."""
        # an exported graph passes all, since their number depends on a batch that it does not know
        parts = [patches] if torch.compiler.is_exporting() else patches.split(self.patches_at_once)
        return torch.cat([self.patch_encoder(side)(self._features(side, part), 1).flatten(1) for part in parts])


MODES: Mapping[str, type[PyramidEncoder]] = {"dense": DenseEncoder, "sliding": SlidingEncoder}


def in_float32(embeddings: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Embeddings of each side at full precision: at a reduced one, distances would lose digits."""
    return {side: values.float() for side, values in embeddings.items()}


def tap_name(backbone: Backbone, side: int, taps: Mapping[int, str]) -> str:
    """The tap of a side: the caller's, or else the backbone's.

    Raises:
        PatchadError: if neither names one.
    """
    names = {**backbone.side_taps, **taps}
    if side not in names:
        raise PatchadError(
            f"no tap is known for side {side}; {backbone.title} has one for sides {', '.join(map(str, names))}: "
            f"set sides, or name one of {', '.join(backbone.taps)} in taps"
        )
    return names[side]


def default_stride(side: int, tap: Tap) -> int:
    """Distance in pixels between scored patches of a side: 8, but at most half a side, and what the tap allows.

    The paper scores sides 64, 32 and 16 every 16, 4 and 4 pixels (`paper.yaml`); at 8 there are 4 times fewer patches
    to search, and to fit into a bank (benchmarks/learned.md has what it costs).

    Example:
        >>> [default_stride(side, Tap(layer=3, stride=4, channels=24)) for side in (32, 20, 16, 8)]
        [8, 4, 8, 4]
    """
    most = max(tap.stride, min(8, side // 2))
    return max((stride for stride in range(tap.stride, most + 1, tap.stride) if side % stride == 0), default=tap.stride)


def check_sides(sides: Sequence[int]) -> None:
    """Raises PatchadError unless sides are one or more different positive numbers."""
    if not sides or len(set(sides)) < len(sides):
        raise PatchadError(f"sides {list(sides)} must be one or more different numbers of pixels")
    check_range({f"side number {number}": side for number, side in enumerate(sides)}, 1)


def check_stride(side: int, stride: int, grid: int) -> None:
    """Raises PatchadError unless the scoring stride is a multiple of the grid and divides the side; all in pixels."""
    check_range({f"scoring stride of side {side}": stride}, 1)
    if stride % grid or side % stride:
        raise PatchadError(
            f"scoring stride {stride} of side {side} must divide {side} and be a multiple of {grid} (in mode dense the "
            "stride of its tap); set scoring_strides, or another tap in taps"
        )
