"""Whether good test images differ in kind from good training images, by their colours alone, as Markdown.

python -m benchmarks.normals --data ../shared/data

An image is six numbers: mean and deviation of red, green and blue, each over its deviation in training. Its distance to
the nearest other training image says how unusual it is; no model, score or threshold takes part.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from jsonargparse import auto_cli
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp

from benchmarks.products import HALVES
from patchad.data.images import read_image
from patchad.data.layouts import MagneticTile, detect_layout
from patchad.types import NORMAL


def main(data: Path = Path("../shared/data")) -> None:
    """Prints one row per set, with the p-value of the Kolmogorov-Smirnov test that both distances are of one kind.

    Args:
        data: the folder that the paths of benchmarks/products.yaml are below.
    """
    print(
        "| set | good images: training, test | median distance | farther than any training image | p |\n"
        + "|---" * 5
        + "|"
    )
    for product, place in (HALVES["choosing"] | HALVES["confirming"]).items():
        training, test = (colours(data / place, product, split) for split in ("train", "test"))
        unit = training.std(0) + np.finfo(float).eps
        among = cdist(training / unit, training / unit) + np.diag(np.full(len(training), np.inf))
        known, new = among.min(1), cdist(test / unit, training / unit).min(1)
        medians = f"{np.median(known):.2f}, {np.median(new):.2f}"
        farther = f"{(new > known.max()).sum()} of {len(new)}"
        print(f"| {product} | {len(known)}, {len(new)} | {medians} | {farther} | {ks_2samp(known, new)[1]:.2g} |")


def colours(root: Path, product: str, split: str) -> Float[np.ndarray, "images 6"]:
    """Mean and deviation of each colour of the good images of a split."""
    layout = MagneticTile(split="by_tile") if product == "magnetic_tile" else detect_layout(root)
    samples = [one for one in layout.samples(root) if one.split == split and one.defect == NORMAL]
    images = (read_image(one.path).flatten(1) for one in samples)
    return np.array([np.concatenate([image.mean(1), image.std(1)]) for image in images])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
