import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from patchad.errors import PatchadError
from patchad.pyramid import (
    at_pixels,
    covered,
    covering_sums,
    crop_resize,
    cut,
    cut_grid,
    cut_patches,
    fits_pyramids,
    fold,
    inside,
    mirror,
    pad_to_multiple,
    positions,
    sample_pyramids,
    window_size,
)
from patchad.types import Pyramid


def slow_fold(values: np.ndarray, counted: np.ndarray, side: int, stride: int) -> np.ndarray:
    rows, columns = values.shape
    total = np.zeros(((rows - 1) * stride + side, (columns - 1) * stride + side))
    count = np.zeros_like(total)
    for row in range(rows):
        for column in range(columns):
            if counted[row, column]:
                patch = np.s_[row * stride : row * stride + side, column * stride : column * stride + side]
                total[patch] += values[row, column]
                count[patch] += 1
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def test_the_papers_7139_patches_of_a_256_pixel_image_are_found():
    grids = [positions((256, 256), side, stride) for side, stride in ((64, 16), (32, 4), (16, 4))]
    assert sum(rows * columns for rows, columns in grids) == 7139


def test_a_side_that_does_not_fit_names_the_image_size_and_the_way_out():
    with pytest.raises(PatchadError, match=r"side 64 does not fit an image of 48 x 60 pixels .* at least 64"):
        positions((48, 60), 64, 16)


@pytest.mark.parametrize(("side", "stride"), [(64, 16), (32, 4), (16, 4), (16, 16)])
def test_folding_equals_a_loop_over_patches(side, stride):
    generator = torch.Generator().manual_seed(side + stride)
    values = torch.rand(2, 5, 7, generator=generator)
    counted = torch.rand(2, 5, 7, generator=generator) > 0.3
    folded = fold(values, counted, side, stride)
    for image in range(2):
        expected = slow_fold(values[image].numpy(), counted[image].numpy(), side, stride)
        np.testing.assert_allclose(folded[image], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", [1, 4, 8])
def test_cells_hold_what_their_pixels_do(cell):
    values, counted = torch.rand(2, 5, 7), torch.rand(2, 5, 7) > 0.3
    pixels = fold(values, counted, 32, 8)
    cells = fold(values, counted, 32, 8, cell)
    assert cells.shape[1] * cell == pixels.shape[1]
    assert torch.equal(at_pixels(cells, cell, (61, 50)), pixels[:, :61, :50])


def test_folding_keeps_its_digits_at_reduced_precision():
    values, counted = torch.rand(1, 5, 7), torch.ones(1, 5, 7, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        folded = fold(values, counted, 16, 8)
    assert torch.equal(folded, fold(values, counted, 16, 8))


def test_folding_a_constant_gives_that_constant_everywhere():
    folded = fold(torch.full((1, 9, 9), 3.5), torch.ones(1, 9, 9, dtype=torch.bool), 32, 4)
    torch.testing.assert_close(folded, torch.full((1, 64, 64), 3.5))


def test_spreading_keeps_the_sum_of_the_values_times_the_patch_area():
    values = torch.rand(1, 4, 6)
    torch.testing.assert_close(4 * 4 * covering_sums(values, width=4).sum(), values.sum() * 16 * 16)


@pytest.mark.parametrize(("side", "stride"), [(64, 16), (32, 4), (16, 4), (16, 16), (32, 32)])
def test_counted_patches_cover_every_pixel_of_any_content(side, stride):
    size = 128
    grid = positions((size, size), side, stride)
    for height, width in [(1, 128), (17, 90), (40, 128), (64, 65), (97, 31), (127, 128), (128, 128)]:
        counted = inside(torch.tensor([[height, width]]), grid, side, stride)
        cells = covering_sums(counted.float(), side // stride)[0]
        covered = cells.repeat_interleave(stride, 0).repeat_interleave(stride, 1)[:height, :width]
        assert covered.min() >= 1


def test_patches_on_padding_alone_do_not_count():
    counted = inside(torch.tensor([[128, 64]]), positions((128, 128), 16, 4), 16, 4)[0]
    starts = torch.arange(counted.shape[1]) * 4
    assert counted.any(0).tolist() == (starts + 8 < 64).tolist()


def test_the_covered_share_equals_a_loop_over_patches_also_beyond_the_mask():
    mask = torch.rand(2, 21, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    found = covered(mask, (6, 7), side=8, stride=4)
    for row in range(6):
        for column in range(7):
            patch = mask[:, 4 * row : 4 * row + 8, 4 * column : 4 * column + 8]
            torch.testing.assert_close(found[:, row, column], patch.flatten(1).sum(1) / 64)


def test_all_patches_count_on_an_image_without_padding():
    assert inside(torch.tensor([[256, 256]]), (13, 13), 64, 16).all()


def test_padding_repeats_the_last_row_and_column_and_leaves_multiples_alone():
    image = torch.rand(1, 3, 30, 32)
    padded = pad_to_multiple(image, 16)
    assert padded.shape == (1, 3, 32, 32)
    assert torch.equal(padded[:, :, 30:], image[:, :, -1:].expand(1, 3, 2, 32))
    assert pad_to_multiple(padded, 16) is padded


def test_maps_are_cropped_to_their_content_before_they_are_resized():
    maps = torch.full((2, 8, 8), 100.0)
    maps[0, :4, :8], maps[1, :8, :2] = 1.0, 2.0
    resized = crop_resize(maps, torch.tensor([[4, 8], [8, 2]]), (16, 16))
    assert torch.equal(resized[0], torch.ones(16, 16))
    assert torch.equal(resized[1], torch.full((16, 16), 2.0))


SIZES = [(128, 128), (256, 256), (200, 131)]
GRIDS = [(64, 16), (32, 4), (16, 2), (64, 1), (32, 1), (16, 1)]  # dense on VGG16, sliding


@pytest.mark.parametrize("axes", [(), (1,), (2,), (1, 2)])
def test_a_mirror_reverses_the_content_of_each_image_and_repeats_its_new_edge(axes):
    images = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    content = torch.tensor([[5, 4], [3, 6]])
    mirrored = mirror(images, content, axes).numpy()
    for before, after, (rows, columns) in zip(images.numpy(), mirrored, content.tolist(), strict=True):
        expected = np.flip(before[:, :rows, :columns], axes)
        np.testing.assert_array_equal(after, np.pad(expected, ((0, 0), (0, 5 - rows), (0, 6 - columns)), mode="edge"))


def draw(size, side, grid, images=30, content=None) -> list[Pyramid]:
    generator = np.random.default_rng(0)
    shifts = generator.integers(-4, 5, (images, 2)).tolist()
    return [sample_pyramids(size, content or size, side, grid, 256, tuple(shift), generator) for shift in shifts]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("side", "grid"), GRIDS)
def test_no_patch_of_a_pyramid_is_clipped_and_all_lie_on_the_grid(size, side, grid):
    extent = torch.tensor(window_size(size, side, grid))
    for pyramid in draw(size, side, grid):
        padded = -(-torch.tensor(size) // grid) * grid
        assert (pyramid.window >= 0).all() and (pyramid.window + extent <= padded).all()
        for position in (pyramid.anchor, pyramid.near, pyramid.far, pyramid.neighbour, pyramid.window):
            assert (position >= 0).all() and not (position % grid).any()
            assert (position + side <= extent).all() or position is pyramid.window


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("side", "grid"), GRIDS)
def test_directions_are_uniform_whatever_fits(size, side, grid):
    counts = np.bincount(torch.cat([pyramid.direction for pyramid in draw(size, side, grid)]), minlength=12)
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("side", "grid"), GRIDS)
def test_patches_lie_where_the_paper_puts_them(side, grid):
    """Without a shift, in an image with room: within half a cell of the distances and directions that were drawn."""
    generator = np.random.default_rng(0)
    slack = grid / 2 * 2**0.5 + 1e-6
    drawn = sample_pyramids((256, 256), (256, 256), side, grid, 2000, (0, 0), generator)
    near, far, neighbour = ((one - drawn.anchor).double() for one in (drawn.near, drawn.far, drawn.neighbour))
    assert near.abs().max() <= side // 16 and (near.any() if grid <= side // 16 else not near.any())
    assert (near.abs().sum(1) > 0).all() or grid > side // 16
    distance = neighbour.norm(dim=1)
    assert (distance >= 0.75 * side - slack).all() and (distance <= side + slack).all()
    assert (far.norm(dim=1) >= side).all() and (far.norm(dim=1) <= 1.75 * side + slack).all()
    angle = drawn.direction * (2 * torch.pi / 12)
    expected = distance[:, None] * torch.stack([angle.sin(), angle.cos()], dim=1)
    assert ((neighbour - expected).norm(dim=1) <= 2 * slack).all()


@pytest.mark.parametrize(("side", "grid"), GRIDS)
def test_of_eight_directions_each_is_drawn_and_is_where_the_neighbour_lies(side, grid):
    drawn = sample_pyramids((256, 256), (256, 256), side, grid, 2000, (0, 0), np.random.default_rng(0), directions=8)
    row, column = (drawn.neighbour - drawn.anchor).double().unbind(1)
    eighths = torch.atan2(row, column) / (torch.pi / 4)
    apart = (eighths - drawn.direction + 4) % 8 - 4  # in eighths of a turn, of which a cell is a share
    assert apart.abs().max() <= grid / side * 2**0.5
    assert chisquare(np.bincount(drawn.direction, minlength=8)).pvalue > 1e-3 and drawn.direction.max() == 7


def test_far_patches_keep_their_distance_where_there_is_room():
    drawn = sample_pyramids((256, 256), (256, 256), 16, 1, 2000, (0, 0), np.random.default_rng(0))
    distance = (drawn.far - drawn.anchor).double().norm(dim=1)
    assert ((distance >= 23) & (distance <= 29)).float().mean() > 0.9


def test_a_shift_of_the_second_view_is_taken_back_to_half_a_cell():
    steady, moved = (
        sample_pyramids((256, 256), (256, 256), 16, 2, 500, shift, np.random.default_rng(0))
        for shift in ((0, 0), (4, -3))
    )
    offset = (moved.near - moved.anchor) - (steady.near - steady.anchor)
    assert (offset == torch.tensor([-4, 4])).all()


def test_pyramids_stay_on_the_content_where_it_is_large_enough():
    for pyramid in draw((256, 256), 16, 2, content=(120, 256)):
        assert (pyramid.window[0] + pyramid.anchor[:, 0] + 16 <= 120).all()
    tall = [pyramid.window[0] + pyramid.anchor[:, 0].max() for pyramid in draw((256, 256), 64, 16, content=(60, 256))]
    assert max(tall) > 60  # too small for pyramids of side 64: these reach over the padding


def test_pyramids_that_do_not_fit_say_so():
    assert fits_pyramids((128, 128), 64) and not fits_pyramids((127, 300), 64)
    pyramid = draw((96, 96), 64, 16, images=1)[0]
    assert torch.equal(pyramid.anchor, pyramid.neighbour) and torch.equal(pyramid.anchor, pyramid.far)


def test_cut_takes_the_window_of_each_map():
    maps = torch.arange(2 * 5 * 6.0).reshape(2, 1, 5, 6)
    windows = cut(maps, torch.tensor([[0, 1], [3, 2]]), (2, 3))
    assert torch.equal(windows[0], maps[0, :, 0:2, 1:4]) and torch.equal(windows[1], maps[1, :, 3:5, 2:5])


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (10, 12)])
def test_cut_patches_equals_a_loop_over_images_and_corners(size):
    image = torch.rand(2, 3, 10, 12)
    rows, columns = (torch.randint(0, most - one + 1, (2, 5)) for most, one in zip((10, 12), size, strict=True))
    patches = cut_patches(image, torch.stack([rows, columns], dim=2), size)
    for number, patch in np.ndindex(2, 5):
        top, left = rows[number, patch], columns[number, patch]
        assert torch.equal(patches[number, patch], image[number, :, top : top + size[0], left : left + size[1]])


def test_cut_grid_takes_every_patch_in_reading_order():
    image = torch.rand(2, 3, 10, 12)
    patches = cut_grid(image, side=4, stride=2)
    expected = [
        one[:, top : top + 4, left : left + 4] for one in image for top in range(0, 7, 2) for left in range(0, 9, 2)
    ]
    assert torch.equal(patches, torch.stack(expected))


def test_a_shift_that_leaves_pyramids_no_room_is_refused():
    with pytest.raises(PatchadError, match=r"data\.shift leaves no room for the pyramids of side 8"):
        for seed in range(20):
            sample_pyramids((96, 96), (96, 96), 8, 2, 500, (4, 4), np.random.default_rng(seed))
