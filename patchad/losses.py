"""The losses of the method, each on the embeddings of one side's patches.

A loss of your own is one class: a subclass of `PatchLoss` in your own file, named by class_path (docs/extend.md).
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from patchad.errors import PatchadError
from patchad.pyramid import DIRECTIONS
from patchad.spec import Configurable
from patchad.types import PatchViews

Scalar = Float[Tensor, ""]


class PatchLoss(Configurable, nn.Module, ABC):
    """A term of the training loss of one side; the detector makes a copy of its own for each side.

    Args:
        weight: factor of the term in the sum.

    Raises:
        PatchadError: if the weight is negative.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of `PatchViews` without which the term is left out (they may be None)."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if weight < 0:
            raise PatchadError(f"weight {weight} of {type(self).__name__} must not be negative")
        self.weight = weight

    @abstractmethod
    def forward(self, views: PatchViews) -> Scalar:
        """The unweighted term: the smaller, the better."""

    def watched(self, views: PatchViews) -> dict[str, Scalar]:
        """Figures to log beside the term; they change nothing."""
        return {}


class RelativeSimilarity(PatchLoss):
    """Near patches shall be alike, far ones less alike.

    `mean |h1 - h2| + mean(cos(h1, h3) - cos(h1, h2))` for anchor h1, near h2 and far h3; the first mean is taken over
    patches and dimensions. Source: Tsai et al., WACV 2022, relative feature similarity; weighted by 1e-3 there.

    Example:
        >>> h = torch.eye(2)
        >>> views = PatchViews(16, anchor=h, near=h, far=-h, neighbour=None, direction=h, label=None, centroids=None)
        >>> RelativeSimilarity()(views)
        tensor(-2.)
    """

    needs = ("far",)

    def __init__(self, weight: float = 1e-3) -> None:
        super().__init__(weight)

    def forward(self, views: PatchViews) -> Scalar:
        """Between -2 and 4 for embeddings in [-1, 1]."""
        assert views.far is not None
        apart = (views.anchor - views.near).abs().mean()
        likeness = F.cosine_similarity(views.anchor, views.far) - F.cosine_similarity(views.anchor, views.near)
        return apart + likeness.mean()


class Position(PatchLoss):
    """Which way the neighbour lies must be readable from the difference of two embeddings.

    Cross entropy of `C(h1 - h2)` against the direction, one of 12, for anchor h1 and neighbour h2; C has three fully
    connected layers, LeakyReLU after all but the last. Source: Tsai et al., WACV 2022, supplement, section 3; the
    refined self-supervision after Patch SVDD (Yi and Yoon, ACCV 2020).

    Args:
        weight: factor of the term in the sum.
        dim: numbers per embedding.
        hidden: width of the classifier.
    """

    needs = ("neighbour",)

    def __init__(self, weight: float = 1.0, dim: int = 64, hidden: int = 128) -> None:
        super().__init__(weight)
        self.classifier = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden, DIRECTIONS),
        )

    def logits(self, views: PatchViews) -> Float[Tensor, "patches 12"]:
        """Scores of the 12 directions."""
        assert views.neighbour is not None
        return self.classifier(views.anchor - views.neighbour)

    def forward(self, views: PatchViews) -> Scalar:
        """Cross entropy in nats; log 12 = 2.48 is chance."""
        return F.cross_entropy(self.logits(views), views.direction)

    @torch.no_grad()
    def watched(self, views: PatchViews) -> dict[str, Scalar]:
        """The share of directions told right; 1/12 is chance."""
        return {"position_accuracy": (self.logits(views).argmax(1) == views.direction).float().mean()}


class Clustering(PatchLoss):
    """Patches gather around the centroid of their pseudo-label.

    `mean (h - c)^2` over patches and dimensions, for the centroid c of the label of h, held fixed for an epoch; the
    gradient flows through h. Source: Tsai et al., WACV 2022 (whose published code detaches h, so that it learns
    nothing from it).

    Example:
        >>> h, c = torch.zeros(3, 4), torch.ones(2, 4)
        >>> label = torch.tensor([0, 1, 1])
        >>> views = PatchViews(16, anchor=h, near=h, far=h, neighbour=h, direction=label, label=label, centroids=c)
        >>> Clustering()(views)
        tensor(1.)
    """

    needs = ("label", "centroids")

    def __init__(self, weight: float = 1e-3) -> None:
        super().__init__(weight)

    def forward(self, views: PatchViews) -> Scalar:
        """Squared Euclidean distance per dimension."""
        assert views.label is not None and views.centroids is not None
        return (views.anchor - views.centroids[views.label]).square().mean()
