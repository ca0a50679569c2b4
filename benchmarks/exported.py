"""How long an exported file takes for each image of a folder, beside a peer on the same images, as Markdown.

pip install ".[bench]"
patchad export --ckpt_path runs/version_0/checkpoints/last.ckpt --output screw.patchad
python -m benchmarks.exported --file screw.patchad --images screw/test
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn import functional as F

import patchad
from benchmarks.speed import SIZE, peer, peer_ways, quiet, write_peer
from patchad.folders import images_below
from patchad.images import read_image
from patchad.timing import CPU, Clock

PEER = "PaDiM ResNet18"
Way = Callable[[Tensor], object]


@quiet()
def main(file: Path, images: Path, every: int = 6, warm: int = 3, beside: bool = True) -> None:
    """Prints what the file holds and the milliseconds of one score, from an image in memory.

    Each image is scored by all in turn, one image at a time.

    Args:
        file: what `patchad export` wrote.
        images: a folder.
        every: only each so many of its images.
        warm: runs before the first that counts.
        beside: whether PaDiM with ResNet18 runs in turns with it, on the images at its own 256 x 256.
    """
    detector = patchad.load(file)
    ways: dict[str, Way] = {file.name: lambda image: detector(image.permute(1, 2, 0).numpy())}
    if beside:
        ways |= ways_of_peer()
    pictures = [read_image(path) for path in images_below(images)[::every]]
    times = timed(ways, [*pictures[:1] * warm, *pictures])
    megabytes, vectors = file.stat().st_size / 1e6, detector.metadata["vectors"]
    print(f"{megabytes:.0f} MB; vectors per side {vectors}; {len(pictures)} images\n")
    print("| | median ms | 95th percentile | slowest |\n|---|---|---|---|")
    for name, measured in times.items():
        milliseconds = measured[warm:]
        median, slow, slowest = np.median(milliseconds), np.percentile(milliseconds, 95), max(milliseconds)
        print(f"| {name} | {median:.1f} | {slow:.1f} | {slowest:.1f} |")


def ways_of_peer() -> dict[str, Way]:
    """The peer's exported file in each runtime; the nearest pixels at its size are taken within its time."""
    image = torch.zeros(1, 3, SIZE, SIZE)
    array = image.numpy()
    with tempfile.TemporaryDirectory() as folder:
        ways = peer_ways(write_peer(peer(PEER), image, Path(folder) / "peer.onnx"), image)

    def run(way: str) -> Way:
        def score(image: Tensor) -> object:
            array[:] = F.interpolate(image[None], (SIZE, SIZE)).numpy()
            return ways[way]()

        return score

    return {f"{PEER}, {way}": run(way) for way in ways}


def timed(ways: Mapping[str, Way], images: list[Tensor]) -> dict[str, list[float]]:
    """Milliseconds of each image by each way, in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for image in images:
        for name, way in ways.items():
            clock = Clock(CPU)
            way(image)
            times[name].append(clock())
    return times


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
