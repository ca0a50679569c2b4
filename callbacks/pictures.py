"""Arrays -> pictures: heat maps, outlines, contact sheets."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

# from dark blue over green to red: the ends differ in brightness, so the map reads in grey, too
RAMP = np.array([[20, 20, 80], [30, 100, 200], [60, 190, 160], [250, 220, 70], [220, 30, 30]], dtype=np.float32)


def colour(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values `[height, width]` as RGB uint8 `[height, width, 3]`; `low` and below is blue, `high` and above is red."""
    place = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(RAMP) - 1)
    return np.stack([np.interp(place, range(len(RAMP)), channel) for channel in RAMP.T], axis=-1).astype(np.uint8)


def to_rgb(image: Tensor) -> np.ndarray:
    """An image `[3, height, width]` in [0, 1] as uint8 `[height, width, 3]`."""
    return (image.detach().cpu().permute(1, 2, 0).numpy() * 255).round().clip(0, 255).astype(np.uint8)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Half image, half heat map; both uint8 `[height, width, 3]`."""
    return ((image.astype(np.uint16) + heat) // 2).astype(np.uint8)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], titles: Sequence[str], cell: int = 160
) -> Image.Image:
    """One picture with a row per image: its caption and its panels, each fitted into `cell` x `cell` pixels."""
    caption, gap, head = 190, 6, 22
    width, height = caption + len(titles) * (cell + gap), head + len(rows) * (cell + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((caption + column * (cell + gap), 5), title, fill="black")
    for row, (text, panels) in enumerate(rows):
        top = head + row * (cell + gap)
        draw.multiline_text((6, top + 4), text, fill="black", spacing=4)
        for column, panel in enumerate(panels):
            picture = Image.fromarray(panel)
            picture.thumbnail((cell, cell))
            sheet.paste(picture, (caption + column * (cell + gap), top))
    return sheet
