from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from patchad.data import PyramidDataModule
from patchad.data.layouts import BTAD, Folder, MagneticTile, MVTecAD, Synthetic, detect_layout, tiles
from patchad.errors import PatchadError
from patchad.folders import images_below


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / name)


def counts(samples) -> Counter:
    return Counter((sample.split, sample.defect, sample.mask is not None) for sample in samples)


def test_mvtec_ad_is_read_as_its_authors_split_it(tmp_path):
    touch(tmp_path, "train/good/0.png", "train/good/1.PNG", "test/good/0.png", "test/hole/0.png", "test/hole/1.png")
    touch(tmp_path, "ground_truth/hole/0_mask.png")
    expected = {("train", "good", False): 2, ("test", "good", False): 1}
    expected |= {("test", "hole", True): 1, ("test", "hole", False): 1}
    assert counts(MVTecAD().samples(tmp_path)) == expected
    assert isinstance(detect_layout(tmp_path), MVTecAD)


def test_folders_within_a_defect_type_belong_to_it(tmp_path):
    touch(tmp_path, "train/good/line1/0.png", "test/good/line1/0.png", "test/hole/line1/0.png", "test/hole/line2/0.png")
    touch(tmp_path, "ground_truth/hole/line2/0_mask.png")
    expected = {("train", "good", False): 1, ("test", "good", False): 1}
    expected |= {("test", "hole", True): 1, ("test", "hole", False): 1}
    assert counts(MVTecAD().samples(tmp_path)) == expected
    touch(tmp_path, "test/0.png")
    with pytest.raises(PatchadError, match=r"test/0\.png lies in no folder of test"):
        MVTecAD().samples(tmp_path)


@pytest.mark.parametrize(("layout", "good", "bad"), [(MVTecAD, "good", "hole"), (BTAD, "ok", "ko")])
def test_a_folder_with_test_images_alone_is_tested_and_not_learned_from(layout, good, bad, tmp_path):
    touch(tmp_path, f"test/{good}/0.png", f"test/{bad}/0.png")
    assert isinstance(detect_layout(tmp_path), layout)
    data = PyramidDataModule(tmp_path)
    data.setup("test")
    assert len(data.test_set) == 2
    with pytest.raises(PatchadError, match="has no training images"):
        data.setup("fit")


def test_btad_is_read_with_masks_of_another_format(tmp_path):
    touch(tmp_path, "train/ok/0.bmp", "test/ok/1.bmp", "test/ko/2.bmp", "ground_truth/ko/2.png")
    expected = {("train", "good", False): 1, ("test", "good", False): 1, ("test", "ko", True): 1}
    assert counts(BTAD().samples(tmp_path)) == expected
    assert isinstance(detect_layout(tmp_path), BTAD)


def test_a_folder_of_any_tree_is_split_by_its_seed(tmp_path):
    touch(tmp_path, *(f"normal/line{number % 2}/{number}.jpg" for number in range(10)))
    touch(tmp_path, "abnormal/dent/a.jpg", "abnormal/b.jpg", "masks/dent/a.png", "masks/b_mask.png")
    first, again, other = (Folder(seed=seed).samples(tmp_path) for seed in (0, 0, 1))
    assert first == again != other
    expected = {("train", "good", False): 8, ("test", "good", False): 2}
    assert counts(first) == expected | {("test", "dent", True): 1, ("test", "abnormal", True): 1}
    assert isinstance(detect_layout(tmp_path), Folder)


def test_a_folder_of_normal_images_alone_is_all_training(tmp_path):
    touch(tmp_path, "a.png", "b.tif", ".hidden/c.png", "notes.txt.png/d.png")
    samples = Folder(normal=".").samples(tmp_path)
    assert {sample.path.name for sample in samples} == {"a.png", "b.tif", "d.png"}
    assert {sample.split for sample in samples} == {"train"}


def test_folders_inside_the_normal_folder_keep_their_own_meaning(tmp_path):
    touch(tmp_path, "0.png", "1.png", "2.png", "bad/3.png", "truth/3.png", "checked/4.png")
    samples = Folder(normal=".", abnormal="bad", masks="truth", normal_test="checked").samples(tmp_path)
    expected = {("train", "good", False): 3, ("test", "good", False): 1, ("test", "bad", True): 1}
    assert counts(samples) == expected


def test_folders_inside_the_abnormal_folder_keep_their_own_meaning(tmp_path):
    touch(tmp_path, "train/0.png", "train/1.png", "test/ok/0.png", "test/dent/0.png", "test/masks/dent/0.png")
    samples = Folder(normal="train", abnormal="test", normal_test="test/ok", masks="test/masks").samples(tmp_path)
    assert counts(samples) == {("train", "good", False): 2, ("test", "good", False): 1, ("test", "dent", True): 1}


def test_linked_folders_are_entered_and_links_back_up_are_not(tmp_path):
    touch(tmp_path, "elsewhere/0.png", "root/train/good/0.png", "root/test/good/0.png")
    (tmp_path / "root/test/hole").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/test/again").symlink_to(tmp_path / "root")
    samples = MVTecAD().samples(tmp_path / "root")
    assert counts(samples) == {("train", "good", False): 1, ("test", "good", False): 1, ("test", "hole", False): 1}


def test_a_root_may_be_named_from_within(tmp_path, monkeypatch):
    touch(tmp_path, "0.png", "inner/1.png")
    monkeypatch.chdir(tmp_path / "inner")
    assert [path.name for path in images_below(Path(".."))] == ["0.png", "1.png"]


def test_pictures_in_run_folders_are_no_images_of_the_product(tmp_path):
    touch(tmp_path, "0.png", "runs/version_0/clusters/1.png", "other/2.png")
    (tmp_path / "runs/version_0/config.yaml").write_text("# pytorch_lightning==2.6.6\nseed_everything: 0\n")
    (tmp_path / "other/config.yaml").write_text("camera: 3\n")
    assert sorted(path.name for path in images_below(tmp_path)) == ["0.png", "2.png"]


def test_masks_beside_images_are_refused():
    with pytest.raises(PatchadError, match="cannot both lie in abnormal"):
        Folder(masks="abnormal/")


def test_masks_are_found_with_a_suffix_in_capitals(tmp_path):
    touch(tmp_path, "normal/0.BMP", "normal/1.BMP", "abnormal/dent/a.BMP", "masks/dent/a_mask.PNG")
    assert [one.mask for one in Folder().samples(tmp_path) if one.defect == "dent"] == [
        tmp_path / "masks/dent/a_mask.PNG"
    ]


def test_a_missing_folder_lists_what_there_is(tmp_path):
    touch(tmp_path, "pictures/0.png")
    with pytest.raises(PatchadError, match="has no folder normal; it has pictures"):
        Folder().samples(tmp_path)
    with pytest.raises(PatchadError, match="has no folder scrap; it has normal, pictures"):
        touch(tmp_path, "normal/0.png")
        Folder(abnormal="scrap").samples(tmp_path)
    (tmp_path / "normal" / "0.png").unlink()
    (tmp_path / "normal").rmdir()
    with pytest.raises(PatchadError, match=r"not known: it has pictures, and none of .*--data\.layout\.abnormal scrap"):
        detect_layout(tmp_path)
    with pytest.raises(PatchadError, match="does not exist"):
        detect_layout(tmp_path / "nowhere")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "normal").mkdir()
    with pytest.raises(PatchadError, match="no images below"):
        images_below(tmp_path / "normal")


def test_a_tile_ends_where_the_exposure_does_not_rise():
    names = ["exp1_num_10", "exp3_num_12", "exp2_num_15", "exp2_num_20", "exp6_num_21", "exp0_num_30"]
    groups = tiles(Path(f"{name}.jpg") for name in reversed(names))
    assert [[path.stem for path in group] for group in groups] == [names[:2], names[2:3], names[3:5], names[5:]]


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(PatchadError, match="split honest is unknown; choose one of published, random, by_tile"):
        MagneticTile("honest")


def test_a_tree_without_the_published_names_says_how_many_are_missing(tmp_path):
    touch(tmp_path, *(f"MT_{kind}/Imgs/exp1_num_{n}.jpg" for n, kind in enumerate(MagneticTile.defect_types, 1)))
    touch(tmp_path, "MT_Free/Imgs/exp0_num_1.jpg", "MT_Free/Imgs/exp1_num_2.jpg")
    with pytest.raises(PatchadError, match=r"lacks 76[01] of its 761"):
        MagneticTile().samples(tmp_path)


def test_the_synthetic_layout_writes_its_set_once(tmp_path):
    layout = Synthetic(train=2, test_normal=1, test_defective=1)
    layout.prepare(tmp_path / "set")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.png")}
    layout.prepare(tmp_path / "set")
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.png")}
    assert len(layout.samples(tmp_path / "set")) == 4


@pytest.mark.data
def test_magnetic_tile_has_the_published_counts(shared):
    samples = MagneticTile("published").samples(shared / "data/magnetic_tile")
    found = Counter((sample.split, sample.defect) for sample in samples)
    expected = {("train", "good"): 761, ("test", "good"): 191, ("test", "blowhole"): 115, ("test", "break"): 85}
    assert found == expected | {("test", "crack"): 57, ("test", "fray"): 32, ("test", "uneven"): 103}


def test_by_tile_whole_tiles_are_trained_on_tested_or_left_out(tmp_path):
    """Ten clean tiles under three exposures each, and an eleventh that has a crack under the second."""
    free = [f"MT_Free/Imgs/exp{e}_num_{10 * tile + e}.jpg" for tile in range(10) for e in (1, 2, 3)]
    faulty = ["MT_Free/Imgs/exp1_num_200.jpg", "MT_Crack/Imgs/exp2_num_201.jpg", "MT_Free/Imgs/exp3_num_202.jpg"]
    others = [f"MT_{kind}/Imgs/exp1_num_{n}.jpg" for n, kind in enumerate(("Blowhole", "Break", "Fray", "Uneven"), 300)]
    touch(tmp_path, *free, *faulty, *others)
    samples = MagneticTile("by_tile", test_fraction=0.3, seed=1).samples(tmp_path)
    names = {
        split: {s.path.name for s in samples if s.split == split and s.defect == "good"} for split in ("train", "test")
    }
    numbers = {split: {int(name.split("_")[-1][:-4]) // 10 for name in found} for split, found in names.items()}
    assert len(numbers["test"]) == 3 and len(numbers["train"]) == 7 and not numbers["train"] & numbers["test"]
    assert len(names["train"]) == 21 and len(names["test"]) == 9  # nothing of the tile with the crack
    assert [sample.path.name for sample in samples if sample.defect == "crack"] == ["exp2_num_201.jpg"]
    things: dict[str, set[int]] = {}
    for sample in samples:
        if sample.split == "train":
            things.setdefault(sample.thing, set()).add(int(sample.path.stem.split("_")[-1]) // 10)
    assert len(things) == 7 and all(len(tile) == 1 for tile in things.values())


@pytest.mark.data
def test_by_tile_no_tile_is_on_both_sides(shared):
    root = shared / "data/magnetic_tile"
    samples = MagneticTile("by_tile").samples(root)
    every = tiles(path for path in root.rglob("*.jpg"))
    tile_of = {path: number for number, tile in enumerate(every) for path in tile}
    faulty = {tile_of[sample.path] for sample in samples if sample.defect != "good"}
    train = {tile_of[sample.path] for sample in samples if sample.split == "train"}
    tested = {tile_of[sample.path] for sample in samples if sample.split == "test" and sample.defect == "good"}
    assert (len(every), len(faulty)) == (251, 85)
    assert not (train & tested or train & faulty or tested & faulty)
    assert len(tested) == round(0.2 * (251 - 85))
    assert sum(sample.defect == "good" for sample in samples) == 952 - 35
    data = PyramidDataModule(root, layout=MagneticTile("by_tile"))
    data.setup("fit")
    trained, calibrated = (
        {tile_of[sample.path] for sample in one.samples} for one in (data.train_set, data.held_out_set)
    )
    assert not trained & calibrated
