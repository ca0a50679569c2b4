"""Images/s of `patchad score` and `patchad predict` on a folder, beside what each stage takes alone, as Markdown.

patchad export --ckpt_path runs/version_0/checkpoints/last.ckpt --output screw.patchad
python -m benchmarks.pipeline --file screw.patchad --checkpoint runs/version_0/checkpoints/last.ckpt \
    --images screw/test/good

Images are enlarged to 12 megapixels as JPEG files, and brought to 256 x 256 pixels as PNG files, with a sensor's noise.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image, ImageOps

import patchad
from benchmarks import tables
from patchad import PatchModel
from patchad.canvas import Size
from patchad.decoding import read_picture
from patchad.folders import images_below
from patchad.results import Scored, Source, row_of
from patchad.runtime import ExportedDetector, on_canvas, planes_of, region_above
from patchad.stages import timed
from patchad.timing import alternate

NOISE = 3
"""Deviation of the sensor's noise, of 255."""
QUALITY = 92
BATCH = 8
"""Images that `patchad predict` scores at once, by default."""


class Kind(NamedTuple):
    """A folder of images.

    Attributes:
        name: of the kind.
        size: height x width in pixels.
        suffix: of the files.
    """

    name: str
    size: Size
    suffix: str


KINDS = (Kind("12 megapixel JPEG", (3464, 3464), ".jpg"), Kind("256 x 256 PNG", (256, 256), ".png"))


def main(file: Path, images: Path, checkpoint: Path | None = None, count: int = 2000, distinct: int = 8) -> None:
    """Prints milliseconds of each stage of one image, and images/s of whole commands over those of the slowest stage.

    What a command takes for a few images, such as its start, is taken off what it takes for all.

    Args:
        file: what `patchad export` wrote.
        images: a folder of the product.
        checkpoint: what it was exported from; without it `patchad predict` is left out.
        count: images of each folder.
        distinct: how many of them differ; the others are hard links.
    """
    detector = patchad.load(file)
    eager = 0.0 if checkpoint is None else eager_time(PatchModel.load(checkpoint).eval())
    with tempfile.TemporaryDirectory() as place:
        for kind in KINDS:
            folder = Path(place) / kind.suffix
            sources = images_below(images)
            filled(folder / "all", kind, sources[:: -(-len(sources) // distinct)], count)
            filled(folder / "few", kind, sources[:BATCH], BATCH)
            print(f"\n{count} files, {kind.name}, {os.cpu_count()} cores\n", flush=True)
            stages = stage_times(detector, images_below(folder / "all")[: 3 * distinct])
            print(table("score", stages, score_rate(file, folder, count)), flush=True)
            if checkpoint is not None:
                stages = {"decode": stages["decode"], "canvas": stages["canvas"], "model, eager": eager}
                print(table("predict", stages, predict_rate(checkpoint, folder, count)), flush=True)


def filled(folder: Path, kind: Kind, sources: Sequence[Path], count: int) -> None:
    """Fills a folder with so many images of a kind, made of a few."""
    folder.mkdir(parents=True)
    generator, height, width = np.random.default_rng(0), *kind.size
    made = [folder / f"{number:05}{kind.suffix}" for number in range(min(count, len(sources)))]
    for path, source in zip(made, sources, strict=False):
        with Image.open(source) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width, height))  # cut, not distorted
            pixels = np.asarray(fitted, np.float32)
        noisy = pixels + NOISE * generator.standard_normal((height, width, 1), dtype=np.float32)
        Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
    for number in range(len(made), count):
        os.link(made[number % len(made)], folder / f"{number:05}{kind.suffix}")


def stage_times(detector: ExportedDetector, paths: Sequence[Path]) -> dict[str, float]:
    """Median milliseconds of each stage, one image after the other; the first warms up."""
    runs = [stages_of(detector, path) for path in paths][1:]
    return {stage: float(np.median([run[stage] for run in runs])) for stage in runs[0]}


def stages_of(detector: ExportedDetector, path: Path) -> dict[str, float]:
    """Milliseconds of each stage of one image."""
    times: dict[str, float] = {}
    with timed(times, "decode"):
        picture = read_picture(path, detector.canvas)
    with timed(times, "canvas"):
        placed = on_canvas(planes_of(picture, detector.canvas).pixels, detector.canvas)
    with timed(times, "graph"):
        scores, maps = detector.run([placed], [None])
    score, limits, (height, width) = float(scores[0]), detector.limits, placed[1]
    scored = Scored(score, score > limits.threshold, limits.verdict(score), 1.0, maps[0, :height, :width])
    with timed(times, "region at size"):
        region = region_above(scored.map, picture.size, limits.map_threshold)
    with timed(times, "row"):
        row_of(str(path), scored, limits, Source("", "", ""), region=region)
    return times


@torch.inference_mode()
def eager_time(model: PatchModel) -> float:
    """Median milliseconds of one image of a batch in the model as `patchad predict` runs it."""
    assert model.canvas is not None
    size = model.canvas.image_size
    images, content = torch.rand(BATCH, 3, *size), torch.tensor([size] * BATCH)
    return float(np.median(alternate({"model": partial(model, images, content)}, 5)["model"])) / BATCH


def score_rate(file: Path, folder: Path, count: int) -> float:
    """Images/s of `patchad score`."""
    return rate(lambda images: ["score", file, images, "--output", folder / "rows.csv"], folder, count)


def predict_rate(checkpoint: Path, folder: Path, count: int) -> float:
    """Images/s of `patchad predict`."""
    plain = [f"--ckpt_path={checkpoint}", "--trainer.enable_progress_bar=false"]
    runs = f"--trainer.logger.save_dir={folder / 'runs'}"
    return rate(lambda images: ["predict", *plain, runs, f"--data.root={images}"], folder, count)


def rate(command: Callable[[Path], Sequence[object]], folder: Path, count: int) -> float:
    """Images/s of a command on so many images in a folder `all`, less what it takes for those in a folder `few`."""
    few, many = (tables.timed(*map(str, command(folder / images))).seconds for images in ("few", "all"))
    return (count - BATCH) / (many - few)


def table(command: str, stages: Mapping[str, float], rate: float) -> str:
    """Stages, their sum, and a command of so many images/s, beside the slowest of them and their sum, in Markdown."""
    slowest, total = max(stages.values()), sum(stages.values())
    times = {**stages, "all, one after the other": total, f"patchad {command}": 1e3 / rate}
    lines = ["| | ms | images/s | over the slowest stage | over the sum |", "|---|---|---|---|---|"]
    for name, ms in times.items():
        lines.append(f"| {name} | {ms:.1f} | {1e3 / ms:.1f} | {slowest / ms:.2f} | {total / ms:.2f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
