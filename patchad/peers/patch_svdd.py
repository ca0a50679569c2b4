"""Patch SVDD: its encoders and its loss; `configs/patch_svdd.yaml` makes a `PatchDetector` of them.

Sources: Yi and Yoon, Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation, ACCV 2020
(https://arxiv.org/abs/2006.16067), and the code that its authors published
(https://github.com/nuclearboy95/Anomaly-Detection-PatchSVDD-PyTorch), here called theirs.
"""

import itertools
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from patchad.errors import PatchadError
from patchad.losses import PatchLoss, Scalar
from patchad.models.backbones import Backbone, Tap
from patchad.models.patches import PatchEncoder
from patchad.pyramid import cut_grid, pad_to_multiple
from patchad.types import PatchViews

BLOCK = 32
"""Side in pixels of what the smaller encoder reads."""
CHANNELS = (3, 32, 64, 128, 128, 64, 32, 32, 64)
"""Numbers per cell, from the colours of a block to its embedding; between each two of them lies a convolution."""


class BlockEncoder(nn.Sequential):
    """A map of one cell for each block of 32 x 32 pixels: blocks lie side by side, and each is encoded on its own.

    Eight convolutions of 3 x 3 cells without padding, of which the first has stride 2, bring a block to one cell:
    32 -> 15 -> 13 -> 11 -> 9 -> 7 -> 5 -> 3 -> 1. LeakyReLU (slope 0.1) lies between them, tanh behind. Source: the
    `EncoderDeep` of their code, which the paper calls f small.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for channels, more in itertools.pairwise(CHANNELS):
            layers += [nn.Conv2d(channels, more, 3, stride=1 if layers else 2), nn.LeakyReLU(0.1)]
        super().__init__(*layers[:-1], nn.Tanh())

    def forward(self, input: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 64 rows columns"]:
        """The embeddings of the blocks; an image that is no multiple of them is padded by its edge."""
        padded = pad_to_multiple(input, BLOCK)
        rows, columns = padded.shape[2] // BLOCK, padded.shape[3] // BLOCK
        cells = super().forward(cut_grid(padded, BLOCK, BLOCK)).flatten(1)
        return cells.unflatten(0, (input.shape[0], rows, columns)).permute(0, 3, 1, 2)


class Blocks(Backbone):
    """The smaller encoder of Patch SVDD as a backbone, so that all sides share it; it learns from nothing but images.

    Args:
        weights: `none` (random), or the path of a state_dict.
        trainable: `all`, or `none`.

    Example:
        >>> import torch
        >>> Blocks()(torch.zeros(1, 3, 64, 96), ["block"])["block"].shape
        torch.Size([1, 64, 2, 3])
    """

    taps: Mapping[str, Tap] = {"block": Tap(layer=0, stride=BLOCK, channels=CHANNELS[-1])}
    mean = (0.0, 0.0, 0.0)
    deviation = (1.0, 1.0, 1.0)

    def __init__(self, weights: str = "none", trainable: str = "all") -> None:
        super().__init__(weights, trainable)

    def build(self) -> nn.Sequential:
        """The encoder of blocks."""
        return nn.Sequential(BlockEncoder())

    def imagenet(self) -> Mapping[str, Tensor]:
        """Raises PatchadError: there are none."""
        raise PatchadError("Blocks has no ImageNet weights, for it learns from your images: give weights none")


class HierarchicalEncoder(PatchEncoder):
    """One block is its own embedding; 2 x 2 blocks are put together.

    Of 2 x 2 blocks, a convolution of 2 x 2 cells to 128 numbers, LeakyReLU (slope 0.1), and one of 1 x 1 cell back,
    with tanh behind it. Source: the `EncoderHier` of their code, which the paper calls f big.

    Args:
        side: side of a patch in pixels: that of one block or of two.
        tap: where the blocks come from.

    Raises:
        PatchadError: if the side is neither.

    Example:
        >>> import torch
        >>> encoder = HierarchicalEncoder(side=64, tap=Blocks.taps["block"])
        >>> encoder(torch.zeros(1, 64, 4, 4), step=1).shape
        torch.Size([1, 64, 3, 3])
    """

    def __init__(self, side: int, tap: Tap) -> None:
        super().__init__(side, tap, tap.channels)
        if self.window > 2:
            raise PatchadError(f"side {side} is more than two blocks of {tap.stride} pixels; give one or two in sides")
        joined = nn.Sequential(nn.Conv2d(self.dim, 128, 2), nn.LeakyReLU(0.1), nn.Conv2d(128, self.dim, 1), nn.Tanh())
        self.layers = joined if self.window == 2 else nn.Identity()

    def forward(
        self, features: Float[Tensor, "batch channels rows columns"], step: int
    ) -> Float[Tensor, "batch dim new_rows new_columns"]:
        """In (-1, 1)."""
        return self.layers(features)[:, :, ::step, ::step]


class SVDD(PatchLoss):
    """A patch and one beside it shall have the same embedding.

    `mean ||h1 - h2||`, the Euclidean distance and not its square, of anchor h1 and near h2, over patches. Source: the
    paper's L_SVDD', with the weight lambda of 1e-3 that the README of their code gives; their code takes the mean where
    the paper has a sum.

    Example:
        >>> import torch
        >>> h, near = torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> views = PatchViews(32, anchor=h, near=near, far=h, neighbour=h, direction=h, label=None, centroids=None)
        >>> SVDD()(views)
        tensor(3.)
    """

    def __init__(self, weight: float = 1e-3) -> None:
        super().__init__(weight)

    def forward(self, views: PatchViews) -> Scalar:
        """Euclidean distance; at most 16 for 64 numbers in [-1, 1]."""
        return (views.anchor - views.near).norm(dim=1).mean()
