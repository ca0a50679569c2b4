"""Any network of timm as a backbone."""

import copy
import difflib
import itertools
import math
import textwrap
from collections.abc import Collection, Iterable, Mapping
from types import ModuleType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from patchad.errors import PatchadError
from patchad.models.backbones import Backbone, Tap, side_taps_by_depth
from patchad.pyramid import pad_to_multiple


class Timm(Backbone):
    """A network of timm by its name, with the feature maps that timm itself takes from it.

    Taps are `stage1`, `stage2`, ... where maps shrink on their way; where they do not, as in a vision transformer, the
    blocks at a quarter, half, three quarters and all of the depth, such as `block3`, `block6`, `block9` and `block12`.
    An image that the stride of a tap does not divide has its edge repeated up to the next multiple.

    Args:
        name: as in `timm.list_models()`, or `timm.list_pretrained()` to choose among weights.
        weights: `imagenet`: timm's, whatever they were trained on; the path of a state_dict of the whole network; or
            `none` (random).
        trainable: which layers are fine-tuned: `none`, `all`, or the name of a tap: those behind it.

    Raises:
        PatchadError: if timm is missing or has no network of that name, if weights cannot be had, read or fitted, or if
            `trainable` names no tap.

    Example:
        >>> import torch
        >>> backbone = Timm("vit_small_patch14_dinov2", weights="none")
        >>> list(backbone.taps), backbone.side_taps
        (['block3', 'block6', 'block9', 'block12'], {56: 'block12', 28: 'block12', 14: 'block3'})
        >>> backbone(torch.zeros(1, 3, 112, 100), ["block3"])["block3"].shape
        torch.Size([1, 384, 8, 8])
    """

    layers: Any  # networks of timm have no type in common

    def __init__(self, name: str = "resnet18", weights: str = "imagenet", trainable: str = "none") -> None:
        self.name = name  # before the base class, which builds
        super().__init__(weights, trainable)

    def build(self) -> nn.Module:
        """The network without its classifier; taps, normalisation and size are what timm says of it."""
        network, any_size = create(self.name)
        config = network.pretrained_cfg
        self.mean, self.deviation = config["mean"], config["std"]
        self.only_size = None if any_size or not config.get("fixed_input_size") else tuple(config["input_size"][1:])
        shapes = [(info["reduction"], info["num_chs"]) for info in network.feature_info]
        self.taps = taps_by_depth([Tap(index, *shape) for index, shape in enumerate(shapes)])
        self.side_taps = side_taps_by_depth(self.taps)
        return network

    def imagenet(self) -> Mapping[str, Tensor]:
        """The weights, downloaded once and kept in the cache of timm.

        Raises:
            PatchadError: if they cannot be had, with the other ways.
        """
        try:
            return create(self.name, pretrained=True)[0].state_dict()
        except Exception as error:  # of the network, the hub, or timm, by many names
            page = f"https://huggingface.co/{self.layers.pretrained_cfg.get('hf_hub_id') or 'timm'}"
            raise PatchadError(
                f"cannot download {self.name} ({textwrap.shorten(str(error), 100)}); fetch it elsewhere ({page}) and "
                "set --model.backbone.weights to its path, or use --model.backbone EfficientNetLite0, whose weights "
                "are installed with patchad"
            ) from error

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The classifier is left out."""
        names = self.layers.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([names] if isinstance(names, str) else names))
        return {name: value for name, value in state.items() if not name.startswith(heads)}

    @property
    def title(self) -> str:
        """The class and the network."""
        return f"{type(self).__name__} {self.name}"

    def fold(self) -> None:
        """Nothing: networks of timm register their layers in other orders than that in which they run."""

    def until(self, names: Iterable[str]) -> nn.Module:
        """The network, pruned by timm behind the deepest of the named taps; its tensors are those of `layers`."""
        tensors = itertools.chain(self.layers.parameters(), self.layers.buffers())
        part = copy.deepcopy(self.layers, {id(tensor): tensor for tensor in tensors})  # which are not copied
        deepest = max(self.tap(name).layer for name in names)
        part.prune_intermediate_layers([deepest], prune_norm=True, prune_head=True)
        return part

    def compute(
        self, features: Float[Tensor, "batch 3 height width"], layers: Collection[int]
    ) -> dict[int, Float[Tensor, "batch channels rows columns"]]:
        """What timm takes from some depths, in one pass that ends at the deepest of them.

        Args:
            features: the normalised image.
            layers: which of timm's feature maps.

        Raises:
            PatchadError: if the network does not take images of that size, or a tap has other cells than timm says.
        """
        depths, strides = sorted(layers), {tap.layer: tap.stride for tap in self.taps.values()}
        padded = self._padded(features, math.lcm(*(strides[layer] for layer in depths)))
        maps = self.layers.forward_intermediates(padded, indices=depths, stop_early=True, intermediates_only=True)
        for layer, values in zip(depths, maps, strict=True):
            if values.shape[2:] != cells(padded, strides[layer]):
                raise PatchadError(
                    f"{self.title} has {tuple(values.shape[2:])} cells where timm promises one every {strides[layer]} "
                    f"pixels of {tuple(padded.shape[2:])}; take another network, or other taps"
                )
        extents = {layer: cells(features, strides[layer]) for layer in depths}
        whole = zip(extents.items(), maps, strict=True)
        return {layer: values[:, :, :rows, :columns] for (layer, (rows, columns)), values in whole}

    def _padded(self, features: Float[Tensor, "batch 3 height width"], multiple: int) -> Tensor:
        size = (features.shape[2], features.shape[3])
        if self.only_size is None:
            return pad_to_multiple(features, multiple)
        if size != self.only_size:
            raise PatchadError(
                f"{self.title} takes images of {self.only_size} pixels (height x width) alone, not {size}; set "
                "data.image_size, or take another network"
            )
        return features


def cells(image: Tensor, stride: int) -> tuple[int, int]:
    """Rows x columns of a map of an image.

    Example:
        >>> import torch
        >>> cells(torch.zeros(1, 3, 50, 64), stride=16)
        (4, 4)
    """
    return -(-image.shape[2] // stride), -(-image.shape[3] // stride)


def import_timm() -> ModuleType:
    """The package.

    Raises:
        PatchadError: if it is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise PatchadError('networks of timm need an extra: pip install "patchad[timm]"') from error
    return timm


def create(name: str, pretrained: bool = False) -> tuple[Any, bool]:
    """A network without its classifier, and whether it was made to take images of any size.

    Raises:
        PatchadError: if timm does not know the name, or cannot take features from its network.
    """
    timm = import_timm()
    if not timm.is_model(name) or ("." in name and not timm.is_model_pretrained(name)):
        names = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()])
        nearest = f"; nearest: {', '.join(names)}" if names else ""
        raise PatchadError(f"timm {timm.__version__} has no network {name}{nearest} (timm.list_models() names all)")
    try:
        network, any_size = timm.create_model(name, pretrained, num_classes=0, dynamic_img_size=True), True
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        network, any_size = timm.create_model(name, pretrained, num_classes=0), False  # it has no such option
    if not hasattr(network, "forward_intermediates"):
        raise PatchadError(
            f"timm {timm.__version__} takes no feature maps from {name}; a newer one may, or another name"
        )
    return network, any_size


def taps_by_depth(maps: list[Tap]) -> dict[str, Tap]:
    """Names for a network's feature maps: all of them where they shrink, otherwise one at each quarter of the depth.

    Example:
        >>> list(taps_by_depth([Tap(0, 4, 64), Tap(1, 8, 128), Tap(2, 16, 256)]))
        ['stage1', 'stage2', 'stage3']
        >>> list(taps_by_depth([Tap(index, 16, 192) for index in range(12)]))
        ['block3', 'block6', 'block9', 'block12']
    """
    if len({tap.stride for tap in maps}) > 1:
        return {f"stage{number}": tap for number, tap in enumerate(maps, 1)}
    quarters = sorted({math.ceil(quarter * len(maps) / 4) for quarter in range(1, 5)})
    return {f"block{number}": maps[number - 1] for number in quarters}
