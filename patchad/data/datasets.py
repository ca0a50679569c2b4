"""Samples -> items: images, pyramids of patches, views, painted defects; each a function of seed and number."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from patchad.canvas import Canvas, Size, content_size, gain
from patchad.data.defects import paint_defect, paint_defects
from patchad.data.doubts import digest, image_doubts
from patchad.decoding import MAX_MEGAPIXELS
from patchad.errors import PatchadError
from patchad.images import (
    Augmentations,
    View,
    augment,
    draw_view,
    native_size,
    on_canvas,
    read_for_canvas,
    region_on_canvas,
)
from patchad.masks import HALF, mask_doubts, read_mask, read_region, resize_mask
from patchad.pyramid import sample_pyramids
from patchad.region import blank, judged, within
from patchad.types import NORMAL, NOTHING, UNKNOWN, ImageBatch, PyramidBatch, PyramidPlan, Sample, given

TRIES = 20
"""Defects at most that are painted for one that lies where an image is judged."""
PLAIN = -1
"""The number of the view that is the image as it is."""
PROBE_EPOCH = -1
"""The epoch whose pyramids the clusters are fitted on; training begins with 0."""


class ImageDataset(Dataset[ImageBatch]):
    """Decodes samples; an item is an `ImageBatch` without its batch axis.

    Args:
        samples: what to decode.
        canvas: what images are brought to.
        metric_size: height x width of masks.
        numbers: of what images show; what is not among them gets -1.
        max_megapixels: a larger file is refused.
        tolerant: whether a file that cannot be read is an item that says so, and not an error; only such items have a
            digest and doubts, which training would not look at.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        canvas: Canvas,
        metric_size: Size,
        numbers: Mapping[str, int] = MappingProxyType({}),
        max_megapixels: float = MAX_MEGAPIXELS,
        tolerant: bool = False,
    ) -> None:
        self.max_megapixels, self.tolerant = max_megapixels, tolerant
        self.samples, self.canvas, self.metric_size = list(samples), canvas, metric_size
        things = [numbers.get(sample.thing, -1) for sample in self.samples]
        self.things: Int[torch.Tensor, " images"] = torch.tensor(things)
        """The number of what each image shows."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> ImageBatch:
        try:
            return self.read(index)
        except PatchadError as error:
            if not self.tolerant:
                raise
            return self._unreadable(index, str(error))

    def read(self, index: int) -> ImageBatch:
        """The item of that index.

        Raises:
            PatchadError: if its files cannot be read.
        """
        sample = self.samples[index]
        native, size = read_for_canvas(sample.path, self.canvas, self.max_megapixels)
        where = self.judged(index, size)
        native = torch.from_numpy(blank(native.numpy(), where))
        image, content = on_canvas(native, self.canvas)
        mask = torch.zeros(self.metric_size, dtype=torch.bool)
        doubts = list(image_doubts(native, image, content, sample)) if self.tolerant else []
        if sample.mask is not None:
            levels = read_mask(sample.mask, size, self.max_megapixels)
            inner = torch.from_numpy(within(levels.numpy(), where))
            mask = resize_mask(inner > HALF, self.metric_size)
            doubts += mask_doubts(levels, inner, mask) if self.tolerant else []
        return ImageBatch(
            image=image,
            content=torch.tensor(content),
            size=torch.tensor(size),
            gain=torch.tensor(self._gain(native)),
            number=torch.tensor(index),
            thing=self.things[index],
            label=torch.tensor({NORMAL: 0, UNKNOWN: -1}.get(sample.defect, 1)),
            mask=mask,
            has_mask=torch.tensor(sample.mask is not None or sample.defect == NORMAL),
            defect=sample.defect,
            path=str(sample.path),
            digest=torch.tensor(digest(image) if self.tolerant else 0),
            error="",
            doubts="\n".join(doubts),
            region=NOTHING if where is None else region_on_canvas(where, content, self.canvas.image_size),
            judged=NOTHING if where is None else region_on_canvas(where, self.metric_size, self.metric_size),
        )

    def judged(self, index: int, size: Size) -> np.ndarray | None:
        """What is judged of an image of that size, bool `[height, width]`; None where that is all of it.

        Raises:
            PatchadError: if its mask cannot be read, or does not fit it.
        """
        path = self.samples[index].region
        own = None if path is None else read_region(path, self.max_megapixels)
        try:
            return judged(self.canvas, size, own)
        except PatchadError as error:
            raise PatchadError(f"{self.samples[index].path}: {error}") from error

    def _gain(self, native: torch.Tensor) -> float:
        brightness = self.canvas.brightness
        return 1.0 if brightness is None else gain(float(native.mean()), brightness)

    def _unreadable(self, index: int, error: str) -> ImageBatch:
        sample, size = self.samples[index], torch.tensor(self.canvas.image_size)
        whole = self.canvas.region is None
        return ImageBatch(
            image=torch.zeros(3, *self.canvas.image_size),
            content=size,
            size=size,
            gain=torch.tensor(1.0),
            number=torch.tensor(index),
            thing=self.things[index],
            label=torch.tensor(-1),
            mask=torch.zeros(self.metric_size, dtype=torch.bool),
            has_mask=torch.tensor(False),
            defect=sample.defect,
            path=str(sample.path),
            digest=torch.tensor(0),
            error=error,
            doubts="",
            region=NOTHING if whole else torch.ones(self.canvas.image_size, dtype=torch.bool),
            judged=NOTHING if whole else torch.ones(self.metric_size, dtype=torch.bool),
        )


class SyntheticDefects(Dataset[ImageBatch]):
    """Normal images and, after each, the same image with a painted defect that depends on (seed, image) alone.

    At most 20 normal images are taken, so that validation costs the same time and memory for any number of them.

    Args:
        normals: the images.
        seed: of the defects.
    """

    most = 20

    def __init__(self, normals: ImageDataset, seed: int) -> None:
        self.normals, self.seed = normals, seed

    def __len__(self) -> int:
        return 2 * min(self.most, len(self.normals))

    def __getitem__(self, index: int) -> ImageBatch:
        normal = self.normals[index // 2]._replace(number=torch.tensor(index))
        return self._with_defect(normal, index) if index % 2 else normal

    def _with_defect(self, normal: ImageBatch, index: int) -> ImageBatch:
        height, width = normal.content.tolist()
        for attempt in range(TRIES):  # until some of it lies where the image is judged
            seed = (self.seed, index, attempt) if attempt else (self.seed, index)
            image, mask = paint(normal.image, (height, width), paint_defect, seed, given(normal.region))
            if mask.any():
                break
        else:
            return normal
        return normal._replace(
            image=image,
            label=torch.tensor(1),
            mask=resize_mask(mask[:height, :width], self.normals.metric_size),
            defect="synthetic",
        )


Painter = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""Image `[height, width, 3]` and generator to the painted image and the mask of what was painted."""


def paint(
    image: torch.Tensor, content: Size, painter: Painter, seed: tuple[int, ...], region: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The image `[3, height, width]` with its content (height x width in pixels) painted on, and the mask.

    Where there is a region, bool `[height, width]`, what is painted beside it is left out.
    """
    height, width = content
    painted, where = painter(image[:, :height, :width].permute(1, 2, 0).numpy(), np.random.default_rng(seed))
    mask = torch.zeros(image.shape[1:], dtype=torch.bool)
    mask[:height, :width] = torch.from_numpy(where)
    mask = mask if region is None else mask & region
    changed = image.clone()
    changed[:, :height, :width] = torch.from_numpy(painted).permute(2, 0, 1)
    return torch.where(mask, changed, image), mask


class PyramidDataset(Dataset[PyramidBatch]):
    """Two views of each image with pyramids of patches; an item is a `PyramidBatch` without its batch axis.

    An index is the number of an image, plus as often as it was drawn before the number of images. Everything about an
    item is a function of (seed, epoch, index), so neither workers nor processes change it.

    Args:
        images: the training images.
        plan: which sides, on which grids, from which views.
        count: pyramids per image and side, each time that it is drawn.
        augmentations: how far the views differ from the image.
        seed: of all that is drawn.
        draws: how often each image is drawn in an epoch.
    """

    def __init__(
        self,
        images: ImageDataset,
        plan: PyramidPlan,
        count: int,
        augmentations: Augmentations,
        seed: int,
        draws: int = 1,
    ) -> None:
        self.images, self.plan, self.count, self.augmentations, self.seed = images, plan, count, augmentations, seed
        self.draws = draws
        self._sizes: dict[int, Size] = {}
        self._extents: dict[int, tuple[Size, Size]] = {}

    def __len__(self) -> int:
        return len(self.images) * self.draws

    def __getitem__(self, place: tuple[int, int]) -> PyramidBatch:
        epoch, index = place
        draw, number = divmod(index, len(self.images))
        generator = np.random.default_rng((self.seed, epoch - PROBE_EPOCH, index))
        views = self._views((epoch - PROBE_EPOCH) * self.draws + draw, generator)
        first, second = (self.drawn(number, view) for view in views)
        shift = (second.shift[0] - first.shift[0], second.shift[1] - first.shift[1])
        size, content = self.images.canvas.image_size, self._content(number)
        image, painted, mask = torch.empty(0), torch.empty(0), NOTHING
        region = self._region(number) if self.plan.painted else NOTHING
        box, start = self._extent(number)
        if not (self.plan.cached_views or self.plan.resident):
            image = self._view_pair(number, first, second)
            if self.plan.painted:
                painted, mask = self._painted(image[0], number, views[0])
        return PyramidBatch(
            number=torch.tensor(number),
            views=torch.tensor(views),
            thing=self.images.things[number],
            content=torch.tensor(content),
            image=image,
            painted=painted,
            mask=mask,
            region=region,
            sides={
                side: sample_pyramids(size, box, side, grid, self.count, shift, generator, start, self.plan.directions)
                for side, grid in self.plan.grids.items()
            },
        )

    def _views(self, turn: int, generator: np.random.Generator) -> tuple[int, int]:
        """The numbers of both views in the turn of an image, of all its turns in all epochs."""
        cached = self.plan.cached_views
        if self.plan.resident:
            return PLAIN, PLAIN
        if not cached:
            return 2 * turn, 2 * turn + 1
        first, second = generator.choice(cached, 2, replace=cached < 2).tolist()
        return first, second

    def _view_pair(self, number: int, first: View, second: View) -> torch.Tensor:
        image = self.images[number].image
        return torch.stack([augment(image, first), augment(image, second)])

    def _native(self, number: int) -> Size:
        if number not in self._sizes:
            self._sizes[number] = native_size(self.images.samples[number].path, self.images.max_megapixels)
        return self._sizes[number]

    def _content(self, number: int) -> Size:
        canvas = self.images.canvas
        return content_size(self._native(number), canvas.image_size, canvas.keep_aspect)

    def _region(self, number: int) -> torch.Tensor:
        where = self.images.judged(number, self._native(number))
        size = self.images.canvas.image_size
        return NOTHING if where is None else region_on_canvas(where, self._content(number), size)

    def _extent(self, number: int) -> tuple[Size, Size]:
        """Height x width of the box around what is judged of an image, and its top left corner."""
        if number not in self._extents:
            region = self._region(number)
            whole = given(region) is None
            self._extents[number] = (self._content(number), (0, 0)) if whole else extent(region)
        return self._extents[number]

    def drawn(self, number: int, view: int) -> View:
        """How a view of an image differs from it: a function of (seed, file name, view), so that a cache stays true."""
        if view == PLAIN:
            return View((0, 0), np.zeros(3, np.float32), 0.0, ())
        return draw_view(self._seed(number, view), self.augmentations)

    def _seed(self, number: int, view: int) -> tuple[int, int, int]:
        return self.seed, zlib.crc32(self.images.samples[number].path.name.encode()), view

    def view(self, number: int, view: int) -> torch.Tensor:
        """The view itself, `[3, height, width]`."""
        return augment(self.images[number].image, self.drawn(number, view))

    def painted(self, number: int, view: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The view with defects painted on it, and the mask of them, `[height, width]`."""
        return self._painted(self.view(number, view), number, view)

    def _painted(self, image: torch.Tensor, number: int, view: int) -> tuple[torch.Tensor, torch.Tensor]:
        seed = (*self._seed(number, view), 2)  # with 1 the noise of the view is drawn
        return paint(image, self._content(number), paint_defects, seed, given(self._region(number)))


def extent(region: torch.Tensor) -> tuple[Size, Size]:
    """Height x width of the box around a region, bool `[height, width]`, and its top left corner."""
    places = region.nonzero()
    (top, left), (bottom, right) = places.amin(0).tolist(), places.amax(0).tolist()
    return (bottom + 1 - top, right + 1 - left), (top, left)


class ViewDataset(Dataset[tuple[int, int, bool, torch.Tensor, torch.Tensor]]):
    """Some views of the training images: number, view, whether painted, the view itself, the mask of what is painted.

    Args:
        pyramids: makes the views.
        views: number, view, and whether defects are painted on it, of each item.
    """

    def __init__(self, pyramids: PyramidDataset, views: Sequence[tuple[int, int, bool]]) -> None:
        self.pyramids, self.views = pyramids, list(views)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[int, int, bool, torch.Tensor, torch.Tensor]:
        number, view, painted = self.views[index]
        if painted:
            return number, view, painted, *self.pyramids.painted(number, view)
        image = self.pyramids.view(number, view)
        return number, view, painted, image, torch.zeros(image.shape[1:], dtype=torch.bool)


class EpochSampler(DistributedSampler):
    """Images in an order that is a function of (seed, epoch), each with its epoch."""

    first = (0, 0)
    """The epoch that is read first, and how many of its images are not."""

    def begin(self, epoch: int, seen: int) -> None:
        """Sets both."""
        self.set_epoch(epoch)
        self.first = (epoch, seen)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Epoch and number of each image."""
        epoch, seen = self.first
        numbers = itertools.islice(super().__iter__(), seen if self.epoch == epoch else 0, None)
        return ((self.epoch, number) for number in numbers)


class EpochLoader(DataLoader):
    """Tells Lightning that it goes on where it was: its items are a function of epoch and batch alone."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what was read is known from the progress of the fit."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing."""
