import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from patchad.conformal import conformal_threshold, images_needed, p_values
from patchad.errors import PatchadError
from patchad.pyramid import enlarge
from patchad.scoring import Scorer, bell

FULL = torch.tensor([[8, 8], [8, 8]])


def test_sides_are_summed_each_over_its_own_scale():
    scorer = Scorer((64, 16), combination="sum")
    scorer.scale.copy_(torch.tensor([2.0, 10.0]))
    maps = {64: torch.rand(2, 8, 8), 16: torch.rand(2, 8, 8)}
    torch.testing.assert_close(scorer.combine(maps), maps[64] / 2 + maps[16] / 10)


def test_the_product_ranks_as_the_product_and_equals_the_sum_where_sides_agree():
    scorer = Scorer((64, 32, 16), combination="product")
    maps = {side: torch.rand(2, 8, 8) + 0.02 for side in (64, 32, 16)}
    combined, product = scorer.combine(maps), maps[64] * maps[32] * maps[16]
    assert torch.equal(combined.flatten().argsort(), product.flatten().argsort())
    torch.testing.assert_close(scorer.combine(dict.fromkeys((64, 32, 16), maps[64])), 3 * maps[64])


def test_an_excess_is_counted_in_units_of_how_normal_images_differ():
    scorer = Scorer((64, 16), combination="excess", image_score="max")
    scorer.scale.copy_(torch.tensor([2.0, 1.0]))
    scores = {64: torch.tensor([2.0, 6.0]), 16: torch.tensor([8.0, 10.0])}  # levels 2 and 9, spreads 1 and 1
    scorer.measure_normals(scores)
    maps = {64: torch.tensor([[[8.0, 2.0]]]), 16: torch.tensor([[[9.0, 7.0]]])}
    first, second = np.log1p(np.e**2) ** 2 + np.log(2) ** 2, np.log1p(np.e**-1) ** 2 + np.log1p(np.e**-2) ** 2
    torch.testing.assert_close(scorer.combine(maps), torch.tensor([[[first, second]]]).float())
    mean = {side: values.mean()[None] for side, values in scores.items()}
    torch.testing.assert_close(scorer.combine(mean), torch.tensor([scorer.normal_level]))


def test_a_side_on_which_normal_images_vary_hides_no_defect_that_another_sees():
    random = torch.Generator().manual_seed(0)
    normals = {64: 1 + 0.02 * torch.randn(200, generator=random), 16: 1 + 0.5 * torch.rand(200, generator=random)}
    excess, product = (Scorer((64, 16), combination=one) for one in ("excess", "product"))
    excess.measure_normals(normals)
    defective = {64: torch.tensor([1.2]), 16: torch.tensor([1.1])}
    assert (excess.combine(normals) < excess.combine(defective)).all()
    assert (product.combine(normals) > product.combine(defective)).any()


def test_normal_images_that_are_all_alike_have_a_spread():
    scorer = Scorer((16,), combination="excess")
    scorer.measure_normals({16: torch.full((5,), 3.0)})
    assert scorer.combine({16: torch.tensor([3.0, 300.0])}).isfinite().all()


def test_rounding_of_distances_that_are_nearly_nothing_does_not_change_the_product():
    scorer, ones = Scorer((64, 16), combination="product"), torch.ones(1, 4, 4)
    maps = [scorer.combine({64: ones * nearly_nothing, 16: ones}) for nearly_nothing in (0.0, 1e-6, 5e-3)]
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def test_excesses_are_shown_where_the_smallest_side_sees_them_and_stay_where_it_sees_nothing():
    scorer = Scorer((64, 32, 16), "excess", smoothing=0.0)
    far, near = torch.tensor([[[5.0, 9.0, 5.0]]]), torch.tensor([[[5.0, -99.0, -99.0]]])
    maps = {64: far, 32: far, 16: near}
    combined, shown = scorer.combine(maps).flatten(), scorer.show(maps, FULL[:1]).flatten()
    assert combined[1] > combined[0] and shown[0] > shown[1] > shown[2] > 1
    level = np.log(2) ** 2
    expected = [combined[0] ** (2 / 3) * (3 * (float(combined[0]) / 3 + level)) ** (1 / 3)]
    expected += [one ** (2 / 3) * (3 * level) ** (1 / 3) for one in combined[1:]]
    np.testing.assert_allclose(shown, expected, rtol=1e-5)


@pytest.mark.parametrize("combination", ["sum", "product"])
def test_the_unit_of_a_side_does_not_change_the_combination(combination):
    maps = {64: torch.rand(2, 8, 8), 16: torch.rand(2, 8, 8)}
    combined = []
    for unit in (1.0, 1000.0):
        scorer = Scorer((64, 16), combination)
        scorer.scale.copy_(torch.tensor([unit * maps[64].mean(), maps[16].mean()]))
        combined.append(scorer.combine({64: maps[64] * unit, 16: maps[16]}))
    torch.testing.assert_close(combined[0], combined[1])


@pytest.mark.parametrize("image_score", ["max", "top_fraction"])
def test_padding_is_never_scored(image_score):
    maps = torch.rand(2, 8, 8)
    content = torch.tensor([[5, 8], [8, 3]])
    scorer = Scorer((64,), image_score=image_score, top_fraction=0.1)
    expected = scorer.score(maps, content)
    maps[0, 5:], maps[1, :, 3:] = 99, 99
    assert torch.equal(scorer.score(maps, content), expected)


def test_max_is_the_highest_pixel():
    maps = torch.rand(2, 8, 8)
    assert torch.equal(Scorer((64,), image_score="max").score(maps, FULL), maps.amax((1, 2)))


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 1.0])
def test_top_fraction_is_the_mean_of_the_highest_pixels_of_each_content(fraction):
    maps, content = torch.rand(2, 8, 8), torch.tensor([[5, 8], [8, 3]])
    scores = Scorer((64,), image_score="top_fraction", top_fraction=fraction).score(maps, content)
    for image, (height, width) in enumerate(content.tolist()):
        pixels = np.sort(maps[image, :height, :width].numpy().ravel())[::-1]
        expected = pixels[: max(1, int(np.ceil(fraction * pixels.size - 1e-9)))].mean()
        assert scores[image].item() == pytest.approx(expected, rel=1e-5)


CUT = torch.tensor([[48, 64], [41, 33], [7, 3], [8, 64]])
"""Height x width of content that cells of 8 pixels do not divide, and that they do."""


@pytest.mark.parametrize("image_score", ["max", "top_fraction"])
@pytest.mark.parametrize("fraction", [0.001, 0.03, 0.4, 1.0])
def test_cells_score_as_their_pixels_do(fraction, image_score):
    cells = torch.rand(4, 6, 8)
    scorer = Scorer((64,), image_score=image_score, top_fraction=fraction)
    torch.testing.assert_close(scorer.score(cells, CUT, cell=8), scorer.score(enlarge(cells, 8), CUT))


@pytest.mark.parametrize("smoothing", [0.0, 1.5, 8.0])
def test_cells_are_smoothed_as_their_pixels_are(smoothing):
    cells, scorer = torch.rand(4, 6, 8), Scorer((16,), smoothing=smoothing)
    torch.testing.assert_close(scorer.smooth(cells, CUT, cell=8), scorer.smooth(enlarge(cells, 8), CUT))


@pytest.mark.parametrize(("count", "target", "rank"), [(99, 0.05, 95), (99, 0.01, 99), (19, 0.1, 18), (200, 0.01, 199)])
def test_the_threshold_is_the_conformal_order_statistic(count, target, rank):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    threshold, rate = conformal_threshold(scores, target)
    assert threshold == rank
    assert rate <= target + 1e-9


def test_with_too_few_images_the_threshold_is_their_maximum_and_the_rate_is_what_they_reach():
    assert conformal_threshold(np.array([3.0, 1.0, 2.0]), 0.01) == (3.0, 0.25)


def test_new_normal_images_exceed_the_threshold_no_more_often_than_promised():
    scores = np.random.default_rng(0).random((4000, 50))
    exceeded = [float(row[49] > conformal_threshold(row[:49], 0.1)[0]) for row in scores]
    assert np.mean(exceeded) < 0.1 + 3 * (0.1 * 0.9 / 4000) ** 0.5


def test_no_normal_image_is_an_error_with_a_way_out():
    with pytest.raises(PatchadError, match="give training images"):
        conformal_threshold(np.empty(0), 0.01)


@pytest.mark.parametrize("target", [0.4, 0.05, 0.03, 0.01])
def test_the_images_needed_are_the_fewest_that_keep_the_promise(target):
    needed = images_needed(target)
    assert conformal_threshold(np.arange(float(needed)), target)[1] <= target + 1e-9
    assert conformal_threshold(np.arange(float(needed - 1)), target)[1] > target


def test_p_values_are_the_share_of_normals_that_score_as_high_and_agree_with_the_verdict():
    generator = np.random.default_rng(0)
    normals, scores = generator.integers(0, 30, 50).astype(np.float32), np.arange(31, dtype=np.float32)
    expected = [(1 + sum(normal >= score for normal in normals)) / 51 for score in scores]
    np.testing.assert_allclose(p_values(scores, normals), expected)
    scorer = Scorer((16,), target_fpr=0.1)
    promised = scorer.set_limits(torch.from_numpy(normals), torch.from_numpy(normals))
    anomalous = torch.from_numpy(scores) > scorer.threshold
    assert torch.equal(scorer.p_value(torch.from_numpy(scores)) <= promised + 1e-6, anomalous)
    assert anomalous.any() and not anomalous.all()


def test_another_rate_sets_another_threshold_from_the_scores_that_are_kept():
    fitted = Scorer((16,), target_fpr=0.05)
    fitted.set_limits(torch.arange(100.0), 2 * torch.arange(100.0))
    loaded = Scorer((16,), target_fpr=0.2, review_fpr=0.5)
    loaded.load_state_dict(fitted.state_dict())
    assert conformal_threshold(np.arange(100.0), 0.2)[0] == 80
    assert loaded.limits == (80, 50, 160) and fitted.limits == (95, 95, 190)
    assert [loaded.limits.verdict(score) for score in (50.0, 50.5, 80.0, 80.5)] == [
        *("normal", "review", "review", "anomalous")
    ]


@pytest.mark.parametrize(
    "wrong",
    [{"top_fraction": 0.0}, {"target_fpr": 1.5}, {"smoothing": -1.0}, {"review_fpr": 0.05}, {"review_fpr": 2.0}],
)
def test_arguments_outside_their_range_are_refused(wrong):
    with pytest.raises(PatchadError, match=next(iter(wrong))):
        Scorer((16,), **wrong)


def test_no_weight_of_the_gaussian_is_subnormal():
    assert bell(256, 4.0, torch.device("cpu")).min() >= torch.finfo(torch.float32).tiny


def test_smoothing_is_scipys_gaussian_on_the_content_and_nothing_on_the_padding():
    maps, content = torch.rand(2, 40, 56), torch.tensor([[40, 56], [33, 20]])
    smooth = Scorer((64,), smoothing=2.5).smooth(maps, content)
    for image, (height, width) in enumerate(content.tolist()):
        ones, values = np.ones((height, width)), maps[image, :height, :width].numpy().astype(float)
        blurred, reached = (gaussian_filter(one, 2.5, mode="constant", truncate=12) for one in (values, ones))
        np.testing.assert_allclose(smooth[image, :height, :width], blurred / reached, rtol=1e-5)
    assert not smooth[1, 33:].any() and not smooth[1, :, 20:].any()


def test_no_smoothing_leaves_the_map_as_it_is():
    maps = torch.rand(2, 8, 8)
    assert torch.equal(Scorer((64,), smoothing=0.0).smooth(maps, FULL), maps)


def test_smoothing_keeps_its_digits_at_reduced_precision():
    maps, scorer = torch.rand(2, 8, 8), Scorer((64,))
    expected = scorer.smooth(maps, FULL)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer.smooth(maps, FULL), expected)


def test_the_highest_share_of_pixels_is_rounded_up():
    """Of 150 pixels, 1 % are 1.5: two of them count."""
    values = torch.zeros(1, 10, 15)
    values[0, 0, :3] = torch.tensor([6.0, 4.0, 1.0])
    content = torch.tensor([[10, 15]])
    assert Scorer((16,), top_fraction=0.01).score(values, content) == 5.0
    assert Scorer((16,), image_score="max").score(values, content) == 6.0
