"""What scores of normal images promise for new ones: threshold and p-values. No torch is needed.

Sources: split conformal prediction (Vovk et al., Algorithmic Learning in a Random World, 2005); each normal image is
scored without itself, as in the jackknife+ (Barber et al., Annals of Statistics, 2021).
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from patchad.errors import PatchadError, check_range

Verdict = Literal["anomalous", "review", "normal"]
"""What may be said of an image: reject it, look at it, accept it."""


class Limits(NamedTuple):
    """Where verdicts change; all three come from normal images alone.

    Attributes:
        threshold: scores above it are anomalous.
        review_threshold: scores above it are for somebody to look at; the threshold, where no such band is asked for.
        map_threshold: pixels of a map above it are outlined.
    """

    threshold: float
    review_threshold: float
    map_threshold: float

    def verdict(self, score: float) -> Verdict:
        """What a score means.

        Example:
            >>> [Limits(3.0, 2.0, 9.0).verdict(score) for score in (2.0, 2.5, 3.5)]
            ['normal', 'review', 'anomalous']
        """
        if score > self.threshold:
            return "anomalous"
        return "review" if score > self.review_threshold else "normal"


def limits(
    scores: np.ndarray, peaks: np.ndarray, target_fpr: float, review_fpr: float | None = None
) -> tuple[Limits, float]:
    """The limits that normal images set, and the false-positive rate that the threshold promises.

    Args:
        scores: of normal images, `[images]`.
        peaks: the highest pixel of each one's map, `[images]`.
        target_fpr: share of normal images that may be called anomalous, and that may have an outline.
        review_fpr: share that may be called anomalous or looked at; None asks for no band between the two.

    Raises:
        PatchadError: if there is no score, one is nan or infinite, or the band is none.

    Example:
        >>> limits(np.arange(99.0), np.arange(99.0) * 2, target_fpr=0.05, review_fpr=0.2)[0]
        Limits(threshold=94.0, review_threshold=79.0, map_threshold=188.0)
    """
    check_band(target_fpr, review_fpr)
    threshold, promised = conformal_threshold(scores, target_fpr)
    review, _ = conformal_threshold(scores, target_fpr if review_fpr is None else review_fpr)
    return Limits(threshold, review, conformal_threshold(peaks, target_fpr)[0]), promised


def check_band(target_fpr: float, review_fpr: float | None) -> None:
    """Raises PatchadError unless both are rates, and there are scores between their thresholds."""
    check_range({"target_fpr": math.nan if target_fpr is None else target_fpr}, 0, 1, above=True)
    check_range({"review_fpr": review_fpr}, 0, 1, above=True)
    if review_fpr is not None and review_fpr <= target_fpr:
        raise PatchadError(f"review_fpr {review_fpr:g} must lie above target_fpr {target_fpr:g}, to look at more")


def conformal_threshold(scores: np.ndarray, target_fpr: float) -> tuple[float, float]:
    """The ceil((n + 1) (1 - target_fpr))-th smallest of n scores, and the false-positive rate that it promises.

    A new normal image, exchangeable with these, exceeds that score with at most the promised probability. With too few
    images for the target (`images_needed`) it is their maximum, which promises 1 / (n + 1); it is never below their
    minimum.

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
    rank = max(1, min(count, math.ceil((count + 1) * (1 - target_fpr) - 1e-9)))
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
