"""What is learned and how: patches of training views -> losses, with pseudo-labels that K-means reassigns."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from patchad.canvas import Size
from patchad.clustering import PseudoLabels, churn
from patchad.errors import PatchadError, check_range, check_seed
from patchad.losses import Clustering, PatchLoss, Position, RelativeSimilarity
from patchad.model import check_finite
from patchad.models.cache import FeatureCache
from patchad.models.encoders import PyramidEncoder, SlidingEncoder
from patchad.models.features import CachedFeatures, Features, ResidentImages
from patchad.pyramid import covered, fits_pyramids, window_size
from patchad.types import DIRECTIONS, PatchViews, PyramidBatch, PyramidPlan, given

COMPARED = ("normal", "thing", "painted", "share")
"""What a loss may need of patches with and without painted defects."""
COLLAPSED = 0.01
"""Deviation of embeddings, whose numbers are of the order of 1, below which they tell no patch from another."""


class Learning(nn.Module):
    """Trains the encoders of a `PatchModel` on pyramids of patches.

    Source: Tsai, Wu, Lai, Multi-Scale Patch-Based Representation Learning for Image Anomaly Detection and Segmentation,
    WACV 2022.

    Args:
        encoder: what is trained.
        losses: terms of the loss of each side; None are the paper's: position, similarity and clustering, weighted 1,
            1e-3 and 1e-3.
        clusters: pseudo-labels of each side.
        warmup: share of the epochs that pass before there are pseudo-labels.
        learning_rate: of Adam.
        cache: keeps the features of a frozen backbone on disk, in dense mode; None computes them in each step.
        compiled: make a step one graph by torch.compile: for GPUs, where Python starts kernels slower than they run.
        directions: in which a neighbour may lie; 12 in the paper.
        seed: of the first centroids.

    Attributes:
        features: what encoders read of training views, computed, cached or at hand.
        held: the encoder as it was when labels were last reassigned, which gives the pseudo-labels until the next time.
        labelled: whether there are pseudo-labels.
        paints: whether a loss compares patches with and without painted defects.
        probe_batches: the patches that clusters are fitted on.
        probe_labels: the pseudo-labels of these, by side.

    Raises:
        PatchadError: if a loss needs what there never is or tells other directions, or the encoder has no features to
            cache.
    """

    def __init__(
        self,
        encoder: PyramidEncoder,
        losses: Sequence[PatchLoss] | None = None,
        clusters: int = 50,
        warmup: float = 0.1,
        learning_rate: float = 3e-4,
        cache: FeatureCache | None = None,
        compiled: bool = False,
        directions: int = DIRECTIONS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range({"clusters": clusters}, 1)
        check_range({"directions": directions}, 2)
        check_range({"warmup": warmup, "learning_rate": learning_rate}, 0, 1)
        check_seed(seed)
        terms = (Position(directions=directions), RelativeSimilarity(), Clustering()) if losses is None else losses
        check_losses(terms)
        check_directions(terms, directions)
        self.warmup, self.learning_rate, self.directions = warmup, learning_rate, directions
        self.compiled = compiled
        self.losses = nn.ModuleDict({str(side): nn.ModuleList(map(copy.deepcopy, terms)) for side in encoder.sides})
        dims = {side: encoder.patch_encoder(side).dim for side in encoder.sides}
        self.pseudo_labels = nn.ModuleDict({str(side): PseudoLabels(clusters, dim, seed) for side, dim in dims.items()})
        self.paints = not {name for loss in terms for name in loss.needs}.isdisjoint(COMPARED)
        self.paired = dict.fromkeys(encoder.sides, True)  # whether neighbours and far patches fit the images
        if cache is not None:
            self.features = CachedFeatures(encoder, cache)
        elif isinstance(encoder, SlidingEncoder) and not self.paints:
            self.features = ResidentImages(encoder)
        else:
            self.features = Features(encoder)
        self.held = copy.deepcopy(encoder).requires_grad_(False)
        self.forget()

    def forget(self) -> None:
        """Before another fit, which has images of its own."""
        self.probe_batches: list[PyramidBatch] = []
        self.probe_labels: dict[int, Tensor] = {}
        self.labelled = any(bool(self._clusters(side).ready) for side in self.encoder.sides)

    @property
    def encoder(self) -> PyramidEncoder:
        """What is trained; the model holds it."""
        return self.features.encoder

    @property
    def plan(self) -> PyramidPlan:
        """What the datamodule must know to draw the pyramids."""
        features = self.features
        return PyramidPlan(self.encoder.grids, features.views, features.resident, self.paints, self.directions)

    def prepare(self, size: Size, batch_size: int) -> None:
        """Switches off losses that do not fit the images, and says so; warns where a batch is too small for one.

        Args:
            size: height x width of the images in pixels.
            batch_size: images per batch.
        """
        for side, grid in self.encoder.grids.items():
            self.paired[side] = fits_pyramids(window_size(size, side, grid), side)
            if not self.paired[side]:
                self._switch_off_pairs(side, size)
        comparing = {type(loss).__name__ for loss in self._losses(self.encoder.sides[0]) if "thing" in loss.needs}
        if comparing and batch_size == 1:
            rank_zero_warn(
                f"data.batch_size 1 leaves {', '.join(sorted(comparing))} nothing to learn from: patches of different "
                "images are compared; give 2 or more"
            )

    def _switch_off_pairs(self, side: int, size: Size) -> None:
        for loss in self._losses(side):  # DistributedDataParallel waits for every parameter that is trainable
            loss.requires_grad_(not {"far", "neighbour"}.intersection(loss.needs))
        rank_zero_info(
            f"side {side}: neighbours and far patches do not fit images of {size[0]} x {size[1]} pixels "
            f"(height x width), so losses that need them are off; they need image_size of at least {2 * side}"
        )

    # pseudo-labels

    @torch.no_grad()
    def reassign_pseudo_labels(
        self, batches: Iterable[PyramidBatch], broadcast: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Refits the centroids of each side on the probe patches; centroids and labels are held until the next call.

        A patch keeps the label that the encoder gives it now, whenever in the epoch it is drawn: a copy of the encoder
        stays as it is.

        Args:
            batches: the probe patches, the same each time, on the device of the encoders.
            broadcast: gives every process the centroids of the first.

        Returns:
            What is to be watched: the sizes of the smallest and the largest cluster, and how many labels changed.
        """
        watched = {}
        self.held.load_state_dict(self.encoder.state_dict())
        self.labelled = True
        for side, embeddings in self._probe(batches).items():
            clusters = self._clusters(side)
            clusters.refit(embeddings)
            clusters.centroids.copy_(broadcast(clusters.centroids))
            labels = clusters(embeddings)
            sizes = torch.bincount(labels, minlength=len(clusters.centroids)).float()
            watched |= {f"smallest_cluster_side_{side}": sizes.min(), f"largest_cluster_side_{side}": sizes.max()}
            if side in self.probe_labels:
                watched[f"label_churn_side_{side}"] = torch.tensor(churn(self.probe_labels[side], labels))
            self.probe_labels[side] = labels
        return watched

    def _probe(self, batches: Iterable[PyramidBatch]) -> dict[int, Tensor]:
        training, parts = self.encoder.training, {side: [] for side in self.encoder.sides}
        self.encoder.eval()
        for number, batch in enumerate(batches):
            for side, embeddings in self.features.anchors(self.features.read(batch, (number,)), batch).items():
                parts[side].append(embeddings.flatten(0, 1))
        self.encoder.train(training)
        embeddings = {side: torch.cat(values) for side, values in parts.items()}
        check_finite(embeddings)
        return embeddings

    # losses

    def patch_views(self, read: Any, batch: PyramidBatch) -> Iterator[PatchViews]:
        """The embeddings of each side's patches.

        Args:
            read: what `features.read` gave of the batch.
            batch: images and patches.
        """
        compared = self._compared(batch) if self.paints else {}
        for embedded in self.features.embedded_pyramids(read, batch, self.held if self.labelled else None):
            side, held = embedded.side, embedded.held
            clusters = self._clusters(side)
            yield PatchViews(
                side=side,
                anchor=embedded.anchor.flatten(0, 1),
                near=embedded.near.flatten(0, 1),
                far=embedded.far.flatten(0, 1) if self.paired[side] else None,
                neighbour=embedded.neighbour.flatten(0, 1) if self.paired[side] else None,
                direction=batch.sides[side].direction.flatten(),
                label=None if held is None else clusters(held.flatten(0, 1)),
                centroids=None if held is None else clusters.centroids,
                **compared.get(side, {}),
            )

    def train(self, mode: bool = True) -> "Learning":
        """Sets the mode of all but the encoder that is held."""
        super().train(mode)
        self.held.eval()
        return self

    def _compared(self, batch: PyramidBatch) -> dict[int, dict[str, Tensor]]:
        """Of each side, the normal patches of the first view and those that a painted defect touches."""
        normal, painted = (self.features.embedded(batch, painted) for painted in (False, True))
        mask, compared = self.features.masks(batch), {}
        for side, values in normal.items():
            grid = (values.shape[2], values.shape[3])
            counted = self.encoder.counted(batch.content, values, side, given(batch.region))
            share = covered(mask, grid, side, self.encoder.strides[side])
            touched = counted & (share > 0)
            compared[side] = {
                "normal": values.permute(0, 2, 3, 1)[counted],
                "thing": batch.thing[:, None, None].expand(-1, *grid)[counted],
                "painted": painted[side].permute(0, 2, 3, 1)[touched],
                "share": share[touched],
            }
        return compared

    def loss_terms(self, views: PatchViews) -> dict[str, Tensor]:
        """The weighted terms of one side by name, to be summed.

        Args:
            views: embeddings of one side's patches.
        """
        return {type(loss).__name__.lower(): loss.weight * loss(views) for loss in self._losses_on(views)}

    def watched(self, views: PatchViews) -> dict[str, Tensor]:
        """What is watched of a step of one side beside its terms: the deviation of embeddings, and what losses name."""
        watched = {"deviation": views.anchor.detach().std(dim=0).mean()}
        for loss in self._losses_on(views):
            watched |= loss.watched(views)
        return watched

    def warn_of_collapse(self, means: Mapping[str, Tensor]) -> None:
        """Says in words where the means of an epoch show that embeddings have collapsed."""
        for side in self.encoder.sides:
            deviation = means.get(f"train/deviation_side_{side}")
            if deviation is not None and not deviation >= COLLAPSED:  # nan is not, either
                rank_zero_warn(
                    f"the embeddings of side {side} have collapsed: their deviation is {float(deviation):.2g}, so "
                    "every patch looks alike; lower the learning rate, or the weights of similarity and clustering"
                )

    def in_warmup(self, epoch: int, epochs: int) -> bool:
        """Whether there are no pseudo-labels yet."""
        return self.warmup == 1 or epoch < math.ceil(self.warmup * max(epochs, 0))

    def _clusters(self, side: int) -> PseudoLabels:
        clusters = self.pseudo_labels[str(side)]
        assert isinstance(clusters, PseudoLabels)
        return clusters

    def _losses(self, side: int) -> list[PatchLoss]:
        return [loss for loss in self.losses[str(side)].children() if isinstance(loss, PatchLoss)]

    def _losses_on(self, views: PatchViews) -> list[PatchLoss]:
        """The losses of a side that find all they need."""
        fields = {name for name, value in views._asdict().items() if value is not None}
        return [loss for loss in self._losses(views.side) if fields.issuperset(loss.needs)]


LearningFactory = Callable[[PyramidEncoder], Learning]
"""Makes the learning of an encoder: `Learning`, a subclass, or a `partial` of one."""


def check_losses(losses: Sequence[PatchLoss]) -> None:
    """Raises PatchadError if a loss needs what there never is, or two would be logged under one name."""
    for loss in losses:
        if not isinstance(loss.needs, tuple) or not set(loss.needs) <= set(PatchViews._fields):
            raise PatchadError(
                f"needs of {type(loss).__name__} is {loss.needs!r}; it must be a tuple of the names "
                f"{', '.join(PatchViews._fields)}"
            )
    names = [type(loss).__name__ for loss in losses]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise PatchadError(f"losses holds {', '.join(sorted(repeated))} more than once; subclass it to tell them apart")


def check_directions(losses: Sequence[PatchLoss], directions: int) -> None:
    """Raises PatchadError if neighbours lie in another number of directions than `Position` tells apart."""
    for loss in losses:
        if isinstance(loss, Position) and loss.directions != directions:
            raise PatchadError(
                f"Position tells {loss.directions} directions apart, neighbours lie in {directions}; give its "
                "directions and model.learning.directions the same number"
            )
