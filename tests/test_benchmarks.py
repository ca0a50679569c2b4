import contextlib
import io
import os
import re
import subprocess
import sys

import pytest
import yaml

from benchmarks import few_images, large_banks, portions, products, soak, tables
from patchad.cli import main
from patchad.spec import digest


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


def test_the_papers_protocol_takes_the_epoch_that_is_best_on_test(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,train/loss,val/detection_auroc,val/segmentation_auroc\n0,1.5,,\n0,,0.5,0.75\n1,1.0,,\n1,,0.75,0.75\n2,,0.7,0.7\n"
    )
    assert tables.best_epoch(tmp_path) == {"detection_auroc": 75, "segmentation_auroc": 75, "epoch": 2}
    assert tables.measured(tmp_path / "metrics.csv", "train/")[0] == {"loss": 150}


def test_the_size_and_depth_of_a_backbone_are_those_that_are_known(capsys):
    tables.print_models([{"name": "AlexNet", "paper": "8"}, {"name": "VGG16"}], repeats=1)
    rows = capsys.readouterr().out.splitlines()[2:]
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
