"""What a checkpoint names: nothing runs that is not allowed, and nothing is written but into the run folder."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import LITE, SMALL, commands_in, here  # noqa: F401

import patchad
from patchad import PatchadError, PatchDetector, PatchModel, PyramidDataModule
from patchad.checkpoint import save
from patchad.cli import main
from patchad.losses import PatchLoss
from patchad.spec import Configurable, spec
from patchad.trust import check_slots, made

TOUCH = {"class_path": "subprocess.getoutput", "init_args": {"cmd": "touch ran"}}
BEHIND = {"class_path": "patchad.cli.os.system", "init_args": {"command": "touch ran"}}
EVIL = "import pathlib\npathlib.Path('ran').touch()\nfrom patchad.models import WindowEncoder as Encoder\n"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def fitted(product, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    with commands_in(folder):
        main(["fit", f"--data.root={product}", *LITE, *SMALL])
    return folder / "runs/version_0/checkpoints/last.ckpt"


def attacked(fitted: Path, here: Path, change: Callable[[dict, dict], Any]) -> Path:
    """A checkpoint whose settings of the model, for both ways to load it, and of the data were changed."""
    checkpoint = torch.load(fitted, weights_only=True)
    change(checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"])
    change(checkpoint["patchad_model"]["init_args"], {})
    began = {"backbone": checkpoint["patchad_backbone"]}
    change(began, {})
    checkpoint["patchad_backbone"] = began["backbone"]
    save(checkpoint, here / "attack.ckpt")
    (here / "evil.py").write_text(EVIL)
    return here / "attack.ckpt"


def learning(**arguments) -> dict:
    return {"learning": {"class_path": "patchad.Learning", "init_args": arguments}}


MODELS = {
    **{f"a function for {slot}": {slot: TOUCH} for slot in ("patch_encoder", "bank", "scorer", "backbone")},
    "a function behind patchad": {"patch_encoder": BEHIND},
    "a class of another slot": {"patch_encoder": {"class_path": "patchad.memory.MemoryBank", "init_args": {}}},
    "a module of the user's": {"patch_encoder": {"class_path": "evil.Encoder", "init_args": {}}},
    "a module named by a string": {"patch_encoder": "evil.Encoder"},
    "an object where none belongs": {"taps": TOUCH},
    "a string in a list": {"sides": [64, 32, 16], "backbone": ["evil.Encoder"]},
    "the environment": {"mode": "${oc.env:HOME}"},
    "an object in an object": {
        "backbone": {"class_path": "patchad.models.EfficientNetLite0", "init_args": {"weights": TOUCH}}
    },
}
DETECTORS = {
    "a function for learning": {"learning": TOUCH},
    "a function for a loss": learning(losses=[TOUCH]),
    "a function for the cache": learning(cache=TOUCH),
    "another detector": {"_class_path": "evil.Encoder"},
    "another way to make it": {"_class_path": "subprocess.getoutput", "_instantiator": "subprocess.getoutput"},
}
DATA = {
    "a function for the layout": {"layout": TOUCH},
    "the environment as the root": {"root": "${oc.env:HOME}"},
    "another datamodule": {"_class_path": "evil.Encoder"},
}


@pytest.mark.parametrize("verb", ["predict", "export", "fit"])
@pytest.mark.parametrize("attack", [*MODELS, *DETECTORS, *DATA])
def test_a_checkpoint_runs_nothing(attack, verb, fitted, here, capsys):
    model, data = {**MODELS, **DETECTORS}.get(attack, {}), DATA.get(attack, {})
    path = attacked(fitted, here, lambda parameters, images: (parameters.update(model), images.update(data)))
    with pytest.raises(SystemExit) as stop:
        main([verb, f"--ckpt_path={path}", *QUIET])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"patchad: error: --ckpt_path {path}: ") and ("names" in said or "environment" in said)
    assert not (here / "ran").exists() and not (here / "runs").exists() and "evil" not in sys.modules


@pytest.mark.parametrize("attack", [*MODELS, *DETECTORS])
def test_a_checkpoint_runs_nothing_in_python(attack, fitted, here):
    path = attacked(fitted, here, lambda parameters, _: parameters.update({**MODELS, **DETECTORS}[attack]))
    for load in [PatchDetector.load_from_checkpoint] + [PatchModel.load] * (attack in MODELS):
        with pytest.raises(PatchadError, match=r"names|environment"):
            load(path)
    assert not (here / "ran").exists() and "evil" not in sys.modules


@pytest.mark.parametrize("attack", DATA)
def test_data_of_a_checkpoint_run_nothing_in_python(attack, fitted, here):
    path = attacked(fitted, here, lambda _, images: images.update(DATA[attack]))
    with pytest.raises(PatchadError, match=r"names|environment"):
        PyramidDataModule.load_from_checkpoint(path)
    assert not (here / "ran").exists() and "evil" not in sys.modules


def test_a_member_of_an_ensemble_runs_nothing(fitted, here, product, capsys):
    path = attacked(fitted, here, lambda parameters, _: parameters.update(patch_encoder=TOUCH))
    described = json.dumps(torch.load(path, weights_only=True)["patchad_model"])
    for member in (str(path), described):
        members = json.dumps([member, str(fitted)])
        with pytest.raises(SystemExit):
            main(["fit", "--config=ensemble", f"--model.members={members}", f"--data.root={product}", *SMALL])
        assert "names subprocess.getoutput" in capsys.readouterr().err
    assert not (here / "ran").exists()


@pytest.mark.parametrize("verb", ["test", "validate", "fit"])
def test_a_checkpoint_writes_no_images(verb, fitted, here):
    made = {"layout": {"class_path": "patchad.data.Synthetic", "init_args": {}}, "root": str(here / "made")}
    path = attacked(fitted, here, lambda _, images: images.update(made))
    with pytest.raises(SystemExit):
        main([verb, f"--ckpt_path={path}", *QUIET])
    assert sorted(file.name for file in here.iterdir()) == ["attack.ckpt", "evil.py"]


def test_a_class_that_is_allowed_is_made(fitted, here, capsys):
    own = {"patch_encoder": {"class_path": "own.Encoder", "init_args": {}}}
    path = attacked(fitted, here, lambda parameters, _: parameters.update(own))
    (here / "own.py").write_text(EVIL)
    for command in (["--allow=own"], ["--allow", "[other, own]"], ["--config=own.yaml"]):
        (here / "own.yaml").write_text("allow: [own]")
        main(["test", f"--ckpt_path={path}", *QUIET, *command])
    assert (here / "runs/version_2/metrics.csv").is_file()
    with pytest.raises(PatchadError, match=r"patchad\.allow\('evil'\)"):
        made(PatchModel, {"class_path": "evil.Encoder"})
    patchad.allow("own.inner")
    assert isinstance(PatchModel.load(path), PatchModel)


class Distance(Configurable):
    def __init__(self, power: int = 2) -> None:
        self.power = power


class Untold(PatchLoss):
    """An argument of which no annotation says what it is, and one that only type checkers know."""

    def __init__(self, distance, other: "Unknown" = None) -> None:
        super().__init__()
        self.distance, self.other = distance, other

    def forward(self, views):
        return views.anchor.mean()


def test_an_argument_without_annotation_takes_what_a_checkpoint_may_hold():
    described = spec(Untold(Distance(3)))
    with pytest.raises(PatchadError, match=r"give --allow"):
        made(PatchLoss, described)
    patchad.allow(__name__)
    assert made(PatchLoss, described).distance.power == 3
    for path in ("patchad.losses.torch.nn.ReLU", "patchad.cli.os.system", "subprocess.Popen"):
        other = {**described, "init_args": {"distance": {"class_path": path}}}
        check_slots(PatchLoss, other, "model")  # the user's own configuration
        with pytest.raises(PatchadError, match=r"names .*, which is no"):
            made(PatchLoss, other)


@pytest.mark.parametrize("slot", ["patch_encoder", "bank", "scorer", "learning"])
def test_a_config_of_the_users_calls_nothing_but_classes_of_the_slot(slot, here, product, capsys):
    (here / "own.yaml").write_text(
        json.dumps({"model": {"class_path": "patchad.PatchDetector", "init_args": {slot: TOUCH}}})
    )
    for option in (["--config=own.yaml"], [f"--model.{slot}=subprocess.getoutput", f"--model.{slot}.cmd=touch ran"]):
        with pytest.raises(SystemExit) as stop:
            main(["fit", f"--data.root={product}", *SMALL, *option])
        assert stop.value.code == 2
    assert not (here / "ran").exists()
