"""A checkpoint file: written whole, with a checksum, and checked before anything in it is used."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn

from patchad.errors import PatchadError
from patchad.files import write_whole
from patchad.spec import Configurable, described
from patchad.trust import check_trusted

CHECKPOINT_FORMAT = 14
"""Raised whenever checkpoints of an older patchad no longer load."""
CONTENTS = {
    "state_dict": Mapping,
    "hyper_parameters": Mapping,
    "patchad_scored_by": Mapping,
    "patchad_model": Mapping,
    "patchad_fitted": Mapping,
    "patchad_updates": list,
    "patchad_group": str,
}
"""What every checkpoint holds, and as what."""
GOES_ON = {"epoch": int, "global_step": int, "loops": Mapping, "optimizer_states": list, "lr_schedulers": list}
"""What a fit needs to go on."""
CHECKSUM = 64
"""Hexadecimal digits of SHA-256: the last bytes of the file, which are the comment of its ZIP archive."""
Loaded = TypeVar("Loaded", bound="Checkpointed")


class Checkpointed(Configurable):
    """What Lightning loads from a checkpoint that names nothing but what is trusted.

    Attributes:
        from_checkpoint: whether a checkpoint says what this is, which then writes nothing outside of the run folder.
    """

    CHECKPOINT_HYPER_PARAMS_KEY: str
    from_checkpoint = False

    @classmethod
    def load_from_checkpoint(cls: type[Loaded], checkpoint_path: str | Path, *args: Any, **settings: Any) -> Loaded:
        """Lightning's.

        Raises:
            PatchadError: if there is no checkpoint, or it names a class of a module that is not allowed
                (`patchad.allow`).
        """
        stored = read_checkpoint(Path(checkpoint_path)).get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
        check_trusted(cls, described(stored), f"checkpoint {checkpoint_path}")
        loaded = super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **settings})  # type: ignore[misc]
        loaded.from_checkpoint = True
        return loaded


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's, of local files that are whole or not there, and carry a checksum."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes beside the file and renames."""
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        return write_whole(Path(path), lambda part: save(checkpoint, part))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads what patchad wrote."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(Path(path))


def save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Writes a file of `torch.save`'s, and its checksum as the comment of the archive that it is.

    Raises:
        OSError: if it cannot be written.
    """
    with path.open("wb+") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # that the archive has no end, when a file was refused
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        file.seek(-2, os.SEEK_END)
        file.write(CHECKSUM.to_bytes(2, "little"))  # the length of the comment
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        file.write(digest.encode())


def is_whole(path: Path) -> bool:
    """Whether the checksum of a file fits; a file without one is not whole."""
    content = np.memmap(path, np.uint8, "r")
    return hashlib.sha256(content[:-CHECKSUM].data).hexdigest() == checksum(path)


def checksum(path: Path) -> str:
    """The checksum that a checkpoint carries, which tells it apart from any other."""
    with path.open("rb") as file:
        file.seek(-CHECKSUM, os.SEEK_END)
        return file.read().decode(errors="replace")


def read_checkpoint(path: Path, name: str = "checkpoint") -> dict[str, Any]:
    """What `patchad fit` wrote.

    Args:
        path: of the checkpoint.
        name: what to call it in an error.

    Raises:
        PatchadError: if it is missing, not readable, damaged, or of another format.
    """
    check_exists(path, name)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise PatchadError(f"{name} {path} is not a checkpoint of patchad's, or is damaged: {reason}") from error
    check_format(checkpoint, f"{name} {path}")
    if not is_whole(path):
        raise PatchadError(f"{name} {path} is damaged: its checksum does not fit; copy it again, or fit again")
    check_contents(checkpoint, CONTENTS, f"{name} {path}")
    return checkpoint


def check_contents(checkpoint: Mapping[str, Any], contents: Mapping[str, type], name: str = "the checkpoint") -> None:
    """Raises PatchadError unless a checkpoint holds what is listed, and as what; an error calls it by that name."""
    for key, kind in contents.items():
        if not isinstance(checkpoint.get(key), kind):
            raise PatchadError(f"{name} lacks {key}, or holds something else in its place; fit again")


def check_exists(path: Path, name: str) -> None:
    """Raises PatchadError unless there is a checkpoint, which an error calls by that name."""
    if not path.is_file():
        raise PatchadError(f"{name} {path} does not exist; patchad fit prints the path of its checkpoint")


def check_format(checkpoint: Any, name: str = "the checkpoint") -> None:
    """Raises PatchadError unless this patchad can load the checkpoint, which an error calls by that name."""
    fitted = checkpoint.get("patchad_format") if isinstance(checkpoint, Mapping) else None
    if fitted != CHECKPOINT_FORMAT:
        reason = "is not one of patchad's" if fitted is None else f"has format {fitted!r}"
        raise PatchadError(
            f"{name} {reason}; this patchad reads format {CHECKPOINT_FORMAT}: fit again, or install the patchad that "
            "wrote it"
        )


def take_sizes(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, names: Iterable[str]) -> None:
    """Gives buffers of a module the sizes that they have in a state, which torch would refuse as another's.

    Args:
        module: about to load the state; its buffers hold anything until then.
        state_dict: of it, or of what contains it.
        prefix: of the names of the module's tensors there.
        names: of the buffers; one that the state does not have stays.
    """
    for name in names:
        if prefix + name in state_dict:
            device = getattr(module, name).device
            setattr(module, name, torch.empty_like(state_dict[prefix + name], device=device))
