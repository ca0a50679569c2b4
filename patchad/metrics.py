"""Detection and segmentation metrics, on torchmetrics. The one place that squashes scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import label as label_components
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision, BinaryPrecisionRecallCurve
from torchmetrics.utilities import dim_zero_cat

from patchad.types import ImageBatch, Prediction

COMBINED = "combined"
EIGHT_NEIGHBOURS = np.ones((3, 3))


def squash(score: Tensor) -> Tensor:
    """Brings distances >= 0 into [0, 1) as d / (1 + d), in float64, without changing their order.

    torchmetrics passes scores outside [0, 1] through a sigmoid, update by update, which saturates on distances. In
    float64 different float32 distances stay different up to 1e8; in float32 neighbours would merge.

    Example:
        >>> squash(torch.tensor([0.0, 1.0, 3.0]))
        tensor([0.0000, 0.5000, 0.7500], dtype=torch.float64)
    """
    score = score.double()
    return score / (1 + score)


class BinaryF1Max(BinaryPrecisionRecallCurve):
    """The highest F1 = 2 precision recall / (precision + recall) over all thresholds, on torchmetrics' curve.

    Example:
        >>> metric = BinaryF1Max()
        >>> metric.update(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 1, 0, 1]))
        >>> metric.compute()
        tensor(0.8000)
    """

    def compute(self) -> Tensor:  # type: ignore[override]
        """F1 in [0, 1]; needs a positive sample."""
        precision, recall, _ = super().compute()
        return (2 * precision * recall / (precision + recall).clamp(min=1e-12)).max()


class PerRegionOverlap(Metric):
    """PRO: the share of each defect that is found, averaged over defects and over false-positive rates up to a limit.

    Defects are the 8-connected components of the masks; the false-positive rate is taken over all defect-free pixels of
    all images; the area under the curve up to the limit is divided by the limit. It is exact: every distinct score is
    a threshold.

    Source: Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 5.1.

    Args:
        limit: highest false-positive rate.
        kwargs: of torchmetrics.Metric.
    """

    full_state_update = False
    scores: list[Tensor]
    weights: list[Tensor]

    def __init__(self, limit: float = 0.3, **kwargs: bool) -> None:
        super().__init__(**kwargs)
        self.limit = limit
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("weights", default=[], dist_reduce_fx="cat")

    def update(self, maps: Float[Tensor, "batch height width"], masks: Bool[Tensor, "batch height width"]) -> None:
        """Takes in maps (any finite numbers, read as float32) and their masks."""
        # flat float32, like the empty state that torchmetrics makes up for a process without images
        self.scores.append(maps.flatten().float())
        self.weights.extend(component_weights(mask).to(maps.device) for mask in masks)

    def compute(self) -> Tensor:
        """PRO in [0, 1]; nan without a defect pixel or without a defect-free one."""
        scores, order = dim_zero_cat(self.scores).sort(descending=True)
        weights = dim_zero_cat(self.weights)[order].double()
        last_of_ties = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])
        overlap = weights.cumsum(0)[last_of_ties] / weights.sum()  # the weights sum to the number of components
        false_positives = (weights == 0).cumsum(0)[last_of_ties]
        rate = false_positives.double() / false_positives[-1]
        return area_up_to(rate, overlap, self.limit) / self.limit


def component_weights(mask: Bool[Tensor, "height width"]) -> Float[Tensor, " pixels"]:
    """1 / area of its component for each defect pixel, 0 for defect-free ones."""
    components = np.zeros(mask.shape, dtype=np.int32)
    label_components(mask.cpu().numpy(), EIGHT_NEIGHBOURS, output=components)
    areas = np.bincount(components.ravel())
    weights = (1 / np.maximum(areas, 1)).astype(np.float32)
    weights[0] = 0
    return torch.from_numpy(weights[components.ravel()])


def area_up_to(x: Float[Tensor, " points"], y: Float[Tensor, " points"], limit: float) -> Tensor:
    """The area under the curve from (0, 0) through the points, up to x = limit (trapezoids, cut linearly)."""
    x, y = torch.cat([x.new_zeros(1), x]), torch.cat([y.new_zeros(1), y])
    inside = int((x <= limit).sum())
    if inside < len(x):
        share = (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
        cut = y[inside - 1] + share * (y[inside] - y[inside - 1])
        x, y = torch.cat([x[:inside], x.new_tensor([limit])]), torch.cat([y[:inside], cut[None]])
    return torch.trapezoid(y, x)


def false_positive_rate_interval(false_positives: int, normals: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of the rate of false positives among normals (Clopper and Pearson, Biometrika 1934)."""
    interval = binomtest(false_positives, normals).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


class AnomalyMetrics(Metric):
    """Every figure of an evaluation, from one copy of the scores and maps.

    `compute` gives detection (image) and segmentation (pixel) AUROC, combined and per side, and, with `full`, average
    precision, F1-max, PRO, AUROC per defect type, and the rates at the threshold. A figure that lacks one of its two
    classes is left out. Images of unknown label are left out; images whose mask is missing are left out of
    segmentation.

    Args:
        sides: sides in pixels.
        full: whether to compute more than the AUROCs.
        defects: names of the defect types, the same on all processes.
    """

    full_state_update = False
    rows: Tensor

    def __init__(self, sides: Sequence[int], full: bool = False, defects: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = (COMBINED, *sides)
        self.full, self.defects = full, list(defects)
        # Flat states, one number per image or pixel; scores as they come, which loses nothing at half of float64's size
        self.types = dict.fromkeys(("label", "defect", "anomalous", "has_mask"), torch.int64) | {"mask": torch.uint8}
        self.types |= {f"{kind}_{name}": torch.float32 for kind in ("score", "map") for name in self.names}
        for state in self.types:
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=torch.tensor(0), dist_reduce_fx="max")

    def update(self, prediction: Prediction, batch: ImageBatch, maps: Mapping[str | int, Tensor]) -> None:
        """Takes in a batch.

        Args:
            prediction: scores and verdicts.
            batch: labels and masks.
            maps: `combined` and each side's, at the size of the masks, `[batch, metric_height, metric_width]`.
        """
        known = batch.label >= 0
        numbers = [self.defects.index(name) if name in self.defects else -1 for name in batch.defect]
        scores: Mapping[str | int, Tensor] = {COMBINED: prediction.score, **prediction.side_scores}
        taken = {"label": batch.label, "has_mask": batch.has_mask, "mask": batch.mask}
        taken |= {"anomalous": prediction.anomalous, "defect": torch.tensor(numbers, device=known.device)}
        taken |= {f"score_{name}": scores[name] for name in self.names}
        taken |= {f"map_{name}": maps[name] for name in self.names}
        for state, values in taken.items():
            getattr(self, state).append(values[known].flatten().to(self.types[state]))
        self.rows.fill_(batch.mask.shape[1])

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers the states of all processes; one that saw no image takes part with empty states of their types."""
        for state, dtype in self.types.items():
            if len(getattr(self, state)) == 0:
                setattr(self, state, [torch.empty(0, dtype=dtype, device=self.device)])
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The figures by name, such as `detection_auroc`, `segmentation_auroc_side_16` and `pro`."""
        found: dict[str, Tensor] = {}
        if len(self._state("label")) == 0:
            return found
        for name in self.names:
            ending = "" if name == COMBINED else f"_side_{name}"
            found |= two_class(f"detection_auroc{ending}", BinaryAUROC, *self._images(name))
            found |= two_class(f"segmentation_auroc{ending}", BinaryAUROC, *self._pixels(name))
        if self.full:
            found |= self._further() | self._per_defect() | self._at_threshold()
        return found

    def _state(self, name: str) -> Tensor:
        return dim_zero_cat(getattr(self, name))

    def _planes(self, state: str, chosen: Tensor) -> Tensor:
        return self._state(state).view(len(chosen), int(self.rows), -1)[chosen]

    def _images(self, name: str | int = COMBINED, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        chosen = torch.ones_like(self._state("label"), dtype=torch.bool) if chosen is None else chosen
        return squash(self._state(f"score_{name}")[chosen]), self._state("label")[chosen]

    def _pixels(self, name: str | int = COMBINED, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        masked = self._state("has_mask").bool()
        chosen = masked if chosen is None else masked & chosen
        return squash(self._planes(f"map_{name}", chosen).flatten()), self._planes("mask", chosen).flatten()

    def _further(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind, data in (("detection", self._images()), ("segmentation", self._pixels())):
            found |= two_class(f"{kind}_average_precision", BinaryAveragePrecision, *data)
            found |= two_class(f"{kind}_f1_max", BinaryF1Max, *data)
        masked = self._state("has_mask").bool()
        maps, masks = self._planes(f"map_{COMBINED}", masked), self._planes("mask", masked).bool()
        return found | ({"pro": per_region_overlap(maps, masks)} if masks.any() and not masks.all() else {})

    def _per_defect(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, defect in enumerate(self.defects):
            chosen = (self._state("label") == 0) | (self._state("defect") == number)
            found |= two_class(f"detection_auroc_defect_{defect}", BinaryAUROC, *self._images(chosen=chosen))
            found |= two_class(f"segmentation_auroc_defect_{defect}", BinaryAUROC, *self._pixels(chosen=chosen))
        return found

    def _at_threshold(self) -> dict[str, Tensor]:
        flagged, normal = self._state("anomalous").bool(), self._state("label") == 0
        found: dict[str, Tensor] = {}
        if normal.any():
            count, total = int((flagged & normal).sum()), int(normal.sum())
            low, high = false_positive_rate_interval(count, total)
            rates = {"": count / total, "_low": low, "_high": high}
            for ending, rate in rates.items():
                found[f"false_positive_rate{ending}"] = torch.tensor(rate, device=normal.device)
        if not normal.all():
            found["recall"] = flagged[~normal].double().mean()
        return found


def two_class(name: str, kind: type[Metric], preds: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The metric under its name, or nothing where a class is missing (torchmetrics would say 0).

    Args:
        name: key of the result.
        kind: class of the metric; it does not sync, because these samples are those of all processes already.
        preds: squashed scores, `[samples]`.
        target: 0 or 1, `[samples]`.
    """
    if len(target) == 0 or target.min() == target.max():
        return {}
    metric = kind(thresholds=None, validate_args=False, sync_on_compute=False)
    metric.update(preds, target)
    return {name: metric.compute()}


def per_region_overlap(maps: Float[Tensor, "batch height width"], masks: Bool[Tensor, "batch height width"]) -> Tensor:
    """PRO of maps that are already gathered from all processes."""
    metric = PerRegionOverlap(sync_on_compute=False)
    metric.update(maps, masks)
    return metric.compute()
