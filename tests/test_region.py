"""Where to look: nothing outside of a region changes a bit of what is said of an image."""

import csv
import shutil
import sys
from functools import partial
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Trainer, seed_everything
from scipy.ndimage import gaussian_filter

import patchad
from patchad import Learning, PatchadError, PatchDetector, PatchModel, PyramidDataModule
from patchad.callbacks import LastCheckpoint
from patchad.canvas import EACH, Canvas
from patchad.cli import main
from patchad.data.datasets import SyntheticDefects
from patchad.data.synthetic import write_synthetic
from patchad.ensemble import EnsembleModel
from patchad.export import TOLERANCE, export
from patchad.memory import MemoryBank
from patchad.model import mirrored
from patchad.models import EfficientNetLite0, LearnedEncoder
from patchad.pyramid import enlarge, fold, inside, sample_pyramids, touching
from patchad.region import as_text, blank, fitted, judged
from patchad.scoring import Scorer
from patchad.types import UNKNOWN

pytestmark = pytest.mark.filterwarnings(
    "ignore:Total length of `list` across ranks is zero",  # nothing is validated
    "ignore:.* have (a mask that is white on more|defects outside of the region)",
)
SIZE = (96, 80)
"""Height x width of the images, which are padded to 96 x 96."""
rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
DISC = (rows - 40) ** 2 + (columns - 33) ** 2 < 28**2
"""Off the middle, and no multiple of any stride."""
SMALL = {"image_size": (96, 96), "metric_size": (96, 96), "batch_size": 4, "num_workers": 0, "keep_aspect": True}


def write_mask(mask: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return path


def tampered(pixels: np.ndarray, mask: np.ndarray = DISC, seed: int = 0) -> np.ndarray:
    """An image, uint8, with noise wherever the mask is False."""
    noise = np.random.default_rng(seed).integers(0, 256, pixels.shape).astype(np.uint8)
    return np.where(mask[..., None], pixels, noise)


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> tuple[Path, Path]:
    """A product, and the same with noise in all its images outside of the disc, and defects all over their masks."""
    folder = tmp_path_factory.mktemp("roots")
    root, other = folder / "product", folder / "tampered"
    write_synthetic(root, train=8, test_normal=3, test_defective=4, size=96)
    for path in root.rglob("*.png"):
        Image.open(path).crop((0, 0, SIZE[1], SIZE[0])).save(path)
    shutil.copytree(root, other)
    for number, path in enumerate(sorted(other.glob("t*/*/*.png"))):
        Image.fromarray(tampered(pixels_of(path), seed=number)).save(path)
    for path in other.glob("ground_truth/*/*.png"):
        Image.fromarray((np.asarray(Image.open(path)) > 0) | ~DISC).save(path)
    return root, other


@pytest.fixture(scope="module")
def disc(tmp_path_factory) -> Path:
    return write_mask(DISC, tmp_path_factory.mktemp("masks") / "disc.png")


def data(root: Path, region: Path | None, **settings) -> PyramidDataModule:
    return PyramidDataModule(root, region=region, **{**SMALL, **settings})


def trainer(folder: Path, **settings) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", callbacks=[LastCheckpoint(folder)], max_epochs=1, **quiet, **settings)


def default(**settings) -> PatchDetector:
    return PatchDetector(EfficientNetLite0(), bank=partial(MemoryBank, max_vectors=2000), **settings)


def learned() -> PatchDetector:
    """Its losses see painted defects, too."""
    from patchad.losses import Position, Separation

    learning = partial(Learning, losses=[Position(), Separation()], warmup=1.0)
    return default(patch_encoder=LearnedEncoder, learning=learning, sides=(32, 16), mirrored=False)


FITS = {"default": (default, {}), "in one light": (default, {"brightness": 0.4}), "learned": (learned, {})}


@pytest.fixture(scope="module", params=FITS)
def fits(request, roots, disc, tmp_path_factory) -> list[tuple[Path, dict[str, float]]]:
    """Checkpoints of fits on both products with the same region, and the figures of a test."""
    make, settings = FITS[request.param]
    found = []
    for root in roots:
        seed_everything(0, verbose=False)
        folder, detector = tmp_path_factory.mktemp("fit"), make()
        images = data(root, disc, pyramids_per_image=8, validate_on="none", **settings)
        trainer(folder).fit(detector, images)
        figures = trainer(folder).test(detector, images, verbose=False)[0]
        found.append((folder / "last.ckpt", figures))
    return found


def test_what_lies_outside_changes_no_bit_of_a_fit_or_of_its_figures(fits):
    (one, figures), (other, tampered_figures) = fits
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert [name for name, values in states[0].items() if not torch.equal(values, states[1][name])] == []
    assert figures == tampered_figures and {"test/pro", "test/segmentation_auroc"} <= figures.keys()


def test_a_defect_outside_changes_no_bit_of_a_checkpoint_or_an_exported_file(fits, roots, tmp_path, monkeypatch):
    model = PatchModel.load(fits[0][0])
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    export(model, tmp_path / "model.patchad")
    file, said = patchad.load(tmp_path / "model.patchad"), []
    for number, path in enumerate(sorted(roots[0].glob("test/*/*.png"))):
        pixels = pixels_of(path)
        for score in (model.predict, file):
            found, other = score(pixels), score(tampered(pixels, seed=100 + number))
            assert found[:4] == other[:4] and np.array_equal(found.map, other.map)
            assert not found.map[~DISC].any() and found.map[DISC].all()
            said.append(found)
    for one, other in zip(said[::2], said[1::2], strict=True):
        assert other.score == pytest.approx(one.score, rel=TOLERANCE)
        np.testing.assert_allclose(other.map, one.map, rtol=0, atol=TOLERANCE * one.map.max())
    assert len({found.score for found in said[::2]}) == len(said) // 2


def test_the_bank_holds_no_patch_whose_middle_lies_outside(fits):
    model = PatchModel.load(fits[0][0])
    for side, bank in ((side, model.bank(side)) for side in model.sides):
        stride, (_, width) = model.encoder.strides[side], model.encoder.grid((96, 96), side)
        for place in bank.keys[:, 1].unique().tolist():
            top, left = place // width * stride, place % width * stride
            assert DISC[top : top + side, left : left + side].any()
        assert 0 < len(bank.keys[:, 1].unique()) < np.prod(model.encoder.grid((96, 96), side))


# geometry


@pytest.mark.parametrize(("side", "stride"), [(64, 16), (32, 8), (16, 8), (16, 16), (24, 8), (20, 4), (8, 8)])
def test_of_content_the_same_patches_count_as_without_a_region(side, stride):
    generator = np.random.default_rng(0)
    grid = tuple((length - side) // stride + 1 for length in (112, 144))
    for height, width in [(112, 144), (1, 1), *generator.integers(1, (112, 144), (60, 2)).tolist()]:
        region = torch.zeros(1, 112, 144, dtype=torch.bool)
        region[:, :height, :width] = True
        expected = inside(torch.tensor([[height, width]]), grid, side, stride)
        assert torch.equal(touching(region, grid, side, stride), expected)


@pytest.mark.parametrize(("side", "stride"), [(64, 16), (32, 8), (16, 8), (16, 16), (24, 8)])
def test_patches_that_count_touch_the_region_and_cover_all_of_it(side, stride):
    grid = tuple((length - side) // stride + 1 for length in (96, 128))
    region = torch.rand(20, 96, 128, generator=torch.Generator().manual_seed(0)) > 0.9995
    counted = touching(region, grid, side, stride)
    covered = fold(torch.ones_like(counted).float(), counted, side, stride, stride)
    assert enlarge(covered, stride)[region].eq(1).all()
    for image, row, column in counted.nonzero().tolist():
        assert region[image, row * stride : row * stride + side, column * stride : column * stride + side].any()
    assert not counted.all()


def blobs(count: int, height: int, width: int) -> np.ndarray:
    """Regions of some area in all places, none of them empty."""
    noise = np.random.default_rng(0).random((count, height, width))
    smooth = np.stack([gaussian_filter(one, 5) for one in noise])
    return smooth > np.quantile(smooth, 0.6, axis=(1, 2), keepdims=True)


@pytest.mark.parametrize("image_score", ["max", "top_fraction"])
@pytest.mark.parametrize("fraction", [0.001, 0.03, 0.4, 1.0])
def test_scores_are_of_the_pixels_of_the_region_alone(fraction, image_score):
    cells, region, content = torch.rand(4, 6, 8), blobs(4, 45, 61), torch.tensor([[45, 61]] * 4)
    scorer = Scorer((64,), image_score=image_score, top_fraction=fraction)
    found = scorer.score(cells, content, 8, torch.from_numpy(region))
    for score, values, where in zip(found, enlarge(cells, 8)[:, :45, :61].numpy(), region, strict=True):
        pixels = np.sort(values[where])[::-1]
        top = 1 if image_score == "max" else int(np.ceil(fraction * pixels.size - 1e-9))
        assert score.item() == pytest.approx(pixels[:top].mean(), rel=1e-5)


def test_maps_are_smoothed_as_if_nothing_lay_around_the_region():
    maps, region, content = torch.rand(2, 40, 56), blobs(2, 40, 56), torch.tensor([[40, 56]] * 2)
    smooth = Scorer((64,), smoothing=2.5).smooth(maps, content, 1, torch.from_numpy(region))
    for found, values, where in zip(smooth.numpy(), maps.numpy().astype(float), region, strict=True):
        blurred, reached = (
            gaussian_filter(one, 2.5, mode="constant", truncate=12) for one in (values * where, where.astype(float))
        )
        np.testing.assert_allclose(found[where], (blurred / reached)[where], rtol=1e-5)
        assert not found[~where].any()


@pytest.mark.parametrize("size", [(48, 64), (41, 33)])
@pytest.mark.parametrize("smoothing", [0.0, 8.0])
def test_a_region_of_all_content_is_no_region(size, smoothing):
    cells, content, region = torch.rand(1, 6, 8), torch.tensor([size]), torch.zeros(1, 48, 64, dtype=torch.bool)
    region[:, : size[0], : size[1]] = True
    scorer = Scorer((64,), smoothing=smoothing)
    assert torch.equal(scorer.score(cells, content, 8, region), scorer.score(cells, content, 8))
    on_content = scorer.smooth(cells, content, 8)[:, : size[0], : size[1]]
    found = scorer.smooth(cells, content, 8, region)
    torch.testing.assert_close(found[:, : size[0], : size[1]], on_content, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("content", [(96, 80), (33, 27), (2, 2), (130, 200)])
def test_on_a_canvas_all_that_touches_a_judged_pixel_is_judged(content):
    mask = np.random.default_rng(0).random(SIZE) > 0.999
    found = fitted(mask, content, (140, 210))
    assert not found[content[0] :].any() and not found[:, content[1] :].any()
    for place in np.argwhere(mask):
        assert found[tuple(((place + 1) * content - 1) // SIZE)]
    assert found.sum() <= mask.sum() * max(1, 2 * content[0] / SIZE[0]) * max(1, 3 * content[1] / SIZE[1])
    assert fitted(np.ones(SIZE, bool), content, (140, 210)).sum() == content[0] * content[1]


def test_pyramids_lie_around_the_region():
    for seed in range(20):
        drawn = sample_pyramids((384, 384), (100, 60), 16, 4, 64, (0, 0), np.random.default_rng(seed), (200, 301))
        top, left = (drawn.window + drawn.anchor).amin(0).tolist()
        bottom, right = (drawn.window + drawn.anchor).amax(0).tolist()
        assert top >= 196 and left >= 296 and bottom + 16 <= 304 and right + 16 <= 364
    corner = sample_pyramids((384, 384), (5, 5), 16, 4, 64, (0, 0), np.random.default_rng(0), (379, 0))
    assert corner.window.tolist() == [336, 0]


# files


def test_a_mirrored_image_has_a_mirrored_region(roots, disc):
    images = data(roots[0], disc)
    images.setup("fit")
    batch = next(iter(images.normal_dataloader()))
    assert torch.equal(batch.region[0, : SIZE[0], : SIZE[1]], torch.from_numpy(DISC))
    found = mirrored(batch, (2,))
    assert torch.equal(found.region[0, : SIZE[0], : SIZE[1]], torch.from_numpy(DISC[:, ::-1].copy()))
    assert not found.region[:, :, SIZE[1] :].any()
    assert not torch.equal(found.image, batch.image)


def test_painted_defects_lie_in_the_region_and_are_seen_there(roots, disc):
    images = data(roots[0], disc, held_out_fraction=0.9)
    images.setup("fit")
    painted = SyntheticDefects(images.held_out_set, seed=0)
    for number in range(0, len(painted), 2):
        normal, defective = painted[number], painted[number + 1]
        changed = (normal.image != defective.image).any(0)
        assert int(defective.label) == 1 and defective.mask.any()
        assert changed.any() and not (changed & ~normal.region).any()


def test_an_image_whose_defect_lies_outside_is_told(roots, tmp_path):
    mask = np.zeros(SIZE, bool)
    mask[:4, :4] = True
    images = data(roots[1], write_mask(mask, tmp_path / "corner.png"))
    images.setup("test")
    for batch in images.test_dataloader():
        for label, doubts in zip(batch.label.tolist(), batch.doubts, strict=True):
            assert ("have defects outside of the region alone" in doubts) == (label == 1 and "white" not in doubts)


@pytest.fixture
def masks(roots, tmp_path) -> Path:
    """A mask for each image of the product: a disc on some, a half of the others."""
    for number, path in enumerate(sorted(roots[0].glob("t*/*/*.png"))):
        mask = DISC if number % 2 else columns < 40
        write_mask(mask, tmp_path / "masks" / path.relative_to(roots[0]).with_name(f"{path.stem}_mask.png"))
    return tmp_path / "masks"


def test_each_image_may_have_a_mask_of_its_own(roots, masks, tmp_path, monkeypatch):
    detector, images = default(sides=(16,), mirrored=False), data(roots[0], masks, validate_on="none")
    trainer(tmp_path).fit(detector, images)
    for number, sample in enumerate(images.normal_set.samples):
        region = images.normal_set[number].region[: SIZE[0], : SIZE[1]].numpy()
        assert np.array_equal(region, np.asarray(Image.open(sample.region)))
    trainer(tmp_path).test(detector, data(roots[0], masks), verbose=False)
    model, path = PatchModel.load(tmp_path / "last.ckpt"), sorted(roots[0].glob("test/*/*.png"))[0]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    export(model, tmp_path / "model.patchad")
    file, pixels = patchad.load(tmp_path / "model.patchad"), pixels_of(path)
    expected = model.predict(pixels, region=DISC)
    assert model.predict(tampered(pixels), region=DISC).score == expected.score
    assert file(pixels, region=DISC).score == pytest.approx(expected.score, rel=TOLERANCE)
    together = file.score([pixels, pixels], regions=[DISC, columns < 40])
    assert together[0].score == pytest.approx(expected.score, rel=TOLERANCE)
    assert not together[1].map[:, 40:].any()
    with pytest.raises(PatchadError, match="was given 1 images, but 2 regions"):
        file.score([pixels], regions=[DISC, DISC])
    for score in (model.predict, file):
        for region, words in REFUSED.items():
            with pytest.raises(PatchadError, match=words):
                score(pixels, region=WRONG[region])


WRONG = {"none": None, "bytes": DISC.astype(np.uint8), "turned": DISC.T, "black": np.zeros(SIZE, bool)}
REFUSED = {
    "none": "fitted with a mask for each image: give this one's region",
    "bytes": "must be a bool array",
    "turned": r"80 x 96 pixels \(height x width\), the image has 96 x 80",
    "black": "black everywhere",
}


def test_no_image_is_judged_as_a_whole_unawares():
    model = PatchModel(EfficientNetLite0(weights="none"), sides=(16,))
    model.canvas = Canvas((96, 96), region=as_text(DISC))
    with pytest.raises(PatchadError, match="was fitted with a region: give it, or call predict"):
        model(torch.rand(1, 3, 96, 96))


def test_who_was_fitted_without_a_region_takes_none():
    with pytest.raises(PatchadError, match=r"fitted without: give --data\.region to its fit"):
        judged(Canvas((96, 96)), SIZE, DISC)
    assert judged(Canvas((96, 96)), SIZE) is None
    assert np.array_equal(judged(Canvas((96, 96), region=as_text(DISC)), SIZE), DISC)
    assert np.array_equal(judged(Canvas((96, 96), region=as_text(DISC)), SIZE, ~DISC), ~DISC)
    assert np.array_equal(judged(Canvas((96, 96), region=EACH), SIZE, DISC), DISC)
    of_pillow = np.asarray(Image.fromarray(DISC))  # whose True may be 255
    assert judged(Canvas((96, 96), region=EACH), SIZE, of_pillow).view(np.uint8).max() == 1
    with pytest.raises(PatchadError, match="is damaged"):
        judged(Canvas((96, 96), region=as_text(DISC)[:-40]), SIZE)


def test_what_is_blanked_depends_on_the_inside_alone():
    image = np.random.default_rng(0).random((3, *SIZE), dtype=np.float32)
    other = np.where(DISC, image, 1 - image)
    assert np.array_equal(blank(image, DISC), blank(other, DISC))
    np.testing.assert_allclose(blank(image, DISC).mean((1, 2)), image[:, DISC].mean(1), rtol=1e-5)
    assert blank(image, None) is image


def test_a_mask_that_is_white_everywhere_is_none(roots, tmp_path):
    images = data(roots[0], write_mask(np.ones(SIZE, bool), tmp_path / "white.png"))
    assert images.canvas == data(roots[0], None).canvas


def grey() -> np.ndarray:
    levels = DISC.astype(np.uint8) * 255
    levels[80:, :40] = 120
    return levels


FILES = {
    "black.png": (np.zeros(SIZE, bool), "has no white: nothing would be judged"),
    "dim.png": (DISC.astype(np.uint8), "has no white"),
    "grey.png": (grey(), "has grey areas"),
    "turned.png": (DISC.T, r"has 80 x 96 pixels \(height x width\), .*png has 96 x 80"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mask_that_is_none_of_the_images_is_refused_before_anything_is_read(name, roots, tmp_path):
    mask, words = FILES[name]
    with pytest.raises(PatchadError, match=words):
        data(roots[0], write_mask(mask, tmp_path / name)).setup("fit")


def test_what_cannot_be_read_or_is_not_there_is_refused(roots, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(PatchadError, match=r"cannot read image .*broken\.png"):
        data(roots[0], tmp_path / "broken.png")
    with pytest.raises(PatchadError, match=r"data\.region .*gone\.png does not exist; give a mask, or a folder"):
        data(roots[0], tmp_path / "gone.png").setup("fit")


def test_a_soft_edge_is_no_grey_area(roots, tmp_path):
    soft = (gaussian_filter(DISC.astype(float), 2) * 255).round().astype(np.uint8)
    images = data(roots[0], write_mask(soft, tmp_path / "soft.png"))
    images.setup("test")
    assert images.canvas.region == as_text(soft > 128)


def test_images_and_masks_that_do_not_fit_each_other_are_named(roots, masks):
    moved = next(masks.glob("test/good/*.png")).rename(masks / "nobody.png")
    with pytest.raises(PatchadError, match=r"1 files have no mask in data\.region .*test/good"):
        data(roots[0], masks).setup("test")
    shutil.copy(moved, masks / "test/good" / "0_mask.png")
    for path in roots[0].glob("test/good/*.png"):
        shutil.copy(moved, masks / "test/good" / path.name)
    with pytest.raises(PatchadError, match=r"fit no image of .*nobody"):
        data(roots[0], masks).setup("test")


def test_one_mask_for_images_of_one_name_is_refused(roots, masks):
    names = {path.stem for path in roots[0].glob("test/*/*.png")}
    shutil.rmtree(masks)
    for name in names | {path.stem for path in roots[0].glob("train/good/*.png")}:
        write_mask(DISC, masks / f"{name}.png")
    with pytest.raises(PatchadError, match=r"fits both .* and .*: arrange masks in folders"):
        data(roots[0], masks).setup("test")


def test_a_mask_of_another_size_than_its_image_is_told_of_that_image(roots, masks):
    path = next(masks.glob("test/good/*.png"))
    write_mask(DISC.T, path)
    images = data(roots[0], masks)
    images.setup("test")
    errors = [error for batch in images.test_dataloader() for error in batch.error if error]
    assert len(errors) == 1 and "has 80 x 96 pixels" in errors[0] and "test/good" in errors[0]


def test_images_to_predict_need_no_region_of_their_own_but_the_size_of_it(roots, disc, tmp_path):
    shutil.copytree(roots[0] / "test", tmp_path / "new")
    Image.new("RGB", (50, 50)).save(tmp_path / "new" / "zz.png")
    images = data(tmp_path / "new", disc)
    images.setup("predict")
    errors = {}
    for batch in images.predict_dataloader():
        errors |= dict(zip(batch.path, batch.error, strict=True))
    assert "has 50 x 50: give a mask of the size" in errors.pop(str(tmp_path / "new" / "zz.png"))
    assert len(errors) == 7 and not any(errors.values())
    assert images.predict_set.samples[0].defect == UNKNOWN


# commands

QUICK = [
    "--data.image_size=[96,96]",
    "--data.metric_size=[96,96]",
    "--data.num_workers=0",
    "--model.sides=[32,16]",
    "--model.bank.max_vectors=500",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder for commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["patchad"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    return tmp_path


LAST = "--ckpt_path=runs/version_0/checkpoints/last.ckpt"


def test_commands_carry_the_mask_for_all_images_from_a_fit_to_the_last_score(roots, disc, here, capsys):
    shutil.copy(disc, "mask.png")
    main(["fit", f"--data.root={roots[0]}", "--data.region=mask.png", *QUICK])
    Path("mask.png").unlink()
    main(["test", LAST])
    main(["predict", LAST, f"--data.root={roots[0]}/test"])
    main(["export", LAST])
    main(["verify", "model.patchad", LAST, "--images=3"])
    assert capsys.readouterr().out.count("| same |") == 3
    model, file = PatchModel.load(LAST.partition("=")[2]), patchad.load("model.patchad")
    found = list(csv.DictReader(Path("runs/version_2/predictions/scores.csv").read_text().splitlines()))
    assert len(found) == 7
    for row in found:
        expected = model.predict(row["path"])
        assert float(row["score"]) == pytest.approx(expected.score, rel=1e-5)
        assert int(row["area"]) == (expected.map > model.scorer.limits.map_threshold).sum()
        assert file(row["path"]).score == pytest.approx(expected.score, rel=TOLERANCE)


def test_what_a_fit_did_not_have_is_warned_of(roots, disc, here):
    main(["fit", f"--data.root={roots[0]}", *QUICK])
    with pytest.warns(UserWarning, match=r"images of region None, not \w{8}: verdicts do not hold"):
        main(["test", LAST, f"--data.region={disc}"])


def test_commands_ask_for_the_masks_of_other_images_again(roots, masks, here, capsys):
    main(["fit", f"--data.root={roots[0]}", f"--data.region={masks}", *QUICK])
    main(["test", LAST])
    main(["export", LAST])
    main(["verify", "model.patchad", LAST, f"--data.root={roots[0]}/test", f"--data.region={masks}/test", "--images=3"])
    assert capsys.readouterr().out.count("| same |") == 3
    shutil.copytree(roots[0] / "test", "new")
    with pytest.raises(SystemExit):
        main(["predict", LAST, "--data.root=new", "--data.region=nowhere"])
    assert "data.region nowhere does not exist" in capsys.readouterr().err
    main(["predict", LAST, "--data.root=new", f"--data.region={masks}/test"])
    assert len(list(Path("runs").rglob("predictions/maps/*/*.png"))) == 7


def test_members_of_an_ensemble_look_where_it_looks(roots, disc, here, capsys):
    for number in (0, 1):
        main(["fit", f"--data.root={roots[0]}", f"--data.region={disc}", f"--model.bank.seed={number}", *QUICK])
    members = [f"runs/version_{number}/checkpoints/last.ckpt" for number in (0, 1)]
    together = ["fit", "--config=ensemble", f"--model.members={members}", f"--data.root={roots[0]}", *QUICK[:3]]
    together += QUICK[-2:]
    with pytest.raises(SystemExit):
        main(together)
    assert "was fitted with data.region" in capsys.readouterr().err
    main([*together, f"--data.region={disc}", "--trainer.logger.save_dir=both"])
    model = EnsembleModel.load("both/version_0/checkpoints/last.ckpt")
    pixels = pixels_of(next(roots[0].glob("test/*/*.png")))
    found, other = model.predict(pixels), model.predict(tampered(pixels))
    assert found.score == other.score and np.array_equal(found.map, other.map) and not found.map[~DISC].any()


def test_a_fit_that_goes_on_keeps_the_region(roots, disc, here):
    shutil.copy(disc, "mask.png")
    further = ["--config=learned", "--data.pyramids_per_image=8", "--trainer.check_val_every_n_epoch=1"]
    main(["fit", *further, f"--data.root={roots[0]}", "--data.region=mask.png", *QUICK, "--trainer.max_epochs=1"])
    Path("mask.png").unlink()
    main(["fit", LAST, "--trainer.max_epochs=2"])
    whole, half = (PatchModel.load(f"runs/version_{number}/checkpoints/last.ckpt") for number in (0, 1))
    assert whole.canvas == half.canvas and half.canvas.region == as_text(DISC)
