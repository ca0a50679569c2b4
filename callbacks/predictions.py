"""`patchad predict` -> scores.csv, and a picture or a map of each image."""

from collections import Counter
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_info

from patchad.callbacks.pictures import SheetEntry
from patchad.callbacks.rows import Rows
from patchad.conformal import Limits
from patchad.detector import Detector
from patchad.drawing import heat, outlined
from patchad.errors import PatchadError
from patchad.files import map_name, write_array, write_picture
from patchad.results import Row
from patchad.types import ImageBatch, Prediction

Maps = Literal["none", "overlay", "heatmap", "float16"]


class Predictions(Rows):
    """Writes what `patchad predict` found into `predictions/` of the run folder.

    `scores.csv` holds a row for each image (`patchad.results.Row`). Below `maps/`, in the folders of the images, lies
    what is asked for of each, at the size at which it was scored, which has all that a map can tell.

    Args:
        maps: `none`; `overlay`, the image with an outline of what lies above the threshold of the map; `heatmap`, the
            map in colours (see `patchad.drawing.heat`); or `float16`, its numbers as `.npy`, `[height, width]`.

    Raises:
        PatchadError: if there are no such maps.
    """

    def __init__(self, maps: Maps = "overlay") -> None:
        if maps not in get_args(Maps):
            raise PatchadError(f"maps {maps} are none of {', '.join(get_args(Maps))}")
        self.maps = maps

    def on_predict_start(self, trainer: Trainer, pl_module: Detector) -> None:
        """Starts with no rows."""
        self.begin(trainer, "predictions")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Detector,
        outputs: Prediction,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the rows of a batch, and writes what is asked for of its images."""
        self.take(trainer, pl_module, outputs, batch)

    def show(self, trainer: Trainer, row: Row, entry: SheetEntry, limits: Limits) -> None:
        """Writes what is asked for of an image."""
        root = Path(trainer.datamodule.root)  # type: ignore[attr-defined]
        path = self.folder / "maps" / Path(row.path).relative_to(root)
        if self.maps == "float16":
            values = entry.map.clip(max=float(np.finfo(np.float16).max)).astype(np.float16)
            write_array(path.with_name(map_name(path.name, ".npy")), values)
        elif self.maps != "none":
            if self.maps == "overlay":
                drawn = outlined(entry.image, entry.map > limits.map_threshold)
            else:
                drawn = heat(entry.map, limits.map_threshold)
            write_picture(path.with_name(map_name(path.name, f".{self.maps}.png")), Image.fromarray(drawn))

    def on_predict_end(self, trainer: Trainer, pl_module: Detector) -> None:
        """Writes `scores.csv`, and says how many images have which verdict."""
        rows = self.finish(trainer)
        counts = Counter(row.verdict for row in rows)
        said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        rank_zero_info(f"{len(rows)} images: {said}\npredictions: {self.folder}")
