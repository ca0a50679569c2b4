"""The Lightning side of the method, in the order in which it happens. The file to read first."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from patchad.canvas import Size
from patchad.detector import Detector, announce_threshold
from patchad.learning import Learning, LearningFactory
from patchad.memory import BankFactory, MemoryBank
from patchad.model import Distances, PatchModel, embed_mirrors, mirrored
from patchad.models.backbones import Backbone
from patchad.models.features import NormalFeatures
from patchad.models.patches import PatchEncoderFactory, WindowEncoder
from patchad.pyramid import positions, window_size
from patchad.scoring import Scorer, ScorerFactory
from patchad.spec import hyperparameters, spec
from patchad.types import ImageBatch, PatchViews, PyramidBatch, given

MIRRORS = {"left to right": (2,), "top to bottom": (1,), "both": (1, 2)}
"""The axes along which an image `[3, height, width]` is reversed."""


class PatchDetector(Detector[PatchModel]):
    """Fits a `PatchModel`: its encoders learn, its banks remember normal patches, its threshold is set.

    In `fit`, encoders are trained on pyramids of patches, with pseudo-labels that K-means reassigns each epoch, where
    there is learning. Before each validation the memory bank is filled with the normal images, and scales and threshold
    are set from the same images, each compared with the others.

    Source: Tsai, Wu, Lai, Multi-Scale Patch-Based Representation Learning for Image Anomaly Detection and Segmentation,
    WACV 2022.

    Args:
        backbone: image -> feature maps; None is `EfficientNetLite0`.
        patch_encoder: makes the encoder of one side; this and what follows up to `scorer` is explained at `PatchModel`.
        mode: `dense`, or `sliding` as in the paper.
        sides: sides of the patches in pixels.
        taps: name of the backbone's layer for each side.
        scoring_strides: distance between scored patches for each side in pixels.
        subtract_mean_image: subtract the mean training image, as in the paper.
        tile: height or width in pixels above which an image passes the backbone in tiles.
        bank: makes the memory of one side.
        scorer: makes what combines the maps and holds the threshold.
        learning: makes what trains the encoders: `Learning`, a subclass, or a `functools.partial` of one; None trains
            nothing.
        mirrored: where the banks have room for as much again, mirrored normal images fill them, too, if most of those
            pass as normal: that asks whether the product looks alike in a mirror. Not in the paper.

    Example:
        >>> from functools import partial
        >>> from patchad.learning import Learning
        >>> from patchad.models import LearnedEncoder
        >>> PatchDetector(learning=partial(Learning, warmup=0.2), patch_encoder=LearnedEncoder).learns
        True
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        patch_encoder: PatchEncoderFactory = WindowEncoder,
        mode: Literal["dense", "sliding"] = "dense",
        sides: tuple[int, ...] = (64, 32, 16),
        taps: dict[int, str] | None = None,
        scoring_strides: dict[int, int] | None = None,
        subtract_mean_image: bool = False,
        tile: int | None = 1024,
        bank: BankFactory = MemoryBank,
        scorer: ScorerFactory = Scorer,
        learning: LearningFactory | None = None,
        mirrored: bool = True,
    ) -> None:
        super().__init__()
        self.model = PatchModel(
            backbone, patch_encoder, mode, sides, taps, scoring_strides, subtract_mean_image, tile, bank, scorer
        )
        self.learning, self.mirrored = self._made(learning), mirrored
        self._watched: list[tuple[tuple[str, ...], Tensor]] = []  # of each step of an epoch: what, and its values
        idle = {} if self.learns else {"learning": None}
        self.save_hyperparameters({**hyperparameters(self), **spec(self.model)["init_args"], **idle})

    @property
    def learns(self) -> bool:
        """Whether a fit trains the encoders."""
        return self.learning is not None

    def _made(self, learning: LearningFactory | None) -> Learning | None:
        """The learning, where there is something to learn."""
        if learning is None:
            return None
        if self.model.learns:
            return learning(self.model.encoder)
        rank_zero_warn(f"{self._encoder_name} does not learn: model.learning is left out; give --config learned")
        return None

    @property
    def _encoder_name(self) -> str:
        return type(self.model.encoder.patch_encoder(self.model.sides[0])).__name__

    def setup(self, stage: str) -> None:
        """Also hands the datamodule the plan of the pyramids, and switches off losses that do not fit the images.

        Raises:
            PatchadError: if device or precision cannot hold the figures, or a side does not fit the images.
        """
        super().setup(stage)
        if stage != "fit":
            return
        size = self._data.image_size
        for side, grid in self.model.encoder.grids.items():
            positions(window_size(size, side, grid), side, grid)  # or an error that says so
        announce_padding(self.model, size)
        if self.learning is not None:
            self._data.plan = self.learning.plan
            self.learning.prepare(size, self._data.batch_size)
        elif self.model.learns:
            rank_zero_warn(f"nothing trains {self._encoder_name}, which learns: give --config learned")

    # learning

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam over all that is trainable; none where nothing is learned."""
        if self.learning is None:
            return super().configure_optimizers()
        trained = (parameter for parameter in self.parameters() if parameter.requires_grad)
        clipped = self._trainer is not None and self._trainer.gradient_clip_val  # Lightning then refuses a fused one
        fused = self.device.type == "cuda" and not clipped
        return [torch.optim.Adam(trained, lr=self.learning.learning_rate, fused=fused)]

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Measures the mean image, caches features, and measures the encoders' input, where these are asked for."""
        super().on_fit_start()
        self._measure_mean_image()
        if self.learning is not None:
            self.learning.forget()
            self._keep_features(self.learning)
        self._normals = NormalFeatures(self.model.encoder, self._read_normals, self.learns)
        with self.trainer.precision_plugin.forward_context():  # as banks are filled
            self._standardize()

    def _read_normals(self, title: str, first: int = 0) -> Iterable[ImageBatch]:
        return self._batches(self._data.normal_dataloader(first), title)

    def _measure_mean_image(self) -> None:
        mean_image = self.model.encoder.mean_image
        if mean_image is not None and not mean_image.ready:
            for batch in self._read_normals("Averaging images"):
                mean_image.observe(batch.image)
            mean_image.finish(self._total)

    def _keep_features(self, learning: Learning) -> None:
        data, features = self._data, learning.features
        if self.from_checkpoint:  # which has no say on what lies elsewhere
            features.keep_inside()
        paths = [str(sample.path) for sample in data.train_set.samples]
        missing = features.open(paths, data.view_settings, data.image_size, learning.paints, data.augmentations)
        self.trainer.strategy.barrier()  # all processes have seen the same before one of them writes
        if features.place:
            rank_zero_info(f"{features.place}, {len(missing)} views to compute")
        if missing:
            for views in self._batches(data.views_dataloader(missing, features.resident), "Reading training views"):
                features.keep(*views)
        self.trainer.strategy.barrier()

    def _standardize(self) -> None:
        """The encoders' input, by what they read of training views, or of the normal images."""
        encoder = self.model.encoder
        if all(standardize.ready for standardize in encoder.standardizers.values()):
            return
        title = "Measuring features"
        measured = (features for _, features in self._normals.observed(title))
        if self.learning is not None:
            measured = self.learning.features.observed(batch.image for batch in self._read_normals(title))
        for features in measured:
            encoder.observe(features)
        for standardize in encoder.standardizers.values():
            standardize.finish(self._total)

    def on_train_epoch_start(self) -> None:
        """Watches anew, and reassigns the pseudo-labels, from the end of the warm-up on."""
        assert self.learning is not None
        self._watched = []
        if not self.learning.in_warmup(self.current_epoch, self.trainer.max_epochs or 0):
            if not self.learning.probe_batches:
                self.learning.probe_batches = list(self._data.probe_dataloader())
            batches = self._on_device(self.learning.probe_batches)
            watched = self.learning.reassign_pseudo_labels(batches, self.trainer.strategy.broadcast)
            self.log_dict({f"train/{name}": value for name, value in watched.items()}, sync_dist=True)

    def training_step(self, batch: PyramidBatch, batch_idx: int) -> Tensor:
        """Pyramids -> embeddings -> views -> loss terms -> their sum."""
        assert self.learning is not None
        turn = (self._data.seed, self.current_epoch, batch_idx, self.global_rank)
        loss, self.terms = self._step(self.learning.features.read(batch, turn), batch)
        self._watched.append((tuple(self.terms), torch.stack([*self.terms.values()])))
        return loss

    @functools.cached_property
    def _step(self) -> Callable[[Any, PyramidBatch], tuple[Tensor, dict[str, Tensor]]]:
        compiled = self.learning is not None and self.learning.compiled
        return torch.compile(self._losses, mode="reduce-overhead", dynamic=False) if compiled else self._losses

    def _losses(self, read: Any, batch: PyramidBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step, and what is watched of it by the name that it is logged under."""
        assert self.learning is not None
        loss, watched = torch.zeros((), device=self.device), {}
        for views in self.learning.patch_views(read, batch):
            terms = self.loss_terms(views)
            # an encoder whose terms are all off takes part, too: DistributedDataParallel waits for its gradient
            loss = loss + 0 * views.anchor.mean() + sum(terms.values())
            values = {name: term.detach() for name, term in terms.items()} | self.learning.watched(views)
            watched |= {f"train/{name}_side_{views.side}": value for name, value in values.items()}
        return loss, {**watched, "train/loss": loss.detach()}

    def loss_terms(self, views: PatchViews) -> dict[str, Tensor]:
        """The weighted terms of one side by name, to be summed. Override it to change the loss.

        Args:
            views: embeddings of one side's patches.
        """
        assert self.learning is not None
        return self.learning.loss_terms(views)

    def on_train_epoch_end(self) -> None:
        """Logs the means of what was watched; warns in words where embeddings have collapsed."""
        assert self.learning is not None
        means = means_of_steps(self._watched)
        self.log_dict(means, sync_dist=True)
        self.learning.warn_of_collapse(means)

    # the memory of what is normal

    def know_normals(self) -> None:
        """Fills the banks and calibrates; once more where mirrored normal images are normal, too."""
        self.fill_banks()
        promised = self.calibrate()
        if self.mirrored and self.model.has_room_for_as_much_again() and (mirrors := self._normal_mirrors()):
            self.fill_banks(mirrors)
            promised = self.calibrate()
            self.fitted = self.fitted._replace(mirrors=[list(axes) for axes in mirrors])
        self._normals.forget()
        announce_threshold(self.scorer, *promised)

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
        return self.model(*mirrored(batch, axes).inputs).anomalous.long()

    def fill_banks(self, mirrors: Sequence[tuple[int, ...]] = ()) -> None:
        """Fills the bank of each side with the patches of the normal images, and prints its size first.

        Args:
            mirrors: axes of an image `[3, height, width]` along which it is reversed and taken in once more.
        """
        things = self._data.normal_set.things.repeat(1 + len(mirrors))
        self.model.remember(self._embedded_normals(mirrors), things, progress=self._shows_bars)

    def _embedded_normals(self, mirrors: Sequence[tuple[int, ...]]) -> Iterator[tuple[ImageBatch, dict[int, Tensor]]]:
        count, title = len(self._data.normal_set), "Filling the memory bank"
        for place, (batch, embeddings) in enumerate(self._normals.embedded(title)):
            if not place:
                announce_banks(self.model, batch, embeddings, count * (1 + len(mirrors)))
            yield batch, embeddings
        if mirrors:
            yield from embed_mirrors(self.model, self._read_normals(title), mirrors, first=count, count=count)

    def calibrate(self) -> tuple[float, float]:
        """Sets the scale of each side and the limits from the normal images, each compared with the others.

        Returns:
            What `announce_threshold` says.
        """
        return self.model.calibrate(self._normal_distances(), self._unseen)

    def _normal_distances(self) -> Distances:
        results = []
        for batch, embeddings in self._normals.embedded("Calibrating"):
            judged = batch.content, self._data.image_size, batch.thing, given(batch.region)
            results.append((batch.number, self.model.nearest(embeddings, *judged)))
        numbers, parts = [number for number, _ in results], [distances for _, distances in results]
        sides = {side: self._everywhere(numbers, [part.sides[side] for part in parts]) for side in self.model.sides}
        content = self._everywhere(numbers, [part.content for part in parts])
        regions = [part.region.view(torch.uint8) for part in parts if part.region is not None]
        region = self._everywhere(numbers, regions).view(torch.bool) if regions else None
        return parts[0]._replace(sides=sides, content=content, region=region)

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes the bank for the weights that are saved, however the fit ends, and marks the format."""
        try:
            self.remember_normals()
        except Exception as error:
            if not self.trainer.interrupted:
                raise
            for bank in self.model.memory_banks.values():  # nothing that was learned is lost with an image
                bank.clear()
            self._known_at = self.global_step  # as far as it can be
            rank_zero_warn(f"the checkpoint has no bank, for {error}; mend that and go on with fit --ckpt_path")
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also lets a fit that goes on take the rate that it is given now, not that of the optimizer's state."""
        super().on_load_checkpoint(checkpoint)
        fitted = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["learning"]
        if self.learning is None or fitted is None or not self._fitting:
            return
        rate = self.learning.learning_rate
        if fitted["init_args"]["learning_rate"] != rate:
            for state in checkpoint["optimizer_states"]:
                for group in state["param_groups"]:
                    group["lr"] = rate


def means_of_steps(watched: Iterable[tuple[Sequence[str], Tensor]]) -> dict[str, Tensor]:
    """The mean of each figure over the steps that have it.

    Args:
        watched: of each step, the names of its figures, and these in one tensor.

    Example:
        >>> means_of_steps([(("loss",), torch.tensor([1.0])), (("loss", "seldom"), torch.tensor([2.0, 5.0]))])
        {'loss': tensor(1.5000), 'seldom': tensor(5.)}
    """
    values: dict[str, list[Tensor]] = {}
    for name, value in (pair for names, row in watched for pair in zip(names, row, strict=True)):
        values.setdefault(name, []).append(value)
    return {name: torch.stack(of_name).mean() for name, of_name in values.items()}


def announce_padding(model: PatchModel, size: Size) -> None:
    """Says how far images of that height x width in pixels are padded, where they are."""
    padded = model.encoder.padded(size)
    if padded != tuple(size):
        rank_zero_info(
            f"images of {size[0]} x {size[1]} pixels (height x width) are padded to {padded[0]} x {padded[1]} by "
            f"their edge: strides of backbone and patches divide multiples of {model.encoder.multiple}"
        )


def announce_banks(model: PatchModel, batch: ImageBatch, embeddings: Mapping[int, Tensor], images: int) -> None:
    """Prints how large the banks of so many images become, if of each as many patches count as of the first.

    Args:
        model: whose banks are to be filled.
        batch: the first images.
        embeddings: of their patches, by side.
        images: how many there are in all.
    """
    for side, values in embeddings.items():
        counted = model.encoder.counted(batch.content, values, side, given(batch.region))[0]
        patches = images * int(counted.sum())
        count = min(patches, model.bank(side).max_vectors or patches)
        size = count * values.shape[1] * values.element_size() / 1e6
        rank_zero_info(f"memory bank, side {side}: {count} of {patches} vectors x {values.shape[1]}, {size:.1f} MB")
