"""What scores images: the part of patchad that is exported, timed, put into ensembles and used in notebooks.

Nothing here knows Lightning; `patchad.module` trains what `PatchModel` embeds patches with.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from warnings import warn

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from patchad.canvas import Canvas, Size
from patchad.checkpoint import read_checkpoint
from patchad.conformal import check_band
from patchad.errors import PatchadError
from patchad.images import on_canvas, region_on_canvas
from patchad.memory import BankFactory, MemoryBank
from patchad.models.backbones import Backbone, EfficientNetLite0
from patchad.models.encoders import MODES, in_float32
from patchad.models.patches import PatchEncoderFactory, WindowEncoder
from patchad.pyramid import at_pixels, crop_resize, fold, mirror
from patchad.region import blank, judged, within
from patchad.results import Scored
from patchad.runtime import check_scores, planes_of
from patchad.scoring import Scorer, ScorerFactory, content_pixels
from patchad.spec import Configurable
from patchad.trust import made
from patchad.types import ImageBatch, Prediction, Region, given

Loaded = TypeVar("Loaded", bound="ScoringModel")
LEAST_SCALE = 1e-4
"""Mean distance of normal images over the spread of the bank's vectors, below which it is rounding or nothing."""


class ScoringModel(Configurable, nn.Module):
    """Scores images, in whatever way; a subclass says how (`detect`).

    Attributes:
        scorer: holds the threshold and the scores of normal images.
        sides: sides in pixels whose own maps are given, too.
        canvas: what raw images are brought to; None until there is a fit.
        updates: what was changed after the fit, a line for each time.
    """

    scorer: Scorer
    sides: tuple[int, ...] = ()
    canvas: Canvas | None = None
    updates: Sequence[str] = ()

    @classmethod
    def load(cls: type["Loaded"], path: str | Path, device: str | torch.device = "cpu") -> "Loaded":
        """The model of a checkpoint that `patchad fit` wrote, ready to score images.

        Args:
            path: of the checkpoint.
            device: where it is to run.

        Raises:
            PatchadError: if there is no checkpoint, or it is of another kind of model.
        """
        return cls.of_checkpoint(read_checkpoint(Path(path)), path).to(device)

    @classmethod
    def of_checkpoint(cls: type["Loaded"], checkpoint: Mapping[str, Any], path: str | Path) -> "Loaded":
        """The model of a checkpoint that was read, in eval mode; an error names its path.

        Raises:
            PatchadError: if it is of another kind of model.
        """
        model = made(cls, checkpoint["patchad_model"], f"checkpoint {path}")
        state = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("model.")}
        load_state(model, {name.removeprefix("model."): value for name, value in state.items()})
        model.canvas, model.updates = Canvas.of(checkpoint["patchad_canvas"]), checkpoint["patchad_updates"]
        return model.eval()

    def forward(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"] | None = None,
        thing: Int[Tensor, " batch"] | None = None,
        region: Region | None = None,
    ) -> Prediction:
        """Scores images.

        Args:
            image: RGB in [0, 1], on the canvas: what `patchad.images.on_canvas` makes of them.
            content: height x width of each image's content, top left, in pixels; by default the whole image.
            thing: number of what each image shows, as in `ImageBatch`, which it is then not compared with; by default
                every image is new.
            region: True where an image is judged; by default that is its content.

        Raises:
            PatchadError: if a bank is empty, a side does not fit the image, or the region is missing of a model that
                was fitted with one.
        """
        if region is None and self.canvas is not None and self.canvas.region is not None:
            raise PatchadError("the detector was fitted with a region: give it, or call predict, which knows it")
        if content is None:
            lengths = (torch.full((len(image),), length, device=image.device) for length in image.shape[2:])
            content = torch.stack(list(lengths), dim=1)
        return self.detect(image, content, thing) if region is None else self.detect(image, content, thing, region)

    def detect(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
        region: Region | None = None,
    ) -> Prediction:
        """`forward`, with the content named."""
        raise NotImplementedError

    @torch.inference_mode()
    def predict(self, image: np.ndarray | str | Path, region: np.ndarray | None = None) -> Scored:
        """Scores one image of any size.

        Args:
            image: what `patchad.runtime.to_rgb` takes: a file, or an array.
            region: True where this image is judged, bool `[height, width]`, where the fit had a mask for each image; in
                place of the fit's mask, where that was one for all.

        Raises:
            PatchadError: if it is no image, the region does not fit it, or the model was never fitted.
        """
        if self.canvas is None:
            raise PatchadError("the model knows no image_size: run patchad fit first, and load its checkpoint")
        pixels, size = planes_of(image, self.canvas)
        mask = judged(self.canvas, size, region)
        fitted, extent = on_canvas(torch.tensor(blank(pixels, mask)), self.canvas)
        content, device = torch.tensor([extent]), self.scorer.scale.device
        on_it = None if mask is None else region_on_canvas(mask, extent, self.canvas.image_size)[None].to(device)
        prediction = self.eval()(fitted[None].to(device), content.to(device), None, on_it)
        check_scores(prediction.score.cpu().numpy())
        values = within(crop_resize(prediction.map, content, size)[0].cpu().numpy(), mask)
        score, p_value = float(prediction.score), float(self.scorer.p_value(prediction.score))
        return Scored(score, bool(prediction.anomalous), self.scorer.limits.verdict(score), p_value, values)

    def judge(
        self,
        scored: Float[Tensor, "batch height width"],
        shown: Float[Tensor, "batch height width"],
        content: Int[Tensor, "batch 2"],
        region: Region | None = None,
    ) -> Prediction:
        """Scores and verdicts of a model without sides.

        Args:
            scored: the maps at pixels that scores come from.
            shown: those that are shown and measured.
            content: height x width of each image's content, top left, in pixels.
            region: True where an image is judged; by default that is its content.
        """
        scores = self.scorer.score(scored, content, region=region)
        return Prediction(scores, scores > self.scorer.threshold, shown, {}, {})

    def set_target_fpr(self, target_fpr: float, review_fpr: float | None = None) -> float:
        """Sets the limits for another false-positive rate; returns the rate that the threshold promises.

        Args:
            target_fpr: share of normal images that may be called anomalous.
            review_fpr: share that may be called anomalous or be looked at; None calls none for a look.

        Raises:
            PatchadError: if a rate does not lie above 0 and at most at 1, or the second not above the first.
        """
        check_band(target_fpr, review_fpr)
        self.scorer.target_fpr, self.scorer.review_fpr = target_fpr, review_fpr
        return self.scorer.set_limits(self.scorer.normals, self.scorer.peaks)

    def set_limits(self, scored: Float[Tensor, "images 2"], unseen: Bool[Tensor, " images"]) -> tuple[float, float]:
        """Sets the thresholds from normal images, each scored without itself.

        Embeddings of images that encoders learned from lie closer together than those of new ones. Their scores are
        therefore raised by the ratio of the medians, where that of the unseen ones is higher; so are their maps.

        Args:
            scored: what `summary` says of the normal images.
            unseen: whether encoders did not learn from an image; all True where nothing was learned.

        Returns:
            The false-positive rate that is promised, and the ratio of the scores; 1 where nothing was learned.
        """
        (scores, ratio), (peaks, _) = (as_unseen(values, unseen) for values in scored.T)
        return self.scorer.set_limits(scores, peaks), ratio

    @property
    def learns(self) -> bool:
        """Whether it has anything to train."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def memory_banks(self) -> dict[str, MemoryBank]:
        """Every bank that is searched, by its side, and by its member where there are several models."""
        banks = {name: bank for name, bank in self.named_modules() if isinstance(bank, MemoryBank)}
        return {name.replace("banks.", ""): bank for name, bank in banks.items()}

    @property
    def scored_by(self) -> dict[str, Any]:
        """What scores, and so the threshold, depend on, of all that may be given another value after a fit."""
        return {"scorer": repr(self.scorer)}

    def check_fitted(self, fitted: Mapping[str, Any]) -> None:
        """Raises PatchadError where it cannot take over what was fitted, whose `scored_by` is given."""


def as_unseen(
    values: Float[Tensor, " images"], unseen: Bool[Tensor, " images"]
) -> tuple[Float[Tensor, " images"], float]:
    """Values of normal images, those that were learned from raised by the ratio of the medians, and that ratio."""
    if unseen.all():
        return values, 1.0
    ratio = values[unseen].median() / values[~unseen].median().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(unseen, values, values * ratio.clamp(min=1)), float(ratio)


def summary(prediction: Prediction) -> Float[Tensor, "batch 2"]:
    """Score of each image, and the highest pixel of its map: what limits are set by."""
    return torch.stack([prediction.score, prediction.map.amax((1, 2))], dim=1)


class Distances(NamedTuple):
    """Distances of the patches of a batch to the nearest normal patch, per side `[batch, rows, columns]`."""

    sides: dict[int, Tensor]
    content: Tensor
    height: int
    width: int
    region: Tensor | None = None

    def each(self) -> Iterator["Distances"]:
        """Those of each image on its own, as a batch of one."""
        for number in range(len(self.content)):
            sides = {side: values[number, None] for side, values in self.sides.items()}
            region = None if self.region is None else self.region[number, None]
            yield self._replace(sides=sides, content=self.content[number, None], region=region)


class PatchModel(ScoringModel):
    """Embeds the patches of three sides, remembers the normal ones, and scores images by the distance to them.

    Embedding comes from `encoder`, memory from a bank for each side, scores from `scorer`. What a fit finds are
    buffers.

    Source: Tsai, Wu, Lai, Multi-Scale Patch-Based Representation Learning for Image Anomaly Detection and Segmentation,
    WACV 2022.

    Args:
        backbone: image -> feature maps; None is `EfficientNetLite0`.
        patch_encoder: makes the encoder of one side: a subclass of `PatchEncoder`, or a `functools.partial` of one.
        mode: `dense` passes each image through the backbone once, `sliding` each patch on its own, as in the paper.
        sides: sides of the patches in pixels.
        taps: name of the backbone's layer for each side; by default the backbone's own choice.
        scoring_strides: distance between scored patches for each side in pixels.
        subtract_mean_image: subtract the mean training image, as in the paper, instead of the backbone's normalisation.
        tile: a larger image (height or width in pixels) passes the backbone in tiles of that size, in dense mode, so
            that memory stays bounded where the backbone does not learn; the result is the same. None passes every image
            whole.
        bank: makes the memory of one side: `MemoryBank`, a subclass, or a `functools.partial` of one.
        scorer: combines the maps and holds the threshold: `Scorer`, a subclass, or a `functools.partial` of one.

    Raises:
        PatchadError: if sides, taps and strides do not fit each other.

    Example:
        >>> PatchModel().encoder.strides
        {64: 16, 32: 16, 16: 8}
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        patch_encoder: PatchEncoderFactory = WindowEncoder,
        mode: Literal["dense", "sliding"] = "dense",
        sides: tuple[int, ...] = (64, 32, 16),
        taps: dict[int, str] | None = None,
        scoring_strides: dict[int, int] | None = None,
        subtract_mean_image: bool = False,
        tile: int | None = 1024,
        bank: BankFactory = MemoryBank,
        scorer: ScorerFactory = Scorer,
    ) -> None:
        super().__init__()
        backbone = backbone or EfficientNetLite0()
        self.init_args = {**self.init_args, "backbone": backbone}
        self.encoder = MODES[mode](backbone, patch_encoder, sides, taps, scoring_strides, subtract_mean_image, tile)
        self.sides = self.encoder.sides
        self.banks = nn.ModuleDict({str(side): bank(side) for side in sides})
        self.scorer = scorer(sides)

    # from images to predictions

    def distances(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
        region: Region | None = None,
    ) -> Distances:
        """How far each patch is from the nearest normal one.

        Args:
            image: RGB in [0, 1].
            content: height x width of each image's content, top left, in pixels.
            thing: number of what each image shows, which its patches are not compared with.
            region: True where an image is judged; by default that is its content.
        """
        return self.nearest(self.embed(image), content, (image.shape[2], image.shape[3]), thing, region)

    def embed(self, image: Float[Tensor, "batch 3 height width"]) -> dict[int, Float[Tensor, "batch dim rows columns"]]:
        """What the bank keeps and searches: the embedding of each patch, by side.

        Args:
            image: RGB in [0, 1].
        """
        return in_float32(self.encoder(image))

    def nearest(
        self,
        embeddings: Mapping[int, Tensor],
        content: Int[Tensor, "batch 2"],
        size: Size,
        thing: Int[Tensor, " batch"] | None = None,
        region: Region | None = None,
    ) -> Distances:
        """How far embeddings are from the nearest normal ones: one search per side.

        Args:
            embeddings: of each side, `[batch, dim, rows, columns]`, as `embed` gives them.
            content: height x width of each image's content, top left, in pixels.
            size: height x width of the images in pixels.
            thing: number of what each image shows, which its patches are not compared with.
            region: True where an image is judged; by default that is its content.
        """
        sides = {
            side: self.bank(side).distances(values.flatten(2).transpose(1, 2), thing).unflatten(1, values.shape[2:])
            for side, values in embeddings.items()
        }
        return Distances(sides, content, *size, region)

    def bank(self, side: int) -> MemoryBank:
        """The normal patches of one side (pixels)."""
        bank = self.banks[str(side)]
        assert isinstance(bank, MemoryBank)
        return bank

    @property
    def cell(self) -> int:
        """Height and width in pixels of what has one value in the map of every side."""
        return math.gcd(*self.encoder.strides.values())

    def _counted(self, distances: Distances, side: int) -> Bool[Tensor, "batch rows columns"]:
        return self.encoder.counted(distances.content, distances.sides[side], side, distances.region)

    def side_maps(self, distances: Distances) -> dict[int, Float[Tensor, "batch rows columns"]]:
        """The anomaly map of each side, one value for each `cell` of the image."""
        rows, columns = -(-distances.height // self.cell), -(-distances.width // self.cell)
        maps = {}
        for side, values in distances.sides.items():
            counted, stride = self._counted(distances, side), self.encoder.strides[side]
            maps[side] = fold(values, counted, side, stride, self.cell)[:, :rows, :columns]
        return maps

    def score(self, distances: Distances) -> Prediction:
        """Maps, scores and verdicts from distances."""
        return self.score_maps(self.side_maps(distances), distances)

    def score_maps(self, maps: dict[int, Float[Tensor, "batch rows columns"]], distances: Distances) -> Prediction:
        """The combined map, scores and verdicts from the maps of the sides, and the distances that these are of."""
        judged, size = (distances.content, self.cell, distances.region), (distances.height, distances.width)
        scores = self.scorer.score(self.scorer.combine(maps), *judged)
        outlined = at_pixels(self.scorer.show(maps, *judged), 1, size)
        pixels = {side: at_pixels(values, self.cell, size) for side, values in maps.items()}
        return Prediction(scores, scores > self.scorer.threshold, outlined, self.side_scores(maps, distances), pixels)

    def side_scores(
        self, maps: Mapping[int, Float[Tensor, "batch rows columns"]], distances: Distances
    ) -> dict[int, Float[Tensor, " batch"]]:
        """The score of each side alone, from its map, and the distances that the maps are of."""
        judged = (distances.content, self.cell, distances.region)
        return {side: self.scorer.score(side_map, *judged) for side, side_map in maps.items()}

    def detect(
        self,
        image: Float[Tensor, "batch 3 height width"],
        content: Int[Tensor, "batch 2"],
        thing: Int[Tensor, " batch"] | None = None,
        region: Region | None = None,
    ) -> Prediction:
        """Maps, scores and verdicts of images."""
        return self.score(self.distances(image, content, thing, region))

    # what is normal

    def remember(
        self,
        embedded: Iterable[tuple[ImageBatch, Mapping[int, Tensor]]],
        things: Int[Tensor, " images"],
        progress: bool = False,
        more: bool = False,
    ) -> None:
        """Fills the bank of each side.

        Args:
            embedded: normal images, and what `embed` says of them.
            things: by the number of each image in the banks, the number of what it shows.
            progress: whether a reduction may show a bar.
            more: whether what the banks hold stays.
        """
        banks = {side: self.bank(side) for side in self.sides}
        for bank in banks.values():
            bank.reopen() if more else bank.clear()
        for batch, embeddings in embedded:
            check_finite(embeddings)
            for side, bank in banks.items():
                values = embeddings[side]
                counted = self.encoder.counted(batch.content, values, side, given(batch.region))
                bank.add(values, counted, batch.number)
        for bank in banks.values():
            bank.finish(things.to(bank.keys.device), progress)

    def has_room_for_as_much_again(self) -> bool:
        """Whether no bank would leave out a vector of twice what it holds."""
        return all(bank.has_room_for(2 * len(bank)) for bank in self.memory_banks.values())

    def calibrate(self, normals: Distances, unseen: Bool[Tensor, " images"]) -> tuple[float, float]:
        """Sets scales, levels, spreads and the threshold from the distances of normal images.

        Args:
            normals: each compared with the others.
            unseen: whether encoders did not learn from an image.

        Returns:
            What `set_limits` does.
        """
        for number, side in enumerate(self.sides):
            counted = torch.cat([self._counted(image, side) for image in normals.each()]) & unseen[:, None, None]
            mean = normals.sides[side][counted].double().mean()
            self.scorer.scale[number] = self._at_least(mean, side)
        image_scores = [self.side_scores(self.side_maps(image), image) for image in normals.each()]
        side_scores = {side: torch.cat([scores[side] for scores in image_scores]) for side in self.sides}
        self.scorer.measure_normals({side: scores[unseen] for side, scores in side_scores.items()})
        scored = torch.cat([summary(self.score(image)) for image in normals.each()])  # maps are not kept
        return self.set_limits(scored, unseen)

    def _at_least(self, scale: Tensor, side: int) -> Tensor:
        """The scale, or what keeps distances over it finite, with a warning."""
        spread = self.bank(side).vectors.std(dim=0, correction=0).norm()  # about how far normal patches differ
        least = (LEAST_SCALE * spread).clamp(min=1e-12)
        if scale < least:
            warn(
                f"side {side} has no scale: normal images do not differ; are some there twice? Otherwise give more of "
                "them, or a smaller baseline of model.bank",
                stacklevel=2,
            )
        return scale.maximum(least)

    # what a checkpoint must fit

    @property
    def scored_by(self) -> dict[str, Any]:
        """What scores, and so the threshold, depend on, of all that may be given another value after a fit."""
        encoder, baseline = self.encoder, self.bank(self.sides[0]).baseline
        read = {"mode": type(encoder).__name__, "taps": encoder.tap_names, "scoring_strides": encoder.strides}
        return {**super().scored_by, "baseline": baseline, **read}

    def check_fitted(self, fitted: Mapping[str, Any]) -> None:
        """Refuses what was fitted with other sides."""
        fitted_sides, sides = list(fitted["taps"]), list(self.scored_by["taps"])
        if fitted_sides != sides:  # banks and scales are theirs, in their order
            raise PatchadError(f"the checkpoint has sides {fitted_sides}, not {sides}; fit again")


def mirrored(batch: ImageBatch, axes: tuple[int, ...]) -> ImageBatch:
    """Images and what is judged of them, reversed along axes of an image `[3, height, width]`."""
    image, region = mirror(batch.image, batch.content, axes), batch.region
    if given(region) is not None:
        on_content = content_pixels(batch.content, image.shape[2], image.shape[3]) > 0
        region = (mirror(region[:, None].float(), batch.content, axes)[:, 0] > 0) & on_content
    return batch._replace(image=image, region=region)


def embed_mirrors(
    model: PatchModel, batches: Iterable[ImageBatch], mirrors: Iterable[Sequence[int]], first: int, count: int
) -> Iterator[tuple[ImageBatch, dict[int, Tensor]]]:
    """Batches reversed along the axes of each mirror, with the embeddings of their patches.

    Args:
        model: embeds.
        batches: of images whose numbers begin at 0.
        mirrors: axes of an image `[3, height, width]`; none of them leaves images as they are.
        first: number of the first image of the first mirror.
        count: of images, by which the numbers of one mirror lie behind those of the one before.
    """
    mirrors = [tuple(axes) for axes in mirrors]
    for batch in batches:
        for place, axes in enumerate(mirrors):
            copy = mirrored(batch, axes)
            yield copy._replace(number=first + place * count + batch.number), model.embed(copy.image)


def unseen(model: ScoringModel, held_out: Bool[Tensor, " images"]) -> Bool[Tensor, " images"]:
    """Of each normal image, whether nothing learned from it; where none is held out, they are taken as if so."""
    return held_out | (not model.learns or not held_out.any())


def load_state(module: nn.Module, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """Gives a module the tensors of a checkpoint, as torch does it.

    Raises:
        PatchadError: if they are another module's, or hold nan or infinite numbers.
    """
    for name, values in state.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise PatchadError(f"the checkpoint's {name} holds nan or infinite numbers: no verdict holds; fit again")
    try:
        return nn.Module.load_state_dict(module, state, strict, assign)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition("\n")[2], 150, placeholder=" ...")
        raise PatchadError(
            f"the checkpoint does not fit this detector: {reason}; leave out model options that the fit did not have, "
            "or fit again"
        ) from error


def check_finite(embeddings: Mapping[int, Tensor]) -> None:
    """Raises PatchadError if embeddings of a side are nan or infinite, before K-means and the bank get them."""
    for side, values in embeddings.items():
        if not values.isfinite().all():
            raise PatchadError(
                f"embeddings of side {side} are nan or infinite: training has diverged, or began with such weights; "
                f"lower model.learning.learning_rate, or mend the loss whose train/..._side_{side} is nan"
            )


def without_weights(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `spec` of a model whose backbone starts empty: a checkpoint holds the weights, no file is needed."""
    backbone = model["init_args"]["backbone"]
    empty = {**backbone, "init_args": {**backbone.get("init_args", {}), "weights": "none"}}
    return {**model, "init_args": {**model["init_args"], "backbone": empty}}
