import csv
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from scipy.ndimage import zoom
from scipy.spatial.distance import mahalanobis
from test_cli import SMALL, commands_in, here  # noqa: F401

import patchad
from patchad import PatchadError
from patchad.cli import main
from patchad.model import summary
from patchad.models import ResNet18
from patchad.peers import PaDiM, PaDiMModel, padim
from patchad.peers.padim import PEAK, Gaussians
from patchad.scoring import Scorer, gaussian
from patchad.timing import measure_stages

FEW = ["--config=padim", "--model.backbone.weights=none", "--model.channels=20"]


def one_process(moments: torch.Tensor) -> torch.Tensor:
    return moments


def features(images: int, channels: int = 6, rows: int = 4, columns: int = 5, seed: int = 0) -> torch.Tensor:
    """Correlated ones, of one place far from those of another."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(images, channels, rows, columns, generator=generator)
    mixed = torch.einsum("cd,ndrq->ncrq", 0.2 * torch.randn(channels, channels, generator=generator), drawn)
    return mixed + torch.rand(channels, rows, columns, generator=torch.Generator().manual_seed(9))


def estimated(normal: torch.Tensor) -> Gaussians:
    made = Gaussians()
    made.estimate(normal.split(4), one_process)
    return made


def slow_distances(normal: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """By numpy's covariance and scipy's distance, place by place."""
    found = np.zeros((len(queries), *queries.shape[2:]))
    for row, column in np.ndindex(*queries.shape[2:]):
        place = normal[:, :, row, column].astype(float)
        inverse = np.linalg.inv(np.cov(place, rowvar=False) + 0.01 * np.eye(place.shape[1]))
        for number, query in enumerate(queries[:, :, row, column].astype(float)):
            found[number, row, column] = mahalanobis(query, place.mean(0), inverse)
    return found


@pytest.mark.parametrize("images", [5, 30], ids=["fewer images than channels", "more"])
def test_distances_are_those_of_numpys_covariance_and_scipys_distance(images):
    normal, queries = features(images), features(3, seed=1)
    found = estimated(normal)
    torch.testing.assert_close(found.mean, normal.mean(0), rtol=1e-5, atol=1e-5)
    expected = slow_distances(normal.numpy(), queries.numpy())
    np.testing.assert_allclose(found(queries).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("images", [5, 30], ids=["fewer images than channels", "more"])
def test_a_normal_image_is_compared_with_gaussians_that_are_fitted_without_it(images):
    normal = features(images)
    found = estimated(normal)(normal, torch.arange(images) != 1)
    for number in range(images):
        others = normal if number == 1 else normal[torch.arange(images) != number]
        expected = slow_distances(others.numpy(), normal[number, None].numpy())
        np.testing.assert_allclose(found[number, None].numpy(), expected, rtol=1e-4)


def test_sums_of_several_processes_are_those_of_one():
    normal, parts = features(12), []
    for half in normal.split(6):
        Gaussians().estimate([half], lambda moments: parts.append(moments) or moments)
    together = Gaussians()
    together.estimate([normal[:6]], lambda moments: parts[0] + parts[1])
    queries = features(2, seed=1)
    torch.testing.assert_close(together(queries), estimated(normal)(queries))


def model(**arguments) -> PaDiMModel:
    """A fitted one of random weights, of images of 64 x 48 pixels."""
    torch.manual_seed(0)
    made = PaDiMModel(ResNet18(weights="none"), **{"channels": 10, **arguments}).eval()
    with torch.inference_mode():
        made.gaussians.estimate([made.features(torch.rand(8, 3, 64, 48))], one_process)
    return made


@torch.inference_mode()
def test_the_map_is_enlarged_and_smoothed_and_its_highest_pixel_is_the_score():
    made, image = model(), torch.rand(2, 3, 64, 48)
    found = made(image)
    distances = made.gaussians(made.features(image)).numpy()
    assert distances.shape == (2, 16, 12)
    pixels = np.stack([zoom(one, 4, order=1, mode="nearest", grid_mode=True) for one in distances])
    expected = gaussian(torch.from_numpy(pixels), torch.tensor([[64, 48]] * 2), 4.0)
    torch.testing.assert_close(found.map, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.score, found.map.amax((1, 2)))


@torch.inference_mode()
def test_features_are_some_of_all_taps_each_at_the_places_of_the_first():
    drawn = ((448, 0), (10, 0), (10, 1))
    every, few, others = (PaDiMModel(ResNet18(weights="none"), channels, seed).eval() for channels, seed in drawn)
    image = torch.rand(1, 3, 64, 48)
    maps = every.backbone(image, ["layer1", "layer2", "layer3"]).values()
    enlarged = [
        values.repeat_interleave(t, 2).repeat_interleave(t, 3) for t, values in zip((1, 2, 4), maps, strict=True)
    ]
    assert torch.equal(every.features(image), torch.cat(enlarged, dim=1)[:, every.chosen])
    assert sorted(every.chosen.tolist()) == list(range(448))
    assert torch.equal(few.chosen, every.chosen[:10]) and not torch.equal(others.chosen, few.chosen)


@torch.inference_mode()
def test_padding_and_what_lies_beside_a_region_is_not_judged():
    made, image = model(), torch.rand(1, 3, 64, 48)
    whole, content = made(image), torch.tensor([[40, 48]])
    assert (made(image, content).map[:, 40:] == 0).all() and (made(image, content).map[:, :40] > 0).all()
    region = torch.zeros(1, 64, 48, dtype=torch.bool)
    region[:, 10:30, 5:20] = True
    within = made(image, region=region)
    assert torch.equal(within.map > 0, region)
    assert within.score == within.map.max() and within.score != whole.score


def test_what_does_not_fit_is_told_in_a_line():
    fitted = model()
    for call, message in (
        (lambda: PaDiMModel(ResNet18(weights="none", trainable="all")), "PaDiM learns nothing: leave out"),
        (lambda: model(channels=449), "channels 449 must be at least 1 and at most 448"),
        (lambda: model(scorer=Scorer), "no excess: give --config padim, or scorer.combination sum"),
        (lambda: fitted(torch.rand(1, 3, 64, 64)), r"PaDiM knows 16 x 12 places, this image has 16 x 16; give all"),
        (lambda: PaDiMModel(ResNet18(weights="none"))(torch.rand(1, 3, 64, 64)), "knows no normal images"),
        (lambda: estimated(features(2)), "2 normal images are no Gaussian without one of them"),
    ):
        with pytest.raises(PatchadError, match=message):
            call()


@pytest.fixture(scope="module")
def runs(product, tmp_path_factory) -> Path:
    """A folder with two fits of the same, from the command line."""
    folder = tmp_path_factory.mktemp("padim")
    with commands_in(folder):
        for name in ("one", "other"):
            main(["fit", *FEW, f"--data.root={product}", *SMALL, f"--trainer.logger.version={name}"])
    return folder / "runs"


def checkpoint(runs: Path, name: str = "one") -> str:
    return str(runs / name / "checkpoints" / "last.ckpt")


def test_the_same_seed_gives_the_same_detector(runs):
    one, other = (torch.load(checkpoint(runs, name), weights_only=True)["state_dict"] for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.inference_mode()
def test_the_threshold_is_that_of_normal_images_each_scored_without_itself(runs, product):
    detector = PaDiM.load_from_checkpoint(checkpoint(runs), weights_only=True).eval()
    data = patchad.PyramidDataModule.load_from_checkpoint(checkpoint(runs), weights_only=True)
    data.setup("fit")
    batches = list(data.normal_dataloader())
    image, content = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("image", "content"))
    seen = detector.model.features(image)
    scored = []
    for number in range(len(image)):
        detector.model.gaussians = estimated(seen[torch.arange(len(image)) != number])
        scored.append(summary(detector(image[number, None], content[number, None])))
    again = PEAK((0,))
    again.set_limits(*torch.cat(scored).T)
    assert again.limits == pytest.approx(detector.scorer.limits, rel=1e-3)


def test_a_checkpoint_alone_is_tested_and_predicts_the_same(runs, product, here, capsys):
    options = [f"--ckpt_path={checkpoint(runs)}", "--trainer.enable_progress_bar=false"]
    main(["test", *options])
    printed = capsys.readouterr().out
    assert "detection AUROC" in printed and "per-region overlap" in printed
    main(["predict", *options, f"--data.root={product}/test"])
    rows = list(csv.DictReader((here / "runs/version_1/predictions/scores.csv").read_text().splitlines()))
    assert len(rows) == 11
    alone = PaDiMModel.load(checkpoint(runs))
    for row in rows:
        assert float(row["score"]) == pytest.approx(alone.predict(row["path"]).score, rel=1e-5)


def test_limits_change_and_what_needs_a_bank_is_told(runs, product, here, capsys):
    main(["threshold", f"--ckpt_path={checkpoint(runs)}", "--target_fpr=0.3", "--output=looser.ckpt"])
    before, after = (PaDiMModel.load(path).scorer for path in (checkpoint(runs), "looser.ckpt"))
    assert after.threshold < before.threshold and after.target_fpr == 0.3
    with pytest.raises(SystemExit):
        main(["update", f"--ckpt_path={checkpoint(runs)}", f"--normal={product}/test/good", "--output=more.ckpt"])
    assert "has no banks of its own that could change: fit it anew" in capsys.readouterr().err


def test_the_whole_of_it_is_timed_not_its_stages():
    rows = measure_stages(model(), torch.rand(2, 3, 64, 48), torch.tensor([[64, 48]] * 2), repeats=3, rate=1e9)
    assert [(row.stage, len(row.times), row.floor) for row in rows] == [("from memory to score", 3, None)]


@pytest.mark.slow
def test_an_exported_file_says_the_same(runs, here, capsys):
    jaxtyping.config.update("jaxtyping_disable", True)  # shapes that the exporter traces are symbols
    try:
        main(["export", f"--ckpt_path={checkpoint(runs)}", "--output=padim.patchad"])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    main(["verify", "padim.patchad", f"--ckpt_path={checkpoint(runs)}", "--images=4"])
    assert "largest relative difference" in capsys.readouterr().out


def test_without_its_config_the_way_out_is_told(product, here, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model=PaDiM", f"--data.root={product}", *SMALL])
    assert "patchad: error: PaDiM has one map and no excess: give --config padim" in capsys.readouterr().err


@torch.inference_mode()
def test_gaussians_and_maps_are_those_of_anomalib(monkeypatch):
    reason = 'anomalib is not installed; pip install ".[bench]"'
    torch_model = pytest.importorskip("anomalib.models.image.padim.torch_model", reason=reason)
    monkeypatch.setattr(padim, "REGULARIZATION", 0.01 + 1e-5)  # anomalib adds both
    made, normal, image = model(channels=30), torch.rand(40, 3, 128, 128), torch.rand(3, 3, 128, 128)
    made.gaussians = estimated(made.features(normal))
    theirs = torch_model.MultiVariateGaussian()
    theirs.fit(made.features(normal))
    generator, queries = torch_model.AnomalyMapGenerator(), made.features(image)
    expected = generator.compute_distance(queries, [theirs.mean, theirs.inv_covariance])[:, 0]
    torch.testing.assert_close(made.gaussians(queries), expected, rtol=1e-4, atol=1e-4)
    inner = (..., slice(17, -17), slice(17, -17))  # at the edge anomalib mirrors the map
    shown = generator(embedding=queries, mean=theirs.mean, inv_covariance=theirs.inv_covariance, image_size=(128, 128))
    torch.testing.assert_close(made(image).map[inner], shown[:, 0][inner], rtol=1e-4, atol=1e-4)
