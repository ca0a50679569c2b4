"""Losses, each on the embeddings of one side's patches: the paper's three, and one of our own.

A loss of your own is one class: a subclass of `PatchLoss` in your own file, named by class_path (docs/extend.md).
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from patchad.errors import PatchadError, check_range
from patchad.spec import Configurable
from patchad.types import DIRECTIONS, PatchViews

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
        check_range({f"weight of {type(self).__name__}": weight}, 0)
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

    Cross entropy of `C(h1 - h2)` against the direction, one of 12 in the paper, for anchor h1 and neighbour h2; C has
    three fully connected layers, LeakyReLU after all but the last. Source: Tsai et al., WACV 2022, supplement, section
    3; the refined self-supervision after Patch SVDD (Yi and Yoon, ACCV 2020).

    Args:
        weight: factor of the term in the sum.
        dim: numbers per embedding.
        hidden: width of the classifier.
        directions: in which a neighbour may lie, as `Learning` has them.
    """

    needs = ("neighbour",)

    def __init__(self, weight: float = 1.0, dim: int = 64, hidden: int = 128, directions: int = DIRECTIONS) -> None:
        super().__init__(weight)
        self.directions = directions
        self.classifier = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden, directions),
        )

    def logits(self, views: PatchViews) -> Float[Tensor, "patches directions"]:
        """Scores of the directions."""
        assert views.neighbour is not None
        dim = self.classifier[0].in_features
        if views.anchor.shape[1] != dim:
            raise PatchadError(f"Position has dim {dim}, embeddings have {views.anchor.shape[1]}; give it theirs")
        return self.classifier(views.anchor - views.neighbour)

    def forward(self, views: PatchViews) -> Scalar:
        """Cross entropy in nats; the logarithm of the number of directions is chance, log 12 = 2.48."""
        return F.cross_entropy(self.logits(views), views.direction)

    @torch.no_grad()
    def watched(self, views: PatchViews) -> dict[str, Scalar]:
        """The share of directions told right; one in their number is chance."""
        return {"position_accuracy": (self.logits(views).argmax(1) == views.direction).float().mean()}


class Clustering(PatchLoss):
    """Patches gather around the centroid of their pseudo-label.

    `mean |h - c|^2` over patches, for the centroid c of the label of h, both held for an epoch; the gradient flows
    through h. Source: Tsai et al., WACV 2022 (whose published code detaches h, so that it learns nothing from it).

    Example:
        >>> h, c = torch.zeros(3, 4), torch.ones(2, 4)
        >>> label = torch.tensor([0, 1, 1])
        >>> views = PatchViews(16, anchor=h, near=h, far=h, neighbour=h, direction=label, label=label, centroids=c)
        >>> Clustering()(views)
        tensor(4.)
    """

    needs = ("label", "centroids")

    def __init__(self, weight: float = 1e-3) -> None:
        super().__init__(weight)

    def forward(self, views: PatchViews) -> Scalar:
        """Squared Euclidean distance."""
        assert views.label is not None and views.centroids is not None
        return (views.anchor - views.centroids[views.label]).square().sum(1).mean()


class Separation(PatchLoss):
    """Painted defects shall lie farther from what is normal than normal patches of unseen things do.

    The distance of a patch is that to the nearest normal patch of the batch, as the bank will measure it; for a normal
    patch only other things count, since a new image shows one that the bank does not know. Over all pairs of a normal
    distance n and a painted one p, `mean log(1 + exp((n - p) / unit))`, where the unit is half of the mean of n: a
    smooth form of the share of pairs in the wrong order, which is 1 - AUROC. It is not in the paper. Sources: the
    pairwise surrogate is that of Gao and Zhou (IJCAI 2015), painted defects are as in CutPaste (Li et al., CVPR 2021).

    Args:
        weight: factor of the term in the sum.
        least_share: share of a patch that a defect must cover for the patch to count as defective.
        most: patches that are compared, of each kind; more are thinned out evenly.

    Example:
        >>> normal, thing = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
        >>> fields = {"normal": normal, "thing": thing, "painted": torch.tensor([[9.0]]), "share": torch.ones(1)}
        >>> views = PatchViews(16, normal, normal, None, None, thing, label=None, centroids=None, **fields)
        >>> Separation()(views).item() < 1e-5  # it is log(1 + exp((1 - 8) / 0.5))
        True
    """

    needs = ("normal", "thing", "painted", "share")

    def __init__(self, weight: float = 1.0, least_share: float = 0.02, most: int = 1500) -> None:
        super().__init__(weight)
        check_range({"least_share": least_share}, 0, 1)
        check_range({"most": most}, 1)
        self.least_share, self.most = least_share, most

    def forward(self, views: PatchViews) -> Scalar:
        """Nats per pair; log 2 = 0.69 is chance, 0 where the batch holds nothing to compare."""
        assert views.normal is not None and views.thing is not None
        assert views.painted is not None and views.share is not None
        normal, thing = self._thinned(views.normal), self._thinned(views.thing)
        painted = self._thinned(views.painted[views.share >= self.least_share])
        if not len(painted) or (thing == thing[0]).all():
            return 0 * views.normal.mean()
        normal_distances = nearest_distance(normal, normal, thing[:, None] == thing)
        gaps = normal_distances[:, None] - nearest_distance(painted, normal)
        unit = 0.5 * normal_distances.mean().detach().clamp(min=1e-6)  # 0 where all normal patches are the same
        return F.softplus(gaps / unit).mean()

    def _thinned(self, values: Tensor) -> Tensor:
        return values[:: max(1, math.ceil(len(values) / self.most))]


def nearest_distance(
    queries: Float[Tensor, "queries dim"],
    vectors: Float[Tensor, "vectors dim"],
    excluded: Bool[Tensor, "queries vectors"] | None = None,
) -> Float[Tensor, " queries"]:
    """Euclidean distance from each query to the nearest vector that is not excluded, with gradients to both."""
    with torch.no_grad():
        distances = torch.cdist(queries, vectors)
        nearest = (distances if excluded is None else distances.masked_fill(excluded, torch.inf)).argmin(1)
    return (queries - vectors[nearest]).norm(dim=1)
