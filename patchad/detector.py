"""What Lightning asks of every detector, whatever model scores: it is fitted, measured, saved and loaded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar
from uuid import uuid4

import torch
from jaxtyping import Bool, Float, Int
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from patchad.canvas import Canvas
from patchad.checkpoint import CHECKPOINT_FORMAT, GOES_ON, Checkpointed, WholeCheckpoints, check_contents, check_format
from patchad.conformal import images_needed
from patchad.data.datamodule import PyramidDataModule
from patchad.data.doubts import Doubts
from patchad.errors import PatchadError
from patchad.learning import Learning
from patchad.metrics import AnomalyMetrics
from patchad.model import ScoringModel, load_state, summary, unseen, without_weights
from patchad.pyramid import crop_resize
from patchad.runtime import check_scores
from patchad.scoring import Scorer
from patchad.spec import changed_settings, spec
from patchad.types import FittedImages, ImageBatch, Prediction, Region, given

OTHER_PRECISIONS = {"16-true": "16-mixed", "bf16-true": "bf16-mixed", "64-true": "32-true"}
"""Of Lightning's, and what to give instead."""
Model = TypeVar("Model", bound=ScoringModel)


class Detector(Checkpointed, LightningModule, Generic[Model]):
    """The Lightning side of a `ScoringModel`. A subclass says how it gets to know what is normal (`know_normals`).

    A subclass that learns has a `training_step` and `configure_optimizers`, as Lightning asks for them, and hands the
    datamodule a `plan` in `setup`. `patchad.peers` has examples.

    Before each validation and each checkpoint of `fit` it gets to know what is normal. All of that are buffers: a
    checkpoint alone tests and predicts. Where nothing is learned, a fit has no epochs: it knows what is normal, and
    that is all.

    Attributes:
        model: scores images.
        learning: trains what the model embeds with; None where nothing is learned.
        doubts: about the images of the last fit, validation, test or prediction.
        fitted: the normal images of the fit, and what was added to them.
        terms: the terms of the loss in the last step, by the name that they are logged under.
        group: a name by which dashboards show the runs of this model together.
    """

    model: Model
    learning: Learning | None
    _known_at: int | None = None  # the step whose weights know what is normal
    _lends: bool = False  # whether its first parameter only seems to be trained

    def __init__(self) -> None:
        super().__init__()
        self.learning = None  # not on the class, where it would hide the submodule
        self.doubts, self.fitted, self.group = Doubts(), FittedImages(), uuid4().hex[:8]
        self.terms: dict[str, Tensor] = {}

    @property
    def learns(self) -> bool:
        """Whether a fit trains anything."""
        return self.model.learns

    @property
    def scorer(self) -> Scorer:
        """Holds the threshold."""
        return self.model.scorer

    def setup(self, stage: str) -> None:
        """Makes the metrics, which know the defect types of the test set; checkpoints are written whole.

        Raises:
            PatchadError: if device or precision cannot hold the figures.
        """
        precision = str(self.trainer.precision)
        if self.trainer.strategy.root_device.type == "mps":
            raise PatchadError("float64, which figures need, is not there on mps; give --trainer.accelerator cpu")
        if precision in OTHER_PRECISIONS:
            raise PatchadError(
                f"--trainer.precision {precision}: distances are float32; give {OTHER_PRECISIONS[precision]}"
            )
        if stage != "predict":
            defects = self._data.defects if stage == "test" else []
            self.metrics = AnomalyMetrics(self.model.sides, stage == "test", defects, progress=self._shows_bars)
        if stage == "fit" and not self.learns:
            self.trainer.fit_loop.max_epochs = 0
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not what the user gave
            self.trainer.strategy.checkpoint_io = WholeCheckpoints()

    def configure_model(self) -> None:
        """Lends a parameter to DistributedDataParallel, which is made next and refuses a model that trains nothing."""
        parameters = list(self.parameters())
        self._lends = (
            self._fitting and bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
        )
        if self._lends:
            parameters[0].requires_grad_(True)

    def forward(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"] | None = None,
        thing: Int[Tensor, " batch"] | None = None,
        region: Region | None = None,
    ) -> Prediction:
        """Scores images; see `ScoringModel.forward`."""
        return self.model(image, content, thing, region)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Never runs where nothing is learned: there are no epochs."""
        raise NotImplementedError

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """None where nothing is learned; whatever was lent is taken back, now that it was looked at."""
        self._take_back()
        return []

    def _take_back(self) -> None:
        if self._lends:
            next(self.parameters()).requires_grad_(False)
            self._lends = False

    # what is normal

    def on_fit_start(self) -> None:
        """Knows nothing yet: another fit of this model may take as many steps, and has images of its own.

        Raises:
            PatchadError: if an image cannot be read, before anything is learned; it names all of them.
        """
        self._known_at, self.model.canvas = None, self._data.canvas
        self._take_back()  # also where another configure_optimizers, such as of --optimizer, took this one's place
        self.doubts = Doubts()
        for batch in track(self._data.reading_dataloader(), "Reading images", disable=not self._shows_bars):
            self.doubts.add(batch)
        self.doubts.tell()
        self.doubts.check_training()
        if self.learns and not self._data.held_out.any():
            rank_zero_info(
                "all normal images are learned from: there will be more false alarms than the threshold promises"
            )
        normals = self._data.normal_set
        digests = [self.doubts.digests[str(sample.path)] for sample in normals.samples]
        self.fitted = FittedImages(digests, normals.things.tolist(), [False] * len(digests))

    def on_fit_end(self) -> None:
        """Knows what is normal also where no epoch and no checkpoint asked for it."""
        self.remember_normals()
        checkpoint = self.trainer.checkpoint_callback
        if checkpoint is not None and not self.learns and not getattr(checkpoint, "best_model_path", ""):
            rank_zero_info(
                f"{type(checkpoint).__name__} saved nothing, for there were no epochs: take "
                "patchad.callbacks.LastCheckpoint, or trainer.save_checkpoint(path)"
            )

    def know_normals(self) -> None:
        """Learns from the normal images of the datamodule what scores and verdicts need, in eval mode.

        Here it sets the limits, by the scores of the images, each without itself; a subclass does before what it needs.
        """
        scored = self._of_normals("Calibrating", lambda batch: summary(self(*batch.inputs)))
        announce_threshold(self.scorer, *self.model.set_limits(scored, self._unseen))

    def on_train_end(self) -> None:
        """Remembers what no validation did, while the model is still on its device."""
        self.remember_normals()

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
    def _unseen(self) -> Bool[Tensor, " images"]:
        return unseen(self.model, self._data.held_out).to(self.device)

    def on_test_start(self) -> None:
        """Says where the normal images are too few for the rate that was asked for."""
        self.doubts = Doubts(self.fitted.digests)
        note_few_normals(self.scorer)

    on_predict_start = on_test_start

    def _of_normals(self, title: str, compute: Callable[[ImageBatch], Tensor]) -> Tensor:
        """What is computed of each normal image, one row for each, whichever process saw it."""
        batches = self._batches(self._data.normal_dataloader(), title)
        results = [(batch.number.clone(), compute(batch)) for batch in batches]  # a worker's memory holds a file open
        return self._everywhere([number for number, _ in results], [rows for _, rows in results])

    def _everywhere(self, numbers: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """One row for each normal image, whichever process saw it, of the rows of batches and their numbers."""
        rows = parts[0].new_zeros(len(self._data.normal_set), *parts[0].shape[1:])
        for places, values in zip(numbers, parts, strict=True):
            rows[places] = values
        return torch.as_tensor(self.trainer.strategy.reduce(rows, reduce_op="sum"))

    def _total(self, moments: Tensor) -> Tensor:
        """The sum over all processes."""
        gathered = torch.as_tensor(self.all_gather(moments))  # with one process there is no axis of processes
        return gathered.reshape(-1, *moments.shape).sum(0).cpu()

    # validate, test, predict

    def on_validation_start(self) -> None:
        """Before labelled images are scored, what is normal must be known."""
        self.remember_normals()
        self.doubts = Doubts()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> Prediction | None:
        """Measures labelled images, but for those of a sanity check: there is no bank yet."""
        return None if self.trainer.sanity_checking else self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the AUROCs."""
        self._log("val")
        self._tell_doubts()

    def test_step(self, batch: ImageBatch, batch_idx: int) -> Prediction:
        """Measures labelled images."""
        return self._measure(batch)

    def on_test_epoch_end(self) -> None:
        """Logs every metric; tells what makes them doubtful."""
        self._log("test")
        self._tell_doubts()

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Prediction:
        """Scores images."""
        return self._scored(batch)

    def on_predict_epoch_end(self) -> None:
        """Tells what makes scores doubtful."""
        self._tell_doubts()

    def _tell_doubts(self) -> None:
        self.doubts.tell()
        self.doubts.tell_unreadable()

    def _scored(self, batch: ImageBatch, thing: Tensor | None = None) -> Prediction:
        self.doubts.add(batch)
        prediction = self(batch.image, batch.content, thing, given(batch.region))
        check_scores(prediction.score.float().cpu().numpy())
        unreadable = torch.tensor([bool(error) for error in batch.error], device=self.device)
        score = prediction.score.masked_fill(unreadable, torch.nan)
        return prediction._replace(score=score, anomalous=prediction.anomalous | unreadable)

    def _measure(self, batch: ImageBatch) -> Prediction:
        prediction = self._scored(batch, batch.thing)
        size = (batch.mask.shape[1], batch.mask.shape[2])
        maps = {"combined": prediction.map, **prediction.side_maps}
        resized = {name: crop_resize(values, batch.content, size) for name, values in maps.items()}
        self.metrics.update(prediction, batch, resized)
        return prediction

    def _log(self, stage: str) -> None:
        values = self.metrics.compute() if self.metrics.update_called else {}
        self.metrics.reset()
        self.log_dict({f"{stage}/{name}": value.float() for name, value in values.items()}, sync_dist=True)

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is normal, what `ScoringModel.load` needs, and marks the format."""
        self.remember_normals()
        checkpoint["state_dict"] = self.state_dict()
        checkpoint["patchad_format"], checkpoint["patchad_scored_by"] = CHECKPOINT_FORMAT, self.model.scored_by
        checkpoint["patchad_model"] = spec(self.model)
        if "backbone" in self.hparams:
            leave_out_weights(checkpoint, self.hparams, self.CHECKPOINT_HYPER_PARAMS_KEY)
        checkpoint["patchad_fitted"], checkpoint["patchad_updates"] = self.fitted._asdict(), list(self.model.updates)
        checkpoint["patchad_group"] = self.group
        checkpoint["patchad_canvas"] = None if self.model.canvas is None else list(self.model.canvas)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another format; warns where its threshold is another score's."""
        check_format(checkpoint)
        if self._fitting:
            check_contents(checkpoint, GOES_ON)
        current, fitted = self.model.scored_by, checkpoint["patchad_scored_by"]
        self.model.check_fitted(fitted)
        self.fitted, self.group = FittedImages(**checkpoint["patchad_fitted"]), checkpoint["patchad_group"]
        self.model.updates = () if self._fitting else checkpoint["patchad_updates"]
        if checkpoint["patchad_canvas"] is not None:
            self.model.canvas = Canvas.of(checkpoint["patchad_canvas"])
        if (settings := changed_settings(fitted, current)) and not self._fitting:
            rank_zero_warn(f"the threshold was set with {settings}: verdicts do not hold; fit for one of its own")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Torch's, with PatchadError where the state is another model's, or holds numbers that are none."""
        return load_state(self, state_dict, strict, assign)

    # what Lightning gives

    @property
    def _fitting(self) -> bool:
        trainer = self._trainer  # None where there is none
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    @property
    def _shows_bars(self) -> bool:
        return self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None

    @property
    def _data(self) -> PyramidDataModule:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, PyramidDataModule):
            name = type(self).__name__
            raise PatchadError(f"{name} needs a PyramidDataModule: call trainer.fit(model, datamodule=...)")
        return datamodule

    def _batches(self, loader: DataLoader, title: str) -> Iterable[Any]:
        return self._on_device(track(loader, title, disable=not self._shows_bars, transient=True))

    def _on_device(self, batches: Iterable[Any]) -> Iterable[Any]:
        return (self.trainer.strategy.batch_to_device(batch, self.device) for batch in batches)


def leave_out_weights(checkpoint: dict[str, Any], hyperparameters: Mapping[str, Any], key: str) -> None:
    """Describes the backbone in a checkpoint without the file of its weights, which the checkpoint holds.

    Args:
        checkpoint: what is described by `patchad_model`, and by hyperparameters.
        hyperparameters: of the detector.
        key: under which they go there.
    """
    checkpoint["patchad_backbone"] = hyperparameters["backbone"]  # with the weights that it began with
    checkpoint["patchad_model"] = without_weights(checkpoint["patchad_model"])
    checkpoint[key] = {**hyperparameters, "backbone": checkpoint["patchad_model"]["init_args"]["backbone"]}


def announce_threshold(scorer: Scorer, promised: float, ratio: float) -> None:
    """Says what the threshold promises.

    Args:
        scorer: holds it.
        promised: the false-positive rate.
        ratio: how many times as high the scores of images were that were not learned from; 1 if there are none.
    """
    if ratio != 1:
        rank_zero_info(f"images that were not learned from score {ratio:.3g} times as high as the others")
    rank_zero_info(
        f"threshold {float(scorer.threshold):.4g} from {len(scorer.normals)} normal images: "
        f"false-positive rate promised at most {promised:.3g}, asked for {scorer.target_fpr:.3g}"
    )
    note_few_normals(scorer)


def note_few_normals(scorer: Scorer) -> None:
    """Says where the normal images are too few for the rate that was asked for."""
    count, needed = len(scorer.normals), images_needed(scorer.target_fpr)
    if 0 < count < needed:
        rank_zero_info(
            f"{count} normal images cannot promise a false-positive rate of {scorer.target_fpr:.3g}, only "
            f"{1 / (count + 1):.3g}: that takes {needed} of them"
        )
