"""The systems that the paper is compared with, and examples of how a method is added."""

from patchad.peers.differnet import DifferNet, DifferNetModel
from patchad.peers.mcuepushu import MCuePushU, MCuePushUModel
from patchad.peers.padim import PaDiM, PaDiMModel

__all__ = ["DifferNet", "DifferNetModel", "MCuePushU", "MCuePushUModel", "PaDiM", "PaDiMModel"]
