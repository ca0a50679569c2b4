"""What the page of a test weighs and how long it takes, with pictures as large as they may be, as Markdown.

python -m benchmarks.page --images 2000
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jsonargparse import auto_cli

from patchad.callbacks.page import Findings, page
from patchad.callbacks.pictures import SheetEntry
from patchad.callbacks.thumbnails import Thumbnails, thumbnails
from patchad.conformal import Limits, limits, p_values
from patchad.errors import PatchadError
from patchad.results import Row, Scored, Source, row_of
from patchad.timing import CPU, Clock

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SIZE, CELL, DEVIATION = 384, 8, 110.0
"""Height and width in pixels of images, and of what masks and maps are drawn by; deviation of the noise of
images, of 255, with which thumbnails fill their budget."""
TARGET = 0.05
"""The false-positive rate that is asked for."""
DISTINCT = 40
"""Pictures, which are repeated."""
NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def main(images: int = 2000, output: Path = Path("runs/page.html")) -> None:
    """Writes a page of made-up images, and prints its size, the seconds that took, and those to its first paint.

    Args:
        images: how many.
        output: the page.
    """
    findings = made_up(images)
    clock = Clock(CPU)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(findings), encoding="utf-8")
    seconds = clock() / 1000
    print("| images | MB | seconds to write | seconds to the first paint |\n|---|---|---|---|")
    print(f"| {images} | {output.stat().st_size / 1e6:.1f} | {seconds:.2f} | {first_paint(output):.2f} |")


def made_up(images: int, seed: int = 0) -> Findings:
    """A test of noise, every second image of which is anomalous, with some failures of each kind."""
    generator = np.random.default_rng(seed)
    scores = np.exp(generator.normal(np.where(np.arange(images) % 2, 5.0, 1.0), 1.3))
    normals = np.exp(generator.normal(1.0, 1.3, 300))
    found, _ = limits(normals, 2 * normals, target_fpr=TARGET, review_fpr=4 * TARGET)
    rows = [row(number, score, normals, found) for number, score in enumerate(scores.tolist())]
    pictures = [noise(generator, found.map_threshold) for _ in range(min(images, DISTINCT))]
    return Findings(
        title="patchad test: noise",
        metrics={"detection_auroc": 0.5, "false_positive_rate_low": 0.0, "false_positive_rate_high": 1.0},
        aurocs=[("all", 0.5, 0.5)],
        rows=sorted(rows, key=lambda row: row.order),
        pictures={row.path: pictures[number % DISTINCT] for number, row in enumerate(rows)},
        limits=found,
        target_fpr=TARGET,
        normals=normals.tolist(),
        overlap=[(0.0, 0.0), (0.3, 1.0)],
        doubts=[],
        checkpoint="last.ckpt",
        provenance={},
        updates=[],
    )


def row(number: int, score: float, normals: np.ndarray, limits: Limits) -> Row:
    """The row of an image, by its number and score."""
    verdict, p_value = limits.verdict(score), float(p_values(np.array([score]), normals)[0])
    scored = Scored(score, verdict == "anomalous", verdict, p_value, np.full((CELL, CELL), 2 * score, np.float32))
    label, defect = ("anomalous", "hole") if number % 2 else ("normal", "good")
    return row_of(f"product/test/{defect}/{number:04d}.png", scored, limits, Source("", "", ""), label, defect)


def noise(generator: np.random.Generator, map_threshold: float) -> Thumbnails:
    """Thumbnails of noise, whose map and mask are noise as well."""
    image = generator.normal(128, DEVIATION, (SIZE, SIZE, 1)).clip(0, 255).astype(np.uint8).repeat(3, 2)
    cells = (SIZE // CELL, SIZE // CELL)
    values, truth = np.exp(generator.normal(3, 2, cells)).astype(np.float32), generator.random(cells) < 0.05
    values, truth = (part.repeat(CELL, 0).repeat(CELL, 1) for part in (values, truth))
    return thumbnails(SheetEntry("noise.png", "hole", 1.0, True, image, truth, True, values), map_threshold)


@contextmanager
def chromium() -> "Iterator[Browser]":
    """The Chromium of this machine, without a window.

    Raises:
        PatchadError: if there is none.
    """
    from playwright.sync_api import sync_playwright  # only here: made-up pages need no browser

    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise PatchadError(f"no browser: install one of {', '.join(NAMES)}")
    with sync_playwright() as driver, driver.chromium.launch(executable_path=path, args=QUIET) as browser:
        yield browser


def first_paint(path: Path) -> float:
    """Seconds until Chromium shows something of a file."""
    with chromium() as browser:
        opened = browser.new_page(bypass_csp=True)  # the page lets nobody evaluate text
        opened.goto(path.resolve().as_uri())
        opened.wait_for_function("performance.getEntriesByType('paint').length")
        return opened.evaluate("performance.getEntriesByType('paint')[0].startTime") / 1000


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
