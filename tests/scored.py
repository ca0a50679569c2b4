"""What a checkpoint and its exported file say of images: a program of its own, which may get less of the CPU.

python -m tests.scored last.ckpt model.patchad scores.npz image.png ...
"""

import gc
import sys

import numpy as np


def scored(checkpoint: str, exported: str, images: list[str]) -> dict[str, np.ndarray]:
    """Scores, verdicts and maps of both, one row for each image."""
    import torch

    from patchad import PatchModel, load

    said = {"instructions": np.array(torch.backends.cpu.get_cpu_capability())}
    for name, score in (("checkpoint", PatchModel.load(checkpoint).predict), ("file", load(exported))):
        found = [score(image) for image in images]
        said[f"{name} score"] = np.array([one.score for one in found])
        said[f"{name} verdict"] = np.array([one.anomalous for one in found])
        said[f"{name} map"] = np.stack([one.map for one in found])
    return said


if __name__ == "__main__":
    gc.disable()  # what is imported stays until the end
    checkpoint, exported, output, *images = sys.argv[1:]
    np.savez(output, **scored(checkpoint, exported, images))
