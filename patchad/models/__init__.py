"""Images -> feature maps -> embeddings."""

from patchad.models.backbones import (
    VGG16,
    VGG19,
    AlexNet,
    Backbone,
    EfficientNetLite0,
    MobileNetV2,
    ResNet18,
    ResNet50,
    WideResNet50,
)
from patchad.models.cache import FeatureCache
from patchad.models.patches import LearnedEncoder, PatchEncoder, TextureEncoder, WindowEncoder
from patchad.models.timm_backbone import Timm

__all__ = [
    "VGG16",
    "VGG19",
    "AlexNet",
    "Backbone",
    "EfficientNetLite0",
    "FeatureCache",
    "LearnedEncoder",
    "MobileNetV2",
    "PatchEncoder",
    "ResNet18",
    "ResNet50",
    "TextureEncoder",
    "Timm",
    "WideResNet50",
    "WindowEncoder",
]
