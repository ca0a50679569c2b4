"""Several products: a model each, or one for all of them.

python -m benchmarks.several --half choosing --data ../shared/data

`each` is a fit of each product alone; `shared` the same bank and threshold each, behind one encoder, whose input was
measured on the normal images of all; `one` has one bank and one threshold for all of them. A half of the development
sets (benchmarks/products.yaml) but Magnetic Tile, whose folders are others, makes up "all".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import auto_cli
from pytorch_lightning import Trainer, seed_everything

from benchmarks.products import HALVES, append, false_alarms, read_rows
from patchad import PatchDetector, PyramidDataModule

FORMS = ("each", "shared", "one")
LEFT_OUT = "magnetic_tile"
SETTINGS: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "deterministic": True}


class Row(NamedTuple):
    """One product by a model of one form; rates in %."""

    form: str
    product: str
    detection: float
    segmentation: float
    pro: float
    normals: int
    false_alarms: int
    recall: float


def main(
    half: Literal["choosing", "confirming"],
    data: Path = Path("../shared/data"),
    folder: Path = Path("runs/several"),
    forms: tuple[str, ...] = FORMS,
) -> None:
    """Fits, tests and prints; what is in `folder` already is not measured again.

    Args:
        half: which sets.
        data: the folder that their paths are below.
        folder: where the joined set, the checkpoints and `<half>.csv` are kept.
        forms: of `FORMS`.
    """
    roots = {name: data / path for name, path in HALVES[half].items() if name != LEFT_OUT}
    results = folder / f"{half}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    known = read_rows(results, Row)
    for form in forms:
        for product, root in roots.items():
            if not any((row.form, row.product) == (form, product) for row in known):
                row = tested(form, product, root, fitted(form, root, folder / half, roots))
                append(results, row)
                known.append(row)
    print_table(known)


def print_table(rows: Sequence[Row]) -> None:
    """Prints rows as Markdown."""
    print("| form | product | detection / segmentation | PRO | false alarms | recall |\n|---|---|---|---|---|---|")
    for row in rows:
        figures = f"{row.detection:.1f} / {row.segmentation:.1f} | {row.pro:.1f}"
        alarms = false_alarms(row.false_alarms, row.normals)
        print(f"| {row.form} | {row.product} | {figures} | {alarms} | {row.recall:.1f} |")


def fitted(form: str, root: Path, folder: Path, roots: dict[str, Path]) -> PatchDetector:
    """A fitted detector of one form; what all products share is fitted once."""
    if form == "each":
        return fit(PatchDetector(), root)
    checkpoint = folder / "one.ckpt"
    if not checkpoint.is_file():
        trainer = Trainer(**SETTINGS)
        fit(PatchDetector(), joined(folder / "all", roots), trainer)
        trainer.save_checkpoint(checkpoint)
    one = PatchDetector.load_from_checkpoint(checkpoint)
    if form == "one":
        return one
    shared = PatchDetector()
    shared.model.encoder.load_state_dict(one.model.encoder.state_dict())
    return fit(shared, root)


def fit(detector: PatchDetector, root: Path, trainer: Trainer | None = None) -> PatchDetector:
    """A detector that knows what is normal of one folder."""
    seed_everything(0)
    (trainer or Trainer(**SETTINGS)).fit(detector, PyramidDataModule(root))
    return detector


def joined(folder: Path, roots: dict[str, Path]) -> Path:
    """A folder in MVTec AD's layout with links to the training images of all products, and to test images of none."""
    (folder / "train/good").mkdir(parents=True, exist_ok=True)
    for name, root in roots.items():
        for image in sorted((root / "train/good").iterdir()):
            link = folder / "train/good" / f"{name}_{image.name}"
            if not link.is_symlink():
                link.symlink_to(image.resolve())
    return folder


def tested(form: str, product: str, root: Path, detector: PatchDetector) -> Row:
    """The figures of a product."""
    data = PyramidDataModule(root)
    (metrics,) = Trainer(**SETTINGS).test(detector, data, verbose=False)
    figures = {name.removeprefix("test/"): 100 * value for name, value in metrics.items()}
    normals = sum(sample.defect == "good" for sample in data.test_set.samples)
    return Row(
        form=form,
        product=product,
        detection=figures["detection_auroc"],
        segmentation=figures["segmentation_auroc"],
        pro=figures["pro"],
        normals=normals,
        false_alarms=round(figures["false_positive_rate"] * normals / 100),
        recall=figures["recall"],
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
