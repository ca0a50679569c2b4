import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from patchad.canvas import Canvas
from patchad.errors import PatchadError
from patchad.folders import images_below
from patchad.images import Augmentations, augment, draw_view, native_size, on_canvas, read_image
from patchad.masks import HALF, read_mask, resize_mask

PIXELS = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


def expected(pixels: np.ndarray, most: int = 255) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / most).permute(2, 0, 1)


def test_rgb_is_read_as_it_is(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), expected(PIXELS))


def test_grey_fills_three_channels(tmp_path):
    Image.fromarray(PIXELS[:, :, 0]).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), expected(PIXELS[:, :, :1]).expand(3, -1, -1))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_depth(tmp_path, suffix):
    deep = (np.arange(48, dtype=np.uint16) * 1300).reshape(6, 8)
    Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
    assert torch.equal(read_image(tmp_path / f"a.{suffix}"), expected(deep[:, :, None], 65535).expand(3, -1, -1))


def png_of_16_bit_colours(pixels: np.ndarray) -> bytes:
    """A file of `[height, width, 3]`, which Pillow cannot write."""
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    made = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"".join([b"\x89PNG\r\n\x1a\n", *made])


def test_16_bit_colours_are_refused_since_half_of_them_would_be_lost(tmp_path):
    (tmp_path / "a.png").write_bytes(png_of_16_bit_colours(PIXELS.astype(np.uint16) * 16))
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (8, 6) and np.asarray(image).max() < 16  # what Pillow would leave of 12 bits
    with pytest.raises(PatchadError, match=r"a\.png has colours of 16 bits"):
        read_image(tmp_path / "a.png")


def test_images_of_line_cameras_may_be_larger_than_pillow_likes(tmp_path):
    Image.new("1", (15_000, 12_000)).save(tmp_path / "a.png")
    assert native_size(tmp_path / "a.png") == (12_000, 15_000)


def test_an_image_beyond_the_limit_is_refused_by_its_header(tmp_path):
    """No memory could hold what it promises."""
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(png((b"IHDR", header), (b"IDAT", zlib.compress(b"\0"))))
    for read in (read_image, native_size):
        with pytest.raises(PatchadError, match=r"bomb\.png has 2147483647 x 2147483647 pixels .*more than 500 million"):
            read(tmp_path / "bomb.png")
    Image.new("L", (1000, 1001)).save(tmp_path / "a.png")
    with pytest.raises(PatchadError, match=r"more than 1 million: raise data\.max_megapixels"):
        read_image(tmp_path / "a.png", 1.0)
    assert read_image(tmp_path / "a.png", 1.001).shape == (3, 1001, 1000)


@pytest.mark.parametrize("suffix", ["jpe", "jfif", "pgm", "ppm", "JPG", "webp", "bmp"])
def test_formats_of_cameras_are_images(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(PIXELS[:, :, 0] if suffix == "pgm" else PIXELS).save(path, format=FORMAT.get(suffix))
    assert read_image(path).shape == (3, 6, 8)
    assert images_below(tmp_path) == [path]


FORMAT = {"jpe": "JPEG", "jfif": "JPEG", "pgm": "PPM", "ppm": "PPM"}


@pytest.mark.parametrize("kind", ["EPS", "GIF", "PDF", "ICO"])
def test_what_is_named_an_image_and_is_of_another_format_is_refused(kind, tmp_path, monkeypatch):
    """Pillow would start Ghostscript for one of them."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("a program was started"))
    Image.fromarray(PIXELS).save(tmp_path / "a.png", format=kind)
    with pytest.raises(PatchadError, match=r"cannot read image .*a\.png: it is none of PNG, JPEG"):
        read_image(tmp_path / "a.png")


def test_a_tiff_file_with_a_damaged_second_page_is_refused(tmp_path):
    """Pillow raises a TypeError of a page that has no width."""
    path = tmp_path / "a.tif"
    Image.fromarray(PIXELS).save(path)
    content = path.read_bytes()
    [start] = struct.unpack_from("<I", content, 4)
    following = start + 2 + 12 * struct.unpack_from("<H", content, start)[0]
    second = struct.pack("<I", len(content))
    path.write_bytes(content[:following] + second + content[following + 4 :] + struct.pack("<HI", 0, 0))
    with pytest.raises(PatchadError, match=r"cannot read image .*a\.tif: Missing dimensions"):
        read_image(path)


def test_several_pages_signed_bytes_and_numbers_that_are_none_are_refused(tmp_path):
    page = Image.fromarray(PIXELS)
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page])
    with pytest.raises(PatchadError, match=r"pages\.tif has 2 pages"):
        read_image(tmp_path / "pages.tif")
    for suffix in ("png", "webp"):
        other = Image.fromarray(255 - PIXELS)
        page.save(tmp_path / f"frames.{suffix}", save_all=True, append_images=[other])
        with pytest.raises(PatchadError, match=rf"frames\.{suffix} has 2 pages"):
            read_image(tmp_path / f"frames.{suffix}")
    Image.fromarray(PIXELS[:, :, 0]).save(tmp_path / "signed.tif", tiffinfo={339: 2})
    with pytest.raises(PatchadError, match=r"signed\.tif holds signed numbers of 8 bits"):
        read_image(tmp_path / "signed.tif")
    Image.fromarray(np.full((6, 8), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(PatchadError, match=r"nan\.tif holds nan or infinite values"):
        read_image(tmp_path / "nan.tif")


def test_a_very_narrow_image_is_resized_as_its_transpose():
    image = torch.rand(3, 2000, 10)
    tall, content = on_canvas(image, Canvas((96, 96)))
    wide, _ = on_canvas(image.transpose(1, 2), Canvas((96, 96)))
    assert content == (96, 2) and tall[:, :, 0].std(1).min() > 0
    torch.testing.assert_close(tall.transpose(1, 2), wide)


def test_alpha_is_dropped(tmp_path):
    alpha = np.full((6, 8, 1), 255, dtype=np.uint8)
    Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), expected(PIXELS))


def test_grey_with_alpha_is_read_as_grey(tmp_path):
    grey = Image.fromarray(PIXELS[:, :, 0]).convert("LA")
    grey.save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), expected(PIXELS[:, :, :1]).expand(3, -1, -1))


def test_a_palette_gives_its_colours(tmp_path):
    palette = Image.new("P", (8, 6), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "a.png", transparency=0)
    assert torch.equal(read_image(tmp_path / "a.png")[:, 0, 0], torch.tensor([10, 20, 30]) / 255)


def test_exif_rotation_is_applied(tmp_path):
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(PIXELS, k=-1).copy()
    assert torch.equal(read_image(tmp_path / "a.png"), expected(upright))


def test_1_bit_and_float_images_are_read(tmp_path):
    Image.fromarray(PIXELS[:, :, 0] > 20).save(tmp_path / "a.png")
    assert set(read_image(tmp_path / "a.png").unique().tolist()) == {0.0, 1.0}
    values = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / "b.tif")
    assert torch.equal(read_image(tmp_path / "b.tif")[0], torch.from_numpy(values))
    Image.fromarray(values * 300).save(tmp_path / "c.tif")
    with pytest.raises(PatchadError, match=r"c\.tif holds values from 0 to 300"):
        read_image(tmp_path / "c.tif")


def test_whole_numbers_of_more_than_16_bits_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(PatchadError, match=r"a\.tif holds values from 0 to 70000; scale them to \[0, 65535\]"):
        read_image(tmp_path / "a.tif")


def test_a_truncated_or_missing_file_is_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PatchadError, match=r"cannot read image .*a\.png"):
        read_image(tmp_path / "a.png")
    with pytest.raises(PatchadError, match=r"cannot read image .*b\.png"):
        read_image(tmp_path / "b.png")


def test_masks_are_true_above_128(tmp_path):
    values = np.array([[0, 127, 128, 129, 255]], dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png", (1, 5)) > HALF).tolist() == [[False, False, False, True, True]]


def test_a_mask_of_small_numbers_is_refused(tmp_path):
    Image.fromarray(np.array([[0, 1, 1]], dtype=np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(PatchadError, match=r"mask\.png has pixels above 0, but none above half of white"):
        read_mask(tmp_path / "mask.png", (1, 3))
    Image.fromarray(np.zeros((1, 3), dtype=np.uint8)).save(tmp_path / "mask.png")
    assert not read_mask(tmp_path / "mask.png", (1, 3)).any()


def test_a_mask_of_another_size_is_refused(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "mask.png")
    with pytest.raises(PatchadError, match=r"mask\.png has 6 x 8 pixels \(height x width\), its image has 6 x 9"):
        read_mask(tmp_path / "mask.png", (6, 9))


@pytest.mark.parametrize(("native", "content"), [((100, 50), (64, 32)), ((20, 80), (16, 64)), ((64, 64), (64, 64))])
def test_aspect_is_kept_and_the_rest_repeats_the_edge(native, content):
    image, found = on_canvas(torch.rand(3, *native), Canvas((64, 64)))
    assert found == content and image.shape == (3, 64, 64)
    if content[0] < 64:
        assert torch.equal(image[:, content[0] :], image[:, content[0] - 1 : content[0]].expand(3, 64 - content[0], 64))
    if content[1] < 64:
        assert torch.equal(
            image[:, :, content[1] :], image[:, :, content[1] - 1 : content[1]].expand(3, 64, 64 - content[1])
        )


def test_an_image_that_fits_is_unchanged_and_a_distorted_one_is_filled():
    image = torch.rand(3, 64, 48)
    assert torch.equal(on_canvas(image, Canvas((64, 48)))[0], image)
    distorted, content = on_canvas(image, Canvas((32, 32), keep_aspect=False))
    assert content == (32, 32) and distorted.shape == (3, 32, 32)


def test_a_brightness_makes_every_exposure_of_a_thing_the_same_image():
    thing = 0.6 * torch.rand(3, 50, 70)
    expected, content = on_canvas(thing, Canvas((64, 64), brightness=0.4))
    for exposure in (0.2, 1.5):
        torch.testing.assert_close(on_canvas(exposure * thing, Canvas((64, 64), brightness=0.4))[0], expected)
    height, width = content
    assert expected[:, :height, :width].mean() == pytest.approx(0.4)
    torch.testing.assert_close(
        expected / expected.mean(), on_canvas(thing, Canvas((64, 64)))[0] / on_canvas(thing, Canvas((64, 64)))[0].mean()
    )


def test_black_images_stay_black_and_nearly_black_ones_are_not_blown_up():
    assert torch.equal(on_canvas(torch.zeros(3, 8, 8), Canvas((8, 8), brightness=0.4))[0], torch.zeros(3, 8, 8))
    assert on_canvas(torch.full((3, 8, 8), 1e-4), Canvas((8, 8), brightness=0.4))[0].max() < 0.02


def test_masks_are_resized_to_their_nearest_pixels():
    mask = torch.rand(7, 9) > 0.5
    assert torch.equal(resize_mask(mask, (14, 18)), mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(resize_mask(mask, (7, 9)), mask)


def test_a_view_is_the_image_moved_coloured_and_noisy_by_what_was_drawn():
    image, most = torch.rand(3, 200, 200), Augmentations(shift=2, colour=0.02, noise=0.03)
    view = draw_view((0, 1, 2), most)
    seen = augment(image, view)
    down, right = view.shift
    moved = image.roll((-down, -right), dims=(1, 2))
    rest = (seen - moved)[:, 2:-2, 2:-2]
    assert rest.mean((1, 2)).tolist() == pytest.approx(view.colour.tolist(), abs=1e-3)
    assert rest.std((1, 2)).tolist() == pytest.approx([0.03] * 3, rel=0.05)
    assert torch.equal(seen, augment(image, draw_view((0, 1, 2), most)))


def test_shifts_reach_as_far_as_they_may_and_colours_have_their_deviation():
    views = [draw_view((0, number), Augmentations(shift=2, colour=0.02)) for number in range(400)]
    assert {step for view in views for step in view.shift} == {-2, -1, 0, 1, 2}
    assert np.std([view.colour for view in views]) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_the_size_that_is_read(orientation, suffix, tmp_path):
    exif, path = Image.Exif(), tmp_path / f"a{suffix}"
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    size = (30, 20) if orientation >= 5 else (20, 30)
    assert native_size(path) == tuple(read_image(path).shape[1:]) == size
