"""What makes figures doubtful: files that cannot be read, odd images and masks, images seen before."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from patchad.canvas import Size
from patchad.errors import PatchadError, printable
from patchad.types import UNKNOWN, ImageBatch, Sample

Value = TypeVar("Value")

NARROW = 16
"""Pixels: the smallest patch."""
MOST_ENLARGED = 4
LOOKED_AT = 512
"""About how many rows and columns of a large image are looked at."""
FITTED = "are among the images of the fit: scores of these are too low"
COPIES = "training images are copies of others: normal scores, and with them the threshold, come out too low"


def image_doubts(
    native: Float[torch.Tensor, "3 height width"],
    image: Float[torch.Tensor, "3 new_height new_width"],
    content: Size,
    sample: Sample,
) -> Iterator[str]:
    """What is odd about an image, as the end of a sentence about such images.

    Args:
        native: the image as its file has it.
        image: as it is scored.
        content: height x width in pixels of what is not padding there.
        sample: what is known about it.
    """
    height, width = native.shape[1:]
    sparse = native[:, :: 1 + height // LOOKED_AT, :: 1 + width // LOOKED_AT]
    if (image.amin((1, 2)) == image.amax((1, 2))).all():
        yield "are of one colour"
    elif sample.defect == UNKNOWN and ((sparse == 0) | (sparse == 1)).all():
        yield "hold pure black and white alone: are they masks?"
    if min(content) < NARROW:
        yield f"have fewer than {NARROW} rows or columns at image_size, which a patch needs: cut long images in pieces"
    if content[0] > MOST_ENLARGED * height:
        yield f"are enlarged more than {MOST_ENLARGED} times: image_size is larger than they are"


def digest(image: Float[torch.Tensor, "3 height width"]) -> int:
    """64 bits that tell images apart."""
    return int.from_bytes(hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest(), signed=True)


class Doubts:
    """Gathers from batches what makes figures doubtful, by kind, and which files could not be read.

    Args:
        fitted: digests of the images of the fit, which no other images should be among.

    Attributes:
        errors: why a file could not be read, by its path.
        digests: of the images, by their path.
        paths: of the images that a kind of doubt is about, by the end of its sentence.
    """

    def __init__(self, fitted: Iterable[int] = ()) -> None:
        self.fitted = frozenset(fitted)
        self.errors: dict[str, str] = {}
        self.digests: dict[str, int] = {}
        self.paths: dict[str, set[str]] = {}

    def add(self, batch: ImageBatch) -> None:
        """Takes in what a batch says of itself."""
        for path, error, doubts, number in zip(
            batch.path, batch.error, batch.doubts, batch.digest.tolist(), strict=True
        ):
            self.digests[path] = number
            if error:
                self.errors[path] = error
            for doubt in [*doubts.splitlines(), *([FITTED] if number in self.fitted else [])]:
                self.paths.setdefault(doubt, set()).add(path)

    def tell(self) -> None:
        """Takes in what other processes have seen, and warns of it."""
        for errors, digests, kinds in of_all_processes((self.errors, self.digests, self.paths)):
            self.errors |= errors
            self.digests |= digests
            for doubt, paths in kinds.items():
                self.paths[doubt] = self.paths.get(doubt, set()) | paths
        for doubt, paths in sorted(self.paths.items()):
            more = ", ..." if len(paths) > 1 else ""
            rank_zero_warn(printable(f"{len(paths)} of {len(self.digests)} images {doubt} ({min(paths)}{more})"))

    def tell_unreadable(self) -> None:
        """Names the files that could not be read."""
        for _, error in sorted(self.errors.items()):
            rank_zero_info(printable(error))
        if self.errors:
            rank_zero_warn(f"{len(self.errors)} of {len(self.digests)} images could not be read and have no score")

    def check_training(self) -> None:
        """Warns of training images that are there more than once.

        Raises:
            PatchadError: if some could not be read; it names all of them.
        """
        if self.errors:
            listed = "; ".join(error for _, error in sorted(self.errors.items()))
            raise PatchadError(
                printable(f"{len(self.errors)} training images cannot be read, mend or remove them: {listed}")
            )
        if copies := len(self.digests) - len(set(self.digests.values())):
            rank_zero_warn(f"{copies} of {len(self.digests)} {COPIES}")


def of_all_processes(value: Value) -> list[Value]:
    """The value that each process has, on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
