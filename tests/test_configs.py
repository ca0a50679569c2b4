import sys
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import Trainer, seed_everything

from patchad import PatchDetector, PyramidDataModule
from patchad.cli import CONFIGS, main
from patchad.model import without_weights
from patchad.spec import digest, spec

NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
OTHER = ("ensemble", "mcuepushu")
"""Detectors of their own, without a backbone; their tests fit them."""
DETECTORS = {"differnet": "patchad.peers.DifferNet", "padim": "patchad.peers.PaDiM"}
"""Of configurations that name another than the default's."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHER])
def test_every_config_parses_and_builds_its_parts(name, tmp_path, monkeypatch, capsys):
    """The network weights are switched off: that they load is tested with the backbones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["patchad"])
    monkeypatch.setenv("WANDB_MODE", "disabled")  # its service would live on, and serve other tests
    monkeypatch.setattr(sys, "path", list(sys.path))
    off = ["--model.backbone.weights=none", "--data.root=nowhere"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", name, *off, "--print_config"])
    assert stop.value.code == 0
    found = yaml.safe_load(capsys.readouterr().out)["model"]["class_path"]
    assert found == DETECTORS.get(name, "patchad.PatchDetector")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", name, *off, "--data.layout=MVTecAD"])
    assert stop.value.code == 2
    assert "patchad: error: data.root nowhere does not exist" in capsys.readouterr().err


def test_every_file_of_configs_is_found():
    assert len(NAMES) == len(list(Path(__file__).parent.parent.joinpath("configs").rglob("*.yaml")))


PAPER = {
    "model.backbone": ("VGG16", {"trainable": "all", "weights": "imagenet"}),
    "model.patch_encoder": ("LearnedEncoder", {"standardized": False, "shortcut": False, "dim": 64}),
    "model.mode": "sliding",
    "model.sides": [64, 32, 16],
    "model.taps": {"64": "relu5_3", "32": "relu3_3", "16": "relu2_2"},
    "model.scoring_strides": {"64": 16, "32": 4, "16": 4},
    "model.subtract_mean_image": True,
    "model.mirrored": False,
    "model.bank": ("MemoryBank", {"max_vectors": None, "reduce": "random", "baseline": 0.0, "exact_most": None}),
    "model.scorer": ("Scorer", {"combination": "sum", "image_score": "max", "smoothing": 0.0, "scaled": False}),
    "model.learning": ("Learning", {"clusters": 50, "warmup": 0.1, "learning_rate": 1e-5, "cache": None}),
    "data.image_size": [256, 256],
    "data.keep_aspect": False,
    "data.brightness": None,
    "data.batch_size": 64,
    "data.pyramids_per_image": 1,
    "data.draws_per_epoch": 100,
    "data.held_out_fraction": 0.0,
    "data.shift": 0,
    "data.colour_deviation": 0.02,
    "data.noise_deviation": 0.02,
    "trainer.max_epochs": 100,
    "trainer.check_val_every_n_epoch": 25,
}
"""What the paper and its supplement say, and what patchad added since and leaves out here."""


def test_the_papers_config_says_what_the_paper_says(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["patchad"])
    with pytest.raises(SystemExit):
        main(["fit", "--config=paper", "--data.root=nowhere", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    parts = {"model": config["model"]["init_args"], "data": config["data"]["init_args"], "trainer": config["trainer"]}
    for name, expected in PAPER.items():
        group, _, option = name.partition(".")
        found = parts[group][option]
        if isinstance(expected, tuple):
            assert found["class_path"].endswith(f".{expected[0]}"), name
            assert {key: found["init_args"][key] for key in expected[1]} == expected[1], name
        else:
            assert found == expected, name
    losses = parts["model"]["learning"]["init_args"]["losses"]
    weights = {loss["class_path"].rpartition(".")[2]: loss["init_args"]["weight"] for loss in losses}
    assert weights == {"Position": 1.0, "RelativeSimilarity": 0.001, "Clustering": 0.001}


def test_the_default_is_the_one_that_was_measured():
    """After a change that is meant, the figures of the docs are of another detector: measure them again."""
    assert digest(PatchDetector().hparams) == "ef19b565"


def test_a_detector_made_in_python_without_options_is_that_of_the_default(product, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["patchad"])
    small = {"image_size": (160, 128), "num_workers": 0, "validate_on": "none"}
    options = [f"--data.{name}={list(value) if name == 'image_size' else value}" for name, value in small.items()]
    main(["fit", f"--data.root={product}", *options, "--trainer.accelerator=cpu"])
    seed_everything(0)
    detector, data = PatchDetector(), PyramidDataModule(product, **small)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", max_epochs=1, deterministic=True, **quiet).fit(detector, data)
    checkpoint = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert digest(checkpoint["patchad_model"]) == digest(without_weights(spec(detector.model)))
    settings = without_backbone(checkpoint["hyper_parameters"])
    assert digest(settings) == digest(without_backbone(dict(detector.hparams)))
    assert settings["learning"] is None and settings["mirrored"] is True
    fitted, ours = checkpoint["state_dict"], detector.state_dict()
    assert fitted.keys() == ours.keys()
    assert [name for name, values in fitted.items() if not torch.equal(values, ours[name])] == []
    assert len(detector.model.bank(16)) > 12 * 19 * 15  # some mirrors, too


def without_backbone(settings: dict) -> dict:
    """What a checkpoint holds of its backbone is other than what it began with."""
    return {name: value for name, value in settings.items() if name != "backbone"}
