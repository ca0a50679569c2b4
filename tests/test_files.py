from pathlib import Path

import numpy as np
import pytest

from patchad.files import write_array, write_whole


def test_two_writers_of_one_file_leave_one_whole(tmp_path):
    path = tmp_path / "deep" / "a.npy"

    def write(part: Path) -> None:
        part.write_bytes(b"half")
        write_array(path, np.arange(3))  # another process is faster
        part.write_bytes(b"whole")

    write_whole(path, write)
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("a" * 251 + ".npy")
    write_array(path, np.arange(3))
    assert np.load(path).tolist() == [0, 1, 2]


def test_what_fails_leaves_the_former_file(tmp_path):
    write_array(tmp_path / "a.npy", np.arange(3))

    def fail(part: Path) -> None:
        part.write_bytes(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "a.npy", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]
