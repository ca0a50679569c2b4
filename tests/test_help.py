"""What `--help` shows: what is needed on one screen, nothing that is not there, and every option on demand."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml
from test_cli import here  # noqa: F401

from patchad.cli import PatchadCLI, main
from patchad.help import VERBS, packaged

VALUES = {
    "--data.root": "parts",
    "--data.layout": "Folder",
    "--data.image_size": "512",
    "--model.scorer.target_fpr": "0.02",
    "--config": "fast",
    "--trainer.max_epochs": "3",
    "--ckpt_path": "last",
    "--product": "nut",
    "--trainer.logger.version": "mine",
}
"""Of each option on the first screen of fit."""


@pytest.fixture
def shown(here, capsys, monkeypatch):
    """What a command prints that only shows something, on a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")

    def shown(*command: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*command])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return shown


def options(text: str) -> set[str]:
    return set(re.findall(r"--[\w.]+", text))


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_one_screen_that_names_only_what_the_long_help_has_which_begins_with_the_data(verb, shown):
    screen, every = shown(verb, "--help"), shown(verb, "--help", "all")
    assert len(screen.splitlines()) <= 40 and max(map(len, screen.splitlines())) <= 100
    of_lightnings_parts = {"--trainer.logger.version"}  # which fit takes, below
    assert {"--help", "--ckpt_path"} < options(screen) <= options(every) | of_lightnings_parts
    places = [every.index(f"  {name} ") for name in ("--data.root", "--model.scorer.target_fpr", "--trainer.devices")]
    assert places == sorted(places)


def test_every_option_on_the_first_screen_of_fit_is_taken(shown):
    rows = options("\n".join(re.findall(r"^  (--\S+)", shown("fit", "--help"), re.MULTILINE)))
    assert rows - {"--help"} == VALUES.keys()
    config = yaml.safe_load(shown("fit", *(f"{name}={value}" for name, value in VALUES.items()), "--print_config"))
    assert config["trainer"]["max_epochs"] == 3 and config["ckpt_path"] == "last"
    assert config["trainer"]["logger"]["init_args"]["version"] == "mine"
    assert config["data"]["init_args"]["root"] == "parts"
    assert config["data"]["init_args"]["layout"]["class_path"] == "patchad.data.Folder"
    assert config["model"]["init_args"]["scorer"]["init_args"]["target_fpr"] == 0.02


def test_the_first_screen_of_fit_says_of_each_packaged_config_what_it_is(shown):
    rows = re.findall(
        r"^  ([a-z_/]+) +(\w.+)$", shown("fit", "--help").partition("\nconfigurations:\n")[2], re.MULTILINE
    )
    assert [name for name, _ in rows] == list(packaged())
    assert dict(rows)["fast"] == "For lines that need milliseconds"
    for name in packaged():
        assert yaml.safe_load(shown("fit", "--config", name, "--data.root=parts", "--print_config"))["model"]


def test_without_a_verb_help_lists_all_of_them_a_line_each(shown):
    rows = re.findall(r"^  (\w+) +(\w.*[.])$", shown("--help"), re.MULTILINE)
    assert [name for name, _ in rows] == [*PatchadCLI.subcommands(), "score"] == [*VERBS, "score"]


def test_the_help_of_a_class_is_that_of_the_default_one_unless_another_is_named(shown):
    assert "--model.bank" in options(shown("fit", "--model.help"))
    members = options(shown("fit", "--model.help", "Ensemble"))
    assert "--model.members" in members and "--model.bank" not in members
    assert {"--data.root", "--data.layout"} < options(shown("fit", "--data.help"))


def test_the_version_is_that_of_the_metadata_and_takes_no_torch():
    program = "import sys; from patchad.__main__ import main; main(); sys.exit('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"patchad {version('patchad')}, torch {version('torch')}, ")
