"""Pictures of what validation sees, epoch by epoch."""

from pytorch_lightning import Callback, Trainer

from patchad.callbacks.pictures import SheetEntry, readable, sheet, sheet_entry
from patchad.callbacks.publish import publish_picture, run_folder
from patchad.detector import Detector
from patchad.errors import check_range
from patchad.types import ImageBatch, Prediction


class AnomalyMaps(Callback):
    """Writes `anomaly_maps/epoch_<N>.png` at each validation: image, truth and heat map of the first labelled images.

    Args:
        images: how many.
    """

    def __init__(self, images: int = 8) -> None:
        check_range({"images": images}, 1)
        self.images = images

    def on_validation_start(self, trainer: Trainer, pl_module: Detector) -> None:
        """Starts with nothing to show."""
        self.entries: list[SheetEntry] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Detector,
        outputs: Prediction | None,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the first labelled images."""
        if outputs is not None:
            missing = self.images - len(self.entries)
            self.entries += [sheet_entry(outputs, batch, number) for number in readable(batch)[:missing]]

    def on_validation_end(self, trainer: Trainer, pl_module: Detector) -> None:
        """Writes the picture."""
        folder = run_folder(trainer)
        if trainer.is_global_zero and self.entries:
            picture = sheet(self.entries, pl_module.scorer.limits)
            path = folder / "anomaly_maps" / f"epoch_{trainer.current_epoch:04d}.png"
            publish_picture(trainer, path, picture, "anomaly_maps")
