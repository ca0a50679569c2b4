"""Rows that are written as they come, and gone on with after a crash. No torch is needed."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from patchad.errors import PatchadError
from patchad.files import naming
from patchad.results import Row, as_csv, as_json, cell_text, cells


class Format(NamedTuple):
    """How rows are written.

    Attributes:
        name: of the format.
        head: what stands above the first row.
        begins: how a file begins that has a row.
        line: a row as text.
        ending: of a line.
        paths: the paths of the rows in a text of whole lines; ValueError if they are none.
    """

    name: str
    head: str
    begins: str
    line: Callable[[Row], str]
    ending: str
    paths: Callable[[str], set[str]]


def csv_paths(text: str) -> set[str]:
    """The paths of rows as CSV.

    Raises:
        ValueError: if it has other columns.
    """
    head, *rows = [tuple(row) for row in csv.reader(io.StringIO(text, newline=""))] or [Row._fields]
    if head != Row._fields or any(len(row) != len(head) for row in rows):
        raise ValueError("other columns")
    return {cell_text(row[0]) for row in rows}


def json_paths(text: str) -> set[str]:
    """The paths of rows as lines of JSON.

    Raises:
        ValueError: if it has other names.
    """
    rows = [json.loads(line) for line in text.splitlines()]
    if any(not isinstance(row, dict) or tuple(row) != Row._fields for row in rows):
        raise ValueError("other names")
    return {row["path"] for row in rows}


HEAD = as_csv(Row._fields)
FORMATS = {
    "csv": Format("csv", HEAD, HEAD, lambda row: as_csv(cells(row)), "\r\n", csv_paths),
    "jsonl": Format("jsonl", "", '{"path": "', lambda row: f"{as_json(row)}\n", "\n", json_paths),
}


def opened(path: Path, mode: Literal["w", "a"]) -> TextIO:
    """A file of rows, which takes any name of an image; its folder is made."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open(mode, encoding="utf-8", errors="surrogateescape", newline="")


def add(file: TextIO, text: str) -> None:
    """Writes text, and keeps none of it back."""
    file.write(text)
    file.flush()


def paths_so_far(output: Path, form: Format) -> set[str]:
    """The paths of the rows that a file holds, of which a last line that a crash tore is cut off.

    Raises:
        PatchadError: if it is no file of such rows.
    """
    if not output.exists():
        return set()
    content, ending, begins = output.read_bytes(), form.ending.encode(), form.begins.encode()
    whole = content[: content.rfind(ending) + len(ending)] if ending in content else b""
    try:
        if not begins.startswith(content[: len(begins)]):
            raise ValueError("another beginning")
        paths = form.paths(whole.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise PatchadError(
            f"--output {output} holds other things than rows of this patchad as {form.name}; give a new file"
        ) from error
    if len(whole) < len(content):
        os.truncate(output, len(whole))
    return paths
