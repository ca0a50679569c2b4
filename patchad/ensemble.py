"""Several fitted models that score together."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patchad.checkpoint import read_checkpoint
from patchad.data.datamodule import PyramidDataModule
from patchad.data.regions import short
from patchad.detector import Detector
from patchad.errors import PatchadError
from patchad.model import PatchModel, ScoringModel, without_weights
from patchad.pyramid import at_pixels
from patchad.scoring import Scorer, ScorerFactory
from patchad.spec import hyperparameters, spec
from patchad.trust import made
from patchad.types import Prediction, Region

SHARED = ("image_size", "keep_aspect", "brightness", "region", "held_out_fraction", "seed")
"""Settings of the data that the members and their ensemble must share, beside root and layout."""


class EnsembleModel(ScoringModel):
    """Combines the maps of fitted models, as a `PatchModel` combines those of its sides.

    Args:
        members: fitted models.
        scorer: combines the maps of the members, which it knows by their number, each over its level on normal images.

    Raises:
        PatchadError: if there are fewer than two members, or the scorer combines excesses.
    """

    def __init__(self, members: Sequence[PatchModel], scorer: ScorerFactory) -> None:
        super().__init__()
        if len(members) < 2:
            raise PatchadError(f"{len(members)} members are no ensemble; give the checkpoints of two or more detectors")
        self.members = nn.ModuleList(members)
        self.scorer = scorer(range(len(members)))
        if self.scorer.combination == "excess":
            raise PatchadError("an ensemble knows no excess of its members; give combination product or sum")
        self.scorer.scale.copy_(torch.tensor([member.scorer.normal_level for member in members]))

    def detect(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
        region: Region | None = None,
    ) -> Prediction:
        """The product (or sum) of the members' maps, with its scores and verdicts; members alone are not measured."""
        combined, outlined, size = {}, {}, (image.shape[2], image.shape[3])
        for number, member in enumerate(self.members):
            assert isinstance(member, PatchModel)
            cells = member.side_maps(member.distances(image, content, thing, region))
            maps = {side: at_pixels(values, member.cell, size) for side, values in cells.items()}
            combined[number], outlined[number] = member.scorer.combine(maps), member.scorer.outline(maps)
        shown = self.scorer.smooth(self.scorer.outline(outlined), content, region=region)
        return self.judge(self.scorer.combine(combined), shown, content, region)


class Ensemble(Detector[EnsembleModel]):
    """Fits an `EnsembleModel`: nothing is learned, a threshold is set for all members together.

    Detectors that see different things, by another backbone or with and without learning, err on different images; by
    the product of their maps, a patch is anomalous where all of them agree. Not in the paper; PatchCore (Roth et al.,
    CVPR 2022) has ensembles of backbones.

    Args:
        members: checkpoints of `PatchDetector`, fitted with the data settings that the ensemble is fitted with. A
            checkpoint of the ensemble holds them whole, and describes them as JSON in place of the paths.
        scorer: makes what combines their maps; see `EnsembleModel`.

    Raises:
        PatchadError: if there are fewer than two members, or one is not a checkpoint of a `PatchDetector`.
    """

    def __init__(self, members: Sequence[str | Path], scorer: ScorerFactory = Scorer) -> None:
        super().__init__()
        self.save_hyperparameters(hyperparameters(self))
        self.fitted_on: dict[str, dict[str, Any]] = {}  # data settings of the members that come from a checkpoint
        self.model = EnsembleModel([self._member(str(path)) for path in members], scorer)

    def _member(self, source: str) -> PatchModel:
        if source.startswith("{"):  # a checkpoint of the ensemble fills it
            return made(PatchModel, json.loads(source), "a member")
        checkpoint = read_checkpoint(Path(source), "member")
        self.fitted_on[source] = checkpoint[PyramidDataModule.CHECKPOINT_HYPER_PARAMS_KEY]
        return PatchModel.of_checkpoint(checkpoint, source)

    @property
    def learns(self) -> bool:
        """False: members have learned what they know."""
        return False

    def setup(self, stage: str) -> None:
        """Also checks that the members were fitted on what the ensemble is fitted on.

        Raises:
            PatchadError: if one was not.
        """
        super().setup(stage)
        if stage == "fit":
            for path, settings in self.fitted_on.items():
                check_same_data(path, settings, self._data)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describes the members by what they are, so that their checkpoints are not needed again."""
        super().on_save_checkpoint(checkpoint)
        described = checkpoint["patchad_model"]
        members = [without_weights(member) for member in described["init_args"]["members"]]
        described["init_args"]["members"] = members
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**self.hparams, "members": [*map(json.dumps, members)]}


def check_same_data(path: str, settings: dict[str, Any], datamodule: PyramidDataModule) -> None:
    """Raises PatchadError unless a member was fitted on the same images, split and fitted to the size in one way.

    Args:
        path: of the member.
        settings: hyperparameters of the datamodule of its fit.
        datamodule: of the ensemble.
    """
    ensemble_settings = spec(datamodule.init_args)
    for name in (*SHARED, "layout", "root"):
        fitted, expected = settings[name], ensemble_settings[name]
        if name == "root":
            fitted, expected = (str(Path(root).resolve()) for root in (fitted, expected))
        if name == "region":
            fitted, expected = short(fitted), short(expected)
        if fitted != expected:
            raise PatchadError(
                f"member {path} was fitted with data.{name} {fitted}, not {expected}: it sees other images, or knows "
                "those that set the threshold; give the data options of its fit"
            )
