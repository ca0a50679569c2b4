"""Builds patchad-runtime from the sources of patchad; version and dependencies are said once, in its pyproject.toml."""

import tomllib
from pathlib import Path

from setuptools import setup

NEEDED = ("numpy", "onnxruntime", "pillow")

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
needed = [line for line in project["dependencies"] if line.rstrip("0123456789.>=") in NEEDED]
extras = {"openvino": project["optional-dependencies"]["openvino"]}
setup(version=project["version"], install_requires=needed, extras_require=extras)
