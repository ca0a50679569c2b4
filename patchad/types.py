"""The tuples that travel through patchad, and the one error that a user can mend."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

Size = tuple[int, int]
"""Height x width in pixels."""

NORMAL = "good"
"""Name of the defect type of images without a defect (MVTec AD's own word)."""


UNKNOWN = ""
"""Defect type of images of which nothing is known."""


class PatchadError(ValueError):
    """Something that the user can mend: the command line prints it as one line and exits with 2."""


class Sample(NamedTuple):
    """One image file and what is known about it.

    Attributes:
        path: the image file.
        defect: name of the defect type; `NORMAL` for an image without a defect, `UNKNOWN` if not known.
        mask: mask file of the defect; None where there is none.
        split: the side that the layout puts the image on.
    """

    path: Path
    defect: str
    mask: Path | None
    split: Literal["train", "test"]


class ImageBatch(NamedTuple):
    """Decoded images, as the datamodule yields them.

    Attributes:
        image: RGB in [0, 1], float32 `[batch, 3, height, width]`; the content lies top left, the rest is edge padding.
        content: height x width of the content within `image`, in pixels, int64 `[batch, 2]`.
        size: height x width of the file, in pixels, int64 `[batch, 2]`.
        number: of the image within its dataset, int64 `[batch]`.
        label: 1 with a defect, 0 without, -1 unknown, int64 `[batch]`.
        mask: True on defects, bool `[batch, metric_height, metric_width]`; all False where no mask is known.
        has_mask: True where `mask` is the truth, bool `[batch]`.
        defect: names of the defect types, one per image.
        path: paths of the files, one per image.
    """

    image: Tensor
    content: Tensor
    size: Tensor
    number: Tensor
    label: Tensor
    mask: Tensor
    has_mask: Tensor
    defect: Sequence[str]
    path: Sequence[str]


class Prediction(NamedTuple):
    """What patchad says about a batch of images.

    Attributes:
        score: anomaly score, float32 `[batch]`; in units of the calibration normals' mean distance, summed over sides.
        anomalous: the verdict, `score > threshold`, bool `[batch]`.
        map: combined anomaly map at the pixels of `ImageBatch.image`, float32 `[batch, height, width]`.
        side_scores: score of each side alone, float32 `[batch]` per side.
        side_maps: map of each side alone, float32 `[batch, height, width]` per side.
    """

    score: Tensor
    anomalous: Tensor
    map: Tensor
    side_scores: dict[int, Tensor]
    side_maps: dict[int, Tensor]
