"""Feature maps -> embeddings of patches.

A `PatchEncoder` serves one side: it reads the feature map of one tap and gives one embedding per patch position. A
`PyramidEncoder` runs the backbone and the encoders of all sides, in one of two modes: `DenseEncoder` passes the whole
image through the backbone once, `SlidingEncoder` each patch on its own.
"""

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from patchad.canvas import Size
from patchad.errors import PatchadError
from patchad.models.backbones import Backbone, Tap, receptive_radius
from patchad.pyramid import (
    cut,
    cut_grid,
    cut_patches,
    pad_to_multiple,
    positions,
    round_up,
    spans,
    window_size,
)


class Standardize(nn.Module):
    """Each channel minus its mean, divided by its deviation, both over the training set; clamped at 6 deviations.

    Until `observe` has seen features and `finish` was called, it changes nothing.

    Args:
        channels: numbers per cell.
    """

    limit = 6.0
    mean: Tensor
    deviation: Tensor
    ready: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.register_buffer("ready", torch.tensor(False))
        self._moments = torch.zeros(3, channels, dtype=torch.float64)

    def observe(self, features: Float[Tensor, "batch channels rows columns"]) -> None:
        """Takes note of features."""
        flat = features.double().transpose(0, 1).flatten(1).cpu()
        count = torch.full_like(flat[:, 0], flat.shape[1])
        self._moments += torch.stack([count, flat.sum(1), flat.square().sum(1)])

    def finish(self, total: Callable[[Tensor], Tensor]) -> None:
        """Turns what was observed into mean and deviation.

        Args:
            total: sums a tensor over all processes.
        """
        count, first, second = total(self._moments)
        mean = first / count
        self.mean.copy_(mean)
        self.deviation.copy_((second / count - mean.square()).clamp(min=1e-12).sqrt())
        self.ready.fill_(True)
        self._moments = torch.zeros_like(self._moments)

    def forward(
        self, features: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Standardised features, in deviations."""
        standardized = (features - self.mean[:, None, None]) / self.deviation[:, None, None]
        return torch.where(self.ready, standardized.clamp(-self.limit, self.limit), features)


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
        self.mean = torch.empty_like(state_dict.get(f"{prefix}mean", self.mean), device=self.mean.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PatchEncoder(nn.Module, ABC):
    """Embeddings of the patches of one side, from the feature map of one tap.

    Args:
        side: side of a patch in pixels.
        tap: where the feature map comes from.
        dim: numbers per embedding.

    Raises:
        PatchadError: if the side is no multiple of the tap's stride.
    """

    standardize: Standardize | None
    """Set by encoders whose input is standardised over the training set."""

    def __init__(self, side: int, tap: Tap, dim: int = 64) -> None:
        super().__init__()
        self.standardize = None  # not on the class, where it would hide the submodule of a subclass
        check_side(side, tap)
        self.window, self.dim = side // tap.stride, dim

    @abstractmethod
    def forward(
        self, features: Float[Tensor, "batch channels rows columns"], step: int
    ) -> Float[Tensor, "batch dim new_rows new_columns"]:
        """One embedding per window of `self.window` x `self.window` cells, windows `step` cells apart."""


WIDEST = 128
"""Numbers that an embedding without learning has at most, unless it is asked for more."""


class WindowEncoder(PatchEncoder):
    """The training-free encoder: the mean of the tap's window.

    It is the paper's "without fine-tuning" row (supplement, table 2) in its simplest form. Where a projection makes it
    shorter, that is Gaussian with deviation `dim ** -0.5`, which keeps distances on average (Johnson and
    Lindenstrauss) and adds noise to each of them: all channels find more than 64 of them do (benchmarks/products.md).

    Args:
        side: side of a patch in pixels.
        tap: where the feature map comes from.
        cells: the window is kept as `cells` x `cells` means; 1 averages it whole.
        standardized: standardise each channel over the training set first.
        dim: numbers per embedding, randomly projected; None keeps the means as they are, up to `WIDEST` of them.
        seed: of the projection.

    Raises:
        PatchadError: if `cells` does not divide the window.

    Example:
        >>> encoder = WindowEncoder(side=64, tap=Tap(layer=29, stride=16, channels=512))
        >>> encoder(torch.zeros(1, 512, 16, 16), step=1).shape
        torch.Size([1, 128, 13, 13])
    """

    numbers = 1
    """What is kept of each channel of a window."""
    projection: Tensor | None

    def __init__(
        self, side: int, tap: Tap, cells: int = 1, standardized: bool = True, dim: int | None = None, seed: int = 0
    ) -> None:
        kept = self.numbers * tap.channels
        projected = dim is not None or cells > 1 or kept > WIDEST
        super().__init__(side, tap, dim or min(kept * cells**2, WIDEST))
        if cells < 1 or self.window % cells:
            raise PatchadError(f"cells {cells} does not divide the window of {self.window} cells of side {side}")
        self.cells = cells
        self.standardize = Standardize(tap.channels) if standardized else None
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(self.dim, kept, cells, cells, generator=generator) * self.dim**-0.5
        self.register_buffer("projection", projection if projected else None)

    def forward(
        self, features: Float[Tensor, "batch channels rows columns"], step: int
    ) -> Float[Tensor, "batch dim new_rows new_columns"]:
        """What is kept of the windows, projected where they are too long."""
        if self.standardize is not None:
            features = self.standardize(features)
        kernel = self.window // self.cells
        kept = self.pool(features, kernel, 1 if self.cells > 1 else step)
        if self.projection is None:
            return kept
        stride, dilation = (step, kernel) if self.cells > 1 else (1, 1)
        return F.conv2d(kept, self.projection, stride=stride, dilation=dilation)

    def pool(self, features: Float[Tensor, "batch channels rows columns"], kernel: int, step: int) -> Tensor:
        """What is kept of each window of `kernel` x `kernel` cells, windows `step` cells apart: the means."""
        return F.avg_pool2d(features, kernel, stride=step)


class TextureEncoder(WindowEncoder):
    """The training-free encoder for textures: mean and deviation of each channel of the tap's window, projected.

    A mean forgets how much a channel varies within the patch, which is what tells textures apart. Mean and deviation of
    filter responses are the texture features of Manjunath and Ma (Texture features for browsing and retrieval of image
    data, PAMI 1996). Channels are standardised over the training set, so that all deviations count alike.

    Args:
        side: side of a patch in pixels.
        tap: where the feature map comes from.
        cells: the window is kept as `cells` x `cells` means and deviations; 1 takes it whole.
        dim: numbers per embedding.
        seed: of the projection.

    Example:
        >>> encoder = TextureEncoder(side=64, tap=Tap(layer=29, stride=16, channels=512))
        >>> flat, stripes = torch.zeros(1, 512, 4, 4), torch.tensor([-1.0, 1.0]).repeat(1, 512, 4, 2)
        >>> bool((encoder(flat, step=1) - encoder(stripes, step=1)).norm() > 10)  # though their means are the same
        True
    """

    numbers = 2
    least_variance = 0.01
    """Added to each variance: the root would magnify the rounding of a patch where nothing varies."""

    def __init__(self, side: int, tap: Tap, cells: int = 1, dim: int = 64, seed: int = 0) -> None:
        super().__init__(side, tap, cells, True, dim, seed)

    def pool(self, features: Float[Tensor, "batch channels rows columns"], kernel: int, step: int) -> Tensor:
        """Means and deviations."""
        features = features.float()  # at reduced precision, the difference of squares would lose its digits
        mean, square = (F.avg_pool2d(one, kernel, stride=step) for one in (features, features.square()))
        return torch.cat([mean, ((square - mean.square()).clamp(min=0) + self.least_variance).sqrt()], dim=1)


Convolutions = tuple[tuple[int, int], ...]
"""Channels and kernel of each convolution of an encoder."""

PAPER_ENCODERS: Mapping[tuple[int, int], Convolutions] = {
    (512, 4): ((256, 2), (128, 2), (64, 2), (64, 1)),
    (256, 8): ((256, 3), (128, 3), (128, 2), (64, 2), (64, 2)),
    (128, 8): ((128, 3), (64, 3), (32, 3), (64, 2)),
}
"""The encoders of sides 64, 32 and 16 on VGG16 by channels and window of the tap (supplement, figure 2)."""


def convolutions(channels: int, window: int, dim: int) -> Convolutions:
    """The convolutions that bring a window of a tap to 1 x 1: the paper's where it names them for this tap.

    Otherwise 3 x 3 while the map side exceeds 3, then 2 x 2; channels are halved, but not below `dim`.

    Example:
        >>> convolutions(channels=112, window=4, dim=64)
        ((64, 3), (64, 2))
    """
    if (channels, window) in PAPER_ENCODERS and dim == 64:
        return PAPER_ENCODERS[channels, window]
    kernels = []
    while window > 1:
        kernels.append(3 if window > 3 else 2)
        window -= kernels[-1] - 1
    kernels = kernels or [1]
    widths = [max(dim, channels >> number) for number in range(1, len(kernels))] + [dim]
    return tuple(zip(widths, kernels, strict=True))


class LearnedEncoder(PatchEncoder):
    """The encoder of the paper: convolutions without padding over the tap's window, tanh at the end.

    LeakyReLU (slope 0.1) after all convolutions but the last. Its input is standardised per channel over the training
    set: on features as large as VGG16's, tanh saturates and the embeddings collapse. Source: Tsai et al., WACV 2022,
    supplement, figure 2.

    The paper's encoder forgets whatever its losses do not ask for. With `shortcut`, which is not in the paper, the
    training-free embedding of the same patch (see `WindowEncoder`) is added to what is learned, as in a residual
    network, so that learning adds to what the backbone already tells apart.

    Args:
        side: side of a patch in pixels.
        tap: where the feature map comes from.
        standardized: standardise each channel over the training set first.
        shortcut: add the training-free embedding, scaled so that its numbers are of the size of tanh's.
        dim: numbers per embedding.

    Example:
        >>> encoder = LearnedEncoder(side=32, tap=Tap(layer=15, stride=4, channels=256))
        >>> encoder(torch.zeros(1, 256, 24, 24), step=1).shape
        torch.Size([1, 64, 17, 17])
    """

    def __init__(self, side: int, tap: Tap, standardized: bool = True, shortcut: bool = True, dim: int = 64) -> None:
        super().__init__(side, tap, dim)
        self.standardize = Standardize(tap.channels) if standardized else None
        self.shortcut = WindowEncoder(side, tap, standardized=False, dim=dim) if shortcut else None
        self.shortcut_scale = (dim / tap.channels) ** 0.5  # standardised channels then give deviations of at most 1
        layers: list[nn.Module] = []
        channels = tap.channels
        for width, kernel in convolutions(tap.channels, self.window, dim):
            layers += [nn.Conv2d(channels, width, kernel), nn.LeakyReLU(0.1)]
            channels = width
        self.layers = nn.Sequential(*layers[:-1]).to(memory_format=torch.channels_last)

    def forward(
        self, features: Float[Tensor, "batch channels rows columns"], step: int
    ) -> Float[Tensor, "batch dim new_rows new_columns"]:
        """What was learned, in (-1, 1), and the shortcut."""
        if self.standardize is not None:
            features = self.standardize(features)
        last = self.layers[-1]
        assert isinstance(last, nn.Conv2d)
        hidden = self.layers[:-1](features.contiguous(memory_format=torch.channels_last))
        learned = F.conv2d(hidden, last.weight, last.bias, stride=step).tanh()  # only every step-th window
        return learned if self.shortcut is None else learned + self.shortcut_scale * self.shortcut(features, step)


EncoderFactory = Callable[[int, Tap], PatchEncoder]
"""Makes the encoder of a side (pixels) from its tap: a subclass of `PatchEncoder`, or a `partial` of it."""


class PyramidEncoder(nn.Module, ABC):
    """Embeddings of the patches of every side.

    Args:
        backbone: image -> feature maps.
        encoder: makes the encoder of one side.
        sides: sides in pixels.
        taps: tap for each side; by default the backbone's own.
        scoring_strides: distance between scored patches for each side in pixels, a multiple of the tap's stride; by
            default the largest up to 8 and half a side that divides the side, or else the tap's stride.
        subtract_mean_image: subtract the mean training image, as in the paper, instead of the backbone's normalisation.
        tile: a larger image (height or width in pixels) that is scored passes the backbone in tiles of that size; None
            never.

    Raises:
        PatchadError: if a tap is unknown, a stride does not fit, or no side reads a layer that is to be trained.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: EncoderFactory,
        sides: Sequence[int],
        taps: Mapping[int, str] | None = None,
        scoring_strides: Mapping[int, int] | None = None,
        subtract_mean_image: bool = False,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        if tile is not None and tile < 1:
            raise PatchadError(f"tile {tile} must be at least 1 pixel; null passes every image whole")
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
        for side in self.sides:
            check_stride(side, self.strides[side], self.taps[side].stride)
        self.encoders = nn.ModuleDict({str(side): encoder(side, self.taps[side]) for side in self.sides})
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

    def check_size(self, image: Float[Tensor, "batch 3 height width"]) -> None:
        """Raises PatchadError if a side does not fit the image."""
        for side in self.sides:
            self.grid((image.shape[-2], image.shape[-1]), side)

    @property
    def standardizers(self) -> dict[int, Standardize]:
        """The standardised sides."""
        found = {side: self.patch_encoder(side).standardize for side in self.sides}
        return {side: standardize for side, standardize in found.items() if standardize is not None}

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
        """The feature map of each side's tap, `[batch, channels, rows, columns]`."""
        return self._features(pad_to_multiple(self.prepare(image), self.multiple))

    observable = features

    def _features(self, prepared: Tensor) -> dict[int, Tensor]:
        maps = self.backbone(prepared, set(self.tap_names.values()))
        return {side: maps[name] for side, name in self.tap_names.items()}

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """Embeddings at every scoring position; a larger image than `tile` is embedded tile by tile."""
        self.check_size(image)
        prepared = pad_to_multiple(self.prepare(image), self.multiple)
        if self.tile is None or max(prepared.shape[2:]) <= self.tile:
            return self._embed(prepared)
        return self._embed_tiles(prepared, self.tile)

    def _embed(self, prepared: Tensor) -> dict[int, Tensor]:
        return self.embed_features(self._features(prepared))

    def embed_features(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Embeddings at every scoring position, `[batch, dim, rows, columns]` by side, from what `features` gave."""
        steps = {side: self.strides[side] // self.taps[side].stride for side in self.sides}
        return {side: self.patch_encoder(side)(features[side], steps[side]) for side in self.sides}

    def _embed_tiles(self, prepared: Tensor, tile: int) -> dict[int, Tensor]:
        size, found = (prepared.shape[2], prepared.shape[3]), {}
        rows, columns = (spans(length, round_up(tile, self.multiple), self.margin) for length in size)
        for row, column in itertools.product(rows, columns):
            part = prepared[:, :, row.outer_start : row.outer_stop, column.outer_start : column.outer_stop]
            for side, embeddings in self._embed(part).items():
                grid, stride = self.grid(size, side), self.strides[side]
                whole = found.setdefault(side, embeddings.new_empty(*embeddings.shape[:2], *grid))
                inner = whole[:, :, row.start // stride : row.stop // stride]
                inner = inner[:, :, :, column.start // stride : column.stop // stride]
                top, left = (row.start - row.outer_start) // stride, (column.start - column.outer_start) // stride
                inner.copy_(embeddings[:, :, top : top + inner.shape[2], left : left + inner.shape[3]])
        return found

    @functools.cached_property
    def margin(self) -> int:
        """Pixels around a tile that its patches see: the receptive field's radius and the widest side, on the grid.

        Raises:
            PatchadError: if there is no such margin, since a patch sees all of the image.
        """
        radius = receptive_radius(self.backbone, set(self.tap_names.values()))
        if radius is None:
            raise PatchadError(
                f"tile {self.tile} is smaller than the image, and {self.backbone.title} sees the whole image at once "
                "(attention, or squeeze-and-excitation): give --model.tile null, or a smaller data.image_size"
            )
        return round_up(radius + max(self.sides), self.multiple)

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
        padded, found = pad_to_multiple(self.prepare(image), self.multiple), {}
        for side, stride in self.strides.items():
            rows, columns = self.grid((image.shape[2], image.shape[3]), side)
            embeddings = self._encode(side, cut_grid(padded, side, stride))
            found[side] = embeddings.unflatten(0, (image.shape[0], rows, columns)).permute(0, 3, 1, 2)
        return found

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
        return self._encode(side, patches.flatten(0, 1)).unflatten(0, positions.shape[:2])

    def _features(self, side: int, patches: Float[Tensor, "patches 3 side side"]) -> Tensor:
        name = self.tap_names[side]
        return self.backbone(patches, [name])[name]

    def _encode(self, side: int, patches: Float[Tensor, "patches 3 side side"]) -> Float[Tensor, "patches dim"]:
        # an exported graph passes all, since their number depends on a batch that it does not know
        parts = [patches] if torch.compiler.is_exporting() else patches.split(self.patches_at_once)
        return torch.cat([self.patch_encoder(side)(self._features(side, part), 1).flatten(1) for part in parts])


MODES: Mapping[str, type[PyramidEncoder]] = {"dense": DenseEncoder, "sliding": SlidingEncoder}


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


def check_side(side: int, tap: Tap) -> None:
    """Raises PatchadError unless a side in pixels is a multiple of its tap's stride."""
    if side % tap.stride:
        nearest = max(1, round(side / tap.stride)) * tap.stride
        raise PatchadError(
            f"side {side} is no multiple of its tap's stride of {tap.stride} pixels; give {nearest} in sides, "
            "or another tap in taps"
        )


def default_stride(side: int, tap: Tap) -> int:
    """Distance in pixels between scored patches of a side: 8, but at most half a side, and what the tap allows.

    The paper scores sides 64, 32 and 16 every 16, 4 and 4 pixels (`paper.yaml`); at 8 there are 4 times fewer patches
    to search, and to fit into a bank (benchmarks/learned.md has what it costs).

    Example:
        >>> [default_stride(side, Tap(layer=3, stride=4, channels=24)) for side in (32, 20, 16, 8)]
        [8, 4, 8, 4]
    """
    most = max(tap.stride, min(8, side // 2))
    return max((one for one in range(tap.stride, most + 1, tap.stride) if side % one == 0), default=tap.stride)


def check_stride(side: int, stride: int, tap_stride: int) -> None:
    """Raises PatchadError unless the scoring stride is a multiple of the tap's stride and divides the side."""
    if stride % tap_stride or side % stride:
        raise PatchadError(
            f"scoring stride {stride} of side {side} must be a multiple of its tap's stride {tap_stride} "
            f"and divide {side}; set scoring_strides, or another tap in taps"
        )
