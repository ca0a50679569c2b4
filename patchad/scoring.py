"""Distances -> anomaly maps -> image scores; the threshold from normal images."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from patchad.checkpoint import take_sizes
from patchad.conformal import Limits, check_band, limits, p_values
from patchad.errors import check_range
from patchad.pyramid import enlarge
from patchad.types import Region

NOISE = 0.01
"""Share of its mean on normal images below which a map counts as that: what is left there is rounding, which a
root would magnify."""
FAR = 10.0
"""Deviations from which on a Gaussian falls no further: what lies there adds nothing to a float32, and CPUs may take
ten times as long for products of smaller numbers."""


class Scorer(nn.Module):
    """Combines the maps of the sides, scores images, and holds the threshold.

    Each map is first divided by the mean distance of its side on normal images, so that no side dominates by its
    unit, unless it is told not to (`scaled`). The paper sums the maps (Tsai et al., WACV 2022); the product, which its
    authors' code prints beside the sum, asks all sides to agree.

    Args:
        sides: sides in pixels whose maps are combined.
        combination: `sum`; `product`: ranked as the product of the maps, on the scale of their sum; or `excess`: each
            side counts by how far it exceeds normal images, in units of how these differ: the sum of the squares of
            `log(1 + exp((value - level) / spread))`, of level and spread of the scores that normal images have by that
            side alone. Squares, since these add where deviations are independent. A side that normal images vary on,
            or that does not see a defect, then hides no other one.
        image_score: `max` takes the highest pixel, as in the paper, `top_fraction` the mean of the highest pixels: one
            bad pixel on a normal image counts less.
        top_fraction: share of the pixels that `top_fraction` averages.
        smoothing: deviation of the Gaussian that smooths the combined map, in pixels of `image_size`; scores come from
            the map before it. 8, half of the smallest side, is what a map resolves (benchmarks/products.md); 4 in
            PatchCore (Roth et al., CVPR 2022, section 3.3); not in the paper: 0.
        scaled: divide each map by the mean distance of its side on normal images; the paper sums them as they are.
        target_fpr: false-positive rate that the threshold promises on normal images, and the map's threshold, too.
        review_fpr: share of normal images that may be called anomalous or be looked at (verdict `review`); None calls
            none for a look.

    Raises:
        PatchadError: if a fraction lies outside (0, 1], smoothing is negative, or no score is between the two rates.
    """

    threshold: Tensor
    review_threshold: Tensor
    map_threshold: Tensor
    scale: Tensor
    level: Tensor
    spread: Tensor
    normals: Tensor
    """Scores of normal images, each compared with the others, float32 `[images]`; the limits follow from them."""
    peaks: Tensor
    """The highest pixel of the map of each of them, float32 `[images]`."""

    def __init__(
        self,
        sides: Sequence[int],
        combination: Literal["sum", "product", "excess"] = "excess",
        image_score: Literal["max", "top_fraction"] = "top_fraction",
        top_fraction: float = 0.01,
        smoothing: float = 8.0,
        scaled: bool = True,
        target_fpr: float = 0.05,
        review_fpr: float | None = None,
    ) -> None:
        super().__init__()
        check_range({"top_fraction": top_fraction}, 0, 1, above=True)
        check_band(target_fpr, review_fpr)
        check_range({"smoothing": smoothing}, 0)
        self.combination, self.image_score = combination, image_score
        self.top_fraction, self.smoothing, self.scaled = top_fraction, smoothing, scaled
        self.target_fpr, self.review_fpr = target_fpr, review_fpr
        self.sides = tuple(sides)
        for name in Limits._fields:
            self.register_buffer(name, torch.tensor(torch.inf), persistent=False)
        for name in ("normals", "peaks"):
            self.register_buffer(name, torch.empty(0))
        for name in ("scale", "level", "spread"):
            self.register_buffer(name, torch.ones(len(self.sides)))  # until it is calibrated

    def extra_repr(self) -> str:
        """What scores depend on, which smoothing and the rate asked for are not among."""
        score = f"image_score={self.image_score}, top_fraction={self.top_fraction}, scaled={self.scaled}"
        return f"combination={self.combination}, {score}"

    @property
    def normal_level(self) -> float:
        """What the combined map has where nothing is unusual: on the mean of normal images each side counts 1.

        An excess counts log(2)^2 on the mean of the scores of normal images, an unscaled map its mean there.
        """
        if self.combination == "excess":
            return len(self.sides) * math.log(2) ** 2
        return float(self.combine({side: self.scale[number, None] for number, side in enumerate(self.sides)}))

    @property
    def _divisors(self) -> Float[Tensor, " sides"]:
        """What the map of each side is divided by."""
        return self.scale if self.scaled else torch.ones_like(self.scale)

    def combine(
        self, maps: Mapping[int, Float[Tensor, "batch *pixels"]], sides: Sequence[int] | None = None
    ) -> Float[Tensor, "batch *pixels"]:
        """One map of the sides' maps, or one score of their scores, each over its scale if they are scaled.

        Args:
            maps: of the sides.
            sides: those that count; all by default.
        """
        numbers = [self.sides.index(side) for side in sides or self.sides]
        scaled = torch.stack([maps[self.sides[number]] / self._divisors[number] for number in numbers])
        if self.combination == "sum":
            return scaled.sum(0)
        if self.combination == "excess":
            units = zip(scaled, self.level[numbers], self.spread[numbers], strict=True)
            return torch.stack([F.softplus((side - level) / spread) for side, level, spread in units]).square().sum(0)
        return len(scaled) * scaled.clamp(min=NOISE).prod(0).pow(1 / len(scaled))

    def show(
        self,
        maps: Mapping[int, Float[Tensor, "batch rows columns"]],
        content: Int[Tensor, "batch 2"],
        cell: int = 1,
        region: Region | None = None,
    ) -> Float[Tensor, "batch height width"]:
        """The map that is shown, written and measured, on the scale of the one that scores come from.

        Args:
            maps: of the sides.
            content: height x width of each map's content, top left, in pixels.
            cell: height and width in pixels of what has one value in these maps.
            region: True where an image is judged; by default that is the content.
        """
        return self.smooth(self.outline(maps), content, cell, region)

    def outline(self, maps: Mapping[int, Float[Tensor, "batch rows columns"]]) -> Float[Tensor, "batch rows columns"]:
        """The map that is shown, before it is smoothed, of the maps of the sides.

        Broad patches glow beyond a defect, and their excesses may be a hundred times as large. Excesses are therefore
        weighted by what the smallest side sees: of n sides it takes one share of n in a geometric mean with the sum of
        all. Where it sees nothing it counts as a normal image does, so that what broad patches alone see stays.
        """
        combined, share = self.combine(maps), 1 / len(self.sides)
        if self.combination != "excess":
            return combined
        finest = self.combine(maps, [min(self.sides)]) + math.log(2) ** 2
        return combined.pow(1 - share) * (len(self.sides) * finest).pow(share)

    def smooth(
        self,
        maps: Float[Tensor, "batch rows columns"],
        content: Int[Tensor, "batch 2"],
        cell: int = 1,
        region: Region | None = None,
    ) -> Float[Tensor, "batch height width"]:
        """Maps at pixels after the Gaussian, of maps at cells of that height and width; 0 beside a region."""
        smoothed = gaussian(maps, content, self.smoothing, cell, region) if self.smoothing else enlarge(maps, cell)
        if region is None:
            return smoothed
        return smoothed.where(content_pixels(content, smoothed.shape[1], smoothed.shape[2], 1, region) > 0, 0)

    def measure_normals(self, scores: Mapping[int, Float[Tensor, " images"]]) -> None:
        """Sets level and spread of each side, from the scores that normal images have by it alone."""
        for number, side in enumerate(self.sides):
            scaled = scores[side].double() / self._divisors[number]
            self.level[number] = scaled.mean()
            self.spread[number] = scaled.std(correction=0).clamp(min=NOISE * max(1.0, float(scaled.mean())))

    def score(
        self,
        maps: Float[Tensor, "batch rows columns"],
        content: Int[Tensor, "batch 2"],
        cell: int = 1,
        region: Region | None = None,
    ) -> Float[Tensor, " batch"]:
        """One score per image, from the pixels of it that are judged, of maps at cells of that height and width."""
        rows, columns = maps.shape[1:]
        pixels = content_pixels(content, rows, columns, cell, region)
        values = maps.masked_fill(pixels == 0, -torch.inf)
        if self.image_score == "max":
            return values.flatten(1).amax(1)
        partial = 0 if cell == 1 else rows + columns if region is None else rows * columns
        return top_mean(values, pixels, self.top_fraction, partial)

    @property
    def limits(self) -> Limits:
        """Where verdicts change."""
        return Limits(*(float(getattr(self, name)) for name in Limits._fields))

    def set_limits(self, normals: Float[Tensor, " images"], peaks: Float[Tensor, " images"]) -> float:
        """Sets the thresholds from normal images, and keeps what they come from.

        Args:
            normals: scores of normal images.
            peaks: the highest pixel of the map of each.

        Returns:
            The false-positive rate that is promised.
        """
        self.normals, self.peaks = normals.float(), peaks.float()
        found, promised = limits(normals.cpu().numpy(), peaks.cpu().numpy(), self.target_fpr, self.review_fpr)
        for name, value in found._asdict().items():
            getattr(self, name).fill_(value)
        return promised

    def p_value(self, scores: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Share of the normal images that score as high or higher; see `patchad.conformal.p_values`."""
        return torch.from_numpy(p_values(scores.cpu().numpy(), self.normals.cpu().numpy())).to(scores)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Takes any number of scores, and sets the thresholds for the rates that are asked for now."""
        take_sizes(self, state_dict, prefix, ("normals", "peaks"))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(self.normals):
            self.set_limits(self.normals, self.peaks)


def content_pixels(
    content: Int[Tensor, "batch 2"], rows: int, columns: int, cell: int = 1, region: Region | None = None
) -> Int[Tensor, "batch rows columns"]:
    """How many pixels of each cell are judged: lie on the content of each image, not on its padding, or in its region.

    Example:
        >>> content_pixels(torch.tensor([[3, 2]]), rows=2, columns=2, cell=2)
        tensor([[[4, 0],
                 [2, 0]]])
    """
    if region is not None:
        padded = F.pad(region, (0, cell * columns - region.shape[2], 0, cell * rows - region.shape[1]))
        return padded.unflatten(2, (-1, cell)).unflatten(1, (-1, cell)).sum((2, 4))
    lengths = [
        (length[:, None] - cell * torch.arange(count, device=content.device)).clamp(0, cell)
        for length, count in zip(content.T, (rows, columns), strict=True)
    ]
    return lengths[0][:, :, None] * lengths[1][:, None, :]


def gaussian(
    maps: Float[Tensor, "batch rows columns"],
    content: Int[Tensor, "batch 2"],
    deviation: float,
    cell: int = 1,
    region: Region | None = None,
) -> Float[Tensor, "batch height width"]:
    """The content of each map at pixels, smoothed as if nothing lay around it; 0 on the padding.

    As products of matrices, which a CPU does sooner than the convolution of maps of usual sizes. Of a region, each cell
    counts by the share of it that is judged (a normalized convolution: Knutsson and Westin, CVPR 1993).

    Args:
        maps: to be smoothed.
        content: height x width of each map's content, top left, in pixels.
        deviation: of the Gaussian, in pixels.
        cell: height and width in pixels of what has one value in the maps.
        region: True where an image is judged; by default that is the content. What is around it has any value.

    Example:
        >>> spot = torch.zeros(1, 5, 5)
        >>> spot[0, 2, 2] = 1
        >>> gaussian(spot, torch.tensor([[5, 5]]), deviation=1.0)[0, 2].round(decimals=2)
        tensor([0.0300, 0.1000, 0.1600, 0.1000, 0.0300])
    """
    height, width = cell * maps.shape[1], cell * maps.shape[2]
    with torch.autocast(maps.device.type, enabled=False):  # reduced precision would round the map
        rows, columns = (
            averages(length, on_content, deviation, cell)
            for length, on_content in zip((height, width), content.T, strict=True)
        )
        if region is None:
            smoothed = rows @ maps.float() @ columns.mT
        else:
            whole, judged = (content_pixels(content, maps.shape[1], maps.shape[2], cell, one) for one in (None, region))
            share = judged / whole.clamp(min=1)
            weight = (rows @ share @ columns.mT).clamp(min=torch.finfo(share.dtype).tiny)
            smoothed = rows @ (maps.float() * share) @ columns.mT / weight
    return smoothed.where(content_pixels(content, height, width) > 0, 0)


def averages(
    length: int, on_content: Int[Tensor, " batch"], deviation: float, cell: int
) -> Float[Tensor, "batch length cells"]:
    """How much each cell in a row counts at each pixel: the share of the Gaussian's weight there, on the content."""
    weights = bell(length, deviation, on_content.device)
    weights = weights * (torch.arange(length, device=on_content.device) < on_content[:, None])[:, None]
    return weights.unflatten(2, (-1, cell)).sum(3) / weights.sum(2, keepdim=True)


def bell(length: int, deviation: float, device: torch.device) -> Float[Tensor, "length length"]:
    """exp(-d^2 / 2) of the distance d of each two places in a row, in deviations, up to `FAR`."""
    place = torch.arange(length, device=device) / deviation
    return (-(place[:, None] - place).square().clamp(max=FAR**2) / 2).exp()


def top_mean(
    values: Float[Tensor, "batch rows columns"],
    pixels: Int[Tensor, "batch rows columns"],
    fraction: float,
    partial: int = 0,
) -> Float[Tensor, " batch"]:
    """The mean of the highest `fraction` of each map's pixels (at least one of them).

    Args:
        values: of cells, finite where there is a pixel.
        pixels: how many each cell counts for.
        fraction: of all that count.
        partial: how many cells at most hold some pixels, but fewer than the others.
    """
    top = (pixels.sum((1, 2)) * fraction).ceil().clamp(min=1)[:, None]
    most = min(math.ceil(values[0].numel() * fraction) + partial, values[0].numel())
    highest, places = values.flatten(1).topk(most, dim=1)
    counts = pixels.flatten(1).gather(1, places)
    counts = torch.minimum(counts, top - (counts.cumsum(1) - counts)).clamp(min=0).double()
    return ((highest.where(counts > 0, 0) * counts).sum(1) / top[:, 0]).to(values.dtype)


ScorerFactory = Callable[[Sequence[int]], Scorer]
"""Makes the scorer of some sides (pixels): `Scorer`, a subclass, or a `partial` of one."""
