"""Whether more images than by chance look unusual of late, without torch.

Source: Bates et al., Testing for outliers with conformal p-values, Annals of Statistics, 2023: p-values that share the
normal images they are compared with depend on each other, by an urn of Polya's.
"""

import math
from collections import deque
from fractions import Fraction

from patchad.errors import PatchadError

UNUSUAL = 0.05
"""P-values up to it are counted."""
BEGINS, ENDS = Fraction(1, 1000), Fraction(1, 20)
"""How probable as many by chance are at most when an alarm begins, and more than that when it ends: one that ended by
the first number would come and go with each image."""


class Drift:
    """Counts unusual images among the last ones.

    Args:
        window: so many images.
        normals: how many normal images the p-values are compared with.

    Attributes:
        alarm: whether there are more than chance explains.

    Raises:
        PatchadError: if the window, or the normal images, are too few for any alarm.
    """

    def __init__(self, window: int, normals: int) -> None:
        rank = math.floor(UNUSUAL * (normals + 1) + 1e-9)
        if not rank:
            raise PatchadError(f"{normals} normal images of the fit are too few for p-values of {UNUSUAL:g}")
        self._most = rank / (normals + 1)
        self._begins, self._ends = (critical_count(window, normals, rank, chance) for chance in (BEGINS, ENDS))
        if self._begins > window:
            raise PatchadError(f"{window} images are too few for an alarm; give more, such as --drift 200")
        self.alarm, self._unusual = False, deque[bool](maxlen=window)

    @property
    def full(self) -> bool:
        """Whether there were as many images as the window has."""
        return len(self._unusual) == self._unusual.maxlen

    def take(self, p_value: float) -> str | None:
        """Counts an image in; a sentence where an alarm begins or ends. None begins before the window is full."""
        self._unusual.append(p_value <= self._most + 1e-9)
        count, window = sum(self._unusual), len(self._unusual)
        changes = count < self._ends if self.alarm else self.full and count >= self._begins
        if not changes:
            return None
        self.alarm = not self.alarm
        said = f"{count} of the last {window} images have p-values of at most {UNUSUAL:g}"
        return f"drift: {said}; chance explains {self._begins - 1}" if self.alarm else f"drift is over: {said}"


def critical_count(images: int, normals: int, rank: int, chance: Fraction) -> int:
    """The least count that is improbable: as many or more new normal images have a p-value of rank / (normals + 1).

    Where new and old are exchangeable, `count` of the new ones exceed the rank-th highest of the old ones in
    C(count + rank - 1, count) C(images - count + normals - rank, images - count) of C(normals + images, images) orders.
    It is above `images` where no count is improbable.

    Args:
        images: new ones.
        normals: old ones.
        rank: of one of the old ones, from the highest down, which is 1.
        chance: most that it may be probable.

    Example:
        >>> critical_count(2, normals=19, rank=1, chance=Fraction(1, 100))
        2
    """
    orders, as_many = math.comb(normals + images, images), 0
    for count in range(images, -1, -1):
        rest = images - count
        as_many += math.comb(count + rank - 1, count) * math.comb(rest + normals - rank, rest)
        if as_many > chance * orders:
            return count + 1
    return 0
