"""Training samples -> those that are normal, those that are learned from, and those that are not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchad.canvas import content_size
from patchad.data.datasets import ImageDataset, SyntheticDefects
from patchad.data.defects import SMALLEST
from patchad.errors import PatchadError
from patchad.images import native_size
from patchad.types import NORMAL, Sample


def trained(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The normal training samples, and the defective ones."""
    training = [sample for sample in samples if sample.split == "train"]
    return [one for one in training if one.defect == NORMAL], [one for one in training if one.defect != NORMAL]


def hold_out(normals: Sequence[Sample], fraction: float, seed: int, root: str) -> tuple[list[Sample], list[Sample]]:
    """The normal samples to learn from, and a seeded share not to learn from, of whole groups.

    Args:
        normals: of training.
        fraction: that share; at least one image is held out, or with 0 none, and one group is learned from.
        seed: of the choice.
        root: what to call the folder in an error.

    Raises:
        PatchadError: if there are fewer than two groups.
    """
    groups: dict[Any, list[Sample]] = {}
    for sample in normals:
        groups.setdefault(sample.thing, []).append(sample)
    if len(groups) < 2:
        raise PatchadError(
            f"{root} has {len(normals)} training images in {len(groups)} groups of the same thing; at least 2 groups "
            "are needed, one to compare the other with"
        )
    order, candidates = np.random.default_rng(seed).permutation(len(groups)), list(groups.values())
    files = {sample.path for sample in normals}  # a list may hold a file more than once
    count = max(1, round(fraction * len(files))) if fraction else 0
    held_out: set[Path] = set()
    for number in order[:-1]:  # one group at least is left to train on
        if len(held_out) < count:
            held_out.update(sample.path for sample in candidates[number])
    training = [sample for sample in normals if sample.path not in held_out]
    return training, [sample for sample in normals if sample.path in held_out]


def check_room_for_defects(held_out: ImageDataset) -> None:
    """Raises PatchadError unless validation has images that are not learned from, large enough to paint defects on."""
    if not len(held_out):
        raise PatchadError(
            "data.held_out_fraction 0 leaves no images that validation could paint defects on: give 0.1, or "
            "data.validate_on none or test"
        )
    size = held_out.canvas.image_size
    for sample in held_out.samples[: SyntheticDefects.most]:
        try:
            native = native_size(sample.path, held_out.max_megapixels)
        except PatchadError:  # of which a fit tells with all others
            continue
        height, width = content_size(native, size, held_out.canvas.keep_aspect)
        if min(height, width) < SMALLEST:
            raise PatchadError(
                f"{sample.path} is {height} x {width} pixels (height x width) at image_size {size}; defects, which "
                f"validation paints, need {SMALLEST}: raise image_size, or give data.validate_on none or test"
            )
