"""Pictures of an image, small enough for a page that is mailed: a few kilobytes, whatever the image shows."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from patchad.callbacks.pictures import SheetEntry
from patchad.drawing import FOUND, TRUTH, heat, outline

BUDGET = 7000
"""Bytes of all pictures of an image."""
OUTLINE_BUDGET, HEAT_BUDGET = 1000, 1500
"""Bytes of one outline and of the heat map, which leave the rest to the image."""
LONGEST, LONGEST_HEAT = 224, 112
"""Longer side in pixels of the image and its outlines, and of the heat map, which is smooth."""
QUALITIES = (80, 65, 50, 35, 20)
"""Of WebP, from what looks like the image down to what fits."""


class Thumbnails(NamedTuple):
    """Pictures of an image, as the bytes of files. Outlines have the size of the image, and are clear elsewhere.

    Attributes:
        image: WebP.
        heat: the map, WebP.
        found: outline of what is found, PNG; empty where nothing is.
        truth: outline of the defects, PNG; empty where there are none, None where it is not known where they are.
    """

    image: bytes
    heat: bytes
    found: bytes
    truth: bytes | None


def thumbnails(entry: SheetEntry, map_threshold: float) -> Thumbnails:
    """Pictures of an image in at most `BUDGET` bytes.

    Args:
        entry: the image.
        map_threshold: pixels of a map above it are found.
    """
    found = outline_file(entry.map > map_threshold, FOUND)
    truth = outline_file(entry.truth, TRUTH) if entry.has_mask else None
    values = np.asarray(fitted(Image.fromarray(entry.map.astype(np.float32)), LONGEST_HEAT))
    warm = compressed(Image.fromarray(heat(values, map_threshold)), HEAT_BUDGET)
    rest = BUDGET - len(found) - len(truth or b"") - len(warm)
    return Thumbnails(compressed(fitted(Image.fromarray(entry.image), LONGEST), rest), warm, found, truth)


def fitted(picture: Image.Image, longest: int) -> Image.Image:
    """A picture whose longer side has at most so many pixels."""
    scale = min(1.0, longest / max(picture.size))
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


def compressed(picture: Image.Image, budget: int) -> bytes:
    """A picture as WebP of the highest quality that fits into some bytes, and smaller where none does.

    Example:
        >>> len(compressed(Image.effect_noise((99, 99), 99), budget=900)) <= 900
        True
    """
    for quality in QUALITIES:
        file = io.BytesIO()
        picture.save(file, format="WEBP", quality=quality)
        if file.tell() <= budget:
            return file.getvalue()
    return compressed(picture.reduce(2), budget)


def outline_file(region: np.ndarray, colour: tuple[int, int, int]) -> bytes:
    """The outline of a region as PNG, of half the size where it is too long for `OUTLINE_BUDGET`; empty if it is none.

    Args:
        region: bool `[height, width]`.
        colour: RGB.
    """
    if not region.any():
        return b""
    longest = LONGEST
    while len(file := png(outline(shrunk(region, longest)), colour)) > OUTLINE_BUDGET:
        longest //= 2
    return file


def shrunk(region: np.ndarray, longest: int) -> np.ndarray:
    """A region at most so many pixels long; each pixel that it touches belongs to it, so that no spot is lost."""
    return np.asarray(fitted(Image.fromarray(region.astype(np.float32)), longest)) > 0


def png(drawn: np.ndarray, colour: tuple[int, int, int]) -> bytes:
    """PNG of one colour where drawn, bool `[height, width]`, and clear elsewhere."""
    picture, file = Image.fromarray(drawn.astype(np.uint8)).convert("P"), io.BytesIO()
    picture.putpalette([*colour, *colour])
    picture.save(file, format="PNG", bits=1, transparency=bytes([0, 255]), optimize=True)
    return file.getvalue()
