"""What of a folder is taken and what is left out, in words."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from patchad.data.layouts import Layout, known_layout
from patchad.folders import files_below, is_hidden, is_image
from patchad.types import NORMAL, Sample


def listing(root: Path, samples: Sequence[Sample], layout: Layout | None = None) -> Iterator[str]:
    """Sentences about a folder: how many images are taken and what is left out, and masks that are missing.

    Args:
        root: the folder.
        samples: what is taken of it.
        layout: how it is arranged; None where that does not matter.
    """
    masks = root / layout.masks if layout and layout.masks else None
    listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(left_out(root, samples, masks).items()))
    yield f"{root}: {len(samples)} images taken" + (f"; left out: {listed}" if listed else "")
    defective = [sample for sample in samples if sample.split == "test" and sample.defect != NORMAL]
    missing = [sample.path for sample in defective if sample.mask is None]
    if layout and missing:
        name = layout.mask_name(root, missing[0]) if masks else None
        looked = f"; looked for {name}.png and {name}_mask.png, among others" if name else ""
        yield f"{len(missing)} defective test images have no mask: pixel metrics leave them out{looked}"


def left_out(root: Path, samples: Sequence[Sample], masks: Path | None) -> Counter[str]:
    """How many files and folders below a root are none of the samples and none of their masks, by kind."""
    taken = {path for sample in samples for path in (sample.path, sample.mask)}
    rest = [path for path in files_below(root) if path not in taken and not is_hidden(path.relative_to(root))]
    kinds = Counter(kind(path, masks) for path in rest)
    if empty := sum(not inner and not names for _, inner, names in os.walk(root)):
        kinds["empty folders"] = empty
    return kinds


def kind(path: Path, masks: Path | None) -> str:
    """What a file is that is left out."""
    if is_image(path) and (path.stem.endswith("_mask") or (masks and path.is_relative_to(masks))):
        return "masks that fit no defective image"
    return path.suffix.lower() or "without suffix"


def product_doubt(root: Path) -> str | None:
    """A sentence about a folder to predict that is a whole product."""
    layout = known_layout(root)
    return layout and (
        f"{root} is the root of a product ({type(layout).__name__}): every image below it is scored, also masks and "
        "those that were learned from; give --data.root one of its folders"
    )


def class_doubt(test: Sequence[Sample]) -> str | None:
    """A sentence about test images that are all of one class."""
    kinds = {"normal" if sample.defect == NORMAL else "defective" for sample in test}
    return f"all {len(test)} test images are {kinds.pop()}: no AUROC without both kinds" if len(kinds) == 1 else None
