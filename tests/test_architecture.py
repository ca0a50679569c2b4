import ast
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
ORDER = [
    "errors",
    "canvas",
    "decoding",
    "files",
    "conformal",
    "runtime",
    "types",
    "spec",
    "pyramid",
    "data",
    "models",
    "losses",
    "nearest",
    "clustering",
    "lists",
    "memory",
    "scoring",
    "metrics",
    "detector",
    "module",
    "ensemble",
    "callbacks",
    "export",
    "timing",
    "commands",
    "cli",
]
FILES = [
    *(path for path in (CHECKOUT / "patchad").rglob("*.py") if "callbacks" not in path.parts),
    *(CHECKOUT / "callbacks").rglob("*.py"),
]


def room(path: Path) -> str:
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    return parts[0] if parts[0] == "callbacks" else parts[1]


def imported_rooms(path: Path) -> set[str]:
    modules = [node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {module.split(".")[1] for module in modules if module.startswith("patchad.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_imports_point_upwards_only(path):
    if room(path) in ("__init__", "__main__"):
        return
    here = ORDER.index(room(path))
    below = {name for name in imported_rooms(path) if ORDER.index(name) > here}
    assert not below


def test_the_median_function_is_short_and_no_room_is_named_utils():
    lengths = sorted(
        node.body[-1].end_lineno - node.body[bool(ast.get_docstring(node))].lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and len(node.body) > bool(ast.get_docstring(node))
    )
    assert lengths[len(lengths) // 2] <= 10
    assert not {"utils", "common", "base", "helpers", "registry", "manager"} & {path.stem for path in FILES}
