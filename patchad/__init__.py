"""patchad finds defects in images after seeing good ones only.

`patchad.load` scores images from an exported file and needs neither torch nor Lightning, which are imported only when
something else is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchad.errors import PatchadError
from patchad.runtime import load

if TYPE_CHECKING:
    from patchad.data import PyramidDataModule
    from patchad.ensemble import Ensemble
    from patchad.learning import Learning
    from patchad.model import PatchModel
    from patchad.module import PatchDetector
    from patchad.trust import allow
    from patchad.types import ImageBatch, Prediction

__all__ = [
    "Ensemble",
    "ImageBatch",
    "Learning",
    "PatchDetector",
    "PatchModel",
    "PatchadError",
    "Prediction",
    "PyramidDataModule",
    "allow",
    "load",
]

HOMES = {
    "allow": "patchad.trust",
    "Ensemble": "patchad.ensemble",
    "ImageBatch": "patchad.types",
    "Learning": "patchad.learning",
    "PatchDetector": "patchad.module",
    "PatchModel": "patchad.model",
    "Prediction": "patchad.types",
    "PyramidDataModule": "patchad.data",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'patchad' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
