from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import patchad
from patchad import images, runtime
from patchad.canvas import EACH, Canvas, Size
from patchad.data.datasets import ImageDataset
from patchad.decoding import read_picture, read_pixels
from patchad.errors import PatchadError
from patchad.images import native_size, read_for_canvas
from patchad.region import as_text
from patchad.types import Sample

CANVAS = Canvas((48, 48))
KEPT = Path(__file__).parent / "data" / f"format_{runtime.EXPORT_FORMAT}.patchad"


def scene(size: Size) -> Image.Image:
    """Soft stripes and a box, so that every corner looks different."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    planes = np.stack([rows / size[0], columns / size[1], 0.5 + 0.4 * np.sin(rows / 40 + columns / 25)], axis=2)
    planes[: size[0] // 3, : size[1] // 5] = (0.9, 0.1, 0.2)
    return Image.fromarray((255 * planes).round().astype(np.uint8))


def saved(path: Path, image: Image.Image, orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, quality=95, exif=exif)
    return path


@pytest.mark.parametrize(
    ("size", "canvas", "by"),
    [
        ((800, 1200), CANVAS, 8),
        ((760, 760), CANVAS, 4),  # an eighth has 95 rows, and 2 x 48 are asked for
        ((768, 768), CANVAS, 8),
        ((768, 768), Canvas((48, 49), keep_aspect=False), 4),
        ((800, 1200), Canvas((96, 96)), 4),
        ((804, 1200), CANVAS, 4),
        ((802, 1200), CANVAS, 2),
        ((801, 1200), CANVAS, 1),
        ((180, 186), CANVAS, 1),
        ((40, 30), CANVAS, 1),
        ((800, 1200), CANVAS._replace(region=EACH), 1),
        ((800, 1200), CANVAS._replace(region=as_text(np.ones((800, 1200), bool))), 1),
    ],
)
def test_a_jpeg_file_is_as_small_as_divides_it_and_leaves_two_pixels_for_each_of_the_canvas(tmp_path, size, canvas, by):
    for path in (saved(tmp_path / "a.jpg", scene(size)), saved(tmp_path / "grey.jpg", scene(size).convert("L"))):
        picture = read_picture(path, canvas)
        assert picture.size == native_size(path) == size
        assert picture.pixels.shape[:2] == (size[0] // by, size[1] // by)
        whole = read_pixels(path)
        assert whole.shape[:2] == size and (by > 1 or np.array_equal(whole, picture.pixels))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".ppm"])
def test_files_of_other_formats_keep_every_pixel(tmp_path, suffix):
    scene((400, 600)).save(tmp_path / f"a{suffix}")
    picture = read_picture(tmp_path / f"a{suffix}", CANVAS)
    assert picture.size == (400, 600) and np.array_equal(picture.pixels, read_pixels(tmp_path / f"a{suffix}"))


def test_16_bit_grey_is_not_reduced_either(tmp_path):
    deep = (np.arange(400 * 600, dtype=np.uint32) % 65536).astype(np.uint16).reshape(400, 600)
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png", CANVAS).pixels, deep / np.float32(65535))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_reduced_image_of_any_orientation_shows_what_the_whole_one_shows(tmp_path, mode, orientation):
    path = saved(tmp_path / "a.jpg", scene((400, 600)).convert(mode), orientation)
    picture = read_picture(path, CANVAS)
    with Image.open(path) as image:
        whole = ImageOps.exif_transpose(image).convert("L" if mode == "L" else "RGB")
    assert picture.size == native_size(path) == (whole.height, whole.width) == read_pixels(path).shape[:2]
    assert picture.pixels.shape[:2] == (whole.height // 4, whole.width // 4)
    means = np.asarray(whole.reduce(4), np.float32) / 255
    assert abs(picture.pixels - means).max() < 20 / 255  # where colours meet, which JPEG keeps at half the size
    assert abs(picture.pixels - means).mean() < 0.5 / 255


@pytest.mark.parametrize("brightness", [None, 0.4])
def test_on_the_canvas_a_reduced_image_is_nearly_the_whole_one(tmp_path, brightness):
    canvas, path = CANVAS._replace(brightness=brightness), saved(tmp_path / "a.jpg", scene((800, 1200)))
    whole, content = runtime.on_canvas(runtime.to_rgb(path), canvas)
    placed, at = runtime.on_canvas(runtime.planes_of(path, canvas).pixels, canvas)
    assert at == content == (32, 48)
    assert abs(placed - whole).max() < 6 / 255 and abs(placed - whole).mean() < 0.5 / 255


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("brightness", [None, 0.4])
def test_a_fit_and_an_exported_file_see_the_same_pixels(tmp_path, mode, brightness):
    path = saved(tmp_path / "a.jpg", scene((400, 600)).convert(mode), 6)
    canvas = CANVAS._replace(brightness=brightness)
    fitted, size = read_for_canvas(path, canvas)
    fitted, content = images.on_canvas(fitted, canvas)
    picture = runtime.planes_of(path, canvas)
    placed, there = runtime.on_canvas(picture.pixels, canvas)
    assert (size, content) == (picture.size, there) == ((600, 400), (48, 32))
    torch.testing.assert_close(torch.from_numpy(placed), fitted, atol=1e-5, rtol=0)
    item = ImageDataset([Sample(path, "good", None, "test")], canvas, (32, 32)).read(0)
    assert torch.equal(item.image, fitted) and item.size.tolist() == [600, 400] and item.content.tolist() == [48, 32]


def test_maps_have_the_size_of_the_file_and_a_picture_scores_as_its_file(tmp_path):
    detector, path = patchad.load(KEPT), saved(tmp_path / "a.jpg", scene((400, 600)), 8)
    picture = read_picture(path, detector.canvas)
    assert picture.pixels.shape == (150, 100, 3)
    found, same, whole = detector.score([path, picture, read_pixels(path)])
    assert found.map.shape == same.map.shape == whole.map.shape == (600, 400)
    assert found.score == same.score and np.array_equal(found.map, same.map)
    assert found.score == pytest.approx(whole.score, rel=0.05)


def test_reduced_or_not_a_file_that_is_too_large_or_torn_is_refused(tmp_path):
    path = saved(tmp_path / "a.jpg", scene((800, 1200)))
    with pytest.raises(PatchadError, match=r"a\.jpg has 800 x 1200 pixels .*more than 0\.9 million"):
        read_picture(path, CANVAS, max_megapixels=0.9)
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(PatchadError, match=r"cannot read image .*a\.jpg: image file is truncated"):
        read_picture(path, CANVAS)


@pytest.mark.parametrize("size", [(50, 90), (36, 48), (30, 90), (20, 30)])
def test_a_map_at_another_size_is_that_of_torch(size):
    values = np.random.default_rng(0).random((48, 48), dtype=np.float32)
    cropped = torch.from_numpy(values)[None, None, :36]
    expected = torch.nn.functional.interpolate(cropped, size, mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(runtime.off_canvas(values, (36, 48), size), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("size", [(50, 90), (36, 48), (37, 480), (301, 997), (30, 90), (20, 30)])
@pytest.mark.parametrize("threshold", [0.2, 0.9, 0.999, 2.0])
def test_what_is_above_a_threshold_is_what_the_whole_map_says(size, threshold):
    generator = np.random.default_rng(0)
    for top, left, height, width in ((0, 0, 36, 48), (3, 7, 2, 5), (35, 47, 1, 1), (0, 20, 1, 28), (10, 0, 9, 1)):
        values = np.zeros((36, 48), np.float32)
        values[top : top + height, left : left + width] = generator.random((height, width), dtype=np.float32)
        whole = runtime.off_canvas(values, (36, 48), size)
        region = runtime.region_above(values, size, threshold)
        assert region.shape == size
        assert (region == (whole > threshold))[abs(whole - threshold) > 1e-5].all()
    mask = generator.random(size) > 0.5
    assert np.array_equal(runtime.region_above(values, size, threshold, mask), region & mask)


def test_what_is_found_of_a_file_is_what_its_map_says(tmp_path):
    detector, path = patchad.load(KEPT), saved(tmp_path / "a.jpg", scene((400, 600)))
    whole, (found, region) = detector(path), detector.find(path)
    assert found[:4] == whole[:4] and region.shape == whole.map.shape == (400, 600)
    certain = abs(whole.map - detector.limits.map_threshold) > 1e-4
    assert np.array_equal(region[certain], (whole.map > detector.limits.map_threshold)[certain])
    whole.map[0, 0] = 1.0  # it belongs to the caller
