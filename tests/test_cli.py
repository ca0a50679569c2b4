import csv
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from patchad import PatchDetector, PatchModel
from patchad.callbacks.summary import percent
from patchad.checkpoint import read_checkpoint, save
from patchad.cli import main
from patchad.images import read_image
from patchad.results import Row, write_rows

SMALL = [
    "--data.image_size=[96,96]",
    "--data.metric_size=[96,96]",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
LITE = ["--model.bank.max_vectors=500"]
MAPS = ("float16", "heatmap", "overlay", "none")
WRITTEN = {"report": "report.html", "scores": "scores.csv"}
"""What a test names at its end, and where it is."""


@contextmanager
def commands_in(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Another current folder, with sys.argv and sys.path put back at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["patchad"])
        patch.setattr(sys, "path", list(sys.path))
        yield patch


@pytest.fixture
def here(tmp_path) -> Iterator[Path]:
    """An empty current folder for commands."""
    with commands_in(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def run(product, tmp_path_factory) -> Path:
    """The run folder of a fit from the command line, in a process of its own, that names nothing but the root."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "patchad", "fit", f"--data.root={product}", *LITE, *SMALL]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "next:       patchad test --ckpt_path runs/version_0/checkpoints/last.ckpt" in finished.stdout
    assert "is read as MVTecAD" in finished.stderr
    assert "memory bank, side 64: 108 of 108 vectors x 112, 0.0 MB" in finished.stderr
    assert "false-positive rate promised at most 0.0769, asked for 0.05" in finished.stderr
    return folder / "runs" / "version_0"


def checkpoint(run: Path) -> str:
    return str(run / "checkpoints" / "last.ckpt")


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def highest_pixels(run: Path, image: Path) -> np.ndarray:
    """The highest 1 % of the pixels of the map that scores come from, of an image of 96 x 96."""
    detector = PatchDetector.load_from_checkpoint(checkpoint(run), weights_only=True).eval()
    with torch.inference_mode():
        combined = detector.scorer.combine(detector(read_image(image)[None]).side_maps)
    return np.sort(combined.numpy().ravel())[-93:]


def test_a_run_folder_holds_the_resolved_config_and_the_metrics(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["backbone"]["class_path"].endswith("EfficientNetLite0")
    assert config["data"]["init_args"]["image_size"] == [96, 96]
    assert "val/detection_auroc" in (run / "metrics.csv").read_text()


def test_a_checkpoint_alone_is_tested(run, here, capsys):
    main(["test", "--ckpt_path", checkpoint(run), "--trainer.enable_progress_bar=false"])
    printed = capsys.readouterr().out
    found = list(csv.DictReader((here / "runs/version_0/metrics.csv").read_text().splitlines()))[-1]
    for name, metric in (("detection AUROC", "detection_auroc"), ("per-region overlap", "pro")):
        assert re.search(rf"^{name} +{percent(float(found[f'test/{metric}']))}( \(.* %\))? *$", printed, re.M)
    rows = read_rows(here / "runs/version_0/scores.csv")
    for label, count in (("normal", 4), ("anomalous", 7)):
        verdicts = Counter(row["verdict"] for row in rows if row["label"] == label)
        assert verdicts.total() == count
        assert re.search(rf"^{label} +{verdicts['normal']} +0 +{verdicts['anomalous']} *$", printed, re.M)
    assert printed.splitlines()[-2:] == [f"{name}: runs/version_0/{file}" for name, file in WRITTEN.items()]
    with Image.open(here / "runs/version_0/contact_sheet.png") as sheet:
        assert sheet.width > 4 * 160 and len(np.unique(np.asarray(sheet))) > 100
    page = (here / "runs/version_0/report.html").read_text()
    for row, end in (("all", ""), ("stain", "_defect_stain"), ("side 16", "_side_16")):
        values = [100 * float(found[f"test/{kind}_auroc{end}"]) for kind in ("detection", "segmentation")]
        cells = "".join(f'<td class="number">{value:.1f}</td>' for value in values)
        assert f"<td>{row}</td>{cells}" in page
    assert f"<dt>per-region overlap</dt><dd><b>{100 * float(found['test/pro']):.1f} %</b>" in page
    assert not list(here.rglob("*.part"))


def test_a_row_says_what_the_model_says_of_the_image_and_failures_come_first(run, here, product):
    """By another path to the same numbers: the model alone, image by image."""
    main(["test", "--ckpt_path", checkpoint(run), "--trainer.enable_progress_bar=false"])
    rows = read_rows(here / "runs/version_0/scores.csv")
    assert sorted(Path(row["path"]).parent.name == row["defect"] for row in rows) == [True] * 11
    wrong = [row["correct"] == "wrong" for row in rows]
    assert any(wrong) and wrong == sorted(wrong, reverse=True)
    model = PatchModel.load(checkpoint(run))
    digits = Path(checkpoint(run)).read_bytes()[-64:].decode()
    for row in rows:
        found, limits = model.predict(row["path"]), model.scorer.limits
        above = np.argwhere(found.map > limits.map_threshold)
        assert float(row["score"]) == pytest.approx(found.score, rel=1e-4)
        assert (row["verdict"], float(row["threshold"])) == (found.verdict, limits.threshold)
        assert abs(int(row["area"]) - len(above)) <= 1  # batches round differently
        if len(above) > 1:
            ends = [*above.min(0)[::-1], *(above.max(0)[::-1] + 1)]
            assert [int(row[side]) for side in ("left", "top", "right", "bottom")] == pytest.approx(ends, abs=1)
        assert row["model"] == digits and row["version"] == version("patchad")
        assert row["note"] == {(True, False): "score only", (False, True): "map only"}.get(
            (found.anomalous, len(above) > 0), ""
        )


def test_predict_writes_scores_and_what_is_asked_for_of_each_image(run, here, product):
    folder = here / "parts"
    folder.mkdir()
    shutil.copy(product / "test" / "good" / "000.png", folder / "same.png")
    (folder / "deep").mkdir()
    with Image.open(folder / "same.png") as image:
        image.resize((150, 110)).save(folder / "wide.jpg")
        image.convert("L").save(folder / "deep" / "same.png")
    options = ["--model.scorer.smoothing=0.0", "--trainer.enable_progress_bar=false"]
    for maps in MAPS:
        named = [] if maps == "overlay" else [f"--maps={maps}"]
        main(["predict", "--ckpt_path", checkpoint(run), "--data.root", "parts", *named, *options])
    runs = {maps: here / f"runs/version_{number}/predictions" for number, maps in enumerate(MAPS)}
    written = runs["float16"]
    rows = read_rows(written / "scores.csv")
    assert {row["path"] for row in rows} == {"parts/deep/same.png", "parts/same.png", "parts/wide.jpg"}
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), key=float, reverse=True)
    normals = torch.load(checkpoint(run), weights_only=True)["state_dict"]["model.scorer.normals"]
    threshold = normals.max().item()  # too few for another
    for row in rows:
        assert float(row["p_value"]) == pytest.approx(
            (1 + int((normals >= float(row["score"]) - 1e-6).sum())) / 13, rel=1e-3
        )
        assert row["verdict"] == ("anomalous" if float(row["score"]) > threshold else "normal")
    for name, size in (("same.png", (96, 96)), ("wide.jpg", (70, 96)), ("deep/same.png", (96, 96))):
        values = np.load(written / "maps" / f"{name}.npy")
        assert values.dtype == np.float16 and values.shape == size and values.min() > 0
        for maps in ("heatmap", "overlay"):
            with Image.open(runs[maps] / "maps" / f"{name}.{maps}.png") as picture:
                assert picture.size == size[::-1]
    assert not (runs["none"] / "maps").exists()
    scores = {row["path"]: float(row["score"]) for row in rows}
    assert highest_pixels(run, folder / "same.png").mean() == pytest.approx(scores["parts/same.png"], rel=1e-5)


def test_options_override_the_settings_of_the_checkpoint(run, here, product, capsys):
    shutil.copytree(product / "test", here / "other" / "test")
    main(["test", "--ckpt_path", checkpoint(run), "--data.root=other", "--trainer.enable_progress_bar=false"])
    captured = capsys.readouterr()
    assert "detection AUROC" in captured.out
    assert "segmentation AUROC" not in captured.out  # the other folder has no masks


@pytest.mark.parametrize("score", ["top_fraction", "max"])
def test_images_are_scored_as_the_options_say_with_a_warning_where_the_threshold_does_not_fit(
    score, run, here, product
):
    (here / "parts").mkdir()
    shutil.copy(product / "test" / "good" / "000.png", here / "parts" / "same.png")
    options = [
        f"--model.scorer.image_score={score}",
        "--model.scorer.smoothing=0.0",
        "--trainer.enable_progress_bar=false",
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(["predict", "--ckpt_path", checkpoint(run), "--data.root", "parts", *options])
    assert any("verdicts do not" in str(one.message) for one in caught) == (score == "max")
    written = here / "runs/version_0/predictions"
    row = next(csv.DictReader((written / "scores.csv").read_text().splitlines()))
    highest = highest_pixels(run, here / "parts" / "same.png")
    assert float(row["score"]) == pytest.approx(highest.max() if score == "max" else highest.mean(), rel=1e-5)


def test_images_of_the_users_own_are_predicted_by_a_detector_of_the_synthetic_set(run, here, product, capsys):
    shutil.copytree(product / "test" / "good", here / "parts")
    (here / "watching.py").write_text(WATCH)
    options = ["--data.layout=Synthetic", "--trainer.callbacks+=watching.Watch", "--trainer.enable_progress_bar=false"]
    main(["predict", "--ckpt_path", checkpoint(run), "--data.root", "parts", *options])
    assert "maps are kept in memory: False" in capsys.readouterr().out
    rows = (here / "runs/version_0/predictions/scores.csv").read_text().splitlines()
    assert len(rows) == 1 + len(list((here / "parts").iterdir()))


WATCH = """
from pytorch_lightning import Callback

class Watch(Callback):
    def on_predict_end(self, trainer, pl_module):
        print("maps are kept in memory:", trainer.predict_loop.return_predictions)
"""


def test_a_fit_of_good_images_alone_goes_on_with_predict(product, here, capsys):
    good = ["--data.layout=Folder", "--data.layout.normal=.", f"--data.root={product}/train/good"]
    main(["fit", *good, *LITE, *SMALL])
    assert "next:       patchad predict --data.root NEW_FOLDER --ckpt_path runs/" in capsys.readouterr().out


def test_configs_compose_and_print(here, capsys):
    (here / "fast").mkdir()  # a folder is no config
    layout = ["--data.layout=MagneticTile", "--data.layout.split=by_tile", "--data.root=x"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "learned", "--config", "fast", *layout, "--model.backbone=VGG16", "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["init_args"]["layout"]["init_args"]["split"] == "by_tile"
    assert config["model"]["init_args"]["backbone"]["class_path"] == "patchad.models.VGG16"
    assert config["model"]["init_args"]["learning"]["class_path"] == "patchad.Learning"


def test_null_reaches_the_options_of_a_bank_and_of_learning(here, capsys):
    nulls = ["--model.bank.max_vectors", "null", "--model.learning.cache=null", "--model.tile=null"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=learned", "--data.root=x", *nulls, "--print_config"])
    assert stop.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    bank = {"max_vectors": None, "reduce": "kmeans", "baseline": 0.8, "exact_most": 10000, "seed": 0}
    assert model["bank"]["init_args"] == bank
    assert model["learning"]["init_args"]["cache"] is None and model["tile"] is None
    assert len(model["learning"]["init_args"]["losses"]) == 4


@pytest.mark.parametrize("config", ["default", "learned"])
def test_a_fit_that_is_cut_short_and_has_no_logger_leaves_a_checkpoint_that_is_tested(config, here, product, capsys):
    short = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
    main(["fit", f"--data.root={product}", *SHORT[config], *short])
    assert "patchad test --ckpt_path runs/checkpoints/last.ckpt" in capsys.readouterr().out
    main(["test", "--ckpt_path=runs/checkpoints/last.ckpt", *short, "--trainer.enable_progress_bar=false"])
    assert "detection AUROC" in capsys.readouterr().out
    assert (here / "runs/report.html").is_file()


@pytest.mark.parametrize(("config", "batches"), [("default", "true"), ("learned", "2")])
def test_a_fast_dev_run_passes_through_fit_and_test_and_leaves_no_checkpoint(
    config, batches, run, here, product, capsys
):
    few = [f"--trainer.fast_dev_run={batches}", "--trainer.enable_progress_bar=false"]
    main(["fit", f"--data.root={product}", *SHORT[config], *few])
    assert not list(here.rglob("*.ckpt")) and "checkpoint:" not in capsys.readouterr().out
    main(["test", f"--ckpt_path={checkpoint(run)}", *few])
    assert "detection AUROC" in capsys.readouterr().out


EXTEND = Path(__file__).parent.parent / "docs" / "extend.md"
LEARN = [
    "--config=learned",
    "--model.bank.max_vectors=100",
    "--model.learning.clusters=8",
    *SMALL,
]
FEW = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=2", "--data.pyramids_per_image=32"]
SHORT = {"default": [*LITE, *SMALL], "learned": [*LEARN, *FEW]}
OWN = {
    "a loss appended": ["--model.learning.losses+=mine.Spread", "--model.learning.losses.weight=0.1"],
    "a loss that needs centroids": ["--model.learning.losses+=mine.Compact"],
    "a detector of their own": ["--model=mine.SmallDetector"],
    "a backbone and a layout": [
        "--model.backbone=mine.MobileNetV3",
        "--model.backbone.weights=none",
        "--data.layout=mine.Listed",
        "--data.root=.",
    ],
}
LOGGED = {
    "a loss appended": "train/spread_side_16",
    "a loss that needs centroids": "train/compact_side_16",
    "a detector of their own": "train/size_side_16",
    "a backbone and a layout": "train/position_side_16",
}


@pytest.mark.parametrize("own", OWN)
def test_the_examples_of_docs_extend_run_and_their_checkpoints_reload(own, here, product, capsys):
    (here / "mine.py").write_text("\n\n".join(re.findall(r"```python\n(.*?)```", EXTEND.read_text(), re.DOTALL)))
    lines = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(product.glob("t*/*/*.png"))]
    (here / "images.csv").write_text("\n".join(["path,defect,split", *lines]))
    main(["fit", f"--data.root={product}", *LEARN, *FEW, *OWN[own]])
    assert LOGGED[own] in (here / "runs/version_0/metrics.csv").read_text()
    path = "runs/version_0/checkpoints/last.ckpt"
    assert f"test --ckpt_path {path} --allow mine\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["test", "--ckpt_path", path])
    assert "give --allow mine" in capsys.readouterr().err
    main(["test", "--ckpt_path", path, "--allow", "mine", "--trainer.enable_progress_bar=false"])
    assert "detection AUROC" in capsys.readouterr().out
    settings = torch.load(path, weights_only=True)["hyper_parameters"]
    assert "mine." in str(settings) or own == "a detector of their own"
    loaded = PatchDetector.load_from_checkpoint(path, weights_only=True)
    assert 50 < len(loaded.model.banks["16"]) <= 100


def test_scores_of_files_of_any_name_are_written(tmp_path):
    """Such names come out of archives of other systems."""
    name = os.fsdecode(b"caf\xe9.png")
    write_rows(tmp_path / "scores.csv", [Row(name, score=1.5, p_value=0.25, verdict="normal")])
    assert (tmp_path / "scores.csv").read_bytes().splitlines()[1].startswith(b"caf\xe9.png,,,1.5,0.25,normal,")


def test_an_optimizer_on_the_command_line_is_the_one_that_is_used(here, product):
    options = ["--optimizer=SGD", "--optimizer.lr=0.125"]
    main(["fit", f"--data.root={product}", *LEARN, *FEW, *options])
    state = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert state["param_groups"][0]["lr"] == 0.125


def test_a_fit_that_goes_on_takes_options_and_leaves_a_config_to_begin_anew_by(here, product):
    main(["fit", f"--data.root={product}", *LEARN, *FEW])
    first = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    path = "runs/version_0/checkpoints/last.ckpt"
    options = ["--trainer.max_epochs=3", "--model.learning.learning_rate=0.125", "--model.bank.max_vectors=77"]
    main(["fit", f"--ckpt_path={path}", *FEW, *options])
    again = torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)
    assert again["epoch"] == 3 and len(again["state_dict"]["model.banks.16.vectors"]) == 77
    assert again["optimizer_states"][0]["param_groups"][0]["lr"] == 0.125
    second = yaml.safe_load(Path("runs/version_1/config.yaml").read_text())
    assert second["ckpt_path"] is None
    weights = [one["model"]["init_args"]["backbone"]["init_args"]["weights"] for one in (first, second)]
    assert weights == ["imagenet", "imagenet"]
    assert second["data"]["init_args"]["root"] == first["data"]["init_args"]["root"]


def test_a_checkpoint_of_another_model_is_refused_in_one_line(run, here, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["test", "--ckpt_path", checkpoint(run), "--model.patch_encoder=TextureEncoder"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert re.search(r"does not fit this detector: Missing key.*projection.*; leave out model options", told)


def test_defects_of_any_name_are_tested(run, product, here):
    """Such names come out of archives of other systems."""
    for kind, name in {"good": "good", "hole": os.fsdecode(b"Kratzer \xfc")}.items():
        shutil.copytree(product / "test" / kind, here / "latin/test" / name)
    main(["test", "--ckpt_path", checkpoint(run), "--data.root=latin", "--trainer.enable_progress_bar=false"])
    assert r"detection_auroc_defect_Kratzer \udcfc" in next(Path("runs").rglob("metrics.csv")).read_text()
    assert "Kratzer" in next(Path("runs").rglob("report.html")).read_text()


def broken_image(here: Path, product: Path) -> list[str]:
    shutil.copytree(product, here / "broken")
    (here / "broken/train/good/003.png").write_bytes(b"no image")
    return ["fit", "--data.root=broken", *LITE, *SMALL, "--data.num_workers=1"]


def no_images(here: Path, product: Path) -> list[str]:
    (here / "empty/train/good").mkdir(parents=True)
    return ["fit", "--data.root=empty", *LITE, *SMALL]


def wrong_weights(here: Path, product: Path) -> list[str]:
    torch.save({"a": torch.zeros(1)}, here / "w.pth")
    return ["fit", f"--data.root={product}", "--model.backbone.weights=w.pth", *SMALL]


def other_checkpoint(here: Path, product: Path) -> list[str]:
    torch.save({"state_dict": {}}, here / "other.ckpt")
    return ["test", "--ckpt_path=other.ckpt"]


def no_checkpoint(here: Path, product: Path) -> list[str]:
    (here / "other.ckpt").write_bytes(b"nothing")
    return ["test", "--ckpt_path=other.ckpt"]


def missing_in_config(here: Path, product: Path) -> list[str]:
    (here / "gone.yaml").write_text("ckpt_path: gone.ckpt")
    return ["fit", "--config=gone.yaml", f"--data.root={product}", *LITE, *SMALL]


def runs_among_images(here: Path, product: Path) -> list[str]:
    shutil.copytree(product / "train/good", here / "parts/normal")
    (here / "parts/config.yaml").write_text("# pytorch_lightning==2.6.6\n")
    return ["fit", "--data.root=parts", "--data.layout=Folder", "--data.layout.normal=.", *LITE, *SMALL]


def unwritable(here: Path, product: Path) -> list[str]:
    (here / "file").write_text("x")
    return ["fit", f"--data.root={product}", "--trainer.logger.save_dir=file/runs", *LITE, *SMALL]


MISTAKES = {
    "a broken image": (broken_image, r"cannot read image broken/train/good/003\.png"),
    "a folder without images": (no_images, r"no images below empty/train/good"),
    "weights that do not fit": (wrong_weights, r"weights w\.pth do not fit EfficientNetLite0"),
    "another program's checkpoint": (other_checkpoint, r"--ckpt_path other\.ckpt is not one of patchad's"),
    "no root": (lambda *_: ["fit", *LITE, *SMALL], r"no images: give --data\.root FOLDER"),
    "a missing root": (lambda *_: ["fit", "--data.root=nowhere", *LITE, *SMALL], r"data\.root nowhere does not exist"),
    "a missing checkpoint": (lambda *_: ["test", "--ckpt_path=no.ckpt"], r"--ckpt_path no\.ckpt does not exist"),
    "a missing checkpoint to go on with": (
        lambda _, product: ["fit", f"--data.root={product}", "--ckpt_path=no.ckpt", *LITE, *SMALL],
        r"--ckpt_path no\.ckpt does not exist",
    ),
    "a missing checkpoint in a config": (missing_in_config, r"--ckpt_path gone\.ckpt does not exist"),
    "runs among images": (runs_among_images, r"parts has the config\.yaml of a run of patchad"),
    "a run folder that cannot be": (unwritable, r"Not a directory: .*file/runs"),
    "what is no checkpoint": (
        no_checkpoint,
        r"other\.ckpt is not a checkpoint of patchad's, or is damaged: ",
    ),
    "an unknown config": (lambda *_: ["fit", "--config", "quick"], r"--config quick is neither a file nor one of"),
    "a side too large": (
        lambda _, product: ["fit", f"--data.root={product}", *LITE, *SMALL, "--data.image_size=[32,32]"],
        r"side 64 does not fit an image of 32 x 32 pixels",
    ),
    "an unknown layer": (
        lambda _, product: ["fit", f"--data.root={product}", *LITE, *SMALL, '--model.taps={"16": "conv9"}'],
        r"has no layer conv9; it has stage1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_the_user_can_mend_ends_as_one_line_and_code_2(mistake, here, product, capsys):
    make, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        main(make(here, product))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("patchad: error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])


def with_value(name: str, value: float):
    return lambda checkpoint: checkpoint["state_dict"][name].fill_(value)


CHANGES = {
    "a scale of nan": ("test", with_value("model.scorer.scale", np.nan), r"model\.scorer\.scale holds nan"),
    "infinite scores": ("test", with_value("model.scorer.normals", np.inf), r"model\.scorer\.normals holds nan"),
    "no weights": ("export", lambda checkpoint: checkpoint["state_dict"].clear(), "does not fit this detector: "),
    "no optimizer": ("fit", lambda checkpoint: checkpoint.pop("optimizer_states"), "lacks optimizer_states"),
    "an epoch in words": ("fit", lambda checkpoint: checkpoint.update(epoch="ten"), "lacks epoch, or holds something"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_that_holds_what_it_cannot_is_refused_in_words(name, run, here, capsys):
    """Its checksum fits: another program wrote it."""
    verb, change, words = CHANGES[name]
    content = read_checkpoint(run / "checkpoints/last.ckpt")
    change(content)
    save(content, here / "own.ckpt")
    with pytest.raises(SystemExit) as stop:
        main([verb, "--ckpt_path=own.ckpt"])
    assert stop.value.code == 2
    assert re.search(f"^patchad: error: .*{words}", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("verb", ["fit", "predict"])
def test_a_folder_without_images_makes_no_run_folder(verb, run, here):
    (here / "empty").mkdir()
    options = [*LITE, *SMALL] if verb == "fit" else [f"--ckpt_path={checkpoint(run)}"]
    with pytest.raises(SystemExit):
        main([verb, "--data.root=empty", *options])
    assert not (here / "runs").exists()


def test_a_bug_keeps_its_traceback(here, product):
    body = [
        "from patchad.data import Layout",
        "class Twice(Layout):",
        "    def samples(self, root):",
        "        unknown_name",
    ]
    (here / "broken.py").write_text("\n".join(body))
    with pytest.raises(NameError, match="name 'unknown_name'") as raised:
        main(["fit", f"--data.root={product}", "--data.layout=broken.Twice", *LITE, *SMALL])
    assert raised.traceback[-1].path == here / "broken.py"
