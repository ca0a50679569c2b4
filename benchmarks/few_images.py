"""How many normal images it takes, and what mirrored ones add to few, as Markdown.

python -m benchmarks.few_images --data ../shared/data

The first normal images of the choosing half of benchmarks/products.yaml, with `model.mirrored` and without. A table
that was stopped goes on with the fits that it made.
"""

import itertools
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.products import HALVES, measure


def main(
    data: Path = Path("../shared/data"),
    products: tuple[str, ...] = tuple(HALVES["choosing"]),
    counts: tuple[int, ...] = (24, 70),
    folder: Path = Path("runs/few_images"),
) -> None:
    """Prints the table.

    Args:
        data: the folder that the paths of the products are below.
        products: of the choosing half.
        counts: of normal images.
        folder: where images are linked and runs are kept.
    """
    print("| images | mirrored | set | seed | detection / segmentation | PRO | pixel AP | alarms | recall | ms | s |")
    print("|---" * 11 + "|")
    for product, count, mirrored in itertools.product(products, counts, (False, True)):
        root = first_images(data / HALVES["choosing"][product], folder / f"{product}-{count}", count)
        row = measure("few_images", product, root, 0, folder, [f"--model.mirrored={str(mirrored).lower()}"])
        print(f"| {count} | {mirrored} {row.markdown()}", flush=True)


def first_images(root: Path, place: Path, count: int) -> Path:
    """A folder like a product's in MVTec AD's layout, with so many of its normal images, linked."""
    normals = place / "train" / "good"
    if not normals.is_dir():
        normals.mkdir(parents=True)
        for path in sorted((root / "train" / "good").iterdir())[:count]:
            (normals / path.name).symlink_to(path.resolve())
        for name in ("test", "ground_truth"):
            (place / name).symlink_to((root / name).resolve())
    return place


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
