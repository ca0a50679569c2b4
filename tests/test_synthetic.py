"""The embedded data set: written once and whole, true masks, and too varied for two simple detectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from patchad.data import defects, synthetic
from patchad.data.defects import DEFECTS, STEP, paint_defect, paint_defects
from patchad.data.synthetic import write_synthetic
from patchad.errors import PatchadError

SMALL = {"train": 2, "test_normal": 1, "test_defective": 7, "size": 48}


def read(path):
    return np.asarray(Image.open(path))


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def photograph(height, width):
    """Smooth shapes, hard edges and grain, in no relation to the set's own pictures."""
    rng = np.random.default_rng(7)
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / (5 + c)) * np.cos(columns / (9 - c)) for c in range(3)], -1) * 0.25 + 0.5
    picture = np.where((columns > width // 2)[..., None], waves, waves[::-1] * 0.6) + rng.normal(0, 0.02, waves.shape)
    return np.clip(picture, 0, 1).astype(np.float32)


def flat(level):
    return np.full((40, 53, 3), level, np.float32)


CANVASES = {
    "photograph": photograph(150, 211),
    "smallest": photograph(32, 32),
    "wide": photograph(33, 301),
    "black": flat(0.0),
    "white": flat(1.0),
    "grey": flat(0.5),
}


# ---------------------------------------------------------------------------------------------------- defects


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_changes_the_picture_exactly_on_its_mask(kind, canvas):
    image = CANVASES[canvas]
    before = image.copy()
    for seed in range(12):
        painted, mask = paint_defect(image, np.random.default_rng(seed), kind)
        change = np.abs(painted - image).max(-1)
        assert (image == before).all()
        assert mask.dtype == bool and painted.dtype == np.float32
        assert 4 <= mask.sum() < mask.size / 3
        assert painted.min() >= 0 and painted.max() <= 1
        assert (change[~mask] == 0).all()
        assert change[mask].min() >= STEP - 1e-6
        assert change[mask].mean() >= defects.FAINTEST - 1e-6
        in_bytes = (np.round(painted * 255) != np.round(image * 255)).any(-1)
        assert (in_bytes == mask).all()


def test_a_defect_depends_on_its_generator_alone():
    image = CANVASES["photograph"]
    first, again, other = (paint_defect(image, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[1] != other[1]).any()


def test_left_out_kinds_are_all_drawn():
    image, drawn = CANVASES["smallest"], set()
    for seed in range(40):
        painted, _ = paint_defect(image, np.random.default_rng(seed))
        drawn |= {kind for kind in DEFECTS if (painted == paint_defect(image, after_one_draw(seed), kind)[0]).all()}
    assert drawn == set(DEFECTS)


def after_one_draw(seed):
    rng = np.random.default_rng(seed)
    rng.choice(len(DEFECTS))
    return rng


def test_the_image_may_be_a_view_with_channels_first_in_memory():
    view = np.ascontiguousarray(CANVASES["photograph"].transpose(2, 0, 1)).transpose(1, 2, 0)
    painted, mask = paint_defect(view, np.random.default_rng(0), "dent")
    expected, expected_mask = paint_defect(CANVASES["photograph"], np.random.default_rng(0), "dent")
    assert (painted == expected).all() and (mask == expected_mask).all()


@pytest.mark.parametrize("canvas", CANVASES)
def test_defects_of_any_size_change_the_picture_on_their_mask_alone(canvas):
    image = CANVASES[canvas]
    before = image.copy()
    for seed in range(6):
        painted, mask = paint_defects(image, np.random.default_rng(seed))
        assert (image == before).all() and (painted[~mask] == image[~mask]).all()
        assert mask.dtype == bool and painted.dtype == np.float32 and mask.any()
        assert painted.min() >= 0 and painted.max() <= 1
        assert np.abs(painted - image).max(-1)[mask].mean() > defects.FAINTEST / 2


@pytest.mark.parametrize("kind", ["dent", "wear", "misplaced"])
def test_what_is_painted_may_be_as_bright_as_an_image_above_1(kind):
    image = 1 + 2 * CANVASES["photograph"]
    for seed in range(12):
        painted, mask = paint_defect(image, np.random.default_rng(seed), kind)
        assert painted.max() <= image.max() and (painted[~mask] == image[~mask]).all()
        assert painted[mask].mean() > 1.2 and painted[mask].std() > 0.05  # at most 1 it would be flat
    several, mask = paint_defects(image, np.random.default_rng(0))
    assert 1 < several[mask].max() <= image.max()


def test_the_area_of_a_defect_goes_with_the_square_of_its_size():
    image, seeds = photograph(300, 300), range(20)
    areas = {
        size: np.mean([paint_defect(image, np.random.default_rng(seed), "wear", size)[1].sum() for seed in seeds])
        for size in (0.5, 1.0, 2.0)
    }
    assert areas[1.0] / areas[0.5] == pytest.approx(4, rel=0.1) and areas[2.0] / areas[1.0] == pytest.approx(4, rel=0.3)


def test_unknown_kinds_and_tiny_images_are_refused():
    with pytest.raises(PatchadError, match=r"no defect rust; there are scratch, stain"):
        paint_defect(CANVASES["grey"], np.random.default_rng(0), "rust")
    with pytest.raises(PatchadError, match="31 x 64"):
        paint_defect(photograph(31, 64), np.random.default_rng(0))


# ---------------------------------------------------------------------------------------------------- files


def test_the_layout_is_mvtec_ads_and_masks_mark_the_changed_pixels(tmp_path):
    write_synthetic(tmp_path, **SMALL)
    names = list(DEFECTS)
    defective = [*(f"{name}/000" for name in names), f"{names[0]}/001"]
    expected = ["train/good/000.png", "train/good/001.png", "test/good/000.png", "synthetic.json"]
    expected += [f"test/{name}.png" for name in defective] + [f"ground_truth/{name}_mask.png" for name in defective]
    assert sorted(contents(tmp_path)) == sorted(expected)
    for number, name in enumerate(defective):
        clean = np.round(synthetic._good_picture(48, np.random.default_rng((0, 2, number))) * 255)
        painted = read(tmp_path / "test" / f"{name}.png")
        mask = read(tmp_path / "ground_truth" / f"{name}_mask.png")
        assert painted.shape == (48, 48, 3) and painted.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}
        assert ((painted != clean).any(-1) == (mask == 255)).all()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_pictures(tmp_path):
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        write_synthetic(tmp_path / name, **SMALL, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_a_picture_does_not_depend_on_how_many_there_are(tmp_path):
    write_synthetic(tmp_path / "few", **SMALL)
    write_synthetic(tmp_path / "more", train=4, test_normal=3, test_defective=9, size=48)
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    assert len(more) == len(few) + 8
    assert all(more[name] == content for name, content in few.items() if name != "synthetic.json")


def test_no_two_pictures_are_alike(tmp_path):
    write_synthetic(tmp_path / "set", **SMALL)
    pictures = [content for name, content in contents(tmp_path / "set").items() if name.startswith("t")]
    assert len(set(pictures)) == len(pictures) == 10


def test_a_finished_set_is_left_alone(tmp_path):
    write_synthetic(tmp_path / "set", **SMALL)
    marked = tmp_path / "set" / "train" / "good" / "000.png"
    marked.write_bytes(b"marked")
    write_synthetic(tmp_path / "set", **SMALL)
    assert marked.read_bytes() == b"marked"


def test_an_interrupted_run_leaves_nothing_and_the_next_one_finishes(tmp_path, monkeypatch):
    root = tmp_path / "deep" / "set"
    with monkeypatch.context() as patch:
        patch.setitem(DEFECTS, "wear", interrupt)  # after training and some test pictures are written
        with pytest.raises(KeyboardInterrupt):
            write_synthetic(root, **SMALL)
    assert list(root.parent.iterdir()) == []
    write_synthetic(root, **SMALL)
    assert [path.name for path in root.parent.iterdir()] == ["set"]
    assert len(contents(root)) == 18


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_empty_folder_is_filled(tmp_path):
    write_synthetic(tmp_path, **SMALL)
    assert len(contents(tmp_path)) == 18


@pytest.mark.parametrize("changed", [{"train": 3}, {"size": 64}, {"seed": 1}])
def test_a_set_with_other_parameters_is_refused_and_kept(tmp_path, changed):
    root = tmp_path / "set"
    write_synthetic(root, **SMALL)
    before = contents(root)
    with pytest.raises(PatchadError, match=r"set holds a synthetic set made with .*delete") as caught:
        write_synthetic(root, **{**SMALL, **changed})
    assert str(root) in str(caught.value)
    assert contents(root) == before


@pytest.mark.parametrize("manifest", [None, "no json", "[]"])
def test_a_folder_with_anything_else_is_refused_and_kept(tmp_path, manifest):
    (tmp_path / "mine.txt").write_text("precious")
    if manifest is not None:
        (tmp_path / "synthetic.json").write_text(manifest)
    before = contents(tmp_path)
    with pytest.raises(PatchadError, match=r"another data\.root") as caught:
        write_synthetic(tmp_path, **SMALL)
    assert str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == before


def test_a_file_in_the_place_of_the_root_is_refused(tmp_path):
    (tmp_path / "set").write_text("precious")
    with pytest.raises(PatchadError, match=r"holds no synthetic set .* --data\.layout null"):
        write_synthetic(tmp_path / "set", **SMALL)
    assert (tmp_path / "set").read_text() == "precious"


def test_a_set_that_another_process_finished_first_is_accepted(tmp_path, monkeypatch):
    root, write_all = tmp_path / "set", synthetic._write_all

    def write_after_another(made, parameters):
        write_all(root, parameters)
        write_all(made, parameters)

    monkeypatch.setattr(synthetic, "_write_all", write_after_another)
    write_synthetic(root, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(contents(root)) == 18


@pytest.mark.parametrize(
    "wrong", [{"train": 0}, {"test_normal": -1}, {"test_defective": -1}, {"size": 31}, {"seed": -1}]
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(PatchadError, match=next(iter(wrong))):
        write_synthetic(tmp_path / "set", **{**SMALL, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_a_set_without_test_pictures_can_be_made(tmp_path):
    write_synthetic(tmp_path / "set", train=1, test_normal=0, test_defective=0, size=32)
    assert sorted(contents(tmp_path / "set")) == ["synthetic.json", "train/good/000.png"]
    assert json.loads((tmp_path / "set" / "synthetic.json").read_text())["train"] == 1


# ---------------------------------------------------------------------------------------------------- too hard for


@pytest.fixture(scope="module")
def default_set(tmp_path_factory):
    """Training pictures, test pictures and labels of the set as it is by default."""
    root = tmp_path_factory.mktemp("synthetic")
    write_synthetic(root)
    test = sorted(root.glob("test/*/*.png"))
    train = stack(sorted(root.glob("train/good/*.png")))
    return train, stack(test), np.array([path.parent.name != "good" for path in test])


def stack(paths: list[Path]):
    return np.stack([read(path) for path in paths]).astype(np.float32) / 255


def test_the_default_set_has_the_promised_size(default_set):
    train, test, defective = default_set
    assert train.shape == (60, 256, 256, 3) and test.shape == (50, 256, 256, 3)
    assert defective.sum() == 30


def test_the_distance_to_the_mean_picture_does_not_find_the_defects(default_set):
    train, test, defective = default_set
    difference = np.abs(test - train.mean(0))
    for score in (difference.max((1, 2, 3)), difference.mean((1, 2, 3))):
        assert roc_auc_score(defective, score) < 0.75


@pytest.fixture
def one_thread():
    """Many small products are slower on several threads where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_nearest_raw_patches_do_not_find_the_defects(default_set, one_thread):
    train, test, defective = default_set
    raw_train, raw_test = raw_patches(train[::2]), raw_patches(test)
    bases = main_directions(raw_train.flatten(0, 1), 64)  # a quarter of the time
    bank = (raw_train.flatten(0, 1) @ bases).split(3000)
    assert roc_auc_score(defective, [farthest(patches, bank) for patches in raw_test @ bases]) < 0.9


def raw_patches(pictures):
    """Grey 16 x 16 patches, 8 pixels apart, `[picture, patch, 256]`."""
    grey = torch.from_numpy(pictures.mean(-1))
    return grey.unfold(1, 16, 8).unfold(2, 16, 8).flatten(3).flatten(1, 2)


def main_directions(vectors, number):
    """Principal directions `[numbers, number]` of vectors `[vector, numbers]`; they hold 98 % of the variance."""
    variances, directions = torch.linalg.eigh(torch.cov(vectors.T))
    assert variances[-number:].sum() > 0.98 * variances.sum()
    return directions[:, -number:]


def farthest(patches, bank):
    """Largest distance of a patch to its nearest one in the bank, which comes in parts."""
    return torch.stack([torch.cdist(patches, part).amin(1) for part in bank]).amin(0).max().item()
