"""Features of frozen backbones on disk, so that training does not compute them again in every step."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchad.canvas import Size
from patchad.errors import PatchadError, check_range
from patchad.files import is_below_here, write_array
from patchad.models.encoders import DenseEncoder
from patchad.pyramid import window_size
from patchad.spec import Configurable


class FeatureCache(Configurable):
    """Feature maps of some augmented views of each training image, float16, memory-mapped.

    A file holds one tap of one view, `[rows, columns, channels]`; its folders hold the hash of the image file and the
    hash of everything else that the features depend on, so a cache is never out of date. It may be deleted at any
    time when no fit runs.

    Args:
        folder: where the files go.
        views: views of each image.
        max_gigabytes: a larger cache is refused before it is begun.

    Raises:
        PatchadError: if there is less than one view.
    """

    def __init__(self, folder: str = "runs/features", views: int = 2, max_gigabytes: float = 30.0) -> None:
        check_range({"views": views}, 1)
        check_range({"max_gigabytes": max_gigabytes}, 0, above=True)
        self.folder, self.views, self.max_gigabytes = Path(folder), views, max_gigabytes

    def keep_inside(self) -> None:
        """Takes the default folder where its own is not below the current one; a checkpoint names no other."""
        if not is_below_here(self.folder):
            self.folder = Path(FeatureCache().folder)

    def open(self, paths: Sequence[str], key: str, encoder: DenseEncoder, size: Size, painted: bool = False) -> None:
        """Says which images are meant.

        Args:
            paths: the training images, by number.
            key: whatever else the views depend on.
            encoder: makes the features.
            size: height x width of the images in pixels.
            painted: whether each view is also kept with defects painted on it.

        Raises:
            PatchadError: if the cache would be too large.
        """
        if not encoder.backbone.frozen:
            raise PatchadError(
                "features of a backbone that is fine-tuned cannot be cached; set model.learning.cache to null"
            )
        self.names = {side: f"{encoder.tap_names[side]}.npy" for side in encoder.sides}
        self.grids, self.size = encoder.grids, size
        self.home = self.folder / hashlib.sha256(f"{key} {fingerprint(encoder)}".encode()).hexdigest()[:16]
        self.images = [file_hash(Path(path)) for path in paths]
        padded = [length + -length % encoder.multiple for length in size]
        taps = {encoder.tap_names[side]: encoder.taps[side] for side in encoder.sides}.values()
        numbers = sum(tap.channels * padded[0] * padded[1] // tap.stride**2 for tap in taps)
        self.variants = [
            (view, defects) for defects in ((False, True) if painted else (False,)) for view in range(self.views)
        ]
        self.gigabytes = 2 * numbers * len(self.variants) * len(set(self.images)) / 1e9
        if self.gigabytes > self.max_gigabytes:
            raise PatchadError(
                f"the features of {len(paths)} images x {len(self.variants)} views need {self.gigabytes:.1f} GB in "
                f"{self.folder}, more than max_gigabytes {self.max_gigabytes:g}; raise it, or set learning.cache null"
            )

    def missing(self) -> list[tuple[int, int, bool]]:
        """Image, view, and whether it is painted, of what is not there yet, each file's once."""
        first = {image: number for number, image in reversed(list(enumerate(self.images)))}
        pairs = ((number, *view) for number in sorted(first.values()) for view in self.variants)
        return [pair for pair in pairs if not all(self._path(*pair, side).exists() for side in self.names)]

    def write(
        self,
        number: int,
        view: int,
        painted: bool,
        features: Mapping[int, Tensor],
        mask: Bool[Tensor, "height width"],
    ) -> None:
        """Keeps the features of one view, `[channels, rows, columns]` by side, and the mask of a painted one."""
        if painted:
            write_array(self._mask_path(number, view), np.packbits(mask.cpu().numpy(), axis=1))
        for side, values in features.items():
            write_array(self._path(number, view, painted, side), values.permute(1, 2, 0).half().cpu().numpy())

    def read(
        self,
        numbers: Int[Tensor, " batch"],
        views: Int[Tensor, " batch"],
        corners: Mapping[int, Int[Tensor, "batch 2"]],
    ) -> dict[int, Tensor]:
        """Windows of the taps, float32 `[batch, channels, rows, columns]` by side, as from `DenseEncoder.windows`.

        Args:
            numbers: of the images.
            views: of each of them.
            corners: of the windows by side, in pixels.
        """
        pairs = list(zip(numbers.tolist(), views.tolist(), strict=True))
        return {side: self._windows(side, pairs, corners[side]) for side in corners}

    def whole(
        self, numbers: Int[Tensor, " batch"], views: Int[Tensor, " batch"], painted: bool = False
    ) -> dict[int, Tensor]:
        """Whole feature maps, float32 `[batch, channels, rows, columns]` by side, as from `DenseEncoder.features`.

        Args:
            numbers: of the images.
            views: of each of them.
            painted: whether with the defects on them.
        """
        pairs = list(zip(numbers.tolist(), views.tolist(), strict=True))
        return {side: stacked([self._open(*pair, painted, side) for pair in pairs]) for side in self.names}

    def masks(self, numbers: Int[Tensor, " batch"], views: Int[Tensor, " batch"]) -> Bool[Tensor, "batch height width"]:
        """True on the defects of painted views.

        Args:
            numbers: of the images.
            views: of each of them.
        """
        pairs = zip(numbers.tolist(), views.tolist(), strict=True)
        packed = np.stack([np.load(self._mask_path(*pair)) for pair in pairs])
        return torch.from_numpy(np.unpackbits(packed, axis=2, count=self.size[1]).astype(bool))

    def each(self) -> Iterable[dict[int, Tensor]]:
        """The feature maps of all views without defects, `[1, channels, rows, columns]` by side, image by image."""
        for number in range(len(self.images)):
            for view in range(self.views):
                yield {side: stacked([self._open(number, view, False, side)]) for side in self.names}

    def _windows(self, side: int, pairs: Sequence[tuple[int, int]], corners: Tensor) -> Tensor:
        grid, windows = self.grids[side], []
        height, width = window_size(self.size, side, grid)
        for (number, view), (top, left) in zip(pairs, (corners // grid).tolist(), strict=True):
            rows, columns = slice(top, top + height // grid), slice(left, left + width // grid)
            windows.append(self._open(number, view, False, side)[rows, columns])
        return stacked(windows)

    def _open(self, number: int, view: int, painted: bool, side: int) -> np.ndarray:
        return np.load(self._path(number, view, painted, side), mmap_mode="r")

    def _mask_path(self, number: int, view: int) -> Path:
        return self.home / self.images[number] / f"{view}-mask.npy"

    def _path(self, number: int, view: int, painted: bool, side: int) -> Path:
        return self.home / self.images[number] / f"{view}{'-painted' if painted else ''}-{self.names[side]}"


def stacked(maps: Sequence[np.ndarray]) -> Tensor:
    """Maps `[rows, columns, channels]` as one float32 tensor `[maps, channels, rows, columns]`."""
    return torch.from_numpy(np.stack(maps)).float().permute(0, 3, 1, 2)


def file_hash(path: Path) -> str:
    """A hash of a file's bytes and of its name, from which the augmentations are drawn."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(path.name.encode())
    return digest.hexdigest()[:32]


def fingerprint(encoder: DenseEncoder) -> str:
    """A hash of the layers that the taps depend on, of what comes before them, and of the padding."""
    backbone = encoder.backbone
    layers = backbone.until(encoder.tap_names.values())
    settings = (type(backbone).__qualname__, layers, backbone.mean, backbone.deviation, encoder.multiple)
    digest = hashlib.sha256(repr(settings).encode())
    parts = layers.state_dict() | (encoder.mean_image.state_dict() if encoder.mean_image else {})
    for name, values in parts.items():
        digest.update(name.encode() + values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
