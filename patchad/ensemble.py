"""Several fitted detectors that score together."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from pytorch_lightning.cli import instantiate_module
from torch import Tensor, nn

from patchad.data import PyramidDataModule
from patchad.detector import Detector
from patchad.errors import PatchadError
from patchad.module import PatchDetector, without_weights
from patchad.pyramid import at_pixels
from patchad.scoring import Scorer
from patchad.spec import hyperparameters, spec
from patchad.types import Prediction

Made = TypeVar("Made", PatchDetector, PyramidDataModule)

SHARED = ("image_size", "keep_aspect", "brightness", "held_out_fraction", "seed")
"""Settings of the data that the members and their ensemble must share, beside root and layout."""


class Ensemble(Detector):
    """Combines the maps of fitted detectors, as a detector combines those of its sides.

    Detectors that see different things, by another backbone or with and without learning, err on different images; by
    the product of their maps, a patch is anomalous where all of them agree. Nothing is learned: a fit, without epochs,
    sets a threshold for all together. Not in the paper; PatchCore (Roth et al., CVPR 2022) has ensembles of backbones.

    Args:
        members: checkpoints of `PatchDetector`, fitted with the data settings that the ensemble is fitted with. A
            checkpoint of the ensemble holds them whole, and has their hyperparameters as JSON in place of the paths.
        scorer: combines the maps of the members, each over its level on normal images; a `SplitScorer` names members by
            their number, from 0.

    Raises:
        PatchadError: if there are fewer than two members, or one is not a checkpoint of a `PatchDetector`.
    """

    def __init__(self, members: Sequence[str | Path], scorer: Scorer | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(hyperparameters(self))
        if len(members) < 2:
            raise PatchadError(
                f"members {list(members)} are no ensemble; give the checkpoints of two or more detectors"
            )
        self.fitted_on: dict[str, dict[str, Any]] = {}  # data settings of the members that come from a checkpoint
        self.members = nn.ModuleList(self._member(str(one)) for one in members)
        self.scorer = (scorer or Scorer(combination="product", smoothing=4.0)).prepare(range(len(members)))
        if self.scorer.combination == "excess":
            raise PatchadError("an ensemble knows no excess of its members; give combination product or sum")
        self.scorer.scale.copy_(torch.tensor([one.scorer.normal_level for one in self._detectors]))

    def _member(self, given: str) -> PatchDetector:
        if given.startswith("{"):  # a checkpoint of the ensemble fills it
            return made(PatchDetector, json.loads(given))
        if not Path(given).is_file():
            raise PatchadError(f"member {given} does not exist; patchad fit prints the path of its checkpoint")
        try:
            checkpoint = torch.load(given, map_location="cpu", weights_only=True)
            detector = made(PatchDetector, checkpoint[PatchDetector.CHECKPOINT_HYPER_PARAMS_KEY])
            detector.on_load_checkpoint(checkpoint)
            detector.load_state_dict(checkpoint["state_dict"])
            self.fitted_on[given] = checkpoint[PyramidDataModule.CHECKPOINT_HYPER_PARAMS_KEY]
        except Exception as error:
            told = str(error).strip().partition("\n")[0]
            raise PatchadError(f"member {given} is no checkpoint of a PatchDetector: {told}") from error
        return detector

    @property
    def _detectors(self) -> list[PatchDetector]:
        return [one for one in self.members if isinstance(one, PatchDetector)]

    def setup(self, stage: str) -> None:
        """Also checks that the members were fitted on what the ensemble is fitted on.

        Raises:
            PatchadError: if one was not, or there are epochs.
        """
        super().setup(stage)
        if stage != "fit":
            return
        if self.trainer.max_epochs != 0:
            raise PatchadError("an ensemble has nothing to learn; give --config ensemble, or --trainer.max_epochs 0")
        for path, settings in self.fitted_on.items():
            check_same_data(path, made(PyramidDataModule, settings), self._data)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Never runs: there are no epochs."""

    def configure_optimizers(self) -> None:
        """None: there is nothing to learn."""

    @property
    def learns(self) -> bool:
        """Whether a member learned from the training images."""
        return any(one.learns for one in self._detectors)

    def know_normals(self) -> None:
        """Sets the threshold from the normal images; the rest the members know."""
        scores = self._of_normals("Calibrating", lambda batch: self(batch.image, batch.content, batch.thing).score)
        self.set_threshold(scores, self._unseen)

    def detect(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
    ) -> Prediction:
        """The product (or sum) of the members' maps, with its scores and verdicts; members alone are not measured."""
        scored, shown, size = {}, {}, (image.shape[2], image.shape[3])
        for number, one in enumerate(self._detectors):
            cells = one.side_maps(one.distances(image, content, thing))
            maps = {side: at_pixels(values, one.cell, size) for side, values in cells.items()}
            scored[number], shown[number] = one.scorer.combine(maps), one.scorer.outline(maps)
        combined = self.scorer.combine(scored)
        scores = self.scorer.score(combined, content)
        outlined = self.scorer.smooth(self.scorer.outline(shown), content)
        return Prediction(scores, scores > self.scorer.threshold, outlined, {}, {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Names the members by what they are, so that their checkpoints are not needed again."""
        super().on_save_checkpoint(checkpoint)
        members = [json.dumps(without_weights(one.hparams)) for one in self._detectors]
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**self.hparams, "members": members}


def made(kind: type[Made], hparams: Mapping[str, Any]) -> Made:
    """The detector or datamodule that hyperparameters of a checkpoint name."""
    return instantiate_module(kind, {name: value for name, value in hparams.items() if name != "_instantiator"})


def check_same_data(path: str, theirs: PyramidDataModule, ours: PyramidDataModule) -> None:
    """Raises PatchadError unless a member was fitted on the same images, split and fitted to the size in one way."""
    our_settings = data_settings(ours)
    for name, their in data_settings(theirs).items():
        our = our_settings[name]
        if their != our:
            raise PatchadError(
                f"member {path} was fitted with data.{name} {their}, not {our}: it sees other images, or knows those "
                "that set the threshold; give the data options of its fit"
            )


def data_settings(data: PyramidDataModule) -> dict[str, Any]:
    """What makes images and their split what they are."""
    settings = {name: spec(getattr(data, name)) for name in SHARED}
    return {**settings, "root": str(Path(data.root).resolve()), "layout": data.hparams.get("layout")}
