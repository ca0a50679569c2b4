import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import Callback

import patchad.models
from benchmarks import (
    compared,
    few_images,
    large_banks,
    paper,
    portions,
    products,
    scale,
    soak,
    speed,
    tables,
    training,
)
from benchmarks.progress import Progress
from patchad.callbacks import LastCheckpoint
from patchad.cli import main
from patchad.export import export
from patchad.spec import digest
from tests.test_learning import detector, images, same, state, trainer


def test_the_path_to_very_large_banks_finds_the_nearest_in_all_shards(capsys, monkeypatch):
    monkeypatch.setattr(large_banks, "CHUNK", 5_000)
    large_banks.main(vectors=22_000, shards=3, queries=300, probes=64, code="PQ32x4")
    printed = capsys.readouterr().out
    row = [cell.strip() for cell in printed.splitlines()[2].split("|")]
    assert row[1] == "22000"
    assert float(re.match(r"[\d.]+", row[8])[0]) > 60
    excess = float(re.search(r"by ([\d.-]+) %", printed)[1])
    assert 0 <= excess < 5


def test_exact_search_over_chunks_is_exact_search_over_all(monkeypatch):
    import numpy as np

    monkeypatch.setattr(large_banks, "CHUNK", 700)
    vectors = np.concatenate(list(large_banks.chunks(range(3), 2000)))
    asked = next(large_banks.chunks([-1], 20))
    distance, number = large_banks.exactly(asked, 2000)
    expected = np.linalg.norm(asked[:, None] - vectors[None], axis=2)
    assert np.array_equal(number, expected.argmin(1))
    np.testing.assert_allclose(distance, expected.min(1), rtol=1e-3)
    np.testing.assert_allclose(large_banks.distances(asked, number, 2000), expected.min(1), rtol=1e-5)


@pytest.mark.parametrize("number", [-1, 0, 2])
def test_chunks_are_the_same_each_time(number):
    first, second = (next(large_banks.chunks([number], 10_000_000)) for _ in range(2))
    assert (first[:10] == second[:10]).all()


@pytest.mark.parametrize("table", tables.TABLES)
def test_every_row_of_the_tables_is_a_command_that_patchad_understands(table, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["patchad"])
    rows = [part for row in tables.TABLES[table] for part in (*row.get("members", []), row)]
    off = ["--model.backbone.weights=none"]
    given = {(*row.get(verb, []), *(off * ("weights" in row))) for row in rows for verb in ("options", "test")}
    for options in given:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *options, "--data.root=nowhere", "--print_config"])
        assert stop.value.code == 0, options
    assert "class_path" in capsys.readouterr().out


def test_the_hash_of_a_configuration_is_that_of_the_method_and_not_of_the_place(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["patchad"])

    def resolved(*options: str) -> str:
        with pytest.raises(SystemExit):
            main(["fit", *options, "--print_config"])
        return digest(tables.without_place(yaml.safe_load(capsys.readouterr().out)))

    here = resolved("--data.root=a", "--seed_everything=0")
    elsewhere = ["--data.root=b", "--data.num_workers=7", "--trainer.default_root_dir=b", "--trainer.callbacks=null"]
    assert resolved(*elsewhere, "--data.layout=MagneticTile", "--data.seed=3", "--model.bank.seed=3") == here
    assert resolved("--data.root=a", "--model.bank.baseline=0.6") != here
    learned = resolved("--config=learned", "--data.root=a")
    assert resolved("--config=learned", *elsewhere, "--model.bank.seed=3", "--model.learning.seed=3") == learned
    assert resolved("--config=learned", "--data.root=a", "--model.learning.clusters=51") != learned


@pytest.mark.slow
def test_a_row_is_run_once_and_its_weights_may_be_absent(product, tmp_path, monkeypatch, capsys):
    small = ["--data.image_size=[64,64]", "--data.metric_size=[64,64]", "--data.num_workers=0"]
    absent = ["--model.backbone=patchad.models.VGG16", "--model.backbone.weights=imagenet"]
    few = {"options": [*small, "--model.bank.max_vectors=50"]}
    both = {"name": "both", "options": ["--config=ensemble", *small], "members": [few, few]}
    rows = [{"name": "small", **few}, both, {"name": "absent", "options": [*few["options"], *absent]}]
    monkeypatch.setattr("sys.argv", ["patchad"])
    monkeypatch.setitem(tables.TABLES, "tried", rows)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a port on which nothing answers
    arguments = {"table": "tried", "data": {"product": product}, "folder": tmp_path / "runs"}
    tables.main(**arguments)
    first = capsys.readouterr().out
    assert re.search(r"\| small \| product \| \d+\.\d / \d+\.\d \| - \|", first)
    assert re.search(r"\| both \| product \| \d+\.\d / \d+\.\d \| - \|.*\| 0 epochs, 0 steps, not cached \|", first)
    assert "| absent | product | not run: no weights |" in first
    monkeypatch.setattr(tables, "timed", None)  # no command runs again
    monkeypatch.setitem(tables.TABLES, "tried", rows[:2])
    tables.main(**arguments)
    assert capsys.readouterr().out == first[: first.index("| absent")]


LEARNED = (
    *("--config=paper", "--model.backbone=AlexNet", "--model.backbone.weights=none", "--model.learning.clusters=4"),
    *("--model.sides=[32]", "--model.taps={32: relu2}", "--model.scoring_strides={32: 16}"),
    *("--data.image_size=[64,64]", "--data.metric_size=[64,64]", "--data.num_workers=0", "--data.pyramids_per_image=4"),
    *("--trainer.max_epochs=4", "--trainer.accelerator=cpu"),
)
"""A fit by the paper's configuration that takes seconds."""


@pytest.fixture(scope="module")
def stopped(product, tmp_path_factory) -> dict:
    """What measured one row in two portions, and in one."""
    folder, said = tmp_path_factory.mktemp("stopped"), []
    tasks = [({"name": "small", "options": [*LEARNED]}, tables.Images("product", ["--data.root", str(product)]))]
    runs = {name: {"results": folder / f"{name}.csv", "folder": folder / name} for name in ("portions", "whole")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["patchad"])
        for name, minutes in (("portions", 1e-5), ("portions", 10), ("portions", 10), ("whole", 10)):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                portions.measure(tasks, weights=folder, minutes=minutes, validations=4, **runs[name])
            said.append(printed.getvalue())
    return {"said": said, **runs}


@pytest.mark.slow
def test_a_row_that_was_stopped_goes_on_and_ends_as_one_that_was_not(stopped):
    first, second = products.read_rows(stopped["portions"]["results"], portions.Row)
    (whole,) = products.read_rows(stopped["whole"]["results"], portions.Row)
    assert stopped["said"][:3] == ["small, product: 1 of 4 epochs\n", "small, product: 4 of 4 epochs\n", ""]
    assert first.measured and not first.done and second.done and second.best_epoch > 0
    differ = {"fit_seconds", "test_seconds", "milliseconds", "fit_megabytes", "checkpoint_megabytes"}
    same = set(portions.Row._fields) - differ
    assert {name: getattr(second, name) for name in same} == {name: getattr(whole, name) for name in same}
    assert second.detection != first.detection or second.segmentation != first.segmentation  # it has learned
    assert second.fit_seconds > first.fit_seconds and second.fit_megabytes > 100
    (curves,), (expected,) = (list(stopped[name]["folder"].glob("*/curves.csv")) for name in ("portions", "whole"))
    assert curves.read_text() == expected.read_text()
    header, *epochs = curves.read_text().splitlines()
    assert "train/position_accuracy_side_32" in header and "val/detection_auroc" in header
    assert [line.split(",")[0] for line in epochs] == ["1", "2", "3", "4"]


class Copies(Callback):
    """Keeps the checkpoint that is there when an epoch begins."""

    def on_train_epoch_start(self, trainer, pl_module):
        path = Path(trainer.checkpoint_callback.format_checkpoint_name({}))
        if path.is_file():
            shutil.copy(path, path.with_name(f"{trainer.current_epoch}.ckpt"))


def test_a_checkpoint_between_validations_has_no_bank_and_a_fit_goes_on_with_it(product, tmp_path):
    def fit(folder: str, *callbacks: Callback, ckpt_path: Path | None = None) -> dict:
        run = trainer(tmp_path / folder, *callbacks, max_epochs=4, check_val_every_n_epoch=2)
        run.callbacks = [one for one in run.callbacks if type(one) is not LastCheckpoint or not callbacks]
        run.fit(detector(), images(product), ckpt_path=ckpt_path, weights_only=True)
        return state(tmp_path / folder)

    watched = fit("watched", Copies(), Progress(every=0))
    copies = [tmp_path / f"watched/log/checkpoints/{number}.ckpt" for number in (1, 2, 3)]
    banks = [torch.load(path, weights_only=True)["state_dict"]["model.banks.16.vectors"] for path in copies]
    assert [len(bank) for bank in banks] == [0, 500, 0]
    assert [tables.progress(path)[0] for path in (copies[0], copies[2])] == [1, 3]
    assert same(watched, fit("plain"))
    for number in (0, 2):
        assert same(watched, fit(f"resumed {number}", Progress(), ckpt_path=copies[number]))
    stopped = fit("stopped", Progress(every=0, deadline=0))
    assert tables.progress(tmp_path / "stopped/log/checkpoints/last.ckpt")[0] == 1
    assert len(stopped["model.banks.16.vectors"]) == 500


def test_the_papers_rows_run_in_the_order_of_what_matters_most():
    data = {"transistor": Path("a"), "magnetic_tile": Path("b")}
    tasks = [(row["name"], images.name) for row, images in paper.in_turn(data)]
    assert tasks[:4] == [
        ("VGG16", "transistor"),
        ("K = 50", "transistor"),  # the same run
        ("3 sides", "transistor"),  # the same
        ("VGG16 at 128 x 128", "magnetic_tile, published"),
    ]
    assert [name for name, _ in tasks[4:7]] == ["from scratch", "VGG16 without fine-tuning", "AlexNet"]
    assert [name for name, _ in tasks[7:10]] == ["K = 10", "K = 30", "K = 100"]
    assert {"MobileNetV2", "VGG19", "ResNet18, approximated", "ResNet50"} < {name for name, _ in tasks[10:-1]}
    assert tasks[-1] == ("VGG16 at 128 x 128", "magnetic_tile, by_tile")


def test_other_backbones_are_read_at_the_strides_of_the_papers():
    for row in tables.TABLES["2"]:
        options = dict(zip(row["options"][::2], row["options"][1::2], strict=True))
        if "--model.taps" in options:
            backbone = getattr(patchad.models, options["--model.backbone"])(weights="none")
            assert yaml.safe_load(options["--model.taps"]) == tables.paper_taps(backbone)


def test_a_row_without_weights_or_time_says_so_and_keeps_no_other_from_running(tmp_path, monkeypatch, capsys):
    rows = [
        {"name": "absent", "options": ["--config=paper"], "weights": "none.pth", "download": False, "turn": 1},
        {"name": "mistaken", "options": ["--data.image_size=nothing"], "turn": 2},
        {"name": "later", "turn": 3},
    ]
    named = {"only": ["transistor"], "paper": "98.1 / 98.1"}
    monkeypatch.setattr("sys.argv", ["patchad"])
    monkeypatch.setattr(paper, "TABLES", {"2": [{**named, **row} for row in rows]})
    monkeypatch.setattr(paper, "NUMBERS", ("2",))
    place = {"weights": tmp_path, "folder": tmp_path / "runs", "results": tmp_path / "paper.csv"}
    for _ in range(2):  # the second time nothing new is to be noted
        portions.measure(paper.in_turn({"transistor": tmp_path})[:2], minutes=1, **place)
    assert len(products.read_rows(place["results"], portions.Row)) == 2
    paper.main(data={"transistor": tmp_path}, **place)
    absent, mistaken, later = (line for line in capsys.readouterr().out.splitlines() if "| transistor |" in line)
    assert absent.startswith("| absent | transistor | not run: no weights | - | - | 98.1 / 98.1 |")
    assert mistaken.startswith("| mistaken | transistor | failed: patchad fit refuses")
    assert later.startswith("| later | transistor | not run: time |")


def test_systems_are_compared_set_by_set_and_beside_what_was_published(capsys, tmp_path):
    sets = {"transistor": Path("a"), "magnetic_tile": Path("b")}
    tasks = [(images.name, row["name"]) for images, row in compared.by_set(compared.COMPARED["systems"], sets)]
    assert [name for name, _ in tasks] == [
        *6 * ["transistor"],
        *7 * ["magnetic_tile, published"],
        *7 * ["magnetic_tile, by_tile"],
    ]
    row = portions.Row("2026-12-01", "1234567", "one", "PaDiM", "grid", "", "0 of 0 epochs", 85.0, 91.0)
    lines = compared.table([row, row._replace(state=portions.NO_TIME)])
    assert lines[2].startswith("| PaDiM | 85.0 / 91.0 | nan | 0 of 0 |") and "| PaDiM | not run: time |" in lines[3]
    assert sum("published" in line for line in lines) == 3 and "85.7 / 91.8" in lines[4]
    products.append(tmp_path / "compared.csv", row._replace(name="Patch SVDD"))
    compared.main(results=tmp_path / "compared.csv", folder=tmp_path, systems=("Patch SVDD",))
    printed = capsys.readouterr().out
    assert "grid (not comparable:" in printed and "| Patch SVDD | 85.0 / 91.0 |" in printed
    assert all(it["source"].startswith("https://") and it["protocol"] for it in compared.published())


@pytest.mark.slow
def test_a_system_is_measured_with_its_memory_and_its_checkpoint(product, tmp_path, monkeypatch, capsys):
    small = {"systems": [{"name": "ours"}], "sets": {"part": product.name}, "comparable": {}, "published": []}
    options = ("--data.image_size=[64,64]", "--data.num_workers=0", "--model.bank.max_vectors=50")
    monkeypatch.setattr("sys.argv", ["patchad"])
    monkeypatch.setattr(compared, "COMPARED", small)
    place = {"data": product.parent, "folder": tmp_path / "runs", "results": tmp_path / "compared.csv"}
    compared.main(minutes=10, options=options, **place)
    (row,) = products.read_rows(place["results"], portions.Row)
    assert row.state == "0 of 0 epochs" and row.done and row.best_epoch == 0
    (checkpoint,) = (tmp_path / "runs").glob("*/checkpoints/last.ckpt")
    assert row.checkpoint_megabytes == pytest.approx(checkpoint.stat().st_size / 1e6, abs=0.01)
    assert 100 < row.fit_megabytes < 20_000 and 0 < row.detection <= 100 and 0 < row.pro <= 100
    printed = capsys.readouterr().out
    monkeypatch.setattr(tables, "timed", None)
    compared.main(minutes=10, options=options, **place)
    assert capsys.readouterr().out == printed.removeprefix("ours, part: 0 of 0 epochs\n")


def test_the_peak_memory_of_a_command_is_its_own():
    held = b"x" * 500_000_000  # what is held here does not count
    program = "held = b'x' * 200_000_000"
    command = [sys.executable, "-c", tables.PEAK, sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert 200 < int(ended.stderr) * 1024 / 1e6 < 300 < len(held) / 1e6


def test_the_papers_protocol_takes_the_epoch_that_is_best_on_test(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,train/loss,val/detection_auroc,val/segmentation_auroc\n0,1.5,,\n0,,0.5,0.75\n1,1.0,,\n1,,0.75,0.75\n2,,0.7,0.7\n"
    )
    assert tables.best_epoch(tmp_path) == {"detection_auroc": 75, "segmentation_auroc": 75, "epoch": 2}
    assert tables.measured(tmp_path / "metrics.csv", "train/")[0] == {"loss": 150}


def test_the_size_and_depth_of_a_backbone_are_those_that_are_known():
    _, _, *rows = tables.model_lines([{"name": "AlexNet", "paper": "8"}, {"name": "VGG16"}], repeats=1)
    assert [row.split(" | ")[:3] for row in rows] == [["| AlexNet", "5", "2.47 M"], ["| VGG16", "13", "14.71 M"]]
    assert rows[0].endswith(" | 8 |") and rows[1].endswith(" | - |")


@pytest.fixture(scope="module")
def measured(product, tmp_path_factory) -> dict:
    """What measured a small detector on a small development set, once it had failed."""
    folder = tmp_path_factory.mktemp("measured")
    options = ("--data.image_size=[64,64]", "--data.num_workers=0", "--model.bank.max_vectors=50")
    place = {"data": product.parent, "folder": folder / "runs", "results": folder / "results.csv"}
    arguments = {"candidate": "small", "half": "confirming", "options": options, **place}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr("sys.argv", ["patchad"])
        patch.setattr(products, "HALVES", {"confirming": {"part": product.name}})
        with pytest.raises(RuntimeError, match="image_size"):
            products.main(**{**arguments, "options": ("--data.image_size=nothing",)})
        products.main(**arguments)
    return {"arguments": arguments, "printed": printed.getvalue()}


def test_a_candidate_is_measured_once_and_printed_from_its_file_afterwards(
    measured, product, tmp_path, monkeypatch, capsys
):
    arguments, printed = measured["arguments"], measured["printed"].splitlines()
    monkeypatch.setattr("sys.argv", ["patchad"])
    monkeypatch.setattr(products, "HALVES", {"confirming": {"part": product.name}})
    (result,) = products.ended(arguments["results"])
    assert (result.product, result.seed, result.normals) == ("part", 0, 4)
    metrics = next((arguments["folder"]).glob("*-test-*/metrics.csv"))
    figures = tables.measured(metrics, "test/")[-1]
    assert result.detection == pytest.approx(figures["detection_auroc"], abs=0.01)
    assert result.false_alarms == pytest.approx(figures["false_positive_rate"] * 4 / 100)
    monkeypatch.setattr(products, "measure", None)
    products.main(**arguments)
    assert capsys.readouterr().out.splitlines() == printed[1:]  # the line of the run itself comes first
    monkeypatch.setattr(products, "RESULTS", {"choosing": tmp_path / "none.csv", "confirming": arguments["results"]})
    products.main(candidate="small")
    assert capsys.readouterr().out.splitlines() == printed[1:]
    products.main(candidate="small", products=("another",))
    assert capsys.readouterr().out.splitlines() == printed[1:3]


def test_few_images_are_the_first_ones_and_all_of_the_test(product, tmp_path):
    folders = ("train", "test", "ground_truth")
    for _ in range(2):  # the second time it is there
        place = few_images.first_images(product, tmp_path / "few", 5)
    linked, every = (
        sorted(path.relative_to(root) for folder in folders for path in (root / folder).glob("**/*.png"))
        for root in (place, product)
    )
    normals = [path for path in every if path.parts[0] == "train"]
    assert len(normals) == 12 and linked == sorted({*every} - {*normals[5:]})


def test_a_run_that_fails_is_written_down_and_tried_again(measured):
    first, second = products.read(measured["arguments"]["results"])
    assert first.configuration == "failed" and first.detection != first.detection
    assert products.ended(measured["arguments"]["results"]) == [second]
    assert "nan" not in measured["printed"]


def row(**different) -> products.Row:
    names = {"date": "", "commit": "", "candidate": "a", "configuration": "1", "product": "a", "seed": 0}
    counts = {"normals": 10, "false_alarms": 0, "milliseconds": 1.0, "fit_seconds": 1.0, "test_seconds": 1.0}
    rates = dict.fromkeys(products.AVERAGED, 50.0)
    return products.Row(**{**names, **counts, **rates, **different})


def test_the_confirming_half_refuses_another_configuration_under_a_name_that_it_knows():
    products.refuse_another(row(seed=1), [row(), row(candidate="b", configuration="2")])
    with pytest.raises(SystemExit, match="a was confirmed as 1; name this one otherwise"):
        products.refuse_another(row(seed=1, configuration="2"), [row()])


def test_sets_have_means_over_seeds_and_seeds_have_means_over_sets_and_their_false_alarms_together():
    rows = [
        row(detection=90.0, false_alarms=1),
        row(detection=80.0, seed=1),
        row(product="b", detection=65.0, normals=20, false_alarms=3),
    ]
    *_, of_set, first, second = products.table(rows)
    assert of_set.startswith("| a | mean of 2 | 85.0 / 50.0 |")
    assert first.startswith("| mean of 2 sets | 0 | 77.5 / 50.0 |")
    assert "4 of 30: 13.3 % (3.8 to 30.7)" in first  # Clopper and Pearson
    assert second.startswith("| mean of 1 sets | 1 | 80.0 / 50.0 |") and "0 of 10: 0.0 % (0.0 to 30.8)" in second


def test_ratios_are_of_the_fastest_form_with_right_scores_over_the_fastest_of_each_peer(capsys):
    exact, other = speed.EXACT
    times = {("ours", speed.EAGER): 1.0, ("ours", exact): 8.0, ("ours", other): 6.0, ("ours", speed.CHOSEN): 2.0}
    times |= {("PaDiM", exact): 9.0, ("PaDiM", speed.CHOSEN): 4.0, ("PatchCore", speed.EAGER): 60.0}
    runs = [{form: [value, value, 1e3] for form, value in times.items()}, {form: [1.0] for form in times}]
    both = {"PaDiM": runs, "PatchCore": runs[:1]}
    speed.print_ratios({(name, (2, 8)): found for name, found in both.items()}, ["ours"])
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| ours | 2 | 8 | 1.50, 1.00 (")
    assert row.endswith(f" | 0.10 ({other} over {speed.EAGER}) |")
    speed.print_times(runs, (2, 8))
    assert f"| PaDiM | {exact} | 9.0, 1.0 | 900.9, 1.0 | 888.9, 8000.0 |" in capsys.readouterr().out


def test_what_is_timed_holds_banks_as_a_fit_leaves_them(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "FITTED", 64)
    monkeypatch.setattr(speed, "SHOWN", 4)
    made = speed.fitted((128, 128))
    counts = {side: 64 * rows**2 for side, rows in {64: 5, 32: 7, 16: 15}.items()}
    assert {side: len(made.bank(side)) for side in made.sides} == counts
    assert [bool(len(made.bank(side).lists)) for side in made.sides] == [False, False, True]
    export(made, tmp_path / "made.patchad")
    images = torch.rand(2, 3, 128, 128)
    scores = made(images, speed.content(images)).score
    found = patchad.load(tmp_path / "made.patchad").score(list(images.numpy()))
    assert [one.score for one in found] == pytest.approx(scores.tolist(), rel=1e-4)
    assert min(scores) > 0


def test_what_a_process_holds_is_counted_with_what_its_children_hold():
    before, size = soak.usage(os.getpid()), 200_000_000
    program = f"held = b'x' * {size}; files = [open('/dev/null') for _ in range(9)]; print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with open(os.devnull), subprocess.Popen([sys.executable, "-c", program], **pipes) as child:
        child.stdout.readline()
        after = soak.usage(os.getpid())
        child.communicate(b"\n")
    assert after.handles == before.handles + 1 + 2 + 3 + 9  # ours, ends of pipes, the child's streams and files
    assert after.threads == before.threads + 1
    assert after.megabytes > before.megabytes + size / 2**20


@pytest.mark.parametrize(
    ("last", "grew"),
    [
        ((1024.9, 9, 9), False),
        ((1025.1, 9, 9), True),
        ((1000, 10, 9), True),
        ((1000, 9, 10), True),
        ((900, 8, 8), False),
    ],
)
def test_what_the_last_fifth_holds_more_than_the_second_has_grown(last, grew):
    first, usual = soak.Usage(2000, 20, 20), soak.Usage(1000, 9, 9)
    assert soak.has_grown([first, first, *7 * [usual], soak.Usage(*last)]) == grew


@pytest.mark.data
def test_the_halves_share_no_set_and_are_all_there_is(shared):
    sets = [set(half.values()) for half in products.HALVES.values()]
    assert len(sets) == 2 and not set.intersection(*sets)
    there = {path for path in ("magnetic_tile",) if (shared / "data" / path).is_dir()}
    for folder in ("mvtec_ad_256", "development"):
        there |= {f"{folder}/{path.name}" for path in (shared / "data" / folder).iterdir()}
    assert set.union(*sets) == there


def cells(line: str) -> list[float]:
    return [float(re.match(r"[\d.]+", cell.strip())[0]) for cell in line.strip("| \n").split("|")]


def test_a_bank_is_divided_searched_and_exported_to_a_file_of_its_size(capsys):
    small = [(scale.bank(count, repeats=1, size=64), cells(capsys.readouterr().out))[1] for count in (300, 11_000)]
    assert [row[0] for row in small] == [300, 11_000]
    assert small[0][1] == 0 < small[1][1]  # few vectors are searched whole
    per_vector = 1e6 * (small[1][6] - small[0][6]) / 10_700
    assert 5 < per_vector / (112 + 112 + 40) < 7  # 4 bytes of each number, and 1 or 2 more


@pytest.mark.slow
def test_many_images_and_large_ones_are_fitted_with_their_memory(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ("--data.num_workers=0", "--model.bank.max_vectors=500")
    scale.images(counts=(6,), size=96, options=options)
    scale.pixels(sizes=(96,), count=8, options=options)
    rows = [line for line in capsys.readouterr().out.splitlines() if line[2:3].isdigit()]
    assert cells(rows[0])[0] == 6 and 100 < cells(rows[0])[2] < 20_000
    assert cells(rows[1])[:2] == [96, 8]
    fit, each = cells(rows[1])[2], cells(rows[1])[4]
    assert each == pytest.approx(fit / (8 * 96**2 / 1e6), rel=0.5 / fit + 0.01)  # seconds are printed whole


@pytest.mark.slow
def test_a_fit_is_timed_with_its_processes(product, capsys):
    options = (
        "--data.image_size=64",
        "--data.num_workers=1",
        "--model.bank.max_vectors=500",
        "--trainer.accelerator=cpu",
    )
    training.main(data=product, methods=("default",), rounds=1, options=options)
    seconds, processors, megabytes, over = cells(capsys.readouterr().out.splitlines()[-1].partition("default |")[2])
    assert 1 < seconds and 1 < processors < seconds * (os.cpu_count() or 1) and megabytes > 100 and over == 1
