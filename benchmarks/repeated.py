"""A layout for measurements: a folder whose training list is repeated, to see what memory depends on.

patchad fit --data.root bottle --data.layout benchmarks.repeated.Repeated --data.layout.times 10
"""

from pathlib import Path

from patchad.data.layouts import Layout, detect_layout
from patchad.types import Sample


class Repeated(Layout):
    """The training images of whatever layout the folder has, several times over; nothing else.

    Args:
        times: how often.
    """

    def __init__(self, times: int = 10) -> None:
        self.times = times

    def samples(self, root: Path) -> list[Sample]:
        """The repeated training images."""
        return self.times * [sample for sample in detect_layout(root).samples(root) if sample.split == "train"]
