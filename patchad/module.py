"""The method, in the order in which it happens. The file to read first."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from rich.progress import track
from torch import Tensor, nn
from torchmetrics import MeanMetric

from patchad.canvas import Size
from patchad.clustering import PseudoLabels, churn
from patchad.detector import Detector
from patchad.errors import PatchadError
from patchad.losses import PatchLoss
from patchad.memory import MemoryBank, Reduction
from patchad.models.backbones import Backbone, EfficientNetLite0
from patchad.models.cache import FeatureCache
from patchad.models.encoders import MODES, DenseEncoder, EncoderFactory, WindowEncoder
from patchad.pyramid import at_pixels, covered, fits_pyramids, fold, inside, mirror, positions, window_size
from patchad.scoring import Scorer
from patchad.spec import hyperparameters, spec
from patchad.types import ImageBatch, PatchViews, Prediction, PyramidBatch, PyramidPlan, painted_view

COMPARED = ("normal", "thing", "painted", "share")
"""What a loss may need of patches with and without painted defects."""
COLLAPSED = 0.01
"""Deviation of embeddings, whose numbers are of the order of 1, below which they tell no patch from another."""
MIRRORS = {"left to right": (2,), "top to bottom": (1,), "both": (1, 2)}
"""The axes along which an image `[3, height, width]` is reversed."""
LEAST_SCALE = 1e-4
"""Mean distance of normal images over the spread of the bank's vectors, below which it is rounding or nothing."""


class Distances(NamedTuple):
    """Distances of the patches of a batch to the nearest normal patch, per side `[batch, rows, columns]`."""

    sides: dict[int, Tensor]
    content: Tensor
    height: int
    width: int

    def each(self) -> Iterator["Distances"]:
        """Those of each image on its own, as a batch of one."""
        for number in range(len(self.content)):
            sides = {side: values[number, None] for side, values in self.sides.items()}
            yield self._replace(sides=sides, content=self.content[number, None])


class PatchDetector(Detector):
    """Learns to embed patches of three sides, remembers the normal ones, and scores images by the distance to them.

    In `fit`, encoders are trained on pyramids of patches, with pseudo-labels that K-means reassigns each epoch. Before
    each validation the memory bank is filled with the normal images, and scales and threshold are set from the same
    images, each compared with the others. All of these are buffers: a checkpoint alone tests and predicts.

    Source: Tsai, Wu, Lai, Multi-Scale Patch-Based Representation Learning for Image Anomaly Detection and Segmentation,
    WACV 2022.

    Args:
        backbone: image -> feature maps; None is `EfficientNetLite0`.
        encoder: makes the encoder of one side: a subclass of `PatchEncoder`, or a `functools.partial` of one; None is
            `WindowEncoder`, which learns nothing.
        losses: terms of the loss of each side, which an encoder that learns needs; in the paper position, similarity
            and clustering, weighted 1, 1e-3 and 1e-3, which are their defaults.
        mode: `dense` passes each image through the backbone once, `sliding` each patch on its own, as in the paper.
        sides: sides of the patches in pixels.
        taps: name of the backbone's layer for each side; by default the backbone's own choice.
        scoring_strides: distance between scored patches for each side in pixels.
        subtract_mean_image: subtract the mean training image, as in the paper, instead of the backbone's normalisation.
        tile: a larger image (height or width in pixels) that is scored passes the backbone in tiles of that size, in
            dense mode, so that memory stays bounded; the result is the same. None passes every image whole. Training
            takes whole images: there a smaller `data.batch_size` saves memory.
        baseline: how far normal patches of unseen things are to be expected around the nearest normal patch is known
            (`MemoryBank.levels`); this share of its square is subtracted from the squared distance. Not in the paper; 0
            leaves it out.
        context: weight of the mean embedding of the whole image, which is appended to each patch's: the nearest normal
            patch then comes from an image that looks like this one, in its light, its texture, its product. It is not
            in the paper; 0 leaves it out.
        clusters: pseudo-labels of each side.
        warmup: share of the epochs that pass before there are pseudo-labels.
        learning_rate: of Adam.
        cache: keeps the features of a frozen backbone on disk, in dense mode; None computes them in each step.
        max_vectors: most vectors that the bank of each side keeps; None keeps all.
        reduce: how the bank chooses them: `kmeans`, `kcenter` or `random`; see `MemoryBank`.
        mirrored: where the banks have room for as much again, mirrored normal images fill them, too, if most of those
            pass as normal: that asks whether the product looks alike in a mirror. Not in the paper.
        scorer: combines the maps and holds the threshold.
        seed: of the vectors that the bank keeps, and of the first centroids.

    Raises:
        PatchadError: if sides, taps and strides do not fit each other, or the mode fits neither name nor cache.

    Example:
        >>> PatchDetector().encoder.strides
        {64: 16, 32: 16, 16: 8}
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        encoder: EncoderFactory | None = None,
        losses: Sequence[PatchLoss] = (),
        mode: Literal["dense", "sliding"] = "dense",
        sides: tuple[int, ...] = (64, 32, 16),
        taps: dict[int, str] | None = None,
        scoring_strides: dict[int, int] | None = None,
        subtract_mean_image: bool = False,
        tile: int | None = 1024,
        baseline: float = 0.5,
        context: float = 0.0,
        clusters: int = 50,
        warmup: float = 0.1,
        learning_rate: float = 3e-4,
        cache: FeatureCache | None = None,
        max_vectors: int | None = 400_000,
        reduce: Reduction = "random",
        mirrored: bool = True,
        scorer: Scorer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        backbone = backbone or EfficientNetLite0()
        self.save_hyperparameters({**hyperparameters(self), "backbone": spec(backbone)})
        self.encoder = MODES[mode](
            backbone, encoder or WindowEncoder, sides, taps, scoring_strides, subtract_mean_image, tile
        )
        if cache is not None and not isinstance(self.encoder, DenseEncoder):
            raise PatchadError(f"mode {mode} has no features to cache; set model.cache to null")
        check_losses(losses)
        if context < 0:
            raise PatchadError(f"context {context} must not be negative; 0 compares patches alone")
        self.context = context
        self.losses = nn.ModuleDict({str(side): nn.ModuleList(map(copy.deepcopy, losses)) for side in sides})
        dims = {side: self.encoder.patch_encoder(side).dim for side in sides}
        self.pseudo_labels = nn.ModuleDict({str(side): PseudoLabels(clusters, dims[side], seed) for side in sides})
        self.banks = nn.ModuleDict({str(side): MemoryBank(side, max_vectors, reduce, seed, baseline) for side in sides})
        self.scorer, self.measured_sides = (scorer or Scorer()).prepare(sides), self.encoder.sides
        self.warmup, self.learning_rate, self.cache, self.mirrored = warmup, learning_rate, cache, mirrored
        # The loss starts from it, so that there is one where every term is off or nothing is to be learned.
        self.placeholder = nn.Parameter(torch.zeros(()))
        self.probe_batches: list[PyramidBatch] = []  # the patches that clusters are fitted on, and their labels
        self.probe_labels: dict[int, Tensor] = {}
        self._watched: dict[str, MeanMetric] = {}  # means over an epoch, by the name that they are logged under

    def setup(self, stage: str) -> None:
        """Also switches off losses that do not fit the images.

        Raises:
            PatchadError: if device or precision cannot hold the figures, or a side does not fit the images.
        """
        super().setup(stage)
        if stage == "fit":
            for side, grid in self.encoder.grids.items():
                positions(window_size(self._data.image_size, side, grid), side, grid)  # or an error that says so
            self._tell_padding(self._data.image_size)
        if stage == "fit" and self.learns:
            self._switch_off_what_does_not_fit()
            self._warn_of_single_images()
        elif stage == "fit":
            self.losses.requires_grad_(False)  # DistributedDataParallel waits for every parameter that is trainable
            self._warn_of_idle_losses()

    def _warn_of_idle_losses(self) -> None:
        names = [type(loss).__name__ for loss in self._losses(self.encoder.sides[0])]
        if names:
            encoder = type(self.encoder.patch_encoder(self.encoder.sides[0])).__name__
            rank_zero_warn(f"losses {', '.join(names)} train nothing: {encoder} does not learn; give --config learned")

    def _tell_padding(self, size: Size) -> None:
        padded = self.encoder.padded(size)
        if padded != tuple(size):
            rank_zero_info(
                f"images of {size[0]} x {size[1]} pixels (height x width) are padded to {padded[0]} x {padded[1]} by "
                f"their edge: strides of backbone and patches divide multiples of {self.encoder.multiple}"
            )

    # from images to predictions

    def distances(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
    ) -> Distances:
        """How far each patch is from the nearest normal one.

        Args:
            image: RGB in [0, 1].
            content: height x width of each image's content, top left, in pixels.
            thing: number of what each image shows, which its patches are not compared with.
        """
        return self.nearest(self.embed(image, content), content, (image.shape[2], image.shape[3]), thing)

    def embed(
        self, image: Float[Tensor, "batch 3 height width"], content: Int[Tensor, "batch 2"]
    ) -> dict[int, Float[Tensor, "batch dim rows columns"]]:
        """What the bank keeps and searches: the embedding of each patch and, weighted, the mean over its image.

        Args:
            image: RGB in [0, 1].
            content: height x width of each image's content, top left, in pixels.
        """
        # at reduced precision, distances would lose digits
        embeddings = {side: values.float() for side, values in self.encoder(image).items()}
        if not self.context:
            return embeddings
        return {
            side: torch.cat([values, self.context * self._mean(values, content, side).expand_as(values)], dim=1)
            for side, values in embeddings.items()
        }

    def _mean(self, values: Tensor, content: Tensor, side: int) -> Tensor:
        counted = self.counted(content, values, side)[:, None]
        return (values * counted).sum((2, 3), keepdim=True) / counted.sum((2, 3), keepdim=True)

    def nearest(
        self,
        embeddings: Mapping[int, Tensor],
        content: Int[Tensor, "batch 2"],
        size: Size,
        thing: Int[Tensor, " batch"] | None = None,
    ) -> Distances:
        """How far embeddings are from the nearest normal ones: one search per side.

        Args:
            embeddings: of each side, `[batch, dim, rows, columns]`, as `embed` gives them.
            content: height x width of each image's content, top left, in pixels.
            size: height x width of the images in pixels.
            thing: number of what each image shows, which its patches are not compared with.
        """
        found = {}
        for side, values in embeddings.items():
            queries = values.flatten(2).transpose(1, 2)
            shared = self.encoder.patch_encoder(side).dim if self.context else 0
            found[side] = self.bank(side).distances(queries, shared, thing).unflatten(1, values.shape[2:])
        return Distances(found, content, *size)

    def counted(self, content: Int[Tensor, "batch 2"], values: Tensor, side: int) -> Bool[Tensor, "batch rows columns"]:
        """Which patches of a side, one for each of the last two axes of `values`, lie on the content."""
        grid = (values.shape[-2], values.shape[-1])
        return inside(content, grid, side, self.encoder.strides[side])

    def bank(self, side: int) -> MemoryBank:
        """The normal patches of one side (pixels)."""
        bank = self.banks[str(side)]
        assert isinstance(bank, MemoryBank)
        return bank

    @property
    def cell(self) -> int:
        """Height and width in pixels of what has one value in the map of every side."""
        return math.gcd(*self.encoder.strides.values())

    def side_maps(self, distances: Distances) -> dict[int, Float[Tensor, "batch rows columns"]]:
        """The anomaly map of each side, one value for each `cell` of the image."""
        rows, columns = -(-distances.height // self.cell), -(-distances.width // self.cell)
        maps = {}
        for side, values in distances.sides.items():
            counted = self.counted(distances.content, values, side)
            maps[side] = fold(values, counted, side, self.encoder.strides[side], self.cell)[:, :rows, :columns]
        return maps

    def score(self, distances: Distances) -> Prediction:
        """Maps, scores and verdicts from distances."""
        return self.score_maps(self.side_maps(distances), distances)

    def score_maps(self, maps: dict[int, Float[Tensor, "batch rows columns"]], distances: Distances) -> Prediction:
        """The combined map, scores and verdicts from the maps of the sides, and the distances that these are of."""
        combined, content, size = self.scorer.combine(maps), distances.content, (distances.height, distances.width)
        scores = self.scorer.score(combined, content, self.cell)
        shown = at_pixels(self.scorer.show(maps, content, self.cell), 1, size)
        pixels = {side: at_pixels(one, self.cell, size) for side, one in maps.items()}
        return Prediction(scores, scores > self.scorer.threshold, shown, self.side_scores(maps, content), pixels)

    def side_scores(
        self, maps: Mapping[int, Float[Tensor, "batch rows columns"]], content: Int[Tensor, "batch 2"]
    ) -> dict[int, Float[Tensor, " batch"]]:
        """The score of each side alone, from its map."""
        return {side: self.scorer.score(side_map, content, self.cell) for side, side_map in maps.items()}

    def detect(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
    ) -> Prediction:
        """Maps, scores and verdicts of images."""
        return self.score(self.distances(image, content, thing))

    # learning

    @property
    def learns(self) -> bool:
        """Whether an encoder or the backbone has anything to train."""
        return any(parameter.requires_grad for parameter in self.encoder.parameters())

    @property
    def pyramid_plan(self) -> PyramidPlan:
        """What the datamodule must know to draw the pyramids."""
        return PyramidPlan(self.encoder.grids, self.cache.views if self.cache and self.learns else 0, self._paints)

    @property
    def _paints(self) -> bool:
        needed = {name for side in self.encoder.sides for loss in self._losses(side) for name in loss.needs}
        return self.learns and not needed.isdisjoint(COMPARED)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over all that is trainable."""
        return torch.optim.Adam((one for one in self.parameters() if one.requires_grad), lr=self.learning_rate)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Measures the mean image, caches features, and measures the encoders' input, where these are asked for.

        Before that, images that are not learned from are read: one that cannot be read ends a fit now, not later.
        """
        super().on_fit_start()
        self.probe_batches, self.probe_labels = [], {}
        for _ in track(self._data.held_out_dataloader(), "Reading images", disable=not self._shows_bars):
            pass
        mean_image = self.encoder.mean_image
        if mean_image is not None and not mean_image.ready:
            for batch in self._batches(self._data.normal_dataloader(), "Averaging images"):
                mean_image.observe(batch.image)
            mean_image.finish(self._total)
        if self.learns and self.cache is not None:
            self._fill_cache(self.cache)
        standardizers = self.encoder.standardizers.values()
        if any(not standardize.ready for standardize in standardizers):
            self._observe()
            for standardize in standardizers:
                standardize.finish(self._total)

    def _fill_cache(self, cache: FeatureCache) -> None:
        data, encoder = self._data, self.encoder
        assert isinstance(encoder, DenseEncoder)
        paths = [str(sample.path) for sample in data.train_set.samples]
        cache.open(paths, data.view_settings, encoder, data.image_size, self._paints)
        missing = cache.missing()
        self.trainer.strategy.barrier()  # all processes have seen the same before one of them writes
        rank_zero_info(f"feature cache: {cache.gigabytes:.2f} GB in {cache.home}, {len(missing)} views to compute")
        for numbers, views, images, masks in self._batches(data.views_dataloader(missing), "Caching features"):
            features = encoder.features(images)
            for place, (number, view) in enumerate(zip(numbers.tolist(), views.tolist(), strict=True)):
                cache.write(number, view, {side: values[place] for side, values in features.items()}, masks[place])
        self.trainer.strategy.barrier()

    def _observe(self) -> None:
        if self.learns and self.cache is not None:
            for side, standardize in self.encoder.standardizers.items():
                for features in self.cache.each(side):
                    standardize.observe(features)
            return
        for batch in self._batches(self._data.normal_dataloader(), "Measuring features"):
            self.encoder.observe(self.encoder.observable(batch.image))

    def _total(self, moments: Tensor) -> Tensor:
        gathered = torch.as_tensor(self.all_gather(moments))  # with one process there is no axis of processes
        return gathered.reshape(-1, *moments.shape).sum(0).cpu()

    def _switch_off_what_does_not_fit(self) -> None:
        size = self._data.image_size
        for side in self.encoder.sides:
            if not self._has_neighbours(side):
                for loss in self._losses(side):  # DistributedDataParallel waits for every parameter that is trainable
                    loss.requires_grad_(not {"far", "neighbour"}.intersection(loss.needs))
                rank_zero_info(
                    f"side {side}: neighbours and far patches do not fit images of {size[0]} x {size[1]} pixels "
                    f"(height x width), so losses that need them are off; they need image_size of at least {2 * side}"
                )

    def _warn_of_single_images(self) -> None:
        comparing = {type(loss).__name__ for loss in self._losses(self.encoder.sides[0]) if "thing" in loss.needs}
        if comparing and self._data.batch_size == 1:
            rank_zero_warn(
                f"data.batch_size 1 leaves {', '.join(sorted(comparing))} nothing to learn from: patches of different "
                "images are compared; give 2 or more"
            )

    def _has_neighbours(self, side: int) -> bool:
        return fits_pyramids(window_size(self._data.image_size, side, self.encoder.grids[side]), side)

    def on_train_epoch_start(self) -> None:
        """Watches anew, and reassigns the pseudo-labels, from the end of the warm-up on."""
        self._watched = {}
        epochs = self.trainer.max_epochs or 0
        if self.learns and self.current_epoch >= math.ceil(self.warmup * max(epochs, 0)):
            self.reassign_pseudo_labels()

    @torch.no_grad()
    def reassign_pseudo_labels(self) -> None:
        """Refits the centroids of each side on the probe patches, the same each time; held until the next call."""
        for side, embeddings in self._probe().items():
            clusters = self._clusters(side)
            clusters.refit(embeddings)
            clusters.centroids.copy_(self.trainer.strategy.broadcast(clusters.centroids))
            labels = clusters(embeddings)
            sizes = torch.bincount(labels, minlength=len(clusters.centroids)).float()
            found = {"smallest_cluster": sizes.min(), "largest_cluster": sizes.max()}
            if side in self.probe_labels:
                found["label_churn"] = torch.tensor(churn(self.probe_labels[side], labels))
            self.probe_labels[side] = labels
            self.log_dict({f"train/{name}_side_{side}": value for name, value in found.items()}, sync_dist=True)

    def _probe(self) -> dict[int, Tensor]:
        training, found = self.encoder.training, {side: [] for side in self.encoder.sides}
        self.encoder.eval()
        if not self.probe_batches:
            self.probe_batches = list(self._data.probe_dataloader())
        for batch in self.probe_batches:
            batch = self.trainer.strategy.batch_to_device(batch, self.device)
            windows = self._windows(batch, view=0)
            for side, pyramid in batch.sides.items():
                found[side].append(self.encoder.embed(side, windows[side], pyramid.anchor).flatten(0, 1))
        self.encoder.train(training)
        embeddings = {side: torch.cat(parts) for side, parts in found.items()}
        check_finite(embeddings)
        return embeddings

    def training_step(self, batch: PyramidBatch, batch_idx: int) -> Tensor:
        """Pyramids -> embeddings -> views -> loss terms -> their sum."""
        loss = self.placeholder * 0
        for views in self.patch_views(batch):
            terms = self.loss_terms(views)
            # an encoder whose terms are all off takes part, too: DistributedDataParallel waits for its gradient
            loss = loss + 0 * views.anchor.mean() + sum(terms.values())
            self._watch(views, terms)
        self._add_to_means({"train/loss": loss.detach()})
        return loss

    def patch_views(self, batch: PyramidBatch) -> Iterable[PatchViews]:
        """The embeddings of each side's patches; nothing where there is nothing to learn."""
        if not self.learns:
            return
        first, second = self._windows(batch, view=0), self._windows(batch, view=1)
        compared = self._compared(batch) if self._paints else {}
        for side, pyramid in batch.sides.items():
            count = pyramid.anchor.shape[1]
            others = torch.cat([pyramid.near, pyramid.far, pyramid.neighbour], dim=1)
            anchor = self.encoder.embed(side, first[side], pyramid.anchor).flatten(0, 1)
            embedded = self.encoder.embed(side, second[side], others).split(count, dim=1)
            near, far, neighbour = (part.flatten(0, 1) for part in embedded)
            fits, clusters = self._has_neighbours(side), self._clusters(side)
            yield PatchViews(
                side=side,
                anchor=anchor,
                near=near,
                far=far if fits else None,
                neighbour=neighbour if fits else None,
                direction=pyramid.direction.flatten(),
                label=clusters(anchor) if clusters.ready else None,
                centroids=clusters.centroids if clusters.ready else None,
                **compared.get(side, {}),
            )

    def _windows(self, batch: PyramidBatch, view: int) -> dict[int, Tensor]:
        corners = {side: pyramid.window for side, pyramid in batch.sides.items()}
        if self.cache is None:
            return self.encoder.windows(batch.image[:, view], corners)
        extents = {side: window_size(self._data.image_size, side, grid) for side, grid in self.encoder.grids.items()}
        windows = self.cache.read(batch.number, batch.views[:, view], corners, extents)
        return {side: window.to(self.device) for side, window in windows.items()}

    def _compared(self, batch: PyramidBatch) -> dict[int, dict[str, Tensor]]:
        """Of each side, the normal patches of the first view and those that a painted defect touches."""
        normal, painted, mask = self._with_and_without_defects(batch)
        found = {}
        for side, values in normal.items():
            grid = (values.shape[2], values.shape[3])
            counted = self.counted(batch.content, values, side)
            share = covered(mask, grid, side, self.encoder.strides[side])
            touched = counted & (share > 0)
            found[side] = {
                "normal": values.permute(0, 2, 3, 1)[counted],
                "thing": batch.thing[:, None, None].expand(-1, *grid)[counted],
                "painted": painted[side].permute(0, 2, 3, 1)[touched],
                "share": share[touched],
            }
        return found

    def _with_and_without_defects(self, batch: PyramidBatch) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        if self.cache is None:
            return self.encoder(batch.image[:, 0]), self.encoder(batch.painted), batch.mask
        first = batch.views[:, 0]
        masks = self.cache.masks(batch.number, painted_view(first), self._data.image_size).to(self.device)
        return self._embed_cached(batch, first), self._embed_cached(batch, painted_view(first)), masks

    def _embed_cached(self, batch: PyramidBatch, views: Tensor) -> dict[int, Tensor]:
        """Embeddings at every scoring position of cached views."""
        assert self.cache is not None and isinstance(self.encoder, DenseEncoder)
        features = self.cache.whole(batch.number, views)
        return self.encoder.embed_features({side: values.to(self.device) for side, values in features.items()})

    def loss_terms(self, views: PatchViews) -> dict[str, Tensor]:
        """The weighted terms of one side by name, to be summed. Override it to change the loss.

        Args:
            views: embeddings of one side's patches.
        """
        return {type(loss).__name__.lower(): loss.weight * loss(views) for loss in self._losses_on(views)}

    def _clusters(self, side: int) -> PseudoLabels:
        clusters = self.pseudo_labels[str(side)]
        assert isinstance(clusters, PseudoLabels)
        return clusters

    def _losses(self, side: int) -> list[PatchLoss]:
        return [loss for loss in self.losses[str(side)].children() if isinstance(loss, PatchLoss)]

    def _losses_on(self, views: PatchViews) -> list[PatchLoss]:
        """The losses of a side that find all they need."""
        there = {name for name, value in views._asdict().items() if value is not None}
        return [loss for loss in self._losses(views.side) if there.issuperset(loss.needs)]

    def _watch(self, views: PatchViews, terms: Mapping[str, Tensor]) -> None:
        found = {name: term.detach() for name, term in terms.items()}
        found["deviation"] = views.anchor.detach().std(dim=0).mean()
        for loss in self._losses_on(views):
            found |= loss.watched(views)
        self._add_to_means({f"train/{name}_side_{views.side}": value for name, value in found.items()})

    def _add_to_means(self, values: Mapping[str, Tensor]) -> None:
        """Adds a step to the means of the epoch; Lightning's `log` would take ten times as long."""
        for name, value in values.items():
            if name not in self._watched:
                self._watched[name] = MeanMetric(nan_strategy="disable").to(self.device)  # else it waits for the GPU
            self._watched[name].update(value)

    def on_train_epoch_end(self) -> None:
        """Logs the means of what was watched; warns in words where embeddings have collapsed."""
        means = {name: metric.compute() for name, metric in self._watched.items()}
        self.log_dict(means, sync_dist=True)
        for side in self.encoder.sides:
            deviation = means.get(f"train/deviation_side_{side}")
            if deviation is not None and not deviation >= COLLAPSED:  # nan is not, either
                rank_zero_warn(
                    f"the embeddings of side {side} have collapsed: their deviation is {float(deviation):.2g}, so "
                    "every patch looks alike; lower the learning rate, or the weights of similarity and clustering"
                )

    def on_train_end(self) -> None:
        """Remembers what no validation did, while the model is still on its device."""
        self.remember_normals()

    # the memory of what is normal

    def know_normals(self) -> None:
        """Fills the bank and calibrates; once more where mirrored normal images are normal, too."""
        self.fill_banks()
        self.calibrate()
        room = all(bank.has_room_for(2 * len(bank)) for bank in self.memory_banks.values())
        if self.mirrored and room and (mirrors := self._normal_mirrors()):
            self.fill_banks(mirrors)
            self.calibrate()

    def _normal_mirrors(self) -> list[tuple[int, ...]]:
        """The axes along which most normal images can be reversed and pass as normal, each compared with the others."""
        passing = {}
        for name, axes in MIRRORS.items():
            anomalous = self._of_normals("Mirroring", lambda batch, axes=axes: self._mirror_verdicts(batch, axes))
            passing[name] = 1 - anomalous.float().mean().item()
        shares = ", ".join(f"{share:.0%} {name}" for name, share in passing.items())
        rank_zero_info(f"mirrored normal images that pass as normal: {shares}; where most do, they fill the bank, too")
        return [MIRRORS[name] for name, share in passing.items() if share > 0.5]

    def _mirror_verdicts(self, batch: ImageBatch, axes: tuple[int, ...]) -> Int[Tensor, " batch"]:
        image = mirror(batch.image, batch.content, axes)
        return self.detect(image, batch.content, batch.thing).anomalous.long()

    def fill_banks(self, mirrors: Sequence[tuple[int, ...]] = ()) -> None:
        """Fills the bank of each side with the patches of the normal images, and prints its size first.

        Args:
            mirrors: axes of an image `[3, height, width]` along which it is reversed and taken in once more.
        """
        every = [(), *mirrors]
        things = self._data.normal_set.things.repeat(len(every))
        self.remember(self._embedded_normals(every), things, progress=self._shows_bars)

    def _embedded_normals(self, mirrors: Sequence[tuple[int, ...]]) -> Iterable[tuple[ImageBatch, dict[int, Tensor]]]:
        count = len(self._data.normal_set)
        for place, batch in enumerate(self._batches(self._data.normal_dataloader(), "Filling the memory bank")):
            for copy_number, axes in enumerate(mirrors):
                embeddings = self.embed(mirror(batch.image, batch.content, axes), batch.content)
                check_finite(embeddings)
                if place == copy_number == 0:
                    self._announce(embeddings, count * len(mirrors))
                yield batch._replace(number=batch.number + copy_number * count), embeddings

    def remember(
        self,
        embedded: Iterable[tuple[ImageBatch, Mapping[int, Tensor]]],
        things: Int[Tensor, " images"],
        progress: bool = False,
    ) -> None:
        """Fills the bank of each side anew.

        Args:
            embedded: normal images, and what `embed` says of them.
            things: number of what each training image shows.
            progress: whether a reduction may show a bar.
        """
        banks = {side: self.bank(side) for side in self.encoder.sides}
        for bank in banks.values():
            bank.clear()
        for batch, embeddings in embedded:
            for side, bank in banks.items():
                values = embeddings[side]
                bank.add(values, self.counted(batch.content, values, side), batch.number)
        for bank in banks.values():
            bank.finish(things.to(bank.keys.device), progress)

    def _announce(self, embeddings: Mapping[int, Tensor], images: int) -> None:
        for side, values in embeddings.items():
            patches = images * values.shape[2] * values.shape[3]
            count = min(patches, self.bank(side).max_vectors or patches)
            size = count * values.shape[1] * values.element_size() / 1e6
            rank_zero_info(f"memory bank, side {side}: {count} of {patches} vectors x {values.shape[1]}, {size:.1f} MB")

    def calibrate(self) -> None:
        """Sets the scale of each side and the threshold from the normal images, each compared with the others."""
        self.calibrate_on(self._normal_distances(), self._unseen)

    def calibrate_on(self, normals: Distances, unseen: Bool[Tensor, " images"]) -> None:
        """Sets scales and threshold from the distances of normal images.

        Args:
            normals: each compared with the others.
            unseen: whether encoders did not learn from an image.
        """
        for number, side in enumerate(self.scorer.sides):
            found = normals.sides[side]
            counted = self.counted(normals.content, found, side) & unseen[:, None, None]
            values = found[counted].double()
            self.scorer.scale[number] = self._at_least(values.mean(), side)
        alone = [self.side_scores(self.side_maps(one), one.content) for one in normals.each()]
        self.scorer.measure_normals({side: torch.cat([one[side] for one in alone])[unseen] for side in alone[0]})
        self.set_threshold(torch.cat([self.score(one).score for one in normals.each()]), unseen)

    def _at_least(self, scale: Tensor, side: int) -> Tensor:
        """The scale, or what keeps distances over it finite, with a warning."""
        spread = self.bank(side).vectors.std(dim=0, correction=0).norm()  # about how far normal patches differ
        least = (LEAST_SCALE * spread).clamp(min=1e-12)
        if scale < least:
            rank_zero_warn(
                f"side {side} has no scale: normal images do not differ; are some there twice? Otherwise give more of "
                "them, or a smaller model.baseline"
            )
        return scale.maximum(least)

    def _normal_distances(self) -> Distances:
        batches = self._batches(self._data.normal_dataloader(), "Calibrating")
        seen = [(batch.number, self.distances(batch.image, batch.content, batch.thing)) for batch in batches]
        numbers, found = torch.cat([number for number, _ in seen]), [one for _, one in seen]
        sides = {side: self._everywhere(numbers, [one.sides[side] for one in found]) for side in self.encoder.sides}
        return found[0]._replace(sides=sides, content=self._everywhere(numbers, [one.content for one in found]))

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes the bank for the weights that are saved, however the fit ends, and marks the format."""
        try:
            self.remember_normals()
        except Exception as error:
            if not self.trainer.interrupted:
                raise
            for side in self.encoder.sides:  # nothing that was learned is lost with an image
                self.bank(side).clear()
            self._known_at = self.global_step  # as far as it can be
            rank_zero_warn(f"the checkpoint has no bank, for {error}; mend that and go on with fit --ckpt_path")
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = without_weights(self.hparams)
        checkpoint["patchad_backbone"] = self.hparams["backbone"]  # with the weights that it began with
        checkpoint["patchad_learning_rate"] = self.learning_rate  # hyperparameters hold what was given, no defaults

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another format, context or sides; warns where its threshold is another score's."""
        super().on_load_checkpoint(checkpoint)
        if self._fitting:
            self._keep_learning_rate(checkpoint)

    def check_fitted(self, fitted: dict[str, Any]) -> None:
        """Refuses what was fitted with another context or other sides."""
        sides, ours = list(fitted["taps"]), list(self.scored_by["taps"])
        if sides != ours:  # banks and scales are theirs, in their order
            raise PatchadError(f"the checkpoint has sides {sides}, not {ours}; fit again")
        if fitted["context"] != self.context and not self._fitting:  # it is a part of each vector of the bank
            raise PatchadError(f"the bank was filled with context {fitted['context']}, not {self.context}; fit again")

    def _keep_learning_rate(self, checkpoint: dict[str, Any]) -> None:
        """A fit that goes on takes the rate that it is given now, not that of the optimizer's state."""
        if checkpoint.get("patchad_learning_rate", self.learning_rate) != self.learning_rate:
            for state in checkpoint["optimizer_states"]:
                for group in state["param_groups"]:
                    group["lr"] = self.learning_rate

    @property
    def scored_by(self) -> dict[str, Any]:
        """What scores, and so the threshold, depend on, of all that may be given another value after a fit."""
        encoder, baseline = self.encoder, self.bank(self.encoder.sides[0]).baseline
        read = {"mode": type(encoder).__name__, "taps": encoder.tap_names, "scoring_strides": encoder.strides}
        return {**super().scored_by, "context": self.context, "baseline": baseline, **read}


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


def check_finite(embeddings: Mapping[int, Tensor]) -> None:
    """Raises PatchadError if embeddings of a side are nan or infinite, before K-means and the bank get them."""
    for side, values in embeddings.items():
        if not values.isfinite().all():
            raise PatchadError(
                f"embeddings of side {side} are nan or infinite: training has diverged, or began with such weights; "
                f"lower model.learning_rate, or mend the loss whose train/..._side_{side} is nan"
            )


def without_weights(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters whose backbone starts empty: the checkpoint itself holds the weights, so no file is needed."""
    backbone = dict(hparams["backbone"])
    backbone["init_args"] = {**backbone.get("init_args", {}), "weights": "none"}
    return {**hparams, "backbone": backbone}
