"""DifferNet: how likely a normalizing flow finds the features of an image, as a detector of the framework."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from patchad.detector import Detector, announce_threshold
from patchad.errors import PatchadError, check_range
from patchad.model import ScoringModel
from patchad.models.backbones import AlexNet, Backbone
from patchad.scoring import Scorer, ScorerFactory
from patchad.spec import hyperparameters, spec
from patchad.types import Prediction, PyramidBatch, PyramidPlan, Region

STEPS = (1, 2, 4)
"""Pixels from one that is read to the next, at each of the scales."""
CLAMP = 3.0
"""A coupling block scales a number by exp(3) at most, and exp(-3) at least (equation 2 of the source)."""


class DifferNetModel(ScoringModel):
    """Scores an image by the mean square of what a flow makes of its features, over rotations of the image.

    The map is the score at every pixel: the authors localise by gradients, which an exported file does not have, and
    measure no map.

    Args:
        backbone: image -> feature maps, frozen; None is `AlexNet`. Its deepest tap is read at three scales.
        transforms: rotations of an image, evenly spread.
        blocks: coupling blocks of the flow.
        hidden: width of the three hidden layers in each of their subnetworks.
        scorer: holds the threshold.

    Raises:
        PatchadError: if a number is below 1, the backbone is trainable, or FrEIA is missing.
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        transforms: int = 64,
        blocks: int = 8,
        hidden: int = 2048,
        scorer: ScorerFactory = Scorer,
    ) -> None:
        super().__init__()
        check_range({"transforms": transforms, "blocks": blocks, "hidden": hidden}, 1)
        self.backbone, self.transforms, self.scorer = backbone or AlexNet(), transforms, scorer((0,))
        if not self.backbone.frozen:
            raise PatchadError("DifferNet trains its flow alone: leave out model.backbone.trainable")
        self.tap = list(self.backbone.taps)[-1]
        self.flow = flow(len(STEPS) * self.backbone.tap(self.tap).channels, blocks, hidden)

    def features(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch transforms numbers"]:
        """What the flow reads of each rotation; one rotation after the other, so that memory stays bounded."""
        turns = (rotated(image, 2 * math.pi * number / self.transforms) for number in range(self.transforms))
        return torch.stack([self._features(turned) for turned in turns], dim=1)

    def _features(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch numbers"]:
        with torch.autocast(image.device.type, enabled=False):  # limits are set and held in float32
            maps = [self.backbone(image[:, :, ::step, ::step], [self.tap])[self.tap] for step in STEPS]
            return torch.cat([F.max_pool2d(values, 3, 2, 1).mean((2, 3)) for values in maps], dim=1)

    def scores(self, features: Float[Tensor, "batch transforms numbers"]) -> Float[Tensor, " batch"]:
        """The mean square of what the flow gives: 1 on the mean of images that it knows."""
        with torch.autocast(features.device.type, enabled=False):
            latent, _ = self.flow(features.flatten(0, 1), jac=False)
        return latent.unflatten(0, (-1, self.transforms)).square().mean((1, 2))

    def loss(self, features: Float[Tensor, "rows numbers"]) -> Float[Tensor, ""]:
        """Negative log-likelihood of each number, but for a constant (equation 4 of the source)."""
        latent, log_determinant = self.flow(features)
        return (latent.square().sum(1) / 2 - log_determinant).mean() / features.shape[1]

    def detect(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
        region: Region | None = None,
    ) -> Prediction:
        """Scores and verdicts, and maps that are the score wherever an image is judged."""
        scores = self.scores(self.features(image))[:, None, None].expand(-1, *image.shape[2:])
        return self.judge(scores, self.scorer.smooth(scores, content, region=region), content, region)

    @property
    def scored_by(self) -> dict[str, Any]:
        """Also the rotations, which may be others than those of the fit."""
        return {**super().scored_by, "transforms": self.transforms}


class DifferNet(Detector[DifferNetModel]):
    """Fits a `DifferNetModel`: its flow learns the features of normal images.

    They are computed once, under all rotations, and kept in memory. An epoch reads each image once, under two rotations
    that the datamodule draws. Limits are set from the same features.

    Source: Rudolph, Wandt, Rosenhahn, Same Same But DifferNet, WACV 2021; https://github.com/marco-rudolph/differnet.
    Other than there, training knows only the rotations that scores come from; an epoch has two of them, not four, of an
    image; a tenth of the images is held out; feature maps are padded to whole strides, also where the last is pooled.

    Args:
        backbone: image -> feature maps; this and what follows up to `scorer` is explained at `DifferNetModel`.
        transforms: rotations of an image, evenly spread.
        blocks: coupling blocks of the flow.
        hidden: width of their hidden layers.
        scorer: holds the threshold.
        learning_rate: of Adam.
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        transforms: int = 64,
        blocks: int = 8,
        hidden: int = 2048,
        scorer: ScorerFactory = Scorer,
        learning_rate: float = 2e-4,
    ) -> None:
        super().__init__()
        check_range({"learning_rate": learning_rate}, 0, above=True)
        self.model, self.learning_rate = DifferNetModel(backbone, transforms, blocks, hidden, scorer), learning_rate
        self.save_hyperparameters({**hyperparameters(self), **spec(self.model)["init_args"]})

    def setup(self, stage: str) -> None:
        """Also asks the datamodule for the numbers of images and of two rotations, in place of pyramids."""
        super().setup(stage)
        if stage == "fit":
            self._data.plan = PyramidPlan({}, cached_views=self.model.transforms)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam, as the authors set it."""
        trained = (parameter for parameter in self.parameters() if parameter.requires_grad)
        return [torch.optim.Adam(trained, self.learning_rate, betas=(0.8, 0.8), eps=1e-4, weight_decay=1e-5)]

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Computes the features of all normal images under all rotations."""
        super().on_fit_start()
        self.normal_features = self._of_normals("Rotating images", lambda batch: self.model.features(batch.image))
        self.training_features = self.normal_features[~self._data.held_out.to(self.device)]

    def training_step(self, batch: PyramidBatch, batch_idx: int) -> Tensor:
        """Numbers of images and rotations -> features -> loss."""
        loss = self.model.loss(self.training_features[batch.number[:, None], batch.views].flatten(0, 1))
        self.terms = {"train/loss": loss.detach()}
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch.number))
        return loss

    def know_normals(self) -> None:
        """Sets the limits by the features that are kept: the backbone, which takes longest, has seen the images."""
        scores = torch.cat([self.model.scores(part) for part in self.normal_features.split(64)])
        announce_threshold(self.scorer, *self.model.set_limits(torch.stack([scores, scores], dim=1), self._unseen))


def rotated(image: Float[Tensor, "batch 3 height width"], angle: float) -> Float[Tensor, "batch 3 height width"]:
    """Images turned about their centre by an angle in radians, to the nearest pixels; 0 where there was none."""
    height, width = image.shape[2:]
    sine, cosine = math.sin(angle), math.cos(angle)
    turn = [[[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]]]
    grid = F.affine_grid(image.new_tensor(turn), [1, 1, height, width], align_corners=False)
    turned = F.grid_sample(image.flatten(0, 1)[None], grid, mode="nearest", align_corners=False)
    return turned[0].unflatten(0, (-1, 3))


def flow(numbers: int, blocks: int, hidden: int) -> nn.Module:
    """A flow of glow coupling blocks, each after a permutation, whose seed is its number, as the authors have it.

    Args:
        numbers: how many it reads, and gives.
        blocks: how many of each there are.
        hidden: width of the three hidden layers in each subnetwork.

    Raises:
        PatchadError: if FrEIA is missing.
    """
    try:
        from FrEIA.framework import SequenceINN
        from FrEIA.modules import GLOWCouplingBlock, PermuteRandom
    except ModuleNotFoundError as error:
        raise PatchadError('DifferNet needs an extra: pip install "patchad[peers]"') from error
    sequence, state = SequenceINN(numbers), np.random.get_state()
    for number in range(blocks):
        sequence.append(PermuteRandom, seed=number)
        sequence.append(
            GLOWCouplingBlock,
            subnet_constructor=lambda given, wanted: subnetwork(given, hidden, wanted),
            clamp=CLAMP,
            clamp_activation=lambda raw: 0.636 * torch.atan(raw / CLAMP),
        )
    np.random.set_state(state)  # which permutations have seeded
    return sequence


def subnetwork(given: int, hidden: int, wanted: int) -> nn.Sequential:
    """Three hidden layers of one width, with ReLU."""
    inner = [part for _ in range(2) for part in (nn.Linear(hidden, hidden), nn.ReLU())]
    return nn.Sequential(nn.Linear(given, hidden), nn.ReLU(), *inner, nn.Linear(hidden, wanted))
