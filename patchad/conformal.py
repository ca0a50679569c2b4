"""What scores of normal images promise for new ones: threshold and p-values. No torch is needed.

Sources: split conformal prediction (Vovk et al., Algorithmic Learning in a Random World, 2005); each normal image is
scored without itself, as in the jackknife+ (Barber et al., Annals of Statistics, 2021).
"""

import math

import numpy as np

from patchad.errors import PatchadError


def conformal_threshold(scores: np.ndarray, target_fpr: float) -> tuple[float, float]:
    """The ceil((n + 1) (1 - target_fpr))-th smallest of n scores, and the false-positive rate that it promises.

    A new normal image, exchangeable with these, exceeds that score with at most the promised probability. With too few
    images for the target (`images_needed`) it is their maximum, which promises 1 / (n + 1).

    Args:
        scores: of normal images, `[images]`.
        target_fpr: the rate asked for.

    Raises:
        PatchadError: if there is no score, or one is nan or infinite.

    Example:
        >>> conformal_threshold(np.array([3.0, 1.0, 2.0]), target_fpr=0.01)
        (3.0, 0.25)
    """
    count = len(scores)
    if not count:
        raise PatchadError("no normal image is left for the threshold; give training images")
    if not np.isfinite(scores).all():
        raise PatchadError(
            "scores of normal images are nan or infinite, and no threshold can be set by them: fit again"
        )
    rank = min(count, math.ceil((count + 1) * (1 - target_fpr) - 1e-9))
    return float(np.sort(scores)[rank - 1]), 1 - rank / (count + 1)


def p_values(scores: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Of each score `[scores]`, the share of the normal images, itself among them, that score as high or higher.

    A normal image has a p-value of at most p with a probability of at most p.

    Args:
        scores: of new images, `[scores]`.
        normals: scores of normal images, `[images]`.

    Example:
        >>> p_values(np.array([0.5, 2.0, 9.0]), normals=np.array([1.0, 2.0, 3.0]))
        array([1.  , 0.75, 0.25])
    """
    higher = len(normals) - np.searchsorted(np.sort(normals), scores, side="left")
    return (1 + higher) / (1 + len(normals))


def images_needed(target_fpr: float) -> int:
    """The least number of normal images with which a false-positive rate can be promised.

    Example:
        >>> images_needed(0.05)
        19
    """
    return math.ceil(1 / target_fpr - 1e-9) - 1
