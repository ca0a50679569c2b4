import sys
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import Trainer, seed_everything

from patchad import PatchDetector, PyramidDataModule
from patchad.cli import CONFIGS, main

NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ensemble"])  # needs members
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
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "patchad.PatchDetector"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", name, *off, "--data.layout=MVTecAD"])
    assert stop.value.code == 2
    assert "patchad: error: data.root nowhere does not exist" in capsys.readouterr().err


def test_every_file_of_configs_is_found():
    assert len(NAMES) == len(list(Path(__file__).parent.parent.joinpath("configs").rglob("*.yaml")))


def losses_of(name, capsys) -> list[str]:
    with pytest.raises(SystemExit):
        main(["fit", "--config", name, "--model.backbone.weights=none", "--data.root=nowhere", "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    return [loss["class_path"].rpartition(".")[2] for loss in settings["losses"]]


def test_the_papers_config_has_the_papers_losses_and_no_other(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["patchad"])
    assert losses_of("paper", capsys) == ["Position", "RelativeSimilarity", "Clustering"]


def test_a_detector_made_in_python_without_options_is_that_of_the_default(product, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["patchad"])
    main(
        [
            "fit",
            f"--data.root={product}",
            "--data.num_workers=0",
            "--data.validate_on=none",
            "--trainer.accelerator=cpu",
        ]
    )
    seed_everything(0)
    detector, data = PatchDetector(), PyramidDataModule(product, num_workers=0, validate_on="none")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=1, deterministic=True, **quiet).fit(detector, data)
    fitted = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    ours = detector.state_dict()
    assert fitted.keys() == ours.keys()
    assert [name for name, values in fitted.items() if not torch.equal(values, ours[name])] == []
    assert len(detector.bank(16)) > 12 * 47 * 47  # some mirrors, too
