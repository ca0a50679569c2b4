"""One row for each image: what it says, its order, and how it is written."""

import csv
import json
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from patchad.callbacks.summary import auroc, detection_interval
from patchad.conformal import Limits
from patchad.results import Row, Scored, Source, append_rows, as_json, box, row_of, unreadable, write_rows

LIMITS = Limits(threshold=5.0, review_threshold=3.0, map_threshold=2.0)
SOURCE = Source("c0ffee", "0.1.0", "2026-11-30T12:00:00+00:00")


def scored(score: float, peak: float = 0.0) -> Scored:
    values = np.zeros((20, 30), np.float32)
    values[4:7, 10:12] = peak
    verdict = LIMITS.verdict(score)
    return Scored(score, verdict == "anomalous", verdict, 0.1, values)


@pytest.mark.parametrize(
    ("score", "label", "verdict", "correct"),
    [
        (6.0, "anomalous", "anomalous", "right"),
        (6.0, "normal", "anomalous", "wrong"),
        (4.0, "normal", "review", ""),
        (4.0, "anomalous", "review", ""),
        (2.0, "anomalous", "normal", "wrong"),
        (2.0, "normal", "normal", "right"),
        (2.0, "", "normal", ""),
    ],
)
def test_a_verdict_is_right_or_wrong_where_the_truth_is_known_and_somebody_else_does_not_look(
    score, label, verdict, correct
):
    row = row_of("a.png", scored(score), LIMITS, SOURCE, label)
    assert (row.verdict, row.correct) == (verdict, correct)


@pytest.mark.parametrize(
    ("score", "peak", "note"),
    [(6.0, 3.0, ""), (6.0, 2.0, "score only"), (4.0, 3.0, "map only"), (1.0, 1.0, "")],
)
def test_a_note_says_where_score_and_map_disagree(score, peak, note):
    assert row_of("a.png", scored(score, peak), LIMITS, SOURCE).note == note


def test_area_and_box_are_those_of_the_pixels_above_the_threshold_of_the_map():
    row = row_of("a.png", scored(6.0, 3.0), LIMITS, SOURCE)
    assert (row.area, row.left, row.top, row.right, row.bottom) == (6, 10, 4, 12, 7)
    nothing = row_of("a.png", scored(6.0), LIMITS, SOURCE)
    assert (nothing.area, nothing.left, nothing.bottom) == (0, None, None)
    generator = np.random.default_rng(0)
    for _ in range(20):
        region = generator.random((9, 7)) > 0.9
        rows, columns = region.nonzero()
        expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (None,) * 4
        assert box(region) == expected


def test_failures_come_first_and_the_worst_of_them_sooner(tmp_path):
    rows = [
        row_of("found", scored(99.0), LIMITS, SOURCE, "anomalous"),
        row_of("passed", scored(0.5), LIMITS, SOURCE, "normal"),
        row_of("missed", scored(1.0), LIMITS, SOURCE, "anomalous"),
        row_of("alarm", scored(50.0), LIMITS, SOURCE, "normal"),
        unreadable("broken", "cannot read it", LIMITS, SOURCE),
        row_of("looked at", scored(4.0), LIMITS, SOURCE, "normal"),
    ]
    write_rows(tmp_path / "scores.csv", rows)
    written = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [row["path"] for row in written] == ["broken", "missed", "alarm", "found", "looked at", "passed"]
    assert written[0] == {**dict.fromkeys(Row._fields, ""), **{
        "path": "broken", "verdict": "unreadable", "threshold": "5.0", "map_threshold": "2.0", "model": "c0ffee",
        "version": "0.1.0", "time": SOURCE.time, "reason": "cannot read it",
    }}  # fmt: skip


def test_rows_are_the_same_as_csv_and_as_json_and_numbers_lose_no_digit(tmp_path):
    row = row_of("teil ü,\n1.png", scored(math.pi, 3.0), LIMITS, SOURCE, "normal", "good")
    append_rows(tmp_path / "scores.csv", [row])
    append_rows(tmp_path / "scores.csv", [row])
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first == second and {name: str(value) for name, value in json.loads(as_json(row)).items()} == first
    assert float(first["score"]) == math.pi


@pytest.mark.parametrize("images", [20, 500])
def test_the_interval_of_the_auroc_holds_it_and_shrinks_with_more_images(images):
    generator = np.random.default_rng(0)
    normal, anomalous = generator.normal(0, 1, images), generator.normal(1.5, 1, images)
    rows = [Row("a", "normal", score=score) for score in normal.tolist()]
    rows += [Row("b", "anomalous", score=score) for score in anomalous.tolist()]
    expected = (anomalous[:, None] > normal).mean()
    assert auroc(normal, anomalous) == pytest.approx(expected)
    assert roc_auc_score([0] * images + [1] * images, [*normal, *anomalous]) == pytest.approx(expected)
    low, high = detection_interval(rows)
    error = math.sqrt(expected * (1 - expected) / images)  # about that of Hanley and McNeil, Radiology 1982
    assert low < expected < high and error < high - low < 5 * error
    assert detection_interval(rows) == (low, high)


def test_there_is_no_interval_of_an_auroc_of_one_image():
    assert detection_interval([Row("a", "normal", score=1.0), Row("b", "anomalous", score=2.0)]) is None
