"""Whether memory, threads and open files stay as they are over many images, as Markdown.

python -m benchmarks.soak

An exported file scores images in one process, without torch; `patchad predict` scores copies of them, with its data
workers and maps. Both are watched from outside, by /proc.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from jsonargparse import auto_cli

from patchad.data.synthetic import write_synthetic
from patchad.folders import images_below

SCORE = """
import sys
from itertools import cycle, islice
import patchad
file, count, *images = sys.argv[1:]
detector = patchad.load(file)
for image in islice(cycle(images), int(count)):
    print(detector(image).score, flush=True)
"""
FIT = ("--data.image_size=96", "--data.metric_size=96", "--model.bank.max_vectors=500", "--trainer.accelerator=cpu")
OUTPUT = "output.txt"
PATCHAD = (sys.executable, "-m", "patchad")
PARTS = 10


class Usage(NamedTuple):
    """What a process and its children hold.

    Attributes:
        megabytes: of memory, resident; what they share counts for each.
        threads: of all.
        handles: open files, of all.
    """

    megabytes: float
    threads: float
    handles: float


SHARES, AMOUNTS = Usage(0.02, 0, 0.1), Usage(5, 0, 0)
"""How much more the last fifth may hold than the second: images that are on their way are open files, now more, now
fewer."""


def main(
    data: Path | None = None, checkpoint: Path | None = None, scores: int = 10_000, predictions: int = 2_000
) -> None:
    """Scores, and prints a table of each way.

    Args:
        data: a folder of images; by default small synthetic ones.
        checkpoint: what scores them; by default a fit of small synthetic images.
        scores: how many by the exported file; images are taken over and over.
        predictions: how many by `patchad predict`.

    Raises:
        SystemExit: with 1 if something grew.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, product = Path(name), Path(name) / "product"
        write_synthetic(product, train=12, test_normal=4, test_defective=7, size=96)
        fitted = checkpoint.resolve() if checkpoint else fit(product, folder)
        subprocess.run([*PATCHAD, "export", f"--ckpt_path={fitted}"], cwd=folder, check=True, capture_output=True)
        images = images_below(data.resolve() if data else product / "test")
        many = copies(images, predictions, folder / "many")
        score = [sys.executable, "-c", SCORE, "model.patchad", str(scores), *map(str, images)]
        predict = [*PATCHAD, "predict", f"--ckpt_path={fitted}", f"--data.root={many}", "--trainer.logger.version=many"]
        kept = folder / "runs/many/predictions/.0.csv.part"  # a line for each image
        ways = {"patchad.load": (score, folder / OUTPUT, scores), "patchad predict": (predict, kept, predictions)}
        grew = [report(title, watched(folder, *way), way[-1]) for title, way in ways.items()]
    sys.exit(any(grew))


def report(title: str, usages: Sequence[Usage], count: int) -> bool:
    """Prints the table of one way; returns whether something grew."""
    grew = has_grown(usages)
    print(f"{title}, {count} images: {'grew' if grew else 'nothing grew'}\n", *table(usages, count), "", sep="\n")
    return grew


def fit(product: Path, folder: Path) -> Path:
    """The checkpoint of a small detector."""
    command = [*PATCHAD, "fit", f"--data.root={product}", *FIT, "--trainer.logger.version=fit"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "runs/fit/checkpoints/last.ckpt"


def copies(images: Sequence[Path], count: int, folder: Path) -> Path:
    """A folder of so many images, which are taken over and over."""
    folder.mkdir()
    for number, image in enumerate(islice(cycle(images), count)):
        shutil.copy(image, folder / f"{number:06d}{image.suffix}")
    return folder


def watched(folder: Path, command: Sequence[str], progress: Path, count: int) -> list[Usage]:
    """The most that a command holds in each tenth of its images.

    Args:
        folder: the current one of the command, where its output goes into a file.
        command: to run.
        progress: a file that gets a line for each image.
        count: how many images.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    found: list[list[Usage]] = [[] for _ in range(PARTS)]
    with (
        (folder / OUTPUT).open("w") as output,
        subprocess.Popen(command, cwd=folder, stdout=output) as process,
    ):
        while process.poll() is None:
            with suppress(FileNotFoundError, ProcessLookupError):  # a process has ended, or not begun
                done = progress.read_bytes().count(b"\n")
                if 0 < done < count:
                    found[done * PARTS // count].append(usage(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return [most(part) for part in found]


def usage(pid: int) -> Usage:
    """What a process and its children hold now."""
    place = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    own = Usage(
        megabytes=int(status.get("VmRSS", "0").split()[0]) / 1024,
        threads=int(status["Threads"]),
        handles=len(list((place / "fd").iterdir())),
    )
    children = [child for task in place.glob("task/*/children") for child in task.read_text().split()]
    return Usage(*map(sum, zip(own, *map(usage, map(int, children)), strict=True)))


def table(usages: Sequence[Usage], count: int) -> list[str]:
    """The lines of a table."""
    rows = (
        f"| {(number + 1) * count // PARTS} | {one.megabytes:.1f} | {one.threads:g} | {one.handles:g} |"
        for number, one in enumerate(usages)
    )
    return ["| images | memory, MB | threads | open files |", "|---" * 4 + "|", *rows]


def most(usages: Iterable[Usage]) -> Usage:
    """The most of each."""
    return Usage(*map(max, zip(*usages, strict=True)))


def has_grown(usages: Sequence[Usage]) -> bool:
    """Whether the last fifth holds more than the second, by more than is allowed."""
    compared = zip(most(usages[2:4]), most(usages[-2:]), SHARES, AMOUNTS, strict=True)
    return any(last > second * (1 + share) + amount for second, last, share, amount in compared)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
