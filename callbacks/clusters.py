"""A montage of patches per cluster, to see what pseudo-labels mean."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from patchad.callbacks.pictures import montage, to_rgb
from patchad.callbacks.publish import publish_picture, run_folder
from patchad.data.datasets import PyramidDataset
from patchad.detector import Detector
from patchad.errors import check_range
from patchad.pyramid import cut
from patchad.types import PyramidBatch


class Clusters(Callback):
    """Writes `clusters/epoch_<N>_side_<K>.png` at each validation: a row per cluster, the largest first.

    Args:
        clusters: rows.
        patches: patches in a row.
    """

    def __init__(self, clusters: int = 10, patches: int = 12) -> None:
        check_range({"clusters": clusters, "patches": patches}, 1)
        self.clusters, self.patches = clusters, patches
        self.views: dict[tuple[int, int], Tensor] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: Detector) -> None:
        """Writes the montages, once there are pseudo-labels."""
        folder = run_folder(trainer)
        if not trainer.is_global_zero or trainer.sanity_checking or pl_module.learning is None:
            return
        self.views.clear()
        for side, labels in pl_module.learning.probe_labels.items():
            picture = self.picture(trainer.datamodule.pyramids, pl_module.learning.probe_batches, side, labels)  # type: ignore[attr-defined]
            path = folder / "clusters" / f"epoch_{trainer.current_epoch:04d}_side_{side}.png"
            publish_picture(trainer, path, picture, f"clusters/side_{side}")

    def picture(
        self, pyramids: PyramidDataset, batches: Sequence[PyramidBatch], side: int, labels: Tensor
    ) -> Image.Image:
        """The montage of one side.

        Args:
            pyramids: makes the views.
            batches: the probe patches.
            side: of the patches in pixels.
            labels: of all of them.
        """
        sizes = torch.bincount(labels.cpu())
        order = sizes.argsort(descending=True, stable=True)[: self.clusters]
        chosen = [(labels.cpu() == number).nonzero()[: self.patches, 0].tolist() for number in order]
        rows = [[self.patch(pyramids, batches, side, place) for place in places] for places in chosen if places]
        captions = [f"{int(number)}: {int(sizes[number])}" for number in order]
        return montage(list(zip(captions, rows, strict=False)), cell=48)

    def patch(self, pyramids: PyramidDataset, batches: Sequence[PyramidBatch], side: int, place: int) -> np.ndarray:
        """The pixels of the probe patch at some place of the labels."""
        for batch in batches:
            pyramid = batch.sides[side]
            images, count = pyramid.anchor.shape[:2]
            if place < images * count:
                row, column = divmod(place, count)
                key = (int(batch.number[row]), int(batch.views[row, 0]))
                if key not in self.views:
                    self.views[key] = pyramids.view(*key)
                corner = (pyramid.window[row] + pyramid.anchor[row, column])[None]
                return to_rgb(cut(self.views[key][None], corner, (side, side))[0])
            place -= images * count
        raise IndexError(place)
