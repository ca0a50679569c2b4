"""The machine on the line: real processes that see NumPy, Pillow and ONNX Runtime, and no other library."""

import csv
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import betabinom
from test_packaging import built
from test_runtime import KEPT

import patchad
from patchad.arrivals import STILL, Arrivals
from patchad.drawing import FOUND
from patchad.drift import BEGINS, ENDS, Drift, critical_count
from patchad.errors import PatchadError
from patchad.folders import images_below
from patchad.journal import FORMATS, paths_so_far
from patchad.line import LONGEST_SIDE, main, overlay
from patchad.results import Row

NEEDED = ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime")
"""Folders of the libraries that patchad-runtime needs."""


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> list[str]:
    """The command of an environment into which patchad-runtime and what it needs are installed, and nothing else."""
    folder = tmp_path_factory.mktemp("line")
    site = folder / "site"
    zipfile.ZipFile(built(folder, "./runtime")).extractall(site)
    for name in NEEDED:
        installed = Path(sysconfig.get_path("purelib")) / name
        if installed.is_dir():
            (site / name).symlink_to(installed)
    return [sys.executable, "-S", "-c", f"import sys; sys.path.append({str(site)!r}); {RUN}"]


RUN = "from patchad.__main__ import main; main()"


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of four images, one of which cannot be read, with a mask beside the first."""
    folder, generator = tmp_path / "images", np.random.default_rng(0)
    (folder / "inner").mkdir(parents=True)
    for name, size in {"b.png": (48, 40), "a.png": (60, 44), "inner/c.jpg": (30, 90), "b_mask.png": (48, 40)}.items():
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "d.png").write_bytes(b"no image")
    return folder


def run(line: list[str], *arguments: object, listed: str = "", **variables: str) -> subprocess.CompletedProcess:
    """One command of that environment, from a folder where nothing is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [*line, *map(str, arguments)]
    return subprocess.run(command, input=listed, capture_output=True, text=True, env=environment)


def rows_of(text: str) -> list[dict[str, str]]:
    """Rows of CSV, without the time."""
    return [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(io.StringIO(text))]


def test_a_folder_is_scored_as_load_scores_it_in_the_order_of_predict(line, images):
    finished = run(line, "score", KEPT, images)
    assert finished.returncode == 1
    rows, detector = rows_of(finished.stdout), patchad.load(KEPT)
    assert [row["path"] for row in rows] == [str(path) for path in images_below(images)]
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.png", "d.png", "c.jpg"]
    broken = rows.pop(2)
    assert broken["verdict"] == "unreadable" and "cannot read image" in broken["reason"] and not broken["score"]
    for row in rows:
        scored = detector(row["path"])
        assert float(row["score"]) == pytest.approx(scored.score, rel=1e-5)
        assert (row["verdict"], float(row["p_value"])) == (scored.verdict, scored.p_value)
        assert float(row["threshold"]) == detector.threshold
    counts = {kind: sum(row["verdict"] == kind for row in rows) for kind in ("anomalous", "normal")}
    told = rf"4 images: {counts['anomalous']} anomalous, 0 review, {counts['normal']} normal, 1 unreadable; [\d.]+ s"
    assert re.fullmatch(rf"{told} by onnxruntime\n", finished.stderr)


def test_paths_from_standard_input_as_json_say_what_a_folder_as_csv_says(line, images, tmp_path):
    output = tmp_path / "new" / "rows.csv"
    assert run(line, "score", KEPT, images, "--output", output).returncode == 1
    paths = [str(path) for path in images_below(images)]
    finished = run(line, "score", KEPT, "-", "--format", "jsonl", listed="\n".join(["", *paths]))
    assert finished.returncode == 1
    found = [Row(**json.loads(text)) for text in finished.stdout.splitlines()]
    with output.open(newline="") as file:
        written = rows_of(file.read())
    told = [{name: "" if value is None else str(value) for name, value in row._asdict().items()} for row in found]
    assert [{name: value for name, value in row.items() if name != "time"} for row in told] == written
    assert [path.name for path in output.parent.iterdir()] == ["rows.csv"]


def test_one_image_gets_an_overlay_and_limits_that_are_asked_for(line, images, tmp_path):
    limits = ("--target_fpr", "0.34", "--review_fpr", "0.67")
    finished = run(line, "score", KEPT, images / "a.png", "--overlays", tmp_path / "maps", *limits)
    assert finished.returncode == 0, finished.stderr
    detector = patchad.load(KEPT)
    detector.set_target_fpr(0.34, 0.67)
    [row] = rows_of(finished.stdout)
    assert row["verdict"] == detector(images / "a.png").verdict
    assert float(row["threshold"]) == detector.threshold == max(detector.normals)
    with Image.open(tmp_path / "maps" / "a.png.overlay.png") as drawn:
        assert drawn.size == (44, 60)
    few = run(line, "score", KEPT, images / "a.png", "--target_fpr", "0.05", "--drift", "9")
    assert few.returncode == 0
    assert "2 normal images cannot promise a false-positive rate of 0.05, only 0.333\n" in few.stderr
    assert "drift cannot be told: 2 normal images of the fit are too few for p-values of 0.05\n" in few.stderr


def test_an_overlay_is_small_enough_to_look_at_and_loses_no_pixel_of_a_region():
    region = np.zeros((700, 3000), bool)
    region[601, 2001] = True
    drawn = np.asarray(overlay(np.zeros((700, 3000), np.float32), region))
    assert drawn.shape == (239, LONGEST_SIDE, 3)
    rows, columns = (drawn == FOUND).all(axis=-1).nonzero()
    assert abs(rows.mean() - 601 * 239 / 700) < 1 and abs(columns.mean() - 2001 * 1024 / 3000) < 1


def test_who_stops_reading_and_who_stops_the_command_hear_no_complaint(line, images):
    for end, code in ((lambda process: process.send_signal(signal.SIGINT), 130), (lambda _: None, 141)):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*line, "score", str(KEPT), "-"], text=True, **pipes)
        process.stdin.write(f"{images / 'a.png'}\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith("path,")
        assert process.stdout.readline().startswith(str(images / "a.png"))
        process.stdout.close()
        end(process)
        assert process.communicate(f"{images / 'b.png'}\n" if code == 141 else "")[1] == ""
        assert process.returncode == code


def test_other_commands_say_which_distribution_has_them(line):
    finished = run(line, "fit", "--data.root", "bottle")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("patchad: error: patchad fit needs torch: pip install patchad;")
    assert finished.stderr.count("\n") == 1
    assert run(line, "--version").stdout.startswith(f"patchad {patchad.results.installed_version()}")
    assert "score images" in run(line, "--help").stdout


def test_where_openvino_is_not_installed_nothing_is_measured_and_asking_for_it_is_answered(line, images, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    finished = run(line, "score", KEPT, images / "a.png", HOME=str(home), XDG_CACHE_HOME=str(home))
    assert finished.returncode == 0 and not list(home.iterdir())
    finished = run(line, "score", KEPT, images / "a.png", "--runtime", "openvino")
    assert (finished.returncode, finished.stdout) == (2, "")
    told = "patchad: error: runtime openvino is not installed (No module named 'openvino'): pip install openvino, or "
    assert finished.stderr.startswith(told) and finished.stderr.count("\n") == 1


def test_an_exported_file_is_timed_stage_by_stage(line, images):
    (images / "d.png").unlink()
    finished = run(line, "benchmark", KEPT, "--images", images, "--batch_sizes", 1, 2, "--repeats", 2)
    assert finished.returncode == 0, finished.stderr
    stages = re.findall(r"^\| (\S.*?) \| \d+\.\d+ \| \d+\.\d+ \|$", finished.stdout, re.M)
    assert stages == ["decode", "canvas", "graph", "map to size", "all"] * 2
    assert len(re.findall(r"^\d+\.\d images/s, peak memory \d+ MB$", finished.stdout, re.M)) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.patchad", "images"], "none.patchad does not exist"),
        (["images/a.png", "images"], "images/a.png is not a file that patchad export wrote"),
        ([KEPT, "nowhere"], "nowhere does not exist; give a folder, an image, or -"),
        ([KEPT, "empty"], "no images below empty"),
        ([KEPT, "images", "--watch"], "--watch needs --output"),
        ([KEPT, "images/a.png", "--watch", "--output", "rows.csv"], "--watch follows a folder, and images/a.png is"),
        ([KEPT, "images", "--review_fpr", "0.5"], "--review_fpr 0.5 needs --target_fpr"),
        ([KEPT, "images", "--target_fpr", "0.5", "--review_fpr", "0.2"], "review_fpr 0.2 must lie above"),
        ([KEPT, "images", "--overlays", "images/maps"], "--overlays images/maps lies in images"),
        ([KEPT, "images", "--output", "empty"], "--output empty is a folder"),
        ([KEPT, "images", "--drift", "0"], "--drift 0 must be at least 1"),
        ([KEPT, "images", "--threads", "0"], "threads 0 must be"),
        ([KEPT, "images", "--runtime", "x"], "argument --runtime: invalid choice: 'x'"),
        ([KEPT, "images", "--format", "xml"], "argument --format: invalid choice: 'xml'"),
        ([KEPT], "the following arguments are required: images"),
    ],
)
def test_mistakes_end_in_one_line(images, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(images.parent)
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["score", *map(str, arguments)])
    output, said = capsys.readouterr()
    assert (ended.value.code, output) == (2, "")
    assert said.startswith(f"patchad: error: {told}") and said.count("\n") == 1


def until(holds: Callable[[], bool]) -> None:
    """Waits for what another process does."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_folder_that_fills_is_followed_and_gone_on_with(line, images, tmp_path):
    """Images that grow, are renamed into place, and vanish; a signal in between, and a torn last line."""
    (images / "d.png").unlink()
    folder, output = tmp_path / "arriving", tmp_path / "rows.csv"
    folder.mkdir()
    command = [*line, "score", str(KEPT), str(folder), "--watch", "--output", str(output)]
    whole = (images / "a.png").read_bytes()

    def scored() -> list[str]:
        text = output.read_text() if output.exists() else ""
        return [Path(row["path"]).name for row in rows_of(text)]

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(output.exists)
        with (folder / "grows.png").open("wb") as file:
            for start in range(0, len(whole), len(whole) // 4):
                file.write(whole[start : start + len(whole) // 4])
                file.flush()
                time.sleep(STILL / 2)
        (images / "b.png").rename(folder / "renamed.png")
        (folder / "vanishes.png").write_bytes(whole)
        time.sleep(STILL / 2)
        (folder / "vanishes.png").unlink()
        until(lambda: len(scored()) == 2)
        process.send_signal(signal.SIGINT)
        told = process.communicate()[1]
        assert process.returncode == 0
    assert sorted(scored()) == ["grows.png", "renamed.png"]
    assert "2 images: " in told and "0 unreadable" in told
    assert f"{folder / 'vanishes.png'} vanished before it was read" in told
    kept = output.read_bytes()
    os.truncate(output, len(kept) - 9)
    last = scored()[-1]
    (folder / "grows.png").write_bytes(whole + b"overwritten")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        (folder / "later").mkdir()
        (folder / "later" / "new.png").write_bytes(whole)
        until(lambda: len(scored()) == 3)
        process.terminate()
        assert "2 images: " in process.communicate()[1]
        assert process.returncode == 0
    assert sorted(scored()) == ["grows.png", "new.png", "renamed.png"] and last in scored()[1:]


def test_an_image_is_whole_when_it_stands_still_and_comes_once(tmp_path):
    seen: set[str] = set()
    arrivals = Arrivals(tmp_path, seen)
    names = [tmp_path / name for name in ("late.png", "early.JPG", ".hidden.png", "note.txt")]
    for age, path in enumerate(names):
        path.write_bytes(b"1")
        os.utime(path, (1000 - age, 1000 - age))
    late, early = map(str, names[:2])
    assert arrivals.look(0.0) == ([], [])
    names[0].write_bytes(b"12")
    os.utime(names[0], (1001, 1001))
    assert arrivals.look(STILL) == ([early], [])
    seen.add(early)
    assert arrivals.look(1.5 * STILL) == ([], [])
    os.utime(names[0], (1002, 1002))
    assert arrivals.look(1.75 * STILL) == ([], [])
    assert arrivals.look(2.75 * STILL) == ([late], [])
    names[0].unlink()
    names[1].unlink()
    assert arrivals.look(3 * STILL) == ([], [late])
    with pytest.raises(PatchadError, match="is no longer there"):
        Arrivals(tmp_path / "gone", seen).look(0.0)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_crash_tore_is_cut_off_and_what_is_no_journal_is_left_alone(tmp_path, name):
    form, output = FORMATS[name], tmp_path / "rows"
    assert paths_so_far(output, form) == set()
    names = ["=a,\n.png", "b\udcfc.png", "'c.png"]
    lines = [form.head, *(form.line(Row(path, reason="said")) for path in names)]
    whole = "".join(lines).encode(errors="surrogateescape")
    for end in [*range(0, len(whole), 7), len(whole)]:
        output.write_bytes(whole[:end])
        held = paths_so_far(output, form)
        assert held == set(names[: len(held)])
        assert output.read_bytes() == "".join(lines[: len(held) + bool(output.stat().st_size)]).encode(
            errors="surrogateescape"
        )
    assert held == set(names)
    for text in ("path", "notes", "{}\n", "path,score\r\n1,2\r\n", '{"path": 3}\n', '{"path": "a"\n'):
        if form.begins.startswith(text):
            continue
        output.write_text(text, newline="")
        with pytest.raises(PatchadError, match=f"holds other things than rows of this patchad as {name}"):
            paths_so_far(output, form)
        assert output.read_bytes().decode() == text


@pytest.mark.parametrize(("images", "normals"), [(200, 19), (200, 60), (50, 400), (7, 100)])
def test_the_critical_count_is_that_of_the_beta_binomial_distribution(images, normals):
    rank = math.floor(0.05 * (normals + 1))
    count = critical_count(images, normals, rank, BEGINS)
    chances = betabinom(images, rank, normals + 1 - rank)
    assert chances.sf(count - 1) <= float(BEGINS) < chances.sf(count - 2)


def test_no_alarm_without_drift_in_nine_of_ten_shuffles_and_one_with_it():
    """Scores of normal images in a random order; each time anew, also those that p-values come from."""
    generator, window, normals, alarms = np.random.default_rng(0), 200, 60, 0
    for _ in range(100):
        scores = generator.permutation(normals + 2000)
        known, new = np.sort(scores[:normals]), scores[normals:]
        p_values = (1 + normals - np.searchsorted(known, new)) / (1 + normals)
        drift = Drift(window, normals)
        alarms += any(drift.take(float(p_value)) for p_value in p_values)
    assert alarms <= 10


def test_an_alarm_is_told_once_when_it_begins_and_once_when_it_ends():
    drift, rank = Drift(100, 199), 10
    begins, ends = (critical_count(100, 199, rank, chance) for chance in (BEGINS, ENDS))
    said = [drift.take(1 / 200) for _ in range(begins)] + [drift.take(1.0) for _ in range(100 - begins)]
    assert (said[:-1] == [None] * 99 and not drift.alarm) or drift.full
    assert said[-1] == (
        f"drift: {begins} of the last 100 images have p-values of at most 0.05; chance explains {begins - 1}"
    )
    said = [drift.take(0.06) for _ in range(100)]
    assert [number for number, text in enumerate(said) if text] == [begins - ends]
    assert said[begins - ends] == f"drift is over: {ends - 1} of the last 100 images have p-values of at most 0.05"


@pytest.mark.parametrize(("window", "normals"), [(200, 18), (1, 60)])
def test_drift_that_cannot_be_told_is_refused(window, normals):
    with pytest.raises(PatchadError, match="too few"):
        Drift(window, normals)


def test_chances_are_exact_fractions_however_many_images_there_are():
    assert critical_count(3000, 3000, 150, Fraction(1, 1000)) == betabinom(3000, 150, 2851).isf(1e-3) + 1
