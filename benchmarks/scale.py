"""What banks, images and pixels cost as they become many, as Markdown.

python -m benchmarks.scale banks
python -m benchmarks.scale images
python -m benchmarks.scale pixels

Each row is a process of its own, with its peak memory. Images are synthetic; of those of a fit, each is another.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image

import patchad
from benchmarks.speed import quiet
from benchmarks.tables import in_process
from patchad import PatchModel
from patchad.canvas import Canvas
from patchad.data.synthetic import write_synthetic
from patchad.export import export
from patchad.lists import divide
from patchad.memory import MemoryBank
from patchad.timing import alternate, peak_memory

SIZE, PATCHES, RANK, NOISE = 384, 2209, 12, 0.1
"""Pixels of an image of the default, how many patches of the smallest side it has, and what embeddings are made of:
tanh of so many random numbers, mixed to as many as there are, and noise of that deviation."""


def banks(
    vectors: tuple[int, ...] = (10_000, 100_000, 400_000, 1_000_000), repeats: int = 10, size: int = SIZE
) -> None:
    """Banks of the default: how long they take to be divided and levelled, to be searched, and to be scored with.

    Args:
        vectors: of each side.
        repeats: timed images.
        size: height and width of these in pixels.
    """
    print("| vectors per side | divided | divided and levelled | peak memory | search | exported | file | its score |")
    print("|---|---|---|---|---|---|---|---|")
    for count in vectors:
        print(output_of("bank", f"--count={count}", f"--repeats={repeats}", f"--size={size}"), flush=True)


@quiet()
def bank(count: int, repeats: int, size: int) -> None:
    """One row of `banks`."""
    model = PatchModel(bank=partial(MemoryBank, max_vectors=None)).eval()
    model.canvas = Canvas((size, size))
    seconds = {"divided": 0.0, "finished": 0.0}
    for number, side in enumerate(model.sides):
        values, filled = embeddings(count, model.encoder.patch_encoder(side).dim, number), model.bank(side)
        filled._set(torch.stack([torch.arange(count) // PATCHES, torch.arange(count) % PATCHES], 1), values)
        filled._draws = np.zeros(count)
        start = time.perf_counter()
        if count > (filled.exact_most or count):
            divide(values)
        divided = time.perf_counter()
        filled.finish()
        seconds["divided"] += divided - start
        seconds["finished"] += time.perf_counter() - divided
    held = peak_memory(torch.device("cpu"))
    print(f"| {count} | {seconds['divided']:.1f} s | {seconds['finished']:.1f} s | {held:.0f} MB |", end=" ")
    print(*timed(model, repeats, size), sep=" | ", end=" |\n")


@torch.inference_mode()
def timed(model: PatchModel, repeats: int, size: int) -> list[str]:
    """Milliseconds of the search and of a score of the exported file, the seconds of the export and its size."""
    image, content = torch.rand(1, 3, size, size), torch.tensor([[size, size]])
    queries = {
        side: embeddings(values[0, 0].numel(), values.shape[1], 99).T.reshape(values.shape)
        for side, values in model.embed(image).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "model.patchad", time.perf_counter()
        export(model, path)
        seconds, length = time.perf_counter() - start, path.stat().st_size
        score = partial(patchad.load(path).score, [image[0].permute(1, 2, 0).numpy()])
        tasks = {"search": partial(model.nearest, queries, content, (size, size)), "score": score}
        search, score = (float(np.median(runs)) for runs in alternate(tasks, repeats).values())
    return [f"{search:.1f} ms", f"{seconds:.0f} s", f"{length / 1e6:.0f} MB", f"{score:.1f} ms"]


def embeddings(count: int, dim: int, seed: int) -> torch.Tensor:
    """Vectors with structure, `[count, dim]`; those of all seeds lie on one surface."""
    mixing = torch.randn(RANK, dim, generator=torch.Generator().manual_seed(dim))
    generator = torch.Generator().manual_seed(seed)
    drawn, noise = torch.randn(count, RANK, generator=generator), torch.randn(count, dim, generator=generator)
    return (drawn @ mixing).tanh_().add_(noise, alpha=NOISE)


def images(counts: tuple[int, ...] = (1000, 3000, 10_000), size: int = 128, options: tuple[str, ...] = ()) -> None:
    """Fits of so many images: their seconds, and their peak memory, which is to be flat.

    Args:
        counts: of images.
        size: height and width of them in pixels.
        options: of `patchad fit`.
    """
    print("| images | fit | peak memory | checkpoint |\n|---|---|---|---|")
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rolled(folder / "images/train/good", count, size)
            ran = in_process(patchad_command("fit", folder / "images", folder, size, options))
            (checkpoint,) = folder.glob("*/checkpoints/last.ckpt")
            length = checkpoint.stat().st_size / 1e6
        print(f"| {count} | {ran.seconds:.0f} s | {ran.megabytes:.0f} MB | {length:.0f} MB |", flush=True)


def write_rolled(folder: Path, count: int, size: int) -> None:
    """Images of one texture, each moved by another distance, and with noise of its own."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    texture = generator.integers(0, 200, (size // 8, size // 8, 3)).repeat(8, 0).repeat(8, 1)
    for number in range(count):
        moved = np.roll(texture, generator.integers(0, size, 2), (0, 1)) + generator.integers(0, 40, texture.shape)
        Image.fromarray(moved.astype(np.uint8)).save(folder / f"{number:06d}.png", compress_level=1)


def pixels(sizes: tuple[int, ...] = (256, 512, 1024, 2048), count: int = 16, options: tuple[str, ...] = ()) -> None:
    """Fits and tests of images of so many pixels: seconds and peak memory, also for each megapixel that was read.

    Args:
        sizes: height and width in pixels.
        count: normal images of a fit; a test has as many, half of them with a defect.
        options: of `patchad fit`.
    """
    print("| image_size | images | fit | test | fit, a megapixel | test, a megapixel | memory of both |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_synthetic(
                folder / "product", train=count, test_normal=count // 2, test_defective=count // 2, size=size
            )
            fit = in_process(patchad_command("fit", folder / "product", folder, size, options))
            (checkpoint,) = folder.glob("*/checkpoints/last.ckpt")
            test = in_process([*patchad_command("test", folder / "product", folder, size), f"--ckpt_path={checkpoint}"])
        each = " | ".join(f"{ran.seconds / (count * size**2 / 1e6):.2f} s" for ran in (fit, test))
        held = f"{fit.megabytes:.0f}, {test.megabytes:.0f} MB"
        print(f"| {size} | {count} | {fit.seconds:.0f} s | {test.seconds:.0f} s | {each} | {held} |", flush=True)


def patchad_command(verb: str, data: Path, folder: Path, size: int, options: Sequence[str] = ()) -> list[str]:
    """A command of patchad whose runs lie in a folder."""
    place = [f"--trainer.logger.save_dir={folder}", f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"]
    read = [f"--data.root={data}", f"--data.image_size={size}"]
    return [sys.executable, "-m", "patchad", verb, *read, *place, *options]


def output_of(*arguments: str) -> str:
    """What this benchmark prints, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    auto_cli([banks, bank, images, pixels], as_positional=False)
