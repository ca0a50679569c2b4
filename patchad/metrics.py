"""Detection and segmentation metrics, on torchmetrics. The one place that squashes scores."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from rich.progress import track
from scipy.ndimage import label as label_components
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision, BinaryPrecisionRecallCurve
from torchmetrics.utilities import dim_zero_cat

from patchad.masks import EIGHT_NEIGHBOURS
from patchad.types import ImageBatch, Prediction, given

COMBINED = "combined"
OUTSIDE = 2
"""Label of pixels that are not judged, beside 0 and 1."""
NO_DEFECT = -1
"""Number of the defect type of normal images."""


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

    def update(
        self,
        maps: Float[Tensor, "batch height width"],
        masks: Bool[Tensor, "batch height width"],
        judged: Bool[Tensor, "batch height width"] | None = None,
    ) -> None:
        """Takes in maps (any finite numbers, read as float32), their masks, and which pixels count (by default all)."""
        for number, mask in enumerate(masks):
            counted = slice(None) if judged is None else judged[number].flatten()
            # flat float32, like the empty state that torchmetrics makes up for a process without images
            self.scores.append(maps[number].flatten()[counted].float())
            self.weights.append(component_weights(mask).to(maps.device)[counted])

    def compute(self) -> Tensor:
        """PRO in [0, 1]; nan without a defect pixel or without a defect-free one."""
        return self.area(*self.curve())

    def curve(self) -> tuple[Float[Tensor, " thresholds"], Float[Tensor, " thresholds"]]:
        """False-positive rate and mean overlap with the defects at each threshold, by falling threshold."""
        scores, order = dim_zero_cat(self.scores).sort(descending=True)
        scores, weights = scores.cpu(), dim_zero_cat(self.weights)[order].cpu().double()  # GPUs sum in any order
        last_of_ties = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])
        overlap = weights.cumsum(0)[last_of_ties] / weights.sum()  # the weights sum to the number of components
        false_positives = (weights == 0).cumsum(0)[last_of_ties]
        return false_positives.double() / false_positives[-1], overlap

    def area(self, rate: Float[Tensor, " thresholds"], overlap: Float[Tensor, " thresholds"]) -> Tensor:
        """PRO of a curve."""
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


class Curve(NamedTuple):
    """A curve to be drawn.

    Attributes:
        x: rising, `[points]`.
        y: `[points]`.
    """

    x: np.ndarray
    y: np.ndarray


def thinned(x: Float[Tensor, " points"], y: Float[Tensor, " points"], limit: float, points: int = 200) -> Curve:
    """A curve from (0, 0) up to x = limit by few points, which are the closer together the smaller x is.

    Args:
        x: rising.
        y: at each of them.
        limit: the last x.
        points: how many are left.

    Example:
        >>> thinned(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.25, 0.75, 1.0]), limit=1.0, points=3)
        Curve(x=array([0.  , 0.25, 1.  ]), y=array([0. , 0.5, 1. ]))
    """
    places = limit * np.linspace(0, 1, points) ** 2
    return Curve(places, np.append(0.0, np.interp(places[1:], x.numpy(), y.numpy())))


def exact_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a rate, of some among all (Clopper and Pearson, Biometrika 1934)."""
    interval = binomtest(count, total).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


class Elements(NamedTuple):
    """Images or pixels, by falling score.

    Attributes:
        score: squashed, float64 `[elements]`.
        label: 1 on defects, 0 elsewhere, `[elements]`.
        defect: number of the defect type of the element's image, `NO_DEFECT` on normal images, `[elements]`.
    """

    score: Tensor
    label: Tensor
    defect: Tensor


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
        progress: whether `compute` shows a bar.

    Attributes:
        overlap_curve: of the last `compute`: the mean overlap with the defects over the false-positive rate of pixels,
            up to the limit of PRO; None where there is none.
    """

    full_state_update = False
    rows: Tensor
    overlap_curve: Curve | None = None

    def __init__(
        self, sides: Sequence[int], full: bool = False, defects: Sequence[str] = (), progress: bool = False
    ) -> None:
        super().__init__()
        self.names = (COMBINED, *sides)
        self.full, self.defects, self.progress = full, list(defects), progress
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
        labelled = batch.label >= 0
        numbers = [self.defects.index(name) if name in self.defects else NO_DEFECT for name in batch.defect]
        scores: Mapping[str | int, Tensor] = {COMBINED: prediction.score, **prediction.side_scores}
        mask = batch.mask.to(torch.uint8)
        mask = mask if given(batch.judged) is None else mask.masked_fill(~batch.judged, OUTSIDE)
        states = {"label": batch.label, "has_mask": batch.has_mask, "mask": mask}
        states |= {"anomalous": prediction.anomalous, "defect": torch.tensor(numbers, device=labelled.device)}
        states |= {f"score_{name}": scores[name] for name in self.names}
        states |= {f"map_{name}": maps[name] for name in self.names}
        for state, values in states.items():
            getattr(self, state).append(values[labelled].flatten().to(self.types[state]))
        self.rows.fill_(batch.mask.shape[1])

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers the states of all processes; one that saw no image takes part with empty states of their types."""
        for state, dtype in self.types.items():
            if len(getattr(self, state)) == 0:
                setattr(self, state, [torch.empty(0, dtype=dtype, device=self.device)])
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The figures by name, such as `detection_auroc`, `segmentation_auroc_side_16` and `pro`."""
        if len(self._state("label")) == 0:
            return {}
        steps = 2 * len(self.names) + (2 * (2 + len(self.defects)) + 2 if self.full else 0)
        parts = track(self._parts(), "Computing metrics", steps, disable=not self.progress, transient=True)
        return {name: value for part in parts for name, value in part.items()}

    def _parts(self) -> Iterator[dict[str, Tensor]]:
        for name in self.names:
            ending = "" if name == COMBINED else f"_side_{name}"
            for kind, read in (("detection", self._images), ("segmentation", self._pixels)):
                elements = read(name)
                yield two_class(f"{kind}_auroc{ending}", BinaryAUROC, elements)
                if self.full and name == COMBINED:
                    yield from self._further(kind, elements)
        if self.full:
            yield self._per_region_overlap()
            yield self._at_threshold()

    def _further(self, kind: str, elements: Elements) -> Iterator[dict[str, Tensor]]:
        yield two_class(f"{kind}_average_precision", BinaryAveragePrecision, elements)
        yield two_class(f"{kind}_f1_max", BinaryF1Max, elements)
        for number, defect in enumerate(self.defects):
            chosen = (elements.defect == NO_DEFECT) | (elements.defect == number)
            part = Elements(*(values[chosen] for values in elements))
            yield two_class(f"{kind}_auroc_defect_{defect}", BinaryAUROC, part)

    def _state(self, name: str) -> Tensor:
        return dim_zero_cat(getattr(self, name))

    def _planes(self, state: str) -> Tensor:
        """The maps or masks of the images whose mask is known, `[images, height, width]`."""
        masked = self._state("has_mask").bool()
        return self._state(state).view(len(masked), int(self.rows), -1)[masked]

    def _images(self, name: str | int) -> Elements:
        return in_order(self._state(f"score_{name}"), self._state("label"), self._state("defect"))

    def _pixels(self, name: str | int) -> Elements:
        maps = self._planes(f"map_{name}")
        defect = self._state("defect")[self._state("has_mask").bool()].to(torch.int16)
        defects = defect[:, None].expand(len(maps), maps[0].numel() if len(maps) else 0)
        pixels = (maps.flatten(), self._planes("mask").flatten(), defects.flatten())
        judged = pixels[1] != OUTSIDE
        return in_order(*(pixels if judged.all() else (values[judged] for values in pixels)))

    def _per_region_overlap(self) -> dict[str, Tensor]:
        maps, masks = self._planes(f"map_{COMBINED}"), self._planes("mask")
        if not (masks == 0).any() or not (masks == 1).any():
            return {}
        metric = PerRegionOverlap(sync_on_compute=False)  # these maps are gathered from all processes already
        metric.update(maps, masks == 1, masks != OUTSIDE)
        rate, overlap = metric.curve()
        self.overlap_curve = thinned(rate, overlap, metric.limit)
        return {"pro": metric.area(rate, overlap)}

    def _at_threshold(self) -> dict[str, Tensor]:
        flagged, normal = self._state("anomalous").bool(), self._state("label") == 0
        figures: dict[str, Tensor] = {}
        if normal.any():
            count, total = int((flagged & normal).sum()), int(normal.sum())
            low, high = exact_interval(count, total)
            rates = {"": count / total, "_low": low, "_high": high}
            for ending, rate in rates.items():
                figures[f"false_positive_rate{ending}"] = torch.tensor(rate, device=normal.device)
        if not normal.all():
            figures["recall"] = flagged[~normal].double().mean()
        return figures


def in_order(score: Tensor, label: Tensor, defect: Tensor) -> Elements:
    """Squashed elements, sorted once, so that the metrics that sort them again have little to do."""
    score, order = squash(score).sort(descending=True)
    return Elements(score, label[order], defect[order])


def two_class(name: str, kind: type[Metric], elements: Elements) -> dict[str, Tensor]:
    """The metric under its name, or nothing where a class is missing (torchmetrics would say 0).

    Args:
        name: key of the result.
        kind: class of the metric; it does not sync, because these elements are those of all processes already.
        elements: images or pixels.
    """
    if len(elements.label) == 0 or elements.label.min() == elements.label.max():
        return {}
    metric = kind(thresholds=None, validate_args=False, sync_on_compute=False)
    metric.update(elements.score, elements.label)
    return {name: metric.compute()}
