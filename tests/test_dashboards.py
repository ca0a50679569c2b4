"""What a run really leaves behind: pictures in the run folder, and a wandb run that is read back from its file."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import commands_in
from wandb.proto import wandb_internal_pb2

from patchad import PatchModel
from patchad.checkpoint import read_checkpoint
from patchad.cli import main

BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7
SMALL = [
    "--config=learned",
    "--data.image_size=[96,96]",
    "--data.metric_size=[96,96]",
    "--data.num_workers=0",
    "--model.learning.clusters=8",
    "--model.bank.max_vectors=200",
    "--trainer.max_epochs=4",
    "--trainer.check_val_every_n_epoch=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


def records(path: Path) -> list:
    """The records of a .wandb file, which is a log of LevelDB's format: chunks that do not cross blocks of 32 KiB."""
    data, found, place, pending = path.read_bytes(), [], FILE_HEADER, b""
    while place + CHUNK_HEADER <= len(data):
        if BLOCK - place % BLOCK < CHUNK_HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pending += data[place + CHUNK_HEADER : place + CHUNK_HEADER + length]
        place += CHUNK_HEADER + length
        if kind in (1, 4):  # whole, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            found.append(record)
            pending = b""
    return found


@pytest.fixture(scope="module")
def runs(product, tmp_path_factory) -> Path:
    """A fit and a test with dashboards of wandb and TensorBoard."""
    folder = tmp_path_factory.mktemp("dashboard")
    last = "runs/version_0/checkpoints/last.ckpt"
    with commands_in(folder) as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for command in (
            ["fit", f"--data.root={product}", *SMALL],
            ["test", f"--ckpt_path={last}", "--trainer.enable_progress_bar=false"],
        ):
            tensorboard = "--trainer.logger+=TensorBoardLogger"
            main([*command, "--config=logger/wandb", tensorboard, "--trainer.logger.save_dir=runs/tensorboard"])
            wandb.finish()
        wandb.teardown()  # its service would live on, and serve other tests
    return folder / "runs"


def dashboards(runs: Path) -> tuple[Path, Path]:
    fit, test = sorted((runs / "wandb").glob("offline-run-*"), key=lambda path: path.name)
    return fit, test


def history(folder: Path) -> set[str]:
    found = [record for record in records(next(folder.glob("*.wandb"))) if record.HasField("history")]
    return {item.key or item.nested_key[0] for record in found for item in record.history.item}


def test_wandb_gets_what_a_trainer_watches(runs):
    expected = {
        *(f"train/{name}_side_32" for name in ("position", "relativesimilarity", "clustering", "position_accuracy")),
        *(f"train/{name}_side_32" for name in ("deviation", "label_churn", "smallest_cluster", "largest_cluster")),
        *("val/detection_auroc", "val/segmentation_auroc_side_16", "train/loss"),
        *("anomaly_maps", "clusters/side_32"),
    }
    assert expected <= history(dashboards(runs)[0])


def config(folder: Path) -> dict:
    return {
        item.key: json.loads(item.value_json)
        for record in records(next(folder.glob("*.wandb")))
        if record.HasField("config")
        for item in record.config.update
    }


def test_wandb_gets_losses_of_each_step_and_a_curve_of_each_epoch(runs):
    fit = next(dashboards(runs)[0].glob("*.wandb"))
    rows = [
        {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for record in records(fit)
        if record.HasField("history")
    ]
    losses = [row for row in rows if "train/position_side_32_step" in row]
    curve = [float(row["val/quick_detection_auroc"]) for row in rows if "val/quick_detection_auroc" in row]
    assert len(losses) == 4 * 2 and len(curve) == 4 and all(0 <= value <= 1 for value in curve)


def test_fit_and_test_of_a_model_are_one_group_and_say_what_it_was_fitted_on(runs, product):
    groups, said = set(), []
    for folder in dashboards(runs):
        (run,) = [record.run for record in records(next(folder.glob("*.wandb"))) if record.HasField("run")][:1]
        groups.add(run.run_group)
        said.append(config(folder))
        assert run.job_type == ("fit" if folder == dashboards(runs)[0] else "test")
    checkpoint = read_checkpoint(runs / "version_0/checkpoints/last.ckpt")
    assert groups == {checkpoint["patchad_group"]}
    limits = PatchModel.load(runs / "version_0/checkpoints/last.ckpt").scorer.limits._asdict()
    for one in said:
        assert one["limits"] == pytest.approx(limits)
        assert one["images"] == {"root": str(product), "normal": 12, "test": 11}
        assert one["false_positive_rate"] == pytest.approx({"asked": 0.05, "promised": 1 / 13})


def artifacts(folder: Path, kind: str) -> list:
    """What a run keeps as artifacts of a kind: their files, by path within them."""
    found = records(next(folder.glob("*.wandb")))
    logged = [record.request.log_artifact.artifact for record in found if record.request.HasField("log_artifact")]
    logged += [record.artifact for record in found if record.HasField("artifact")]
    return [{entry.path: entry for entry in one.manifest.contents} for one in logged if one.type == kind]


def test_wandb_gets_the_checkpoint(runs):
    (files,) = artifacts(dashboards(runs)[0], "model")
    assert files["model.ckpt"].size == (runs / "version_0/checkpoints/last.ckpt").stat().st_size


def test_tensorboard_gets_figures_and_pictures(runs):
    found = {}
    for folder in sorted((runs / "tensorboard").rglob("version_*")):
        accumulator = EventAccumulator(str(folder))
        accumulator.Reload()
        for kind, names in accumulator.Tags().items():
            if isinstance(names, list):
                found.setdefault(kind, set()).update(names)
    assert {"train/loss", "train/position_side_32_step", "val/detection_auroc", "test/pro"} <= set(found["scalars"])
    assert {"anomaly_maps", "clusters/side_32", "possible_defects", "contact_sheet"} <= set(found["images"])


def test_wandb_gets_the_resolved_config(runs):
    found = config(dashboards(runs)[0])
    assert found["config"]["model"]["init_args"]["backbone"]["class_path"] == "patchad.models.EfficientNetLite0"
    assert found["config"]["data"]["init_args"]["image_size"] == [96, 96]


def test_wandb_gets_pictures_and_the_table_of_aurocs(runs, product):
    fit, test = dashboards(runs)
    assert len(list(fit.glob("files/media/images/anomaly_maps*.png"))) == 2
    assert len(list(fit.glob("files/media/images/clusters/side_32*.png"))) == 2
    assert list(test.glob("files/media/images/contact_sheet*.png"))
    table = json.loads(next(test.glob("files/media/table/aurocs*.json")).read_text())
    defects = sorted(path.name for path in (product / "ground_truth").iterdir())
    assert table["columns"] == ["part", "detection_auroc", "segmentation_auroc"]
    assert [row[0] for row in table["data"]] == ["all", *defects, "side 64", "side 32", "side 16"]
    assert all(0 <= row[1] <= 1 for row in table["data"])


def test_wandb_gets_a_row_and_pictures_of_each_image_and_the_plots_of_a_test(runs):
    test = dashboards(runs)[1]
    assert {"images", "scores_table", "roc_table", "verdicts_table"} <= history(test)
    files = next(files for files in artifacts(test, "run_table") if "images.table.json" in files)
    images = json.loads(Path(files["images.table.json"].local_path).read_text())
    rows = list(csv.DictReader((runs / "version_1/scores.csv").read_text().splitlines()))
    place = {name: images["columns"].index(name) for name in ("path", "score", "image", "heat map")}
    assert [row[place["path"]] for row in images["data"]] == [row["path"] for row in rows]
    assert [row[place["score"]] for row in images["data"]] == pytest.approx([float(row["score"]) for row in rows])
    for row in images["data"]:
        for name in ("image", "heat map"):
            with Image.open(files[row[place[name]]["path"]].local_path) as picture:
                assert len(np.unique(np.asarray(picture))) > 20


def test_the_run_folder_holds_the_same_pictures(runs):
    for name in ("anomaly_maps/epoch_0003.png", "clusters/epoch_0003_side_16.png"):
        with Image.open(runs / "version_0" / name) as picture:
            assert len(np.unique(np.asarray(picture))) > 50
    assert not list(runs.rglob("*.part"))


def test_a_montage_shows_the_patches_that_the_clusters_were_fitted_on(product, tmp_path):
    from patchad.callbacks import Clusters
    from tests.test_learning import detector, images, trainer

    run, model = trainer(tmp_path, max_epochs=2, check_val_every_n_epoch=2), detector()
    run.fit(model, images(product))
    batches, data = model.learning.probe_batches, run.datamodule
    batch = batches[0]
    pyramid, count = batch.sides[16], batch.sides[16].anchor.shape[1]
    for column in range(count):  # neighbouring anchors may be at one place
        top, left = (pyramid.window[2] + pyramid.anchor[2, column]).tolist()
        expected = batch.image[2, 0, :, top : top + 16, left : left + 16].permute(1, 2, 0).numpy()
        patch = Clusters().patch(data.pyramids, batches, 16, 2 * count + column)
        assert np.abs(patch / 255 - expected.clip(0, 1)).max() <= 0.5 / 255 + 1e-6
