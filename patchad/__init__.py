"""patchad finds defects in images after seeing good ones only."""

from patchad.data import PyramidDataModule
from patchad.module import PatchDetector
from patchad.types import ImageBatch, PatchadError, Prediction

__all__ = ["ImageBatch", "PatchDetector", "PatchadError", "Prediction", "PyramidDataModule"]
