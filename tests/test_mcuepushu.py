import csv
import re
import shutil
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn, idctn
from test_cli import SMALL, commands_in, here  # noqa: F401

from patchad import PatchadError, PyramidDataModule
from patchad.cli import main
from patchad.data.layouts import MagneticTile, tiles
from patchad.peers import MCuePushU, MCuePushUModel
from patchad.peers.cues import brightest, cosines, enclosure, saliency
from patchad.peers.mcuepushu import box_loss, only_box, pixel_loss
from patchad.peers.unet import Push, UNet

WHOLE = torch.tensor([[64, 64]])
BY_TILE = ["--data.layout.split=by_tile"]
SHORT = ["--config=mcuepushu", *SMALL, "--data.image_size=[64,64]", "--model.width=4", "--model.learning_rate=0.01"]
EPOCHS = 8


def write_photograph(path: Path, generator: np.random.Generator, defective: bool) -> None:
    """A grey photograph of 64 x 48 pixels; a defect is a dark spot of 9 x 7 pixels, and its mask lies beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels, mask = generator.normal(150, 4, (64, 48)), np.zeros((64, 48), np.uint8)
    if defective:
        top, left = generator.integers(4, 50), generator.integers(4, 36)
        pixels[top : top + 9, left : left + 7] -= 90
        mask[top : top + 9, left : left + 7] = 255
        Image.fromarray(mask).save(path.with_suffix(".png"))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Ten clean tiles, and four with a defect of each type, each under two exposures."""
    folder, generator = tmp_path_factory.mktemp("products") / "tiles", np.random.default_rng(0)
    kinds = ["Free"] * 10 + [kind for kind in MagneticTile.defect_types for _ in range(4)]
    for number, kind in enumerate(kinds):
        for exposure in (1, 2):
            name = f"MT_{kind}/Imgs/exp{exposure}_num_{100 * number + exposure}.jpg"
            write_photograph(folder / name, generator, kind != "Free")
    return folder


@pytest.fixture(scope="module")
def fitted(root, tmp_path_factory) -> Path:
    """The folder of two runs: a fit on the tiles, and its test."""
    folder = tmp_path_factory.mktemp("fitted")
    with commands_in(folder):
        main(["fit", *SHORT, *BY_TILE, f"--data.root={root}", *epochs(EPOCHS)])
        main(["test", f"--ckpt_path={checkpoint(folder)}", "--trainer.enable_progress_bar=false"])
    return folder


def epochs(count: int) -> list[str]:
    return [f"--trainer.max_epochs={count}", f"--trainer.check_val_every_n_epoch={count}"]


def checkpoint(folder: Path, version: int = 0) -> str:
    return str(folder / f"runs/version_{version}/checkpoints/last.ckpt")


def column(folder: Path, version: int, name: str) -> list[float]:
    rows = csv.DictReader((folder / f"runs/version_{version}/metrics.csv").read_text().splitlines())
    return [float(row[name]) for row in rows if row[name]]


# which defects are learned from


@pytest.mark.parametrize("split", ["random", "by_tile"])
def test_a_share_of_the_defects_of_each_type_is_trained_on_and_the_rest_is_tested(split, root):
    samples = MagneticTile(split, labelled=0.25).samples(root)
    sides = {side: {one.path for one in samples if one.split == side} for side in ("train", "test")}
    assert not sides["train"] & sides["test"]
    for kind in MagneticTile.defect_types:
        assert sum(one.split == "train" for one in samples if one.defect == kind.lower()) == 2
    assert all(one.mask is not None for one in samples if one.defect != "good")
    assert samples == MagneticTile(split, labelled=0.25).samples(root)
    assert samples != MagneticTile(split, labelled=0.25, seed=1).samples(root)


def test_by_tile_no_tile_with_a_defect_is_on_both_sides(root):
    samples = MagneticTile("by_tile", labelled=0.5).samples(root)
    side = {one.path: one.split for one in samples}
    for tile in tiles(root.rglob("*.jpg")):
        assert len({side[path] for path in tile}) == 1


@pytest.mark.data
@pytest.mark.parametrize("split", ["published", "by_tile"])
def test_half_of_magnetic_tile_is_labelled_and_no_tile_is_on_both_sides_by_tile(split, shared):
    folder = shared / "data/magnetic_tile"
    samples = MagneticTile(split, labelled=0.5).samples(folder)
    side = {one.path: one.split for one in samples}
    assert 0.4 < np.mean([one.split == "train" for one in samples if one.defect != "good"]) < 0.6
    assert [one for one in samples if one.defect == "good"] == [
        one for one in MagneticTile(split).samples(folder) if one.defect == "good"
    ]
    if split == "by_tile":
        assert max(len({side[path] for path in tile if path in side}) for tile in tiles(folder.rglob("*.jpg"))) == 1


def test_what_is_normal_is_the_same_whatever_is_labelled(root, caplog):
    sets = []
    for labelled in (0.0, 0.5):
        data = PyramidDataModule(root, MagneticTile("by_tile", labelled=labelled), image_size=64, num_workers=0)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        parts = (data.normal_set, data.train_set, data.held_out_set)
        sets.append([[one.path for one in part.samples] for part in parts] + [batch.number.tolist()])
    assert sets[0] == sets[1] and len(data.labelled_set) == len(data.train_set) + 20
    said = "20 defective images to train on, 20 of them with a mask: only a supervised detector learns from them"
    assert caplog.text.count(said) == 1


# what it learns from


def labelled_data(root: Path, seed: int = 0) -> PyramidDataModule:
    layout = MagneticTile("by_tile", labelled=0.5)
    data = PyramidDataModule(root, layout, image_size=(64, 96), metric_size=32, num_workers=0, seed=seed)
    data.setup("fit")
    data.plan = None
    return data


def test_a_mask_moves_with_its_image_and_stays_on_its_content(root):
    seen = 0
    for batch in labelled_data(root).train_dataloader():
        assert batch.mask.shape == (len(batch.path), 64, 96) and not batch.mask[:, :, 48:].any()
        dark = batch.image.mean(1)[:, :, :48] < 0.4
        for mask, spot in zip(batch.mask[:, :, :48], dark, strict=True):
            assert (mask & spot).sum() >= 0.8 * (mask | spot).sum()
            seen += bool(mask.any())
    assert seen >= 15  # of 20, some leave the image


def test_training_images_are_a_function_of_seed_epoch_and_image(root):
    def images(epoch: int, seed: int = 0) -> dict[int, torch.Tensor]:
        loader = labelled_data(root, seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return {int(number): image for batch in loader for number, image in zip(batch.number, batch.image, strict=True)}

    first, again, later, other = images(0), images(0), images(1), images(0, seed=1)
    assert all(torch.equal(first[number], again[number]) for number in first)
    assert not torch.equal(first[0], later[0]) and not torch.equal(first[0], other[0])


# cues


def test_a_constant_image_has_no_saliency():
    assert not saliency(torch.full((1, 3, 64, 64), 0.5), WHOLE, None).any()


@pytest.mark.parametrize(("top", "left"), [(10, 40), (45, 8)])
def test_a_dark_spot_is_salient_where_it_is(top, left):
    image = 0.6 + 0.01 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).expand(1, 3, 64, 64)
    image[:, :, top : top + 5, left : left + 5] = 0.2
    found = saliency(image, WHOLE, None)[0]
    spot = torch.zeros(64, 64, dtype=torch.bool)
    spot[top : top + 5, left : left + 5] = True
    assert found[spot].mean() > 0.3 and found[spot].mean() > 30 * found[~spot].mean() and found.max() <= 1


def test_nothing_is_salient_where_an_image_is_not_judged():
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    content, region = torch.tensor([[64, 40], [30, 64]]), torch.zeros(2, 64, 64, dtype=torch.bool)
    found = saliency(image, content, None)
    assert not found[0, :, 40:].any() and not found[1, 30:].any() and found.any()
    region[:, 10:20, 10:20] = True
    assert not saliency(image, content, region)[~region].any()


def test_an_image_has_the_same_saliency_in_any_batch():
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([saliency(image[None], WHOLE, None) for image in images])
    torch.testing.assert_close(saliency(images, WHOLE.expand(3, 2), None), alone, rtol=1e-3, atol=1e-4)


def test_the_matrix_is_the_cosine_transform():
    image = np.random.default_rng(0).random((12, 20))
    rows, columns = (cosines(length, torch.zeros((), dtype=torch.float64)) for length in image.shape)
    spectrum = rows @ torch.from_numpy(image) @ columns.mT
    np.testing.assert_allclose(spectrum.numpy(), dctn(image, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(
        (rows.mT @ spectrum @ columns).numpy(), idctn(spectrum.numpy(), norm="ortho"), atol=1e-12
    )


def test_what_brighter_pixels_enclose_is_as_dark_as_the_lowest_of_them():
    image = torch.zeros(1, 7, 7)
    image[0, 1:6, 1:6], image[0, 2:5, 2:5] = 0.8, 0.5
    image[0, 1, 3] = 0.6  # the lowest part of the wall, above the middle
    expected = torch.zeros(7, 7)
    expected[2:5, 2:5] = 0.3
    expected[2:5, 3] = 0.1
    torch.testing.assert_close(enclosure(image)[0], expected)
    slow = [[image[0, 3, : place + 1].max() for place in range(7)], [image[0, 3, place:].max() for place in range(7)]]
    assert torch.equal(brightest(image)[0, 3], torch.tensor(slow[0] + slow[1][1:]))


# what it learns with


def test_the_box_is_that_of_the_only_defect():
    mask = torch.zeros(40, 20, dtype=torch.bool)
    assert only_box(mask) is None
    mask[10:20, 4:8] = mask[20, 8] = True  # diagonal neighbours are one defect
    assert only_box(mask) == pytest.approx((15.5 / 40, 6.5 / 20, 11 / 40, 5 / 20))
    mask[30, 15] = True
    assert only_box(mask) is None


def test_boxes_of_images_without_one_defect_do_not_count():
    mask = torch.zeros(3, 10, 10, dtype=torch.bool)
    mask[0, 2:4, 2:4] = mask[1, 0, 0] = mask[1, 9, 9] = True
    boxes = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = box_loss(boxes, mask)
    torch.testing.assert_close(loss, (boxes[0] - torch.tensor([0.3, 0.3, 0.2, 0.2])).square().mean())
    loss.backward()
    assert boxes.grad[0].any() and not boxes.grad[1:].any()
    assert box_loss(boxes, torch.zeros_like(mask)) == 0


def test_pixels_of_defects_count_twice():
    logits = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 2, 3, dtype=torch.bool)
    mask[0, 0, 0] = True
    wrong = torch.where(mask, -logits, logits)
    each = torch.log1p(wrong.exp()) * torch.where(mask, 2, 1)
    torch.testing.assert_close(pixel_loss(logits, mask), each.sum() / 6)


@pytest.mark.parametrize("size", [(32, 32), (50, 71), (128, 40)])
def test_the_networks_take_images_of_any_size(size):
    network, push = UNet(3, 2).eval(), Push(32)
    features = network.encode(torch.rand(2, 3, *size))
    assert network.decode(features).shape == (2, *size) and push(features[-1]).shape == (2, 4)


# as a whole


def test_training_lowers_the_loss_and_finds_what_was_planted(fitted):
    losses = column(fitted, 0, "train/loss")
    assert len(losses) == EPOCHS and losses[-1] < 0.5 * losses[0]
    assert column(fitted, 0, "train/pixels")[-1] < 0.5 * column(fitted, 0, "train/pixels")[0]
    (detected,), (segmented,) = (column(fitted, 1, f"test/{name}_auroc") for name in ("detection", "segmentation"))
    assert detected > 0.95 and segmented > 0.95
    assert (fitted / "runs/version_1/report.html").is_file()


def test_the_same_seed_gives_the_same_weights_and_limits(fitted, root, here):
    main(["fit", *SHORT, *BY_TILE, f"--data.root={root}", *epochs(EPOCHS)])
    states = [torch.load(checkpoint(folder), weights_only=True)["state_dict"] for folder in (fitted, here)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_it_predicts_takes_another_threshold_and_its_exported_file_says_the_same(fitted, root, here, capsys):
    given = f"--ckpt_path={checkpoint(fitted)}"
    (here / "cracks").mkdir()
    for path in (root / "MT_Crack/Imgs").glob("*.jpg"):
        shutil.copy(path, "cracks")
    main(["predict", given, "--data.root=cracks", "--trainer.enable_progress_bar=false"])
    rows = list(csv.DictReader((here / "runs/version_0/predictions/scores.csv").read_text().splitlines()))
    assert [row["verdict"] for row in rows] == 8 * ["anomalous"]
    main(["threshold", given, "--target_fpr=0.2", "--output=other.ckpt"])
    model = MCuePushUModel.load(checkpoint(fitted))
    assert model.set_target_fpr(0.2) == pytest.approx(3 / 17)
    assert MCuePushUModel.load("other.ckpt").scorer.limits == pytest.approx(model.scorer.limits)
    jaxtyping.config.update("jaxtyping_disable", True)  # shapes that the exporter traces are symbols
    try:
        main(["export", given, "--output=tile.patchad"])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    main(["verify", "tile.patchad", given, "--data.root=cracks", "--images=8"])
    assert re.search(r"largest relative difference of a score \S+, of a pixel", capsys.readouterr().out)


MISTAKES = {
    "--data.layout.labelled=0": r"learns from defects, and \S+ has none with a mask .* --data\.layout\.labelled 0\.5",
    "--data.image_size=[64,30]": r"image_size \(64, 30\) is too small for the U-Net: give 32",
    "--model.width=0": r"width 0 must be at least 1",
    "--data.layout.labelled=2": r"labelled 2\.0 must be at least 0 and at most 1",
}


@pytest.mark.parametrize("option", MISTAKES)
def test_what_it_cannot_learn_from_ends_as_one_line(option, root, here, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *SHORT, *BY_TILE, "--data.validate_on=none", f"--data.root={root}", option])
    assert re.search(rf"^patchad: error: .*{MISTAKES[option]}", capsys.readouterr().err, re.MULTILINE)


def test_a_folder_of_another_layout_has_no_labelled_defects(product, here, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *SHORT, f"--data.root={product}", "--data.layout=MVTecAD"])
    assert "MCuePushU learns from defects, and" in capsys.readouterr().err


def test_an_option_that_makes_no_sense_is_refused():
    with pytest.raises(PatchadError, match="learning_rate 0"):
        MCuePushU(learning_rate=0.0)
