"""A backbone in int8, a detector that is fitted anew to what it sees by it, and the proof that verdicts stay."""

import copy
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import onnxruntime
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc

from patchad.canvas import Size
from patchad.data.datamodule import PyramidDataModule
from patchad.data.datasets import SyntheticDefects
from patchad.errors import PatchadError
from patchad.export import as_onnx
from patchad.metrics import squash
from patchad.model import PatchModel, ScoringModel, embed_mirrors, unseen
from patchad.models.backbones import Backbone
from patchad.types import FittedImages

OBSERVED = 64
"""Normal images, at most, whose features say which range the 8 bits span."""
JUDGED = 200
"""Normal images, at most, that are scored as they are and with a painted defect."""
LOST_AUROC = 0.2
"""Most points of AUROC that may be lost on them."""
CHANGED = 0.005
"""Largest share of their verdicts that may change."""
STEPS = 255
"""Of 8 bits without a sign."""
COLOURS = 3
RECTIFIERS = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_")
"""What a runtime does in one go with the convolution before."""


class Span(NamedTuple):
    """The least and the highest of some numbers."""

    low: float
    high: float

    def with_numbers(self, values: Tensor) -> "Span":
        """The span of these numbers, too."""
        low, high = values.detach().aminmax()
        return Span(min(self.low, float(low)), max(self.high, float(high)))


class Spans(TorchFunctionMode):
    """Watches what convolutions read and give while it is entered; 0 is in every span.

    Attributes:
        read: span of what a convolution reads, by the id of its weight.
        given: span of what it gives.
        rectified: of which convolutions a rectifier takes what they give.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, Span] = {}
        self.given: dict[int, Span] = {}
        self.rectified: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Lets the function run."""
        name = getattr(function, "__name__", "")
        if name in RECTIFIERS:
            self.rectified.add(getattr(args[0], "given_by", 0))
        result = function(*args, **(kwargs or {}))
        if name == "conv2d":
            key = result.given_by = id(args[1])
            self.read[key] = self.read.get(key, Span(0, 0)).with_numbers(args[0])
            self.given[key] = self.given.get(key, Span(0, 0)).with_numbers(result)
        return result


class Rounded(nn.Module):
    """Numbers as 8 bits without a sign hold them.

    Args:
        span: of the numbers; what leaves it is cut off.

    Example:
        >>> Rounded(Span(0, 255))(torch.tensor([-3.0, 4.4, 300.0]))
        tensor([  0.,   4., 255.])
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, span: Span) -> None:
        super().__init__()
        scale = max(span.high - span.low, torch.finfo().tiny) / STEPS
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(round(-span.low / scale), dtype=torch.uint8))

    def forward(self, values: Tensor) -> Tensor:
        """The numbers; an exported file holds the nodes that runtimes turn into products of whole numbers."""
        if not torch.onnx.is_in_onnx_export():
            return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero.int(), 0, STEPS)
        grid = (self.scale, self.zero)
        whole = torch.onnx.ops.symbolic("QuantizeLinear", (values, *grid), dtype=torch.uint8, shape=values.shape)
        return torch.onnx.ops.symbolic("DequantizeLinear", (whole, *grid), dtype=values.dtype, shape=values.shape)


class RoundedConvolution(nn.Module):
    """A convolution of whole numbers: its weights have 8 bits, by a scale for each channel, and so has what it reads.

    Args:
        convolution: in float32.
        read: span of what it reads.
        given: span of what it gives; None where a rectifier follows, behind which the next one rounds.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, convolution: nn.Conv2d, read: Span, given: Span | None) -> None:
        super().__init__()
        self.read, self.given = Rounded(read), nn.Identity() if given is None else Rounded(given)
        weight = convolution.weight.detach()
        scale = weight.abs().amax((1, 2, 3)).clamp(min=torch.finfo().tiny) / 127
        self.register_buffer("weight", (weight / scale[:, None, None, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = convolution.bias
        names = ("stride", "padding", "dilation", "groups")
        self.settings: dict[str, Any] = {name: getattr(convolution, name) for name in names}

    def forward(self, values: Float[Tensor, "batch channels rows columns"]) -> Tensor:
        """What the convolution gives."""
        return self.given(F.conv2d(self.read(values), self._weights(), self.bias, **self.settings))

    def _weights(self) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return self.weight * self.scale[:, None, None, None]
        inputs = (self.weight, self.scale, torch.zeros_like(self.weight[:, 0, 0, 0]))
        shape = self.weight.shape
        return torch.onnx.ops.symbolic("DequantizeLinear", inputs, {"axis": 0}, dtype=torch.float32, shape=shape)


def reduce_backbone(model: PatchModel, images: Iterable[Float[Tensor, "batch 3 height width"]]) -> None:
    """Puts the convolutions of a model's backbone into int8, in place, but for those that read the image itself.

    Those have too little to do to be faster, and what they lose nothing behind them can bring back.

    Args:
        model: in eval mode, on the CPU.
        images: normal ones, by which the spans are set.

    Raises:
        PatchadError: if there is no convolution that can be put into int8.
    """
    backbone = model.encoder.backbone
    with Spans() as spans:
        for image in images:
            model.embed(image)
    layers = [(parent, name, layer) for parent in backbone.modules() for name, layer in parent.named_children()]
    fitting = [
        (parent, name, layer) for parent, name, layer in layers if fits(layer) and id(layer.weight) in spans.read
    ]
    if not fitting:
        raise PatchadError(f"--precision int8: {backbone.title} has no convolution that it fits; leave it out")
    for parent, name, layer in fitting:
        key = id(layer.weight)
        given = None if key in spans.rectified else spans.given[key]
        setattr(parent, name, RoundedConvolution(layer, spans.read[key], given))


def fits(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution that can be put into int8, and reads more than the colours of an image."""
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and layer.in_channels > COLOURS


class Taps(nn.Module):
    """The maps that a backbone has at some taps, in the order of their names."""

    def __init__(self, backbone: Backbone, names: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.names = backbone, names

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, ...]:
        """The maps, by the backbone's own code, whatever its `forward` is replaced by."""
        maps = type(self.backbone).forward(self.backbone, image, self.names)
        return tuple(maps[name] for name in self.names)


@contextmanager
def run_by_runtime(model: PatchModel) -> Iterator[None]:
    """Within it, ONNX Runtime runs the backbone of a model, as it does in an exported file.

    Args:
        model: in eval mode, on the CPU.
    """
    backbone, taps = model.encoder.backbone, sorted(set(model.encoder.tap_names.values()))

    @functools.cache
    def session(size: Size) -> onnxruntime.InferenceSession:
        """The backbone, for images of one height x width in pixels."""
        graph = as_onnx(Taps(backbone, taps).eval(), {"image": torch.zeros(2, 3, *size)}, taps)
        return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    def forward(image: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """As the backbone's."""
        maps = session((image.shape[2], image.shape[3])).run(taps, {"image": image.numpy()})
        return {name: torch.from_numpy(values) for name, values in zip(taps, maps, strict=True) if name in names}

    backbone.forward = forward
    try:
        yield
    finally:
        del backbone.forward


def refit(model: PatchModel, data: PyramidDataModule, mirrors: Sequence[Sequence[int]]) -> None:
    """Fills the banks, and sets scales and limits, anew from the normal images of a fit.

    What a network of another precision sees of them differs from what the banks hold by more than a faint defect does.

    Args:
        model: in eval mode, on the CPU.
        data: after its setup for a fit.
        mirrors: axes along which images are reversed and taken in once more.
    """
    axes, count = [(), *mirrors], len(data.normal_set)
    things = data.normal_set.things.repeat(len(axes))
    model.remember(embed_mirrors(model, data.normal_dataloader(), axes, first=0, count=count), things)
    parts = [model.distances(*batch.inputs) for batch in data.normal_dataloader()]
    sides = {side: torch.cat([part.sides[side] for part in parts]) for side in model.sides}
    region = torch.cat([part.region for part in parts if part.region is not None] or [torch.empty(0)])
    content = torch.cat([part.content for part in parts])
    whole = parts[0]._replace(sides=sides, content=content, region=region if len(region) else None)
    model.calibrate(whole, unseen(model, data.held_out))


class Verdicts(NamedTuple):
    """What a model says of normal images and of painted defects."""

    score: Float[Tensor, " images"]
    anomalous: Bool[Tensor, " images"]
    label: Tensor

    @property
    def auroc(self) -> float:
        """Detection AUROC in %."""
        return 100 * float(binary_auroc(squash(self.score), self.label))


def verdicts(model: ScoringModel, data: PyramidDataModule) -> Verdicts:
    """Of at most `JUDGED` normal images, evenly spread, each as it is and with a painted defect.

    Each is compared with the other things alone.

    Args:
        model: in eval mode, on the CPU.
        data: after its setup for a fit.
    """
    defects = SyntheticDefects(data.normal_set, data.seed)
    defects.most = len(data.normal_set)
    chosen = np.linspace(0, defects.most - 1, min(JUDGED, defects.most)).round().astype(int).tolist()
    numbers = [2 * number + painted for number in chosen for painted in (0, 1)]
    loader = DataLoader(defects, data.batch_size, sampler=numbers, num_workers=data.num_workers)
    parts = [(model(*batch.inputs), batch.label) for batch in loader]
    said = [Verdicts(prediction.score, prediction.anomalous, label) for prediction, label in parts]
    return Verdicts(*map(torch.cat, zip(*said, strict=True)))


class Harm(NamedTuple):
    """What another precision does to the verdicts on normal images and painted defects.

    Attributes:
        auroc: of detection in %.
        exact_auroc: in float32.
        changed: verdicts that differ.
        images: of how many.
    """

    auroc: float
    exact_auroc: float
    changed: int
    images: int

    def __str__(self) -> str:
        return (
            f"AUROC {self.auroc:.2f} %, in float32 {self.exact_auroc:.2f} %; {self.changed} of {self.images} verdicts "
            "differ, on normal images and painted defects"
        )

    def check(self) -> None:
        """Raises PatchadError if that is more than `LOST_AUROC` or `CHANGED`."""
        if self.exact_auroc - self.auroc > LOST_AUROC or self.changed > CHANGED * self.images:
            allowed = f"allowed are {LOST_AUROC} points and {CHANGED:.1%}"
            raise PatchadError(f"--precision int8 does harm: {self}; {allowed}: leave it out")


@torch.no_grad()
def in_int8(model: ScoringModel, data: PyramidDataModule, fitted: FittedImages) -> tuple[PatchModel, Harm]:
    """The same detector with its backbone in int8, and banks, scales and limits of what that sees.

    Banks, scales and limits are of what ONNX Runtime makes of the backbone: torch rounds otherwise where a number lies
    between two steps, which from layer to layer becomes a third of what int8 moves.

    Args:
        model: fitted, in eval mode, on the CPU; it stays as it is.
        data: where the normal images of the fit are; it is set up for a fit.
        fitted: those.

    Raises:
        PatchadError: if the model has no banks, its backbone no convolutions, or the images are others.
    """
    if not isinstance(model, PatchModel):
        raise PatchadError(f"--precision int8: {type(model).__name__} has no banks to fill anew; leave it out")
    find_normals(data, fitted)
    reduced = copy.deepcopy(model)
    step = math.ceil(len(data.normal_set) / OBSERVED)
    reduce_backbone(reduced, (data.normal_set[number].image[None] for number in range(0, len(data.normal_set), step)))
    with run_by_runtime(reduced):
        refit(reduced, data, fitted.mirrors)
        after = verdicts(reduced, data)
    before = verdicts(model, data)
    changed = int((before.anomalous != after.anomalous).sum())
    return reduced, Harm(after.auroc, before.auroc, changed, len(before.label))


def find_normals(data: PyramidDataModule, fitted: FittedImages) -> None:
    """Lists the normal images.

    Raises:
        PatchadError: if they are not those of the fit.
    """
    wanted = f"--precision int8 needs the {len(fitted.digests)} normal images that the detector knows"
    if not data.root.is_dir():
        raise PatchadError(f"{wanted}, and {data.root} is no folder: give theirs by --data.root")
    data.setup("fit")
    digests = [int(digest) for batch in data.reading_dataloader() for digest in batch.digest]
    if missing := len(set(fitted.digests) - set(digests)):
        raise PatchadError(f"{wanted}, and {data.root} lacks {missing} of them: give theirs by --data.root")
    if len(digests) > len(fitted.digests):
        raise PatchadError(f"{wanted}, and {data.root} has {len(digests)} to train on: take the others out of it")
