import csv
import json
import math
import re
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from test_cli import SMALL, commands_in, here  # noqa: F401
from torchvision.transforms.functional import InterpolationMode, rotate

from patchad.cli import main
from patchad.errors import PatchadError
from patchad.model import ScoringModel
from patchad.models import AlexNet
from patchad.peers.differnet import DifferNet, DifferNetModel, flow, rotated

TINY = ["--model.backbone.weights=none", "--model.transforms=2", "--model.blocks=2", "--model.hidden=16"]
FIT = ["fit", "--config=differnet", *SMALL, *TINY, "--data.batch_size=4"]


def epochs(count: int) -> list[str]:
    return [f"--trainer.max_epochs={count}", f"--trainer.check_val_every_n_epoch={count}"]


def fit(product: Path, count: int, *options: str) -> dict:
    """The checkpoint of a fit."""
    main([*FIT, f"--data.root={product}", *epochs(count), *options])
    last = sorted(Path("runs").glob("version_*"), key=lambda path: int(path.name[8:]))[-1]
    return torch.load(last / "checkpoints/last.ckpt", weights_only=True)


def model(transforms: int = 4) -> DifferNetModel:
    torch.manual_seed(0)
    return DifferNetModel(AlexNet(weights="none"), transforms, 2, 16).eval()


@pytest.fixture(scope="module")
def fitted(product, tmp_path_factory) -> Path:
    """The run folder of a fit of four epochs."""
    folder = tmp_path_factory.mktemp("differnet")
    with commands_in(folder):
        fit(product, 4, "--model.learning_rate=0.001")
    return folder / "runs/version_0"


def losses(run: Path) -> list[float]:
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    return [float(row["train/loss"]) for row in rows if row.get("train/loss")]


def test_the_flow_can_be_inverted_and_its_determinant_is_that_of_its_jacobian():
    torch.manual_seed(0)
    small, given = flow(6, blocks=3, hidden=8).double(), torch.randn(4, 6, dtype=torch.float64)
    latent, log_determinant = small(given)
    torch.testing.assert_close(small(latent, rev=True)[0], given)
    for row, found in zip(given, log_determinant, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda one: small(one[None])[0][0], row)
        torch.testing.assert_close(found, torch.linalg.slogdet(jacobian).logabsdet)


def test_the_loss_is_the_negative_log_likelihood_per_number_but_for_a_constant():
    small = model()
    features = torch.rand(5, 768)
    latent, log_determinant = small.flow(features)
    likelihood = torch.distributions.Normal(0.0, 1.0).log_prob(latent).sum(1) + log_determinant
    constant = math.log(2 * math.pi) / 2
    torch.testing.assert_close(small.loss(features), -likelihood.mean() / 768 - constant)
    for parameter in small.flow.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)  # what is left are the permutations
    torch.testing.assert_close(small.loss(features), features.square().mean() / 2)
    torch.testing.assert_close(small.scores(features[:4, None].expand(-1, 4, -1)), features[:4].square().mean(1))


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_an_image_turns_as_torchvision_turns_it(size):
    image = torch.rand(2, 3, *size)
    assert torch.equal(rotated(image, 0.0), image)
    assert torch.equal(rotated(image, math.pi), image.flip(2, 3))
    for degrees in (17, 90, 200):
        expected = rotate(image, degrees, InterpolationMode.NEAREST)
        assert (rotated(image, math.radians(degrees)) == expected).float().mean() > 0.99  # but for ties


@torch.inference_mode()
def test_an_image_that_is_turned_scores_the_same():
    image = torch.rand(2, 3, 64, 64)
    found = model()(image)
    torch.testing.assert_close(model()(image.rot90(1, (2, 3))).score, found.score)
    torch.testing.assert_close(found.map, found.score[:, None, None].expand(-1, 64, 64))
    assert not torch.allclose(model(1)(image.rot90(1, (2, 3))).score, model(1)(image).score, rtol=1e-4)


def test_learning_lowers_the_loss(fitted):
    found = losses(fitted)
    assert len(found) == 4 and found == sorted(found, reverse=True)


def test_a_checkpoint_alone_is_tested_and_predicts_as_its_model_does(fitted, product, here, capsys):
    path = str(fitted / "checkpoints/last.ckpt")
    quiet = [f"--ckpt_path={path}", "--trainer.enable_progress_bar=false"]
    main(["test", *quiet])
    printed = capsys.readouterr().out
    assert "detection AUROC" in printed and (here / "runs/version_0/report.html").is_file()
    main(["predict", *quiet, f"--data.root={product / 'test'}"])
    rows = csv.DictReader((here / "runs/version_1/predictions/scores.csv").read_text().splitlines())
    loaded = ScoringModel.load(path)
    for row in [*rows][::3]:
        assert loaded.predict(row["path"]).score == pytest.approx(float(row["score"]), rel=1e-5)
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(values, stored[f"model.{name}"]) for name, values in loaded.state_dict().items())
    assert [name for name in stored if name.endswith(".perm")]
    other = ["--model.transforms=3"]
    with pytest.warns(UserWarning, match="the threshold was set with transforms 2, not 3"):
        main(["test", *quiet, *other])


def test_the_limits_are_those_of_the_normal_images(fitted, product):
    loaded = ScoringModel.load(fitted / "checkpoints/last.ckpt")
    scores = torch.tensor([loaded.predict(path).score for path in sorted((product / "train/good").glob("*.png"))])
    ratios = loaded.scorer.normals / scores  # those that were learned from are raised alike, if at all
    assert (ratios.isclose(torch.ones(()), rtol=1e-4) | ratios.isclose(ratios.max(), rtol=1e-4)).all()
    assert loaded.scorer.limits.threshold == pytest.approx(float(loaded.scorer.normals.max()))


@pytest.mark.slow
def test_an_exported_file_says_the_same(fitted, here, capsys):
    path = str(fitted / "checkpoints/last.ckpt")
    jaxtyping.config.update("jaxtyping_disable", True)  # shapes that the exporter traces are symbols
    try:
        main(["export", f"--ckpt_path={path}", "--output=flow.patchad"])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    main(["verify", "flow.patchad", f"--ckpt_path={path}", "--images=4"])
    assert "largest relative difference" in capsys.readouterr().out


def test_a_fit_that_goes_on_ends_where_one_without_a_break_ends(product, here):
    whole = fit(product, 3)
    assert whole["hyper_parameters"]["backbone"]["init_args"]["weights"] == "none"
    fit(product, 1)
    resumed = fit(product, 3, "--ckpt_path=runs/version_1/checkpoints/last.ckpt")
    other = fit(product, 3, "--seed_everything=1")
    for name, values in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], values), name
    name = "model.flow.module_list.1.subnet1.0.weight"
    assert not torch.equal(other["state_dict"][name], whole["state_dict"][name])
    assert json.dumps(whole["patchad_model"]) == json.dumps(resumed["patchad_model"])


def test_without_freia_the_extra_is_named_in_one_line(product, here, capsys, monkeypatch):
    for name in ("FrEIA", "FrEIA.framework", "FrEIA.modules"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit):
        main([*FIT, f"--data.root={product}"])
    assert re.search(r'^patchad: error: .*pip install "patchad\[peers\]"', capsys.readouterr().err, re.MULTILINE)


def test_a_backbone_that_would_learn_is_refused():
    with pytest.raises(PatchadError, match=r"leave out model\.backbone\.trainable"):
        DifferNet(AlexNet(weights="none", trainable="all"), 2, 1, 8)
