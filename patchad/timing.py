"""How long a detector takes, stage by stage, and how far that is from what the machine can do at best."""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from patchad.memory import MemoryBank
from patchad.model import PatchModel, ScoringModel
from patchad.stages import Row, process_memory
from patchad.types import Region

STAGES = ("backbone", "encoders", "search", "fold", "score")
"""From an image in memory to its score; `encoders` is what is left of embedding without the backbone."""
Name = TypeVar("Name")

CPU = torch.device("cpu")
REST = 0.02
"""Seconds before each task, in which the threads of the last one stop waiting for more."""
VGG_CHANNELS, VGG_SIZE = 256, 64
"""The convolution that the machine's rate is measured with: the third block of VGG16, 256 x 256 pixels."""


class Clock:
    """Milliseconds between calls, when all that was asked of the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._last = device, time.perf_counter()
        self()

    def __call__(self) -> float:
        """Milliseconds since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return 1e3 * passed


class Stopwatch:
    """Sums the milliseconds that a module takes, over all its calls.

    Args:
        module: it is watched until `remove`.
        device: where it runs.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.total, self._clock = 0.0, Clock(device)
        self._hooks = [module.register_forward_pre_hook(self._start), module.register_forward_hook(self._stop)]

    def _start(self, *_: object) -> None:
        self._clock()

    def _stop(self, *_: object) -> None:
        self.total += self._clock()

    def remove(self) -> None:
        """Watches no longer."""
        for hook in self._hooks:
            hook.remove()


@torch.inference_mode()
def time_stages(
    model: PatchModel,
    image: Float[Tensor, "batch 3 height width"],
    content: Int[Tensor, "batch 2"],
    region: Region | None = None,
) -> dict[str, float]:
    """Milliseconds of each of `STAGES` for one batch, in whatever mode the detector runs.

    Args:
        model: fitted, in eval mode.
        image: RGB in [0, 1], on the model's device.
        content: height x width of each image's content, top left, in pixels.
        region: True where an image is judged; by default that is its content.
    """
    backbone, clock = Stopwatch(model.encoder.backbone, image.device), Clock(image.device)
    embeddings = model.embed(image)
    embedding = clock()
    backbone.remove()
    distances = model.nearest(embeddings, content, (image.shape[2], image.shape[3]), None, region)
    search = clock()
    maps = model.side_maps(distances)
    fold = clock()
    model.score_maps(maps, distances)
    return dict(zip(STAGES, (backbone.total, embedding - backbone.total, search, fold, clock()), strict=True))


def alternate(
    tasks: Mapping[Name, Callable[[], object]], repeats: int, device: torch.device = CPU
) -> dict[Name, list[float]]:
    """Milliseconds of each task, run in turns, so that a slow minute of the machine hits all alike; one run warms up.

    Example:
        >>> {name: len(times) for name, times in alternate({"a": list, "b": dict}, repeats=3).items()}
        {'a': 3, 'b': 3}
    """
    times: dict[Name, list[float]] = {name: [] for name in tasks}
    clock = Clock(device)
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            time.sleep(REST)
            clock()
            task()
            if repeat:
                times[name].append(clock())
    return times


@torch.inference_mode()
def floating_point_operations(
    model: PatchModel, image: Float[Tensor, "batch 3 height width"], content: Int[Tensor, "batch 2"]
) -> dict[str, int]:
    """Floating-point operations that each stage cannot do without, for one batch; a multiply-add counts two.

    Convolutions of the backbone and of the encoders as they are run, and the products of the search: those of a large
    bank as they are run, of another 2 x queries x bank x numbers per embedding. Fold and score count nothing.
    """
    with FlopCounterMode(display=False) as counter:
        embeddings = model.embed(image)
    counted = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    backbone = sum(count for name, count in counted.items() if name.endswith(".backbone"))
    search = sum(search_operations(model.bank(side), queries) for side, queries in embeddings.items())
    return {"backbone": backbone, "encoders": counted["Global"] - backbone, "search": search}


def search_operations(bank: MemoryBank, embeddings: Float[Tensor, "batch dim rows columns"]) -> int:
    """Floating-point operations of the products of a search."""
    if not len(bank.lists):
        return 2 * embeddings.numel() * len(bank)
    with FlopCounterMode(display=False) as counter:
        bank.distances(embeddings.flatten(2).transpose(1, 2))
    return counter.get_total_flops()


@torch.inference_mode()
def best_rate(device: torch.device, repeats: int = 3) -> float:
    """The best rate that was measured, in operations per second: matrix products and one VGG convolution.

    It is that of the precision that is in force: float32 by default, another under `torch.autocast`.
    """
    tasks, operations = {}, {}
    for size in (2048, 3072, 4096):
        left, right = (torch.randn(size, size, device=device) for _ in range(2))
        tasks[f"matrix {size}"], operations[f"matrix {size}"] = lambda a=left, b=right: a @ b, 2 * size**3
    channels, size = VGG_CHANNELS, VGG_SIZE
    for batch in (1, 8):
        image = torch.randn(batch, channels, size, size, device=device).to(memory_format=torch.channels_last)
        layer = nn.Conv2d(channels, channels, 3, padding=1, device=device).to(memory_format=torch.channels_last)
        tasks[f"convolution {batch}"] = lambda layer=layer, image=image: layer(image)
        operations[f"convolution {batch}"] = 2 * 9 * channels**2 * size**2 * batch
    times = alternate(tasks, repeats, device)
    return max(operations[name] / (1e-3 * min(milliseconds)) for name, milliseconds in times.items())


def reset_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory` forget what was held before, such as the matrices of `best_rate`; on Linux, and on GPUs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").is_file():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held, in MB: on the device, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return process_memory()


def stage_rows(measured: Iterable[Mapping[str, float]], operations: Mapping[str, int], rate: float) -> list[Row]:
    """The stages and their sum.

    Args:
        measured: of each run, what `time_stages` gave.
        operations: what `floating_point_operations` gave.
        rate: what `best_rate` gave.
    """
    runs = list(measured)
    rows = [
        Row(stage, [run[stage] for run in runs], 1e3 * operations[stage] / rate if stage in operations else None)
        for stage in STAGES
    ]
    return [*rows, Row("all", [sum(run.values()) for run in runs], 1e3 * sum(operations.values()) / rate)]


def measure_stages(
    model: ScoringModel,
    image: Float[Tensor, "batch 3 height width"],
    content: Int[Tensor, "batch 2"],
    repeats: int,
    rate: float,
    region: Region | None = None,
) -> list[Row]:
    """The stage table of one batch: the stages, their sum, and all of them in one go; one run of each warms up.

    The stages are those of a `PatchModel`; of others only the last row is known, without a floor.

    The stages begin on the model's device, and each waits for the one before. In one go nothing waits; images come
    from the machine's memory, and scores go back there.

    Args:
        model: fitted, in eval mode, on its device.
        image: RGB in [0, 1], in the machine's memory.
        content: height x width of each image's content, top left, in pixels.
        repeats: timed runs.
        rate: what `best_rate` gave.
        region: True where an image is judged, in the machine's memory; by default that is its content.
    """
    device, rows, floor = model.scorer.scale.device, [], None
    if isinstance(model, PatchModel):
        moved = image.to(device), content.to(device)
        on_device = None if region is None else region.to(device)
        runs = [time_stages(model, *moved, on_device) for _ in range(repeats + 1)][1:]
        rows = stage_rows(runs, floating_point_operations(model, *moved), rate)
        floor = rows[-1].floor
    whole = alternate({"whole": partial(score_from_memory, model, image, content, region)}, repeats, device)["whole"]
    return [*rows, Row("from memory to score", whole, floor)]


@torch.inference_mode()
def score_from_memory(
    model: ScoringModel,
    image: Float[Tensor, "batch 3 height width"],
    content: Int[Tensor, "batch 2"],
    region: Region | None = None,
) -> Float[Tensor, " batch"]:
    """The scores, in the machine's memory as the images are."""
    device = model.scorer.scale.device
    on_device = None if region is None else region.to(device)
    return model(image.to(device), content.to(device), None, on_device).score.cpu()
