"""What normal images that are added after a fit do, beside a fit that knew them.

python -m benchmarks.update --data ../shared/data --products "[wood, screw]"

Of each product: fitted without 20 of its training normals, with these added by `patchad update`, and fitted with all;
each measured on the whole test. Then half of the good test images, drawn by the seed, are added to the full fit, and
the other half is measured with the defects, before and after. No image is added and measured.
"""

from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from pytorch_lightning import Trainer

from benchmarks.products import HALVES
from benchmarks.several import SETTINGS, Row, fit, print_table, tested
from patchad import PatchDetector
from patchad.cli import main as command
from patchad.files import write_whole

ADDED = 20
ROOTS = HALVES["choosing"] | HALVES["confirming"]


def main(
    data: Path = Path("../shared/data"),
    products: tuple[str, ...] = ("wood", "screw"),
    folder: Path = Path("runs/update"),
    seed: int = 0,
) -> None:
    """Fits, updates, tests and prints.

    Args:
        data: the folder that the paths of the development sets are below.
        products: of them, in MVTec AD's layout.
        folder: where links and checkpoints are kept.
        seed: of what is drawn.
    """
    rows = [row for name in products for row in measured(name, data / ROOTS[name], folder / name, seed)]
    print_table(rows)


def measured(product: str, root: Path, folder: Path, seed: int) -> list[Row]:
    """The rows of one product."""
    generator = np.random.default_rng(seed)
    training, good = (sorted((root / place / "good").iterdir()) for place in ("train", "test"))
    later = drawn(training, ADDED, generator)
    part = linked(folder / "part", root, {"train/good": [path for path in training if path not in later]})
    first = checkpoint(part, folder / "part.ckpt")
    added = updated(first, linked(folder / "later", root, {"": later}), folder / "added.ckpt")
    full = checkpoint(root, folder / "full.ckpt")
    half = drawn(good, len(good) // 2, generator)
    others = linked(folder / "others", root, {"test/good": [path for path in good if path not in half]})
    more = updated(full, linked(folder / "half", root, {"": half}), folder / "more.ckpt")
    steps = {
        f"fitted without {ADDED}": (first, root),
        f"these {ADDED} added": (added, root),
        "fitted with all": (full, root),
        "fitted with all, half of the good test images": (full, others),
        "that other half added": (more, others),
    }
    return [
        tested(form, product, tests, PatchDetector.load_from_checkpoint(path)) for form, (path, tests) in steps.items()
    ]


def drawn(paths: list[Path], count: int, generator: np.random.Generator) -> list[Path]:
    """Some of the files."""
    return [paths[number] for number in sorted(generator.choice(len(paths), count, replace=False).tolist())]


def linked(folder: Path, root: Path, files: dict[str, list[Path]]) -> Path:
    """A folder of links to some files, by the folder below it, and to all else of a product."""
    for place, paths in files.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        for path in paths:
            link(folder / place / path.name, path)
    if "" not in files:
        for place in ("train/good", *(f"test/{kind.name}" for kind in (root / "test").iterdir()), "ground_truth"):
            if place not in files:
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                link(folder / place, root / place)
    return folder


def link(name: Path, target: Path) -> None:
    """Makes a link, unless there is one."""
    if not name.is_symlink():
        name.symlink_to(target.resolve())


def checkpoint(root: Path, path: Path) -> Path:
    """The checkpoint of a fit, unless there is one."""
    if not path.is_file():
        trainer = Trainer(**SETTINGS)
        fit(PatchDetector(), root, trainer)
        write_whole(path, trainer.save_checkpoint)
    return path


def updated(path: Path, normal: Path, output: Path) -> Path:
    """The checkpoint with normal images added."""
    command(["update", f"--ckpt_path={path}", f"--normal={normal}", f"--output={output}"])
    return output


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
