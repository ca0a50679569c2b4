"""A full disk ends a command in one line that names the file, and costs nothing that was there."""

import csv
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jaxtyping
import pytest

from patchad.cli import main
from tests.test_cli import LITE, SMALL, commands_in

LAST = "runs/fit/checkpoints/last.ckpt"
PREDICTIONS, OVERLAY = "runs/map/predictions", ".overlay.png"
FIT = ["fit", "--model.sides=[16]", *LITE, *SMALL, "--trainer.logger.version=fit"]
FITTED = [f"--ckpt_path={LAST}", "--trainer.enable_progress_bar=false"]
CASES = {
    "a checkpoint": (200, FIT, LAST),
    "the beginning of a checkpoint": (12, FIT, LAST),
    "a picture": (24, ["test", *FITTED, "--trainer.logger.version=picture"], "runs/picture/contact_sheet.png"),
    "a file of Lightning's": (0, ["test", *FITTED, "--trainer.logger.version=config"], "runs/config"),
    "a map": (200, ["predict", *FITTED, "--trainer.logger.version=map", "--data.batch_size=1"], f"{PREDICTIONS}/maps"),
    "an exported file": (100, ["export", *FITTED], "model.patchad"),
}
"""What there is no room for: how many kilobytes are free, the command, and what its error names."""


@pytest.fixture(scope="module")
def disk(product, tmp_path_factory) -> Iterator[Path]:
    """A small disk that is the current folder, with a fit on it and a file where an exported one is to go."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        with commands_in(folder) as patch:
            patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
            main([*FIT, f"--data.root={product}"])
            Path("model.patchad").write_bytes(b"an earlier file")
            Path("runs/fit/metrics.csv").unlink()  # Lightning would, where a fit is repeated
            yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(disk: Path, free: int) -> Iterator[None]:
    """Leaves so many kilobytes."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 1024 * free))
    try:
        yield
    finally:
        filler.unlink()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
@pytest.mark.parametrize("what", CASES)
def test_a_full_disk_is_told_in_one_line_that_names_the_file_and_costs_nothing_that_was_there(
    what, disk, product, capsys
):
    free, command, name = CASES[what]
    before = contents(disk)
    root = product / "test" if command[0] == "predict" else product
    with full(disk, free), pytest.raises(SystemExit) as stop:
        main([*command, f"--data.root={root}"])
    assert stop.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(told) == 1 and told[0].startswith(f"patchad: error: [Errno 28] No space left on device: '{name}")
    after = contents(disk)
    assert before.items() <= after.items()
    assert not [path for path in after if path.suffix == ".part"]
    if what == "a map":
        rows = csv.DictReader((disk / PREDICTIONS / "scores.csv").read_text().splitlines())
        scored = {str(Path(row["path"]).relative_to(root)) for row in rows}
        maps = disk / PREDICTIONS / "maps"
        drawn = {str(path.relative_to(maps)).removesuffix(OVERLAY) for path in maps.rglob(f"*{OVERLAY}")}
        assert scored == drawn and scored
