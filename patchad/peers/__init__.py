"""The systems that the paper is compared with, and examples of how a method is added."""

from patchad.peers.mcuepushu import MCuePushU, MCuePushUModel
from patchad.peers.padim import PaDiM, PaDiMModel

__all__ = ["MCuePushU", "MCuePushUModel", "PaDiM", "PaDiMModel"]
