"""Milliseconds per stage: their table, and those of an exported file. No torch is needed."""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchad.region import blank, judged
from patchad.runtime import ExportedDetector, off_canvas, on_canvas, planes_of


class Row(NamedTuple):
    """One line of a stage table.

    Attributes:
        stage: its name.
        times: milliseconds of each run.
        floor: milliseconds at the machine's best rate; None where nothing is counted.
    """

    stage: str
    times: Sequence[float]
    floor: float | None = None

    def markdown(self, floors: bool = True) -> str:
        """Stage, median, 95th percentile and, with `floors`, floor and the median over the floor."""
        median = float(np.median(self.times))
        told = [self.stage, f"{median:.2f}", f"{np.percentile(self.times, 95):.2f}"]
        if floors:
            told += [f"{self.floor:.2f}", f"{median / self.floor:.2f}"] if self.floor else ["-", "-"]
        return f"| {' | '.join(told)} |"


def stage_table(rows: Iterable[Row]) -> str:
    """Rows under their header, as Markdown; without a column for floors where there is none."""
    rows = list(rows)
    floors = any(row.floor for row in rows)
    names = ["stage", "median ms", "95th percentile ms", *(["floor ms", "times the floor"] if floors else [])]
    head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join([*head, *(row.markdown(floors) for row in rows)])


def measure_exported(detector: ExportedDetector, images: Sequence[Path | np.ndarray], repeats: int) -> list[Row]:
    """The stage table of one batch of an exported file: the stages and their sum; one run warms up.

    Args:
        detector: the file.
        images: files, which are decoded in each run, or arrays as `to_rgb` gives them.
        repeats: timed runs.

    Raises:
        PatchadError: if a file cannot be read.
    """
    runs = [exported_stages(detector, images) for _ in range(repeats + 1)][1:]
    runs = [{**run, "all": sum(run.values())} for run in runs]
    return [Row(stage, [run[stage] for run in runs]) for stage in runs[0]]


def exported_stages(detector: ExportedDetector, images: Sequence[Path | np.ndarray]) -> dict[str, float]:
    """Milliseconds of each stage of one run."""
    times: dict[str, float] = {}
    with timed(times, "decode"):
        native = [planes_of(image, detector.canvas) for image in images]
    if not any(isinstance(image, Path) for image in images):
        del times["decode"]
    with timed(times, "canvas"):
        masks = [judged(detector.canvas, size) for _, size in native]
        fitted = [
            on_canvas(blank(image, mask), detector.canvas) for (image, _), mask in zip(native, masks, strict=True)
        ]
    with timed(times, "graph"):
        _, maps = detector.run(fitted, masks)
    with timed(times, "map to size"):
        for values, (_, content), (_, size) in zip(maps, fitted, native, strict=True):
            off_canvas(values, content, size)
    return times


@contextmanager
def timed(times: dict[str, float], stage: str) -> Iterator[None]:
    """Notes the milliseconds until its end."""
    start = time.perf_counter()
    yield
    times[stage] = 1e3 * (time.perf_counter() - start)


def process_memory() -> float:
    """The most memory of the machine that this process has held, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held before this process began
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1024 / 1e6
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS
