"""Files that an earlier patchad exported score as they did, also where there is no POSIX.

`python tests/test_runtime.py` writes tests/data/format_<N>.patchad and what it says of `IMAGES`, once for each format
of exported files: a tiny network with random weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import patchad
from patchad.runtime import EXPORT_FORMAT, Scored

KEPT = Path(__file__).parent / "data" / f"format_{EXPORT_FORMAT}.patchad"
IMAGES = {
    "noise": np.random.RandomState(2).random_sample((48, 40, 3)),
    "ramp": np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1)),
    "small": np.full((3, 10, 12), 40000, np.uint16),
}


def said(found: Scored) -> dict[str, float]:
    """What is compared of a score and its map."""
    ends = {name: float(found.map[place]) for name, place in (("first", (0, 0)), ("last", (-1, -1)))}
    return {**found._replace(map=found.map.mean(dtype=float))._asdict(), "highest": float(found.map.max()), **ends}


@pytest.mark.parametrize("name", IMAGES)
def test_a_file_of_this_format_says_what_it_said_when_it_was_written(name):
    found = patchad.load(KEPT)(IMAGES[name])
    assert found.map.shape == {"noise": (48, 40), "ramp": (40, 60), "small": (10, 12)}[name]
    kept = json.loads(KEPT.with_suffix(".json").read_text())[name]
    assert found.verdict == kept.pop("verdict")
    assert {part: said(found)[part] for part in kept} == pytest.approx(kept, rel=1e-5)


ELSEWHERE = """
import os, sys
import numpy, onnxruntime, PIL.Image
for name in ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty", "_posixsubprocess", "_posixshmem"):
    sys.modules[name] = None
for name in ("fork", "getuid", "sched_getaffinity", "sysconf", "uname", "mkfifo", "chown", "pread", "posix_fadvise"):
    delattr(os, name)
import patchad
file, (path, image) = patchad.load(sys.argv[1]), sys.argv[2:]
assert file(numpy.load(path)).score == file.score([image])[0].score
print(file(image).score)
"""
"""Scores an array, and a file of it, without what Windows lacks."""


def test_scoring_needs_nothing_that_windows_lacks(tmp_path):
    from PIL import Image

    np.save(tmp_path / "ramp.npy", IMAGES["ramp"])
    Image.fromarray(IMAGES["ramp"]).save(tmp_path / "ramp.png")
    command = [sys.executable, "-c", ELSEWHERE, str(KEPT), str(tmp_path / "ramp.npy"), str(tmp_path / "ramp.png")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.stdout == f"{patchad.load(KEPT)(IMAGES['ramp']).score}\n", finished.stderr


def test_onnx_runtime_keeps_nothing_to_report(tmp_path):
    """It would, in the home of the user, from where it sends."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    program = "import sys, numpy, patchad; patchad.load(sys.argv[1], runtime='onnxruntime')(numpy.zeros((48, 40)))"
    subprocess.run([sys.executable, "-c", program, str(KEPT)], check=True, env=environment)
    assert not list(tmp_path.iterdir())


def write() -> None:
    """The file of this format, and what it says."""
    from functools import partial

    from test_export import Tiny, model

    from patchad.export import export
    from patchad.memory import MemoryBank
    from patchad.models import WindowEncoder
    from patchad.scoring import Scorer

    parts = {"patch_encoder": WindowEncoder, "bank": partial(MemoryBank, max_vectors=60), "scorer": Scorer}
    export(model(Tiny, size=(48, 40), sides=(16,), **parts), KEPT)
    file = patchad.load(KEPT)
    told = {name: said(file(image)) for name, image in IMAGES.items()}
    KEPT.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    write()
