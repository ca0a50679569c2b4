"""A graph that is ready to run, in ONNX Runtime or OpenVINO, and which of both is faster here. No torch is needed.

Both compute in float32: bfloat16 throughout, which OpenVINO takes by itself where the CPU has it, gives wrong scores.
"""

import hashlib
import json
import os
import platform
import re
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patchad.errors import PatchadError
from patchad.files import write_whole

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read by the import; else it would report to its maker
import onnxruntime

RUNTIMES = ("auto", "onnxruntime", "openvino")
Arrays = Mapping[str, np.ndarray]
OUTPUTS = ("score", "map")
CPU = ("CPUExecutionProvider",)
"""Providers of ONNX Runtime beside which OpenVINO is no choice: others run on other devices."""

SECONDS, FEWEST, MOST = 3.0, 3, 10
"""Of measuring, opening OpenVINO's graph included; and runs of each, which are made also where that takes longer."""
REST = 0.02
"""Seconds before each timed run, in which the threads of the last one stop waiting for more."""
GAIN = 0.9
"""OpenVINO must take less than this share of ONNX Runtime's time. A smaller gain may be chance, and machines of one
kind shall take the same runtime, so that they say the same to the last digit."""
AGREEMENT = 1e-4
"""Most that the score of the image that is timed may differ, relative; else OpenVINO computes something else."""

PROCESSOR = re.compile(r"^(vendor_id|cpu family|model|model name|stepping|flags|Features|CPU \w+)\s*: (.*)$", re.M)
"""Lines of /proc/cpuinfo that tell processors apart, on x86 and ARM."""


class Resources(NamedTuple):
    """What runs a graph.

    Attributes:
        threads: of the CPU; None for one per core.
        providers: of ONNX Runtime, in order of preference.
        spinning: whether threads of ONNX Runtime wait for their next piece of work without a pause. One image is then
            scored sooner, but what runs beside it has less of the CPU.
    """

    threads: int | None
    providers: Sequence[str]
    spinning: bool


class Engine(ABC):
    """A graph, ready to run; several threads may call it at once.

    Attributes:
        runtime: the name of what runs it.
        noted: what patchad noted in the file; None in one of another program.
    """

    runtime: str
    noted: str | None

    @abstractmethod
    def run(self, inputs: Arrays) -> list[np.ndarray]:
        """Scores and maps, arrays of their own, from all inputs of the graph by name."""


class OnnxRuntime(Engine):
    """A graph in ONNX Runtime.

    Args:
        path: the file.
        resources: what runs it.

    Raises:
        PatchadError: if there is no graph in the file.
    """

    runtime = "onnxruntime"

    def __init__(self, path: Path, resources: Resources) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = resources.threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(resources.spinning)))
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(resources.providers))
        except Exception as error:  # ONNX Runtime's errors share no class
            raise PatchadError(f"{path} is not a file that patchad export wrote: {error}") from error
        self.noted = self.session.get_modelmeta().custom_metadata_map.get("patchad")

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        """See `Engine`."""
        return [np.asarray(output) for output in self.session.run(OUTPUTS, dict(inputs))]


class OpenVino(Engine):
    """A graph in OpenVINO, in float32 and for the least time of one image.

    Args:
        path: the file.
        resources: what runs it; its threads pause by themselves.

    Raises:
        PatchadError: if OpenVINO is not installed, or opens no graph in the file.
    """

    runtime = "openvino"

    def __init__(self, path: Path, resources: Resources) -> None:
        try:
            from openvino import Core  # type: ignore[reportMissingImports]  # of the extra openvino
            from openvino.frontend import FrontEndManager  # type: ignore[reportMissingImports]
        except ImportError as error:
            raise PatchadError(
                f"runtime openvino is not installed ({error}): pip install openvino, or take runtime onnxruntime"
            ) from error
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        settings["ENABLE_CPU_PINNING"] = False  # processes of one thread each would share the first core
        if resources.threads:
            settings["INFERENCE_NUM_THREADS"] = resources.threads
        try:
            reader = FrontEndManager().load_by_framework("onnx")  # by itself, it would try those of other files, too
            graph = reader.convert(reader.load(str(path)))
            place = ["framework", "patchad"]
            self.noted = graph.get_rt_info(place).astype(str) if graph.has_rt_info(place) else None
            self.compiled = Core().compile_model(graph, "CPU", settings)
        except Exception as error:  # of several classes
            reason = " ".join(str(error).split())
            raise PatchadError(f"OpenVINO opens no graph in {path}: {reason}; take runtime onnxruntime") from error
        self._idle: deque[Any] = deque()

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        """See `Engine`; each call has a request of its own, since another thread may be in its midst."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        outputs = request.infer(dict(inputs))
        self._idle.append(request)
        return [outputs[name] for name in OUTPUTS]


ENGINES: Mapping[str, Callable[[Path, Resources], Engine]] = {
    engine.runtime: engine for engine in (OnnxRuntime, OpenVino)
}


def open_engine(
    path: Path, checksum: str, runtime: str, resources: Resources, trial: Callable[[Engine], Arrays]
) -> Engine:
    """A file's graph, in the runtime that is asked for or, by `auto`, in the one that is faster here.

    That is measured once for each file, machine and number of threads, and remembered. Where OpenVINO is not installed,
    or the providers are not the CPU's, it is ONNX Runtime, and nothing is measured.

    Args:
        path: the file.
        checksum: of it.
        runtime: one of `RUNTIMES`.
        resources: what runs it.
        trial: the inputs of one image, for whichever engine it is given; it may refuse the file.

    Raises:
        PatchadError: if there is no such runtime, it cannot run this, or there is no graph in the file.
    """
    if runtime not in RUNTIMES:
        raise PatchadError(f"runtime {runtime!r} must be one of {', '.join(RUNTIMES)}")
    check_providers(resources.providers)
    on_cpu = tuple(resources.providers) == CPU
    if runtime == "openvino" and not on_cpu:
        named = ", ".join(resources.providers)
        raise PatchadError(f"runtime openvino has no providers {named}: leave them out, or the runtime")
    if runtime == "auto" and on_cpu and installed("openvino"):
        return open_faster(path, checksum, resources, trial)
    return (OpenVino if runtime == "openvino" else OnnxRuntime)(path, resources)


def check_providers(providers: Sequence[str]) -> None:
    """Raises PatchadError unless all are there: ONNX Runtime would take the CPU, and not say so."""
    there = onnxruntime.get_available_providers()
    if isinstance(providers, str) or not isinstance(providers, Sequence) or not providers:
        raise PatchadError(f"providers {providers!r} must be a list; there are {', '.join(there)}")
    if missing := [name for name in providers if name not in there]:
        raise PatchadError(f"providers {', '.join(map(str, missing))} are not there; there are {', '.join(there)}")


def installed(distribution: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def open_faster(path: Path, checksum: str, resources: Resources, trial: Callable[[Engine], Arrays]) -> Engine:
    """The graph in the runtime that was, or is now measured to be, faster here."""
    key = {
        "file": checksum,
        "onnxruntime": onnxruntime.__version__,
        "openvino": installed("openvino"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": resources.threads,
    }
    place = cache_file(key)
    if known := remembered(place):
        return ENGINES[known](path, resources)
    engine, milliseconds = faster(path, resources, trial)
    remember(place, {"runtime": engine.runtime, "milliseconds": milliseconds, **key})
    return engine


def faster(path: Path, resources: Resources, trial: Callable[[Engine], Arrays]) -> tuple[Engine, dict[str, float]]:
    """The graph in the faster runtime, and the milliseconds of those that run it as they should."""
    first = OnnxRuntime(path, resources)
    inputs, end = trial(first), time.monotonic() + SECONDS
    try:
        second = OpenVino(path, resources)
    except PatchadError:  # there are graphs that only one of them runs
        return first, {}
    expected, actual = (engine.run(inputs)[0] for engine in (first, second))
    if not np.allclose(actual, expected, rtol=AGREEMENT, atol=0):
        return first, {}
    times = measured({engine.runtime: partial(engine.run, inputs) for engine in (first, second)}, end)
    return second if times[second.runtime] < GAIN * times[first.runtime] else first, times


def measured(tasks: Mapping[str, Callable[[], object]], end: float) -> dict[str, float]:
    """Median milliseconds of each task, run in turns until a time of `time.monotonic`."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(MOST):
        if number >= FEWEST and time.monotonic() > end:
            break
        for name, task in tasks.items():
            time.sleep(REST)
            begun = time.perf_counter()
            task()
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: float(np.median(runs)) for name, runs in times.items()}


def processor() -> dict[str, str]:
    """What the system tells of the processor: its name, and what tells it from others."""
    description = Path("/proc/cpuinfo")
    if description.is_file():
        return dict(PROCESSOR.findall(description.read_text().partition("\n\n")[0]))
    return {"model name": platform.processor() or platform.machine()}


def cache_file(key: Mapping[str, object]) -> Path | None:
    """Where the choice for a key is kept, in the user's folder for what may be deleted; None for one without a home."""
    name = f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
    given = os.environ.get({"win32": "LOCALAPPDATA", "darwin": ""}.get(sys.platform, "XDG_CACHE_HOME"), "")
    usual = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    try:
        folder = Path(given) if os.path.isabs(given) else Path.home() / usual
    except RuntimeError:
        return None
    return folder / "patchad" / "runtimes" / name


def remembered(place: Path | None) -> str | None:
    """The runtime that was chosen; None where that is not known, or its file is damaged."""
    if place is None:
        return None
    try:
        runtime = json.loads(place.read_text())["runtime"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return runtime if runtime in list(ENGINES) else None


def remember(place: Path | None, choice: Mapping[str, object]) -> None:
    """Keeps a choice, where that can be."""
    if place is not None:
        with suppress(OSError):
            write_whole(place, lambda part: part.write_text(json.dumps(choice, indent=1) + "\n"))
