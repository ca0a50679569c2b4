"""One configuration on every development set, as CSV and as Markdown.

python -m benchmarks.products --candidate default --half choosing --data ../shared/data

The sets stand in benchmarks/products.yaml, in a half on which settings are compared and one that a candidate for a
default sees once. Each row of the CSV is one fit and one test; a table that was stopped goes on where it was, and a
finished one is printed from its CSV; without a half, the rows of both are. The confirming half refuses a candidate that
has been there with another configuration: a candidate that changes gets another name, so that every look at that half
is counted.
"""

import csv
import datetime
import inspect
import math
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import yaml
from jsonargparse import auto_cli

from benchmarks.tables import fit, splits, tested, without_place
from patchad.data.layouts import MagneticTile, detect_layout
from patchad.metrics import exact_interval
from patchad.spec import digest
from patchad.types import NORMAL

PLACE = Path(__file__).parent
Kind = TypeVar("Kind")
HALVES: dict[str, dict[str, str]] = yaml.safe_load((PLACE / "products.yaml").read_text())
RESULTS = {"choosing": PLACE / "products.csv", "confirming": PLACE / "confirmations.csv"}
AVERAGED = ("detection", "segmentation", "pro", "average_precision", "recall")


class Row(NamedTuple):
    """One fit and its test; rates in %.

    Attributes:
        date: of the test.
        commit: of the code.
        candidate: name of the configuration.
        configuration: its hash, as in `benchmarks.tables`.
        product: name of the data set.
        seed: of everything.
        detection: AUROC of images.
        segmentation: AUROC of pixels.
        pro: per-region overlap.
        average_precision: of pixels.
        normals: good test images.
        false_alarms: how many of them are called anomalous.
        recall: share of the defective images that are called anomalous.
        milliseconds: per image, eager, batch 1.
        fit_seconds: of the fit.
        test_seconds: of the test.
    """

    date: str
    commit: str
    candidate: str
    configuration: str
    product: str
    seed: int
    detection: float
    segmentation: float
    pro: float
    average_precision: float
    normals: int
    false_alarms: int
    recall: float
    milliseconds: float
    fit_seconds: float
    test_seconds: float

    def markdown(self) -> str:
        """Its line of the table."""
        scores = f"{self.detection:.1f} / {self.segmentation:.1f} | {self.pro:.1f} | {self.average_precision:.1f}"
        alarms = false_alarms(self.false_alarms, self.normals)
        times = f"{self.milliseconds:.0f} | {self.fit_seconds:.0f} + {self.test_seconds:.0f}"
        return f"| {self.product} | {self.seed} | {scores} | {alarms} | {self.recall:.0f} | {times} |"


def main(
    candidate: str,
    half: Literal["choosing", "confirming"] | None = None,
    data: Path = Path("../shared/data"),
    seeds: tuple[int, ...] = (0,),
    products: tuple[str, ...] = (),
    folder: Path = Path("runs/products"),
    results: Path | None = None,
    options: tuple[str, ...] = (),
) -> None:
    """Fits and tests what is missing, and prints the table.

    Args:
        candidate: a name for the configuration, such as `default`.
        half: which sets; by default nothing is measured, and what both CSVs have of the candidate is printed.
        data: the folder that their paths are below.
        seeds: of everything.
        products: some sets alone, to be measured or printed.
        folder: where runs are kept.
        results: the CSV; by default that of the half, in benchmarks/.
        options: of `patchad fit`, on top of the default.

    Raises:
        SystemExit: if the confirming half has seen the candidate with another configuration.
    """
    if half is None:
        rows = [row for path in RESULTS.values() for row in ended(path)]
        return print(*table(chosen(rows, candidate, products)), sep="\n")
    results = results or RESULTS[half]
    for product in products or tuple(HALVES[half]):
        for seed in seeds:
            if not any((row.candidate, row.product, row.seed) == (candidate, product, seed) for row in ended(results)):
                try:
                    row = measure(candidate, product, data / HALVES[half][product], seed, folder, options)
                except Exception:
                    append(results, failed(candidate, product, seed))  # so that every look at the half is counted
                    raise
                if half == "confirming":
                    refuse_another(row, ended(results))
                append(results, row)
                print(row.markdown(), flush=True)
    print(*table(chosen(ended(results), candidate, products)), sep="\n")


def chosen(rows: Sequence[Row], candidate: str, products: Sequence[str] = ()) -> list[Row]:
    """The rows of a candidate, of some products or, where none is named, of all."""
    return [row for row in rows if row.candidate == candidate and (not products or row.product in products)]


def measure(candidate: str, product: str, root: Path, seed: int, folder: Path, options: Sequence[str]) -> Row:
    """One fit and its test."""
    *_, images = splits(product, root)  # of Magnetic Tile the last, by tile
    fitted = fit({}, images, seed, Path("weights"), folder, 1, options)
    result = tested({}, fitted)
    normals = len(good_images(product, root, "test"))
    return Row(
        date=str(datetime.date.today()),
        commit=commit(),
        candidate=candidate,
        configuration=digest(without_place(fitted.config)),
        product=product,
        seed=seed,
        detection=result.metrics["detection_auroc"],
        segmentation=result.metrics["segmentation_auroc"],
        pro=result.metrics["pro"],
        average_precision=result.metrics["segmentation_average_precision"],
        normals=normals,
        false_alarms=round(result.metrics["false_positive_rate"] * normals / 100),
        recall=result.metrics["recall"],
        milliseconds=result.milliseconds,
        fit_seconds=result.seconds[0],
        test_seconds=result.seconds[1],
    )


def good_images(product: str, root: Path, split: str) -> list[Path]:
    """The files without a defect on one side of the split."""
    layout = MagneticTile(split="by_tile") if product == "magnetic_tile" else detect_layout(root)
    return [sample.path for sample in layout.samples(root) if sample.split == split and sample.defect == NORMAL]


def commit() -> str:
    """Of the code."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, cwd=PLACE).stdout.strip()


def failed(candidate: str, product: str, seed: int) -> Row:
    """A run that ended before it was measured: its rates are nan."""
    none = math.nan
    date = str(datetime.date.today())
    return Row(date, commit(), candidate, "failed", product, seed, none, none, none, none, 0, 0, none, none, none, none)


def refuse_another(row: Row, earlier: Sequence[Row]) -> None:
    """Ends where a candidate of that name was confirmed with another configuration."""
    for known in earlier:
        if known.candidate == row.candidate and known.configuration != row.configuration:
            raise SystemExit(f"{row.candidate} was confirmed as {known.configuration}; name this one otherwise")


def read(results: Path) -> list[Row]:
    """The rows of a CSV; none where there is no file."""
    return read_rows(results, Row)


def read_rows(results: Path, kind: Callable[..., Kind]) -> list[Kind]:
    """The rows of a CSV as tuples of a kind, whose columns have its types; none where there is no file."""
    if not results.is_file():
        return []
    types = inspect.get_annotations(kind)
    with results.open(newline="") as file:
        return [kind(**{name: types[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]


def ended(results: Path) -> list[Row]:
    """The rows of a CSV that were measured."""
    return [row for row in read(results) if not math.isnan(row.detection)]


def append(results: Path, row: NamedTuple) -> None:
    """Adds a row to a CSV, which begins with the names of the columns."""
    begins = not results.is_file()
    with results.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if begins:
            writer.writerow(row._fields)
        writer.writerow(f"{value:.2f}" if isinstance(value, float) else value for value in row)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a table: each set and seed; each set that has several; each seed, its false alarms together."""
    yield "| set | seed | detection / segmentation | PRO | pixel AP | false alarms | recall | ms | fit + test, s |"
    yield "|---" * 9 + "|"
    rows = sorted(rows, key=lambda row: (row.product, row.seed))
    yield from (row.markdown() for row in rows)
    for product in dict.fromkeys(row.product for row in rows):
        of_set = [row for row in rows if row.product == product]
        if len(of_set) > 1:
            yield f"| {product} | mean of {len(of_set)} | {means(of_set, '')} | | |"
    for seed in sorted({row.seed for row in rows}):
        of_seed = [row for row in rows if row.seed == seed]
        yield f"| mean of {len(of_seed)} sets | {seed} | {means(of_seed, pooled(of_seed))} | | |"


def means(rows: Sequence[Row], alarms: str) -> str:
    """What a line has of the means of some rows."""
    detection, segmentation, pro, precision, recall = (
        statistics.mean(getattr(row, name) for row in rows) for name in AVERAGED
    )
    return f"{detection:.1f} / {segmentation:.1f} | {pro:.1f} | {precision:.1f} | {alarms} | {recall:.0f}"


def pooled(rows: Sequence[Row]) -> str:
    """The false alarms of all rows together, whose images must differ for the interval to hold."""
    return false_alarms(sum(row.false_alarms for row in rows), sum(row.normals for row in rows))


def false_alarms(count: int, normals: int) -> str:
    """Alarms of how many, their rate, and its exact interval in %.

    Example:
        >>> false_alarms(1, 20)
        '1 of 20: 5.0 % (0.1 to 24.9)'
    """
    low, high = exact_interval(count, normals)
    return f"{count} of {normals}: {100 * count / normals:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
