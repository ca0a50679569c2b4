import re
import shutil
from functools import partial
from pathlib import Path

import jaxtyping
import pytest
import torch
from pytorch_lightning import Trainer
from test_cli import LITE, SMALL, commands_in, here  # noqa: F401

import patchad
from patchad import Ensemble, PatchadError, PatchDetector, PyramidDataModule
from patchad.cli import main
from patchad.model import summary
from patchad.scoring import Scorer, gaussian

PRODUCT = partial(Scorer, combination="product", smoothing=4.0)
MEMBERS = {
    "windows": ["--model.sides=[32,16]", "--model.scorer.combination=product"],
    "textures": ["--model.sides=[32]", "--model.patch_encoder=TextureEncoder", "--model.scorer.combination=sum"],
}
"""Two detectors that see different things, and combine their sides in different ways."""


@pytest.fixture(scope="module")
def members(product, tmp_path_factory) -> list[str]:
    """Their checkpoints."""
    folder = tmp_path_factory.mktemp("members")
    with commands_in(folder):
        for name, options in MEMBERS.items():
            main(["fit", f"--data.root={product}", *LITE, *SMALL, *options, f"--trainer.logger.version={name}"])
    return [str(folder / "runs" / name / "checkpoints" / "last.ckpt") for name in MEMBERS]


@pytest.fixture(scope="module")
def fitted(product, members, tmp_path_factory) -> Path:
    """The checkpoint of their ensemble; theirs are gone while it is used."""
    folder = tmp_path_factory.mktemp("ensemble")
    copies = [str(shutil.copy(path, folder / f"{number}.ckpt")) for number, path in enumerate(members)]
    with commands_in(folder):
        main(["fit", "--config=ensemble", f"--model.members={copies}", f"--data.root={product}", *SMALL])
    for copy in copies:
        Path(copy).unlink()
    return folder / "runs" / "version_0" / "checkpoints" / "last.ckpt"


def image() -> torch.Tensor:
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_the_map_is_the_geometric_mean_of_the_members_maps_over_their_levels(members):
    content = torch.tensor([[96, 96], [80, 96]])
    one, other = (PatchDetector.load_from_checkpoint(path, weights_only=True).eval() for path in members)
    raw = [
        detector.scorer.combine(detector(image(), content).side_maps) / sides
        for detector, sides in ((one, 2), (other, 1))
    ]
    expected = 2 * (raw[0] * raw[1]).sqrt()
    found = Ensemble(members, PRODUCT).eval()(image(), content)
    torch.testing.assert_close(found.map, gaussian(expected, content, 4.0))
    torch.testing.assert_close(found.score, Scorer((0, 1)).score(expected, content))


def test_a_checkpoint_holds_its_members_whole(members, fitted, here, capsys):
    alone = Ensemble.load_from_checkpoint(fitted, weights_only=True).eval()
    with torch.inference_mode():
        assert torch.equal(alone(image()).map, Ensemble(members, PRODUCT).eval()(image()).map)
    main(["test", f"--ckpt_path={fitted}", "--trainer.enable_progress_bar=false"])
    printed = capsys.readouterr().out
    assert "detection AUROC" in printed and "per-region overlap" in printed
    assert (here / "runs/version_0/report.html").is_file()


@torch.inference_mode()
def test_the_threshold_is_that_of_the_normals_each_compared_with_the_others(fitted, product):
    alone = Ensemble.load_from_checkpoint(fitted, weights_only=True).eval()
    data = PyramidDataModule.load_from_checkpoint(fitted, weights_only=True)
    data.setup("fit")
    batches = list(data.normal_dataloader())
    scored = [summary(alone(batch.image, batch.content, batch.thing)) for batch in batches]
    scores, peaks = torch.cat(scored).T
    assert (scores > torch.cat([alone(batch.image, batch.content).score for batch in batches])).all()
    again = Scorer((0, 1))
    again.set_limits(scores, peaks)
    assert again.limits == pytest.approx(alone.scorer.limits)


@pytest.mark.slow
def test_members_that_have_learned_learn_no_more(members, product, tmp_path):
    model = Ensemble(members, PRODUCT)
    model.requires_grad_(True)  # as encoders that were trained are
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    run.fit(model, PyramidDataModule(product, image_size=96, num_workers=0))
    assert run.global_step == 0 and model.scorer.threshold.isfinite()


def test_an_exported_ensemble_says_the_same(fitted, product, here, capsys):
    jaxtyping.config.update("jaxtyping_disable", True)  # shapes that the exporter traces are symbols
    try:
        main(["export", f"--ckpt_path={fitted}", "--output=both.patchad"])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    main(["verify", "both.patchad", f"--ckpt_path={fitted}", "--images=4"])
    assert "largest relative difference" in capsys.readouterr().out
    assert len(patchad.load("both.patchad").metadata["vectors"]) == 3


def test_what_is_no_ensemble_is_told(members, fitted, tmp_path):
    for given, message in (
        (members[:1], r"1 members are no ensemble; give the checkpoints of two or more"),
        ([members[0], "gone.ckpt"], r"member gone\.ckpt does not exist"),
        (
            [members[0], str(fitted)],
            r"last\.ckpt names patchad\.ensemble\.EnsembleModel, which is no PatchModel",
        ),
    ):
        with pytest.raises(PatchadError, match=message):
            Ensemble(given, PRODUCT)
    with pytest.raises(PatchadError, match="an ensemble knows no excess"):
        Ensemble(members, partial(Scorer, combination="excess"))


MISTAKES = {
    "--data.seed=1": r"was fitted with data\.seed 0, not 1: it sees other images, or knows those",
    "--data.image_size=[128,128]": r"was fitted with data\.image_size \[96, 96\], not \[128, 128\]",
    "--data.layout=MVTecAD": r"was fitted with data\.layout None, not \{.*MVTecAD",
}


@pytest.mark.parametrize("option", MISTAKES)
def test_a_fit_on_other_data_ends_as_one_line(option, members, product, here, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config=ensemble", f"--model.members={members}", f"--data.root={product}", *SMALL, option])
    assert re.search(rf"^patchad: error: .*{MISTAKES[option]}", capsys.readouterr().err, re.MULTILINE)
