"""Batches -> pictures: contact sheets and montages."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from patchad.conformal import Limits
from patchad.drawing import TRUTH, heat, outlined
from patchad.pyramid import crop_resize
from patchad.types import NORMAL, ImageBatch, Prediction


def to_rgb(image: Tensor) -> np.ndarray:
    """An image `[3, height, width]` in [0, 1] as uint8 `[height, width, 3]`."""
    return (image.detach().cpu().permute(1, 2, 0).numpy() * 255).round().clip(0, 255).astype(np.uint8)


FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arialuni.ttf", "msyh.ttc", "segoeui.ttf")
"""Of systems, for what Pillow's own font, which knows ASCII, does not have."""
NO_GLYPH = "\uffff"


def written(text: str) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    r"""A caption and a font that has all of it; where no font of the system does, what is not ASCII is escaped.

    Example:
        >>> written("good/000.png")[0]
        'good/000.png'
    """
    if not text.isascii():
        for name in FONTS:
            with suppress(OSError):  # not on this system
                font = ImageFont.truetype(name, size=10)
                nothing = glyph(font, NO_GLYPH)
                if all(character == "\n" or glyph(font, character) != nothing for character in text):
                    return text, font
    return text.encode("ascii", "backslashreplace").decode(), ImageFont.load_default()


def glyph(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """What a font draws for a character."""
    return bytes(font.getmask(character))  # type: ignore[arg-type]


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
        text, font = written(text)
        draw.multiline_text((6, top + 4), text, fill="black", spacing=4, font=font)
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
    """What is shown of one image, at the size at which it was scored and in the light of its file.

    Attributes:
        name: of its file and the folder around it.
        defect: its defect type.
        score: its anomaly score.
        anomalous: the verdict.
        image: RGB, uint8 `[height, width, 3]`.
        truth: True on defects, bool `[height, width]`.
        has_mask: whether that is known.
        map: float32 `[height, width]`.
    """

    name: str
    defect: str
    score: float
    anomalous: bool
    image: np.ndarray
    truth: np.ndarray
    has_mask: bool
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
        image=to_rgb(batch.image[number, :, :height, :width] / batch.gain[number]),
        truth=np.asarray(truth),
        has_mask=bool(batch.has_mask[number]),
        map=values,
    )


def readable(batch: ImageBatch) -> list[int]:
    """Numbers of the images of a batch that could be read."""
    return [number for number, error in enumerate(batch.error) if not error]


def row(entry: SheetEntry, limits: Limits) -> tuple[str, list[np.ndarray]]:
    """Caption and panels of one image."""
    verdict = limits.verdict(entry.score)
    text = f"{entry.name}\nscore {entry.score:.4g}\nthreshold {limits.threshold:.4g}\nverdict: {verdict}"
    wrong = verdict != "review" and entry.anomalous == (entry.defect == NORMAL)
    return f"{text}\nWRONG" if wrong else text, panels(entry, limits.map_threshold)


PANELS = ("image", "truth", "found", "heat map")


def panels(entry: SheetEntry, map_threshold: float) -> list[np.ndarray]:
    """What `PANELS` names: the image, with the outline of the truth, with that of what is found, and the map."""
    truth, found = outlined(entry.image, entry.truth, TRUTH), outlined(entry.image, entry.map > map_threshold)
    return [entry.image, truth, found, heat(entry.map, map_threshold)]


def sheet(entries: Sequence[SheetEntry], limits: Limits) -> Image.Image:
    """The contact sheet of some images."""
    return contact_sheet([row(entry, limits) for entry in entries], PANELS)
