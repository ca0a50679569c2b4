"""The systems that the paper is compared with, each a detector of its own, and an example of how one is added."""

from patchad.peers.differnet import DifferNet, DifferNetModel

__all__ = ["DifferNet", "DifferNetModel"]
