"""PaDiM: a Gaussian of what a network sees at each place of normal images.

Source: Defard, Setkov, Loesch, Audigier, PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and
Localization, ICPR 2020 workshops, https://arxiv.org/abs/2011.08785.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from patchad.checkpoint import take_sizes
from patchad.detector import Detector
from patchad.errors import PatchadError, check_range
from patchad.model import ScoringModel
from patchad.models.backbones import Backbone, ResNet18
from patchad.scoring import Scorer, ScorerFactory, gaussian
from patchad.spec import hyperparameters, spec
from patchad.types import ImageBatch, Prediction, Region

REGULARIZATION = 0.01
"""Added to the variance of each channel (section III-B)."""
DEVIATION = 4.0
"""Of the Gaussian that smooths the map, in pixels (the paper's experimental setup)."""
STRIDES = (4, 8, 16)
"""Of the taps that are read, in pixels: the first three stages of a ResNet."""
PEAK = partial(Scorer, combination="sum", image_score="max", smoothing=0.0)
"""The score of an image is the highest pixel of its map (section III-C)."""


class Gaussians(nn.Module):
    """A Gaussian of normal features for each place, and how far other features are from it.

    Of n normal images with features x at a place, the mean is m = sum(x) / n, the scatter S = sum((x - m) (x - m)^T),
    the covariance C = S / (n - 1) + e I with e = `REGULARIZATION`; the distance is sqrt(u^T C^-1 u) with u = x - m.

    Without one of these images itself, the mean is m - u / (n - 1), and the covariance
    (S - n / (n - 1) u u^T) / (n - 2) + e I. By Sherman and Morrison its distance is n / (n - 1) sqrt(q / (1 - c q)),
    with q = u^T (S / (n - 2) + e I)^-1 u and c = n / ((n - 1) (n - 2)). That leaves out one image: others of its group
    (`Sample.group`) stay.
    """

    count: Tensor  # of the normal images
    mean: Tensor  # channels, rows, columns
    axes: Tensor  # eigenvectors of S in columns: rows x columns, channels, channels
    scatter: Tensor  # eigenvalues of S, which both covariances have in common: rows x columns, channels

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        for name in ("mean", "axes", "scatter"):
            self.register_buffer(name, torch.empty(0))

    def estimate(
        self, features: Iterable[Float[Tensor, "_ channels rows columns"]], total: Callable[[Tensor], Tensor]
    ) -> None:
        """Estimates the Gaussians of normal images, in batches, of sums in float64; `total` sums over all processes.

        Raises:
            PatchadError: if there are fewer than three images.
        """
        moments, grid = torch.empty(0), (0, 0)
        for batch in features:
            rows = F.pad(batch.double().flatten(2).permute(2, 0, 1), (0, 1), value=1.0)  # with a 1, which counts
            moments, grid = moments.baddbmm_(rows.mT, rows) if len(moments) else rows.mT @ rows, batch.shape[2:]
        moments = total(moments)
        count, mean = moments[0, -1, -1], moments[:, -1, :-1] / moments[0, -1, -1]
        if count < 3:
            raise PatchadError(f"{int(count)} normal images are no Gaussian without one of them; give three or more")
        scatter = moments[:, :-1, :-1] - count * mean[:, :, None] * mean[:, None]
        found = [torch.linalg.eigh(part) for part in scatter.split(256)]  # in float64, not all at a time
        device, self.count = self.mean.device, count.to(self.count)
        self.mean = mean.T.unflatten(1, grid).float().to(device)
        self.axes = torch.cat([part.eigenvectors.float() for part in found]).to(device)
        self.scatter = torch.cat([part.eigenvalues.float() for part in found]).clamp(min=0).to(device)

    def forward(
        self, features: Float[Tensor, "batch channels rows columns"], own: Bool[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch rows columns"]:
        """The distance at each place; where `own`, of one of the normal images to the others.

        Raises:
            PatchadError: if nothing was estimated, or of images of another size.
        """
        if not len(self.mean):
            raise PatchadError("PaDiM knows no normal images: run patchad fit first")
        if features.shape[1:] != self.mean.shape:
            fitted, given = (f"{rows} x {columns}" for *_, rows, columns in (self.mean.shape, features.shape))
            raise PatchadError(
                f"PaDiM knows {fitted} places, this image has {given}; give all images the image_size of the fit"
            )
        along = ((features - self.mean).flatten(2).permute(2, 0, 1) @ self.axes).square()
        rest = self.count - 1
        squared = self._over_variance(along, rest)
        if own is not None:
            share = self._over_variance(along, rest - 1) * self.count / rest
            without = share * self.count / rest / (1 - share / (rest - 1)).clamp(min=torch.finfo(share.dtype).eps)
            squared = torch.where(own, without, squared)
        return squared.sqrt().T.unflatten(1, features.shape[2:])

    def _over_variance(self, along: Float[Tensor, "places batch channels"], freedom: Tensor) -> Tensor:
        return (along / (self.scatter / freedom + REGULARIZATION)[:, None]).sum(2)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        take_sizes(self, state_dict, prefix, ("mean", "axes", "scatter"))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PaDiMModel(ScoringModel):
    """Scores each place of an image by how far its features are from the Gaussian of normal ones there.

    Features are those of the deepest tap of each stride of `STRIDES`, all enlarged to the places of the shallowest, and
    of these some channels, the same everywhere. The map of distances is enlarged to pixels (bilinear) and smoothed.
    Products must lie alike in all images. The Gaussians take 4 bytes for each place and pair of channels: 164 MB of
    256 x 256 pixels and 100 channels.

    Args:
        backbone: image -> feature maps, which is not trained; None is `ResNet18`.
        channels: how many are kept of all taps together: 100 in the paper for ResNet18, 550 for WideResNet50.
        seed: draws them.
        scorer: makes what holds the threshold.

    Raises:
        PatchadError: if the backbone is trained or has fewer channels, or the scorer combines excesses.
    """

    chosen: Tensor

    def __init__(
        self, backbone: Backbone | None = None, channels: int = 100, seed: int = 0, scorer: ScorerFactory = PEAK
    ) -> None:
        super().__init__()
        self.backbone = backbone or ResNet18()
        self.init_args = {**self.init_args, "backbone": self.backbone}
        if not self.backbone.frozen:
            raise PatchadError("PaDiM learns nothing: leave out backbone.trainable")
        deepest = {tap.stride: name for name, tap in self.backbone.taps.items()}
        self.taps = {deepest[stride]: stride for stride in STRIDES if stride in deepest}
        available = sum(self.backbone.tap(name).channels for name in self.taps)
        check_range({"channels": channels}, 1, available)
        drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("chosen", drawn[:channels])
        self.gaussians, self.scorer = Gaussians(), scorer((0,))
        if self.scorer.combination == "excess":
            raise PatchadError("PaDiM has one map and no excess: give --config padim, or scorer.combination sum")

    def features(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels rows columns"]:
        """The chosen channels of all taps, at the places of the shallowest."""
        maps = self.backbone(image, self.taps)
        rows, columns = next(iter(maps.values())).shape[2:]
        enlarged = [F.interpolate(maps[name], scale_factor=stride / self.stride) for name, stride in self.taps.items()]
        return torch.cat([values[:, :, :rows, :columns] for values in enlarged], dim=1)[:, self.chosen].float()

    @property
    def stride(self) -> int:
        """Distance between places in pixels."""
        return min(self.taps.values())

    def detect(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
        region: Region | None = None,
    ) -> Prediction:
        """Maps, scores and verdicts of images."""
        features, size = self.features(image), image.shape[2:]
        with torch.autocast(image.device.type, enabled=False):  # distances would lose digits
            distances = self.gaussians(features, None if thing is None else thing >= 0)[:, None]
            enlarged = F.interpolate(distances, scale_factor=float(self.stride), mode="bilinear")[:, 0]
        maps = {0: gaussian(enlarged[:, : size[0], : size[1]], content, DEVIATION, region=region)}
        shown = self.scorer.show(maps, content, region=region)
        return self.judge(self.scorer.combine(maps), shown, content, region)


class PaDiM(Detector[PaDiMModel]):
    """Fits a `PaDiMModel`: nothing is learned, Gaussians are estimated, a threshold is set.

    Args:
        backbone: image -> feature maps; this and what follows is explained at `PaDiMModel`.
        channels: how many are kept.
        seed: draws them.
        scorer: makes what holds the threshold.
    """

    def __init__(
        self, backbone: Backbone | None = None, channels: int = 100, seed: int = 0, scorer: ScorerFactory = PEAK
    ) -> None:
        super().__init__()
        self.model = PaDiMModel(backbone, channels, seed, scorer)
        self.save_hyperparameters({**hyperparameters(self), **spec(self.model)["init_args"]})

    def _scored(self, batch: ImageBatch, thing: Tensor | None = None) -> Prediction:
        """An image that a defect is painted on is none of the normal images, without which it would be compared."""
        return super()._scored(batch, None if thing is None else thing.masked_fill(batch.label == 1, -1))

    def know_normals(self) -> None:
        """Estimates the Gaussians in one pass over the normal images; the limits follow, of each without itself."""
        batches = self._batches(self._data.normal_dataloader(), "Estimating Gaussians")
        self.model.gaussians.estimate((self.model.features(batch.image) for batch in batches), self._total)
        super().know_normals()
