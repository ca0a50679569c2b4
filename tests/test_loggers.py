"""Runs that begin in the same instant have a folder each."""

import shutil

import pytest
import yaml
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from test_cli import LITE, SMALL, here  # noqa: F401
from test_distributed import python

from patchad.checkpoint import read_checkpoint
from patchad.cli import main
from patchad.loggers import RunLogger

TOGETHER = """
import gc, sys
gc.disable()
from multiprocessing import get_context
from patchad.cli import main
gc.freeze()
fork = get_context("fork")
together = fork.Barrier(2)
def run():
    together.wait()
    main(sys.argv[1:])
processes = [fork.Process(target=run) for _ in range(2)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(any(process.exitcode for process in processes))
"""
"""A program that runs its command in two processes at once, of which both have imported all."""


def test_two_fits_at_once_write_two_whole_folders(product, tmp_path):
    python(tmp_path, "-c", TOGETHER, "fit", f"--data.root={product}", "--data.validate_on=none", *LITE, *SMALL)
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["version_0", "version_1"]
    for run in runs:
        assert len(read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]["model.scorer.normals"]) == 12
        assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["root"] == str(product)


def test_a_number_is_taken_before_anything_is_written_and_not_by_asking(tmp_path):
    loggers = [RunLogger(tmp_path / "runs", name=None) for _ in range(3)]
    assert [logger.version for logger in loggers] == [0, 0, 0] and not (tmp_path / "runs").exists()
    assert all(logger.experiment for logger in loggers)
    assert [logger.version for logger in loggers] == [0, 1, 2]
    (tmp_path / "runs/version_3").write_text("no folder")
    last = RunLogger(tmp_path / "runs", name=None)
    assert last.experiment and last.log_dir == str(tmp_path / "runs/version_4")
    assert CSVLogger(tmp_path / "runs", name=None).version == 5  # Lightning counts on from them


def test_a_fit_that_fails_before_it_writes_leaves_no_folder(product, here):
    for name in ("train", "test"):
        (here / "one" / name / "good").mkdir(parents=True)
        shutil.copy(product / name / "good/000.png", here / "one" / name / "good")
    with pytest.raises(SystemExit):
        main(["fit", "--data.root=one", *LITE, *SMALL])
    assert list((here / "runs").iterdir()) == []


def test_a_version_that_is_given_stays_and_further_processes_take_none(tmp_path, monkeypatch):
    given = RunLogger(tmp_path, name=None, version="mine")
    assert given.experiment and given.log_dir == str(tmp_path / "mine")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    further = RunLogger(tmp_path, name=None)
    assert further.experiment is not None and further.version == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
