"""The default on the embedded data set, drawn anew from each seed, as CSV and as Markdown.

python -m benchmarks.quickstart --seeds 10
"""

from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.products import PLACE, append, ended, measure, pooled, table
from patchad.data.synthetic import write_synthetic


def main(
    seeds: int = 10,
    folder: Path = Path("runs/quickstart-seeds"),
    results: Path = PLACE / "quickstart.csv",
    options: tuple[str, ...] = (),
) -> None:
    """Fits and tests what is missing, and prints the table.

    Args:
        seeds: how many, from 0 on; each is the seed of the images and of the fit.
        folder: where images and runs are kept.
        results: the CSV.
        options: of `patchad fit`.
    """
    for seed in range(seeds):
        if not any(row.seed == seed for row in ended(results)):
            root = folder / f"images-{seed}"
            write_synthetic(root, seed=seed)
            append(results, measure("default", "synthetic", root, seed, folder, options))
    rows = ended(results)
    print(*table(rows), f"\nFalse alarms of all seeds, whose images differ: {pooled(rows)}", sep="\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
