import numpy as np
import pytest
import torch
from PIL import ImageDraw
from scipy import ndimage

from patchad.callbacks.pictures import SheetEntry, contact_sheet, montage, row, sheet_entry, written
from patchad.conformal import Limits
from patchad.drawing import FOUND, RAMP, TRUTH, heat, outline, outlined
from patchad.types import ImageBatch, Prediction


def test_colours_mean_the_same_in_every_picture_and_never_end():
    values = np.array([[0.0, 2.0, 4.0, 64.0, 1e3, 1e6, 1e9]])
    found = heat(values, threshold=4.0)[0].astype(int)
    assert [found[place].tolist() for place in (0, 1, 2, 3)] == [RAMP[row].astype(int).tolist() for row in (0, 1, 2, 3)]
    brightness = found @ (299, 587, 114)
    assert (np.diff(brightness) > 0).all()  # in grey, too
    assert (heat(values[:, ::-1] / 8, threshold=0.5) == heat(values, threshold=4.0)[:, ::-1]).all()


@pytest.mark.parametrize("width", [1, 3])
def test_an_outline_lies_around_a_region_and_covers_none_of_it_but_at_the_edge(width):
    region = np.zeros((30, 40), dtype=bool)
    region[10:14, 20:25] = True
    region[0:5, 30:40] = True  # at two edges
    found = outline(region, width)
    cross = ndimage.generate_binary_structure(2, 1)
    around = ndimage.binary_dilation(region, cross, iterations=width) & ~region
    edge = np.ones_like(region)
    edge[width:-width, width:-width] = False
    np.testing.assert_array_equal(found, around | (region & edge))
    assert not outline(np.zeros((3, 3), bool)).any() and outline(np.ones((5, 5), bool)).sum() == 16


def test_an_outlined_image_keeps_its_pixels_elsewhere():
    image, region = np.full((8, 9, 3), 7, np.uint8), np.eye(8, 9, dtype=bool)
    found = outlined(image, region, TRUTH)
    assert (found[outline(region)] == TRUTH).all() and (found[~outline(region)] == 7).all()
    assert (image == 7).all()


def shown(defect: str, anomalous: bool) -> SheetEntry:
    image, truth, values = np.zeros((4, 4, 3), np.uint8), np.eye(4, dtype=bool), np.zeros((4, 4))
    values[0, 3] = 9.0
    return SheetEntry("good/000.png", defect, 4.0 if anomalous else 1.5, anomalous, image, truth, True, values)


@pytest.mark.parametrize(
    ("defect", "anomalous", "wrong"),
    [("good", False, False), ("good", True, True), ("hole", True, False), ("hole", False, True)],
)
def test_a_caption_says_where_the_verdict_is_wrong(defect, anomalous, wrong):
    caption, panels = row(shown(defect, anomalous), Limits(threshold=3.0, review_threshold=3.0, map_threshold=4.5))
    assert caption.endswith("WRONG") == wrong
    assert f"verdict: {'anomalous' if anomalous else 'normal'}" in caption and "threshold 3" in caption
    image, truth, found, colours = panels
    assert not image.any() and colours[0, 0].tolist() == RAMP[0].astype(int).tolist()
    assert (truth[0, 1] == TRUTH).all() and not truth[1, 1].any()
    assert (found[1, 3] == FOUND).all() and not found[1, 0].any()


def test_what_is_to_be_looked_at_is_neither_right_nor_wrong():
    limits = Limits(threshold=5.0, review_threshold=3.0, map_threshold=4.5)
    caption, _ = row(shown("hole", True), limits)
    assert "verdict: review" in caption and "WRONG" not in caption


def test_what_is_shown_of_a_padded_image_is_its_content():
    image, values = torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1, 0] = True
    content, zeros = torch.tensor([[8, 8], [6, 4]]), torch.zeros(2, dtype=torch.int64)
    names, fine = (["a", "b"], ["a/0.png", "b/1.png"]), ["", ""]
    gain = torch.tensor([1.0, 0.5])
    batch = ImageBatch(
        image, content, content, gain, zeros, zeros, zeros, mask, mask[:, 0, 0], *names, zeros, fine, fine
    )
    found = sheet_entry(Prediction(torch.tensor([1.0, 2.0]), torch.tensor([False, True]), values, {}, {}), batch, 1)
    assert found.name == "b/1.png" and found.score == 2.0 and found.anomalous and found.defect == "b"
    shown = (image[1, :, :6, :4].permute(1, 2, 0) / 0.5 * 255).round().clamp(0, 255)  # in the light of the file
    np.testing.assert_array_equal(found.image, shown.byte().numpy())
    np.testing.assert_allclose(found.map, values[1, :6, :4].numpy())
    assert found.has_mask and found.truth.shape == (6, 4) and found.truth[0].all() and not found.truth[2:].any()


def test_a_sheet_has_the_panels_of_each_row_beside_its_caption():
    panels = [np.full((10, 20, 3), level, np.uint8) for level in (40, 90)]
    picture = np.asarray(contact_sheet([("first", panels), ("second", panels[::-1])], ("left", "right"), cell=20))
    assert picture.shape == (22 + 2 * 26, 190 + 2 * 26, 3)
    for top, levels in ((22, (40, 90)), (48, (90, 40))):
        assert [int(picture[top + 5, 190 + column * 26 + 10, 0]) for column in range(2)] == list(levels)
        assert picture[top : top + 20, :190].min() < 100  # the caption is black


def test_a_caption_shows_each_character_or_its_escape(monkeypatch):
    """Whatever fonts the system has: no character is a box, which those that no font knows would be."""
    for text in ("Kratzer_ü/001.png", "\u50b7/001.png", "\U0001f6e0.png"):
        shown, font = written(text)
        boxes = [character for character in shown if bytes(font.getmask(character)) == bytes(font.getmask("\uffff"))]
        assert not boxes and (shown == text or shown == text.encode("ascii", "backslashreplace").decode())
    monkeypatch.setattr("patchad.callbacks.pictures.FONTS", ())
    assert written("Kratzer_ü")[0] == r"Kratzer_\xfc"


def test_a_montage_has_its_pictures_in_rows_and_the_captions_before_them(monkeypatch):
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **_: written.append((place, text)))
    pictures = [np.full((3, 3, 3), level, np.uint8) for level in (10, 20, 30)]
    board = np.asarray(montage([("3: 9", pictures[:2]), ("1: 4", pictures[2:])], cell=6))
    assert [int(board[row * 8 + 3, 80 + column * 8 + 3, 0]) for row, column in ((0, 0), (0, 1), (1, 0))] == [10, 20, 30]
    assert written == [((4, 4), "3: 9"), ((4, 12), "1: 4")]
