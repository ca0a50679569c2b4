import numpy as np
import pytest
import torch
from PIL import ImageDraw

from patchad.callbacks.pictures import RAMP, SheetEntry, colour, contact_sheet, montage, overlay, row, sheet_entry
from patchad.types import ImageBatch, Prediction


def test_colours_go_from_blue_at_the_low_end_to_red_at_the_high_end():
    values = np.array([[-9.0, 2.0, 4.0, 6.0, 99.0]])
    blue, red = RAMP[0].astype(int).tolist(), RAMP[-1].astype(int).tolist()
    found = colour(values, low=2.0, high=6.0)[0].astype(int).tolist()
    assert found == [blue, blue, RAMP[2].astype(int).tolist(), red, red]
    assert blue[2] > blue[0] and red[0] > red[2]


def test_an_overlay_is_half_image_and_half_heat_map():
    image, heat = np.full((2, 2, 3), 250, np.uint8), np.full((2, 2, 3), 100, np.uint8)
    assert (overlay(image, heat) == 175).all()


def shown(defect: str, anomalous: bool) -> SheetEntry:
    plain = np.zeros((1, 2, 3), np.uint8)
    return SheetEntry("good/000.png", defect, 1.5, anomalous, plain, plain, np.array([[0.0, 3.0]]))


@pytest.mark.parametrize(
    ("defect", "anomalous", "wrong"),
    [("good", False, False), ("good", True, True), ("hole", True, False), ("hole", False, True)],
)
def test_a_caption_says_where_the_verdict_is_wrong(defect, anomalous, wrong):
    caption, panels = row(shown(defect, anomalous), low=0.0, threshold=3.0)
    assert caption.endswith("WRONG") == wrong
    assert f"verdict: {'anomalous' if anomalous else 'normal'}" in caption and "threshold 3" in caption
    assert panels[2][0, 0].tolist() == RAMP[0].astype(int).tolist()
    assert panels[2][0, 1].tolist() == RAMP[-1].astype(int).tolist()


def test_what_is_shown_of_a_padded_image_is_its_content():
    image, values = torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1, 0] = True
    content, zeros = torch.tensor([[8, 8], [6, 4]]), torch.zeros(2, dtype=torch.int64)
    names, fine = (["a", "b"], ["a/0.png", "b/1.png"]), ["", ""]
    batch = ImageBatch(image, content, content, zeros, zeros, zeros, mask, mask[:, 0, 0], *names, zeros, fine, fine)
    found = sheet_entry(Prediction(torch.tensor([1.0, 2.0]), torch.tensor([False, True]), values, {}, {}), batch, 1)
    assert found.name == "b/1.png" and found.score == 2.0 and found.anomalous and found.defect == "b"
    np.testing.assert_array_equal(found.image, (image[1, :, :6, :4].permute(1, 2, 0) * 255).round().byte().numpy())
    np.testing.assert_allclose(found.map, values[1, :6, :4].numpy())
    assert found.truth.shape == (6, 4, 3) and found.truth[0].min() == 255 and found.truth[2:].max() == 0


def test_a_sheet_has_the_panels_of_each_row_beside_its_caption():
    panels = [np.full((10, 20, 3), level, np.uint8) for level in (40, 90)]
    picture = np.asarray(contact_sheet([("first", panels), ("second", panels[::-1])], ("left", "right"), cell=20))
    assert picture.shape == (22 + 2 * 26, 190 + 2 * 26, 3)
    for top, levels in ((22, (40, 90)), (48, (90, 40))):
        assert [int(picture[top + 5, 190 + column * 26 + 10, 0]) for column in range(2)] == list(levels)
        assert picture[top : top + 20, :190].min() < 100  # the caption is black


def test_a_montage_has_its_pictures_in_rows_and_the_captions_before_them(monkeypatch):
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **_: written.append((place, text)))
    pictures = [np.full((3, 3, 3), level, np.uint8) for level in (10, 20, 30)]
    board = np.asarray(montage([("3: 9", pictures[:2]), ("1: 4", pictures[2:])], cell=6))
    assert [int(board[row * 8 + 3, 80 + column * 8 + 3, 0]) for row, column in ((0, 0), (0, 1), (1, 0))] == [10, 20, 30]
    assert written == [((4, 4), "3: 9"), ((4, 12), "1: 4")]
