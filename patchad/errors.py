"""The one error that a user can mend."""

import math
from collections.abc import Mapping
from numbers import Real

MOST_SEED = 2**31 - 1
"""What all libraries take."""


class PatchadError(ValueError):
    """Something that the user can mend: the command line prints it as one line and exits with 2."""


def printable(text: str) -> str:
    r"""Text with what no terminal shows, such as bytes in the name of a file, as escapes.

    Example:
        >>> print(printable("Kratzer \udcfc"))
        Kratzer \udcfc
    """
    return text.encode("utf-8", "backslashreplace").decode()


def check_seed(seed: int) -> None:
    """Raises PatchadError unless all libraries take a seed."""
    check_range({"seed": seed}, 0, MOST_SEED)


def check_range(
    options: Mapping[str, int | float | None], low: int | float, high: int | float = math.inf, above: bool = False
) -> None:
    """Raises PatchadError unless options are finite numbers of a range; None is left alone.

    Args:
        options: by their names.
        low: the least number.
        high: the highest.
        above: whether they must lie above the least.

    Example:
        >>> check_range({"smoothing": 0.5, "tile": None}, 0, 1)
    """
    for name, value in options.items():
        if value is None:
            continue
        if not isinstance(value, Real):
            raise PatchadError(f"{name} {value!r} must be a number")
        if not (math.isfinite(value) and low <= value <= high and not (above and value == low)):
            least = f"lie above {low:g}" if above else f"be at least {low:g}"
            most = "" if math.isinf(high) else f" and be at most {high:g}" if above else f" and at most {high:g}"
            raise PatchadError(f"{name} {value} must {least}{most}")
