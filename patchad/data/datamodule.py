"""Samples -> batches: which images train, calibrate, validate and test, and how they reach the model."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from pytorch_lightning import LightningDataModule
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler

from patchad.canvas import Size, content_size
from patchad.data.images import (
    Augmentations,
    View,
    augment,
    draw_view,
    fit,
    native_size,
    read_image,
    read_mask,
    resize_mask,
)
from patchad.data.layouts import Layout, detect_layout, images_below, printable
from patchad.data.synthetic import FORMAT, SMALLEST, paint_defect, paint_defects
from patchad.errors import PatchadError
from patchad.pyramid import sample_pyramids
from patchad.spec import Configurable, hyperparameters
from patchad.types import NORMAL, UNKNOWN, ImageBatch, PyramidBatch, PyramidPlan, Sample, painted_view

MOST_SHIFT = 2
"""Pixels; two views then differ by at most 4, which the window of side 16's pyramids has room for."""
PROBE_EPOCH = -1
"""The epoch whose pyramids the clusters are fitted on; training begins with 0."""
PROBE_IMAGES = 32
"""Most images that the clusters are fitted on, each with `pyramids_per_image` anchors."""


class ImageDataset(Dataset[ImageBatch]):
    """Decodes samples; an item is an `ImageBatch` without its batch axis.

    Args:
        samples: what to decode.
        image_size: height x width in pixels.
        keep_aspect: pad instead of distorting.
        metric_size: height x width of masks.
        brightness: mean to which the pixels of each image are scaled; None leaves them.
        numbers: of what images show; what is not among them gets -1.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size: Size,
        keep_aspect: bool,
        metric_size: Size,
        brightness: float | None = None,
        numbers: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.samples, self.image_size, self.keep_aspect = list(samples), image_size, keep_aspect
        self.metric_size, self.brightness = metric_size, brightness
        self.things: Int[torch.Tensor, " images"] = torch.tensor([numbers.get(one.thing, -1) for one in self.samples])
        """The number of what each image shows."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> ImageBatch:
        sample = self.samples[index]
        native = read_image(sample.path)
        size = (native.shape[1], native.shape[2])
        image, content = fit(native, self.image_size, self.keep_aspect, self.brightness)
        mask = torch.zeros(self.metric_size, dtype=torch.bool)
        if sample.mask is not None:
            mask = resize_mask(read_mask(sample.mask, size), self.metric_size)
        return ImageBatch(
            image=image,
            content=torch.tensor(content),
            size=torch.tensor(size),
            number=torch.tensor(index),
            thing=self.things[index],
            label=torch.tensor({NORMAL: 0, UNKNOWN: -1}.get(sample.defect, 1)),
            mask=mask,
            has_mask=torch.tensor(sample.mask is not None or sample.defect == NORMAL),
            defect=sample.defect,
            path=str(sample.path),
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
        image, mask = paint(normal.image, (height, width), paint_defect, (self.seed, index))
        return normal._replace(
            image=image,
            label=torch.tensor(1),
            mask=resize_mask(mask[:height, :width], self.normals.metric_size),
            defect="synthetic",
        )


Painter = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""Image `[height, width, 3]` and generator to the painted image and the mask of what was painted."""


def paint(
    image: torch.Tensor, content: Size, painter: Painter, seed: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The image `[3, height, width]` with its content (height x width in pixels) painted on, and the mask."""
    height, width = content
    painted, region = painter(image[:, :height, :width].permute(1, 2, 0).numpy(), np.random.default_rng(seed))
    image, mask = image.clone(), torch.zeros(image.shape[1:], dtype=torch.bool)
    image[:, :height, :width] = torch.from_numpy(painted).permute(2, 0, 1)
    mask[:height, :width] = torch.from_numpy(region)
    return image, mask


class PyramidDataset(Dataset[PyramidBatch]):
    """Two views of each image with pyramids of patches; an item is a `PyramidBatch` without its batch axis.

    Everything about an item is a function of (seed, epoch, image), so neither workers nor processes change it.

    Args:
        images: the training images.
        plan: which sides, on which grids, from which views.
        count: pyramids per image and side.
        augmentations: how far the views differ from the image.
        seed: of all that is drawn.
    """

    def __init__(
        self, images: ImageDataset, plan: PyramidPlan, count: int, augmentations: Augmentations, seed: int
    ) -> None:
        self.images, self.plan, self.count, self.augmentations, self.seed = images, plan, count, augmentations, seed
        self._contents: dict[int, Size] = {}

    def __getitem__(self, place: tuple[int, int]) -> PyramidBatch:
        epoch, number = place
        generator = np.random.default_rng((self.seed, epoch - PROBE_EPOCH, number))
        views = self._views(epoch, generator)
        first, second = (self.drawn(number, view) for view in views)
        shift = (second.shift[0] - first.shift[0], second.shift[1] - first.shift[1])
        size, content = self.images.image_size, self._content(number)
        image, painted, mask = torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.bool)
        if not self.plan.cached_views:
            image = self._both(number, first, second)
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
            sides={
                side: sample_pyramids(size, content, side, grid, self.count, shift, generator)
                for side, grid in self.plan.grids.items()
            },
        )

    def _views(self, epoch: int, generator: np.random.Generator) -> tuple[int, int]:
        cached = self.plan.cached_views
        if not cached:
            return 2 * (epoch - PROBE_EPOCH), 2 * (epoch - PROBE_EPOCH) + 1
        first, second = generator.choice(cached, 2, replace=cached < 2).tolist()
        return first, second

    def _both(self, number: int, first: View, second: View) -> torch.Tensor:
        image = self.images[number].image
        return torch.stack([augment(image, first), augment(image, second)])

    def _content(self, number: int) -> Size:
        if number not in self._contents:
            native = native_size(self.images.samples[number].path)
            self._contents[number] = content_size(native, self.images.image_size, self.images.keep_aspect)
        return self._contents[number]

    def drawn(self, number: int, view: int) -> View:
        """How a view of an image differs from it: a function of (seed, file name, view), so that a cache stays true."""
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
        return paint(image, self._content(number), paint_defects, seed)


class ViewDataset(Dataset[tuple[int, int, torch.Tensor, torch.Tensor]]):
    """Some views of the training images: number, view, the view itself, and the mask of what is painted on it.

    Args:
        pyramids: makes the views.
        pairs: number and view of each item.
    """

    def __init__(self, pyramids: PyramidDataset, pairs: Sequence[tuple[int, int]]) -> None:
        self.pyramids, self.pairs = pyramids, list(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, int, torch.Tensor, torch.Tensor]:
        number, view = self.pairs[index]
        if view < 0:
            return number, view, *self.pyramids.painted(number, painted_view(view))
        image = self.pyramids.view(number, view)
        return number, view, image, torch.zeros(image.shape[1:], dtype=torch.bool)


class EpochSampler(DistributedSampler):
    """Images in an order that is a function of (seed, epoch), each with its epoch."""

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Epoch and number of each image."""
        return ((self.epoch, number) for number in super().__iter__())


class PyramidDataModule(Configurable, LightningDataModule):
    """Images of one product: normal ones to learn from, others to test.

    Training batches hold two views of each image and pyramids of patches of 64, 32 and 16 pixels in them; the detector
    says which sides it wants, and on which grids (`PyramidPlan`). All training images of the layout fill the bank, and
    all set the threshold, each compared with the others. A seeded share of them is not learned from: it shows by how
    much scores of learned images flatter, and validation paints defects on it. Nothing is chosen on test.

    Args:
        root: the folder of images.
        layout: how the folder is arranged; found from the folder names when left out.
        image_size: height x width in pixels that images are brought to.
        keep_aspect: keep the aspect and pad the right or bottom edge; otherwise distort.
        brightness: mean to which the pixels of each image are scaled, so that exposure and lamp make no difference.
            Not in the paper; None leaves images as they are, for products whose light itself is to be watched.
        metric_size: height x width in pixels at which pixel metrics are computed.
        batch_size: images per batch.
        pyramids_per_image: pyramids of patches that are drawn per side, image and epoch.
        shift: most rows and columns in pixels by which a view of a training image is moved; at most 2.
        colour_deviation: of what is added to each channel of a view, of [0, 1]; 0.02 in the paper.
        noise_deviation: of what is added to each pixel of a view, of [0, 1]; 0.02 in the paper.
        num_workers: processes that decode images.
        held_out_fraction: share of the training normals that encoders do not learn from (at least one image).
        validate_on: `synthetic_defects` paints defects on 20 images that are not learned from; `test` watches the test
            images (for watching only); `none` leaves validations out, and the pictures and checkpoints that come with
            them.
        seed: of the split, of shuffling and of painted defects.

    Raises:
        PatchadError: if an argument makes no sense, or, in `setup`, if the folder does not hold what it needs.

    Example:
        >>> data = PyramidDataModule(root="images/bottle", image_size=(256, 256))
    """

    def __init__(
        self,
        root: str | Path | None = None,
        layout: Layout | None = None,
        image_size: tuple[int, int] = (384, 384),
        keep_aspect: bool = True,
        brightness: float | None = None,
        metric_size: tuple[int, int] = (256, 256),
        batch_size: int = 8,
        pyramids_per_image: int = 256,
        shift: int = 2,
        colour_deviation: float = 0.0,
        noise_deviation: float = 0.0,
        num_workers: int = 2,
        held_out_fraction: float = 0.1,
        validate_on: Literal["synthetic_defects", "test", "none"] = "synthetic_defects",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if root is None:
            raise PatchadError("no images: give --data.root FOLDER, or try --config quickstart")
        if not 0 < held_out_fraction < 1:
            raise PatchadError(f"held_out_fraction {held_out_fraction} must lie between 0 and 1")
        if min(*image_size, *metric_size, batch_size, pyramids_per_image) < 1:
            raise PatchadError("image_size, metric_size, batch_size and pyramids_per_image must be at least 1")
        if brightness is not None and not 0 < brightness <= 1:
            raise PatchadError(f"brightness {brightness} must lie above 0 and be at most 1; null leaves images alone")
        if min(shift, colour_deviation, noise_deviation) < 0:
            raise PatchadError("shift, colour_deviation and noise_deviation must not be negative")
        if shift > MOST_SHIFT:
            raise PatchadError(f"shift {shift} leaves no room for the pyramids of side 16; give at most {MOST_SHIFT}")
        self.augmentations = Augmentations(shift, colour_deviation, noise_deviation)
        self.root, self.layout = Path(root), layout
        self.image_size, self.keep_aspect, self.metric_size = image_size, keep_aspect, metric_size
        self.brightness = brightness
        self.batch_size, self.pyramids_per_image, self.num_workers = batch_size, pyramids_per_image, num_workers
        self.held_out_fraction, self.validate_on, self.seed = held_out_fraction, validate_on, seed
        self.save_hyperparameters(hyperparameters(self), logger=False)  # the whole config is logged; both have a seed

    def prepare_data(self) -> None:
        """Lets the layout write what it makes itself, once per machine; a folder that does not fit makes no run."""
        if self.layout is not None and self._doing != TrainerFn.PREDICTING:
            self.layout.prepare(self.root)
        self._samples(predicting=self._doing == TrainerFn.PREDICTING)

    def setup(self, stage: str) -> None:
        """Lists the files: for `predict` every image below the root, else what the layout says, for `test` to test."""
        samples = self._samples(predicting=stage == "predict")
        if stage == "predict":
            self.predict_set = self._dataset(samples)
            return
        test = [sample for sample in samples if sample.split == "test"]
        self.test_set = self._dataset(test)
        self.note_missing_masks(test)
        if stage == "test":
            return
        normals = [sample for sample in samples if sample.split == "train"]
        numbers = {thing: number for number, thing in enumerate(dict.fromkeys(one.thing for one in normals))}
        training, held_out = self._split(normals)
        self.normal_set, self.train_set, self.held_out_set = (
            self._dataset(part, numbers) for part in (normals, training, held_out)
        )
        self.held_out = torch.tensor([sample in held_out for sample in normals])
        if self.validate_on == "synthetic_defects":
            self._check_room_for_defects()
        rank_zero_info(f"{len(normals)} normal images, {len(held_out)} of them not to learn from, {len(test)} to test")

    def _samples(self, predicting: bool) -> list[Sample]:
        """All of them; images to predict are the user's and need no layout."""
        if predicting:
            return [Sample(path, UNKNOWN, None, "test") for path in images_below(self.root)]
        if self.layout is None:
            self.layout = detect_layout(self.root)
            rank_zero_info(f"{self.root} is read as {type(self.layout).__name__}")
        return [printable(sample) for sample in self.layout.samples(self.root)]

    def _dataset(self, samples: Sequence[Sample], numbers: Mapping[str, int] = MappingProxyType({})) -> ImageDataset:
        return ImageDataset(samples, self.image_size, self.keep_aspect, self.metric_size, self.brightness, numbers)

    def _split(self, normals: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        groups: dict[Any, list[Sample]] = {}
        for sample in normals:
            groups.setdefault(sample.thing, []).append(sample)
        if not normals:
            raise PatchadError(f"{self.root}, read as {type(self.layout).__name__}, has no training images")
        if len(groups) < 2:
            raise PatchadError(
                f"{self.root} has {len(normals)} training images in {len(groups)} groups of the same thing; at least "
                "2 groups are needed, one to compare the other with"
            )
        order, candidates = np.random.default_rng(self.seed).permutation(len(groups)), list(groups.values())
        files = {sample.path for sample in normals}  # a list may hold a file more than once
        count = max(1, round(self.held_out_fraction * len(files)))
        held_out: set[Path] = set()
        for number in order[:-1]:  # one group at least is left to train on
            if len(held_out) < count:
                held_out.update(sample.path for sample in candidates[number])
        training = [sample for sample in normals if sample.path not in held_out]
        return training, [sample for sample in normals if sample.path in held_out]

    def _check_room_for_defects(self) -> None:
        for sample in self.held_out_set.samples[: SyntheticDefects.most]:
            height, width = content_size(native_size(sample.path), self.image_size, self.keep_aspect)
            if min(height, width) < SMALLEST:
                raise PatchadError(
                    f"{sample.path} is {height} x {width} pixels (height x width) at image_size {self.image_size}; "
                    f"defects, which validation paints, need {SMALLEST}: raise image_size, or give "
                    "data.validate_on none or test"
                )

    def note_missing_masks(self, test: Sequence[Sample]) -> None:
        """Says once that pixel metrics leave out defective images without a mask."""
        missing = sum(sample.mask is None for sample in test if sample.defect != NORMAL)
        if missing:
            rank_zero_info(f"{missing} defective test images have no mask: pixel metrics leave them out")

    @property
    def defects(self) -> list[str]:
        """The defect types of the test images, sorted."""
        return sorted({sample.defect for sample in self.test_set.samples} - {NORMAL})

    @property
    def pyramids(self) -> PyramidDataset:
        """The pyramids that the detector wants; without a detector, those of VGG16 in dense mode."""
        detector = self.trainer.lightning_module if self.trainer else None
        plan = getattr(detector, "pyramid_plan", PyramidPlan({64: 16, 32: 4, 16: 2}))
        return PyramidDataset(self.train_set, plan, self.pyramids_per_image, self.augmentations, self.seed)

    @property
    def _doing(self) -> TrainerFn | None:
        return self.trainer.state.fn if self.trainer else None

    @property
    def _place(self) -> tuple[int, int]:
        """How many processes there are, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @property
    def view_settings(self) -> str:
        """All that views depend on beside the image files; a cache of their features is kept under it."""
        return f"{self.image_size} {self.keep_aspect} {self.brightness} {self.seed} {self.augmentations} {FORMAT}"

    def state_dict(self) -> dict[str, Any]:
        """What images are brought to before the bank and the threshold know them; a checkpoint keeps it."""
        return {"image_size": list(self.image_size), "keep_aspect": self.keep_aspect, "brightness": self.brightness}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warns where options bring images to something else than a checkpoint's; a fit fills a bank of its own."""
        if self._doing == TrainerFn.FITTING:
            return
        now = self.state_dict()
        told = [f"{name} {value}, not {now[name]}" for name, value in state_dict.items() if now[name] != value]
        if told:
            rank_zero_warn(f"bank and threshold are of images of {'; '.join(told)}: verdicts do not hold")

    def train_dataloader(self) -> DataLoader:
        """Pyramids of the training normals in an order that is a function of (seed, epoch)."""
        sampler = self._sampler(EpochSampler, self.train_set, shuffle=True)
        return self._loader(self.pyramids, sampler, keep_workers=True)

    def probe_dataloader(self) -> DataLoader:
        """The same pyramids of some training normals each time and on each process."""
        count = min(PROBE_IMAGES, len(self.train_set))
        chosen = np.random.default_rng(self.seed).permutation(len(self.train_set))[:count]
        return self._loader(self.pyramids, [(PROBE_EPOCH, number) for number in sorted(chosen.tolist())])

    def views_dataloader(self, pairs: Sequence[tuple[int, int]]) -> DataLoader:
        """Views of the training normals, each once, by number and view."""
        world, rank = self._place
        mine = ViewDataset(self.pyramids, pairs[rank::world])  # where few are missing, none for some processes
        return self._loader(mine, SequentialSampler(mine))

    def normal_dataloader(self) -> DataLoader:
        """All training normals, each once, as the bank and the threshold need them."""
        return self._each_once(self.normal_set)

    def held_out_dataloader(self) -> DataLoader:
        """The normals that are not learned from, each once."""
        return self._each_once(self.held_out_set)

    def val_dataloader(self) -> list[DataLoader]:
        """Labelled images, each once; no loader if `validate_on` is `none`, or is `test` where there are none."""
        labelled: dict[str, ImageDataset | SyntheticDefects] = {
            "synthetic_defects": SyntheticDefects(self.held_out_set, self.seed),
            "test": self.test_set,
        }
        dataset = labelled.get(self.validate_on)
        return [self._each_once(dataset)] if dataset else []

    def test_dataloader(self) -> DataLoader:
        """Test images, each once.

        Raises:
            PatchadError: if there are none.
        """
        if not len(self.test_set):
            raise PatchadError(f"{self.root} has no test images; use patchad predict for images without labels")
        return self._each_once(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        """Every image below the root, each once."""
        return self._each_once(self.predict_set)

    def _sampler(self, kind: type[DistributedSampler], dataset: Dataset, shuffle: bool) -> DistributedSampler:
        world, rank = self._place
        count = len(dataset)  # type: ignore[arg-type]
        if 0 < count < world:
            raise PatchadError(f"{count} images cannot be shared by {world} processes; give --trainer.devices {count}")
        return kind(dataset, num_replicas=world, rank=rank, shuffle=shuffle, seed=self.seed)

    def _each_once(self, dataset: Dataset) -> DataLoader:
        return self._loader(dataset, self._sampler(UnrepeatedDistributedSampler, dataset, shuffle=False))

    def _loader(
        self, dataset: Dataset, sampler: Sampler | Sequence[tuple[int, int]], keep_workers: bool = False
    ) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=keep_workers and self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # its own: reading draws nothing from training
        )
