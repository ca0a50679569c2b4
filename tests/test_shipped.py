"""What ships: every configuration file is fitted, tested and predicts, on images of which some are padded."""

import csv
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import SMALL, commands_in

from patchad import PatchModel
from patchad.canvas import Canvas, content_size
from patchad.checkpoint import read_checkpoint
from patchad.cli import CONFIGS, main
from patchad.data.synthetic import write_synthetic
from patchad.images import read_image

FEW = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=2", "--trainer.limit_train_batches=2"]
SHORTER = {
    "default": [],
    "differnet": [*FEW, "--model.backbone.weights=none", "--model.transforms=2", "--model.hidden=16"],
    "fast": [],
    "learned": [*FEW, "--data.pyramids_per_image=16"],
    "padim": ["--model.channels=20", "--model.backbone.weights=none"],
    "paper": [
        "--data.root=tiny",
        "--data.image_size=[64,64]",
        "--trainer.limit_train_batches=1",
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
        "--data.batch_size=16",
        "--data.draws_per_epoch=20",
        "--model.scoring_strides={64: 16, 32: 16, 16: 16}",
        "--model.backbone.weights=none",
    ],
    "patch_svdd": [
        "--data.root=tiny",
        "--data.image_size=[128,128]",
        "--trainer.limit_train_batches=1",
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
        "--data.batch_size=16",
        "--data.draws_per_epoch=4",
        "--model.scoring_strides={64: 32, 32: 16}",
    ],
    "quickstart": ["--data.root=made", *(f"--data.layout.{name}=6" for name in ("train", "test_defective"))],
}
"""What brings a configuration to seconds; `ensemble` is of two of them, others have tests of their own."""
GOLDEN = Path(__file__).parent / "golden" / "default.json"


@pytest.fixture(scope="module")
def shipped(padded_product, tmp_path_factory) -> Path:
    """A folder with a run of each configuration, fitted, tested and predicted."""
    folder = tmp_path_factory.mktemp("shipped")
    with commands_in(folder):
        write_synthetic(Path("tiny"), train=4, test_normal=1, test_defective=1, size=96)
        for name, options in SHORTER.items():
            run(name, [f"--data.root={padded_product}", *SMALL, *options])
        members = f"--model.members={[checkpoint(folder, name) for name in ('default', 'fast')]}"
        run("ensemble", [f"--data.root={padded_product}", *SMALL, members])
    return folder


def run(name: str, options: list[str]) -> None:
    where = f"--trainer.logger.save_dir={name}"
    config = [] if name == "default" else ["--config", name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"the embeddings of side \d+ have collapsed")  # of VGG16 with random weights
        warnings.filterwarnings("ignore", r".* is the root of a product|\d+ of \d+ images (are among|hold pure)")
        main(["fit", *config, *options, where])
        found = ["--ckpt_path", checkpoint(Path(), name), "--trainer.enable_progress_bar=false", where]
        main(["test", *found])
        main(["predict", *found, "--maps=float16"])


def checkpoint(folder: Path, name: str) -> str:
    return str(folder / name / "version_0/checkpoints/last.ckpt")


def scores(folder: Path, name: str) -> list[dict[str, str]]:
    rows = csv.DictReader((folder / name / "version_2/predictions/scores.csv").read_text().splitlines())
    return sorted(rows, key=lambda row: row["path"])


def metrics(folder: Path, name: str, version: int) -> dict[str, float]:
    rows = csv.DictReader((folder / name / f"version_{version}/metrics.csv").read_text().splitlines())
    return {key: float(value) for row in rows for key, value in row.items() if value}


def test_every_configuration_is_here():
    files = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")}
    assert files == {*SHORTER, "ensemble", "mcuepushu", "logger/wandb"}


@pytest.mark.parametrize("name", [*SHORTER, "ensemble"])
def test_every_configuration_is_fitted_tested_and_predicts(name, shipped):
    tested, found = metrics(shipped, name, 1), scores(shipped, name)
    canvas = Canvas.of(read_checkpoint(Path(checkpoint(shipped, name)))["patchad_canvas"])
    random = ("differnet", "padim", "paper", "patch_svdd")  # their weights are, here
    least = 0.0 if name in random else 0.6
    assert least <= tested["test/detection_auroc"] <= 1 and least <= tested["test/segmentation_auroc"] <= 1
    assert "val/detection_auroc" in metrics(shipped, name, 0)
    assert len(found) >= 6 and all(float(row["score"]) > 0 for row in found)
    for row in found:
        path = Path(row["path"])
        root = next(parent for parent in path.parents if parent.name in ("padded", "made", "tiny"))
        values = np.load(shipped / name / "version_2/predictions/maps" / f"{path.relative_to(root)}.npy")
        with Image.open(shipped / path) as image:
            native = image.size[::-1]
        assert values.shape == content_size(native, canvas.image_size, canvas.keep_aspect) and np.isfinite(values).all()


def test_the_default_is_the_one_whose_figures_are_kept(shipped):
    """After a change that is meant: PATCHAD_GOLDEN=write, and the reason into CHANGELOG.md."""
    state = torch.load(checkpoint(shipped, "default"), weights_only=True)["state_dict"]
    tested = metrics(shipped, "default", 1)
    sides = {name: state[f"model.scorer.{name}"].tolist() for name in ("scale", "level", "spread")}
    norms = {side: float(state[f"model.banks.{side}.vectors"].norm(dim=1).mean()) for side in (64, 32, 16)}
    levels = {side: float(state[f"model.banks.{side}.levels"].mean()) for side in (64, 32, 16)}
    found = {
        **{
            f"{name} {side}": value for name, values in sides.items() for side, value in zip(norms, values, strict=True)
        },
        **{f"norm {side}": value for side, value in norms.items()},
        **{f"baseline level {side}": value for side, value in levels.items()},
        "threshold": float(state["model.scorer.normals"].max()),
        **{name: tested[f"test/{name}"] for name in ("detection_auroc", "segmentation_auroc", "pro")},
        **{f"score {Path(row['path']).parent.name}": float(row["score"]) for row in scores(shipped, "default")},
    }
    if os.environ.get("PATCHAD_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps({name: round(value, 5) for name, value in found.items()}, indent=1) + "\n")
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), rel=2e-3, abs=1e-2)


@pytest.mark.parametrize("name", ["default", "learned"])
def test_a_model_of_a_checkpoint_scores_files_and_arrays_as_predict_does(name, shipped):
    model = PatchModel.load(checkpoint(shipped, name))
    for row in scores(shipped, name)[::3]:
        path = Path(row["path"])
        written = np.load(shipped / name / f"version_2/predictions/maps/{path.relative_to(path.parents[2])}.npy")
        pixels = (read_image(path) * 255).round().byte().permute(1, 2, 0).numpy()
        for image in (path, str(path), pixels, pixels.transpose(2, 0, 1), pixels.astype(np.float32) / 255):
            found = model.predict(image)
            assert found.score == pytest.approx(float(row["score"]), rel=1e-5)
            assert found.p_value == pytest.approx(float(row["p_value"]), rel=1e-3)
            assert found.anomalous == (row["verdict"] == "anomalous")
            np.testing.assert_allclose(found.map, written, rtol=1e-3, atol=1e-5)
