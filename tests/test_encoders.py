from functools import partial

import pytest
import torch
from torch import nn

from patchad.models.backbones import VGG16, EfficientNetLite0, Tap
from patchad.models.encoders import DenseEncoder, Standardize, WindowEncoder
from patchad.types import PatchadError

TAP = Tap(layer=0, stride=4, channels=6)


def slow_windows(features: torch.Tensor, encoder: WindowEncoder, step: int) -> torch.Tensor:
    """Cuts each window out, averages its cells, projects it."""
    window, cells, rows = encoder.window, encoder.cells, []
    for top in range(0, features.shape[2] - window + 1, step):
        for left in range(0, features.shape[3] - window + 1, step):
            cut = features[:, :, top : top + window, left : left + window]
            rows.append(nn.functional.adaptive_avg_pool2d(cut, cells).flatten(1) @ encoder.projection.flatten(1).T)
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("cells", [1, 2, 4])
@pytest.mark.parametrize("step", [1, 2])
def test_windows_equal_a_loop_that_cuts_each_of_them(cells, step):
    encoder = WindowEncoder(side=16, tap=TAP, cells=cells, dim=5)
    features = torch.randn(2, 6, 11, 9)
    torch.testing.assert_close(
        encoder(features, step).flatten(2), slow_windows(features, encoder, step), rtol=1e-4, atol=1e-5
    )


def test_the_projection_is_a_function_of_the_seed_and_keeps_distances_on_average():
    encoders = [WindowEncoder(side=16, tap=Tap(0, 4, 512), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(encoders[0].projection, encoders[1].projection)
    assert not torch.equal(encoders[0].projection, encoders[2].projection)
    features = torch.randn(400, 512, 4, 4, generator=torch.Generator().manual_seed(0))
    before = features.mean((2, 3)).norm(dim=1)
    after = encoders[0](features, 1).flatten(1).norm(dim=1)
    assert (after / before).mean().item() == pytest.approx(1, abs=0.1)


def test_standardized_features_have_mean_0_and_deviation_1_over_what_was_observed():
    standardize, features = Standardize(6), torch.randn(4, 6, 8, 8) * 3 + torch.arange(6.0)[:, None, None]
    assert torch.equal(standardize(features), features)
    for part in features.split(1):
        standardize.observe(part)
    standardize.finish(lambda moments: moments)
    flat = standardize(features).transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(flat.std(1, correction=0), torch.ones(6), rtol=1e-4, atol=0)
    assert standardize(features * 1e6).abs().max() == 6


def test_cells_that_do_not_divide_the_window_are_refused():
    with pytest.raises(PatchadError, match="cells 3 does not divide the window of 4 cells of side 16"):
        WindowEncoder(side=16, tap=TAP, cells=3)


def pyramid(backbone=EfficientNetLite0, **settings) -> DenseEncoder:
    return DenseEncoder(backbone(weights="none"), WindowEncoder, (64, 32, 16), **settings).eval()


def test_vgg16_is_scored_at_the_papers_strides():
    assert pyramid(VGG16).strides == {64: 16, 32: 4, 16: 4}


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (100, 75)])
def test_each_side_has_an_embedding_at_every_position(size):
    encoder = pyramid()
    embeddings = encoder(torch.rand(2, 3, *size))
    for side in encoder.sides:
        assert embeddings[side].shape == (2, 64, *encoder.grid(size, side))


def test_one_backbone_pass_feeds_all_sides():
    encoder, passes = pyramid(), []
    encoder.backbone.register_forward_hook(lambda *_: passes.append(1))
    encoder(torch.rand(1, 3, 64, 64))
    assert len(passes) == 1


def test_a_finer_scoring_stride_contains_the_coarser_positions():
    image = torch.rand(1, 3, 96, 96)
    factory = partial(WindowEncoder, cells=2)
    backbone = EfficientNetLite0(weights="none")
    fine, coarse = (DenseEncoder(backbone, factory, (16,), scoring_strides={16: stride}).eval() for stride in (4, 8))
    torch.testing.assert_close(fine(image)[16][:, :, ::2, ::2], coarse(image)[16], rtol=1e-4, atol=1e-5)


def test_a_shift_by_the_stride_of_the_coarsest_tap_shifts_the_embeddings():
    """Away from the border, an embedding depends on its surroundings alone."""
    encoder, image = pyramid(), torch.rand(1, 3, 256, 256)
    shifted = image.roll(32, dims=3)
    before, after = encoder(image)[16], encoder(shifted)[16]
    torch.testing.assert_close(after[..., 24:32, 32:40], before[..., 24:32, 24:32], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": {16: "nowhere"}}, "has no layer nowhere"),
        ({"scoring_strides": {16: 3}}, "scoring stride 3 of side 16"),
        ({"taps": {16: "stage7"}}, "scoring stride 32 of side 16"),
    ],
)
def test_sides_taps_and_strides_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(PatchadError, match=message):
        pyramid(**settings)


def test_a_side_without_a_tap_asks_for_one():
    with pytest.raises(PatchadError, match="no tap is known for side 48"):
        DenseEncoder(EfficientNetLite0(weights="none"), WindowEncoder, (48,))


def test_an_image_smaller_than_a_side_is_refused():
    with pytest.raises(PatchadError, match="side 64 does not fit an image of 48 x 48 pixels"):
        pyramid()(torch.rand(1, 3, 40, 44))
