"""The method, in the order in which it happens. The file to read first."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from patchad.memory import MemoryBank
from patchad.metrics import AnomalyMetrics
from patchad.models.backbones import Backbone
from patchad.models.encoders import EncoderFactory, PyramidEncoder, WindowEncoder
from patchad.pyramid import crop_resize, fold, inside
from patchad.scoring import Scorer
from patchad.spec import Configurable, hyperparameters
from patchad.types import ImageBatch, PatchadError, Prediction

CHECKPOINT_FORMAT = 1
"""Raised whenever checkpoints of an older patchad no longer load."""


class Distances(NamedTuple):
    """Distances of the patches of a batch to the nearest normal patch, per side `[batch, rows, columns]`."""

    sides: dict[int, Tensor]
    content: Tensor
    height: int
    width: int


class PatchDetector(Configurable, LightningModule):
    """Embeds patches of three sides, remembers the normal ones, and scores images by the distance to them.

    In `fit`, before each validation, the memory bank is filled with the training normals, and scales and threshold are
    set from the calibration normals. All three are buffers: a checkpoint alone tests and predicts.

    Args:
        backbone: image -> feature maps.
        encoder: makes the encoder of one side: a subclass of `PatchEncoder`, or a `functools.partial` of one.
        sides: sides of the patches in pixels.
        taps: name of the backbone's layer for each side; by default the backbone's own choice.
        scoring_strides: distance between scored patches for each side in pixels.
        max_vectors: most vectors that the bank of each side keeps; None keeps all.
        scorer: combines the maps and holds the threshold.
        seed: of the vectors that the bank keeps.

    Raises:
        PatchadError: if sides, taps and strides do not fit each other.

    Example:
        >>> from patchad.models.backbones import EfficientNetLite0
        >>> detector = PatchDetector(EfficientNetLite0(weights="none"))
        >>> detector.encoder.strides
        {64: 16, 32: 8, 16: 4}
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: EncoderFactory = WindowEncoder,
        sides: tuple[int, ...] = (64, 32, 16),
        taps: dict[int, str] | None = None,
        scoring_strides: dict[int, int] | None = None,
        max_vectors: int | None = 10_000,
        scorer: Scorer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(hyperparameters(self))
        self.encoder = PyramidEncoder(backbone, encoder, sides, taps, scoring_strides)
        self.banks = nn.ModuleDict({str(side): MemoryBank(side, max_vectors, seed) for side in self.encoder.sides})
        self.scorer = (scorer or Scorer()).prepare(self.encoder.sides)
        # Nothing is learned yet, but Lightning saves no checkpoint before a first optimizer step, and
        # DistributedDataParallel refuses a module without a trainable parameter: this one is stepped and never used.
        self.placeholder = nn.Parameter(torch.zeros(()))
        self._calibration: list[Distances] = []
        self._filled_at: int | None = None

    # from images to predictions

    def distances(self, image: Float[Tensor, "batch 3 height width"], content: Int[Tensor, "batch 2"]) -> Distances:
        """How far each patch is from the nearest normal one.

        Args:
            image: RGB in [0, 1].
            content: height x width of each image's content, top left, in pixels.
        """
        found = {}
        for side, embeddings in self.encoder(image).items():
            queries = embeddings.permute(0, 2, 3, 1)
            nearest = self._bank(side).distances(queries.flatten(0, 2))
            found[side] = nearest.reshape(queries.shape[:3])
        return Distances(found, content, image.shape[2], image.shape[3])

    def side_maps(self, distances: Distances) -> dict[int, Float[Tensor, "batch height width"]]:
        """The anomaly map of each side at the pixels of the image."""
        maps = {}
        for side, values in distances.sides.items():
            counted = self._counted(distances.content, values, side)
            folded = fold(values, counted, side, self.encoder.strides[side])
            maps[side] = folded[:, : distances.height, : distances.width]
        return maps

    def score(self, distances: Distances) -> Prediction:
        """Maps, scores and verdicts from distances."""
        maps, content = self.side_maps(distances), distances.content
        combined = self.scorer.combine(maps)
        scores = self.scorer.score(combined, content)
        side_scores = {side: self.scorer.score(side_map, content) for side, side_map in maps.items()}
        return Prediction(scores, scores > self.scorer.threshold, combined, side_scores, maps)

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], content: Int[Tensor, "batch 2"] | None = None
    ) -> Prediction:
        """Scores images.

        Args:
            image: RGB in [0, 1].
            content: height x width of each image's content, top left, in pixels; by default the whole image.

        Raises:
            PatchadError: if the bank is empty, or a side does not fit the image.
        """
        if content is None:
            content = torch.tensor(image.shape[2:], device=image.device).expand(len(image), 2)
        return self.score(self.distances(image, content))

    # learning: nothing yet but what the encoders' input looks like

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer that changes nothing."""
        return torch.optim.SGD([self.placeholder], lr=0.0)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Measures the encoders' input over the training normals, where an encoder standardises it."""
        standardizers = self.encoder.standardizers.values()
        if any(not standardize.ready for standardize in standardizers):
            for batch in self._batches(self._data.memory_dataloader(), "Measuring features"):
                self.encoder.observe(batch.image)
            for standardize in standardizers:
                standardize.finish(self._total)

    def _total(self, moments: Tensor) -> Tensor:
        gathered = torch.as_tensor(self.all_gather(moments))  # with one process there is no axis of processes
        return gathered.reshape(-1, *moments.shape).sum(0).cpu()

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """A loss of zero: the training-free encoder has nothing to learn."""
        return self.placeholder * 0

    # the memory of what is normal

    def fill_banks(self) -> None:
        """Fills the bank of each side with the patches of the training normals, and prints its size first."""
        for side in self.encoder.sides:
            self._bank(side).clear()
        loader = self._data.memory_dataloader()
        for number, batch in enumerate(self._batches(loader, "Filling the memory bank")):
            embeddings = self.encoder(batch.image)
            if number == 0:
                self._announce(embeddings, len(loader.dataset))
            for side, values in embeddings.items():
                self._bank(side).add(values, self._counted(batch.content, values, side), batch.number)
        for side in self.encoder.sides:
            self._bank(side).finish()

    def _announce(self, embeddings: Mapping[int, Tensor], images: int) -> None:
        for side, values in embeddings.items():
            patches = images * values.shape[2] * values.shape[3]
            count = min(patches, self._bank(side).max_vectors or patches)
            size = count * values.shape[1] * values.element_size() / 1e6
            rank_zero_info(f"memory bank, side {side}: {count} of {patches} vectors x {values.shape[1]}, {size:.1f} MB")

    def calibrate(self) -> None:
        """Sets the scale of each side and the threshold from the collected distances of the calibration normals."""
        gathered: list[list[Distances]] = [self._calibration]
        if self.trainer.world_size > 1:
            gathered = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self._calibration)
        batches = [to_device(batch, self.device) for part in gathered for batch in part]
        for number, side in enumerate(self.encoder.sides):
            found = [(batch.content, batch.sides[side]) for batch in batches]
            values = torch.cat([values[self._counted(content, values, side)] for content, values in found]).double()
            self.scorer.scale[number] = values.mean().clamp(min=torch.finfo(torch.float32).tiny)
        scores = torch.cat([self.score(batch).score for batch in batches])
        rate = self.scorer.set_threshold(scores)
        rank_zero_info(
            f"threshold {float(self.scorer.threshold):.4g} from {len(scores)} calibration images: "
            f"false-positive rate promised at most {rate:.3g}, asked for {self.scorer.target_fpr:.3g}"
        )
        self._calibration = []
        self._filled_at = self.global_step  # only now: a fit that ends between filling and calibrating starts over

    def _counted(self, content: Tensor, values: Tensor, side: int) -> Tensor:
        grid = (values.shape[-2], values.shape[-1])
        return inside(content, grid, side, self.encoder.strides[side])

    def _bank(self, side: int) -> MemoryBank:
        bank = self.banks[str(side)]
        assert isinstance(bank, MemoryBank)
        return bank

    def _collect(self, batch: ImageBatch) -> None:
        self._calibration.append(to_device(self.distances(batch.image, batch.content), torch.device("cpu")))

    # validation: calibration normals, then labelled images

    def on_validation_start(self) -> None:
        """In `fit`, fills the bank with the embeddings as they are now."""
        if self._fitting and self._filled_at != self.global_step:
            self.fill_banks()

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> Prediction | None:
        """Loader 0, the calibration normals, is collected in `fit`; loader 1, labelled images, is measured."""
        if self.trainer.sanity_checking:  # nothing is remembered yet
            return None
        if dataloader_idx:
            return self._measure(batch)
        if self._fitting:
            self._collect(batch)
        return None

    def on_validation_batch_start(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Calibrates once all calibration normals are collected."""
        if dataloader_idx and self._calibration:
            self.calibrate()

    def on_validation_epoch_end(self) -> None:
        """Calibrates if no labelled image did, and logs the AUROCs."""
        if self._calibration:
            self.calibrate()
        self._log("val")

    # test and predict

    def test_step(self, batch: ImageBatch, batch_idx: int) -> Prediction:
        """Measures labelled images."""
        return self._measure(batch)

    def on_test_epoch_end(self) -> None:
        """Logs every metric."""
        self._log("test")

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Prediction:
        """Scores images."""
        return self(batch.image, batch.content)

    def setup(self, stage: str) -> None:
        """Makes the metrics, which know the defect types of the test set."""
        if stage != "predict":
            defects = self._data.defects if stage == "test" else []
            self.metrics = AnomalyMetrics(self.encoder.sides, stage == "test", defects, progress=self._shows_bars)

    def _measure(self, batch: ImageBatch) -> Prediction:
        prediction = self(batch.image, batch.content)
        size = (batch.mask.shape[1], batch.mask.shape[2])
        maps = {"combined": prediction.map, **prediction.side_maps}
        resized = {name: crop_resize(one, batch.content, size) for name, one in maps.items()}
        self.metrics.update(prediction, batch, resized)
        return prediction

    def _log(self, stage: str) -> None:
        values = self.metrics.compute() if self.metrics.update_called else {}
        self.metrics.reset()
        self.log_dict({f"{stage}/{name}": value.float() for name, value in values.items()}, sync_dist=True)

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes the bank for the weights that are saved, however the fit ends, and marks the format."""
        if self._fitting and self._filled_at != self.global_step:
            self._refill()
            checkpoint["state_dict"] = self.state_dict()
        checkpoint["patchad_format"] = CHECKPOINT_FORMAT
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = without_weights(self.hparams)

    def _refill(self) -> None:
        training = self.training
        self.eval()
        with torch.no_grad():
            self.fill_banks()
            self._calibration = []
            for batch in self._batches(self._data.calibration_dataloader(), "Calibrating"):
                self._collect(batch)
            self.calibrate()
        self.train(training)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another format."""
        check_format(checkpoint)

    # what Lightning gives

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking

    @property
    def _shows_bars(self) -> bool:
        return self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None

    @property
    def _data(self) -> Any:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, LightningDataModule):
            raise PatchadError("PatchDetector needs a PyramidDataModule: call trainer.fit(model, datamodule=...)")
        return datamodule

    def _batches(self, loader: DataLoader, title: str) -> Iterable[ImageBatch]:
        for batch in track(loader, title, disable=not self._shows_bars, transient=True):
            yield self.trainer.strategy.batch_to_device(batch, self.device)


def to_device(distances: Distances, device: torch.device) -> Distances:
    """The distances on another device."""
    sides = {side: values.to(device) for side, values in distances.sides.items()}
    return distances._replace(sides=sides, content=distances.content.to(device))


def check_format(checkpoint: Mapping[str, Any], path: str | Path = "") -> None:
    """Raises PatchadError unless this patchad can load the checkpoint."""
    found = checkpoint.get("patchad_format")
    if found != CHECKPOINT_FORMAT:
        told = "is not one of patchad's" if found is None else f"has format {found}"
        raise PatchadError(
            f"checkpoint {path} {told}; this patchad reads format {CHECKPOINT_FORMAT}: fit again, or install the "
            "patchad that wrote it"
        )


def without_weights(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters whose backbone starts empty: the checkpoint itself holds the weights, so no file is needed."""
    backbone = dict(hparams["backbone"])
    backbone["init_args"] = {**backbone.get("init_args", {}), "weights": "none"}
    return {**hparams, "backbone": backbone}
