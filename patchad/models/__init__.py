"""Images -> feature maps -> embeddings."""

from patchad.models.backbones import VGG16, Backbone, EfficientNetLite0
from patchad.models.encoders import PatchEncoder, WindowEncoder

__all__ = ["VGG16", "Backbone", "EfficientNetLite0", "PatchEncoder", "WindowEncoder"]
