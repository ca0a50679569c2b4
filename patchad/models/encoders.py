"""Feature maps -> embeddings of patches.

A `PatchEncoder` serves one side: it reads the feature map of one tap and gives one embedding per patch position. A
`PyramidEncoder` runs one backbone pass for all sides.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from patchad.models.backbones import Backbone, Tap
from patchad.pyramid import common_multiple, pad_to_multiple, positions
from patchad.types import PatchadError, Size


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


class PatchEncoder(nn.Module, ABC):
    """Embeddings of the patches of one side, from the feature map of one tap.

    Args:
        side: side of a patch in pixels.
        tap: where the feature map comes from.

    Raises:
        PatchadError: if the side is no multiple of the tap's stride.
    """

    standardize: Standardize | None = None
    """Set by encoders whose input is standardised over the training set."""

    def __init__(self, side: int, tap: Tap) -> None:
        super().__init__()
        if side % tap.stride:
            raise PatchadError(f"side {side} is no multiple of its tap's stride of {tap.stride} pixels")
        self.window = side // tap.stride

    @abstractmethod
    def forward(
        self, features: Float[Tensor, "batch channels rows columns"], step: int
    ) -> Float[Tensor, "batch dim new_rows new_columns"]:
        """One embedding per window of `self.window` x `self.window` cells, windows `step` cells apart."""


class WindowEncoder(PatchEncoder):
    """The training-free encoder: the mean of the tap's window, randomly projected.

    It is the paper's "without fine-tuning" row (supplement, table 2) in its simplest form. The projection is Gaussian
    with deviation `dim ** -0.5`, so that distances are kept on average (Johnson and Lindenstrauss).

    Args:
        side: side of a patch in pixels.
        tap: where the feature map comes from.
        cells: the window is kept as `cells` x `cells` means; 1 averages it whole.
        standardized: standardise each channel over the training set first.
        dim: numbers per embedding.
        seed: of the projection.

    Raises:
        PatchadError: if `cells` does not divide the window.

    Example:
        >>> encoder = WindowEncoder(side=64, tap=Tap(layer=29, stride=16, channels=512))
        >>> encoder(torch.zeros(1, 512, 16, 16), step=1).shape
        torch.Size([1, 64, 13, 13])
    """

    projection: Tensor

    def __init__(
        self, side: int, tap: Tap, cells: int = 1, standardized: bool = False, dim: int = 64, seed: int = 0
    ) -> None:
        super().__init__(side, tap)
        if cells < 1 or self.window % cells:
            raise PatchadError(f"cells {cells} does not divide the window of {self.window} cells of side {side}")
        self.cells = cells
        self.standardize = Standardize(tap.channels) if standardized else None
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(dim, tap.channels, cells, cells, generator=generator) * dim**-0.5
        self.register_buffer("projection", projection)

    def forward(
        self, features: Float[Tensor, "batch channels rows columns"], step: int
    ) -> Float[Tensor, "batch dim new_rows new_columns"]:
        """Projected means of the windows."""
        if self.standardize is not None:
            features = self.standardize(features)
        kernel = self.window // self.cells
        means = F.avg_pool2d(features, kernel, stride=1 if self.cells > 1 else step)
        stride, dilation = (step, kernel) if self.cells > 1 else (1, 1)
        return F.conv2d(means, self.projection, stride=stride, dilation=dilation)


EncoderFactory = Callable[[int, Tap], PatchEncoder]
"""Makes the encoder of a side (pixels) from its tap: a subclass of `PatchEncoder`, or a `partial` of it."""


class PyramidEncoder(nn.Module):
    """Embeddings at every scoring position of every side, from one backbone pass over the whole image.

    Args:
        backbone: image -> feature maps.
        encoder: makes the encoder of one side.
        sides: sides in pixels.
        taps: tap for each side; by default the backbone's own.
        scoring_strides: distance between scored patches for each side in pixels, a multiple of the tap's stride; by
            default the tap's stride, but at least 4 (so 16, 4, 4 for VGG16, as in the paper).

    Raises:
        PatchadError: if a tap is unknown or a stride does not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: EncoderFactory,
        sides: Sequence[int],
        taps: Mapping[int, str] | None = None,
        scoring_strides: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sides = tuple(sides)
        self.tap_names = {side: tap_name(backbone, side, taps or {}) for side in self.sides}
        self.taps = {side: backbone.tap(name) for side, name in self.tap_names.items()}
        chosen = scoring_strides or {}
        self.strides = {side: chosen.get(side, max(4, self.taps[side].stride)) for side in self.sides}
        for side in self.sides:
            check_stride(side, self.strides[side], self.taps[side].stride)
        self.encoders = nn.ModuleDict({str(side): encoder(side, self.taps[side]) for side in self.sides})
        self.multiple = common_multiple([*self.strides.values(), *(tap.stride for tap in self.taps.values())])

    def grid(self, size: Size, side: int) -> Size:
        """Rows x columns of scored positions of a side in an image of that size (height x width, pixels)."""
        padded = [length + -length % self.multiple for length in size]
        return positions((padded[0], padded[1]), side, self.strides[side])

    def features(self, image: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """The feature map of each side's tap, `[batch, channels, rows, columns]`."""
        maps = self.backbone(pad_to_multiple(image, self.multiple), set(self.tap_names.values()))
        return {side: maps[name] for side, name in self.tap_names.items()}

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """Embeddings of each side, `[batch, dim, rows, columns]`, rows x columns as in `grid`.

        Args:
            image: RGB in [0, 1].

        Raises:
            PatchadError: if a side does not fit the image.
        """
        for side in self.sides:
            self.grid((image.shape[-2], image.shape[-1]), side)
        features = self.features(image)
        steps = {side: self.strides[side] // self.taps[side].stride for side in self.sides}
        return {side: self.encoders[str(side)](features[side], steps[side]) for side in self.sides}

    @property
    def standardizers(self) -> dict[int, Standardize]:
        """The standardised sides."""
        found = {side: self.encoders[str(side)].standardize for side in self.sides}
        return {side: standardize for side, standardize in found.items() if isinstance(standardize, Standardize)}

    def observe(self, image: Float[Tensor, "batch 3 height width"]) -> None:
        """Lets the standardised sides take note of an image."""
        features = self.features(image)
        for side, standardize in self.standardizers.items():
            standardize.observe(features[side])


def tap_name(backbone: Backbone, side: int, taps: Mapping[int, str]) -> str:
    """The tap of a side: the caller's, or else the backbone's.

    Raises:
        PatchadError: if neither names one.
    """
    names = {**backbone.side_taps, **taps}
    if side not in names:
        raise PatchadError(f"no tap is known for side {side}; name one of {', '.join(backbone.taps)} in taps")
    return names[side]


def check_stride(side: int, stride: int, tap_stride: int) -> None:
    """Raises PatchadError unless the scoring stride is a multiple of the tap's stride and divides the side."""
    if stride % tap_stride or side % stride:
        raise PatchadError(
            f"scoring stride {stride} of side {side} must be a multiple of its tap's stride {tap_stride} "
            f"and divide {side}"
        )
