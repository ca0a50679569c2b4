"""Samples -> batches: which images train, calibrate, validate and test, and how they reach the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.loops.progress import _ProcessedTracker
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler

from patchad.canvas import Canvas
from patchad.checkpoint import Checkpointed
from patchad.data.datasets import (
    PROBE_EPOCH,
    EpochLoader,
    EpochSampler,
    ImageDataset,
    PyramidDataset,
    SyntheticDefects,
    ViewDataset,
)
from patchad.data.defects import FORMAT
from patchad.data.labelled import LabelledDataset
from patchad.data.layouts import Layout, detect_layout
from patchad.data.listing import class_doubt, listing, product_doubt
from patchad.data.regions import canvas_key, kept, of_canvas, short, with_regions
from patchad.data.splits import check_room_for_defects, hold_out, trained
from patchad.decoding import MAX_MEGAPIXELS
from patchad.errors import PatchadError, check_range, check_seed, printable
from patchad.folders import images_below
from patchad.images import Augmentations
from patchad.spec import changed_settings, hyperparameters
from patchad.types import NORMAL, UNKNOWN, PyramidPlan, Sample

MOST_HELD_OUT = 0.99
"""Share of the training normals; something must be left to learn from."""
MOST_PYRAMIDS = 100_000
"""Of an image and side."""
MOST_WORKERS = 256
"""Processes; each would be started before the next one fails."""
MOST_SHIFT = 2
"""Pixels; two views then differ by at most 4, which the window of side 16's pyramids has room for."""
PROBE_IMAGES, PROBE_ANCHORS = 32, 256
"""Most images that the clusters are fitted on; most anchors of each, but at least those of one draw."""


class PyramidDataModule(Checkpointed, LightningDataModule):
    """Images of one product: normal ones to learn from, others to test.

    Training batches hold two views of each image and pyramids of patches of 64, 32 and 16 pixels in them; the detector
    hands over which sides it wants, and on which grids (`plan`). All normal training images of the layout fill the
    bank, and all set the threshold, each compared with the others. A seeded share of them is not learned from: it shows
    by how much scores of learned images flatter, and validation paints defects on it. Nothing is chosen on test.
    Batches of a supervised detector hold whole images, defective training images with masks among them.

    Args:
        root: the folder of images.
        layout: how the folder is arranged; found from the folder names when left out.
        image_size: height x width in pixels that images are brought to; one number is both.
        keep_aspect: keep the aspect and pad the right or bottom edge; otherwise distort.
        brightness: mean to which the pixels of each image are scaled, so that exposure and lamp make no difference.
            Not in the paper; None leaves images as they are, for products whose light itself is to be watched.
        region: a mask file, white where all images are judged, or a folder with a mask for each, named as the image,
            with or without `_mask`: nothing else is learned, remembered or scored. None judges all of them.
        metric_size: height x width in pixels at which pixel metrics are computed; one number is both.
        batch_size: images per batch.
        pyramids_per_image: pyramids of patches that are drawn per side each time that an image is drawn.
        draws_per_epoch: how often each image is drawn in an epoch.
        shift: most rows and columns in pixels by which a view of a training image is moved; at most 2. In mode sliding
            views are of single patches, which are not moved.
        colour_deviation: of what is added to each channel of a view, of [0, 1]; 0.02 in the paper.
        noise_deviation: of what is added to each pixel of a view, of [0, 1]; 0.02 in the paper.
        num_workers: processes that decode images.
        max_megapixels: an image of more million pixels is refused by what its header says.
        held_out_fraction: share of the training normals that encoders do not learn from (at least one image, or with 0
            none).
        validate_on: `synthetic_defects` paints defects on 20 images that are not learned from; `test` watches the test
            images (for watching only); `none` leaves validations out, and the pictures and checkpoints that come with
            them.
        seed: of the split, of shuffling and of painted defects.

    Raises:
        PatchadError: if an argument makes no sense, or, in `setup`, if the folder does not hold what it needs.

    Example:
        >>> data = PyramidDataModule(root="images/bottle", image_size=(256, 256))
    """

    plan: PyramidPlan | None = PyramidPlan({64: 16, 32: 4, 16: 2})
    """Which pyramids training batches hold; a detector that learns hands over its own, a supervised one None."""

    def __init__(
        self,
        root: str | Path | None = None,
        layout: Layout | None = None,
        image_size: tuple[int, int] | int = (384, 384),
        keep_aspect: bool = True,
        brightness: float | None = None,
        region: str | Path | None = None,
        metric_size: tuple[int, int] | int = (256, 256),
        batch_size: int = 8,
        pyramids_per_image: int = 256,
        draws_per_epoch: int = 1,
        shift: int = 2,
        colour_deviation: float = 0.0,
        noise_deviation: float = 0.0,
        num_workers: int = 2,
        max_megapixels: float = MAX_MEGAPIXELS,
        held_out_fraction: float = 0.1,
        validate_on: Literal["synthetic_defects", "test", "none"] = "synthetic_defects",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if root is None or not str(root):
            raise PatchadError("no images: give --data.root FOLDER, or try --config quickstart")
        check_range({"held_out_fraction": held_out_fraction}, 0, MOST_HELD_OUT)
        check_range({"brightness": brightness}, 0, 1, above=True)
        check_range({"colour_deviation": colour_deviation, "noise_deviation": noise_deviation}, 0, 1)
        check_range({"max_megapixels": max_megapixels}, 0, above=True)
        check_range({"shift": shift}, 0, MOST_SHIFT)
        check_range({"num_workers": num_workers}, 0, MOST_WORKERS)
        check_seed(seed)
        check_range({"batch_size": batch_size}, 1)
        check_range({"pyramids_per_image": pyramids_per_image, "draws_per_epoch": draws_per_epoch}, 1, MOST_PYRAMIDS)
        sizes = {"image_size": image_size, "metric_size": metric_size}
        sizes = {name: checked_size(name, size, max_megapixels) for name, size in sizes.items()}
        self.augmentations = Augmentations(shift, colour_deviation, noise_deviation)
        self.root, self.layout, self.max_megapixels = Path(root), layout, max_megapixels
        self.image_size, self.metric_size, self.keep_aspect = *sizes.values(), keep_aspect
        self.brightness, self.region = brightness, kept(region, max_megapixels)
        self.init_args |= {**sizes, "region": self.region}  # the mask itself, so that a checkpoint needs no file of it
        self.batch_size, self.pyramids_per_image, self.num_workers = batch_size, pyramids_per_image, num_workers
        self.held_out_fraction, self.validate_on, self.seed = held_out_fraction, validate_on, seed
        self.draws_per_epoch = draws_per_epoch
        self.save_hyperparameters(hyperparameters(self), logger=False)  # the whole config is logged; both have a seed

    def prepare_data(self) -> None:
        """Lets the layout write what it makes itself, once per machine; a folder that does not fit makes no run."""
        if self.layout is not None and self._doing != TrainerFn.PREDICTING and not self.from_checkpoint:
            self.layout.prepare(self.root)
        self._samples(predicting=self._doing == TrainerFn.PREDICTING)

    def setup(self, stage: str) -> None:
        """Lists the files: for `predict` every image below the root, else what the layout says, for `test` to test."""
        samples = with_regions(self._samples(stage == "predict"), self.root, self.region, strict=stage != "predict")
        for sentence in listing(self.root, samples, None if stage == "predict" else self.layout):
            rank_zero_info(printable(sentence))
        if stage == "predict":
            if self._doing == TrainerFn.PREDICTING and (doubt := product_doubt(self.root)):  # others sample the fit's
                rank_zero_warn(doubt)
            self.predict_set = self._dataset(samples, tolerant=True)
            return
        test = [sample for sample in samples if sample.split == "test"]
        self.test_set = self._dataset(test, tolerant=True)
        if stage == "test":
            if doubt := class_doubt(test):
                rank_zero_warn(doubt)
            return
        normals, defective = trained(samples)
        if not normals:
            raise PatchadError(f"{self.root}, read as {type(self.layout).__name__}, has no training images")
        training, held_out = hold_out(normals, self.held_out_fraction, self.seed, str(self.root))
        numbers = {thing: number for number, thing in enumerate(dict.fromkeys(sample.thing for sample in normals))}
        self.normal_set, self.train_set, self.held_out_set = (
            self._dataset(part, numbers) for part in (normals, training, held_out)
        )
        self.held_out = torch.tensor([sample in held_out for sample in normals])
        labelled = [sample for sample in defective if sample.mask is not None]
        self.labelled_set = ImageDataset(
            [*training, *labelled], self.canvas, self.image_size, numbers, self.max_megapixels
        )
        if self.validate_on == "synthetic_defects":
            check_room_for_defects(self.held_out_set)
        rank_zero_info(f"{len(normals)} normal images, {len(held_out)} of them not to learn from, {len(test)} to test")
        if defective:
            rank_zero_info(
                f"{len(defective)} defective images to train on, {len(labelled)} of them with a mask: only a "
                "supervised detector learns from them"
            )

    def _samples(self, predicting: bool) -> list[Sample]:
        """All of them; images to predict are the user's and need no layout."""
        if predicting:
            return [Sample(path, UNKNOWN, None, "test") for path in images_below(self.root)]
        if self.layout is None:
            self.layout = detect_layout(self.root)
            rank_zero_info(f"{self.root} is read as {type(self.layout).__name__}")
        samples = self.layout.samples(self.root)
        return [sample._replace(defect=printable(sample.defect)) for sample in samples]  # figures and pages name it

    def _dataset(
        self, samples: Sequence[Sample], numbers: Mapping[str, int] = MappingProxyType({}), tolerant: bool = False
    ) -> ImageDataset:
        return ImageDataset(samples, self.canvas, self.metric_size, numbers, self.max_megapixels, tolerant)

    @property
    def defects(self) -> list[str]:
        """The defect types of the test images, sorted."""
        return sorted({sample.defect for sample in self.test_set.samples} - {NORMAL})

    @property
    def canvas(self) -> Canvas:
        """What images are brought to."""
        return Canvas(self.image_size, self.keep_aspect, self.brightness, of_canvas(self.region))

    @property
    def pyramids(self) -> PyramidDataset:
        """The pyramids of the `plan`."""
        assert self.plan is not None
        drawn = (self.pyramids_per_image, self.augmentations, self.seed, self.draws_per_epoch)
        return PyramidDataset(self.train_set, self.plan, *drawn)

    @property
    def _doing(self) -> TrainerFn | None:
        return self.trainer.state.fn if self.trainer else None

    @property
    def _place(self) -> tuple[int, int]:
        """How many processes there are, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @property
    def _begins_at(self) -> tuple[int, int]:
        """The epoch that is read first, and how many of its batches a resumed fit has seen.

        Lightning tells the sampler when workers have begun, and of the epoch alone.

        Source: https://github.com/Lightning-AI/pytorch-lightning/issues/21938
        """
        if self.trainer is None:
            return 0, 0
        loop, epoch = self.trainer.fit_loop, self.trainer.current_epoch
        progress = loop.epoch_loop.batch_progress
        if loop.epoch_progress.current.ready == epoch:
            return epoch, 0
        if progress.is_last_batch:  # it was saved at the end of that epoch
            return epoch + 1, 0
        seen = progress.current
        assert isinstance(seen, _ProcessedTracker)
        return epoch, seen.ready if seen.processed == seen.ready else seen.completed

    @property
    def view_settings(self) -> str:
        """All that views depend on beside the image files; a cache of their features is kept under it."""
        return f"{canvas_key(self.canvas, self.train_set.samples)} {self.seed} {self.augmentations} {FORMAT}"

    def state_dict(self) -> dict[str, Any]:
        """What images are brought to before the bank and the threshold know them; a checkpoint keeps it."""
        return {**self.canvas._asdict(), "image_size": list(self.image_size), "region": short(self.region)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warns where options bring images to something else than a checkpoint's; a fit fills a bank of its own."""
        if self._doing == TrainerFn.FITTING:
            return
        if settings := changed_settings(state_dict, self.state_dict()):
            rank_zero_warn(f"bank and threshold are of images of {settings}: verdicts do not hold")

    def train_dataloader(self) -> DataLoader:
        """Pyramids of training normals, or whole labelled images, in an order that is a function of (seed, epoch)."""
        items = LabelledDataset(self.labelled_set, self.seed) if self.plan is None else self.pyramids
        sampler = self._sampler(EpochSampler, items, shuffle=True)
        assert isinstance(sampler, EpochSampler)
        epoch, seen = self._begins_at
        sampler.begin(epoch, seen * self.batch_size)
        return self._loader(items, sampler, keep_workers=True)

    def probe_dataloader(self) -> DataLoader:
        """The same pyramids of some training normals each time and on each process."""
        count = min(PROBE_IMAGES, len(self.train_set))
        chosen = sorted(np.random.default_rng(self.seed).permutation(len(self.train_set))[:count].tolist())
        most = max(1, min(self.draws_per_epoch, PROBE_ANCHORS // self.pyramids_per_image))
        draws = range(0, most * len(self.train_set), len(self.train_set))
        return self._loader(self.pyramids, [(PROBE_EPOCH, first + number) for first in draws for number in chosen])

    def views_dataloader(self, views: Sequence[tuple[int, int, bool]], everywhere: bool = False) -> DataLoader:
        """Views of the training normals, by number, view, and whether defects are painted on it.

        Each is read once, or once in each process.
        """
        world, rank = (1, 0) if everywhere else self._place
        dataset = ViewDataset(self.pyramids, views[rank::world])  # where few are missing, none for some processes
        return self._loader(dataset, SequentialSampler(dataset))

    def normal_dataloader(self, first: int = 0) -> DataLoader:
        """All training normals, each once, as the bank and the threshold need them.

        Args:
            first: the batch of this process that they begin with.
        """
        return self._each_once(self.normal_set, first)

    def reading_dataloader(self) -> DataLoader:
        """All images that a fit reads, each once, those that cannot be read with their error."""
        labelled = [sample for sample in self.labelled_set.samples if sample.defect != NORMAL]
        samples = self.normal_set.samples + (labelled if self.plan is None else [])
        return self._each_once(self._dataset(samples, tolerant=True))

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

    def _each_once(self, dataset: Dataset, first: int = 0) -> DataLoader:
        sampler = self._sampler(UnrepeatedDistributedSampler, dataset, shuffle=False)
        # Lightning would share out what is no sampler of its own once more
        return self._loader(dataset, list(sampler)[first * self.batch_size :] if first else sampler)

    def _loader(self, dataset: Dataset, sampler: Sampler | Sequence[Any], keep_workers: bool = False) -> DataLoader:
        return EpochLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=keep_workers and self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # its own: reading draws nothing from training
        )


def checked_size(name: str, size: tuple[int, int] | int, max_megapixels: float) -> tuple[int, int]:
    """Height x width in pixels, which one number is both of.

    Raises:
        PatchadError: if one is below 1, or their product too large.
    """
    if not isinstance(size, int) and not (isinstance(size, Sequence) and len(size) == 2):
        raise PatchadError(f"{name} {size!r} must be one number, or height and width")
    height, width = (size, size) if isinstance(size, int) else size
    check_range({f"height of {name}": height, f"width of {name}": width}, 1)
    check_range({f"megapixels of {name}": height * width / 1e6}, 0, max_megapixels)
    return height, width
