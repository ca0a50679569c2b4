"""Images/s of `patchad score` and `patchad predict` on a folder, beside what each stage takes alone, as Markdown.

patchad export --ckpt_path runs/version_0/checkpoints/last.ckpt --output screw.patchad
python -m benchmarks.pipeline --file screw.patchad --checkpoint runs/version_0/checkpoints/last.ckpt \
    --images screw/test/good

Images are enlarged to 12 megapixels as JPEG files, and brought to 256 x 256 pixels as PNG files, with a sensor's noise.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jsonargparse import auto_cli
from PIL import Image, ImageOps

import patchad
from patchad.canvas import Size
from patchad.decoding import read_picture
from patchad.folders import images_below
from patchad.results import Scored, Source, row_of
from patchad.runtime import ExportedDetector, on_canvas, planes_of, region_above
from patchad.stages import timed

NOISE = 3
"""Deviation of the sensor's noise, of 255."""
QUALITY = 92


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

    What a command takes for one image, such as its start, is taken off what it takes for all.

    Args:
        file: what `patchad export` wrote.
        images: a folder of the product.
        checkpoint: what it was exported from; without it `patchad predict` is left out.
        count: images of each folder.
        distinct: how many of them differ; the others are hard links.
    """
    detector = patchad.load(file)
    with tempfile.TemporaryDirectory() as place:
        for kind in KINDS:
            folder = Path(place) / kind.suffix
            sources = images_below(images)
            filled(folder / "all", kind, sources[:: -(-len(sources) // distinct)], count)
            filled(folder / "one", kind, sources[:1], 1)
            print(f"\n{count} files, {kind.name}, {os.cpu_count()} cores\n", flush=True)
            stages = stage_times(detector, images_below(folder / "all")[: 3 * distinct])
            print(table(stages, command_rates(file, checkpoint, folder, count)), flush=True)


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


def command_rates(file: Path, checkpoint: Path | None, folder: Path, count: int) -> dict[str, float]:
    """Images/s of each command on so many images in a folder `all`, beside one in a folder `one`."""
    commands: dict[str, Callable[[Path], list[object]]] = {
        "score": lambda images: [file, images, "--output", folder / "rows.csv"]
    }
    if checkpoint is not None:
        plain = ["--trainer.enable_progress_bar=false", f"--trainer.logger.save_dir={folder / 'runs'}"]
        commands["predict"] = lambda images: [f"--ckpt_path={checkpoint}", f"--data.root={images}", *plain]
    rates = {}
    for name, arguments in commands.items():
        one, many = (seconds(name, arguments(folder / images)) for images in ("one", "all"))
        rates[f"patchad {name}"] = (count - 1) / (many - one)
    return rates


def seconds(name: str, arguments: Sequence[object]) -> float:
    """How long a command takes."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "patchad", name, *map(str, arguments)], check=True, capture_output=True)
    return time.perf_counter() - begun


def table(stages: Mapping[str, float], rates: Mapping[str, float]) -> str:
    """Stages, their sum, the slowest, and commands, in Markdown."""
    slowest, total = max(stages.values()), sum(stages.values())
    alone = {**stages, "all, one after the other": total}
    lines = ["| | ms | images/s | over the slowest stage | over the sum |", "|---|---|---|---|---|"]
    for name, rate in [*((name, 1e3 / ms) for name, ms in alone.items()), *rates.items()]:
        lines.append(
            f"| {name} | {1e3 / rate:.1f} | {rate:.1f} | {rate * slowest / 1e3:.2f} | {rate * total / 1e3:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
