"""Whether both runtimes say the same of all test images of a detector, as Markdown.

pip install ".[openvino]"
patchad export --ckpt_path runs/version_0/checkpoints/last.ckpt --output screw.patchad
python -m benchmarks.runtimes --files '{"screw.patchad": "runs/version_0/checkpoints/last.ckpt"}'
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jsonargparse import auto_cli

import patchad
from patchad import PyramidDataModule
from patchad.runtime import to_rgb

RUNTIMES = ("onnxruntime", "openvino")


class Pair(NamedTuple):
    """What both runtimes say of an image, in the order of `RUNTIMES`.

    Attributes:
        path: of the image.
        verdicts: of both.
        scores: of both.
        map: difference of the pixel that differs most, over the highest pixel of the first.
    """

    path: str
    verdicts: tuple[str, str]
    scores: tuple[float, float]
    map: float

    @property
    def score(self) -> float:
        """Difference of the scores, over the first."""
        first, second = self.scores
        return abs(second - first) / abs(first)


def main(files: Mapping[str, Path], threads: int | None = None) -> None:
    """Prints a row for each file, and a line for each image of which the verdicts differ.

    Args:
        files: what `patchad export` wrote, and the checkpoint of each, whose test images are scored.
        threads: of the CPU; by default one per core.
    """
    print("| file | images | verdicts that differ | score, largest relative difference | pixel, over the highest |")
    print("|---|---|---|---|---|")
    differing = []
    for file, checkpoint in files.items():
        pairs = list(scored(Path(file), checkpoint, threads))
        differing_here = [pair for pair in pairs if len({*pair.verdicts}) > 1]
        score, pixel = (max(getattr(pair, part) for pair in pairs) for part in ("score", "map"))
        print(f"| {Path(file).stem} | {len(pairs)} | {len(differing_here)} | {score:.1e} | {pixel:.1e} |", flush=True)
        differing += [(file, pair) for pair in differing_here]
    print()
    for file, pair in differing:
        verdicts = (f"{verdict}, {score:.9g}" for verdict, score in zip(pair.verdicts, pair.scores, strict=True))
        print(f"* {pair.path}, {file}: {'; '.join(verdicts)}")


def scored(file: Path, checkpoint: Path, threads: int | None) -> Iterator[Pair]:
    """What both say of each test image."""
    data = PyramidDataModule.load_from_checkpoint(checkpoint)
    data.setup("test")
    first, second = (patchad.load(file, threads, runtime=runtime) for runtime in RUNTIMES)
    for sample in data.test_set.samples:
        image = to_rgb(sample.path)
        one, other = first(image), second(image)
        pixel = float(np.abs(other.map - one.map).max() / one.map.max())
        yield Pair(str(sample.path), (one.verdict, other.verdict), (one.score, other.score), pixel)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
