"""A fitted detector -> one ONNX file that scores images without torch, and the proof that both say the same."""

import hashlib
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patchad.data.images import read_image
from patchad.detector import Detector
from patchad.errors import PatchadError
from patchad.files import check_writable, write_whole
from patchad.pyramid import crop_resize
from patchad.runtime import EXPORT_FORMAT, ExportedDetector
from patchad.types import ImageBatch

TOLERANCE = 1e-4
"""Most that scores of an exported file may differ from the checkpoint's, relative."""
MAP_TOLERANCE = 1e-2
"""Most that a pixel may differ, over the highest pixel. Usually below 1e-4, too; but near 0 the roots that make
distances, and products of maps, magnify rounding (benchmarks/learned.md)."""
TINY = 1e-12
"""A score or a map that is nothing; differences are not divided by less."""


class ScoringGraph(nn.Module):
    """What the file computes, from a fitted image to its score and map.

    Args:
        detector: a fitted detector.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], content: Int[Tensor, "batch 2"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        """Scores and maps, by the detector's own code."""
        prediction = self.detector(image, content)
        return prediction.score, prediction.map


def export(detector: Detector, output: Path, data: Any, ckpt_path: Path | None = None) -> None:
    """Writes a fitted detector as one ONNX file: normalisation, backbone, encoders, banks, fold and score.

    Args:
        detector: in eval mode, on the CPU.
        output: the file, which is replaced only when the new one is complete.
        data: the datamodule, of which `image_size`, `keep_aspect` and `brightness` go into the file.
        ckpt_path: noted as provenance.

    Raises:
        PatchadError: if the banks are empty, or the output is a folder.
        OSError: if the output cannot be written.
    """
    if output.is_dir():
        raise PatchadError(f"{output} is a folder; give a file, such as {output / 'model.patchad'}")
    check_writable(output)
    graph = ScoringGraph(detector).eval()
    height, width = data.image_size
    image, content = torch.zeros(2, 3, height, width), torch.tensor([[height, width]] * 2)
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*axis name: batch will not be used")  # both inputs share it, as is meant
        graph(image[:1], content[:1])  # what is missing is told here, not from within the exporter
        program = torch.onnx.export(
            graph,
            (image, content),
            dynamo=True,
            verbose=False,
            input_names=["image", "content"],
            output_names=["score", "map"],
            dynamic_shapes=(batch, batch),
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {"patchad": json.dumps(metadata(detector, data, ckpt_path))})
    write_whole(output, lambda part: onnx.save_model(model, part))


def metadata(detector: Detector, data: Any, ckpt_path: Path | None) -> dict[str, Any]:
    """What the file says of itself."""
    checkpoint = {"name": ckpt_path.name, "sha256": digest(ckpt_path)} if ckpt_path else None
    return {
        "format": EXPORT_FORMAT,
        "patchad": version("patchad"),
        "torch": torch.__version__,
        "checkpoint": checkpoint,
        "detector": json.loads(json.dumps(dict(detector.hparams), default=str)),
        "image_size": list(data.image_size),
        "keep_aspect": data.keep_aspect,
        "brightness": data.brightness,
        "threshold": float(detector.scorer.threshold),
        "normals": detector.scorer.normals.tolist(),
        "normal_level": detector.scorer.normal_level,
        "vectors": {name: len(bank) for name, bank in detector.memory_banks.items()},
    }


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Difference(NamedTuple):
    """How far an exported file is from its checkpoint on one image.

    Attributes:
        path: of the image.
        score: difference of the scores over the checkpoint's.
        map: of the pixel that differs most, over the checkpoint's highest pixel.
        same_verdict: whether both say the same.
    """

    path: str
    score: float
    map: float
    same_verdict: bool


@torch.inference_mode()
def compare(detector: Detector, exported: ExportedDetector, batch: ImageBatch) -> Difference:
    """Scores an image file by both, as `patchad predict` and `patchad.load` do.

    Args:
        detector: in eval mode, on the CPU.
        exported: the file.
        batch: one image.
    """
    prediction = detector(batch.image, batch.content)
    size = (int(batch.size[0, 0]), int(batch.size[0, 1]))
    expected = crop_resize(prediction.map, batch.content, size)[0].numpy()
    found = exported(read_image(Path(batch.path[0])).permute(1, 2, 0).numpy())
    score = float(prediction.score)
    return Difference(
        path=batch.path[0],
        score=abs(found.score - score) / max(abs(score), TINY),
        map=float(np.abs(found.map - expected).max()) / max(float(expected.max()), TINY),
        same_verdict=found.anomalous == bool(prediction.anomalous),
    )
