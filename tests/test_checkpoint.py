"""A checkpoint is whole, or it is refused."""

import errno
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from patchad import PatchadError
from patchad.checkpoint import CHECKPOINT_FORMAT, WholeCheckpoints, read_checkpoint, save

CHECKPOINT = {
    "patchad_format": CHECKPOINT_FORMAT,
    "patchad_model": {},
    "patchad_scored_by": {},
    "patchad_fitted": {},
    "patchad_updates": [],
    "patchad_group": "c0ffee",
    "hyper_parameters": {},
    "state_dict": {"a": torch.arange(5000.0)},
    "epoch": 3,
}


@pytest.fixture
def path(tmp_path) -> Path:
    WholeCheckpoints().save_checkpoint(CHECKPOINT, tmp_path / "runs/last.ckpt")
    return tmp_path / "runs/last.ckpt"


def test_what_was_saved_is_read_by_us_and_by_torch(path):
    for checkpoint in (read_checkpoint(path), WholeCheckpoints().load_checkpoint(path), torch.load(path)):
        assert torch.equal(checkpoint["state_dict"]["a"], CHECKPOINT["state_dict"]["a"]) and checkpoint["epoch"] == 3
    assert zipfile.ZipFile(path).testzip() is None
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("part", [0, 0.01, 0.2, 0.5, 0.8, 0.99, 0.999, 1])
def test_a_flipped_bit_is_refused(part, path):
    content = bytearray(path.read_bytes())
    content[round(part * (len(content) - 1))] ^= 4
    path.write_bytes(content)
    with pytest.raises(PatchadError, match=r"last\.ckpt (is not a checkpoint of patchad's, or )?is damaged: "):
        read_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 100, 10_000])
def test_a_file_that_was_cut_is_refused(kept, path):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PatchadError, match=r"last\.ckpt is not a checkpoint of patchad's, or is damaged: "):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CHECKPOINT, "is damaged: its checksum does not fit"),
        (CHECKPOINT | {"patchad_format": 11}, "has format 11; this patchad reads format 14"),
        (CHECKPOINT | {"patchad_format": "12"}, "has format '12'"),
        ({"state_dict": {}}, "is not one of patchad's"),
        ([1, 2], "is not one of patchad's"),
        (7, "is not one of patchad's"),
    ],
)
def test_what_others_saved_is_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(PatchadError, match=rf"other\.ckpt {words}"):
        read_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize("change", [{"state_dict": [1]}, {"patchad_scored_by": None}, {"hyper_parameters": 3}])
def test_what_lacks_a_part_is_refused_by_its_name(change, tmp_path):
    save(CHECKPOINT | change, tmp_path / "own.ckpt")
    with pytest.raises(PatchadError, match=rf"own\.ckpt lacks {next(iter(change))}, or holds something else"):
        read_checkpoint(tmp_path / "own.ckpt")


def test_what_cannot_be_written_costs_nothing_that_was_there(path, monkeypatch):
    before = path.read_bytes()

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*runs/last\.ckpt'"):
        WholeCheckpoints().save_checkpoint(CHECKPOINT, path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("room", [0, 1000, 10_000, 20_000])
def test_a_file_that_finds_no_room_is_the_systems_error_however_far_it_has_come(room, path):
    resource = pytest.importorskip("resource")
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*runs/last\.ckpt'"):
            WholeCheckpoints().save_checkpoint(CHECKPOINT, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_a_copy_elsewhere_is_read(path, tmp_path):
    shutil.copy(path, tmp_path / "moved.ckpt")
    save(read_checkpoint(tmp_path / "moved.ckpt"), tmp_path / "again.ckpt")
    assert read_checkpoint(tmp_path / "again.ckpt")["epoch"] == 3
