import os
import socket

import numpy as np
import pytest
import torch
from skimage.measure import label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import multiprocessing

from patchad.metrics import AnomalyMetrics, PerRegionOverlap, area_up_to, false_positive_rate_interval, squash
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
        number=torch.arange(count),
        label=truth.long(),
        mask=mask,
        has_mask=torch.ones(count, dtype=torch.bool),
        defect=defect,
        path=defect,
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


def slow_pro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Threshold by threshold, region by region."""
    regions = [(image, label(mask, connectivity=2)) for image, mask in enumerate(masks)]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        shares = [found[i][r == n].mean() for i, r in regions for n in range(1, r.max() + 1)]
        rates.append(found[~masks].mean())
        overlaps.append(float(np.mean(shares)))
    grid = np.linspace(0, limit, 200_001)
    return float(np.trapezoid(np.interp(grid, rates, overlaps), grid) / limit)


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
        assert found[f"detection_auroc_{name}"].item() == pytest.approx(expected, abs=1e-6)
        expected = roc_auc_score(batch.mask[chosen].flatten(), maps["combined"][chosen].flatten())
        assert found[f"segmentation_auroc_{name}"].item() == pytest.approx(expected, abs=1e-6)


def test_pro_equals_a_loop_over_thresholds_and_regions():
    _, batch, maps = evaluation()
    expected = slow_pro(maps["combined"].numpy(), batch.mask.numpy())
    assert measured([slice(0, 7), slice(7, 13)])["pro"].item() == pytest.approx(expected, abs=1e-4)


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


def test_images_of_unknown_label_are_left_out():
    prediction, batch, maps = evaluation()
    metrics = AnomalyMetrics(SIDES, defects=DEFECTS)
    unknown = batch.label.clone()
    unknown[5:] = -1
    metrics.update(prediction, batch._replace(label=unknown), maps)
    expected = measured([slice(0, 5)], full=False)
    assert {name: value.item() for name, value in metrics.compute().items()} == {
        name: value.item() for name, value in expected.items()
    }


def test_verdicts_are_counted_over_normal_and_defective_images():
    prediction, batch, _ = evaluation()
    found, normal = measured([slice(0, 13)]), batch.label == 0
    assert found["false_positive_rate"].item() == pytest.approx(prediction.anomalous[normal].float().mean().item())
    assert found["recall"].item() == pytest.approx(prediction.anomalous[~normal].float().mean().item())
    assert found["false_positive_rate_low"] <= found["false_positive_rate"] <= found["false_positive_rate_high"]


def test_no_false_positive_among_n_gives_the_closed_form_upper_bound():
    low, high = false_positive_rate_interval(0, 20)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_squashing_keeps_the_order_of_close_distances():
    scores = torch.linspace(20, 60, 100_000)
    assert (squash(scores).diff() > 0).all() and squash(scores).max() < 1


def on_a_rank(rank: int, port: int, queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = measured([slice(0, 9)] if rank == 0 else [slice(9, 13)])
    queue.put({name: value.item() for name, value in found.items()})
    torch.distributed.destroy_process_group()


def test_two_processes_with_unequal_shares_find_what_one_finds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=on_a_rank, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    expected = measured([slice(0, 13)])
    for one in found:
        assert one == pytest.approx({name: value.item() for name, value in expected.items()}, abs=1e-6)
