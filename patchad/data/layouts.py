"""A folder on disk -> samples. A new layout is one subclass of `Layout`, named by class_path."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from patchad.data.synthetic import write_synthetic
from patchad.errors import PatchadError, check_range, check_seed
from patchad.folders import IMAGE_SUFFIXES, images_below
from patchad.spec import Configurable
from patchad.types import NORMAL, Sample

Item = TypeVar("Item")


class Layout(Configurable, ABC):
    """How a folder of images is arranged.

    Attributes:
        defective: folder of the root whose inner folders hold defective images.
        masks: folder with the same inner folders for their masks; None if the layout does not look for masks.
    """

    defective: str = "test"
    masks: str | None = None

    def prepare(self, root: Path) -> None:
        """Writes what the layout makes itself; once per machine."""

    @abstractmethod
    def samples(self, root: Path) -> list[Sample]:
        """The images below `root`, in an order that depends on their names alone.

        Raises:
            PatchadError: if the folder does not hold what the layout needs.
        """

    def mask_name(self, root: Path, image: Path) -> Path:
        """Where the mask of a defective image is looked for, without suffix; it may end in `_mask`, too."""
        assert self.masks is not None
        return root / self.masks / image.relative_to(root / self.defective).parent / image.stem

    def find_mask(self, root: Path, image: Path) -> Path | None:
        """The mask of a defective image, in the folder of masks or, with `_mask`, beside the image; None without."""
        return find_mask(self.mask_name(root, image)) or find_mask(image.with_name(f"{image.stem}_mask"))


def folder_images(root: Path, name: str, required: bool = True) -> list[Path]:
    """The images below a folder of the root.

    Args:
        root: of the data set.
        name: of the folder, from the root.
        required: whether the folder must be there; where it need not and is not, there are no images.

    Raises:
        PatchadError: if the root is missing, or the folder where it is required.
    """
    if not required and not (root / name).is_dir():
        return []
    if not root.is_dir():
        raise PatchadError(f"data.root {root} does not exist or is no folder")
    if not (root / name).is_dir():
        names = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise PatchadError(f"data.root {root} has no folder {name}; it has {', '.join(names) or 'no folder'}")
    return images_below(root / name)


def find_mask(name: Path) -> Path | None:
    """The mask of that name, which has no suffix, with or without `_mask`; None if there is none."""
    suffixes = (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES))
    names = (f"{name.name}{ending}{suffix}" for ending in ("", "_mask") for suffix in suffixes)
    return next((path for path in map(name.with_name, names) if path.is_file()), None)


def seeded_choice(items: Sequence[Item], fraction: float, seed: int) -> list[Item]:
    """A seeded share of the items, at least one, in their own order."""
    count = max(1, round(fraction * len(items)))
    return [items[number] for number in sorted(np.random.default_rng(seed).permutation(len(items))[:count])]


def normals(paths: Iterable[Path], split: Literal["train", "test"]) -> list[Sample]:
    """Samples of images without a defect."""
    return [Sample(path, NORMAL, None, split) for path in paths]


class MVTecAD(Layout):
    """One category of MVTec AD: `train/good`, `test/<defect>`, `ground_truth/<defect>/<stem>_mask.png`."""

    masks = "ground_truth"

    def samples(self, root: Path) -> list[Sample]:
        """Training and test images as the set's authors split them."""
        tested = folder_images(root, "test", required=False)
        train = folder_images(root, "train/good", required=not tested)
        return normals(train, "train") + [self._tested(root, path) for path in tested]

    def _tested(self, root: Path, path: Path) -> Sample:
        inner = path.relative_to(root / "test")
        if len(inner.parts) < 2:
            raise PatchadError(f"{path} lies in no folder of test that names its defect type, or {NORMAL}")
        defect = inner.parts[0]
        mask = None if defect == NORMAL else self.find_mask(root, path)
        return Sample(path, defect, mask, "test")


class BTAD(Layout):
    """One product of BTAD: `train/ok`, `test/ok`, `test/ko`, `ground_truth/ko/<stem>`."""

    masks = "ground_truth"

    def samples(self, root: Path) -> list[Sample]:
        """Training and test images as the set's authors split them."""
        good, faulty = (folder_images(root, name, required=False) for name in ("test/ok", "test/ko"))
        train = folder_images(root, "train/ok", required=not good and not faulty)
        defective = [Sample(path, "ko", self.find_mask(root, path), "test") for path in faulty]
        return normals(train, "train") + normals(good, "test") + defective


class MagneticTile(Layout):
    """Magnetic Tile Defects as published (Huang et al., CASE 2018): `MT_<type>/Imgs/*.jpg` with masks `*.png`.

    All 392 defective images are tested, as a rule; the splits differ in the normal ones.

    Args:
        split: `published` trains on the 761 images of DifferNet's list, as published figures do; `random` tests a
            seeded share of the images; `by_tile` tests a seeded share of the clean tiles and leaves out normal images
            of tiles that have a defect under another exposure, so that no tile is on both sides; calibration then takes
            whole tiles, too.
        test_fraction: share of the normal images (`random`) or of the clean tiles (`by_tile`) to test.
        seed: of the choice.
        labelled: share of the defective images of each type, or with `by_tile` of the tiles that have a defect of that
            type, that supervised detectors train on; 0.5 in the publication. The others are tested.

    Raises:
        PatchadError: if the split is unknown.
    """

    defect_types = ("Blowhole", "Break", "Crack", "Fray", "Uneven")

    def __init__(
        self,
        split: str = "published",
        test_fraction: float = 0.2,
        seed: int = 0,
        labelled: float = 0.0,
    ) -> None:
        splits = {"published": self._published, "random": self._random, "by_tile": self._by_tile}
        check_range({"test_fraction": test_fraction}, 0, 1, above=True)
        check_range({"labelled": labelled}, 0, 1)
        check_seed(seed)
        if split not in splits:
            raise PatchadError(f"split {split} is unknown; choose one of {', '.join(splits)}")
        self._choose, self.split, self.test_fraction, self.seed = splits[split], split, test_fraction, seed
        self.labelled = labelled

    def samples(self, root: Path) -> list[Sample]:
        """Samples of the chosen split."""
        free = photographs(root, "Free")
        defective = {path: kind for kind in self.defect_types for path in photographs(root, kind)}
        train, tested = self._choose(free, list(defective))
        groups = tiles([*free, *defective]) if self.split == "by_tile" else []
        tile_numbers = {path: str(number) for number, tile in enumerate(groups) for path in tile}
        trained = [sample._replace(group=tile_numbers.get(sample.path)) for sample in normals(train, "train")]
        labelled = self._labelled(defective, groups or [[path] for path in defective])
        faulty = [
            Sample(path, kind.lower(), path.with_suffix(".png"), "train" if path in labelled else "test")
            for path, kind in defective.items()
        ]
        return trained + normals(tested, "test") + faulty

    def _labelled(self, defective: Mapping[Path, str], groups: Iterable[Sequence[Path]]) -> set[Path]:
        """The defective images to train on: of groups by the type of their first defect, a share of each type."""
        if not self.labelled:
            return set()
        by_type: dict[str, list[list[Path]]] = {}
        for faulty in filter(None, ([path for path in group if path in defective] for group in groups)):
            by_type.setdefault(defective[faulty[0]], []).append(faulty)
        chosen = (seeded_choice(same, self.labelled, self.seed) for same in by_type.values())
        return {path for groups in chosen for group in groups for path in group}

    def _published(self, free: list[Path], defective: list[Path]) -> tuple[list[Path], list[Path]]:
        names = set(files("patchad.data").joinpath("differnet_train_761.txt").read_text().split())
        train = [path for path in free if path.name in names]
        if len(train) < len(names):
            raise PatchadError(f"split published lacks {len(names) - len(train)} of its {len(names)} training images")
        return train, [path for path in free if path.name not in names]

    def _random(self, free: list[Path], defective: list[Path]) -> tuple[list[Path], list[Path]]:
        tested = set(seeded_choice(free, self.test_fraction, self.seed))
        return [path for path in free if path not in tested], [path for path in free if path in tested]

    def _by_tile(self, free: list[Path], defective: list[Path]) -> tuple[list[Path], list[Path]]:
        faulty = set(defective)
        clean = [tile for tile in tiles([*free, *defective]) if not faulty.intersection(tile)]
        chosen = seeded_choice(range(len(clean)), self.test_fraction, self.seed)
        tested = {path for number in chosen for path in clean[number]}
        trained = {path for tile in clean for path in tile} - tested
        return [path for path in free if path in trained], [path for path in free if path in tested]


def photographs(root: Path, kind: str) -> list[Path]:
    """The photographs of one type of Magnetic Tile; masks are .png files beside them."""
    return [path for path in folder_images(root, f"MT_{kind}/Imgs") if path.suffix.lower() == ".jpg"]


def tiles(paths: Iterable[Path]) -> list[list[Path]]:
    """Photographs of Magnetic Tile grouped by tile.

    Names are exp<E>_num<T>, E = 0..6 for the exposure; sorted by T, a tile ends where E does not rise.

    Raises:
        PatchadError: if a name has another form.
    """
    ordered = sorted((number, exposure, path) for path in paths for exposure, number in [exposure_number(path)])
    groups: list[list[Path]] = []
    last = -1
    for _, exposure, path in ordered:
        if exposure <= last or not groups:
            groups.append([])
        groups[-1].append(path)
        last = exposure
    return groups


def exposure_number(path: Path) -> tuple[int, int]:
    """E and T of exp<E>_num_<T>.

    Raises:
        PatchadError: if the name has another form.
    """
    match = re.fullmatch(r"exp(\d+)_num_?(\d+)", path.stem)
    if match is None:
        raise PatchadError(f"{path} is not named exp<E>_num_<T>, as images of Magnetic Tile are")
    return int(match[1]), int(match[2])


ABNORMAL = "abnormal"


class Folder(Layout):
    """Any tree: normal images, abnormal ones, and optional masks; folders are relative to the root.

    A folder that lies inside another keeps its own meaning.

    Args:
        normal: folder of normal images.
        abnormal: folder of defective images, whose first subfolder names the defect type; `abnormal` may be missing.
        masks: folder of masks, arranged as `abnormal`, with or without `_mask` in the name; it may be missing. A mask
            with `_mask` may also lie beside its image.
        normal_test: folder of normal images to test; by default a seeded share of `normal`, if there are abnormal ones.
        test_fraction: that share.
        seed: of the choice.

    Raises:
        PatchadError: if masks lie in the same folder as images.

    Example:
        >>> layout = Folder(normal="ok", abnormal="scrap")
    """

    def __init__(
        self,
        normal: str = "normal",
        abnormal: str = ABNORMAL,
        masks: str = "masks",
        normal_test: str | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        check_range({"test_fraction": test_fraction}, 0, 1)
        check_seed(seed)
        if Path(masks) in (Path(normal), Path(abnormal)):
            raise PatchadError(f"masks and images cannot both lie in {masks}; put the masks into a folder of their own")
        self.normal, self.defective, self.masks, self.normal_test = normal, abnormal, masks, normal_test
        self.test_fraction, self.seed = test_fraction, seed

    def samples(self, root: Path) -> list[Sample]:
        """Training and test images."""
        defective = self._own_images(root, self.defective, required=self.defective != ABNORMAL)  # if the user named it
        test = self._own_images(root, self.normal_test) if self.normal_test else []
        normal = self._own_images(root, self.normal)
        if defective and not test:
            test = seeded_choice(normal, self.test_fraction, self.seed)
        tested = set(test)
        train = [path for path in normal if path not in tested]
        return normals(train, "train") + normals(test, "test") + [self._sample(root, path) for path in defective]

    def _own_images(self, root: Path, name: str, required: bool = True) -> list[Path]:
        """The images below a folder, without those of other folders that lie inside it."""
        names = (self.normal, self.defective, self.masks, self.normal_test)
        folders = [root / folder_name for folder_name in names if folder_name]
        inner = [folder for folder in folders if (root / name) in folder.parents]
        return [path for path in folder_images(root, name, required) if not any(map(path.is_relative_to, inner))]

    def _sample(self, root: Path, path: Path) -> Sample:
        inner = path.relative_to(root / self.defective)
        defect = inner.parts[0] if len(inner.parts) > 1 else Path(self.defective).name
        return Sample(path, defect, self.find_mask(root, path), "test")


class Synthetic(Layout):
    """The embedded data set: written below the root in MVTec AD's layout when it is not there yet.

    Args:
        train: normal images to train and calibrate on.
        test_normal: normal images to test.
        test_defective: defective images to test.
        seed: of the images.
    """

    def __init__(self, train: int = 60, test_normal: int = 20, test_defective: int = 30, seed: int = 0) -> None:
        self.counts = {"train": train, "test_normal": test_normal, "test_defective": test_defective}
        check_range(self.counts, 0)
        check_seed(seed)
        self.seed = seed

    def prepare(self, root: Path) -> None:
        """Writes the set."""
        write_synthetic(root, **self.counts, seed=self.seed)

    def samples(self, root: Path) -> list[Sample]:
        """As MVTec AD's."""
        return MVTecAD().samples(root)


MARKERS: dict[str, type[Layout]] = {
    "train/good": MVTecAD,
    "test/good": MVTecAD,
    "train/ok": BTAD,
    "test/ok": BTAD,
    "MT_Free": MagneticTile,
    "normal": Folder,
}
"""Folders below a root, in the order in which they tell its layout."""


def known_layout(root: Path) -> Layout | None:
    """The layout that fits the names of the folders below a root; None if none does."""
    return next((layout() for marker, layout in MARKERS.items() if (root / marker).is_dir()), None)


def detect_layout(root: Path) -> Layout:
    """The layout that fits the names of the folders below a root.

    Raises:
        PatchadError: if none does.
    """
    if not root.is_dir():
        raise PatchadError(f"data.root {root} does not exist or is no folder")
    if layout := known_layout(root):
        return layout
    folders = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folder"
    raise PatchadError(
        f"the layout of {root} is not known: it has {folders}, and none of {', '.join(MARKERS)}; name its folders, "
        "for example --data.layout Folder --data.layout.normal ok --data.layout.abnormal scrap (--data.layout.normal . "
        "where every image is normal)"
    )
