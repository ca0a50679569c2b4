import numpy as np
import pytest
import torch

from patchad.pyramid import crop_resize, fold, inside, pad_to_multiple, positions, spread
from patchad.types import PatchadError


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


def test_folding_a_constant_gives_that_constant_everywhere():
    folded = fold(torch.full((1, 9, 9), 3.5), torch.ones(1, 9, 9, dtype=torch.bool), 32, 4)
    torch.testing.assert_close(folded, torch.full((1, 64, 64), 3.5))


def test_spreading_keeps_the_sum_of_the_values_times_the_patch_area():
    values = torch.rand(1, 4, 6)
    torch.testing.assert_close(spread(values, 16, 4).sum(), values.sum() * 16 * 16)


@pytest.mark.parametrize(("side", "stride"), [(64, 16), (32, 4), (16, 4), (16, 16), (32, 32)])
def test_counted_patches_cover_every_pixel_of_any_content(side, stride):
    size = 128
    grid = positions((size, size), side, stride)
    for height, width in [(1, 128), (17, 90), (40, 128), (64, 65), (97, 31), (127, 128), (128, 128)]:
        counted = inside(torch.tensor([[height, width]]), grid, side, stride)
        covered = spread(counted.float(), side, stride)[0, :height, :width]
        assert covered.min() >= 1


def test_patches_on_padding_alone_do_not_count():
    counted = inside(torch.tensor([[128, 64]]), positions((128, 128), 16, 4), 16, 4)[0]
    starts = torch.arange(counted.shape[1]) * 4
    assert counted.any(0).tolist() == (starts + 8 < 64).tolist()


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
