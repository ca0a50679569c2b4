"""One door to what encoders read of training views: computed from images in each step, kept on disk, or at hand."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchad.canvas import Size
from patchad.data.datasets import PLAIN
from patchad.errors import PatchadError
from patchad.images import Augmentations
from patchad.models.cache import FeatureCache
from patchad.models.encoders import DenseEncoder, PyramidEncoder, SlidingEncoder, in_float32
from patchad.pyramid import cut_patches
from patchad.types import ImageBatch, Pyramid, PyramidBatch

KEPT = 500_000_000
"""Bytes of feature maps of normal images that a process keeps at most, about 800 images of 384 x 384 pixels."""


class EmbeddedPyramids(NamedTuple):
    """Embeddings of the patches of one side, float32 `[images, pyramids, dim]` each.

    Attributes:
        side: of the patches in pixels.
        anchor: by the encoder as it is, as are the next three.
        near: see `Pyramid`.
        far: the same.
        neighbour: the same.
        held: of the anchors, by an encoder that is held; None where none was given.
    """

    side: int
    anchor: Tensor
    near: Tensor
    far: Tensor
    neighbour: Tensor
    held: Tensor | None


class Features:
    """Features of training views, computed from their images in each step.

    Args:
        encoder: reads them.

    Attributes:
        views: how many views of each image there are; 0 where each epoch makes views of its own.
        resident: whether images are kept here, and views made of single patches.
        place: what is kept, how large it is, and where it lies; empty where nothing is.
    """

    views, resident, place = 0, False, ""

    def __init__(self, encoder: PyramidEncoder) -> None:
        self.encoder = encoder

    def open(
        self, paths: Sequence[str], key: str, size: Size, painted: bool, augmentations: Augmentations
    ) -> list[tuple[int, int, bool]]:
        """Opens what is kept of images; returns number, view and whether it is painted of what `keep` must be given.

        Args:
            paths: the training images, by number.
            key: whatever else the views depend on.
            size: height x width of the images in pixels.
            painted: whether views are also wanted with defects painted on them.
            augmentations: how far views differ from images.
        """
        return []

    def keep_inside(self) -> None:
        """Has what is kept below the current folder."""

    def keep(self, numbers: Tensor, views: Tensor, painted: Tensor, images: Tensor, masks: Tensor) -> None:
        """Keeps the features of some views: what `ViewDataset` yields."""

    def observed(self, images: Iterable[Tensor]) -> Iterable[dict[int, Tensor]]:
        """What the encoders of each side read, to be standardised by: of the images, or of what is kept."""
        return (self.encoder.observable(image) for image in images)

    def read(self, batch: PyramidBatch, turn: Sequence[int]) -> Any:
        """What `embedded_pyramids` and `anchors` need of a batch.

        Args:
            batch: the images.
            turn: whatever is drawn is a function of these numbers.
        """
        return [self.windows(batch, view) for view in (0, 1)]

    def windows(self, batch: PyramidBatch, view: int) -> dict[int, Tensor]:
        """What `PyramidEncoder.embed` needs of the first (0) or second (1) view of each image, by side."""
        return self.encoder.windows(batch.image[:, view], corners(batch))

    def anchors(self, read: Any, batch: PyramidBatch) -> dict[int, Float[Tensor, "images pyramids dim"]]:
        """Embeddings of the anchors alone, by side."""
        return {side: self.encoder.embed(side, read[0][side], pyramid.anchor) for side, pyramid in batch.sides.items()}

    def embedded_pyramids(
        self, read: Any, batch: PyramidBatch, held: PyramidEncoder | None = None
    ) -> Iterator[EmbeddedPyramids]:
        """Embeddings of all patches, side by side.

        Args:
            read: what `read` gave.
            batch: the images.
            held: embeds the anchors, too.
        """
        first, second = read
        sources = first if held is None else self._held_windows(first, batch, held)
        for side, pyramid in batch.sides.items():
            count = pyramid.anchor.shape[1]
            partners = torch.cat([pyramid.near, pyramid.far, pyramid.neighbour], dim=1)
            anchor = self.encoder.embed(side, first[side], pyramid.anchor)
            embedded = self.encoder.embed(side, second[side], partners).split(count, dim=1)
            with torch.no_grad():
                fixed = None if held is None else held.embed(side, sources[side], pyramid.anchor)
            near, far, neighbour = embedded
            yield EmbeddedPyramids(side, anchor, near, far, neighbour, fixed)

    @torch.no_grad()
    def _held_windows(
        self, first: Mapping[int, Tensor], batch: PyramidBatch, held: PyramidEncoder
    ) -> Mapping[int, Tensor]:
        """The first view as a held encoder reads it: the same where the backbone learns nothing."""
        return first if self.encoder.backbone.frozen else held.windows(batch.image[:, 0], corners(batch))

    def embedded(self, batch: PyramidBatch, painted: bool) -> dict[int, Tensor]:
        """Embeddings of the first views at every scoring position, `[batch, dim, rows, columns]` by side."""
        return self.encoder(batch.painted if painted else batch.image[:, 0])

    def masks(self, batch: PyramidBatch) -> Bool[Tensor, "batch height width"]:
        """True on the defects that are painted on the first views."""
        return batch.mask


class CachedFeatures(Features):
    """Features of training views, as a `FeatureCache` keeps them.

    Args:
        encoder: reads them.
        cache: keeps them.

    Raises:
        PatchadError: if the encoder passes no whole images through its backbone.
    """

    def __init__(self, encoder: PyramidEncoder, cache: FeatureCache) -> None:
        if not isinstance(encoder, DenseEncoder):
            raise PatchadError("mode sliding has no features to cache; set learning.cache to null")
        self.encoder: DenseEncoder = encoder
        self.cache, self.views = cache, cache.views

    def keep_inside(self) -> None:
        """Has the cache below the current folder."""
        self.cache.keep_inside()

    def open(
        self, paths: Sequence[str], key: str, size: Size, painted: bool, augmentations: Augmentations
    ) -> list[tuple[int, int, bool]]:
        """What is missing in the cache.

        Raises:
            PatchadError: if the cache would be too large, or the backbone is fine-tuned.
        """
        self.cache.open(paths, key, self.encoder, size, painted)
        self.place = f"feature cache: {self.cache.gigabytes:.2f} GB in {self.cache.home}"
        return self.cache.missing()

    def keep(self, numbers: Tensor, views: Tensor, painted: Tensor, images: Tensor, masks: Tensor) -> None:
        """Computes the features of the images, and writes them and the masks of painted ones."""
        features = self.encoder.features(images)
        for place, pair in enumerate(zip(numbers.tolist(), views.tolist(), painted.tolist(), strict=True)):
            self.cache.write(*pair, {side: values[place] for side, values in features.items()}, masks[place])

    def observed(self, images: Iterable[Tensor]) -> Iterable[dict[int, Tensor]]:
        """The feature maps of all views without defects."""
        return self.cache.each()

    def windows(self, batch: PyramidBatch, view: int) -> dict[int, Tensor]:
        """Read from the cache."""
        windows = self.cache.read(batch.number, batch.views[:, view], corners(batch))
        return {side: window.to(batch.content.device) for side, window in windows.items()}

    def embedded(self, batch: PyramidBatch, painted: bool) -> dict[int, Tensor]:
        """Read from the cache and embedded."""
        features = self.cache.whole(batch.number, batch.views[:, 0], painted)
        return self.encoder.embed_features({side: maps.to(batch.content.device) for side, maps in features.items()})

    def masks(self, batch: PyramidBatch) -> Bool[Tensor, "batch height width"]:
        """Read from the cache."""
        return self.cache.masks(batch.number, batch.views[:, 0]).to(batch.content.device)


class ResidentImages(Features):
    """Patches of training images that stay on the encoder's device, each with colour and noise of its own.

    So do the authors of the paper (Tsai et al., WACV 2022). Nothing is decoded in a step, and all patches of a side
    pass the encoder together. Images take 12 bytes a pixel: 1000 of 256 x 256 pixels 0.8 GB.

    Args:
        encoder: reads them.

    Attributes:
        images: RGB in [0, 1], float32 `[images, 3, height, width]`.
    """

    resident = True

    def __init__(self, encoder: SlidingEncoder) -> None:
        self.encoder: SlidingEncoder = encoder
        self.images, self.augmentations = torch.empty(0), Augmentations()

    def open(
        self, paths: Sequence[str], key: str, size: Size, painted: bool, augmentations: Augmentations
    ) -> list[tuple[int, int, bool]]:
        """All images, as they are."""
        self.augmentations, self.images = augmentations, torch.empty(0)  # those of an earlier fit go first
        self.images = torch.empty(len(paths), 3, *size, device=self.encoder.backbone.input_mean.device)
        self.place = f"training images: {self.images.nbytes / 1e9:.2f} GB on {self.images.device}"
        return [(number, PLAIN, False) for number in range(len(paths))]

    def keep(self, numbers: Tensor, views: Tensor, painted: Tensor, images: Tensor, masks: Tensor) -> None:
        """Keeps the images."""
        self.images[numbers] = self.encoder.prepare(images)

    def read(self, batch: PyramidBatch, turn: Sequence[int]) -> dict[int, Tensor]:
        """Anchor, near, far and neighbour of each side, `[4, images, pyramids, 3, side, side]`."""
        generator = torch.Generator(self.images.device)
        generator.manual_seed(int(np.random.SeedSequence(turn).generate_state(1)[0]))
        return {side: self._patches(batch.number, side, pyramid, generator) for side, pyramid in batch.sides.items()}

    def _patches(self, numbers: Tensor, side: int, pyramid: Pyramid, generator: torch.Generator) -> Tensor:
        places = torch.cat([pyramid.anchor, pyramid.near, pyramid.far, pyramid.neighbour], dim=1)
        patches = cut_patches(self.images, places + pyramid.window[:, None], (side, side), numbers)
        drawn = (self.augmentations.colour, (*patches.shape[:3], 1, 1)), (self.augmentations.noise, patches.shape)
        for deviation, shape in drawn:
            if deviation:
                added = torch.randn(shape, generator=generator, device=patches.device)
                patches = patches + deviation * self.encoder.unit * added
        return patches.unflatten(1, (4, -1)).transpose(0, 1)

    def anchors(
        self, read: Mapping[int, Tensor], batch: PyramidBatch
    ) -> dict[int, Float[Tensor, "images pyramids dim"]]:
        """Embeddings of the anchors alone, by side."""
        return {side: embedded(self.encoder, side, patches[0]) for side, patches in read.items()}

    def embedded_pyramids(
        self, read: Mapping[int, Tensor], batch: PyramidBatch, held: PyramidEncoder | None = None
    ) -> Iterator[EmbeddedPyramids]:
        """Embeddings of all patches, those of a side together."""
        assert held is None or isinstance(held, SlidingEncoder)
        for side, patches in read.items():
            with torch.no_grad():
                fixed = None if held is None else embedded(held, side, patches[0])
            anchor, near, far, neighbour = embedded(self.encoder, side, patches)
            yield EmbeddedPyramids(side, anchor, near, far, neighbour, fixed)


class NormalFeatures:
    """Embeddings of normal images, whose features a fit needs to measure its encoders, to fill banks and to calibrate.

    Where the backbone does not change, feature maps of the first images are kept, up to `KEPT` bytes, so that these
    are decoded and pass the backbone once.

    Args:
        encoder: embeds.
        read: gives the batches of this process, under a title, from the one of some number on.
        changing: whether the backbone may change.
    """

    def __init__(
        self, encoder: PyramidEncoder, read: Callable[[str, int], Iterable[ImageBatch]], changing: bool
    ) -> None:
        self.encoder, self._read = encoder, read
        self._keeping = encoder if isinstance(encoder, DenseEncoder) and not changing else None
        self.forget()

    def forget(self) -> None:
        """Keeps nothing."""
        self._kept: list[tuple[ImageBatch, dict[int, Tensor]]] = []
        self._room, self._all = torch.empty(0), False

    def observed(self, title: str) -> Iterator[tuple[ImageBatch, dict[int, Tensor]]]:
        """Batches, without the images of those that are kept, and what the encoders of each side read."""
        yield from self._kept
        if self._all:
            return
        first = count = len(self._kept)
        for count, batch in enumerate(self._read(title, first), first + 1):
            features = self.encoder.observable(batch.image)
            self._keep(count, batch, features)
            yield batch, features
        self._all = len(self._kept) == count

    def _keep(self, count: int, batch: ImageBatch, features: dict[int, Tensor]) -> None:
        """Keeps a batch where all before it are kept and there is room, in one piece: the heap would have holes."""
        if self._keeping is None or len(self._kept) < count - 1:
            return
        maps = {values.data_ptr(): values for values in features.values()}  # sides share taps
        if count == 1:
            first = next(iter(maps.values()))
            self._room = first.new_empty(KEPT // first.itemsize)
        sizes = [values.numel() for values in maps.values()]
        if sum(sizes) > len(self._room):
            return
        *parts, self._room = self._room.split([*sizes, len(self._room) - sum(sizes)])
        for part, (place, values) in zip(parts, list(maps.items()), strict=True):
            maps[place] = part.as_strided_(values.shape, values.stride()).copy_(values)
        kept = {side: maps[values.data_ptr()] for side, values in features.items()}
        self._kept.append((without_images(batch), kept))

    def embedded(self, title: str) -> Iterator[tuple[ImageBatch, dict[int, Float[Tensor, "batch dim rows columns"]]]]:
        """Batches without their images, and the embeddings of their patches by side."""
        if self._keeping is None:
            pairs = ((batch, self.encoder(batch.image)) for batch in self._read(title, 0))
        else:
            embed = self._keeping.embed_features
            pairs = ((batch, embed(features)) for batch, features in self.observed(title))
        return ((without_images(batch), in_float32(embeddings)) for batch, embeddings in pairs)


def without_images(batch: ImageBatch) -> ImageBatch:
    """A batch without images and masks, to be kept: not in the shared memory of a worker, which holds files open."""
    bare = batch._replace(image=batch.image[:, :0], mask=batch.mask[:, :0])._asdict()
    return batch._replace(**{name: values.clone() for name, values in bare.items() if isinstance(values, Tensor)})


def embedded(
    encoder: SlidingEncoder, side: int, patches: Float[Tensor, "*places 3 side side"]
) -> Float[Tensor, "*places dim"]:
    """Embeddings of prepared patches."""
    return encoder.encode(side, patches.flatten(0, -4)).unflatten(0, patches.shape[:-3])


def corners(batch: PyramidBatch) -> dict[int, Tensor]:
    """Top left corners of the windows that hold the pyramids, in pixels, by side."""
    return {side: pyramid.window for side, pyramid in batch.sides.items()}
