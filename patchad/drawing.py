"""Maps and regions -> colours and outlines, without torch."""

import numpy as np

RAMP = np.array([[15, 15, 80], [70, 40, 160], [200, 50, 110], [250, 130, 40], [255, 245, 150]], dtype=np.float32)
"""From dark blue over magenta to pale yellow: ever brighter, so a map reads in grey, too."""
HALVING = 4.0
"""How often a value is doubled above the threshold for the colours to go half of the way that is left."""
FOUND, TRUTH = (255, 0, 255), (0, 220, 0)
"""Colours of the outlines of what a map says and of what is true, RGB."""


def heat(values: np.ndarray, threshold: float) -> np.ndarray:
    """A map in colours that mean the same in every picture, and never end.

    0 is dark blue; up to the threshold of the map they follow the value, to magenta; above it the number of its
    doublings: 16 times the threshold is orange, what is far beyond pale yellow.

    Args:
        values: a map, `[height, width]`, 0 and above.
        threshold: of the map.

    Returns:
        RGB, uint8 `[height, width, 3]`.

    Example:
        >>> heat(np.array([[0.0, 3.0, 48.0]]), threshold=3.0).tolist()
        [[[15, 15, 80], [200, 50, 110], [250, 130, 40]]]
    """
    ratio = values / max(threshold, 1e-12)
    doublings = np.log2(np.maximum(ratio, 1))
    place = np.where(ratio < 1, ratio / 2, 1 - 0.5 / (1 + doublings / HALVING)) * (len(RAMP) - 1)
    return np.stack([np.interp(place, range(len(RAMP)), channel) for channel in RAMP.T], axis=-1).astype(np.uint8)


def outline(region: np.ndarray, width: int = 1) -> np.ndarray:
    """What lies around a region, and on the picture's edge within it, so that nothing of a small one is covered.

    Args:
        region: bool `[height, width]`.
        width: in pixels.

    Returns:
        Bool `[height, width]`.

    Example:
        >>> outline(np.eye(3, dtype=bool)[:2]).astype(int)
        array([[1, 1, 0],
               [1, 1, 1]])
    """
    around = region
    for _ in range(width):
        padded = np.pad(around, 1)
        around = around | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    edge = np.pad(np.zeros(np.maximum(np.array(region.shape) - 2 * width, 0), bool), width, constant_values=True)
    return (around & ~region) | (region & edge[: region.shape[0], : region.shape[1]])


def outlined(image: np.ndarray, region: np.ndarray, colour: tuple[int, int, int] = FOUND) -> np.ndarray:
    """An image with the outline of a region over it, as wide as it takes to be seen.

    Args:
        image: RGB, uint8 `[height, width, 3]`.
        region: bool `[height, width]`.
        colour: RGB.
    """
    drawn = image.copy()
    drawn[outline(region, width=1 + min(region.shape) // 256)] = colour
    return drawn
