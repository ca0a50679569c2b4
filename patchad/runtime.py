"""An exported file -> scores of images, from files or memory. Neither torch nor Lightning is imported here.

ONNX Runtime runs the graph, or OpenVINO where it is installed and faster; see `patchad.engines`.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchad.canvas import Canvas, Size, content_size, gain
from patchad.conformal import Limits, limits, p_values
from patchad.decoding import Picture, read_picture, read_pixels
from patchad.engines import CPU, Arrays, Engine, Resources, open_engine
from patchad.errors import PatchadError
from patchad.region import blank, fitted, judged, within
from patchad.results import Scored, box

AFFINE, BILINEAR = Image.Transform.AFFINE, Image.Resampling.BILINEAR

CHANNELS = (1, 3, 4)
"""Grey, RGB, RGB and alpha."""

EXPORT_FORMAT = 6
"""Raised whenever exported files of an older patchad no longer load."""

CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{64})"')
"""Where a file notes SHA-256 of itself, in which these digits are zeros."""


class ExportedDetector:
    """A detector in one file, as `patchad export` writes it. Pools of processes may be handed it (`pool.map`).

    Args:
        path: the file.
        threads: of the CPU; by default one per core.
        providers: of ONNX Runtime, in order of preference.
        runtime: what runs the graph: `onnxruntime`; `openvino`, if it is installed; or `auto`, which takes the one that
            is faster here. Their scores differ by rounding, and where that leads the search of a large bank to another
            vector, by about a thousandth. Name one where all machines must say the same of a score that near to the
            threshold.
        spinning: whether threads of ONNX Runtime wait for their next piece of work without a pause. False is faster
            where several threads of Python score at once, or decode beside it; one image alone takes a little longer.

    Attributes:
        limits: where verdicts change; `threshold` may be set alone.
        normals: scores of the normal images of the fit, each compared with the others.
        peaks: the highest pixel of the map of each of them.
        canvas: what images are brought to.
        metadata: all that the file says of where it came from.

    Raises:
        PatchadError: if the file is missing, damaged, or not one of patchad's, or there are no such threads, providers
            or runtime.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        providers: Sequence[str] = CPU,
        runtime: str = "auto",
        spinning: bool = True,
    ) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise PatchadError(f"a {type(path).__name__} is no path of a file that patchad export wrote")
        if threads is not None and not (isinstance(threads, int) and threads > 0):
            raise PatchadError(f"threads {threads!r} must be a number of at least 1, or None for one per core")
        file = Path(path)
        resources = Resources(threads, providers, spinning)
        self._engine = open_engine(file, checksum_of(file), runtime, resources, partial(trial, file))
        self._opened = (file.absolute(), threads, tuple(providers), self.runtime, spinning)
        self.metadata = read_metadata(file, self._engine)
        self.normals, self.peaks = (np.array(self.metadata[name], np.float32) for name in ("normals", "peaks"))
        self.limits = Limits(*self.metadata["limits"])
        self.canvas = Canvas.of(self.metadata["canvas"])

    def __reduce__(self) -> tuple[Any, ...]:
        """As the file's path: another process opens it anew, in the same runtime, and keeps the threshold."""
        return type(self), self._opened, {"limits": self.limits}

    @property
    def runtime(self) -> str:
        """What runs the graph: `onnxruntime` or `openvino`."""
        return self._engine.runtime

    @property
    def threshold(self) -> float:
        """Scores above it are anomalous; it may be set to any number, and takes along a band that it passes."""
        return self.limits.threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        """Refuses nan, above which no score lies."""
        if not isinstance(threshold, Real) or math.isnan(threshold):
            raise PatchadError(f"threshold {threshold!r} must be a number")
        review = min(self.limits.review_threshold, float(threshold))
        self.limits = Limits(float(threshold), review, self.limits.map_threshold)

    def __call__(self, image: np.ndarray | str | Path | Picture, region: np.ndarray | None = None) -> Scored:
        """Scores one image.

        Args:
            image: what `to_rgb` takes, or what `read_picture` gave for the detector's canvas.
            region: True where this image is judged, bool `[height, width]`, where the fit had a mask for each image; in
                place of the fit's mask, where that was one for all.

        Raises:
            PatchadError: if it is anything else, the file cannot be read, or the region does not fit it.
        """
        return self.score([image], None if region is None else [region])[0]

    def set_target_fpr(self, target_fpr: float, review_fpr: float | None = None) -> float:
        """Sets the limits for another false-positive rate; returns the rate that the threshold promises.

        Args:
            target_fpr: share of normal images that may be called anomalous.
            review_fpr: share that may be called anomalous or be looked at; None calls none for a look.

        Raises:
            PatchadError: if a rate does not lie above 0 and at most at 1, or the second not above the first.
        """
        self.limits, promised = limits(self.normals, self.peaks, target_fpr, review_fpr)
        return promised

    def score(
        self, images: Iterable[np.ndarray | str | Path | Picture], regions: Iterable[np.ndarray] | None = None
    ) -> list[Scored]:
        """Scores several images, which may differ in size, in one pass.

        Args:
            images: what a call takes.
            regions: of each image, as a call takes it.

        Raises:
            PatchadError: if one is no image, or has no score, or a region does not fit its image.
        """
        if isinstance(images, (np.ndarray, str, Path, Picture)) or not isinstance(images, Iterable):
            raise PatchadError("score takes a list of images; call the detector with one image")
        images = list(images)
        return [
            scored._replace(map=within(off_canvas(scored.map, scored.map.shape, size), mask))
            for scored, size, mask in (self._on_canvases(images, regions) if images else [])
        ]

    def find(self, image: np.ndarray | str | Path | Picture) -> tuple[Scored, np.ndarray]:
        """Scores one image, and says what of it is to be outlined, bool `[height, width]`: where its map is too high.

        Its map is left at the size of the canvas: to enlarge that of a photograph takes longer than all else.

        Args:
            image: what a call takes.

        Raises:
            PatchadError: as a call does.
        """
        [(scored, size, mask)] = self._on_canvases([image])
        return scored, region_above(scored.map, size, self.limits.map_threshold, mask)

    def _on_canvases(
        self, images: list[np.ndarray | str | Path | Picture], regions: Iterable[np.ndarray] | None = None
    ) -> list[tuple[Scored, Size, np.ndarray | None]]:
        """What is said of images, with maps of their content on the canvas; their sizes, and what is judged of them."""
        native = [planes_of(image, self.canvas) for image in images]
        given = [None] * len(images) if regions is None else list(regions)
        if len(given) != len(images):
            raise PatchadError(f"score was given {len(images)} images, but {len(given)} regions")
        sizes = [size for _, size in native]
        masks = [judged(self.canvas, size, region) for size, region in zip(sizes, given, strict=True)]
        placed = [on_canvas(blank(image, mask), self.canvas) for (image, _), mask in zip(native, masks, strict=True)]
        scores, maps = self.run(placed, masks)
        shares = p_values(scores, self.normals)
        cropped = [values[:height, :width] for values, (_, (height, width)) in zip(maps, placed, strict=True)]
        said = [
            Scored(score, score > self.limits.threshold, self.limits.verdict(score), float(share), values)
            for score, share, values in zip(scores.tolist(), shares, cropped, strict=True)
        ]
        return list(zip(said, sizes, masks, strict=True))

    def run(
        self, placed: Sequence[tuple[np.ndarray, Size]], masks: Sequence[np.ndarray | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The graph alone: scores `[images]` and maps `[images, height, width]`.

        Args:
            placed: what `on_canvas` gave of each image.
            masks: what `judged` gave of each.

        Raises:
            PatchadError: if an image has no score.
        """
        scores, maps = self._engine.run(inputs_of(placed, masks, self.canvas))
        check_scores(scores)
        return scores, maps


def load(
    path: str | Path,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
    runtime: str = "auto",
    spinning: bool = True,
) -> ExportedDetector:
    """The detector of a file that `patchad export` wrote, ready to score arrays; see `ExportedDetector`."""
    return ExportedDetector(path, threads, providers, runtime, spinning)


def inputs_of(
    placed: Sequence[tuple[np.ndarray, Size]], masks: Sequence[np.ndarray | None], canvas: Canvas
) -> dict[str, np.ndarray]:
    """The inputs of the graph, by name, from what `on_canvas` and `judged` gave of each image."""
    content = np.array([size for _, size in placed], np.int64)  # NumPy 1 would take int32 on Windows
    on_canvases = zip(masks, (size for _, size in placed), strict=True)
    regions = [fitted(mask, size, canvas.image_size) for mask, size in on_canvases if mask is not None]
    region = {"region": np.stack(regions)} if regions else {}
    return {"image": np.stack([image for image, _ in placed]), "content": content, **region}


def trial(path: Path, engine: Engine) -> Arrays:
    """The inputs of one image of noise, by which runtimes are timed.

    Raises:
        PatchadError: if the file is none of patchad's, or of another format.
    """
    canvas = Canvas.of(read_metadata(path, engine)["canvas"])
    noise = np.random.default_rng(0).random((3, *canvas.image_size), dtype=np.float32)
    mask = None if canvas.region is None else np.ones(canvas.image_size, bool)
    return inputs_of([(noise, canvas.image_size)], [mask], canvas)


def checksum_of(path: Path) -> str:
    """The checksum of a file, which fits it; none is in one of another program, or older, which its metadata tell.

    Raises:
        PatchadError: if there is no file, or it is damaged.
    """
    if path.is_dir():
        raise PatchadError(f"{path} is a folder; give the file that patchad export wrote")
    if not path.is_file():
        raise PatchadError(f"{path} does not exist; patchad export --ckpt_path ... --output {path} writes it")
    content = path.read_bytes()
    noted = CHECKSUM.search(content)
    if noted and digest(content, noted.span(1)) != noted[1]:
        raise PatchadError(f"{path} is damaged: its checksum does not fit; copy it again, or export again")
    return noted[1].decode() if noted else ""


def digest(content: bytes, place: tuple[int, int]) -> bytes:
    """Hexadecimal SHA-256 of a file whose bytes at a place are taken as zeros, for they hold what this returns."""
    start, end = place
    return hashlib.sha256(content[:start] + b"0" * (end - start) + content[end:]).hexdigest().encode()


def check_scores(scores: np.ndarray) -> None:
    """Raises PatchadError where a score is no number: no verdict holds then."""
    if not np.isfinite(scores).all():
        raise PatchadError("the score of an image is nan or infinite: weights or banks of the detector are; fit again")


def read_metadata(path: Path, engine: Engine) -> dict[str, Any]:
    """What patchad noted in the file.

    Raises:
        PatchadError: if it is a stranger's, or of another format.
    """
    if engine.noted is None:
        raise PatchadError(f"{path} is an ONNX file, but not one that patchad export wrote")
    metadata = json.loads(engine.noted)
    fitted = metadata.get("format") if isinstance(metadata, dict) else None
    if fitted != EXPORT_FORMAT:
        raise PatchadError(f"{path} has format {fitted!r}; this patchad reads format {EXPORT_FORMAT}: export again")
    if "checksum" not in metadata:
        raise PatchadError(f"{path} has no checksum: another program wrote it; export again")
    return metadata


def to_rgb(image: np.ndarray | str | Path) -> np.ndarray:
    """Float32 `[3, height, width]` in [0, 1].

    Args:
        image: the path of a file, read as `patchad predict` reads it; or an array of uint8, uint16, or floating point
            in [0, 1]: `[height, width]` (grey), `[height, width, channels]` of 1 channel (grey), 3 (RGB) or 4 (alpha is
            dropped), or `[channels, height, width]` of 1 or 3.

    Raises:
        PatchadError: if it is anything else, or the file cannot be read.

    Example:
        >>> to_rgb(np.zeros((32, 48), np.uint8)).shape, to_rgb(np.zeros((3, 32, 48), np.uint8)).shape
        ((3, 32, 48), (3, 32, 48))
    """
    pixels = read_pixels(Path(image)) if isinstance(image, (str, Path)) else image
    if not isinstance(pixels, np.ndarray):
        raise PatchadError(f"a {type(pixels).__name__} is no image; give the path of a file, or an array")
    if pixels.ndim == 3 and pixels.shape[2] not in CHANNELS and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in CHANNELS) or 0 in pixels.shape:
        raise PatchadError(
            f"an array of shape {pixels.shape} is no image; give [height, width], [height, width, channels] or "
            "[channels, height, width] of 1 or 3 channels, or 4 if they come last"
        )
    return in_planes(to_unit(pixels))


def planes_of(image: np.ndarray | str | Path | Picture, canvas: Canvas) -> Picture:
    """An image as `to_rgb` gives it, of a file with as many pixels as a canvas needs, and the size of it.

    Raises:
        PatchadError: as `to_rgb` does.
    """
    picture = read_picture(Path(image), canvas) if isinstance(image, (str, Path)) else image
    if isinstance(picture, Picture):
        return picture._replace(pixels=in_planes(picture.pixels))
    planes = to_rgb(picture)
    return Picture(planes, (planes.shape[1], planes.shape[2]))


def in_planes(values: np.ndarray) -> np.ndarray:
    """`[height, width]` or `[height, width, channels]` as `[3, height, width]`; those of grey share their memory."""
    planes = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)[:3]
    return np.broadcast_to(planes, (3, *values.shape[:2]))


def to_unit(image: np.ndarray) -> np.ndarray:
    """Float32 in [0, 1] of whole numbers by their range, of floating-point ones as they are.

    Raises:
        PatchadError: if the numbers are of another type, or leave [0, 1].
    """
    if image.dtype.newbyteorder("=") in (np.uint8, np.uint16):
        return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)
    if not np.issubdtype(image.dtype, np.floating):
        raise PatchadError(f"an image of {image.dtype} has no known range; give uint8, uint16 or floats in [0, 1]")
    values = image.astype(np.float32)
    if not (values.min() >= 0 and values.max() <= 1):
        raise PatchadError(f"the image holds values from {values.min():g} to {values.max():g}; scale them to [0, 1]")
    return values


def on_canvas(image: np.ndarray, canvas: Canvas) -> tuple[np.ndarray, Size]:
    """The image and height x width of its content, as `patchad.images.on_canvas` gives them."""
    size = canvas.image_size
    content = content_size((image.shape[1], image.shape[2]), size, canvas.keep_aspect)
    if content != image.shape[1:]:
        distinct = image if image.strides[0] else image[:1]  # planes of grey share their memory
        image = np.broadcast_to(np.stack([resize(plane, content) for plane in distinct]), (3, *content))
    image = image * np.float32(gain(float(image.mean()), canvas.brightness))
    padding = ((0, 0), (0, size[0] - content[0]), (0, size[1] - content[1]))
    return np.pad(image, padding, mode="edge"), content


def resize(plane: np.ndarray, size: Size) -> np.ndarray:
    """A plane at another size, bilinear, smoothed where it shrinks."""
    resized = Image.fromarray(np.ascontiguousarray(plane)).resize((size[1], size[0]), BILINEAR)
    return np.asarray(resized)


def off_canvas(values: np.ndarray, content: Size, size: Size) -> np.ndarray:
    """A map's content alone at another size, bilinear, as `patchad.pyramid.crop_resize` does it."""
    cropped = np.ascontiguousarray(values[: content[0], : content[1]])
    if content == size:
        return cropped
    if is_enlarged(content, size):
        return np.array(resize(cropped, size))  # the same numbers, sooner
    scale = (content[1] / size[1], 0, 0, 0, content[0] / size[0], 0)
    return np.array(Image.fromarray(cropped).transform((size[1], size[0]), AFFINE, scale, BILINEAR))


def is_enlarged(content: Size, size: Size) -> bool:
    """Whether content becomes no smaller, so that to resize it smooths nothing."""
    return content[0] <= size[0] and content[1] <= size[1]


def region_above(values: np.ndarray, size: Size, threshold: float, mask: np.ndarray | None = None) -> np.ndarray:
    """Where a map lies above a threshold at another size, bool `[height, width]`; only what may is enlarged.

    Args:
        values: of a map's content, float32 `[height, width]`.
        size: height x width of the image in pixels.
        threshold: of the map.
        mask: what is judged of the image, of that size; None where that is all.

    Example:
        >>> region_above(np.array([[0, 3]], np.float32), (1, 4), 2.0)
        array([[False, False,  True,  True]])
    """
    content, region = (values.shape[0], values.shape[1]), np.zeros(size, bool)
    left, top, right, bottom = box(values > threshold)
    if left is None or top is None or right is None or bottom is None:
        return region
    if is_enlarged(content, size):
        rows, columns = (
            slice(max(0, (first - 1) * long // short), min(long, -(-(last + 1) * long // short)))
            for first, last, long, short in zip((top, left), (bottom, right), size, content, strict=True)
        )
        part = (columns.stop - columns.start, rows.stop - rows.start)
        ends = (columns.start, rows.start, columns.stop, rows.stop)
        source = [end * short / long for end, short, long in zip(ends, content[::-1] * 2, size[::-1] * 2, strict=True)]
        image = Image.fromarray(np.ascontiguousarray(values))
        region[rows, columns] = np.asarray(image.resize(part, BILINEAR, tuple(source))) > threshold
    else:
        region[:] = off_canvas(values, content, size) > threshold
    return region if mask is None else region & mask
