import shutil
from pathlib import Path

import pytest
import torch

from patchad import Learning, PatchModel, PyramidDataModule
from patchad.data.datasets import ImageDataset, PyramidDataset, ViewDataset
from patchad.errors import PatchadError
from patchad.images import Augmentations
from patchad.models import EfficientNetLite0, FeatureCache
from patchad.types import PyramidPlan


@pytest.fixture
def parts(product, tmp_path):
    """A datamodule, its pyramids, a detector, and a cache filled with two views of each image."""
    data = PyramidDataModule(product, image_size=(96, 96), num_workers=0)
    data.setup("fit")
    detector = PatchModel(EfficientNetLite0()).eval()
    pyramids = PyramidDataset(data.train_set, PyramidPlan(detector.encoder.grids, 2), 16, Augmentations(), seed=0)
    cache = FeatureCache(str(tmp_path / "features"))
    fill(cache, pyramids, detector)
    return pyramids, detector, cache


def paths(pyramids) -> list[str]:
    return [str(sample.path) for sample in pyramids.images.samples]


@torch.no_grad()
def fill(cache, pyramids, detector, painted=False) -> list[tuple[int, int, bool]]:
    cache.open(paths(pyramids), "key", detector.encoder, (96, 96), painted)
    missing = cache.missing()
    for number, view, with_defects, image, mask in ViewDataset(pyramids, missing):
        features = detector.encoder.features(image[None])
        cache.write(number, view, with_defects, {side: values[0] for side, values in features.items()}, mask)
    return missing


def test_cached_windows_equal_computed_ones_to_half_precision(parts):
    pyramids, detector, cache = parts
    items = [pyramids[(0, number)] for number in (3, 5)]
    numbers, views = torch.tensor([3, 5]), torch.stack([item.views for item in items])
    corners = {side: torch.stack([item.sides[side].window for item in items]) for side in (64, 32, 16)}
    read = cache.read(numbers, views[:, 1], corners)
    images = torch.stack([pyramids.view(number, int(view)) for number, view in zip((3, 5), views[:, 1], strict=True)])
    with torch.no_grad():
        computed = detector.encoder.windows(images, corners)
    for side in (64, 32, 16):
        assert read[side].shape == computed[side].shape
        torch.testing.assert_close(read[side], computed[side], rtol=2e-3, atol=2e-3)


def test_a_second_fill_computes_nothing_and_other_weights_everything(parts):
    pyramids, detector, cache = parts
    again = FeatureCache(str(cache.folder))
    assert fill(again, pyramids, detector) == []
    with torch.no_grad():
        next(detector.encoder.backbone.parameters()).mul_(1.01)
    again.open(paths(pyramids), "key", detector.encoder, (96, 96))
    assert len(again.missing()) == 2 * len(pyramids.images)


class OtherDeviation(EfficientNetLite0):
    """Same weights, other normalisation."""

    deviation = (1.0, 1.0, 1.0)


class OtherMean(EfficientNetLite0):
    """Same weights, other normalisation."""

    mean = (0.1, 0.1, 0.1)


OtherDeviation.__qualname__ = OtherMean.__qualname__ = EfficientNetLite0.__qualname__  # by which they are told apart


def subtracting(level: float) -> PatchModel:
    detector = PatchModel(EfficientNetLite0(), subtract_mean_image=True)
    detector.encoder.mean_image.mean = torch.full((3, 96, 96), level)
    return detector


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: subtracting(0.2), lambda: subtracting(0.3)),
        (lambda: PatchModel(EfficientNetLite0()), lambda: PatchModel(OtherDeviation())),
        (lambda: PatchModel(EfficientNetLite0()), lambda: PatchModel(OtherMean())),
        (
            lambda: PatchModel(EfficientNetLite0()),
            lambda: PatchModel(EfficientNetLite0(), scoring_strides={64: 64}),  # pads images to multiples of 64
        ),
    ],
    ids=["mean image", "deviation", "mean", "padding"],
)
def test_whatever_else_changes_features_computes_everything(one, other, parts):
    pyramids, _, cache = parts
    fill(cache, pyramids, one().eval())
    assert fill(cache, pyramids, one().eval()) == []
    assert len(fill(cache, pyramids, other().eval())) == 2 * len(pyramids.images)


def test_an_image_that_changed_is_computed_anew_and_a_removed_one_moves_no_other(parts, tmp_path):
    pyramids, detector, cache = parts
    files = [Path(path) for path in paths(pyramids)]
    copies = [shutil.copy(path, tmp_path / path.name) for path in files]
    copies[1].write_bytes(copies[1].read_bytes() + b"\0")
    again = FeatureCache(str(cache.folder))
    again.open([str(path) for path in copies[1:]], "key", detector.encoder, (96, 96))
    assert again.missing() == [(0, 0, False), (0, 1, False)]


def test_another_key_or_another_name_of_a_file_computes_everything(parts, tmp_path):
    """The views are drawn from both."""
    pyramids, model, cache = parts
    again, count = FeatureCache(str(cache.folder)), 2 * len(pyramids.images)
    again.open(paths(pyramids), "another key", model.encoder, (96, 96))
    assert len(again.missing()) == count
    renamed = [str(shutil.copy(path, tmp_path / f"other-{Path(path).name}")) for path in paths(pyramids)]
    again.open(renamed, "key", model.encoder, (96, 96))
    assert len(again.missing()) == count


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"brightness": 0.5},
        {"keep_aspect": False},
        {"image_size": (64, 64)},
        {"shift": 1},
        {"colour_deviation": 0.1},
        {"noise_deviation": 0.1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_whatever_changes_views_is_in_the_key(changed):
    found = []
    for settings in ({}, changed):
        data = PyramidDataModule("x", **settings)
        data.train_set = ImageDataset([], data.canvas, data.metric_size)
        found.append(data.view_settings)
    assert found[0] != found[1]


def test_painted_views_are_added_to_those_without_defects_and_keep_their_masks(parts):
    pyramids, detector, cache = parts
    before = cache.gigabytes
    cache.open(paths(pyramids), "key", detector.encoder, (96, 96), painted=True)
    missing = cache.missing()
    assert {pair[1:] for pair in missing} == {(0, True), (1, True)} and len(missing) == 2 * len(pyramids.images)
    assert cache.gigabytes == pytest.approx(2 * before)
    fill(cache, pyramids, detector, painted=True)
    assert cache.missing() == []
    found = cache.masks(torch.tensor([3, 5]), torch.tensor([0, 1]))
    assert torch.equal(found, torch.stack([pyramids.painted(3, 0)[1], pyramids.painted(5, 1)[1]]))


def test_a_repeated_image_is_kept_once(parts):
    pyramids, detector, cache = parts
    again = FeatureCache(str(cache.folder.parent / "repeated"))
    again.open(3 * paths(pyramids), "key", detector.encoder, (96, 96))
    assert len(again.missing()) == 2 * len(pyramids.images)
    assert again.gigabytes == pytest.approx(cache.gigabytes)


def test_the_announced_size_is_the_size_on_disk(parts):
    cache = parts[2]
    header = 128  # bytes of a .npy file before its values
    on_disk = sum(path.stat().st_size - header for path in cache.folder.rglob("*.npy")) / 1e9
    assert cache.gigabytes == pytest.approx(on_disk, rel=1e-6)


def test_a_cache_that_would_be_too_large_is_refused_with_its_size(parts):
    pyramids, detector, _ = parts
    with pytest.raises(PatchadError, match=r"need 0\.0 GB in .*more than max_gigabytes 1e-06; raise it"):
        FeatureCache(max_gigabytes=1e-6).open(paths(pyramids), "key", detector.encoder, (96, 96))


def test_features_of_a_fine_tuned_backbone_are_not_cached(parts):
    pyramids = parts[0]
    detector = PatchModel(EfficientNetLite0(weights="none", trainable="stage3"))
    with pytest.raises(PatchadError, match="fine-tuned cannot be cached"):
        FeatureCache().open(paths(pyramids), "key", detector.encoder, (96, 96))


def test_sliding_patches_have_nothing_to_cache():
    with pytest.raises(PatchadError, match="mode sliding has no features to cache"):
        Learning(PatchModel(EfficientNetLite0(weights="none"), mode="sliding").encoder, cache=FeatureCache())
