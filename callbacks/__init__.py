"""Callbacks: each watches or writes, none changes a number."""

from patchad.callbacks.anomaly_maps import AnomalyMaps
from patchad.callbacks.checkpoint import LastCheckpoint
from patchad.callbacks.clusters import Clusters
from patchad.callbacks.dashboard import Dashboard
from patchad.callbacks.learning_curve import LearningCurve
from patchad.callbacks.possible_defects import PossibleDefects
from patchad.callbacks.predictions import Predictions
from patchad.callbacks.report import Report

__all__ = [
    "AnomalyMaps",
    "Clusters",
    "Dashboard",
    "LastCheckpoint",
    "LearningCurve",
    "PossibleDefects",
    "Predictions",
    "Report",
]
