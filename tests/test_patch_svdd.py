"""Patch SVDD: its encoders and its loss against slow references, and `--config patch_svdd` from fit to verify."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import commands_in
from torch.nn import functional as F
from torch.utils.data import default_collate

from patchad import Learning, PatchModel, PyramidDataModule, load
from patchad.cli import main
from patchad.data.synthetic import write_synthetic
from patchad.errors import PatchadError
from patchad.losses import Position
from patchad.models.encoders import SlidingEncoder
from patchad.peers.patch_svdd import SVDD, Blocks, HierarchicalEncoder
from tests.contracts import check_loss, some_views

FIT = [
    "--config=patch_svdd",
    "--data.root=tiny",
    "--data.image_size=[128,128]",
    "--data.metric_size=[64,64]",
    "--data.num_workers=0",
    "--data.batch_size=2",
    "--data.pyramids_per_image=4",
    "--data.validate_on=none",
    "--model.backbone.weights=weights.pth",
    "--model.scoring_strides={64: 32, 32: 16}",
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=1",
]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
LAST = "version_0/checkpoints/last.ckpt"


def encoder() -> SlidingEncoder:
    torch.manual_seed(0)
    return SlidingEncoder(Blocks(), HierarchicalEncoder, (64, 32), scoring_strides={64: 16, 32: 4}).eval()


def block_by_hand(blocks: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The smaller encoder as the code of its authors writes it, eight convolutions in a row."""
    h = blocks
    for number in range(8):
        weight, bias = state[f"layers.0.{2 * number}.weight"], state[f"layers.0.{2 * number}.bias"]
        h = F.conv2d(h, weight, bias, stride=2 if number == 0 else 1)
        h = torch.tanh(h) if number == 7 else F.leaky_relu(h, 0.1)
    return h


def test_the_smaller_encoder_is_that_of_the_authors_code():
    blocks, backbone = torch.rand(5, 3, 32, 32), Blocks()
    expected = block_by_hand(blocks, backbone.state_dict())
    assert expected.shape == (5, 64, 1, 1)
    torch.testing.assert_close(backbone(blocks, ["block"])["block"], expected)
    layers = [(3, 32), (32, 64), (64, 128), (128, 128), (128, 64), (64, 32), (32, 32), (32, 64)]
    shapes = [tuple(value.shape) for name, value in backbone.state_dict().items() if name.endswith("weight")]
    assert shapes == [(more, channels, 3, 3) for channels, more in layers]


def test_blocks_are_encoded_each_on_its_own():
    image, backbone = torch.rand(2, 3, 64, 96), Blocks()
    found = backbone(image, ["block"])["block"]
    for row in range(2):
        for column in range(3):
            block = image[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            torch.testing.assert_close(found[:, :, row, column], backbone(block, ["block"])["block"][:, :, 0, 0])
    image[:, :, 32:64, 32:64] = torch.rand(2, 3, 32, 32)
    changed = (backbone(image, ["block"])["block"] != found).any(dim=(0, 1))
    assert changed.tolist() == [[False, False, False], [False, True, False]]


def test_a_map_of_blocks_has_a_cell_for_each_that_is_begun():
    assert Blocks()(torch.rand(1, 3, 50, 97), ["block"])["block"].shape == (1, 64, 2, 4)


def test_the_larger_encoder_joins_four_blocks_of_the_smaller_one_as_the_authors_code_does():
    made, image = encoder(), torch.rand(2, 3, 96, 96)
    found, state = made(image), made.backbone.state_dict()
    joined = made.patch_encoder(64).state_dict()
    for row, column in ((0, 0), (1, 2)):
        patch = image[:, :, 16 * row : 16 * row + 64, 16 * column : 16 * column + 64]
        quarters = [
            block_by_hand(patch[:, :, top : top + 32, left : left + 32], state) for top in (0, 32) for left in (0, 32)
        ]
        upper, lower = torch.cat(quarters[:2], dim=3), torch.cat(quarters[2:], dim=3)
        h = F.conv2d(torch.cat([upper, lower], dim=2), joined["layers.0.weight"], joined["layers.0.bias"])
        h = F.conv2d(F.leaky_relu(h, 0.1), joined["layers.2.weight"], joined["layers.2.bias"]).tanh()
        torch.testing.assert_close(found[64][:, :, row, column], h[:, :, 0, 0])
    smaller = block_by_hand(image[:, :, 4:36, 60:92], state)
    torch.testing.assert_close(found[32][:, :, 1, 15], smaller[:, :, 0, 0])


def test_both_sides_train_the_encoder_that_they_share():
    made = encoder()
    windows = made.windows(torch.rand(1, 3, 128, 128), dict.fromkeys((64, 32), torch.zeros(1, 2, dtype=torch.int64)))
    for side in (64, 32):
        made.zero_grad()
        made.embed(side, windows[side], torch.tensor([[[1, 3]]])).sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in made.backbone.parameters())


def test_the_backbone_says_that_it_has_no_weights_of_imagenet_and_sides_of_more_than_two_blocks_are_refused():
    assert not Blocks().frozen and Blocks(trainable="none").frozen
    with pytest.raises(PatchadError, match=r"Blocks has no ImageNet weights, .*: give weights none"):
        Blocks(weights="imagenet")
    with pytest.raises(PatchadError, match="side 96 is more than two blocks of 32 pixels; give one or two in sides"):
        HierarchicalEncoder(96, Blocks.taps["block"])


def test_svdd_keeps_the_contract_of_losses():
    check_loss(SVDD())


def test_svdd_equals_a_loop_over_patches_and_is_the_distance_that_all_are_moved_by():
    views, loss = some_views(), SVDD()
    distances = [
        sum((a - b) ** 2 for a, b in zip(one, near, strict=True)) ** 0.5
        for one, near in zip(views.anchor, views.near, strict=True)
    ]
    torch.testing.assert_close(loss(views), sum(distances) / len(distances))
    step = torch.zeros(64).index_fill(0, torch.tensor([3, 9]), 1.0)
    moved = views._replace(near=views.anchor + step * torch.tensor([3.0]))
    assert loss(moved).item() == pytest.approx(18**0.5)
    assert loss.weight == 1e-3


def test_svdd_of_patches_that_are_the_same_is_zero_with_a_finite_gradient():
    views = some_views()
    value = SVDD()(views._replace(near=views.anchor))
    value.backward()
    assert value == 0 and views.anchor.grad.isfinite().all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a fit, a test, a prediction and an exported file of the shortest run by command line."""
    folder = tmp_path_factory.mktemp("patch_svdd")
    with commands_in(folder):
        write_synthetic(Path("tiny"), train=4, test_normal=2, test_defective=3, size=128)
        torch.save(spread_weights(), "weights.pth")
        fit("runs")
        main(["test", "--ckpt_path", f"runs/{LAST}", *QUIET])
        main(["predict", "--ckpt_path", f"runs/{LAST}", "--data.root=tiny/test", "--maps=none", *QUIET])
        main(["export", "--ckpt_path", f"runs/{LAST}", "--output=model.patchad"])
    return folder


def spread_weights() -> dict[str, torch.Tensor]:
    """Weights with which embeddings differ from the start: with torch's own they are rounded to a few digits."""
    torch.manual_seed(0)
    backbone = Blocks()
    for weight in (parameter for parameter in backbone.parameters() if parameter.ndim == 4):
        torch.nn.init.kaiming_normal_(weight, a=0.1)
    return backbone.layers.state_dict()


def fit(where: str) -> None:
    main(["fit", *FIT, *QUIET, f"--trainer.logger.save_dir={where}"])


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_configuration_is_fitted_tested_and_predicts(folder):
    tested = rows(folder / "runs/version_1/metrics.csv")
    for name in ("test/detection_auroc", "test/segmentation_auroc"):
        assert any(row[name] and 0 <= float(row[name]) <= 1 for row in tested)
    trained = rows(folder / "runs/version_0/metrics.csv")
    for side in (64, 32):
        for term in ("position", "svdd", "position_accuracy"):
            assert any(row[f"train/{term}_side_{side}"] for row in trained)
    assert not any("clust" in name for name in trained[0])
    model = PatchModel.load(folder / "runs" / LAST)
    assert {side: len(bank) for side, bank in model.memory_banks.items()} == {"64": 4 * 3**2, "32": 4 * 7**2}
    assert model.encoder.mean_image.mean.shape == (3, 128, 128)


def test_the_exported_file_is_that_of_the_checkpoint_and_scores_as_it_does(folder, capsys):
    with commands_in(folder):
        main(["verify", "model.patchad", f"--ckpt_path=runs/{LAST}"])
        assert "largest relative difference of a score" in capsys.readouterr().out
        file, model = load("model.patchad"), PatchModel.load(f"runs/{LAST}")
        for row in rows(folder / "runs/version_2/predictions/scores.csv"):
            found, expected = file(row["path"]), model.predict(row["path"])
            assert found.score == pytest.approx(expected.score, rel=1e-4)
            assert expected.score == pytest.approx(float(row["score"]), rel=1e-4)
            np.testing.assert_allclose(found.map, expected.map, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_tensors(folder):
    with commands_in(folder):
        fit("again")
    first, second = (torch.load(folder / run / LAST, weights_only=True)["state_dict"] for run in ("runs", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_learning_tells_more_directions_right_and_brings_the_loss_down(folder):
    """On pyramids of two images, at ten times the rate of the configuration."""
    torch.manual_seed(0)
    encoder = SlidingEncoder(Blocks(), HierarchicalEncoder, (32,), scoring_strides={32: 8})
    encoder.backbone.layers.load_state_dict(spread_weights())
    learning = Learning(encoder, [Position(directions=8), SVDD()], warmup=1.0, directions=8)
    data = PyramidDataModule(folder / "tiny", image_size=(96, 96), pyramids_per_image=8, shift=0)
    data.plan = learning.plan
    data.setup("fit")
    batch = default_collate([data.pyramids[0, number] for number in range(2)])
    images = torch.stack([data.train_set[number].image for number in range(2)])
    features, paths = learning.features, [str(sample.path) for sample in data.train_set.samples]
    features.open(paths, "", (96, 96), False, data.augmentations)
    features.keep(batch.number, batch.number, batch.number, images, batch.number)
    read = features.read(batch, (0,))
    optimizer = torch.optim.Adam([*encoder.parameters(), *learning.parameters()], lr=1e-3)
    losses, shares = [], []
    for _ in range(40):
        (views,) = learning.patch_views(read, batch)
        losses.append(sum(learning.loss_terms(views).values()))
        shares.append(learning.watched(views)["position_accuracy"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0] and shares[-1] > shares[0]
