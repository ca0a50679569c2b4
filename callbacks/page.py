"""What a test found -> one HTML file with everything inside it, which reads nothing from anywhere else."""

import base64
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from patchad.callbacks.summary import VERDICTS, confusion, figures
from patchad.callbacks.thumbnails import Thumbnails
from patchad.conformal import Limits
from patchad.drawing import FOUND, RAMP, TRUTH
from patchad.results import Row

COLUMNS = ("path", "defect", "label", "score", "p_value", "verdict", "correct", "note", "area", "reason")
"""What the page's table knows of each image."""
MOST_PICTURES = 2000
"""Images whose pictures are in the page: 20 MB."""


class Findings(NamedTuple):
    """What a page tells of a test.

    Attributes:
        title: of the page.
        metrics: by name, without the stage.
        aurocs: a name, detection and segmentation AUROC (nan where there is none), of parts of the test.
        rows: of all images, failures first.
        pictures: of some of them, by path.
        limits: of the detector.
        target_fpr: the false-positive rate that was asked for.
        normals: scores of the normal images that the threshold comes from.
        overlap: points (false-positive rate of pixels, mean overlap with the defects).
        doubts: what makes the figures doubtful, as a sentence and the paths of the images that it is about.
        checkpoint: path of what was tested.
        provenance: where the figures come from, by name.
        updates: what was changed after the fit.
    """

    title: str
    metrics: Mapping[str, float]
    aurocs: Sequence[tuple[str, float, float]]
    rows: Sequence[Row]
    pictures: Mapping[str, Thumbnails]
    limits: Limits
    target_fpr: float
    normals: Sequence[float]
    overlap: Sequence[tuple[float, float]]
    doubts: Sequence[tuple[str, Sequence[str]]]
    checkpoint: str
    provenance: Mapping[str, str]
    updates: Sequence[str]


def page(findings: Findings) -> str:
    """The HTML of a test; every text is escaped."""
    environment = Environment(
        loader=PackageLoader("patchad.callbacks", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        findings=findings,
        data=page_data(findings),
        figures=figures(findings.metrics, findings.rows, findings.target_fpr),
        verdicts=VERDICTS,
        confusion=confusion(findings.rows),
        unreadable=[row.reason for row in findings.rows if row.score is None],
        pictures=min(MOST_PICTURES, len(findings.pictures)),
        ramp=[rgb(colour) for colour in RAMP.tolist()],
        found=rgb(FOUND),
        truth=rgb(TRUTH),
    )


def page_data(findings: Findings) -> dict[str, Any]:
    """What the page's program reads: rows as lists of `COLUMNS`, and their pictures beside them."""
    shown = set([row.path for row in findings.rows if row.path in findings.pictures][:MOST_PICTURES])
    folder = common_folder(row.path for row in findings.rows)
    return {
        "folder": folder,
        "columns": COLUMNS,
        "rows": [cells(row, folder) for row in findings.rows],
        "pictures": [encoded(findings.pictures[row.path]) if row.path in shown else None for row in findings.rows],
        "threshold": findings.limits.threshold,
        "review": findings.limits.review_threshold,
        "normals": np.sort(findings.normals).tolist(),
        "overlap": findings.overlap,
        "command": ["patchad threshold", f"--ckpt_path {shlex.quote(findings.checkpoint)}"],
    }


def cells(row: Row, folder: str) -> list[Any]:
    """A row as a list of `COLUMNS`; its path is below the folder that all have in common."""
    return [getattr(row._replace(path=row.path.removeprefix(folder)), name) for name in COLUMNS]


def encoded(pictures: Thumbnails) -> list[str | None]:
    """Pictures as base64, in the order of `Thumbnails`."""
    return [None if file is None else base64.b64encode(file).decode() for file in pictures]


def common_folder(paths: Iterable[str]) -> str:
    """What all paths begin with, up to and with the last separator.

    Example:
        >>> common_folder(["parts/test/a/0.png", "parts/test/b/0.png"]), common_folder(["/a.png", "b.png"])
        ('parts/test/', '')
    """
    common = os.path.commonprefix(list(paths))  # noqa: RUF071 - it is cut at a separator
    return common[: common.rfind(os.sep) + 1]


def rgb(colour: Sequence[int | float]) -> str:
    """A colour as CSS has it.

    Example:
        >>> rgb((255, 0, 255))
        'rgb(255 0 255)'
    """
    return f"rgb({' '.join(f'{value:.0f}' for value in colour)})"
