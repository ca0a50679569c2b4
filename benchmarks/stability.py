"""Whether scores hold on a line: alarms of drift on normal images and in another light, and one part again and again.

python -m benchmarks.stability drift
python -m benchmarks.stability repeat --data ../shared/data --products "[bottle, screw]"

`drift` fits the default on 400 images of the embedded data set at 128 x 128 pixels and scores 2000 others, and on half
of the training images of products and scores the rest, each as they are and at 0.8 of their brightness. 2000 of these
are shuffled, an image more than once where there are fewer. `repeat` takes test images of a product several times:
moved by up to four pixels of the file, and in a light of 0.9 to 1.1 of its own.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from pytorch_lightning import Trainer

from benchmarks.products import HALVES
from benchmarks.several import SETTINGS
from benchmarks.update import drawn, linked
from patchad import PatchDetector, PatchModel, PyramidDataModule
from patchad.data.synthetic import write_synthetic
from patchad.decoding import read_pixels
from patchad.drift import Drift

ROOTS = HALVES["choosing"] | HALVES["confirming"]
NORMALS, FITTED, SIZE, WINDOW, SHUFFLES = 2000, 400, 128, 200, 10
DARKER = 0.8
MOST_SHIFT, MOST_LIGHT = 4, 0.1


def drift(
    data: Path = Path("../shared/data"),
    products: tuple[str, ...] = ("screw", "transistor", "bottle"),
    folder: Path = Path("runs/drift"),
    seed: int = 0,
) -> None:
    """Prints how many shuffles of normal images raise an alarm, and how soon darker ones do.

    Args:
        data: the folder that the paths of the development sets are below.
        products: of them, in MVTec AD's layout, beside the embedded set, whose own light varies.
        folder: where images, links and checkpoints are kept.
        seed: of what is drawn.
    """
    generator = np.random.default_rng(seed)
    write_synthetic(folder / "parts", train=FITTED, test_normal=NORMALS, test_defective=7, size=SIZE)
    embedded = PyramidDataModule(folder / "parts", image_size=SIZE, metric_size=SIZE)
    tell_drift(
        "embedded", embedded, folder / "embedded.ckpt", sorted((folder / "parts/test/good").iterdir()), generator
    )
    for product in products:
        root = data / ROOTS[product]
        training = sorted((root / "train/good").iterdir())
        fitted = drawn(training, len(training) // 2, generator)
        part = linked(folder / product, root, {"train/good": fitted})
        others = [path for path in training if path not in fitted] + sorted((root / "test/good").iterdir())
        tell_drift(product, PyramidDataModule(part), folder / f"{product}.ckpt", others, generator)


def tell_drift(
    name: str, data: PyramidDataModule, checkpoint: Path, paths: Sequence[Path], generator: np.random.Generator
) -> None:
    """Prints what a detector says of normal images that it does not know, as they are and darker."""
    model = checkpointed(checkpoint, data)
    images = [read_pixels(path) for path in paths]
    normal, darker = (p_values(model, (light * image for image in images)) for light in (1.0, DARKER))
    usual, unusual = (f"{np.mean(values <= 0.05):.1%}" for values in (normal, darker))
    print(
        f"{name}: p-values up to 0.05 have {usual} of {len(normal)} normal images, {unusual} at {DARKER} of their light"
    )
    count, alarms, delays = len(model.scorer.normals), 0, []
    for _ in range(SHUFFLES):
        watched = Drift(WINDOW, count)
        alarms += any([watched.take(value) for value in generator.choice(normal, NORMALS)])
        watched = Drift(WINDOW, count)
        for value in generator.choice(normal, WINDOW):
            watched.take(value)
        told = (number for number, value in enumerate(generator.choice(darker, NORMALS), 1) if watched.take(value))
        delays.append(next(told, NORMALS))
    after = f"after {min(delays)} to {max(delays)} darker ones, in the median {statistics.median(delays):g}"
    print(f"{name}: alarms in {alarms} of {SHUFFLES} draws of {NORMALS} normal images; {after}", flush=True)


def checkpointed(path: Path, data: PyramidDataModule) -> PatchModel:
    """The model of a fit, unless there is one."""
    if not path.is_file():
        trainer = Trainer(**SETTINGS)
        trainer.fit(PatchDetector(), data)
        trainer.save_checkpoint(path)
    return PatchModel.load(path)


def p_values(model: PatchModel, images: Iterable[np.ndarray]) -> np.ndarray:
    """Of each image."""
    return np.array([model.predict(image).p_value for image in images])


def repeat(
    data: Path = Path("../shared/data"),
    products: tuple[str, ...] = ("bottle", "screw"),
    folder: Path = Path("runs/repeat"),
    times: int = 10,
    images: int = 40,
    brightness: float | None = None,
    seed: int = 0,
) -> None:
    """Prints by how much scores of one part differ, and how many verdicts with them.

    Args:
        data: the folder that the paths of the development sets are below.
        products: of them.
        folder: where checkpoints are kept.
        times: how often each image is taken.
        images: of each product, half of them normal ones.
        brightness: `data.brightness` of the fit.
        seed: of what is drawn.
    """
    print("| product | image is | images | spread of the score | verdicts that flip |\n|---|---|---|---|---|")
    for product in products:
        root = data / ROOTS[product]
        path = folder / f"{product}_{brightness}.ckpt"
        model = checkpointed(path, PyramidDataModule(root, brightness=brightness))
        generator = np.random.default_rng(seed)
        files = sorted((root / "test").glob("*/*.png"))
        for label in ("normal", "anomalous"):
            chosen = [file for file in files if (file.parent.name == "good") == (label == "normal")]
            chosen = [chosen[number] for number in generator.permutation(len(chosen))[: images // 2]]
            taken = [retaken(model, read_pixels(file), times, generator) for file in chosen]
            spread = np.median([np.std(scores) / np.mean(scores) for scores in taken])
            above = [int((scores > model.scorer.limits.threshold).sum()) for scores in taken]
            flips = sum(0 < count < times for count in above)
            print(f"| {product} | {label} | {len(chosen)} | {spread:.1%} of it (median) | {flips} of {len(chosen)} |")


def retaken(model: PatchModel, image: np.ndarray, times: int, generator: np.random.Generator) -> np.ndarray:
    """Scores of one part, moved and in another light each time."""
    scores = []
    for _ in range(times):
        down, right = generator.integers(0, 2 * MOST_SHIFT, 2, endpoint=True)
        margins = [(MOST_SHIFT, MOST_SHIFT)] * 2 + [(0, 0)] * (image.ndim - 2)
        padded = np.pad(image, margins, mode="edge")
        moved = padded[down : down + image.shape[0], right : right + image.shape[1]]
        light = generator.uniform(1 - MOST_LIGHT, 1 + MOST_LIGHT)
        scores.append(model.predict((moved * light).clip(0, 1).astype(np.float32)).score)
    return np.array(scores)


if __name__ == "__main__":
    auto_cli([drift, repeat], as_positional=False)
