"""Arrays -> pictures: heat maps, outlines, contact sheets."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from patchad.pyramid import crop_resize
from patchad.types import NORMAL, ImageBatch, Prediction

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


def montage(rows: Sequence[tuple[str, Sequence[np.ndarray]]], cell: int) -> Image.Image:
    """One picture with a row of small pictures for each caption, each filling `cell` x `cell` pixels."""
    caption, gap = 80, 2
    width = caption + max((len(pictures) for _, pictures in rows), default=0) * (cell + gap)
    board = Image.new("RGB", (width, max(1, len(rows)) * (cell + gap)), "white")
    draw = ImageDraw.Draw(board)
    for row, (text, pictures) in enumerate(rows):
        draw.text((4, row * (cell + gap) + 4), text, fill="black")
        for column, picture in enumerate(pictures):
            fitted = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            board.paste(fitted, (caption + column * (cell + gap), row * (cell + gap)))
    return board


class SheetEntry(NamedTuple):
    """What the contact sheet shows of one image."""

    name: str
    defect: str
    score: float
    anomalous: bool
    image: np.ndarray
    truth: np.ndarray
    map: np.ndarray


def sheet_entry(prediction: Prediction, batch: ImageBatch, number: int) -> SheetEntry:
    """One image of a batch, at the size of its content."""
    height, width = batch.content[number].tolist()
    content = torch.tensor([[height, width]])
    values = crop_resize(prediction.map[number, None].cpu(), content, (height, width))[0].numpy()
    truth = Image.fromarray(batch.mask[number].cpu().numpy()).resize((width, height), Image.Resampling.NEAREST)
    path = Path(batch.path[number])
    return SheetEntry(
        name=f"{path.parent.name}/{path.name}",
        defect=batch.defect[number],
        score=float(prediction.score[number]),
        anomalous=bool(prediction.anomalous[number]),
        image=to_rgb(batch.image[number, :, :height, :width]),
        truth=np.asarray(truth, dtype=np.uint8)[:, :, None].repeat(3, axis=2) * 255,
        map=values,
    )


def readable(batch: ImageBatch) -> list[int]:
    """Numbers of the images of a batch that could be read."""
    return [number for number, error in enumerate(batch.error) if not error]


def row(entry: SheetEntry, low: float, threshold: float) -> tuple[str, list[np.ndarray]]:
    """Caption and panels of one image."""
    verdict = "anomalous" if entry.anomalous else "normal"
    correct = entry.anomalous == (entry.defect != NORMAL)
    text = f"{entry.name}\nscore {entry.score:.4g}\nthreshold {threshold:.4g}\nverdict: {verdict}"
    heat = colour(entry.map, low, threshold)
    caption = text if correct else f"{text}\nWRONG"
    return caption, [entry.image, entry.truth, heat, overlay(entry.image, heat)]


def sheet(entries: Sequence[SheetEntry], low: float, threshold: float) -> Image.Image:
    """The contact sheet of some images; heat maps are blue up to `low`, red from the threshold upwards."""
    rows = [row(entry, low, threshold) for entry in entries]
    return contact_sheet(rows, ("image", "truth", "heat map", "image + heat map"))
