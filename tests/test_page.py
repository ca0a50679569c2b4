import csv
import functools
import io
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.page import chromium, made_up
from patchad import PyramidDataModule
from patchad.callbacks import page as page_module
from patchad.callbacks.page import COLUMNS, Findings, page
from patchad.callbacks.pictures import SheetEntry, sheet_entry
from patchad.callbacks.report import aurocs
from patchad.callbacks.summary import confusion
from patchad.callbacks.thumbnails import BUDGET, thumbnails
from patchad.cli import main
from patchad.conformal import conformal_threshold
from patchad.drawing import FOUND, TRUTH
from patchad.errors import PatchadError
from patchad.results import Source, unreadable
from patchad.types import Prediction

HOSTILE = "</script><script>alert(1)</script>{{ 7 * 7 }} \"'&ü图\udce9.png"
SMALL = [
    "--data.image_size=[96,96]",
    "--data.metric_size=[96,96]",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


def data_of(html: str) -> dict:
    """What the page's program reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def rows_of(data: dict) -> list[dict]:
    return [dict(zip(data["columns"], cells, strict=True)) for cells in data["rows"]]


@functools.cache
def findings(images: int = 60) -> Findings:
    """A test of made-up images, one of which could not be read."""
    made = made_up(images)
    broken = unreadable("product/test/hole/broken.png", "cannot read image", made.limits, Source("", "", ""), "hole")
    return made._replace(rows=[broken, *made.rows])


def entry(image: np.ndarray, **settings) -> SheetEntry:
    shape = image.shape[:2]
    made = SheetEntry("a.png", "hole", 1.0, True, image, np.zeros(shape, bool), True, np.zeros(shape, np.float32))
    return made._replace(**settings)


def opened(file: bytes) -> np.ndarray:
    """A file's pixels, RGBA."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGBA"))


def test_the_data_of_a_page_agree_with_the_rows():
    made = findings()
    data = data_of(page(made))
    assert data["folder"] == "product/test/"
    for cells, row in zip(rows_of(data), made.rows, strict=True):
        assert data["folder"] + cells["path"] == row.path
        assert all(cells[name] == getattr(row, name) for name in COLUMNS[1:])
    assert [bool(pictures) for pictures in data["pictures"]] == [False] + 60 * [True]
    assert data["normals"] == sorted(made.normals)
    assert (data["threshold"], data["review"]) == (made.limits.threshold, made.limits.review_threshold)
    assert data["overlap"] == [list(point) for point in made.overlap]


def test_the_figures_of_a_page_stand_in_its_html_in_per_cent():
    made = findings()
    html = page(made)
    counts = confusion(made.rows)
    for label, of_label in counts.items():
        cells = re.search(rf'<th scope="row">{label}</th>(.*?)</tr>', html)[1]
        found = [int(count) for count in re.findall(r">(\d+)</td>", cells)]
        assert found == [of_label[verdict] for verdict in ("normal", "review", "anomalous")]
    assert "<dt>detection AUROC</dt><dd><b>50.0 %</b>" in html
    assert "1 image could not be read and is left out" in html
    part = page(made._replace(aurocs=aurocs({"segmentation_auroc_side_16": 0.9})))
    assert '<td>side 16</td><td class="number"></td><td class="number">90.0</td>' in part


def test_a_page_names_the_aurocs_of_all_that_was_measured():
    rows = aurocs({"detection_auroc": 0.8, "segmentation_auroc_defect_on_side_left": 0.9, "pro": 0.7})
    assert [name for name, *_ in rows] == ["all", "on_side_left"]
    assert rows[0][1] == 0.8 and np.isnan(rows[0][2])


def test_names_of_any_kind_are_text_on_a_page():
    made = findings(2)
    (broken, *rows), pictures = made.rows, {HOSTILE: made.pictures[made.rows[-1].path]}
    rows[-1] = rows[-1]._replace(path=HOSTILE, defect=HOSTILE)
    said = {"title": HOSTILE, "checkpoint": HOSTILE, "provenance": {HOSTILE: HOSTILE}, "updates": [HOSTILE]}
    said |= {"doubts": [(HOSTILE, [HOSTILE])], "aurocs": [(HOSTILE, 0.5, 0.5)]}
    rows = [broken._replace(reason=HOSTILE), *rows]
    html = page(made._replace(rows=rows, pictures=pictures, **said))
    assert html.count("<script") == html.count("</script") == 2
    assert "{{ 7 * 7 }}" in html and "49" not in re.sub(r'id="data">.*?</script>', "", html, flags=re.DOTALL)
    assert rows_of(data_of(html))[-1]["defect"] == HOSTILE
    html.encode(errors="backslashreplace")


def test_a_page_says_what_was_changed_after_the_fit_and_what_is_doubtful():
    html = page(
        findings()._replace(updates=["3 images added"], doubts=[("2 of 9 images are of one colour", ["a.png"])])
    )
    assert "changed after the fit</dt><dd>3 images added</dd>" in html
    assert "<summary>2 of 9 images are of one colour</summary><ul><li>a.png</li>" in html


def test_a_page_of_many_images_has_the_pictures_of_the_first_and_says_so(monkeypatch):
    monkeypatch.setattr(page_module, "MOST_PICTURES", 5)
    html = page(findings())
    data = data_of(html)
    assert [number for number, pictures in enumerate(data["pictures"]) if pictures] == [1, 2, 3, 4, 5]
    assert len(data["rows"]) == 61 and "Pictures of the first 5 of 61 images" in html
    monkeypatch.undo()
    assert "Pictures of the first" not in page(findings())


def test_a_page_of_2000_images_can_be_mailed():
    html = page(findings(2000))
    assert sum(map(bool, data_of(html)["pictures"])) == 2000
    assert len(html) <= 20_000_000


@pytest.mark.parametrize("shape", [(384, 384), (3, 900), (700, 40), (1, 1)])
@pytest.mark.parametrize("deviation", [0, 30, 200])
def test_thumbnails_keep_their_budget_whatever_they_show(shape, deviation):
    generator = np.random.default_rng(0)
    noise = generator.normal(128, deviation, (*shape, 3)).clip(0, 255).astype(np.uint8)
    values, truth = np.exp(generator.normal(0, 9, shape)).astype(np.float32), generator.random(shape) < 0.1
    made = thumbnails(entry(noise, truth=truth, map=values), map_threshold=1.0)
    assert sum(len(file or b"") for file in made) <= BUDGET
    sizes = [opened(file).shape for file in made if file]
    assert all(max(size) <= 224 for size in sizes)


def test_thumbnails_show_image_and_outlines_where_they_are():
    image = np.zeros((448, 448, 3), np.uint8)
    image[:224] = 200
    values, truth = np.zeros((448, 448), np.float32), np.zeros((448, 448), bool)
    values[100:140, 300:340], truth[401, 21] = 9.0, True
    made = thumbnails(entry(image, map=values, truth=truth), map_threshold=3.0)
    picture, found, real, warm = (opened(file) for file in (made.image, made.found, made.truth, made.heat))
    assert picture.shape == found.shape == real.shape == (224, 224, 4)
    assert picture[50, 50, 0] > 180 and picture[200, 50, 0] < 20
    assert tuple(found[60, 149]) == (*FOUND, 255) and found[60, 160, 3] == found[10, 10, 3] == 0
    assert tuple(real[200, 9]) == (*TRUTH, 255) and real[200, 10, 3] == 0  # around the one pixel
    assert warm[30, 80, 0] > 200 > warm[100, 20, 0]


def test_thumbnails_tell_a_missing_mask_from_an_empty_one():
    image = np.zeros((8, 8, 3), np.uint8)
    missing, empty = (thumbnails(entry(image, has_mask=known), 1.0) for known in (False, True))
    assert missing.truth is None and empty.truth == b"" and empty.found == b""


def test_images_are_shown_in_the_light_of_their_files(product):
    data = PyramidDataModule(product, image_size=(96, 96), brightness=0.9, num_workers=0)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    shape = (len(batch.path), 96, 96)
    nothing = batch.image.new_zeros(shape)
    shown = sheet_entry(Prediction(nothing[:, 0, 0], nothing[:, 0, 0] > 0, nothing, {}, {}), batch, 0)
    with Image.open(batch.path[0]) as image:
        file = np.asarray(image.convert("RGB")).astype(int)
    assert batch.gain[0] > 1.2
    assert np.abs(shown.image - file).max() <= 1


@pytest.fixture(scope="module")
def run(product, tmp_path_factory) -> Path:
    """The run folder of a test of images one of which is broken, one has a name of its own, and one has no mask."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(product, folder / "parts")
    holes = sorted((folder / "parts/test/hole").iterdir())
    (folder / "parts/ground_truth/hole" / f"{holes[0].stem}_mask.png").unlink()
    holes[0].rename(holes[0].with_name("<b>&'ü.png"))
    min((folder / "parts/test/good").iterdir()).write_bytes(b"no image")
    with commands_in(folder):
        main(["fit", "--data.root=parts", "--model.bank.max_vectors=300", "--model.scorer.target_fpr=0.2", *SMALL])
        with pytest.raises(SystemExit), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an image is broken
            main(["test", "--ckpt_path=runs/version_0/checkpoints/last.ckpt", *SMALL[3:]])
    return folder / "runs/version_1"


@contextmanager
def commands_in(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["patchad"])
        patch.setattr(sys, "path", list(sys.path))
        yield


def test_a_test_writes_a_page_that_agrees_with_its_scores(run):
    data = data_of((run / "report.html").read_text())
    scores = list(csv.DictReader((run / "scores.csv").read_text().splitlines()))
    rows = rows_of(data)
    assert len(rows) == 11 and rows[0]["verdict"] == "unreadable"
    for row, score in zip(rows, scores, strict=True):
        assert data["folder"] + row["path"] == score["path"]
        for name in COLUMNS[1:]:
            assert score[name] == ("" if row[name] is None else str(row[name]))
    assert [bool(pictures) for pictures in data["pictures"]] == [False] + 10 * [True]


def test_a_page_tells_images_without_a_mask_and_curves_of_pixels(run):
    data = data_of((run / "report.html").read_text())
    without = [
        row["path"]
        for row, files in zip(rows_of(data), data["pictures"], strict=True)
        if files is not None and files[3] is None
    ]
    assert without == ["hole/<b>&'ü.png"]
    rates, overlaps = zip(*data["overlap"], strict=True)
    (metrics,) = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    assert len(rates) <= 200 and (rates[0], rates[-1]) == (0, pytest.approx(0.3))
    assert np.trapezoid(overlaps, rates) / 0.3 == pytest.approx(float(metrics["test/pro"]), abs=0.005)


def test_a_page_says_where_it_comes_from(run):
    html = (run / "report.html").read_text()
    found = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", html))
    assert found["checkpoint"] == "runs/version_0/checkpoints/last.ckpt"
    assert found["images"] == "parts, read as MVTecAD"
    assert "12 normal images" in found["threshold"] and "at most 15.4 %" in found["threshold"]
    assert "bank.max_vectors 300" in found["settings of the detector"]
    assert "scorer.target_fpr 0.2" in found["settings of the detector"]
    assert "image_size [96, 96]" in found["settings of the data"] and "seed" not in found["settings of the data"]
    assert found["command"].startswith("patchad test --ckpt_path=runs/version_0/checkpoints/last.ckpt")
    assert re.search(r"patchad \S+, torch \S+, pytorch-lightning \S+, Python 3", found["versions"])


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    try:
        with chromium() as found:
            yield found
    except PatchadError as error:
        pytest.skip(str(error))


class Reader:
    """A page as it is read: what it asks of a network, and what it complains of."""

    def __init__(self, browser, path: Path, width: int = 1400) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.url = path.resolve().as_uri()
        self.page.goto(self.url)
        self.page.wait_for_selector("[role=slider]")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def cells(self, column: int) -> list[str]:
        return self.texts(f"#table tbody td:nth-child({column})")

    def counts(self) -> tuple[float, int, int]:
        """Threshold, false alarms and misses, as they are shown."""
        said = [self.page.locator(f"#{name}").inner_text() for name in ("alarms", "missed")]
        return (float(self.page.locator("#current").inner_text()), *(int(text.split()[0]) for text in said))


@pytest.fixture
def reader(browser, tmp_path) -> Iterator[Reader]:
    """A page of 60 images and one that could not be read."""
    (tmp_path / "report.html").write_text(page(findings()))
    made = Reader(browser, tmp_path / "report.html")
    yield made
    made.page.close()
    assert made.complaints == [] and [url for url in made.requests if not url.startswith("data:")] == [made.url]


def expected(threshold: float) -> tuple[int, int]:
    """False alarms and misses at a threshold; what lies between it and that of the review is not missed."""
    made = findings()
    scores = {label: [row.score for row in made.rows if row.label == label] for label in ("normal", "anomalous")}
    lowest = min(threshold, made.limits.review_threshold)
    return sum(score > threshold for score in scores["normal"]), sum(score <= lowest for score in scores["anomalous"])


@pytest.mark.browser
def test_a_threshold_is_dragged_and_set_back(reader):
    chart, slider = reader.page.locator("#histogram svg"), reader.page.locator("[role=slider]")
    began = reader.counts()
    assert began[0] == pytest.approx(findings().limits.threshold, rel=1e-3)
    assert began[1:] == expected(findings().limits.threshold)
    box, mouse = chart.bounding_box(), reader.page.mouse
    seen = set()
    mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 80)
    mouse.down()
    for place in (0.2, 0.45, 0.8):
        mouse.move(box["x"] + box["width"] * place, box["y"] + 80)
        exact = reader.page.evaluate("threshold")
        assert reader.counts() == (pytest.approx(exact, rel=1e-3), *expected(exact))
        assert float(slider.get_attribute("aria-valuenow")) == reader.counts()[0]
        seen.add(reader.counts())
    mouse.up()
    assert len(seen) == 3
    mouse.move(box["x"], box["y"] + 80)
    assert reader.counts() in seen  # nothing is held any more
    slider.press("ArrowLeft")
    assert reader.counts()[0] < max(seen)[0]
    assert reader.counts()[1:] == expected(reader.page.evaluate("threshold"))
    reader.page.get_by_role("button", name="Back to the model's threshold").click()
    assert reader.counts() == began


@pytest.mark.browser
def test_without_a_band_to_look_at_all_that_is_not_found_is_missed(browser, tmp_path):
    made = findings()
    limits = made.limits._replace(review_threshold=made.limits.threshold)
    (tmp_path / "report.html").write_text(page(made._replace(limits=limits)))
    reader = Reader(browser, tmp_path / "report.html")
    defects = [row.score for row in made.rows if row.label == "anomalous"]
    for place in (0.2, 0.5, 0.8):
        threshold = reader.page.evaluate(f"move(scoreAt({place})), threshold")
        assert reader.counts()[2] == sum(score <= threshold for score in defects)
    assert not reader.page.locator("#reviewed").is_visible()
    reader.page.close()


@pytest.mark.browser
def test_a_finger_moves_the_threshold(reader):
    box = reader.page.locator("#histogram svg").bounding_box()
    for kind, place in (("pointerdown", 0.3), ("pointermove", 0.7)):
        reader.page.evaluate(
            """([kind, x]) => { const chart = document.querySelector("#histogram svg");
            chart.setPointerCapture = () => {}; chart.hasPointerCapture = () => true;
            chart.dispatchEvent(new PointerEvent(kind, { pointerId: 7, pointerType: "touch", clientX: x })); }""",
            [kind, box["x"] + place * box["width"]],
        )
    assert reader.page.evaluate("placeOf(threshold)") == pytest.approx(0.7, abs=0.01)


@pytest.mark.browser
@pytest.mark.parametrize("place", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_the_command_of_a_page_sets_what_it_says(reader, place):
    reader.page.evaluate(f"move(scoreAt({place}))")
    command, normals = reader.page.locator("#command").inner_text(), np.sort(findings().normals)
    rate = float(re.search(r"--target_fpr ([\d.]+)", command)[1])
    set_to, promised = conformal_threshold(normals, rate)
    below = normals[normals <= reader.page.evaluate("threshold")]
    assert set_to == (below[-1] if len(below) else normals[0])
    said = reader.page.locator("#promise").inner_text()
    assert f"to {set_to:.4g}," in said and f"at most {100 * promised:.1f} %" in said


@pytest.mark.browser
def test_a_table_is_sorted_and_comes_back_to_failures_first(reader):
    first, rows = reader.cells(1), findings().rows
    assert first == [row.path.removeprefix("product/test/") for row in rows]
    heading = reader.page.locator("#table th:nth-child(4)")
    scores = sorted(row.score for row in rows if row.score is not None)
    for direction, order in (("ascending", scores), ("descending", scores[::-1])):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == direction
        assert [float(cell) for cell in reader.cells(4)[:-1]] == pytest.approx(order, rel=1e-3)
        assert reader.cells(4)[-1] == ""  # what has no score stands last
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "none" and reader.cells(1) == first


@pytest.mark.browser
def test_filters_go_for_table_and_gallery(reader):
    rows = findings().rows
    kinds = {
        "wrong": [row for row in rows if row.correct == "wrong"],
        "false alarms": [row for row in rows if row.label == "normal" and row.verdict == "anomalous"],
        "review": [row for row in rows if row.verdict == "review"],
        "unreadable": [row for row in rows if row.score is None],
    }
    for kind, chosen in kinds.items():
        reader.page.get_by_text(f"{kind} {len(chosen)}", exact=True).click()
        names = [row.path.removeprefix("product/test/") for row in chosen]
        assert reader.cells(1) == names
        assert reader.texts("#gallery b") == [name for name in names if "broken" not in name]
        assert reader.page.locator("#count").inner_text() == f"{len(chosen)} of 61 images"
    reader.page.get_by_text("all 61", exact=True).click()
    reader.page.locator("#defect").select_option("hole")
    assert set(reader.cells(2)) == {"hole"} and len(reader.cells(2)) == 31
    reader.page.locator("#text").fill("003")
    assert all("003" in name for name in reader.cells(1)) and reader.cells(1)


@pytest.mark.browser
def test_a_long_table_and_gallery_grow_as_they_are_scrolled(browser, tmp_path):
    (tmp_path / "report.html").write_text(page(findings(260)))
    reader = Reader(browser, tmp_path / "report.html")
    rows, figures = (reader.page.locator(selector) for selector in ("#table tbody tr", "#gallery figure"))
    assert rows.count() < 261 and figures.count() < 260
    for place, more, found, count in (("table", ".more", rows, 261), ("gallery", "~ .more", figures, 260)):
        while reader.page.locator(f"#{place} {more}").is_visible():
            began = found.count()
            reader.page.locator(f"#{place} {more}").scroll_into_view_if_needed()
            found.nth(began).wait_for(state="attached")
        assert found.count() == count
    reader.page.close()


@pytest.mark.browser
def test_an_image_is_enlarged_and_the_next_one_follows(reader):
    names = reader.texts("#gallery b")
    reader.page.locator("#gallery figure button").nth(1).click()
    assert reader.texts("#enlarged b") == [names[1]]
    reader.page.keyboard.press("ArrowRight")
    assert reader.texts("#enlarged b") == [names[2]]
    reader.page.keyboard.press("Escape")
    assert not reader.page.locator("#enlarged").is_visible()


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1400])
def test_a_page_fits_a_screen_and_shows_names_of_any_kind_as_they_are(browser, run, width):
    reader = Reader(browser, run / "report.html", width)
    assert reader.page.evaluate("document.documentElement.scrollWidth") == width
    assert "hole/<b>&'ü.png" in reader.cells(1)
    assert "truth: no mask" in " ".join(reader.texts("#gallery small"))
    assert reader.page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert reader.complaints == [] and [url for url in reader.requests if not url.startswith("data:")] == [reader.url]
    reader.page.close()
