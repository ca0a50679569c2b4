"""Training images that are least like the others: perhaps one has a defect."""

import numpy as np
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import default_collate

from patchad.callbacks.pictures import PANELS, SheetEntry, contact_sheet, panels, sheet_entry
from patchad.callbacks.publish import publish_picture, run_folder
from patchad.data.datasets import ImageDataset
from patchad.detector import Detector
from patchad.errors import check_range, printable
from patchad.types import ImageBatch


class PossibleDefects(Callback):
    """Names the training images of the lowest p-values at the end of a fit, and writes `possible_defects.png`.

    Each image is compared with the others: its p-value is the share of the training images, itself among them, that
    score as high or higher. A defect that stays among them is taken for normal, and so is all that looks like it.

    Args:
        images: how many.
    """

    def __init__(self, images: int = 5) -> None:
        check_range({"images": images}, 1)
        self.images = images

    def teardown(self, trainer: Trainer, pl_module: Detector, stage: str) -> None:
        """Names them and writes the picture, after the checkpoint."""
        if stage != "fit":
            return
        folder, normals = run_folder(trainer), pl_module.scorer.normals.cpu().numpy()
        if not trainer.is_global_zero:
            return
        dataset: ImageDataset = trainer.datamodule.normal_set  # type: ignore[attr-defined]
        numbers = np.argsort(-normals, kind="stable")[: self.images].tolist()
        shares = [f"{np.mean(normals >= normals[number]):.2g}" for number in numbers]
        entries = [entry_of(trainer, pl_module, dataset[number]) for number in numbers]
        map_threshold = pl_module.scorer.limits.map_threshold
        rows = [
            (f"{entry.name}\nscore {entry.score:.4g}\np-value {share}", panels(entry, map_threshold))
            for entry, share in zip(entries, shares, strict=True)
        ]
        picture, path = contact_sheet(rows, PANELS), folder / "possible_defects.png"
        publish_picture(trainer, path, picture, "possible_defects")
        names = ", ".join(
            f"{dataset.samples[number].path} ({share})" for number, share in zip(numbers, shares, strict=True)
        )
        sentence = f"possible defects among the training images, by p-value: {names}; pictures: {path}"
        rank_zero_info(printable(sentence))


@torch.no_grad()
def entry_of(trainer: Trainer, detector: Detector, image: ImageBatch) -> SheetEntry:
    """One image of a dataset, compared with others."""
    training = detector.training
    batch = trainer.strategy.batch_to_device(default_collate([image]), detector.device)
    with trainer.precision_plugin.forward_context():
        prediction = detector.eval()(*batch.inputs)
    detector.train(training)
    return sheet_entry(prediction, batch, 0)
