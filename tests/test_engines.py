"""Both runtimes say the same of a file, and the faster one is found once."""

import json
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_export import Tiny, model
from test_runtime import KEPT

import patchad
from patchad import PatchadError, engines
from patchad.canvas import EACH
from patchad.export import export
from patchad.line import main

INSTALLED = engines.installed
RUNTIMES = ("onnxruntime", "openvino")
SIZES = [(48, 40), (30, 77), (90, 20), (48, 40), (64, 64)]


def needs(runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="the extra openvino is not installed")


def noise(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.random((*size, 3), dtype=np.float32) for size in sizes]


@pytest.fixture(scope="module")
def with_regions(tmp_path_factory) -> Path:
    """A file that takes a region of each image."""
    made = model(Tiny, size=(48, 40), sides=(16,))
    made.canvas = made.canvas._replace(region=EACH)
    path = tmp_path_factory.mktemp("regions") / "model.patchad"
    export(made, path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of what is remembered, of a user whose runtimes are both there."""
    needs("openvino")
    monkeypatch.setattr(engines, "installed", INSTALLED)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/patchad/runtimes"


def test_both_runtimes_say_the_same_of_images_alone_and_together():
    needs("openvino")
    first, second = (patchad.load(KEPT, runtime=runtime) for runtime in RUNTIMES)
    assert (first.runtime, second.runtime) == RUNTIMES and first.metadata == second.metadata
    images = noise(SIZES)
    for expected, found, alone in zip(first.score(images), second.score(images), map(second, images), strict=True):
        for one in (found, alone):
            assert one.score == pytest.approx(expected.score, rel=1e-5)
            assert (one.verdict, one.p_value) == (expected.verdict, expected.p_value)
            np.testing.assert_allclose(one.map, expected.map, rtol=1e-4, atol=1e-5 * expected.map.max())


def test_both_runtimes_take_regions(with_regions):
    needs("openvino")
    images, masks = noise(SIZES), [np.arange(height * width).reshape(height, width) % 5 > 1 for height, width in SIZES]
    first, second = (patchad.load(with_regions, runtime=runtime).score(images, masks) for runtime in RUNTIMES)
    whole = patchad.load(with_regions, runtime="openvino").score(images, [np.ones_like(mask) for mask in masks])
    for expected, found, other in zip(first, second, whole, strict=True):
        assert found.score == pytest.approx(expected.score, rel=1e-4) != other.score
        np.testing.assert_allclose(found.map, expected.map, rtol=1e-4, atol=1e-4 * expected.map.max())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_threads_that_share_a_detector_get_what_one_gets_alone(runtime):
    needs(runtime)
    detector, images = patchad.load(KEPT, runtime=runtime), noise(40 * SIZES[:2])
    alone, begun = [detector(image) for image in images], threading.Barrier(4)

    def score(half: slice) -> list:
        begun.wait()
        return [detector(image) for image in images[half]]

    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(score, [slice(number, None, 4) for number in range(4)])
    for number, part in enumerate(parts):
        for found, expected in zip(part, alone[number::4], strict=True):
            assert found[:4] == expected[:4] and np.array_equal(found.map, expected.map)


@pytest.mark.parametrize("method", ["spawn", *(["fork"] if os.name == "posix" else [])])
def test_processes_of_a_pool_score_in_the_same_runtime(method):
    needs("openvino")
    detector, images = patchad.load(KEPT, threads=1, runtime="openvino"), noise(SIZES)
    copied = pickle.loads(pickle.dumps(detector))
    assert copied.runtime == "openvino" and copied._opened == detector._opened
    assert copied._engine.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    with multiprocessing.get_context(method).Pool(1) as pool:
        for found, image in zip(pool.map_async(detector, images).get(timeout=100), images, strict=True):
            assert found[:4] == detector(image)[:4] and np.array_equal(found.map, detector(image).map)


def test_openvino_computes_in_float32_and_keeps_to_no_core():
    needs("openvino")
    compiled = patchad.load(KEPT, runtime="openvino")._engine.compiled
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert not compiled.get_property("ENABLE_CPU_PINNING")


@pytest.mark.parametrize(("gain", "faster"), [(0.0, "onnxruntime"), (1e9, "openvino")])
def test_what_is_faster_is_measured_once_for_a_file_and_its_threads(gain, faster, cache, monkeypatch):
    monkeypatch.setattr(engines, "GAIN", gain)
    assert patchad.load(KEPT).runtime == faster
    (noted,) = cache.iterdir()
    told = json.loads(noted.read_text())
    assert told["runtime"] == faster and set(told["milliseconds"]) == set(RUNTIMES) and told["threads"] is None
    monkeypatch.setattr(engines, "faster", None)  # would be called to measure
    assert patchad.load(KEPT, runtime="auto").runtime == faster
    other = next(runtime for runtime in RUNTIMES if runtime != faster)
    noted.write_text(json.dumps({"runtime": other}))
    assert patchad.load(KEPT).runtime == other
    with pytest.raises(TypeError, match="not callable"):
        patchad.load(KEPT, threads=1)


def test_a_runtime_that_says_something_else_is_not_taken(cache, monkeypatch):
    monkeypatch.setattr(engines, "GAIN", 1e9)
    monkeypatch.setattr(engines, "AGREEMENT", 0.0)
    assert patchad.load(KEPT).runtime == "onnxruntime"
    assert json.loads(next(cache.iterdir()).read_text())["milliseconds"] == {}


@pytest.mark.parametrize(
    "damage", [b"", b"\xff", b"[]", b"7", b"{}", b'{"runtime": ["openvino"]}', b'{"runtime": "x"}']
)
def test_a_damaged_memory_is_made_anew(damage, cache, monkeypatch):
    monkeypatch.setattr(engines, "GAIN", 1e9)
    patchad.load(KEPT)
    (noted,) = cache.iterdir()
    noted.write_bytes(damage)
    assert patchad.load(KEPT).runtime == "openvino"
    assert json.loads(noted.read_text())["runtime"] == "openvino" and [*cache.iterdir()] == [noted]


def test_without_a_place_to_remember_it_is_measured_each_time(cache, monkeypatch):
    monkeypatch.setattr(engines, "GAIN", 1e9)
    cache.parents[1].write_text("no folder")
    assert [patchad.load(KEPT).runtime for _ in range(2)] == ["openvino"] * 2
    monkeypatch.setenv("XDG_CACHE_HOME", "below/here")  # the standard has it ignored
    monkeypatch.setattr(Path, "home", partial(homeless, Path))
    assert patchad.load(KEPT).runtime == "openvino"


def homeless(_: type) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_both_commands_take_a_runtime_and_say_which_it_is(tmp_path, capsys):
    needs("openvino")
    for runtime in RUNTIMES:
        for arguments, told in (
            (["benchmark", KEPT, "--repeats", 1], f"pixels; {runtime}, one thread per core\n"),
            (["score", KEPT, image_file(tmp_path), "--output", tmp_path / "rows.csv"], f" s by {runtime}\n"),
        ):
            with pytest.raises(SystemExit) as ended:
                main([*map(str, arguments), "--runtime", runtime])
            assert not ended.value.code and told in "".join(capsys.readouterr())


def image_file(folder: Path) -> Path:
    from PIL import Image

    Image.fromarray(np.zeros((48, 40), np.uint8)).save(folder / "image.png")
    return folder / "image.png"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"runtime": "tensorrt"}, "runtime 'tensorrt' must be one of auto, onnxruntime, openvino"),
        ({"providers": ["CPU"]}, "providers CPU are not there; there are .*CPUExecutionProvider"),
        (
            {"runtime": "openvino", "providers": ["CPUExecutionProvider"] * 2},
            "runtime openvino has no providers .*: leave them out, or the runtime",
        ),
    ],
)
def test_a_runtime_that_cannot_be_is_refused(options, told):
    with pytest.raises(PatchadError, match=told):
        patchad.load(KEPT, **options)


def test_files_that_are_none_of_patchads_are_refused_by_openvino_too(tmp_path):
    needs("openvino")
    (tmp_path / "broken").write_bytes(b"no graph")
    with pytest.raises(PatchadError, match=r"OpenVINO opens no graph in .*broken.*; take runtime onnxruntime"):
        patchad.load(tmp_path / "broken", runtime="openvino")
