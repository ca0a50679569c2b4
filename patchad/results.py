"""What is said of each image: one row, in the same words wherever it is scored. No torch is needed."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from patchad.conformal import Limits, Verdict
from patchad.files import write_whole

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What begins a cell that a spreadsheet runs."""
Label = Literal["normal", "anomalous", ""]
"""What is true of an image; empty where it is not known."""


class Scored(NamedTuple):
    """What a detector says about one image.

    Attributes:
        score: anomaly score.
        anomalous: whether `score > threshold`.
        verdict: `anomalous`, `normal`, or `review` where a band between them is asked for.
        p_value: share of the normal images of the fit, this one counted among them, that score as high or higher.
        map: anomaly map at the pixels of the image that was given, float32 `[height, width]`.
    """

    score: float
    anomalous: bool
    verdict: Verdict
    p_value: float
    map: np.ndarray


class Source(NamedTuple):
    """What scored an image, and when.

    Attributes:
        model: checksum of the checkpoint that it was fitted into; empty where there is none.
        version: of patchad.
        time: at which scoring began, as ISO 8601 with the zone.
    """

    model: str
    version: str
    time: str


class Row(NamedTuple):
    """One image of a test or of a prediction; by default one that could not be read, and has no numbers.

    Attributes:
        path: of the file.
        label: `normal` or `anomalous`; empty where it is not known.
        defect: the defect type, where it is known.
        score: anomaly score.
        p_value: see `Scored`.
        verdict: `anomalous`, `review`, `normal` or `unreadable`.
        correct: `right` or `wrong`; empty where the label is not known, or the verdict is `review`.
        threshold: scores above it are anomalous.
        map_threshold: pixels above it are outlined.
        area: how many pixels of the file lie above it.
        left: column of the box around these pixels, as are the three that follow (rows and columns, the last two just
            behind the box); None where there is no such pixel.
        top: its first row.
        right: behind its last column.
        bottom: behind its last row.
        note: `score only` where the image is anomalous and nothing is outlined, `map only` where it is the reverse.
        model: checksum of the checkpoint.
        version: of patchad.
        time: at which scoring began.
        reason: why there is no score.
    """

    path: str
    label: Label = ""
    defect: str = ""
    score: float | None = None
    p_value: float | None = None
    verdict: Verdict | Literal["unreadable"] = "unreadable"
    correct: Literal["right", "wrong", ""] = ""
    threshold: float = math.inf
    map_threshold: float = math.inf
    area: int | None = None
    left: int | None = None
    top: int | None = None
    right: int | None = None
    bottom: int | None = None
    note: Literal["score only", "map only", ""] = ""
    model: str = ""
    version: str = ""
    time: str = ""
    reason: str = ""

    @property
    def order(self) -> tuple[int, float, str]:
        """Failures first, the worst sooner: what could not be read, missed defects, false alarms; then the rest.

        Where labels are not known, the highest scores come first.
        """
        if self.score is None:
            return 0, 0.0, self.path
        if self.correct == "wrong" and self.label == "anomalous":
            return 1, self.score, self.path
        return 2 if self.correct == "wrong" else 3, -self.score, self.path


def row_of(
    path: str,
    scored: Scored,
    limits: Limits,
    source: Source,
    label: Label = "",
    defect: str = "",
    region: np.ndarray | None = None,
) -> Row:
    """The row of an image.

    Args:
        path: of its file.
        scored: what a detector says about it.
        limits: of that detector.
        source: what scored it, and when.
        label: what is true of it.
        defect: its defect type.
        region: where its map lies above the threshold, bool `[height, width]`; by default that is looked up.
    """
    region = scored.map > limits.map_threshold if region is None else region
    area, (left, top, right, bottom) = int(np.count_nonzero(region)), box(region)
    known = label and scored.verdict != "review"
    return Row(
        path=path,
        label=label,
        defect=defect,
        score=scored.score,
        p_value=scored.p_value,
        verdict=scored.verdict,
        correct=("right" if scored.verdict == label else "wrong") if known else "",
        threshold=limits.threshold,
        map_threshold=limits.map_threshold,
        area=area,
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        note="" if scored.anomalous == bool(area) else "score only" if scored.anomalous else "map only",
        **source._asdict(),
    )


def unreadable(path: str, reason: str, limits: Limits, source: Source, defect: str = "") -> Row:
    """The row of an image that has no score, for a reason."""
    return Row(
        path=path,
        defect=defect,
        threshold=limits.threshold,
        map_threshold=limits.map_threshold,
        reason=reason,
        **source._asdict(),
    )


def box(region: np.ndarray) -> tuple[int, int, int, int] | tuple[None, None, None, None]:
    """Left, top, right and bottom of a region, bool `[height, width]`, the last two just behind it.

    Example:
        >>> box(np.eye(5, dtype=bool)[:3])
        (0, 0, 3, 3)
    """
    if not region.any():
        return None, None, None, None
    rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV, failures first."""
    ordered = sorted(rows, key=lambda row: row.order)
    write_whole(path, lambda part: append_rows(part, ordered))


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a CSV, which begins with the names of the columns."""
    begins = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:  # any name of a file
        if begins:
            file.write(as_csv(Row._fields))
        file.writelines(as_csv(cells(row)) for row in rows)


def as_csv(values: Iterable[str]) -> str:
    r"""One line of CSV.

    Example:
        >>> as_csv(["a.png", "", "a, b"])
        'a.png,,"a, b"\r\n'
    """
    line = io.StringIO(newline="")
    csv.writer(line).writerow(values)
    return line.getvalue()


def cells(row: Iterable[str | int | float | None]) -> list[str]:
    """A row as text; nothing where there is no number."""
    return ["" if value is None else cell(value) if isinstance(value, str) else repr(value) for value in row]


def cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: an apostrophe stands before what would begin one.

    Source: OWASP, CSV Injection, https://owasp.org/www-community/attacks/CSV_Injection

    Example:
        >>> cell("=cmd.png"), cell("images/a.png")
        ("'=cmd.png", 'images/a.png')
    """
    return f"'{text}" if text.startswith(FORMULA) else text


def cell_text(cell: str) -> str:
    """The text of a cell that `cell` gave.

    Example:
        >>> cell_text("'=cmd.png"), cell_text("images/a.png")
        ('=cmd.png', 'images/a.png')
    """
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def as_json(row: Row) -> str:
    """A row as one line of JSON, by the names of the columns."""
    return json.dumps(row._asdict())


def installed_version() -> str:
    """The version of patchad, by whichever of its two distributions is there."""
    try:
        return version("patchad")
    except PackageNotFoundError:
        return version("patchad-runtime")
