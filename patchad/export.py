"""A fitted detector -> one ONNX file that scores images without torch, and the proof that both say the same."""

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patchad.checkpoint import checksum
from patchad.errors import PatchadError
from patchad.files import check_writable, write_whole
from patchad.model import ScoringModel
from patchad.runtime import CHECKSUM, EXPORT_FORMAT, ExportedDetector, digest
from patchad.spec import spec
from patchad.types import Precision, Region

TOLERANCE = 1e-4
"""Most that scores of an exported file may differ from the checkpoint's, relative."""
MAP_TOLERANCE = 1e-2
"""Most that a pixel may differ, over the highest pixel. Usually below 1e-4, too; but near 0 the roots that make
distances, and products of maps, magnify rounding (benchmarks/learned.md)."""
LARGEST = 2**31 - 2**24
"""Bytes of what a model holds, above which protobuf takes no file: 2 GB, less what the graph itself may need."""
TINY = 1e-12
"""A score or a map that is nothing; differences are not divided by less."""


class ScoringGraph(nn.Module):
    """What the file computes, from a fitted image to its score and map; any ONNX runtime can.

    Input `image` is float32 `[batch, 3, height, width]`: RGB in [0, 1], resized to the canvas, its right or bottom edge
    repeated. Input `content` is int64 `[batch, 2]`, height x width without padding. After a fit with a region there is
    an input `region`, bool `[batch, height, width]`. Outputs are `score` and `map`. The metadata, JSON under `patchad`,
    hold limits and canvas.

    Args:
        model: a fitted one.
    """

    def __init__(self, model: ScoringModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        region: Region | None = None,
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        """Scores and maps, by the model's own code."""
        prediction = self.model(image, content, None, region)
        return prediction.score, prediction.map


def export(model: ScoringModel, output: Path, ckpt_path: Path | None = None, precision: Precision = "float32") -> None:
    """Writes a fitted model as one ONNX file: normalisation, backbone, encoders, banks, fold and score.

    Args:
        model: in eval mode, on the CPU; its canvas goes into the file.
        output: the file, which is replaced only when the new one is complete.
        ckpt_path: noted as provenance.
        precision: of its backbone, noted, too; `patchad.precision.in_int8` makes another.

    Raises:
        PatchadError: if the model was never fitted or is too large for a file, or the output is a folder.
        OSError: if the output cannot be written.
    """
    check_output(output)
    if model.canvas is None:
        raise PatchadError("the model knows no image_size: run patchad fit first, and export its checkpoint")
    as_bytes = sum(bank.lists.numel() * bank.vectors.shape[1] for bank in model.memory_banks.values())
    if (size := as_bytes + sum(values.nbytes for values in model.state_dict().values())) > LARGEST:
        raise PatchadError(
            f"the file would take {size / 1e9:.1f} GB, and ONNX allows {LARGEST / 1e9:.1f}: fit with a smaller "
            "--model.bank.max_vectors"
        )
    graph = ScoringGraph(model).eval()
    height, width = model.canvas.image_size
    inputs = {"image": torch.zeros(2, 3, height, width), "content": torch.tensor([[height, width]] * 2)}
    if model.canvas.region is not None:
        inputs["region"] = torch.ones(2, height, width, dtype=torch.bool)
    proto = as_onnx(graph, inputs, ("score", "map"))
    noted = {**metadata(model, ckpt_path), "precision": precision, "checksum": "0" * 64}
    onnx.helper.set_model_props(proto, {"patchad": json.dumps(noted)})
    write_whole(output, lambda part: part.write_bytes(with_checksum(proto.SerializeToString())))


def as_onnx(graph: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> onnx.ModelProto:
    """What a module computes, as an ONNX graph for any number of images.

    Args:
        graph: in eval mode, on the CPU.
        inputs: of two images, by the names that the graph has for them.
        outputs: names of what the module returns.
    """
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*axis name: batch will not be used")  # all inputs share it, as is meant
        graph(*(values[:1] for values in inputs.values()))  # what is missing is told here, not from within the exporter
        program = torch.onnx.export(
            graph,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(batch,) * len(inputs),
        )
    assert program is not None
    proto = program.model_proto
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        part.ClearField("metadata_props")  # stack traces, with folders of this machine
    return proto


def check_output(output: Path) -> None:
    """Raises PatchadError if a file is a folder, OSError if it cannot be written."""
    if output.is_dir():
        raise PatchadError(f"{output} is a folder; give a file, such as {output / 'model.patchad'}")
    check_writable(output)


def with_checksum(content: bytes) -> bytes:
    """The content of a file with its checksum in place of the zeros that its metadata have there."""
    place = CHECKSUM.search(content)
    assert place is not None
    start, end = place.span(1)
    return content[:start] + digest(content, (start, end)) + content[end:]


def metadata(model: ScoringModel, ckpt_path: Path | None) -> dict[str, Any]:
    """What the file says of itself."""
    checkpoint = {"name": ckpt_path.name, "sha256": checksum(ckpt_path)} if ckpt_path else None
    return {
        "format": EXPORT_FORMAT,
        "patchad": version("patchad"),
        "torch": torch.__version__,
        "checkpoint": checkpoint,
        "model": spec(model),
        "canvas": model.canvas,
        "updates": model.updates,
        "limits": model.scorer.limits,
        "normals": model.scorer.normals.tolist(),
        "peaks": model.scorer.peaks.tolist(),
        "vectors": {name: len(bank) for name, bank in model.memory_banks.items()},
    }


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


def compare(
    model: ScoringModel, exported: ExportedDetector, path: Path, region: np.ndarray | None = None
) -> Difference:
    """Scores an image file by both.

    Args:
        model: on the CPU.
        exported: the file.
        path: of the image.
        region: the image's own, as both take it.
    """
    expected, actual = model.predict(path, region), exported(path, region)
    return Difference(
        path=str(path),
        score=abs(actual.score - expected.score) / max(abs(expected.score), TINY),
        map=float(np.abs(actual.map - expected.map).max()) / max(float(expected.map.max()), TINY),
        same_verdict=actual.anomalous == expected.anomalous,
    )
