"""All systems of the paper's comparison on the same sets by one protocol, beside what was published of them.

python -m benchmarks.compared --data ../shared/data --weights weights --minutes 600

Systems, sets and published figures stand in benchmarks/compared.yaml. Every system is fitted by `patchad fit` with seed
0 and tested after its last epoch: nothing is chosen on test. What was run is kept below `runs/compared`, and rows in
benchmarks/compared.csv: the same command goes on where the last one ended, in the middle of a fit, too. Without
--minutes nothing runs, and the tables are printed from the CSV.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli

from benchmarks.portions import Row, figures, latest, measure
from benchmarks.products import PLACE
from benchmarks.tables import Images, images_of

COMPARED: dict[str, Any] = yaml.safe_load((PLACE / "compared.yaml").read_text())
COLUMNS = (
    "system",
    "detection / segmentation",
    "PRO",
    "epochs",
    "ms",
    "fit, MB",
    "checkpoint, MB",
    "fit, s",
    "measured",
)


def main(
    data: Path = Path("../shared/data"),
    weights: Path = Path("weights"),
    minutes: float = 0,
    systems: tuple[str, ...] = (),
    folder: Path = Path("runs/compared"),
    results: Path = PLACE / "compared.csv",
    options: tuple[str, ...] = (),
) -> None:
    """Runs what is missing while there is time, set by set, and prints a table of each.

    Args:
        data: the folder that the paths of the sets are below.
        weights: folder of files of weights.
        minutes: after which no epoch begins; what is under way is tested after that.
        systems: names of some; by default all.
        folder: where runs are kept.
        results: the CSV.
        options: further ones for every row of `patchad fit`.
    """
    sets = {name: data / path for name, path in COMPARED["sets"].items()}
    known = [row["name"] for row in COMPARED["systems"]]
    if unknown := set(systems) - set(known):
        raise SystemExit(f"--systems {', '.join(sorted(unknown))}: known are {'; '.join(known)}")
    rows = [row for row in COMPARED["systems"] if not systems or row["name"] in systems]
    tasks = by_set(rows, sets)
    measure([(row, images) for images, row in tasks], results, weights, folder, minutes, options)
    for name in dict.fromkeys(images.name for images, _ in tasks):
        print(f"\n{name} ({COMPARED['comparable'].get(name, 'nothing is published of it')})\n")
        print(*table([latest(results, row["name"], name) for images, row in tasks if images.name == name]), sep="\n")
    print("\nPublished, with the mean of MVTec AD's 15 classes\n", *map(source, published()), sep="\n")


def by_set(rows: Sequence[dict[str, Any]], sets: Mapping[str, Path]) -> list[tuple[Images, dict[str, Any]]]:
    """What is to be measured: all systems on one set, and then those on the next."""
    tasks = [(images, row) for row in rows for images in images_of(row, sets)]
    names = list(dict.fromkeys(images.name for images, _ in tasks))
    return sorted(tasks, key=lambda task: names.index(task[0].name))


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of one set: what was measured, and what was published."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(line, rows)]
    known = [(entry["system"], entry["figures"].get(rows[0].data)) for entry in published()]
    return lines + [f"| *{system}, published* | {pair}" + " |" * (len(COLUMNS) - 1) for system, pair in known if pair]


def line(row: Row) -> str:
    """One line."""
    if not row.measured:
        return f"| {row.name} | {row.state}" + " |" * (len(COLUMNS) - 1)
    pair, sizes = figures(row.detection, row.segmentation), (row.milliseconds, row.fit_megabytes)
    rest = (*sizes, row.checkpoint_megabytes, row.fit_seconds)
    cells = [row.name, pair, f"{row.pro:.1f}", row.state.removesuffix(" epochs"), *(f"{value:.0f}" for value in rest)]
    return f"| {' | '.join(cells)} | {row.date}, {row.commit}, {row.machine} |"


def source(entry: Mapping[str, Any]) -> str:
    """Where published figures come from."""
    return f"* {entry['system']}, {entry['figures'].get('mean', '-')}: {entry['protocol']}. {entry['source']}"


def published() -> list[dict[str, Any]]:
    """What others say."""
    return COMPARED["published"]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
