"""The notebook of the docs runs, and prints the figures that stand in it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "first_look.ipynb"


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What its cells print, line by line."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]
    return [line for text in texts for line in text.splitlines()]


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own
def test_the_notebook_prints_the_figures_that_stand_in_it(tmp_path):
    kept, ran = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    NotebookClient(ran, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert pictures(ran) == pictures(kept) == 3
    assert len(printed(ran)) == len(printed(kept)) > 5
    for line, expected in zip(printed(ran), printed(kept), strict=True):
        assert numbers(line) == pytest.approx(numbers(expected), rel=0.01)
