import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from patchad import PatchDetector

CHECKOUT = Path(__file__).parent.parent
ORDER = [
    "errors",
    "ahead",
    "canvas",
    "decoding",
    "region",
    "folders",
    "images",
    "masks",
    "files",
    "conformal",
    "results",
    "drawing",
    "engines",
    "runtime",
    "journal",
    "arrivals",
    "drift",
    "stages",
    "line",
    "types",
    "spec",
    "trust",
    "checkpoint",
    "pyramid",
    "data",
    "models",
    "losses",
    "nearest",
    "clustering",
    "lists",
    "memory",
    "scoring",
    "model",
    "learning",
    "metrics",
    "detector",
    "module",
    "ensemble",
    "peers",
    "loggers",
    "callbacks",
    "export",
    "revision",
    "precision",
    "timing",
    "commands",
    "help",
    "cli",
    "products",
]
FILES = [
    *(path for path in (CHECKOUT / "patchad").rglob("*.py") if "callbacks" not in path.parts),
    *(CHECKOUT / "callbacks").rglob("*.py"),
]


def room(path: Path) -> str:
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    return parts[0] if parts[0] == "callbacks" else parts[1]


def module_name(path: Path) -> str:
    """The name under which a file is imported; that of its folder for `__init__.py`."""
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    parts = parts if parts[0] == "patchad" else ("patchad", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, package: str) -> set[str]:
    """Every module that a source names in an import, in whatever form.

    Args:
        source: of a module.
        package: in which it lies, for relative imports.
    """
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            modules |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            modules |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return modules


def imported_rooms(path: Path) -> set[str]:
    name = module_name(path)
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    parts = [module.split(".") for module in imported_modules(path.read_text(), package)]
    return {part[1] for part in parts if part[0] == "patchad" and len(part) > 1} & set(ORDER)


@pytest.mark.parametrize(
    "source",
    [
        "import patchad.cli",
        "import patchad.cli as commands",
        "from patchad import cli",
        "from patchad.cli import main",
        "from .. import cli",
        "from ..cli import main",
        "def late():\n    from patchad.cli import main",
        "import importlib\nimportlib.import_module('patchad.cli')",
    ],
)
def test_every_form_of_import_is_read(source):
    assert "patchad.cli" in imported_modules(source, "patchad.data")


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


LARGEST = 300
"""Lines of a class."""


def test_no_class_does_too_much_and_a_detector_has_few_options():
    classes = {
        node.name: node
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    lines = {name: node.end_lineno - node.lineno + 1 for name, node in classes.items()}
    assert max(lines.values()) <= LARGEST, max(lines, key=lines.get)
    assert lines["PatchDetector"] + lines["PatchModel"] <= 550
    assert len(inspect.signature(PatchDetector).parameters) <= 12


def test_what_scores_knows_no_lightning():
    named = "[name for name in sys.modules if name.startswith('pytorch_lightning')]"
    program = f"import gc, sys; gc.disable(); import patchad.model; print({named})"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CHECKOUT)
    assert finished.stdout.strip() == "[]", finished.stderr
