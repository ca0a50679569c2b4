"""What every detector does, whatever scores: it is calibrated, measured, saved and loaded."""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from patchad.conformal import images_needed
from patchad.errors import PatchadError
from patchad.memory import MemoryBank
from patchad.metrics import AnomalyMetrics
from patchad.pyramid import crop_resize
from patchad.scoring import Scorer
from patchad.spec import Configurable
from patchad.types import ImageBatch, Prediction

CHECKPOINT_FORMAT = 10
"""Raised whenever checkpoints of an older patchad no longer load."""


class Detector(Configurable, LightningModule):
    """Scores images. A subclass says how (`detect`), and what it must know of normal images first (`know_normals`).

    Before each validation and each checkpoint of `fit` it gets to know what is normal. All of that are buffers: a
    checkpoint alone tests and predicts.
    """

    scorer: Scorer
    measured_sides: Sequence[int] = ()
    """Sides in pixels whose own maps are measured, too."""
    _known_at: int | None = None  # the step whose weights know what is normal

    def setup(self, stage: str) -> None:
        """Makes the metrics, which know the defect types of the test set.

        Raises:
            PatchadError: if device or precision cannot hold the figures.
        """
        precision = str(self.trainer.precision)
        if self.trainer.strategy.root_device.type == "mps":
            raise PatchadError("float64, which figures need, is not there on mps; give --trainer.accelerator cpu")
        if precision in ("16-true", "bf16-true"):
            mixed = precision.replace("true", "mixed")
            raise PatchadError(f"--trainer.precision {precision} would round distances, too; give {mixed}")
        if stage != "predict":
            defects = self._data.defects if stage == "test" else []
            self.metrics = AnomalyMetrics(self.measured_sides, stage == "test", defects, progress=self._shows_bars)

    def forward(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"] | None = None,
        thing: Int[Tensor, " batch"] | None = None,
    ) -> Prediction:
        """Scores images.

        Args:
            image: RGB in [0, 1], of the size and light that the datamodule gave those of the fit: what
                `patchad.data.images.fit` makes of them with its `image_size`, `keep_aspect` and `brightness`.
            content: height x width of each image's content, top left, in pixels; by default the whole image.
            thing: number of what each image shows, as in `ImageBatch`, which it is then not compared with; by default
                every image is new.

        Raises:
            PatchadError: if a bank is empty, or a side does not fit the image.
        """
        if content is None:
            lengths = (torch.full((len(image),), length, device=image.device) for length in image.shape[2:])
            content = torch.stack(list(lengths), dim=1)
        return self.detect(image, content, thing)

    def detect(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
    ) -> Prediction:
        """`forward`, with the content named."""
        raise NotImplementedError

    # what is normal

    def on_fit_start(self) -> None:
        """Knows nothing yet: another fit of this model may take as many steps, and has images of its own."""
        self._known_at = None

    def know_normals(self) -> None:
        """Learns from the normal images of the datamodule what scores and verdicts need, in eval mode."""
        raise NotImplementedError

    @torch.no_grad()
    def remember_normals(self) -> None:
        """Knows what is normal, in `fit`, unless that was done with the weights as they are now."""
        if not self._fitting or self._known_at == self.global_step:
            return
        training = self.training
        self.eval()
        with self.trainer.precision_plugin.forward_context():  # the precision of validate, test and predict
            self.know_normals()
        self.train(training)
        self._known_at = self.global_step  # only now: a fit that ends in between starts over

    @property
    def learns(self) -> bool:
        """Whether anything learns from the training images."""
        raise NotImplementedError

    @property
    def _unseen(self) -> Bool[Tensor, " images"]:
        """Of each normal image, whether nothing learned from it."""
        return (self._data.held_out | (not self.learns)).to(self.device)

    def set_threshold(self, scores: Float[Tensor, " images"], unseen: Bool[Tensor, " images"]) -> None:
        """Sets the threshold from normal images, each scored without itself, and says what it promises.

        Embeddings of images that encoders learned from lie closer together than those of new ones. Their scores are
        therefore raised by the ratio of the medians, where that of the unseen ones is higher.

        Args:
            scores: of the normal images.
            unseen: whether encoders did not learn from an image; all True where nothing was learned.
        """
        if not unseen.all():
            ratio = scores[unseen].median() / scores[~unseen].median().clamp(min=torch.finfo(scores.dtype).tiny)
            scores = torch.where(unseen, scores, scores * ratio.clamp(min=1))
            rank_zero_info(f"images that were not learned from score {float(ratio):.3g} times as high as the others")
        promised = self.scorer.set_threshold(scores)
        rank_zero_info(
            f"threshold {float(self.scorer.threshold):.4g} from {len(scores)} normal images: "
            f"false-positive rate promised at most {promised:.3g}, asked for {self.scorer.target_fpr:.3g}"
        )
        self._note_few_normals()

    def _note_few_normals(self) -> None:
        count, needed = len(self.scorer.normals), images_needed(self.scorer.target_fpr)
        if 0 < count < needed:
            rank_zero_info(
                f"{count} normal images cannot promise a false-positive rate of {self.scorer.target_fpr:.3g}, only "
                f"{1 / (count + 1):.3g}: that takes {needed} of them"
            )

    def on_test_start(self) -> None:
        """Says where the normal images are too few for the rate that was asked for."""
        self._note_few_normals()

    def on_predict_start(self) -> None:
        """Says where the normal images are too few for the rate that was asked for."""
        self._note_few_normals()

    def _of_normals(self, title: str, compute: Callable[[ImageBatch], Tensor]) -> Tensor:
        """What is computed of each normal image, one row for each, whichever process saw it."""
        batches = self._batches(self._data.normal_dataloader(), title)
        seen = [(batch.number, compute(batch)) for batch in batches]
        return self._everywhere(torch.cat([number for number, _ in seen]), [rows for _, rows in seen])

    def _everywhere(self, numbers: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """One row for each normal image, whichever process saw it."""
        seen = torch.cat(list(parts))
        rows = seen.new_zeros(len(self._data.normal_set), *seen.shape[1:])
        rows[numbers] = seen
        return torch.as_tensor(self.trainer.strategy.reduce(rows, reduce_op="sum"))

    # validate, test, predict

    def on_validation_start(self) -> None:
        """Before labelled images are scored, what is normal must be known."""
        self.remember_normals()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> Prediction | None:
        """Measures labelled images, but for those of a sanity check: there is no bank yet."""
        return None if self.trainer.sanity_checking else self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the AUROCs."""
        self._log("val")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> Prediction:
        """Measures labelled images."""
        return self._measure(batch)

    def on_test_epoch_end(self) -> None:
        """Logs every metric."""
        self._log("test")

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Prediction:
        """Scores images."""
        return self(batch.image, batch.content)

    def _measure(self, batch: ImageBatch) -> Prediction:
        prediction = self(batch.image, batch.content, batch.thing)
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
        """Adds what is normal, and marks the format."""
        self.remember_normals()
        checkpoint["state_dict"] = self.state_dict()
        checkpoint["patchad_format"], checkpoint["patchad_scored_by"] = CHECKPOINT_FORMAT, self.scored_by

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another format; warns where its threshold is another score's."""
        check_format(checkpoint)
        now, fitted = self.scored_by, checkpoint["patchad_scored_by"]
        self.check_fitted(fitted)
        told = [f"{name} {value}, not {now[name]}" for name, value in fitted.items() if now[name] != value]
        if told and not self._fitting:
            settings = "; ".join(told)
            rank_zero_warn(f"the threshold was set with {settings}: verdicts do not hold; fit for one of its own")

    def check_fitted(self, fitted: dict[str, Any]) -> None:
        """Raises PatchadError where this detector cannot take over what was fitted, whose `scored_by` is given."""

    @property
    def scored_by(self) -> dict[str, Any]:
        """What scores, and so the threshold, depend on, of all that may be given another value after a fit."""
        return {"scorer": repr(self.scorer)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Torch's, with PatchadError where the state is another model's: settings differ from those of the fit."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            told = textwrap.shorten(str(error).partition("\n")[2], 150, placeholder=" ...")
            raise PatchadError(
                f"the checkpoint does not fit this detector: {told}; leave out model options that the fit did "
                "not have, or fit again"
            ) from error

    @property
    def memory_banks(self) -> dict[str, MemoryBank]:
        """Every bank that is searched, by its side, and by its member where there are several detectors."""
        return {name.replace("banks.", ""): one for name, one in self.named_modules() if isinstance(one, MemoryBank)}

    # what Lightning gives

    @property
    def _fitting(self) -> bool:
        trainer = self._trainer  # None where there is none
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    @property
    def _shows_bars(self) -> bool:
        return self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None

    @property
    def _data(self) -> Any:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, LightningDataModule):
            name = type(self).__name__
            raise PatchadError(f"{name} needs a PyramidDataModule: call trainer.fit(model, datamodule=...)")
        return datamodule

    def _batches(self, loader: DataLoader, title: str) -> Iterable[Any]:
        for batch in track(loader, title, disable=not self._shows_bars, transient=True):
            yield self.trainer.strategy.batch_to_device(batch, self.device)


def check_format(checkpoint: Mapping[str, Any], path: str | Path = "") -> None:
    """Raises PatchadError unless this patchad can load the checkpoint."""
    found = checkpoint.get("patchad_format")
    if found != CHECKPOINT_FORMAT:
        told = "is not one of patchad's" if found is None else f"has format {found}"
        raise PatchadError(
            f"checkpoint {path} {told}; this patchad reads format {CHECKPOINT_FORMAT}: fit again, or install the "
            "patchad that wrote it"
        )
