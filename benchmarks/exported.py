"""How long an exported file takes for each image of a folder, one at a time, in ONNX Runtime, as Markdown.

patchad export --ckpt_path runs/version_0/checkpoints/last.ckpt --output screw.patchad
python -m benchmarks.exported --file screw.patchad --images screw/test
"""

from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

import patchad
from patchad.data.images import read_image
from patchad.data.layouts import images_below
from patchad.runtime import ExportedDetector
from patchad.timing import CPU, Clock


def main(file: Path, images: Path, every: int = 6, warm: int = 3) -> None:
    """Prints one row: the size of the file, and milliseconds from an array in memory to its score.

    Args:
        file: what `patchad export` wrote.
        images: a folder.
        every: only each so many of its images.
        warm: runs before the first that counts.
    """
    detector = patchad.load(file)
    arrays = [read_image(path).permute(1, 2, 0).numpy() for path in images_below(images)[::every]]
    times = [timed(detector, array) for array in (*arrays[:1] * warm, *arrays)][warm:]
    vectors = ", ".join(map(str, detector.metadata["vectors"].values()))
    median, slow, slowest = np.median(times), np.percentile(times, 95), max(times)
    print("| vectors per side | file, MB | images | median ms | 95th percentile | slowest |\n|---|---|---|---|---|---|")
    print(
        f"| {vectors} | {file.stat().st_size / 1e6:.0f} | {len(arrays)} | {median:.1f} | {slow:.1f} | {slowest:.1f} |"
    )


def timed(detector: ExportedDetector, array: np.ndarray) -> float:
    """Milliseconds of one score."""
    clock = Clock(CPU)
    detector(array)
    return clock()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
