"""Seeded defects, painted on images of any content."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from patchad.errors import PatchadError

Picture: TypeAlias = Float[np.ndarray, "height width 3"]
Plane: TypeAlias = Float[np.ndarray, "height width"]
Region: TypeAlias = Bool[np.ndarray, "height width"]

FORMAT = 2
"""Number of the recipe of defects and pictures; to be raised when the same seed gives others."""
SMALLEST = 32
"""Shortest side of an image in pixels that a defect can be painted on."""
FAINTEST = 0.03
"""Least mean change over a defect, of [0, 1], that is left as painted."""
SHIFT = 0.08
"""Change of tone that replaces a defect which cannot be seen."""
STEP = 4 / 255
"""Least change of each pixel of a defect; survives rounding to 8 bits."""
SIZES = (0.7, 3.0)
"""Least and most sizes of the defects that training paints, over the usual one."""
COARSENESS = (0.6, 3.0)
"""Pixels of the image over those of the canvas that training paints on: the higher, the softer the defect."""


def paint_defect(
    image: Float[np.ndarray, "height width 3"], rng: np.random.Generator, kind: str | None = None, size: float = 1.0
) -> tuple[Float[np.ndarray, "height width 3"], Bool[np.ndarray, "height width"]]:
    """Paints one defect on an image of any content.

    Args:
        image: RGB in [0, 1], float32, each side at least 32 pixels; left as it is. Where the light was evened out
            some pixels may be above 1: what is painted may then be as bright.
        rng: draws everything about the defect.
        kind: one of `DEFECTS`; drawn as well when left out.
        size: of the defect, over its usual one.

    Returns:
        The painted image, float32, and the mask: every pixel in it differs from `image` by 4/255 or more in some
        channel, every other pixel is untouched, and it is never empty.

    Raises:
        PatchadError: if the kind is unknown or the image is too small.
    """
    if min(image.shape[:2]) < SMALLEST:
        raise PatchadError(
            f"defects need images of {SMALLEST} pixels or more, not {image.shape[0]} x {image.shape[1]}; "
            "raise image_size, or give data.validate_on none or test"
        )
    kind = str(rng.choice(list(DEFECTS))) if kind is None else kind
    if kind not in DEFECTS:
        raise PatchadError(f"there is no defect {kind}; there are {', '.join(DEFECTS)}")
    painted, region = DEFECTS[kind](image, rng, size * min(image.shape[:2]))
    return _make_visible(image, _within_range(painted, image), region), region


def paint_defects(
    image: Float[np.ndarray, "height width 3"], rng: np.random.Generator, count: int = 2
) -> tuple[Float[np.ndarray, "height width 3"], Bool[np.ndarray, "height width"]]:
    """Paints defects of any kind, size and sharpness: each is painted on a coarser or finer image, and scaled back.

    Args:
        image: RGB as for `paint_defect`; left as it is.
        rng: draws everything about the defects.
        count: how many.

    Returns:
        The painted image, float32, and the mask; every other pixel is untouched.
    """
    mask = np.zeros(image.shape[:2], dtype=bool)
    for _ in range(count):
        size, coarseness = (float(np.exp(rng.uniform(*np.log(bounds)))) for bounds in (SIZES, COARSENESS))
        canvas = _resize(image, tuple(max(SMALLEST, round(length / coarseness)) for length in mask.shape))
        painted, region = paint_defect(canvas, rng, size=size)
        region = _resize(region[..., None].astype(np.float32), mask.shape)[..., 0] > 0.5
        changed = _within_range(image + _resize(painted - canvas, mask.shape), image)
        image, mask = np.where(region[..., None], changed, image).astype(np.float32), mask | region
    return image, mask


def _make_visible(image: Picture, painted: Picture, region: Region) -> Picture:
    """The painted image inside the region, changed enough to see; the image itself outside."""
    if _change(image, painted)[region].mean() < FAINTEST:  # such as a blur of a flat area
        painted = _within_range(image + (SHIFT if image[region].mean() < 0.5 else -SHIFT), image)
    inward = image + np.where(image < 0.5, STEP, -STEP)
    painted = np.where(_change(image, painted)[..., None] < STEP, inward, painted)
    return np.where(region[..., None], painted, image).astype(np.float32)


def _within_range(painted: Picture, image: Picture) -> Picture:
    """What is painted, no darker than 0 and no brighter than 1, or than the image itself where that goes further."""
    return np.clip(painted, min(0, image.min()), max(1, image.max()))


def _change(image: Picture, painted: Picture) -> Plane:
    """Absolute difference of each pixel in the channel where it is largest."""
    return np.abs(painted - image).max(-1)


def _scratch(image: Picture, rng: np.random.Generator, side: float) -> tuple[Picture, Region]:
    """A thin bent line, brighter or darker than what it crosses."""
    distance = _distance_to_curve(image.shape[:2], _curve(image.shape[:2], rng, side))
    half_width = max(0.9, rng.uniform(0.005, 0.008) * side)
    alpha = np.clip(half_width + 0.5 - distance, 0, 1) * rng.uniform(0.75, 1)
    region = alpha > 0.2
    tone = rng.uniform(0.85, 1) if image[region].mean() < 0.55 else rng.uniform(0, 0.2)
    return _blend(image, np.float32(tone), alpha), region


def _stain(image: Picture, rng: np.random.Generator, side: float) -> tuple[Picture, Region]:
    """A translucent discoloured blob, densest at its rim like dried liquid."""
    level = _blob(image.shape[:2], rng, rng.uniform(0.08, 0.12) * side)
    rim = np.clip(1 - np.abs(level - 0.2) * 6, 0, 1)
    alpha = np.clip(level * 6, 0, 1) * rng.uniform(0.55, 0.75) + 0.2 * rim
    region = alpha > 0.12
    return _blend(image, image * 0.3 + _stain_colour(image[region].mean(0), rng) * 0.7, alpha), region


def _stain_colour(surface: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the two stains that stand out most from the mean colour `[3]` of the surface."""
    stains = np.array(STAINS, np.float32)
    by_contrast = np.linalg.norm(stains - surface, axis=1).argsort()
    return stains[rng.choice(by_contrast[-2:])]


def _dent(image: Picture, rng: np.random.Generator, side: float) -> tuple[Picture, Region]:
    """A dip: the surface is drawn together and one flank is bright, the other dark."""
    radius = rng.uniform(0.06, 0.1) * side
    down, right, angle = *_centre(image.shape[:2], rng), rng.uniform(0, 2 * np.pi)
    rows, columns = grid(image.shape[:2])
    y, x = (rows - down) / radius, (columns - right) / radius
    inside = np.clip(1 - y**2 - x**2, 0, 1)
    pull = 1 + rng.uniform(0.6, 1.0) * inside
    warped = _sample(image, down + y * pull * radius, right + x * pull * radius)
    light = (np.sin(angle) * y + np.cos(angle) * x) * inside * rng.uniform(0.6, 0.9)
    return warped + light[..., None], inside > 0.05


def _wear(image: Picture, rng: np.random.Generator, side: float) -> tuple[Picture, Region]:
    """A patch rubbed smooth, its texture gone."""
    level = _blob(image.shape[:2], rng, rng.uniform(0.08, 0.13) * side)
    sigma = max(1.5, rng.uniform(0.018, 0.026) * side)
    tone = np.float32(rng.choice([-1, 1]) * rng.uniform(0.04, 0.1))
    smooth = ndimage.gaussian_filter(image, (sigma, sigma, 0)) + tone
    alpha = np.clip(level * 4, 0, 1)
    return _blend(image, smooth, alpha), alpha > 0.2


def _hole(image: Picture, rng: np.random.Generator, side: float) -> tuple[Picture, Region]:
    """A dark pit with a bright burr around it."""
    level = _blob(image.shape[:2], rng, max(2.5, rng.uniform(0.032, 0.055) * side))
    rim = np.clip(1 - np.abs(level - 0.1) * 4, 0, 1)
    pit = np.clip((level - 0.2) * 5, 0, 1)
    painted = _blend(_blend(image, np.float32(0.95), 0.8 * rim), np.float32(rng.uniform(0.02, 0.1)), pit)
    return painted, np.maximum(rim, pit) > 0.2


def _misplaced(image: Picture, rng: np.random.Generator, side: float) -> tuple[Picture, Region]:
    """A rectangle cut from another part of the picture, turned and pasted."""
    size = np.array(image.shape[:2])
    target, source = _centre(size, rng), _centre(size, rng)
    rows, columns = grid(size)
    tilt, turn = rng.uniform(0, np.pi), rng.uniform(np.pi / 6, 5 * np.pi / 6)
    y, x = rotate(rows - target[0], columns - target[1], tilt)
    half = rng.uniform(0.045, 0.09, 2) * side
    pasted_y, pasted_x = rotate(rows - target[0], columns - target[1], turn)
    pasted = _sample(image, source[0] + pasted_y, source[1] + pasted_x)
    tone = rng.choice([rng.uniform(0.75, 0.88), rng.uniform(1.12, 1.25)])
    return pasted * np.float32(tone), (np.abs(y) < half[0]) & (np.abs(x) < half[1])


STAINS = ((0.45, 0.18, 0.03), (0.22, 0.03, 0.35), (0.10, 0.42, 0.30), (0.80, 0.70, 0.30))
"""Colours of rust, ink, verdigris and grease."""
DEFECTS: Mapping[str, Callable[[Picture, np.random.Generator, float], tuple[Picture, Region]]] = {
    "scratch": _scratch,
    "stain": _stain,
    "dent": _dent,
    "wear": _wear,
    "hole": _hole,
    "misplaced": _misplaced,
}
"""Painters by the name of their defect type: image, generator and the length in pixels that sizes are shares of, to the
painted image and where it applies."""


def _blend(image: Picture, colour: np.ndarray | np.float32, alpha: Plane) -> Picture:
    """The image, with the colour over it as opaque as alpha."""
    return image + alpha[..., None].astype(np.float32) * (colour - image)


def _centre(size: tuple[int, int] | np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Row and column of a point that is not at the very edge."""
    down, right = rng.uniform(0.12, 0.88, 2) * np.array(size)
    return float(down), float(right)


def _blob(size: tuple[int, int], rng: np.random.Generator, radius: float) -> Plane:
    """1 in the centre of an irregular blob, 0 on its outline, negative outside; radius in pixels."""
    down, right = _centre(size, rng)
    rows, columns = grid(size)
    y, x = rows - down, columns - right
    angle, outline = np.arctan2(y, x), np.ones(size)
    for waves, phase in zip((2, 3, 5), rng.uniform(0, 2 * np.pi, 3), strict=True):
        outline += rng.uniform(0.05, 0.4 / waves) * np.cos(waves * angle + phase)
    return 1 - np.hypot(y, x) / (radius * outline)


def _curve(size: tuple[int, int], rng: np.random.Generator, side: float) -> np.ndarray:
    """Points `[point, 2]` in pixels along a bent line that starts inside the picture and leads towards its middle."""
    start = np.array(_centre(size, rng))
    inward = np.arctan2(*(np.array(size) / 2 - start)) + rng.uniform(-0.9, 0.9)
    length = rng.uniform(0.22, 0.42) * side
    along, across = np.array([np.sin(inward), np.cos(inward)]), np.array([np.cos(inward), -np.sin(inward)])
    steps = np.linspace(0, 1, 24)[:, None]
    bend = rng.uniform(-0.15, 0.15) * 4 * steps * (1 - steps)
    return start + length * (steps * along + bend * across)


def _distance_to_curve(size: tuple[int, int], points: np.ndarray) -> Plane:
    """Distance in pixels of every pixel to the line through the points."""
    rows, columns = grid(size)
    distance = np.full(size, np.inf)
    for (y0, x0), (y1, x1) in pairwise(points):
        dy, dx = y1 - y0, x1 - x0
        nearest = np.clip(((rows - y0) * dy + (columns - x0) * dx) / (dy**2 + dx**2), 0, 1)
        distance = np.minimum(distance, np.hypot(rows - y0 - nearest * dy, columns - x0 - nearest * dx))
    return distance


def grid(size: tuple[int, int] | np.ndarray) -> tuple[Plane, Plane]:
    """Row and column of every pixel."""
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
    return rows, columns


def rotate(y: np.ndarray, x: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in a frame turned by the angle in radians."""
    return np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x


def _sample(image: np.ndarray, rows: Plane, columns: Plane) -> np.ndarray:
    """The image `[height, width, channels]` at fractional rows and columns, mirrored beyond its edges."""
    channels = np.moveaxis(image, -1, 0)
    places = (rows, columns)
    return np.stack([ndimage.map_coordinates(plane, places, order=1, mode="reflect") for plane in channels], -1)


def _resize(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The image `[height, width, channels]` at another height x width in pixels."""
    rows, columns = grid(np.array(size))
    down, right = np.array(image.shape[:2]) / size
    return _sample(image, (rows + 0.5) * down - 0.5, (columns + 0.5) * right - 0.5)
