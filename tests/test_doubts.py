"""What makes figures doubtful is said, and a file that cannot be read costs its own row alone."""

import csv
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage.measure import label
from test_cli import LITE, SMALL, commands_in, here  # noqa: F401

from patchad import PyramidDataModule
from patchad.canvas import Canvas
from patchad.cli import main
from patchad.data import Folder
from patchad.data.datasets import ImageDataset
from patchad.data.doubts import Doubts
from patchad.data.layouts import Layout
from patchad.data.listing import listing
from patchad.folders import images_below
from patchad.masks import nearest_pixels, resize_mask
from patchad.types import NORMAL, UNKNOWN, Sample

CHECKPOINT = "runs/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def fitted(product, tmp_path_factory) -> Path:
    """The checkpoint of a fit."""
    with commands_in(tmp_path_factory.mktemp("fitted")):
        main(["fit", f"--data.root={product}", "--model.mirrored=false", *LITE, *SMALL])
        return Path(CHECKPOINT).resolve()


def said(arguments: list[str]) -> tuple[int, str]:
    """Exit code of a command, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            main([*arguments, "--trainer.enable_progress_bar=false"])
            code = 0
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
    return code, "\n".join(str(warning.message) for warning in caught)


def break_files(folder: Path) -> None:
    """Three images that cannot be read, each for a reason of its own."""
    (folder / "901.png").write_bytes(b"no image")
    (folder / "902.png").symlink_to("nowhere.png")
    whole = next(folder.glob("0*.png")).read_bytes()
    (folder / "903.png").write_bytes(whole[: len(whole) // 2])


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))


def test_all_training_images_that_cannot_be_read_are_named_before_anything_is_learned(product, here, capsys):
    shutil.copytree(product, "broken")
    break_files(Path("broken/train/good"))
    code, _ = said(["fit", "--data.root=broken", *LITE, *SMALL])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("patchad: error:")]
    assert code == 2 and line.startswith("patchad: error: 3 training images cannot be read, mend or remove them:")
    assert all(f"cannot read image broken/train/good/90{number}.png" in line for number in (1, 2, 3))
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_what_cannot_be_read_costs_predict_its_own_rows_alone(batch_size, fitted, product, here):
    shutil.copytree(product / "test/good", "parts")
    options = ["predict", f"--ckpt_path={fitted}", "--data.root=parts", f"--data.batch_size={batch_size}"]
    assert said(options) == (0, "")
    break_files(Path("parts"))
    code, warned = said(options)
    assert code == 1 and "3 of 7 images could not be read and have no score" in warned
    whole, broken = rows(Path("runs/version_0/predictions")), rows(Path("runs/version_1/predictions"))
    assert [row | {"time": ""} for row in broken[3:]] == [row | {"time": ""} for row in whole]
    for row in broken[:3]:
        assert (row["score"], row["p_value"], row["verdict"]) == ("", "", "unreadable")
        assert row["reason"].startswith(f"cannot read image {row['path']}: ")
    assert len(list(Path("runs/version_1/predictions/maps").glob("*.overlay.png"))) == 4


def test_what_cannot_be_read_costs_test_its_own_images_alone(fitted, product, here):
    shutil.copytree(product, "whole")
    shutil.copytree(product, "broken")
    first, second = (min(Path("broken/test", kind).glob("*.png")) for kind in ("hole", "good"))
    second.write_bytes(b"no image")
    with Image.open(f"broken/ground_truth/hole/{first.stem}_mask.png") as mask:
        mask.resize((90, 96)).save(mask.filename)
    for path in (first, second):
        (Path("whole") / path.relative_to("broken")).unlink()
    tested = {root: said(["test", f"--ckpt_path={fitted}", f"--data.root={root}"]) for root in ("whole", "broken")}
    assert tested["whole"][0] == 0 and tested["broken"][0] == 1
    assert "2 of 11 images could not be read" in tested["broken"][1]
    names = ["metrics.csv", "report.html"]
    (metrics, page), (broken_metrics, broken_page) = (
        [Path(f"runs/version_{number}/{name}").read_text() for name in names] for number in (0, 1)
    )
    assert broken_metrics == metrics
    assert "2 images could not be read and are left out" in broken_page
    assert "could not be read" not in page


def test_maps_of_images_with_long_names_are_written(fitted, product, here):
    Path("parts").mkdir()
    images = sorted((product / "test/good").iterdir())
    names = [f"{251 * 'a'}.png", f"{250 * 'a'}b.png", f"{110 * 'é'}.png"]
    for name, image in zip(names, images, strict=False):
        shutil.copy(image, here / "parts" / name)
    assert said(["predict", f"--ckpt_path={fitted}", "--data.root=parts"]) == (0, "")
    maps = list(Path("runs/version_0/predictions/maps").iterdir())
    assert len(rows(Path("runs/version_0/predictions"))) == len(maps) == 3
    with Image.open(next(path for path in maps if path.name == f"{names[2]}.overlay.png")) as overlay:
        assert overlay.size == (96, 96)


def test_a_defect_among_the_training_images_is_named_first_with_its_picture(product, here, caplog):
    shutil.copytree(product, "parts")
    shutil.copy(min(Path("parts/test/misplaced").iterdir()), "parts/train/good/7.png")
    with caplog.at_level("INFO"):
        assert said(["fit", "--data.root=parts", *LITE, *SMALL])[0] == 0
    (line,) = [message for message in caplog.messages if message.startswith("possible defects")]
    assert "among the training images, by p-value: parts/train/good/7.png (0.077), parts/train/good/" in line
    assert line.count("parts/train/good/") == 5 and line.endswith("pictures: runs/version_0/possible_defects.png")
    scores = torch.load(CHECKPOINT, weights_only=True)["state_dict"]["model.scorer.normals"]
    assert scores.argmax() == 12 and len(scores) == 13  # 7.png comes after 011.png
    with Image.open("runs/version_0/possible_defects.png") as sheet:
        rows_of_pixels = np.asarray(sheet.convert("L"))[:, 190 + 166 : 190 + 166 + 160]
    assert (rows_of_pixels < 250).any(1).sum() > 5 * 90


def test_images_of_the_fit_and_masks_are_told_in_predict(fitted, product, here):
    code, warned = said(["predict", f"--ckpt_path={fitted}", f"--data.root={product}"])
    assert code == 0
    assert "is the root of a product (MVTecAD)" in warned
    assert "12 of 30 images are among the images of the fit" in warned
    assert "7 of 30 images hold pure black and white alone: are they masks?" in warned


def test_a_dead_camera_and_copies_are_told_in_fit(here):
    Path("parts/normal").mkdir(parents=True)
    for number in range(6):
        Image.new("L", (96, 96)).save(f"parts/normal/{number}.png")
    code, warned = said(["fit", "--data.root=parts", "--data.validate_on=none", *LITE, *SMALL])
    assert code == 0
    assert "6 of 6 images are of one colour" in warned
    assert "5 of 6 training images are copies of others" in warned


def doubts_of(image: Image.Image, mask: Image.Image | None, folder: Path, size: int = 96) -> list[str]:
    """What is doubtful about a defective image and its mask."""
    image.save(folder / "a.png")
    if mask is not None:
        mask.save(folder / "mask.png")
    sample = Sample(folder / "a.png", "dent" if mask else UNKNOWN, folder / "mask.png" if mask else None, "test")
    return ImageDataset([sample], Canvas((size, size)), (48, 48), tolerant=True)[0].doubts.splitlines()


def photograph(height: int = 96, width: int = 96) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(1, 255, (height, width, 3), dtype=np.uint8))


def disc(size: int = 96, level: int = 255, rest: int = 0, radius: float = 0.2) -> Image.Image:
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    return Image.fromarray(np.where(np.hypot(rows, columns) < radius, level, rest).astype(np.uint8))


def half_grey(level: int) -> Image.Image:
    values = np.array(disc())
    values[:, :48][values[:, :48] > 0] = level
    return Image.fromarray(values)


def squares() -> Image.Image:
    """One large defect and one of a single pixel."""
    values = np.zeros((96, 96), np.uint8)
    values[10:40, 10:40] = 255
    values[80, 80] = 255
    return Image.fromarray(values)


MASKS: dict[str, tuple[Callable[[], Image.Image], str | None]] = {
    "white": (disc, None),
    "smooth at its edge": (lambda: disc().filter(ImageFilter.GaussianBlur(1)), None),
    "resized smoothly": (lambda: disc(24).resize((96, 96), Image.Resampling.BILINEAR), None),
    "empty": (lambda: disc(level=0), "have an empty mask"),
    "inverted": (lambda: disc(level=0, rest=255), "is it inverted?"),
    "grey in part": (lambda: half_grey(100), "have a mask with grey areas"),
    "of small numbers in part": (lambda: half_grey(1), "have a mask with grey areas"),
    "with a tiny defect": (squares, "have defects that fall between the pixels of metric_size 48 x 48"),
}


@pytest.mark.parametrize("name", MASKS)
def test_doubtful_masks_are_told(name, tmp_path):
    make, sentence = MASKS[name]
    doubts = doubts_of(photograph(), make(), tmp_path)
    assert [sentence in doubt for doubt in doubts] == [True] if sentence else not doubts


IMAGES: dict[str, tuple[Callable[[], Image.Image], str | None]] = {
    "a photograph": (photograph, None),
    "of one colour": (lambda: Image.new("RGB", (50, 50), (9, 9, 200)), "are of one colour"),
    "a mask": (disc, "hold pure black and white alone"),
    "a strip": (lambda: photograph(20, 400), "have fewer than 16 rows or columns at image_size"),
    "tiny": (lambda: photograph(20, 20), "are enlarged more than 4 times"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_doubtful_images_are_told(name, tmp_path):
    make, sentence = IMAGES[name]
    doubts = doubts_of(make(), None, tmp_path)
    assert [sentence in doubt for doubt in doubts] == [True] if sentence else not doubts


def test_doubts_are_counted_by_kind_and_processes_are_merged():
    doubts = Doubts()
    doubts.paths = {"are odd": {"b", "a"}, "are large": {"b"}}
    doubts.digests = {"a": 1, "b": 2, "c": 2}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        doubts.tell()
        doubts.check_training()
    sentences = [str(warning.message) for warning in caught]
    assert sentences[:2] == ["1 of 3 images are large (b)", "2 of 3 images are odd (a, ...)"]
    assert sentences[2].startswith("1 of 3 training images are copies of others")


def test_every_defect_keeps_a_pixel_of_those_it_touches():
    generator = np.random.default_rng(0)
    for _ in range(20):
        mask = torch.from_numpy(generator.random((90, 70)) > 0.97)
        resized, nearest = resize_mask(mask, (30, 20)), nearest_pixels(mask.float(), (30, 20)) > 0
        assert (resized | ~nearest).all()
        components = label(mask.numpy(), connectivity=2)
        for number in range(1, components.max() + 1):
            rows, columns = np.nonzero(components == number)
            touched = torch.zeros_like(resized)
            touched[rows * 30 // 90, columns * 20 // 70] = True
            assert (resized & touched).any()


def files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / name, format="PNG")


def sentences(root: Path, stage: str = "test", layout: Layout | None = None) -> Iterator[str]:
    data = PyramidDataModule(root, layout)
    samples = data._samples(predicting=stage == "predict")
    return listing(root, samples, None if stage == "predict" else data.layout)


def test_what_is_left_out_of_a_folder_is_told_by_kind(tmp_path):
    files(tmp_path, "a.png", "b.JPEG", "c.gif", "d.jp2", "e", "f.png.bak", ".hidden.png", "deep/g.dib")
    (tmp_path / "scratch").mkdir()
    expected = "2 images taken; left out: .bak (1), .dib (1), .gif (1), .jp2 (1), empty folders (1), without suffix (1)"
    assert list(sentences(tmp_path, "predict")) == [f"{tmp_path}: {expected}"]


def test_masks_that_are_missing_and_masks_that_fit_no_image_are_told(tmp_path):
    files(tmp_path, "train/good/0.png", "test/good/0.png", "test/hole/0.png", "test/hole/1.png")
    files(tmp_path, "ground_truth/hole/0_gt.png", "ground_truth/Hole/1.png")
    listed, missing = sentences(tmp_path)
    assert listed.endswith("4 images taken; left out: masks that fit no defective image (2)")
    assert missing.startswith("2 defective test images have no mask")
    assert f"looked for {tmp_path}/ground_truth/hole/0.png and {tmp_path}/ground_truth/hole/0_mask.png" in missing


def test_masks_beside_their_images_are_masks(tmp_path):
    files(tmp_path, "normal/0.png", "normal/1.png", "abnormal/0.png", "abnormal/0_mask.png", "abnormal/1_mask.png")
    samples = Folder().samples(tmp_path)
    defective = {sample.path.name: sample.mask for sample in samples if sample.defect != NORMAL}
    assert defective == {"0.png": tmp_path / "abnormal/0_mask.png", "1_mask.png": None}
    assert [path.name for path in images_below(tmp_path / "abnormal")] == ["0.png", "1_mask.png"]


@pytest.mark.parametrize(("kinds", "word"), [(["good"], "normal"), (["hole"], "defective"), (["good", "hole"], None)])
def test_a_test_set_of_one_class_is_told(kinds, word, product, tmp_path):
    (tmp_path / "test/good").mkdir(parents=True)
    for kind in kinds:
        shutil.copytree(product / "test" / kind, tmp_path / "test" / kind, dirs_exist_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PyramidDataModule(tmp_path).setup("test")
    told = [str(warning.message) for warning in caught]
    assert [f"test images are {word}: no AUROC" in sentence for sentence in told] == [True] * bool(word)
