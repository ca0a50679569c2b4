"""Callbacks: each watches or writes, none changes a number."""

from patchad.callbacks.checkpoint import LastCheckpoint
from patchad.callbacks.predictions import Predictions
from patchad.callbacks.report import Report

__all__ = ["LastCheckpoint", "Predictions", "Report"]
