"""Images -> feature maps -> embeddings."""

from patchad.models.backbones import VGG16, Backbone, EfficientNetLite0
from patchad.models.cache import FeatureCache
from patchad.models.encoders import LearnedEncoder, PatchEncoder, WindowEncoder

__all__ = ["VGG16", "Backbone", "EfficientNetLite0", "FeatureCache", "LearnedEncoder", "PatchEncoder", "WindowEncoder"]
