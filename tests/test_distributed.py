import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer, seed_everything

from patchad import Learning, PatchDetector, PyramidDataModule
from patchad.cli import main
from patchad.data.synthetic import write_synthetic
from patchad.memory import MemoryBank
from patchad.models import EfficientNetLite0, FeatureCache, LearnedEncoder
from tests.test_page import data_of

SMALL = [
    "--model.bank.max_vectors=400",
    "--data.image_size=[96,96]",
    "--data.metric_size=[96,96]",
    "--data.num_workers=0",
    "--data.batch_size=3",
    "--data.held_out_fraction=0.25",
]
ALONE = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
TWO = [*ALONE, "--trainer.devices=2", "--trainer.strategy=ddp"]
FORKED = [*TWO[:-1], "--trainer.strategy=ddp_fork"]
"""As TWO, with processes that are begun in a moment."""
CHECKPOINT = "runs/version_0/checkpoints/last.ckpt"


def python(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, *arguments]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert finished.returncode == 0, finished.stderr


def fit(root: Path, *trainer: str) -> list[str]:
    return ["fit", f"--data.root={root}", *SMALL, *trainer]


def score(root: Path, trainer: list[str]) -> None:
    main(["test", f"--ckpt_path={CHECKPOINT}", *trainer])
    main(["predict", f"--ckpt_path={CHECKPOINT}", f"--data.root={root}/test", *trainer])


def written(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, float], list[dict[str, str]]]:
    """The tensors of a fit, the test metrics by name, and the rows of scores.csv."""
    state = torch.load(folder / CHECKPOINT, weights_only=True)["state_dict"]
    (row,) = csv.DictReader((folder / "runs/version_1/metrics.csv").read_text().splitlines())
    metrics = {name: float(value) for name, value in row.items() if name.startswith("test/")}
    scores = (folder / "runs/version_2/predictions/scores.csv").read_text().splitlines()
    return state, metrics, list(csv.DictReader(scores))


@pytest.mark.slow
def test_two_processes_give_the_bank_and_the_auroc_of_one(tmp_path, monkeypatch):
    root, alone, together = (tmp_path / name for name in ("product", "alone", "together"))
    write_synthetic(root, train=13, test_normal=4, test_defective=7, size=96)
    alone.mkdir()
    together.mkdir()
    monkeypatch.chdir(alone)
    monkeypatch.setattr(sys, "argv", ["patchad"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(fit(root, *ALONE))
    score(root, ALONE)
    python(together, "-m", "patchad", *fit(root, *TWO))
    program = "import sys; from tests.test_distributed import *; score(sys.argv[1], FORKED)"
    python(together, "-c", program, str(root))
    for folder in (alone, together):
        assert {run.name for run in (folder / "runs").iterdir()} == {"version_0", "version_1", "version_2"}
    one, metrics, rows = written(alone)
    two, metrics_of_two, rows_of_two = written(together)
    for side in (64, 32, 16):
        assert torch.equal(one[f"model.banks.{side}.keys"], two[f"model.banks.{side}.keys"])
        torch.testing.assert_close(
            one[f"model.banks.{side}.vectors"], two[f"model.banks.{side}.vectors"], rtol=0, atol=1e-5
        )
    torch.testing.assert_close(one["model.scorer.normals"], two["model.scorer.normals"], rtol=1e-5, atol=0)
    assert "test/detection_auroc" in metrics and metrics_of_two == pytest.approx(metrics, abs=1e-6)
    assert [row["path"] for row in rows] == [row["path"] for row in rows_of_two] and len(rows) == 11
    for folder in (alone, together):
        data = data_of((folder / "runs/version_1/report.html").read_text())
        assert len(data["rows"]) == 11 and all(data["pictures"])


def learn(folder: Path, root: Path, devices: int) -> None:
    """Keeps the state of each rank."""
    seed_everything(0)
    images = {"image_size": (96, 96), "batch_size": 2, "pyramids_per_image": 16}
    data = PyramidDataModule(root, **images, num_workers=0, held_out_fraction=0.2)
    learning = partial(Learning, clusters=8, warmup=0.3, cache=FeatureCache(str(folder / "features")))
    bank = partial(MemoryBank, max_vectors=200, reduce="kmeans")
    model = PatchDetector(EfficientNetLite0(), LearnedEncoder, learning=learning, bank=bank)
    nothing = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "limit_val_batches": 0}
    strategy = "ddp" if devices == 2 else "auto"
    trainer = Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_epochs=2, **nothing)
    trainer.fit(model, data)
    torch.save(model.state_dict(), folder / f"state-{devices}-{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_learn_the_same_encoders_and_hold_the_same_centroids(tmp_path):
    root = tmp_path / "product"
    write_synthetic(root, train=14, test_normal=1, test_defective=1, size=96)
    python(tmp_path, "-m", "tests.test_distributed", str(tmp_path), str(root), "2")
    learn(tmp_path, root, 1)
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


if __name__ == "__main__":  # a process of `learn`, which Lightning starts
    learn(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
