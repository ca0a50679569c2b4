"""A cheap look at each epoch, so that a dashboard shows a curve and not one point at the end."""

import copy

import torch
from pytorch_lightning import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, Subset

from patchad.data.datasets import SyntheticDefects
from patchad.detector import Detector
from patchad.errors import check_range
from patchad.memory import MemoryBank
from patchad.metrics import COMBINED, AnomalyMetrics
from patchad.model import Distances, PatchModel
from patchad.pyramid import crop_resize
from patchad.types import ImageBatch, given

VECTORS = 2000
"""Of each of its banks."""


class LearningCurve(Callback):
    """Logs `val/quick_detection_auroc` and `val/quick_segmentation_auroc` after each epoch that learns.

    As validation does, by defects painted on images that are not learned from; but banks of their own hold few patches
    of few images, so that it takes seconds. Figures are therefore lower, and are to be compared with each other alone.
    Nothing of the fit is touched: no bank, no scale, no random number. Where no image is held out, there is no curve.

    Args:
        images: how many training images fill these banks, and how many are measured.
    """

    def __init__(self, images: int = 16) -> None:
        check_range({"images": images}, 2)
        self.images = images

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Detector) -> None:
        """Measures, and logs."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.validate_on == "none" or not len(data.held_out_set) or not isinstance(pl_module.model, PatchModel):
            return
        count, total = min(self.images, len(data.train_set)), len(data.train_set)
        normals = Subset(data.train_set, torch.linspace(0, total - 1, count).long().tolist())
        painted = SyntheticDefects(data.held_out_set, data.seed)
        measured = Subset(painted, range(min(self.images, len(painted))))
        training = pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            figures = quick_figures(pl_module.model, *(self._batches(trainer, part) for part in (normals, measured)))
        pl_module.train(training)
        pl_module.log_dict({f"val/quick_{name}": value.float() for name, value in figures.items()}, sync_dist=True)

    def _batches(self, trainer: Trainer, images: Subset) -> list[ImageBatch]:
        device = trainer.strategy.root_device
        loader = DataLoader(images, batch_size=8, generator=torch.Generator())  # else it draws from that of the fit
        return [trainer.strategy.batch_to_device(batch, device) for batch in loader]


def quick_figures(model: PatchModel, normals: list[ImageBatch], measured: list[ImageBatch]) -> dict[str, torch.Tensor]:
    """Detection and segmentation AUROC of a model whose banks hold some normal images alone.

    Args:
        model: in eval mode.
        normals: fill the banks.
        measured: labelled images.
    """
    small = with_small_banks(model)
    things = torch.cat([batch.thing for batch in normals])
    numbers = torch.arange(len(things), device=things.device).split([len(batch.path) for batch in normals])
    numbered = [batch._replace(number=part) for batch, part in zip(normals, numbers, strict=True)]
    small.remember(((batch, small.embed(batch.image)) for batch in numbered), things)
    small.calibrate(joined(small, numbered), torch.ones(len(things), dtype=torch.bool, device=things.device))
    metrics = AnomalyMetrics(()).to(things.device)
    for batch in measured:
        prediction = small(batch.image, batch.content, None, given(batch.region))
        maps = crop_resize(prediction.map, batch.content, (batch.mask.shape[1], batch.mask.shape[2]))
        metrics.update(prediction, batch, {COMBINED: maps})
    return metrics.compute()


def with_small_banks(model: PatchModel) -> PatchModel:
    """The same encoder and a scorer of its own, with banks of their own that are empty."""
    small = copy.copy(model)
    small._modules = dict(model._modules)
    small.banks = nn.ModuleDict(
        {str(side): MemoryBank(side, VECTORS, baseline=model.bank(side).baseline) for side in model.sides}
    ).to(model.scorer.scale.device)
    small.scorer = copy.deepcopy(model.scorer)
    return small


def joined(model: PatchModel, batches: list[ImageBatch]) -> Distances:
    """Distances of normal images, each compared with the others."""
    parts = [model.distances(*batch.inputs) for batch in batches]
    sides = {side: torch.cat([part.sides[side] for part in parts]) for side in model.sides}
    regions = [part.region for part in parts if part.region is not None]
    content, region = torch.cat([part.content for part in parts]), torch.cat(regions) if regions else None
    return parts[0]._replace(sides=sides, content=content, region=region)
