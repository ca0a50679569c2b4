"""Several products: each command once for each, as if it had been run alone, and a table of all."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_cli import LITE, SMALL, commands_in, read_rows
from test_line import until

from patchad import line
from patchad.folders import images_below
from patchad.products import main
from patchad.runtime import load

QUIET = "--trainer.enable_progress_bar=false"
NAMES = ("flange", "my cap")
RUN = "runs/version_0"


class Ran(NamedTuple):
    """What a command left: its exit code, what it printed, and what it printed beside that."""

    code: int
    out: str
    told: str


def ran(run: Callable[[list[str]], None], *arguments: object) -> Ran:
    """Runs a command in the current folder."""
    out, told, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(told):
        try:
            run([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Ran(code, out.getvalue(), told.getvalue())


@pytest.fixture(scope="module")
def factory(product, padded_product, tmp_path_factory) -> Iterator[tuple[Path, Mapping[str, Ran]]]:
    """A folder of two products, one without images and one that is none; commands that were run there, by their verbs.

    Theirs is the current folder.
    """
    folder = tmp_path_factory.mktemp("factory")
    for name, source in zip(NAMES, (product, padded_product), strict=True):
        shutil.copytree(source, folder / "root" / name)
    (folder / "root/notes").mkdir()
    (folder / "root/empty/train/good").mkdir(parents=True)
    (folder / "root.yaml").write_text("data:\n  class_path: patchad.PyramidDataModule\n  init_args: {root: root}\n")
    with commands_in(folder):
        yield (
            folder,
            {
                "fit": ran(main, "fit", "--data.root=root", *LITE, *SMALL),
                "test": ran(main, "test", "--ckpt_path", RUN, QUIET),
                "export": ran(main, "export", f"--ckpt_path={RUN}", "--output", "models"),
            },
        )


@pytest.fixture(scope="module")
def arrived(factory) -> Path:
    """New images of both products, of one that is not known, and one in no folder."""
    folder = factory[0] / "new"
    for name, source in {"flange": "flange", "my cap": "my cap", "nut": "flange"}.items():
        shutil.copytree(factory[0] / "root" / source / "test/good", folder / name)
    shutil.copy(folder / "flange/000.png", folder / "lost.png")
    return folder


def without_origin(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows without what two fits or two moments differ in."""
    return [{name: value for name, value in row.items() if name not in ("model", "time")} for row in rows]


def test_each_product_is_fitted_and_one_that_fails_stops_no_other(factory):
    folder, commands = factory
    code, out, told = commands["fit"]
    assert code == 2
    assert [path.parts[-3] for path in sorted(folder.glob("runs/*/*/checkpoints/last.ckpt"))] == list(NAMES)
    assert "left out of root, for they are no products: they have no layout that is known: notes\n" in told
    assert told.splitlines()[-1].startswith("failed: empty: no images below root/empty/train/good")
    assert re.findall(r"^product (\d of 3: .*)$", out, re.M) == ["1 of 3: empty", "2 of 3: flange", "3 of 3: my cap"]
    for name, count in zip(NAMES, (12, 8), strict=True):
        detector = torch.load(folder / RUN / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        normals = detector["model.scorer.normals"]
        promised = 100 / (count + 1)
        threshold = f"{normals.max().item():.4g}"
        row = rf"{name} +{count} +{threshold} +at most {promised:.1f} % +{RUN}/{name}/checkpoints/last.ckpt"
        assert re.search(f"^{row} *$", out, re.M)
    assert out.splitlines()[-1] == f"next: patchad test --ckpt_path {RUN}"


def test_what_is_left_of_a_product_is_bit_for_bit_that_of_a_command_of_its_own(factory):
    """Of the last one, after others in the same process; by itself in a new process."""
    name, alone = NAMES[-1], [sys.executable, "-m", "patchad"]
    version = "--trainer.logger.version=alone"
    fit = ["fit", f"--data.root=root/{name}", *LITE, *SMALL, version]
    test = ["test", "--ckpt_path=runs/alone/checkpoints/last.ckpt", QUIET, "--trainer.logger.version=tested"]
    for arguments in (fit, test):
        subprocess.run([*alone, *arguments], check=True, capture_output=True)
    states = [
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in (f"{RUN}/{name}", "runs/alone")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    runs = [Path("runs/version_1") / name, Path("runs/tested")]
    assert (runs[0] / "metrics.csv").read_bytes() == (runs[1] / "metrics.csv").read_bytes()
    first, second = (without_origin(read_rows(run / "scores.csv")) for run in runs)
    assert first == second and len(first) == 10


def test_a_test_ends_with_a_table_of_all_products(factory):
    folder, commands = factory
    code, out, _ = commands["test"]
    assert code == 0
    assert all((folder / "runs/version_1" / name / "report.html").is_file() for name in NAMES)
    with Path("runs/version_1/products.csv").open(newline="") as file:
        rows = {row.pop("product"): row for row in csv.DictReader(file)}
    assert list(rows) == [*NAMES, "all"]
    for name in NAMES:
        [metrics] = read_rows(folder / "runs/version_1" / name / "metrics.csv")
        for figure in ("detection_auroc", "segmentation_auroc", "pro"):
            assert rows[name][figure] == metrics[f"test/{figure}"]
        scores = read_rows(folder / "runs/version_1" / name / "scores.csv")
        for label, wrong, total in (("normal", "false_alarms", "normals"), ("anomalous", "missed", "defects")):
            mistaken = [row["correct"] == "wrong" for row in scores if row["label"] == label]
            assert (int(rows[name][wrong]), int(rows[name][total])) == (sum(mistaken), len(mistaken))
    for figure, value in rows["all"].items():
        values = [float(rows[name][figure]) for name in NAMES]
        counted = figure in ("false_alarms", "normals", "missed", "defects")
        assert float(value) == pytest.approx(sum(values) if counted else np.mean(values))
    last = rows["all"]
    alarms, missed = f"{last['false_alarms']} of 8", f"{last['missed']} of 13"
    shares = "".join(rf" +{100 * float(last[name]):.1f} %" for name in ("detection_auroc", "segmentation_auroc", "pro"))
    assert re.search(rf"^all{shares} +{alarms} +{missed} *$", out, re.M)
    assert out.splitlines()[-2:] == [
        "reports: runs/version_1/PRODUCT/report.html",
        "figures: runs/version_1/products.csv",
    ]


def test_new_images_are_predicted_by_the_product_of_their_folder(factory, arrived):
    code, out, told = ran(main, "predict", "--ckpt_path", RUN, "--data.root", "new", QUIET, "--maps=none")
    assert code == 0
    assert "left out of new, for they are of no product that was fitted: nut\n" in told
    assert "left out of new, for they lie in no folder of a product: lost.png\n" in told
    run = Path(re.findall("^predictions: (.*)/PRODUCT/predictions$", out, re.M)[0])
    for name in NAMES:
        found = {Path(row["path"]).name: row["score"] for row in read_rows(run / name / "predictions/scores.csv")}
        tested = read_rows(Path("runs/version_1") / name / "scores.csv")
        known = {Path(row["path"]).name: row["score"] for row in tested if row["defect"] == "good"}
        assert found.keys() == known.keys()
        assert [float(found[file]) for file in known] == pytest.approx([float(known[file]) for file in known], rel=1e-4)
    assert len(re.findall(r"^(?:flange|my cap)(?: +\d){4} *$", out, re.M)) == 2


def test_a_product_that_is_named_takes_a_folder_of_it_alone(factory, arrived):
    options = ["--data.root=new/nut", QUIET, "--maps=none", "--trainer.logger.version=named"]
    assert ran(main, "predict", "--ckpt_path", RUN, "--product", "my cap", *options).code == 0
    assert [path.parts[-3] for path in Path("runs/named").rglob("scores.csv")] == ["my cap"]
    assert len(read_rows(Path("runs/named/my cap/predictions/scores.csv"))) == 4


def test_a_list_of_products_is_fitted_into_a_folder_that_is_named(factory):
    few = ["--trainer.limit_val_batches=0", "--trainer.logger.version", "some", "--product", "[empty, flange]"]
    code, out, told = ran(main, "fit", "--data.root", "root", *few, *LITE, *SMALL)
    assert code == 2 and "failed: empty" in told
    assert [path.name for path in Path("runs/some").glob("*/checkpoints")] == ["checkpoints"]
    assert Path("runs/some/flange/checkpoints/last.ckpt").is_file()
    assert out.splitlines()[-1] == "next: patchad test --ckpt_path runs/some"


def test_images_are_scored_by_the_file_of_their_folder_as_by_that_file_alone(factory, arrived):
    assert factory[1]["export"].code == 0
    assert sorted(path.name for path in Path("models").iterdir()) == [f"{name}.patchad" for name in NAMES]
    code, _, told = ran(line.main, "score", "models", "new", "--output", "all.csv", "--target_fpr", "0.01")
    assert code == 1
    assert "new/nut is of no product: there is no nut.patchad\n" in told
    assert "my cap: 8 normal images cannot promise a false-positive rate of 0.01, only 0.111\n" in told
    rows = without_origin(read_rows(Path("all.csv")))
    assert [row["path"] for row in rows] == list(map(str, images_below(arrived.relative_to(factory[0]))))
    reasons = {row["path"]: row["reason"] for row in rows if row["verdict"] == "unreadable"}
    assert reasons["new/lost.png"] == "new/lost.png lies in no folder of a product" and len(reasons) == 5
    for name in NAMES:
        alone = ["score", f"models/{name}.patchad", f"new/{name}", "--output", "alone.csv", "--target_fpr=0.01"]
        assert ran(line.main, *alone).code == 0
        assert without_origin(read_rows(Path("alone.csv"))) == [
            row for row in rows if row["path"].startswith(f"new/{name}/")
        ]


def test_a_product_that_is_named_scores_its_folder_or_all_images(factory, arrived):
    detector = load("models/my cap.patchad")
    for images, paths in {"new": "new/my cap", "new/nut": "new/nut", "new/lost.png": "new/lost.png"}.items():
        assert ran(line.main, "score", "models", images, "--product=my cap", "--output=named.csv").code == 0
        rows = read_rows(Path("named.csv"))
        assert all(row["path"].startswith(paths) for row in rows)
        assert float(rows[0]["score"]) == pytest.approx(detector(rows[0]["path"]).score, rel=1e-5)


def test_a_folder_of_several_products_that_fills_is_followed(factory, arrived):
    command = [sys.executable, "-m", "patchad", "score", "models", "new", "--watch", "--output", "watched.csv"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: Path("watched.csv").exists() and len(read_rows(Path("watched.csv"))) == 13)
        process.send_signal(signal.SIGINT)
        told = process.communicate()[1]
    assert process.returncode == 0 and "13 images: " in told and "5 unreadable" in told
    rows = without_origin(read_rows(Path("watched.csv")))
    assert ran(line.main, "score", "models", "new", "--output", "once.csv").code == 1
    assert sorted(rows, key=str) == sorted(without_origin(read_rows(Path("once.csv"))), key=str)


FITTED = f"{RUN}/flange/checkpoints/last.ckpt, {RUN}/my cap/checkpoints/last.ckpt"
OF_ONE = "takes the checkpoint of one product; give --ckpt_path one of"
MISTAKES = {
    "fit --data.root=root --product=nut": "--product nut is none of empty, flange, my cap",
    f"test --ckpt_path={RUN} --product=nut": "--product nut is none of flange, my cap",
    "fit --config=root.yaml --product nut": "--product nut is none of empty, flange, my cap",
    "fit --config=root.yaml --data.layout=MVTecAD": "data.root root has no folder train/good; it has empty, flange",
    "fit --data.root=root/flange --product=flange": "--product flange: there are no several products",
    "fit --data.root=root/notes": "the layout of root/notes is not known: it has no folder",
    f"predict --ckpt_path={RUN} --data.root=root/notes": "data.root root/notes has no folder of flange, my cap; it has",
    f"predict --ckpt_path={RUN} --data.root=gone": "data.root gone does not exist",
    f"threshold --ckpt_path={RUN} --target_fpr=0.1 --output=x": f"patchad threshold {OF_ONE} {FITTED}",
    f"fit --ckpt_path={RUN}": f"patchad fit {OF_ONE} {FITTED}",
    "fit --data.root=root --trainer.logger=false": "--trainer.logger false: the run folders of several products are",
    "test --ckpt_path=root": "--ckpt_path root does not exist",
    "score models new --product=nut": "--product nut is none of flange, my cap",
    "score models new/lost.png": "new/lost.png names no product; give --product, one of flange, my cap",
    "score models -": "- names no product; give --product, one of flange, my cap",
    "score models/flange.patchad new --product=flange": "--product flange chooses a file of a folder, and",
    "score root new": "root is a folder without a file NAME.patchad",
    "benchmark models": "patchad benchmark takes the file of one product; give one of models/flange.patchad, models/my",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_no_run_folder(mistake, factory, arrived):
    runs = set(os.listdir("runs"))
    arguments = mistake.split()
    code, out, told = ran(line.main if arguments[0] in ("score", "benchmark") else main, *arguments)
    errors = [text for text in told.splitlines() if text.startswith("patchad: error: ")]
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0].startswith(f"patchad: error: {MISTAKES[mistake]}")
    assert set(os.listdir("runs")) == runs
