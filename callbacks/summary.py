"""The figures of a test on a terminal: in per cent, the most important first."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap, mannwhitneyu

from patchad.metrics import exact_interval
from patchad.results import Row

VERDICTS = ("normal", "review", "anomalous")
FIGURES = {
    "detection AUROC": "detection_auroc",
    "segmentation AUROC": "segmentation_auroc",
    "per-region overlap": "pro",
    "average precision of pixels": "segmentation_average_precision",
}
"""The names of metrics, and what they are called here."""


def confusion(rows: Iterable[Row]) -> dict[str, Counter[str]]:
    """How many images of each label have which verdict.

    Args:
        rows: of a test; those without a label or a score are left out.
    """
    counts: dict[str, Counter[str]] = {"normal": Counter(), "anomalous": Counter()}
    for row in rows:
        if row.label and row.score is not None:
            counts[row.label][row.verdict] += 1
    return counts


def figures(metrics: Mapping[str, float], rows: Sequence[Row], target_fpr: float) -> dict[str, str]:
    """What a test found, by name, as it is printed.

    Args:
        metrics: by name, without the stage.
        rows: of the images.
        target_fpr: the false-positive rate that was asked for.
    """
    said = {name: percent(metrics[metric]) for name, metric in FIGURES.items() if metric in metrics}
    if "detection_auroc" in metrics and (interval := detection_interval(rows)):
        said["detection AUROC"] += f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f} %)"
    counts = confusion(rows)
    normals, defects = counts["normal"].total(), counts["anomalous"].total()
    if normals:
        said["false alarms"] = f"{rate(counts['normal']['anomalous'], normals)}, {100 * target_fpr:.3g} % asked for"
    if defects:
        said["missed defects"] = rate(counts["anomalous"]["normal"], defects)
    return said


def detection_interval(rows: Iterable[Row]) -> tuple[float, float] | None:
    """The interval of 95 % of the detection AUROC, by the percentiles of 999 resamples of the images of each label.

    Pixels of an image are no independent draws: figures of pixels have none.

    Args:
        rows: of a test.

    Returns:
        Its ends; None where a label has fewer than two images.
    """
    scores: dict[str, list[float]] = {"normal": [], "anomalous": []}
    for row in rows:
        if row.label and row.score is not None:
            scores[row.label].append(row.score)
    if min(map(len, scores.values())) < 2:
        return None
    samples, generator = (scores["normal"], scores["anomalous"]), np.random.default_rng(0)
    found = bootstrap(samples, auroc, n_resamples=999, method="percentile", vectorized=True, rng=generator)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def auroc(normal: np.ndarray, anomalous: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
    """How often an anomalous image scores above a normal one (Mann and Whitney, 1947)."""
    pairs = normal.shape[axis] * anomalous.shape[axis]
    return np.asarray(mannwhitneyu(anomalous, normal, axis=axis, method="asymptotic").statistic) / pairs


def rate(count: int, total: int) -> str:
    """How many of all, with the exact interval of 95 %.

    Example:
        >>> rate(1, 20)
        '5.0 % (0.1 to 24.9 %): 1 of 20'
    """
    low, high = exact_interval(count, total)
    return f"{percent(count / total)} ({100 * low:.1f} to {100 * high:.1f} %): {count} of {total}"


def percent(share: float) -> str:
    """A share as it is printed, never rounded up to all.

    Example:
        >>> percent(0.99999994), percent(0.9996), percent(1.0)
        ('100.0 %', '99.9 %', '100.0 %')
    """
    rounded = round(100 * share, 1)
    return f"{99.9 if rounded == 100 and share < 1 - 1e-6 else rounded:.1f} %"


def print_summary(metrics: Mapping[str, float], rows: Sequence[Row], target_fpr: float) -> None:
    """Prints the figures of a test and its confusion matrix."""
    console, table = Console(soft_wrap=True, highlight=False), Table.grid(padding=(0, 2))
    for name, value in figures(metrics, rows, target_fpr).items():
        table.add_row(name, value)
    matrix = Table("image is", *VERDICTS, box=None, padding=(0, 2, 0, 0), title="verdicts", title_justify="left")
    for label, counts in confusion(rows).items():
        matrix.add_row(label, *(str(counts[verdict]) for verdict in VERDICTS))
    console.print(table, matrix, sep="\n")
