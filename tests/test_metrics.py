import socket
from datetime import timedelta

import numpy as np
import pytest
import torch
from skimage.measure import label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import multiprocessing

from patchad.metrics import (
    AnomalyMetrics,
    BinaryF1Max,
    PerRegionOverlap,
    area_up_to,
    exact_interval,
    squash,
)
from patchad.types import ImageBatch, Prediction

SIDES = (64, 16)
DEFECTS = ["crack", "stain"]


def evaluation(count: int = 13) -> tuple[Prediction, ImageBatch, dict]:
    """Distances from 20 to 60 with ties, on images of 24 x 24 pixels; a third is normal."""
    random = torch.Generator().manual_seed(0)
    names = ["good", *DEFECTS]
    defect = [names[number % 3] for number in range(count)]
    truth = torch.tensor([name != "good" for name in defect])
    mask = torch.zeros(count, 24, 24, dtype=torch.bool)
    mask[truth, 3:9, 4:15] = True
    mask[truth, 15:18, 2:5] = True

    def draw(*shape: int) -> torch.Tensor:
        return (20 + 40 * torch.rand(*shape, generator=random)).round()

    scores = {name: draw(count) + 6 * truth for name in ("combined", *SIDES)}
    maps = {name: draw(count, 24, 24) + 9 * mask for name in ("combined", *SIDES)}
    prediction = Prediction(
        scores["combined"],
        scores["combined"] > 40,
        maps["combined"],
        {side: scores[side] for side in SIDES},
        {side: maps[side] for side in SIDES},
    )
    batch = ImageBatch(
        image=torch.zeros(count, 3, 24, 24),
        content=torch.full((count, 2), 24),
        size=torch.full((count, 2), 24),
        gain=torch.ones(count),
        number=torch.arange(count),
        thing=torch.full((count,), -1),
        label=truth.long(),
        mask=mask,
        has_mask=torch.ones(count, dtype=torch.bool),
        defect=defect,
        path=defect,
        digest=torch.arange(count),
        error=[""] * count,
        doubts=[""] * count,
    )
    return prediction, batch, maps


def part(value, chosen: slice):
    if isinstance(value, dict):
        return {name: one[chosen] for name, one in value.items()}
    return value[chosen]


def measured(parts: list[slice], full: bool = True) -> dict[str, torch.Tensor]:
    prediction, batch, maps = evaluation()
    metrics = AnomalyMetrics(SIDES, full=full, defects=DEFECTS)
    for chosen in parts:
        metrics.update(
            Prediction(*(part(value, chosen) for value in prediction)),
            ImageBatch(*(part(value, chosen) for value in batch)),
            part(maps, chosen),
        )
    return metrics.compute()


def values(found: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in found.items()}


def slow_pro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3, judged: np.ndarray | bool = True) -> float:
    """Threshold by threshold, region by region."""
    regions = [(image, label(mask, connectivity=2)) for image, mask in enumerate(masks)]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        shares = [found[i][r == n].mean() for i, r in regions for n in range(1, r.max() + 1)]
        rates.append(found[~masks & judged].mean())
        overlaps.append(float(np.mean(shares)))
    area = 0.0
    for left, right, low, high in zip(rates, rates[1:], overlaps, overlaps[1:], strict=False):
        if left < limit and right > left:
            end = min(right, limit)
            middle = low + (high - low) * (end - left) / (right - left)
            area += (end - left) * (low + middle) / 2
    return area / limit


def test_auroc_average_precision_and_f1_equal_scikit_learns_on_the_distances_themselves():
    prediction, batch, maps = evaluation()
    found = measured([slice(0, 4), slice(4, 13)])
    data = {
        "detection": (batch.label.numpy(), prediction.score.numpy()),
        "segmentation": (batch.mask.flatten().numpy(), maps["combined"].flatten().numpy()),
    }
    for kind, (truth, score) in data.items():
        precision, recall, _ = precision_recall_curve(truth, score)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        assert found[f"{kind}_auroc"].item() == pytest.approx(roc_auc_score(truth, score), abs=1e-6)
        assert found[f"{kind}_average_precision"].item() == pytest.approx(
            average_precision_score(truth, score), abs=1e-6
        )
        assert found[f"{kind}_f1_max"].item() == pytest.approx(f1.max(), abs=1e-6)


def test_each_side_and_each_defect_type_has_its_own_auroc():
    prediction, batch, maps = evaluation()
    found = measured([slice(0, 13)])
    for side in SIDES:
        expected = roc_auc_score(batch.label, prediction.side_scores[side])
        assert found[f"detection_auroc_side_{side}"].item() == pytest.approx(expected, abs=1e-6)
        expected = roc_auc_score(batch.mask.flatten(), maps[side].flatten())
        assert found[f"segmentation_auroc_side_{side}"].item() == pytest.approx(expected, abs=1e-6)
    for name in DEFECTS:
        chosen = torch.tensor([defect in ("good", name) for defect in batch.defect])
        expected = roc_auc_score(batch.label[chosen], prediction.score[chosen])
        assert found[f"detection_auroc_defect_{name}"].item() == pytest.approx(expected, abs=1e-6)
        expected = roc_auc_score(batch.mask[chosen].flatten(), maps["combined"][chosen].flatten())
        assert found[f"segmentation_auroc_defect_{name}"].item() == pytest.approx(expected, abs=1e-6)


def test_pro_equals_a_loop_over_thresholds_and_regions():
    _, batch, maps = evaluation()
    expected = slow_pro(maps["combined"].numpy(), batch.mask.numpy())
    assert measured([slice(0, 7), slice(7, 13)])["pro"].item() == pytest.approx(expected, abs=1e-9)


def test_a_diagonal_touch_makes_one_region():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 3, 3] = True
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 0] = 2.0  # half of the first of two regions, and no false positive
    maps[0, 2, 2] = 1.0
    metric = PerRegionOverlap(limit=1 / 13)  # up to the first false positive among 13 defect-free pixels
    metric.update(maps, mask)
    assert metric.compute().item() == pytest.approx(0.25)


def test_a_perfect_map_has_pro_1_and_a_constant_map_half_the_limit():
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 2:4, 2:6] = True
    for maps, expected in ((mask.float(), 1.0), (torch.ones(2, 8, 8), 0.15)):
        metric = PerRegionOverlap()
        metric.update(maps, mask)
        assert metric.compute().item() == pytest.approx(expected, abs=1e-6)


def test_the_area_under_a_curve_is_cut_between_its_points():
    area = area_up_to(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0]), 0.25)
    assert area.item() == pytest.approx(0.5 * 0.25 * 0.5)


def test_pro_without_a_defect_or_without_a_defect_free_pixel_is_nan():
    for masks in (torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)):
        metric = PerRegionOverlap()
        metric.update(torch.rand(1, 4, 4), masks)
        assert metric.compute().isnan()


def test_f1_max_is_the_best_of_all_thresholds():
    random = np.random.default_rng(0)
    score, truth = random.integers(0, 20, 200) / 20, random.random(200) < 0.3
    found = [score >= threshold for threshold in np.unique(score)]
    best = max(2 * (one & truth).sum() / (one.sum() + truth.sum()) for one in found)
    metric = BinaryF1Max()
    metric.update(torch.from_numpy(score), torch.from_numpy(truth).long())
    assert metric.compute().item() == pytest.approx(best, abs=1e-6)


def test_no_metric_of_ranks_changes_when_distances_are_squared():
    prediction, batch, maps = evaluation()
    squared = prediction._replace(
        score=prediction.score**2, side_scores={side: one**2 for side, one in prediction.side_scores.items()}
    )
    metrics = AnomalyMetrics(SIDES, full=True, defects=DEFECTS)
    metrics.update(squared, batch, {name: one**2 for name, one in maps.items()})
    assert values(metrics.compute()) == values(measured([slice(0, 13)]))


def test_validation_measures_the_aurocs_alone():
    kinds = ("detection_auroc", "segmentation_auroc")
    expected = {f"{kind}{ending}" for kind in kinds for ending in ("", "_side_64", "_side_16")}
    assert set(measured([slice(0, 13)], full=False)) == expected


def test_reset_forgets_what_was_measured():
    prediction, batch, maps = evaluation()
    metrics = AnomalyMetrics(SIDES, defects=DEFECTS)
    metrics.update(prediction, batch._replace(label=1 - batch.label, mask=~batch.mask), maps)
    metrics.compute()
    metrics.reset()
    metrics.update(prediction, batch, maps)
    assert values(metrics.compute()) == values(measured([slice(0, 13)], full=False))


def test_a_figure_without_both_classes_is_left_out():
    prediction, batch, maps = evaluation()
    metrics = AnomalyMetrics(SIDES, full=True, defects=DEFECTS)
    normal = torch.zeros_like(batch.label)
    metrics.update(prediction, batch._replace(label=normal, mask=torch.zeros_like(batch.mask)), maps)
    found = metrics.compute()
    assert set(found) == {"false_positive_rate", "false_positive_rate_low", "false_positive_rate_high"}


def test_images_without_a_mask_count_for_detection_alone():
    prediction, batch, maps = evaluation()
    metrics = AnomalyMetrics(SIDES, full=True, defects=DEFECTS)
    metrics.update(prediction, batch._replace(has_mask=batch.label == 0), maps)
    found = metrics.compute()
    assert "detection_auroc" in found
    assert not [name for name in found if name.startswith("segmentation") or name == "pro"]


def test_pixels_of_defective_images_without_a_mask_are_left_out():
    prediction, batch, maps = evaluation()
    kept = torch.arange(13) != 4
    metrics = AnomalyMetrics(SIDES, full=True, defects=DEFECTS)
    metrics.update(prediction, batch._replace(has_mask=kept, mask=batch.mask & kept[:, None, None]), maps)
    found = metrics.compute()
    expected = roc_auc_score(batch.mask[kept].flatten(), maps["combined"][kept].flatten())
    assert found["segmentation_auroc"].item() == pytest.approx(expected, abs=1e-6)
    assert found["pro"].item() == pytest.approx(slow_pro(maps["combined"][kept].numpy(), batch.mask[kept].numpy()))
    assert found["detection_auroc"].item() == pytest.approx(roc_auc_score(batch.label, prediction.score), abs=1e-6)


def test_images_of_unknown_label_alone_give_no_figure():
    prediction, batch, maps = evaluation()
    metrics = AnomalyMetrics(SIDES, full=True, defects=DEFECTS)
    metrics.update(prediction, batch._replace(label=torch.full_like(batch.label, -1)), maps)
    assert metrics.compute() == {}


def test_images_of_unknown_label_are_left_out():
    prediction, batch, maps = evaluation()
    metrics = AnomalyMetrics(SIDES, defects=DEFECTS)
    unknown = batch.label.clone()
    unknown[5:] = -1
    metrics.update(prediction, batch._replace(label=unknown), maps)
    expected = measured([slice(0, 5)], full=False)
    assert values(metrics.compute()) == values(expected)


def test_verdicts_are_counted_over_normal_and_defective_images():
    prediction, batch, _ = evaluation()
    found, normal = measured([slice(0, 13)]), batch.label == 0
    assert found["false_positive_rate"].item() == pytest.approx(prediction.anomalous[normal].float().mean().item())
    assert found["recall"].item() == pytest.approx(prediction.anomalous[~normal].float().mean().item())
    assert found["false_positive_rate_low"] <= found["false_positive_rate"] <= found["false_positive_rate_high"]


def test_no_false_positive_among_n_gives_the_closed_form_upper_bound():
    low, high = exact_interval(0, 20)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 20))


@pytest.mark.parametrize("distance", [0.0, 1.0, 20.0, 60.0, 1e4])
def test_squashing_keeps_neighbouring_float32_distances_apart(distance):
    smaller = torch.tensor(distance)
    larger = torch.nextafter(smaller, torch.tensor(torch.inf))
    assert 0 <= squash(smaller) < squash(larger) < 1


# Images of two processes: shares of 2 and 11, the first without a stain; all images on one of the two.
SHARES = {"unequal": (slice(0, 2), slice(2, 13)), "one empty": (slice(0, 13), None)}


def overlap(parts: list[slice]) -> dict[str, torch.Tensor]:
    _, batch, maps = evaluation()
    metric = PerRegionOverlap()
    for chosen in parts:
        metric.update(maps["combined"][chosen], batch.mask[chosen])
    return {"pro": metric.compute()}


def on_a_rank(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    limit = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=limit)
    for name, shares in SHARES.items():
        parts = [] if shares[rank] is None else [shares[rank]]
        queue.put((name, values(measured(parts)), values(overlap(parts))))
    torch.distributed.destroy_process_group()


def test_two_processes_with_unequal_or_empty_shares_find_what_one_finds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=on_a_rank, args=(rank, port, queue), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=120) for _ in range(2 * len(SHARES))]
    for worker in workers:
        worker.join()
    assert sorted(name for name, _, _ in found) == sorted([*SHARES, *SHARES])
    expected, region = values(measured([slice(0, 13)])), values(overlap([slice(0, 13)]))
    for _, figures, pro in found:
        assert figures == pytest.approx(expected, abs=1e-6)
        assert pro == pytest.approx(region, abs=1e-9)


def test_figures_of_pixels_are_of_the_region_alone():
    prediction, batch, maps = evaluation()
    judged = torch.zeros_like(batch.mask)
    judged[:, 4:20, 3:14] = True  # of both defects a part
    judged[0] = True
    metrics = AnomalyMetrics(SIDES, full=True, defects=DEFECTS)
    metrics.update(prediction, batch._replace(judged=judged), maps)
    found, where = values(metrics.compute()), judged.numpy()
    inside, truth = batch.mask.numpy()[where], maps["combined"].numpy()[where]
    assert found["segmentation_auroc"] == pytest.approx(roc_auc_score(inside, truth), abs=1e-6)
    assert found["segmentation_average_precision"] == pytest.approx(average_precision_score(inside, truth), abs=1e-6)
    side = roc_auc_score(inside, maps[16].numpy()[where])
    assert found["segmentation_auroc_side_16"] == pytest.approx(side, abs=1e-6)
    expected = slow_pro(maps["combined"].numpy(), (batch.mask & judged).numpy(), judged=where)
    assert found["pro"] == pytest.approx(expected, abs=1e-6)
    assert found["detection_auroc"] == values(measured([slice(None)]))["detection_auroc"]
    other = {name: torch.where(judged, one, 99.0) for name, one in maps.items()}
    metrics.reset()
    metrics.update(prediction, batch._replace(judged=judged, mask=batch.mask & judged), other)
    assert values(metrics.compute()) == found
