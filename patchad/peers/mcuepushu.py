"""MCuePush U-Net: a supervised detector, which learns where defects are from images with masks."""

import torch
from jaxtyping import Bool, Float, Int
from scipy.ndimage import find_objects
from scipy.ndimage import label as label_components
from torch import Tensor
from torch.nn import functional as F

from patchad.detector import Detector
from patchad.errors import PatchadError, check_range
from patchad.masks import EIGHT_NEIGHBOURS
from patchad.model import ScoringModel
from patchad.peers.cues import saliency
from patchad.peers.unet import LEAST_SIDE, Push, UNet, deepest
from patchad.scoring import Scorer, ScorerFactory, content_pixels
from patchad.spec import hyperparameters
from patchad.types import ImageBatch, Prediction, Region, given


class MCuePushUModel(ScoringModel):
    """MCue shows a U-Net what stands out; its Push network says where the defect is.

    The map is the loss that the U-Net would have at a pixel without a defect, `-log(1 - p)` of the probability p of
    one: in the order of p, and without its upper bound, at which thresholds that are raised would find nothing.

    Args:
        scorer: makes what scores the map and holds the threshold; with one map there is nothing to combine.
        width: channels of the U-Net's highest resolution; each lower one has twice as many.

    Raises:
        PatchadError: if the width is below 1.
    """

    def __init__(self, scorer: ScorerFactory = Scorer, width: int = 32) -> None:
        super().__init__()
        check_range({"width": width}, 1)
        self.scorer = scorer((0,))
        self.network, self.push = UNet(3, width), Push(deepest(width))

    def shown(
        self, image: Float[Tensor, "batch 3 height width"], content: Int[Tensor, "batch 2"], region: Region | None
    ) -> Float[Tensor, "batch 3 height width"]:
        """What the U-Net sees: the image with MCue's saliency in place of green."""
        return torch.stack([image[:, 0], saliency(image, content, region), image[:, 2]], dim=1)

    def detect(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
        region: Region | None = None,
    ) -> Prediction:
        """Maps, scores and verdicts; no image is compared with others, so that `thing` makes no difference."""
        logits = self.network(self.shown(image, content, region)).float()
        judged = content_pixels(content, *logits.shape[1:], region=region) > 0
        maps = F.softplus(logits).where(judged, 0)
        return self.judge(maps, self.scorer.smooth(maps, content, region=region), content, region)


class MCuePushU(Detector[MCuePushUModel]):
    """Fits an `MCuePushUModel` to images with masks of their defects, and sets a threshold by normal images.

    Source: Huang, Qiu, Yuan, Surface defect saliency of magnetic tile, The Visual Computer 36, 2020 (and CASE 2018),
    https://doi.org/10.1007/s00371-018-1588-5, and its authors' code, https://github.com/qiucongying/Mcue.

    As there: a saliency of five cues in place of one channel, a U-Net of five resolutions from 32 channels, cross
    entropy of pixels in which defects count twice, squared error of a box where there is exactly one defect, batches of
    8, half of the defects to train on. Otherwise, with the reasons:

    * Whole images, not crops of 98 x 98 pixels of enlarged ones: every detector here scores images whole.
    * Batch normalisation, a first guess of few defects, and ten times the learning rate, which does not fall: fits of
      few epochs.
    * Both losses at once, where the authors' code trains one after the other: one fit, one checkpoint.
    * The Push network sees 4 x 4 cells, whatever the size of the image, by layers as wide as the U-Net's lowest
      resolution: 4096 units on all pixels would be 90 million weights. Its box is learned, and no figure is made of it.
    * Images are mirrored and moved by affine maps, in each epoch anew, and not by moving least squares once.
    * The cues themselves (`patchad.peers.cues`): what exported files can compute.

    Args:
        scorer: makes what scores the map and holds the threshold.
        width: channels of the U-Net's highest resolution; each lower one has twice as many.
        learning_rate: of Adam.

    Raises:
        PatchadError: if an option is out of range, or, in `setup`, if images are too small or there are no defects to
            learn from.
    """

    def __init__(self, scorer: ScorerFactory = Scorer, width: int = 32, learning_rate: float = 1e-3) -> None:
        super().__init__()
        check_range({"learning_rate": learning_rate}, 0, above=True)
        self.save_hyperparameters(hyperparameters(self))
        self.model, self.learning_rate = MCuePushUModel(scorer, width), learning_rate

    def setup(self, stage: str) -> None:
        """Also asks the datamodule for labelled images.

        Raises:
            PatchadError: if images are too small, or there are no defects to learn from.
        """
        super().setup(stage)
        if stage != "fit":
            return
        if min(self._data.image_size) < LEAST_SIDE:
            raise PatchadError(
                f"image_size {self._data.image_size} is too small for the U-Net: give {LEAST_SIDE} or more"
            )
        if all(sample.mask is None for sample in self._data.labelled_set.samples):
            raise PatchadError(
                f"MCuePushU learns from defects, and {self._data.root} has none with a mask to train on: give "
                "--data.layout MagneticTile --data.layout.labelled 0.5, or a detector that needs none"
            )
        self._data.plan = None  # whole images with masks

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam over all weights."""
        return [torch.optim.Adam(self.parameters(), lr=self.learning_rate)]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Labelled images -> logits and boxes -> the sum of both losses."""
        features = self.model.network.encode(self.model.shown(batch.image, batch.content, given(batch.region)))
        pixels = pixel_loss(self.model.network.decode(features), batch.mask)
        boxes = box_loss(self.model.push(features[-1]), batch.mask)
        loss = pixels + boxes
        self.terms = {"train/pixels": pixels.detach(), "train/boxes": boxes.detach(), "train/loss": loss.detach()}
        self.log_dict(self.terms, on_step=False, on_epoch=True, batch_size=len(batch.image), sync_dist=True)
        return loss


def pixel_loss(
    logits: Float[Tensor, "batch height width"], mask: Bool[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Mean cross entropy of pixels, of which those of defects count twice; there are none beside the content."""
    return F.binary_cross_entropy_with_logits(logits.float(), mask.float(), 1 + mask.float())


def box_loss(boxes: Float[Tensor, "batch 4"], mask: Bool[Tensor, "batch height width"]) -> Float[Tensor, ""]:
    """Mean squared error of the boxes of images that have one defect; 0 if there are none."""
    found = [only_box(one) for one in mask]
    known = torch.tensor([box is not None for box in found], device=boxes.device)
    true = torch.tensor([box or (0.0,) * 4 for box in found], device=boxes.device)
    return ((boxes.float() - true).square().mean(1) * known).sum() / known.sum().clamp(min=1)


def only_box(mask: Bool[Tensor, "height width"]) -> tuple[float, float, float, float] | None:
    """Middle row and column, height and width of the only defect, over those of the image; None of none or several.

    Defects are the 8-connected components, as in `PerRegionOverlap`.

    Example:
        >>> mask = torch.zeros(10, 20, dtype=torch.bool)
        >>> mask[2:6, 5:15] = True
        >>> only_box(mask)
        (0.4, 0.5, 0.4, 0.5)
    """
    components, count = label_components(mask.cpu().numpy(), EIGHT_NEIGHBOURS)  # type: ignore[misc]
    if count != 1:
        return None
    rows, columns = find_objects(components)[0]
    height, width = mask.shape
    middle = ((rows.start + rows.stop) / 2 / height, (columns.start + columns.stop) / 2 / width)
    return *middle, (rows.stop - rows.start) / height, (columns.stop - columns.start) / width
