"""The paper's tables by its own configuration, in portions of the time that there is.

python -m benchmarks.paper --data "{transistor: transistor, magnetic_tile: magnetic_tile}" --weights weights --minutes 9

The rows of tables 2 to 5 stand in benchmarks/tables.yaml and run in the order of their `turn`, whatever their table;
Magnetic Tile by tile, of which the paper says nothing, comes last. What was run is kept below `runs/paper`: the same
command goes on where the last one ended, in the middle of a fit, too. Without --minutes nothing runs, and the tables
are printed from benchmarks/paper.csv. Table 1 is measured first, and once. Each row is measured after its last epoch,
and, as the paper has it, after the epoch that is best on the test images, of every 25th. Its curves are drawn beside
its run.
"""

import contextlib
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.portions import CURVES, Row, figures, latest, measure
from benchmarks.products import PLACE
from benchmarks.tables import TABLES, TILES, Images, images_of, model_lines, once

NUMBERS = ("2", "3", "4", "5")
VALIDATIONS = 4
"""In 100 epochs."""
DATA = {"transistor": Path("../shared/data/mvtec_ad_256/transistor"), TILES: Path("../shared/data/magnetic_tile")}
BY_TILE = f"{TILES}, by_tile"
COLUMNS = ("row", "data", "epochs", "last epoch", "best on test", "paper", "by defect and side", "ms", "fit + test, s")
PANELS = {
    "position": ("train/", "position_side"),
    "similarity and clustering, weighted": ("train/", "similarity_side", "clustering_side"),
    "share of directions told right": ("train/", "accuracy"),
    "AUROC on test": ("val/", "detection_auroc", "segmentation_auroc"),
}
"""Of each picture of curves: what the names of its curves begin with, and what one of them holds."""


def main(
    data: dict[str, Path] = DATA,
    weights: Path = Path("weights"),
    minutes: float = 0,
    folder: Path = Path("runs/paper"),
    results: Path = PLACE / "paper.csv",
    options: tuple[str, ...] = (),
) -> None:
    """Runs what is missing while there is time, and prints the tables.

    Args:
        data: folders of the data sets, `transistor` and `magnetic_tile`, which is tested by both its splits.
        weights: folder of files of ImageNet weights.
        minutes: after which no epoch begins; banks are filled and tested after that.
        folder: where runs are kept.
        results: the CSV.
        options: further ones for every row of `patchad fit`.
    """
    models = results.with_name(f"{results.stem}_models.json")
    if minutes or models.is_file():
        print("\nTable 1\n", *once(models, lambda: model_lines(TABLES["1"])), "", sep="\n", flush=True)
    measure(in_turn(data), results, weights, folder, minutes, options, VALIDATIONS)
    for number in NUMBERS:
        print(f"\nTable {number}\n")
        print_table(TABLES[number], data, results)
    print("\nThe paper's figures in tables 2 and 3 are means of MVTec AD's 15 classes.")
    with contextlib.suppress(ModuleNotFoundError):  # pictures can be drawn where matplotlib is, too
        for path in sorted(folder.glob(f"*/{CURVES}")):
            draw(path.parent)


def in_turn(data: Mapping[str, Path]) -> list[tuple[dict[str, Any], Images]]:
    """All rows with their data sets, in the order in which they run."""
    rows = [(row, images) for number in NUMBERS for row in TABLES[number] for images in images_of(row, data)]
    return sorted(rows, key=lambda task: (task[1].name == BY_TILE, task[0]["turn"]))


def print_table(rows: Sequence[dict[str, Any]], data: Mapping[str, Path], results: Path) -> None:
    """Prints rows as Markdown, from their CSV."""
    print(f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n")
    for row in rows:
        for images in images_of(row, data):
            print(line(latest(results, row["name"], images.name), "-" if images.name == BY_TILE else row["paper"]))


def line(row: Row, paper: str) -> str:
    """One line."""
    cells = [row.name, row.data, row.state.removesuffix(" epochs"), *["-"] * 2, paper, *[""] * 3]
    if row.measured:
        best = f"{figures(row.best_detection, row.best_segmentation)} ({row.best_epoch})" if row.best_epoch else "-"
        cells[3:5] = figures(row.detection, row.segmentation), best
        cells[6:] = row.parts, f"{row.milliseconds:.0f}", f"{row.fit_seconds:.0f} + {row.test_seconds:.0f}"
    return f"| {' | '.join(cells)} |"


def draw(home: Path) -> None:
    """The curves of a run as a picture beside their CSV."""
    import matplotlib.pyplot as plt  # of the extra dev

    with (home / CURVES).open(newline="") as file:
        reader = csv.DictReader(file)
        names, epochs = reader.fieldnames or (), list(reader)
    figure, panels = plt.subplots(1, len(PANELS), figsize=(20, 4), layout="constrained")
    for panel, (title, (prefix, *parts)) in zip(panels, PANELS.items(), strict=True):
        for name in (name for name in names if name.startswith(prefix) and any(part in name for part in parts)):
            points = [(int(epoch["epoch"]), float(epoch[name])) for epoch in epochs if epoch[name]]
            panel.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix(prefix))
        panel.set(title=title, xlabel="epoch")
        if panel.lines:
            panel.legend(fontsize="x-small")
    figure.savefig(home / CURVES.replace("csv", "png"))
    plt.close(figure)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
