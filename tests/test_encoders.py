from functools import partial

import pytest
import torch
from torch import nn

from patchad.errors import PatchadError
from patchad.models.backbones import VGG16, EfficientNetLite0, Tap
from patchad.models.encoders import DenseEncoder, MeanImage, SlidingEncoder
from patchad.models.patches import LearnedEncoder, Standardize, TextureEncoder, WindowEncoder, convolutions

TAP = Tap(layer=0, stride=4, channels=6)


def slow_windows(features: torch.Tensor, encoder: WindowEncoder, step: int) -> torch.Tensor:
    """Cuts each window out, averages its cells, projects it."""
    window, cells, rows = encoder.window, encoder.cells, []
    for top in range(0, features.shape[2] - window + 1, step):
        for left in range(0, features.shape[3] - window + 1, step):
            cut = features[:, :, top : top + window, left : left + window]
            kept = nn.functional.adaptive_avg_pool2d(cut, cells).flatten(1)
            rows.append(kept if encoder.projection is None else kept @ encoder.projection.flatten(1).T)
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize(("cells", "dim"), [(1, 5), (2, 5), (4, 5), (1, None), (2, None)])
@pytest.mark.parametrize("step", [1, 2])
def test_windows_equal_a_loop_that_cuts_each_of_them(cells, dim, step):
    encoder = WindowEncoder(side=16, tap=TAP, cells=cells, dim=dim)
    assert (encoder.projection is None) == (cells == 1 and dim is None)
    features = torch.randn(2, 6, 11, 9)
    assert encoder(features, step).shape[1] == encoder.dim == (dim or 6 * cells**2)
    torch.testing.assert_close(
        encoder(features, step).flatten(2), slow_windows(features, encoder, step), rtol=1e-4, atol=1e-5
    )


def test_windows_of_many_channels_are_projected_without_being_asked():
    encoder = WindowEncoder(side=16, tap=Tap(0, 4, 200))
    assert encoder(torch.zeros(1, 200, 4, 4), 1).shape == (1, 128, 1, 1) == (1, encoder.dim, 1, 1)


def slow_textures(features: torch.Tensor, encoder: TextureEncoder, step: int) -> torch.Tensor:
    """Cuts each window out, takes mean and deviation of its cells in double precision, projects them."""
    kernel, rows = encoder.window // encoder.cells, []
    for top in range(0, features.shape[2] - encoder.window + 1, step):
        for left in range(0, features.shape[3] - encoder.window + 1, step):
            cut = features[:, :, top : top + encoder.window, left : left + encoder.window].double()
            cells = cut.unfold(2, kernel, kernel).unfold(3, kernel, kernel)
            deviation = (cells.var((4, 5), correction=0) + encoder.least_variance).sqrt()
            kept = torch.cat([cells.mean((4, 5)), deviation], dim=1)
            rows.append(kept.flatten(1) @ encoder.projection.flatten(1).T.double())
    return torch.stack(rows, dim=2).float()


@pytest.mark.parametrize("cells", [1, 2, 4])
@pytest.mark.parametrize("step", [1, 2])
def test_textures_equal_a_loop_that_cuts_each_window(cells, step):
    encoder, features = TextureEncoder(side=16, tap=TAP, cells=cells, dim=5), 3 * torch.randn(2, 6, 11, 9)
    found = encoder(features, step).flatten(2)
    torch.testing.assert_close(found, slow_textures(features, encoder, step), rtol=1e-4, atol=1e-4)


def test_the_texture_of_a_flat_patch_is_not_rounding():
    encoder = TextureEncoder(side=16, tap=TAP)
    flat = encoder(torch.full((1, 6, 4, 8), 5.3), 1)
    expected = encoder.projection.flatten(1) @ torch.tensor([5.3] * 6 + [encoder.least_variance**0.5] * 6)
    torch.testing.assert_close(flat, expected[None, :, None, None].expand_as(flat), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("encoder", [partial(WindowEncoder, standardized=True), TextureEncoder, LearnedEncoder])
def test_a_standardised_encoder_does_not_see_the_scale_of_its_channels(encoder):
    torch.manual_seed(0)
    features, scale = torch.randn(4, 6, 8, 8), torch.logspace(-2, 2, 6)[:, None, None]
    found = []
    for given in (features, features * scale + 3 * scale):
        torch.manual_seed(1)
        one = encoder(16, TAP)
        assert one.standardize is not None
        one.standardize.observe(given)
        one.standardize.finish(lambda moments: moments)
        found.append(one(given, 1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_cells_that_do_not_divide_the_window_are_refused():
    with pytest.raises(PatchadError, match="cells 3 does not divide the window of 4 cells of side 16"):
        WindowEncoder(side=16, tap=TAP, cells=3)


def pyramid(backbone=EfficientNetLite0, **settings) -> DenseEncoder:
    return DenseEncoder(backbone(weights="none"), WindowEncoder, (64, 32, 16), **settings).eval()


def test_patches_are_scored_every_8_pixels_or_as_far_apart_as_the_tap_asks():
    assert pyramid(VGG16).strides == {64: 16, 32: 16, 16: 8}
    assert pyramid().strides == {64: 16, 32: 16, 16: 8}


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (100, 75)])
def test_each_side_has_an_embedding_at_every_position(size):
    encoder = pyramid()
    embeddings = encoder(torch.rand(2, 3, *size))
    for side in encoder.sides:
        channels = encoder.backbone.tap(encoder.tap_names[side]).channels
        assert embeddings[side].shape == (2, channels, *encoder.grid(size, side))


def test_one_backbone_pass_feeds_all_sides():
    encoder, passes = pyramid(), []
    encoder.backbone.register_forward_hook(lambda *_: passes.append(1))
    encoder(torch.rand(1, 3, 64, 64))
    assert len(passes) == 1


def test_a_frozen_backbone_sees_image_by_image_on_a_cpu_and_a_trained_one_the_batch():
    """A batch norm that is trained takes its mean over the batch."""
    images = torch.rand(3, 3, 64, 64)
    for trainable, passes in (("none", 3), ("all", 1)):
        encoder, seen = DenseEncoder(EfficientNetLite0(weights="none", trainable=trainable), LearnedEncoder, (16,)), []
        encoder.backbone.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        with torch.inference_mode():
            found = encoder.features(images)[16]
            whole = encoder.backbone(images, set(encoder.tap_names.values()))
        assert len(seen) == passes + 1
        torch.testing.assert_close(found, whole[encoder.tap_names[16]], rtol=1e-5, atol=1e-5)


def test_every_layer_that_is_trained_gets_a_gradient():
    """DistributedDataParallel waits for each of them; layers behind the deepest tap are never run."""
    encoder = DenseEncoder(EfficientNetLite0(weights="none", trainable="all"), LearnedEncoder, (64, 16))
    sum(values.sum() for values in encoder(torch.rand(1, 3, 64, 64)).values()).backward()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert len(trained) > 50 and all(parameter.grad is not None for parameter in trained)


def test_layers_to_train_that_no_side_reads_are_refused():
    backbone = EfficientNetLite0(weights="none", trainable="stage3")
    for _ in range(2):  # the first time must not freeze what the second one asks for
        with pytest.raises(PatchadError, match=r"trains nothing of the backbone: no side reads a layer behind stage3"):
            DenseEncoder(backbone, LearnedEncoder, (16,), taps={16: "stage3"})


def test_a_finer_scoring_stride_contains_the_coarser_positions():
    image = torch.rand(1, 3, 96, 96)
    factory = partial(WindowEncoder, cells=2)
    backbone = EfficientNetLite0(weights="none")
    made = partial(DenseEncoder, backbone, factory, (16,), taps={16: "stage2"})
    fine, coarse = (made(scoring_strides={16: stride}).eval() for stride in (4, 8))
    torch.testing.assert_close(fine(image)[16][:, :, ::2, ::2], coarse(image)[16], rtol=1e-4, atol=1e-5)


def test_a_shift_by_the_stride_of_the_coarsest_tap_shifts_the_embeddings():
    """Away from the border, an embedding depends on its surroundings alone."""
    encoder, image = pyramid(), torch.rand(1, 3, 256, 256)
    shifted = image.roll(32, dims=3)
    before, after = encoder(image)[16], encoder(shifted)[16]
    torch.testing.assert_close(after[..., 12:16, 16:20], before[..., 12:16, 12:16], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": {16: "nowhere"}}, "has no layer nowhere"),
        ({"scoring_strides": {16: 3}}, "scoring stride 3 of side 16"),
        ({"taps": {16: "stage7"}}, "side 16 is no multiple of .* 32 pixels; give 32 in sides, or another tap in taps"),
        ({"tile": 0}, "tile 0 must be at least 1"),
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


def learned(mode, **settings):
    torch.manual_seed(0)
    return mode(EfficientNetLite0(weights="none"), LearnedEncoder, (32, 16), **settings).eval()


def test_the_papers_encoders_end_at_one_cell_of_64_numbers():
    """Supplement, figure 2."""
    for side, tap in ((64, Tap(29, 16, 512)), (32, Tap(15, 4, 256)), (16, Tap(8, 2, 128))):
        encoder = LearnedEncoder(side, tap)
        window = side // tap.stride
        assert encoder(torch.zeros(1, tap.channels, window, window), step=1).shape == (1, 64, 1, 1)


@pytest.mark.parametrize(
    ("side", "tap", "expected"),
    [
        (64, Tap(29, 16, 512), [(512, 256, 2), (256, 128, 2), (128, 64, 2), (64, 64, 1)]),
        (32, Tap(15, 4, 256), [(256, 256, 3), (256, 128, 3), (128, 128, 2), (128, 64, 2), (64, 64, 2)]),
        (16, Tap(8, 2, 128), [(128, 128, 3), (128, 64, 3), (64, 32, 3), (32, 64, 2)]),
    ],
)
def test_the_papers_encoders_are_those_of_figure_2(side, tap, expected):
    """Channels in and out and kernel of each convolution; LeakyReLU of slope 0.1 between them, tanh at the end."""
    encoder = LearnedEncoder(side, tap, standardized=False, shortcut=False)
    layers = list(encoder.layers)
    found = [(layer.in_channels, layer.out_channels, layer.kernel_size[0]) for layer in layers[::2]]
    assert found == expected
    assert [layer.negative_slope for layer in layers[1::2]] == [0.1] * (len(expected) - 1)
    features = torch.randn(1, tap.channels, side // tap.stride, side // tap.stride)
    torch.testing.assert_close(encoder(features, 1), nn.Sequential(*layers)(features).tanh())


def test_the_shortcut_adds_the_training_free_embedding_to_what_is_learned():
    torch.manual_seed(0)
    encoder, features = LearnedEncoder(16, TAP), torch.randn(2, 6, 9, 8)
    last = encoder.layers[-1]
    with torch.no_grad():
        last.weight.zero_(), last.bias.zero_()
        found = encoder(features, 2)
    torch.testing.assert_close(found, (64 / 6) ** 0.5 * WindowEncoder(16, TAP, dim=64)(features, 2))
    assert LearnedEncoder(16, TAP, shortcut=False)(100 * features, 2).abs().max() <= 1


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("window", [1, 4])
def test_windows_step_cells_apart_are_every_step_th_of_all(shortcut, window):
    encoder = LearnedEncoder(4 * window, TAP, shortcut=shortcut)
    features = torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(encoder(features, 2), encoder(features, 1)[:, :, ::2, ::2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 16])
def test_any_other_window_is_brought_to_one_cell(window):
    layers = convolutions(40, window, 48)
    assert layers[-1][0] == 48
    assert window - sum(kernel - 1 for _, kernel in layers) == 1


def test_a_patch_has_the_same_embedding_wherever_its_window_is_cut_out():
    """Training picks patches from windows of a tap; scoring reads the whole tap."""
    encoder, image = learned(DenseEncoder, taps={16: "stage2"}), torch.rand(2, 3, 128, 128)
    whole = encoder.encoders["16"](encoder.features(image)[16], 1)
    corners = {32: torch.tensor([[0, 0], [16, 16]]), 16: torch.tensor([[4, 8], [40, 64]])}
    windows = encoder.windows(image, corners)
    positions = torch.tensor([[[0, 0], [8, 4]], [[32, 32], [12, 20]]])
    found = encoder.embed(16, windows[16], positions)
    for number in range(2):
        for patch in range(2):
            row, column = ((corners[16][number] + positions[number, patch]) // 4).tolist()
            torch.testing.assert_close(found[number, patch], whole[number, :, row, column], rtol=1e-4, atol=1e-5)


def test_sliding_embeds_each_patch_as_if_it_were_an_image_of_its_own():
    encoder, image = learned(SlidingEncoder, scoring_strides={32: 16, 16: 8}), torch.rand(2, 3, 64, 80)
    found = encoder(image)[16]
    assert found.shape == (2, 64, *encoder.grid((64, 80), 16))
    for row, column in ((0, 0), (3, 5), (6, 8)):
        patch = image[:, :, 8 * row : 8 * row + 16, 8 * column : 8 * column + 16]
        alone = encoder.encoders["16"](encoder.backbone(patch, ["stage3"])["stage3"], 1)[:, :, 0, 0]
        torch.testing.assert_close(found[:, :, row, column], alone, rtol=1e-3, atol=1e-5)


def test_sliding_patches_lie_at_any_stride_that_divides_their_side():
    """Each passes on its own, so that the stride of the tap, 8 for these, does not count."""
    encoder, image = learned(SlidingEncoder, scoring_strides={32: 16, 16: 2}), torch.rand(1, 3, 32, 48)
    found, coarser = encoder(image)[16], learned(SlidingEncoder, scoring_strides={32: 16, 16: 8})(image)[16]
    assert encoder.taps[16].stride == 8 and found.shape[2:] == (9, 17)
    torch.testing.assert_close(found[:, :, ::4, ::4], coarser, rtol=1e-3, atol=1e-5)
    with pytest.raises(PatchadError, match=r"scoring stride 3 of side 16 must divide 16 and be a multiple of 1 \("):
        learned(SlidingEncoder, scoring_strides={16: 3})


def test_sliding_patches_of_pyramids_are_those_of_scoring():
    encoder, image = learned(SlidingEncoder, scoring_strides={32: 16, 16: 8}), torch.rand(2, 3, 64, 64)
    corners = {32: torch.zeros(2, 2, dtype=torch.int64), 16: torch.tensor([[8, 0], [16, 16]])}
    found = encoder.embed(16, encoder.windows(image, corners)[16], torch.tensor([[[0, 8]], [[24, 0]]]))
    whole = encoder(image)[16]
    torch.testing.assert_close(found[0, 0], whole[0, :, 1, 1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[1, 0], whole[1, :, 5, 2], rtol=1e-3, atol=1e-5)


def test_the_mean_image_is_subtracted_instead_of_the_backbones_normalisation():
    encoder, images = learned(DenseEncoder, subtract_mean_image=True), torch.rand(3, 3, 64, 64)
    assert torch.equal(encoder.mean_image(images), images)
    for part in images.split(2):
        encoder.mean_image.observe(part)
    encoder.mean_image.finish(lambda moments: moments)
    torch.testing.assert_close(encoder.mean_image(images), images - images.mean(0))
    seen = []
    encoder.backbone.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(images)
    torch.testing.assert_close(torch.cat(seen), images - images.mean(0), rtol=1e-4, atol=1e-5)
    fresh = learned(DenseEncoder, subtract_mean_image=True)
    fresh.load_state_dict(encoder.state_dict())
    assert torch.equal(fresh.mean_image.mean, encoder.mean_image.mean)
    with pytest.raises(PatchadError, match=r"64 x 64 pixels .*, this image 32 x 64"):
        MeanImage.forward(encoder.mean_image, images[:, :, :32])


@pytest.mark.parametrize("backbone", [EfficientNetLite0, VGG16])
@pytest.mark.parametrize("size", [(300, 210), (96, 400)])
def test_tiles_give_the_embeddings_of_the_whole_image(backbone, size):
    torch.manual_seed(0)
    whole = DenseEncoder(backbone(weights="none"), LearnedEncoder, (32, 16)).eval()
    tiled = DenseEncoder(whole.backbone, LearnedEncoder, (32, 16), tile=64).eval()
    tiled.load_state_dict(whole.state_dict())
    image = torch.rand(1 if backbone is VGG16 else 2, 3, *size)
    with torch.inference_mode():
        expected, found = whole(image), tiled(image)
    for side in (32, 16):
        assert found[side].shape == expected[side].shape
        torch.testing.assert_close(found[side], expected[side], rtol=1e-4, atol=1e-5)


def test_an_image_that_fits_a_tile_is_not_cut(monkeypatch):
    encoder = DenseEncoder(EfficientNetLite0(weights="none"), LearnedEncoder, (32, 16), tile=96).eval()
    monkeypatch.setattr(encoder, "_features_in_tiles", None)
    encoder(torch.rand(1, 3, 96, 90))
