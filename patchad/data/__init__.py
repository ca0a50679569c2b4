"""Folders on disk -> batches."""

from patchad.data.datamodule import PyramidDataModule
from patchad.data.layouts import BTAD, Folder, Layout, MagneticTile, MVTecAD, Synthetic

__all__ = ["BTAD", "Folder", "Layout", "MVTecAD", "MagneticTile", "PyramidDataModule", "Synthetic"]
