import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patchad.cli import main
from patchad.data.synthetic import write_synthetic

OPTIONS = [
    "--model.bank.max_vectors=400",
    "--data.image_size=[96,96]",
    "--data.metric_size=[96,96]",
    "--data.num_workers=0",
    "--data.batch_size=3",
    "--data.held_out_fraction=0.25",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def patchad(folder: Path, *arguments: str) -> None:
    """In processes of its own where there are to be several, else in this one."""
    if TWO[0] not in arguments:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["patchad"])
            patch.setattr(sys, "path", list(sys.path))
            return main(list(arguments))
    command, threads = [sys.executable, "-m", "patchad", *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=threads, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return None


def run(folder: Path, root: Path, *options: str) -> tuple[dict, dict[str, float], list]:
    """Fits, tests and predicts: the tensors, the test metrics by name, and the rows of scores.csv."""
    names = {verb: f"{verb}-{len(options)}" for verb in ("fit", "test", "predict")}
    version = {verb: f"--trainer.logger.version={name}" for verb, name in names.items()}
    checkpoint = f"runs/{names['fit']}/checkpoints/last.ckpt"
    kept = [f"--ckpt_path={checkpoint}", *OPTIONS[-2:], *options]
    patchad(folder, "fit", f"--data.root={root}", *OPTIONS, *options, version["fit"])
    patchad(folder, "test", *kept, version["test"])
    patchad(folder, "predict", f"--data.root={root}/test", *kept, version["predict"])
    (row,) = csv.DictReader((folder / "runs" / names["test"] / "metrics.csv").read_text().splitlines())
    metrics = {name: float(value) for name, value in row.items() if name.startswith("test/")}
    scores = (folder / "runs" / names["predict"] / "predictions/scores.csv").read_text().splitlines()
    return torch.load(folder / checkpoint, weights_only=True)["state_dict"], metrics, list(csv.DictReader(scores))


@pytest.mark.slow
def test_two_processes_give_the_bank_and_the_auroc_of_one(tmp_path):
    root = tmp_path / "product"
    write_synthetic(root, train=13, test_normal=4, test_defective=7, size=96)
    one, metrics, rows = run(tmp_path, root)
    two, metrics_of_two, rows_of_two = run(tmp_path, root, *TWO)
    for side in (64, 32, 16):
        assert torch.equal(one[f"model.banks.{side}.keys"], two[f"model.banks.{side}.keys"])
        torch.testing.assert_close(
            one[f"model.banks.{side}.vectors"], two[f"model.banks.{side}.vectors"], rtol=0, atol=1e-5
        )
    torch.testing.assert_close(one["model.scorer.normals"], two["model.scorer.normals"], rtol=1e-5, atol=0)
    assert "test/detection_auroc" in metrics and metrics_of_two == pytest.approx(metrics, abs=1e-6)
    assert [row["path"] for row in rows] == [row["path"] for row in rows_of_two] and len(rows) == 11


LEARN = """
import sys
from functools import partial
from pathlib import Path

import torch
from pytorch_lightning import Trainer, seed_everything

from patchad import Learning, PatchDetector, PyramidDataModule
from patchad.memory import MemoryBank
from patchad.models import EfficientNetLite0, FeatureCache, LearnedEncoder

root, devices = sys.argv[1:]
seed_everything(0)
data = PyramidDataModule(root, image_size=(96, 96), batch_size=2, num_workers=0, pyramids_per_image=16,
                         held_out_fraction=0.2)
learning = partial(Learning, clusters=8, warmup=0.3, cache=FeatureCache("features"))
model = PatchDetector(EfficientNetLite0(), LearnedEncoder, learning=learning,
                      bank=partial(MemoryBank, max_vectors=200, reduce="kmeans"))
trainer = Trainer(accelerator="cpu", devices=int(devices), strategy="ddp" if devices == "2" else "auto", max_epochs=3,
                  limit_val_batches=0, logger=False, enable_progress_bar=False, enable_checkpointing=False)
trainer.fit(model, data)
torch.save(model.state_dict(), f"state-{devices}-{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_learn_the_same_encoders_and_hold_the_same_centroids(tmp_path):
    root = tmp_path / "product"
    write_synthetic(root, train=14, test_normal=1, test_defective=1, size=96)
    (tmp_path / "learn.py").write_text(LEARN)
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    for devices in ("2", "1"):
        command = [sys.executable, "learn.py", str(root), devices]
        finished = subprocess.run(command, cwd=tmp_path, env=threads, capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr
    first, second, alone = (
        torch.load(tmp_path / f"state-{name}.pt", weights_only=True) for name in ("2-0", "2-1", "1-0")
    )
    learned = [
        name
        for name in first
        if name.startswith(("model.encoder.encoders", "learning.pseudo_labels", "learning.losses"))
    ]
    assert first["learning.pseudo_labels.16.ready"] and all(torch.equal(first[name], second[name]) for name in learned)
    measured = [name for name in learned if "standardize" in name]
    for name in measured:
        torch.testing.assert_close(first[name], alone[name], rtol=1e-5, atol=1e-6)
