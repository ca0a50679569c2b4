"""Whether good test images differ in kind from good training images, by their colours alone, as Markdown.

python -m benchmarks.normals --data ../shared/data

An image is six numbers: mean and deviation of red, green and blue, each over its deviation in training. Its distance to
the nearest other training image says how unusual it is; no model, score or threshold takes part.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from jsonargparse import auto_cli
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp

from benchmarks.products import HALVES, good_images
from patchad.images import read_image


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
        training, test = (colours(good_images(product, data / place, split)) for split in ("train", "test"))
        unit = training.std(0) + np.finfo(float).eps
        among = cdist(training / unit, training / unit) + np.diag(np.full(len(training), np.inf))
        known, new = among.min(1), cdist(test / unit, training / unit).min(1)
        medians = f"{np.median(known):.2f}, {np.median(new):.2f}"
        farther = f"{(new > known.max()).sum()} of {len(new)}"
        print(f"| {product} | {len(known)}, {len(new)} | {medians} | {farther} | {ks_2samp(known, new)[1]:.2g} |")


def colours(paths: Sequence[Path]) -> Float[np.ndarray, "images 6"]:
    """Mean and deviation of each colour of some images."""
    images = (read_image(path).flatten(1) for path in paths)
    return np.array([np.concatenate([image.mean(1), image.std(1)]) for image in images])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
