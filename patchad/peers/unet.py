"""A plain U-Net, and a Push network that reads a box off its lowest resolution."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 5
"""Resolutions of the U-Net, each half of the one before."""
LEAST_SIDE = 2**LEVELS
"""Pixels; the lowest resolution has at least two rows and columns then."""
CELLS = 4
"""Rows and columns in which the Push network sees the lowest resolution."""

FEW = -4.6
"""The logit of 0.01: as if few pixels had a defect. From 0 on, epochs would pass until that is learned (Lin et al.,
Focal loss, ICCV 2017)."""


class UNet(nn.Module):
    """An image of any size -> the logit of a defect at each pixel.

    Source: Ronneberger, Fischer, Brox, U-Net, MICCAI 2015; with padding and batch normalisation.

    Args:
        channels: of the image.
        width: channels of the highest resolution; each lower one has twice as many.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS)]
        self.encoders = nn.ModuleList(convolutions(*pair) for pair in pairwise([channels, *widths]))
        self.decoders = nn.ModuleList(convolutions(high + low, high) for high, low in pairwise(widths))
        self.last = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.last.bias, FEW)  # type: ignore[arg-type]

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch height width"]:
        """Logits."""
        return self.decode(self.encode(image))

    def encode(self, image: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Features of each resolution, the highest first."""
        features = [self.encoders[0](image)]
        for encoder in list(self.encoders)[1:]:
            features.append(encoder(F.max_pool2d(features[-1], 2)))
        return features

    def decode(self, features: Sequence[Float[Tensor, "batch _ _ _"]]) -> Float[Tensor, "batch height width"]:
        """Logits from the features of each resolution."""
        low = features[-1]
        for high, decoder in reversed(list(zip(features[:-1], self.decoders, strict=True))):
            enlarged = F.interpolate(low, size=high.shape[2:], mode="nearest")
            low = decoder(torch.cat([enlarged, high], dim=1))
        return self.last(low)[:, 0]


class Push(nn.Module):
    """Features of the lowest resolution, of any size -> a box, four numbers.

    Args:
        channels: of the features, and of both hidden layers.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels * CELLS**2, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, 4),
        )

    def forward(self, features: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch 4"]:
        """The box, from means of the cells; an adaptive pooling has no deterministic gradient on GPUs."""
        rows, columns = (-(-length // CELLS) for length in features.shape[2:])  # of a cell
        enlarged = F.interpolate(features, size=(CELLS * rows, CELLS * columns), mode="nearest")
        return self.layers(F.avg_pool2d(enlarged, (rows, columns)).flatten(1))


def deepest(width: int) -> int:
    """Channels of the lowest resolution of a U-Net of that width."""
    return width * 2 ** (LEVELS - 1)


def convolutions(before: int, after: int) -> nn.Sequential:
    """Two convolutions of 3 x 3 pixels, each normalised."""
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)
