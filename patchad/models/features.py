"""One door to what encoders read of training views: computed from images in each step, or kept on disk."""

from collections.abc import Iterable, Sequence

from jaxtyping import Bool
from torch import Tensor

from patchad.canvas import Size
from patchad.errors import PatchadError
from patchad.models.cache import FeatureCache
from patchad.models.encoders import DenseEncoder, PyramidEncoder
from patchad.types import PyramidBatch


class Features:
    """Features of training views, computed from their images in each step.

    Args:
        encoder: reads them.

    Attributes:
        views: how many views of each image there are; 0 where each epoch makes views of its own.
        place: how large what is kept is, and where it lies; empty where nothing is.
    """

    views, place = 0, ""

    def __init__(self, encoder: PyramidEncoder) -> None:
        self.encoder = encoder

    def open(self, paths: Sequence[str], key: str, size: Size, painted: bool) -> list[tuple[int, int, bool]]:
        """Says which images are meant; returns number, view and whether it is painted of what `keep` wants to be given.

        Args:
            paths: the training images, by number.
            key: whatever else the views depend on.
            size: height x width of the images in pixels.
            painted: whether views are also wanted with defects painted on them.
        """
        return []

    def keep_inside(self) -> None:
        """Has what is kept below the current folder."""

    def keep(self, numbers: Tensor, views: Tensor, painted: Tensor, images: Tensor, masks: Tensor) -> None:
        """Keeps the features of some views: what `ViewDataset` yields."""

    def observed(self, images: Iterable[Tensor]) -> Iterable[dict[int, Tensor]]:
        """What the encoders of each side read, to be standardised by: of the images, or of what is kept."""
        return (self.encoder.observable(image) for image in images)

    def windows(self, batch: PyramidBatch, view: int) -> dict[int, Tensor]:
        """What `PyramidEncoder.embed` needs of the first (0) or second (1) view of each image, by side."""
        return self.encoder.windows(batch.image[:, view], corners(batch))

    def embedded(self, batch: PyramidBatch, painted: bool) -> dict[int, Tensor]:
        """Embeddings of the first views at every scoring position, `[batch, dim, rows, columns]` by side."""
        return self.encoder(batch.painted if painted else batch.image[:, 0])

    def masks(self, batch: PyramidBatch) -> Bool[Tensor, "batch height width"]:
        """True on the defects that are painted on the first views."""
        return batch.mask


class CachedFeatures(Features):
    """Features of training views, as a `FeatureCache` keeps them.

    Args:
        encoder: reads them.
        cache: keeps them.

    Raises:
        PatchadError: if the encoder passes no whole images through its backbone.
    """

    def __init__(self, encoder: PyramidEncoder, cache: FeatureCache) -> None:
        if not isinstance(encoder, DenseEncoder):
            raise PatchadError("mode sliding has no features to cache; set learning.cache to null")
        self.encoder: DenseEncoder = encoder
        self.cache, self.views = cache, cache.views

    def keep_inside(self) -> None:
        """Has the cache below the current folder."""
        self.cache.keep_inside()

    def open(self, paths: Sequence[str], key: str, size: Size, painted: bool) -> list[tuple[int, int, bool]]:
        """What is missing in the cache.

        Raises:
            PatchadError: if the cache would be too large, or the backbone is fine-tuned.
        """
        self.cache.open(paths, key, self.encoder, size, painted)
        self.place = f"{self.cache.gigabytes:.2f} GB in {self.cache.home}"
        return self.cache.missing()

    def keep(self, numbers: Tensor, views: Tensor, painted: Tensor, images: Tensor, masks: Tensor) -> None:
        """Computes the features of the images, and writes them and the masks of painted ones."""
        features = self.encoder.features(images)
        for place, pair in enumerate(zip(numbers.tolist(), views.tolist(), painted.tolist(), strict=True)):
            self.cache.write(*pair, {side: values[place] for side, values in features.items()}, masks[place])

    def observed(self, images: Iterable[Tensor]) -> Iterable[dict[int, Tensor]]:
        """The feature maps of all views without defects."""
        return self.cache.each()

    def windows(self, batch: PyramidBatch, view: int) -> dict[int, Tensor]:
        """Read from the cache."""
        windows = self.cache.read(batch.number, batch.views[:, view], corners(batch))
        return {side: window.to(batch.content.device) for side, window in windows.items()}

    def embedded(self, batch: PyramidBatch, painted: bool) -> dict[int, Tensor]:
        """Read from the cache and embedded."""
        features = self.cache.whole(batch.number, batch.views[:, 0], painted)
        return self.encoder.embed_features({side: maps.to(batch.content.device) for side, maps in features.items()})

    def masks(self, batch: PyramidBatch) -> Bool[Tensor, "batch height width"]:
        """Read from the cache."""
        return self.cache.masks(batch.number, batch.views[:, 0]).to(batch.content.device)


def corners(batch: PyramidBatch) -> dict[int, Tensor]:
    """Top left corners of the windows that hold the pyramids, in pixels, by side."""
    return {side: pyramid.window for side, pyramid in batch.sides.items()}
