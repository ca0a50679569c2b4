"""The feature map of one tap -> embeddings of the patches of one side."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from patchad.errors import PatchadError, check_range
from patchad.models.backbones import Tap


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
        check_range({"dim": dim}, 1)
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
        super().__init__(side, tap, min(kept * cells**2, WIDEST) if dim is None else dim)
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
        mean, square = (F.avg_pool2d(values, kernel, stride=step) for values in (features, features.square()))
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


PatchEncoderFactory = Callable[[int, Tap], PatchEncoder]
"""Makes the encoder of a side (pixels) from its tap: a subclass of `PatchEncoder`, or a `partial` of it."""


def check_side(side: int, tap: Tap) -> None:
    """Raises PatchadError unless a side in pixels is a multiple of its tap's stride."""
    if side % tap.stride:
        nearest = max(1, round(side / tap.stride)) * tap.stride
        raise PatchadError(
            f"side {side} is no multiple of its tap's stride of {tap.stride} pixels; give {nearest} in sides, "
            "or another tap in taps"
        )
