"""The tuples that travel through patchad."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

NORMAL = "good"
"""Name of the defect type of images without a defect (MVTec AD's own word)."""


UNKNOWN = ""
"""Defect type of images of which nothing is known."""
DIRECTIONS = 12
"""Directions in which a neighbour may lie, evenly spaced, unless another number is asked for."""
Region: TypeAlias = Bool[Tensor, "batch image_height image_width"]
"""True on the pixels of images, as they are scored, that are judged."""
Precision: TypeAlias = Literal["float32", "int8"]
"""Of the backbone in an exported file."""


class Sample(NamedTuple):
    """One image file and what is known about it.

    Attributes:
        path: the image file.
        defect: name of the defect type; `NORMAL` for an image without a defect, `UNKNOWN` if not known.
        mask: mask file of the defect; None where there is none.
        split: the side that the layout puts the image on; of defective images to train on only supervised detectors
            learn.
        group: what the image shows, where several images show the same thing and none of them is tested: for the
            threshold an image is compared with other groups alone, and learning takes all of a group or none of it, so
            that both meet new things as the test does; None is a group of one.
        region: mask file of what is judged of the image; None where that is the same of all images.
    """

    path: Path
    defect: str
    mask: Path | None
    split: Literal["train", "test"]
    group: str | None = None
    region: Path | None = None

    @property
    def thing(self) -> str:
        """Name of what the image shows: its group, or itself where it has none."""
        return self.group or str(self.path)


NOTHING = torch.empty(0, dtype=torch.bool)
"""In place of a region where all of an image is judged."""


class ImageBatch(NamedTuple):
    """Decoded images, as the datamodule yields them.

    Attributes:
        image: RGB in [0, 1], float32 `[batch, 3, height, width]`; the content lies top left, the rest is edge padding.
        content: height x width of the content within `image`, in pixels, int64 `[batch, 2]`.
        size: height x width of the file, in pixels, int64 `[batch, 2]`.
        gain: what the light of the file is multiplied with in `image` (`data.brightness`), up to what resizing does to
            its mean, float32 `[batch]`.
        number: of the image within its dataset, int64 `[batch]`.
        thing: number of what the image shows, among the normal images that fill the bank; -1 if it is none of them;
            int64 `[batch]`.
        label: 1 with a defect, 0 without, -1 unknown, int64 `[batch]`.
        mask: True on defects, bool `[batch, metric_height, metric_width]`; all False where no mask is known. Where a
            supervised detector trains, it lies at the pixels of `image`.
        has_mask: True where `mask` is the truth, bool `[batch]`.
        defect: names of the defect types, one per image.
        path: paths of the files, one per image.
        digest: of the pixels of `image`, the same for copies, int64 `[batch]`; 0, as are doubts empty, in training.
        error: why a file could not be read, one per image, empty where it was; `image` is black and `label` -1 then.
        doubts: what makes figures of an image doubtful, one per image, as ends of sentences, one on each line.
        region: True where an image is judged, bool `[batch, height, width]`; empty where that is its content, as is
            `judged`.
        judged: the same at the size of `mask`, bool `[batch, metric_height, metric_width]`.
    """

    image: Tensor
    content: Tensor
    size: Tensor
    gain: Tensor
    number: Tensor
    thing: Tensor
    label: Tensor
    mask: Tensor
    has_mask: Tensor
    defect: Sequence[str]
    path: Sequence[str]
    digest: Tensor
    error: Sequence[str]
    doubts: Sequence[str]
    region: Tensor = NOTHING
    judged: Tensor = NOTHING

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What a model is given of normal images, each of which it is to compare with the others."""
        return self.image, self.content, self.thing, given(self.region)


class FittedImages(NamedTuple):
    """The normal images that set the threshold, in the order of their scores (`Scorer.normals`).

    Attributes:
        digests: of their pixels (`patchad.data.doubts.digest`).
        things: number of what each shows, as the bank knows it.
        added: whether an image came after the fit, so that no encoder saw it.
        mirrors: axes of an image `[3, height, width]` along which it was reversed and taken into the bank once more.
    """

    digests: Sequence[int] = ()
    things: Sequence[int] = ()
    added: Sequence[bool] = ()
    mirrors: Sequence[Sequence[int]] = ()


class Pyramid(NamedTuple):
    """Patches of one side, all within one window of each image.

    Positions are the top left corners of patches relative to the window, in pixels, int64 `[batch, pyramids, 2]` (row,
    column). Anchors lie in the first view of an image; near, far and neighbour in the second.

    Attributes:
        window: top left corner of the window within the image, in pixels, int64 `[batch, 2]`.
        anchor: the patch that the others are compared with.
        near: where the anchor is, or a few pixels beside it.
        far: a patch that shares nothing with the anchor.
        neighbour: a patch in one of `PyramidPlan.directions` from the anchor.
        direction: the number of that direction, int64 `[batch, pyramids]`; see `patchad.pyramid.displacements`.
    """

    window: Tensor
    anchor: Tensor
    near: Tensor
    far: Tensor
    neighbour: Tensor
    direction: Tensor


class PyramidPlan(NamedTuple):
    """What the datamodule must know of a detector to draw its pyramids.

    Attributes:
        grids: distance in pixels between the places where a patch may lie, by side in pixels.
        cached_views: how many views of each image have cached features; 0 where each epoch makes views of its own.
        resident: whether the detector has the images at hand, and makes views of single patches.
        painted: whether the first view is also wanted with defects painted on it.
        directions: in which a neighbour may lie.
    """

    grids: dict[int, int]
    cached_views: int = 0
    resident: bool = False
    painted: bool = False
    directions: int = DIRECTIONS


class PyramidBatch(NamedTuple):
    """Two views of each image and the patches to compare in them.

    Attributes:
        number: of the image within the training set, int64 `[batch]`.
        views: numbers of the two views, int64 `[batch, 2]`.
        thing: number of what the image shows, the same for all images of a `Sample.group`, int64 `[batch]`.
        content: height x width of the content, in pixels, int64 `[batch, 2]`.
        image: both views, RGB, float32 `[batch, 2, 3, height, width]`; empty where the detector has them at hand.
        painted: the first view with defects painted on it, RGB, float32 `[batch, 3, height, width]`; empty where it is
            not wanted, or where its features are cached.
        mask: True on these defects, bool `[batch, height, width]`; empty where `painted` is.
        region: as in `ImageBatch`, where `painted` is wanted; empty where not.
        sides: the patches by side in pixels.
    """

    number: Tensor
    views: Tensor
    thing: Tensor
    content: Tensor
    image: Tensor
    painted: Tensor
    mask: Tensor
    region: Tensor
    sides: dict[int, Pyramid]


def given(region: Tensor) -> Tensor | None:
    """The region of a batch, as a model takes it: None where it is empty."""
    return region if region.numel() else None


class PatchViews(NamedTuple):
    """Embeddings of the patches of one side, as the losses read them.

    Attributes:
        side: side of the patches in pixels.
        anchor: embeddings, float32 `[patches, dim]`, as are `near`, `far` and `neighbour`.
        near: of the patches (nearly) at the anchors' places.
        far: of patches that share nothing with the anchors; None where the image is too small for them.
        neighbour: of patches in one of the directions; None where the image is too small for them.
        direction: which one, int64 `[patches]`.
        label: pseudo-label of each anchor, int64 `[patches]`; None until the warm-up ends.
        centroids: of the clusters, float32 `[clusters, dim]`; None until the warm-up ends.
        normal: embeddings of the scored patches of the first view, float32 `[normals, dim]`; this and what follows is
            None where no loss needs any of the four.
        thing: number of what each of these patches shows, int64 `[normals]`.
        painted: embeddings of the patches that touch a painted defect, float32 `[defects, dim]`.
        share: of each of these that the defect covers, float32 `[defects]`.
    """

    side: int
    anchor: Tensor
    near: Tensor
    far: Tensor | None
    neighbour: Tensor | None
    direction: Tensor
    label: Tensor | None
    centroids: Tensor | None
    normal: Tensor | None = None
    thing: Tensor | None = None
    painted: Tensor | None = None
    share: Tensor | None = None


class Prediction(NamedTuple):
    """What patchad says about a batch of images.

    Attributes:
        score: anomaly score, float32 `[batch]`; see `Scorer`. Of an image
            that could not be read (`ImageBatch.error`), a detector gives nan, which is anomalous.
        anomalous: the verdict, `score > threshold`, bool `[batch]`.
        map: combined anomaly map at the pixels of `ImageBatch.image`, smoothed, float32 `[batch, height, width]`.
        side_scores: score of each side alone, float32 `[batch]` per side.
        side_maps: map of each side alone, not smoothed, float32 `[batch, height, width]` per side.
    """

    score: Tensor
    anomalous: Tensor
    map: Tensor
    side_scores: dict[int, Tensor]
    side_maps: dict[int, Tensor]
