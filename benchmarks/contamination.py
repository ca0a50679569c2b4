"""What defects among the training images cost, and whether fit names them, as Markdown.

python -m benchmarks.contamination --root ../shared/data/development/screw_384

Defective test images, one of each type in turn, are linked among the training images. Those of the last row are left
out of the test in every row. A table that was stopped goes on with the fits that it made.
"""

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from benchmarks.tables import Images, fit, tested
from patchad.callbacks import PossibleDefects
from patchad.checkpoint import read_checkpoint
from patchad.data.layouts import MVTecAD
from patchad.types import NORMAL

FIGURES = ("detection_auroc", "segmentation_auroc", "pro", "false_positive_rate", "recall")


def main(
    root: Path = Path("../shared/data/development/screw_384"),
    counts: tuple[int, ...] = (0, 1, 3, 5),
    seed: int = 0,
    folder: Path = Path("runs/contamination"),
) -> None:
    """Prints the table.

    Args:
        root: a product in MVTec AD's layout.
        counts: of defects among the training images.
        seed: of the choice of the defects, and of the fits.
        folder: where images are linked and runs are kept.
    """
    chosen, named = defects(root, max(counts), seed), PossibleDefects().images
    print(f"| defects among {root.name} | ranks by p-value | named of {named} | {' | '.join(FIGURES)} |")
    print("|---" * (3 + len(FIGURES)) + "|")
    for count in counts:
        place = linked(root, folder / f"{root.name}-{count}", chosen[:count], chosen)
        fitted = fit({}, Images(root.name, ["--data.root", str(place)]), seed, Path("weights"), folder, 1, [])
        found = ranks(place, fitted.checkpoint)
        listed, in_list = ", ".join(map(str, found)) or "-", sum(rank <= named for rank in found)
        metrics = tested({}, fitted).metrics
        print(
            f"| {count} | {listed} | {in_list} | {' | '.join(f'{metrics[name]:.1f}' for name in FIGURES)} |", flush=True
        )


def defects(root: Path, count: int, seed: int) -> list[Path]:
    """So many defective test images, one of each type in turn."""
    samples = [sample for sample in MVTecAD().samples(root) if sample.split == "test" and sample.defect != NORMAL]
    order = np.random.default_rng(seed).permutation(len(samples))
    types: dict[str, list[Path]] = {}
    for number in order:
        types.setdefault(samples[number].defect, []).append(samples[number].path)
    return [path for path in chain(*zip_longest(*types.values())) if path][:count]


def linked(root: Path, place: Path, among: Sequence[Path], left_out: Sequence[Path]) -> Path:
    """A folder like a product's, with defects among its training images, and without some test images."""
    for source in sorted(root.rglob("*.png")):
        target = place / source.relative_to(root)
        if source not in left_out and not target.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source.resolve())
    for source in among:
        target = place / "train/good" / f"{source.parent.name}-{source.name}"
        if not target.is_symlink():
            target.symlink_to(source.resolve())
    return place


def ranks(place: Path, checkpoint: Path) -> list[int]:
    """Of each defect among the training images, how many of them score as high or higher, itself among them."""
    scores = read_checkpoint(checkpoint)["state_dict"]["model.scorer.normals"].numpy()
    images = [sample.path for sample in MVTecAD().samples(place) if sample.split == "train"]
    planted = [number for number, path in enumerate(images) if "-" in path.stem]
    return sorted(int((scores >= scores[number]).sum()) for number in planted)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
