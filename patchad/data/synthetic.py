"""Seeded pictures of a brushed metal flange on woven cloth, good and defective: the embedded data set."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from rich.progress import track
from scipy import ndimage

from patchad.data.defects import DEFECTS, FORMAT, SMALLEST, Picture, Plane, Region, grid, paint_defect, rotate
from patchad.errors import PatchadError
from patchad.types import NORMAL

MANIFEST = "synthetic.json"
CLOTH = np.array([0.33, 0.40, 0.47], np.float32)
METAL = np.array([0.64, 0.63, 0.60], np.float32)
BORE = np.array([0.12, 0.12, 0.13], np.float32)


def _good_picture(size: int, rng: np.random.Generator) -> Float[np.ndarray, "size size 3"]:
    """A flange on cloth, float32 multiples of 1/255."""
    y, x = ((plane + 0.5) / size - 0.5 for plane in grid((size, size)))
    picture = _cloth(y, x, rng)
    picture = _lay_flange(picture, *_pose(y, x, rng), rng)
    picture = _light(picture, y, x, rng)
    picture += rng.uniform(0.01, 0.025) * rng.standard_normal(picture.shape, dtype=np.float32)
    return _to_bytes(picture).astype(np.float32) / 255


def _pose(y: Plane, x: Plane, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Coordinates in the frame of the flange: shifted and turned a little; lengths in sides of the picture."""
    shift = rng.uniform(-0.05, 0.05, 2)
    return rotate(y - shift[0], x - shift[1], rng.uniform(-0.14, 0.14))


def _cloth(y: Plane, x: Plane, rng: np.random.Generator) -> Picture:
    """Plain weave with a random phase, a small turn, and threads that differ in tone."""
    turned = rotate(y, x, rng.uniform(-0.06, 0.06))
    weft, warp = ((plane / 0.042) + rng.uniform(8, 64) for plane in turned)
    weft_on_top = (np.floor(weft) + np.floor(warp)) % 2 == 0
    thread, crossing = np.where(weft_on_top, weft, warp), np.where(weft_on_top, warp, weft)
    round_thread = np.sin(np.pi * (thread % 1)) ** 0.7 * (0.6 + 0.4 * np.sin(np.pi * (crossing % 1)))
    tones = rng.normal(0, 0.1, (2, 256))
    tone = np.where(weft_on_top, tones[0][weft.astype(int) % 256], tones[1][warp.astype(int) % 256])
    shade = (0.35 + 0.9 * round_thread) * (1 + tone) + np.where(weft_on_top, 0.08, -0.08)
    return CLOTH * shade[..., None].astype(np.float32)


def _lay_flange(picture: Picture, y: Plane, x: Plane, rng: np.random.Generator) -> Picture:
    """The picture with a brushed disc on it that has a bore, six bolt holes and a turned groove."""
    pixel, radius = 1 / picture.shape[0], np.hypot(y, x)
    shadow = _disc(np.hypot(y - 0.015, x - 0.015), 0.385, 0.03)
    picture = picture * (1 - 0.5 * shadow[..., None])
    picture = _over(picture, METAL * _brushed(y, x, rng)[..., None], _disc(radius, 0.38, pixel))
    relief = _ring(radius, 0.37, 0.008) * 0.18 + _ring(radius, 0.17, 0.008) * 0.15 - _ring(radius, 0.185, 0.008) * 0.25
    picture = picture + relief[..., None]
    picture = _over(picture, BORE, _disc(radius, 0.1, pixel))
    bolt = _distance_to_bolts(y, x, 0.275)
    picture = _over(picture, METAL * 1.15, _disc(bolt, 0.038, pixel))
    return _over(picture, BORE, _disc(bolt, 0.03, pixel))


def _distance_to_bolts(y: Plane, x: Plane, radius: float) -> Plane:
    """Distance to the nearest of six points spread evenly on a circle."""
    angle = (np.arctan2(y, x) + np.pi / 6) % (np.pi / 3) - np.pi / 6
    distance = np.hypot(y, x)
    return np.hypot(distance * np.sin(angle), distance * np.cos(angle) - radius)


def _brushed(y: Plane, x: Plane, rng: np.random.Generator) -> Plane:
    """Brightness of brushed metal, about 1: fine streaks along x."""
    size = y.shape[0]
    noise = rng.standard_normal((size, size), dtype=np.float32)
    streaks = ndimage.gaussian_filter(noise, (size / 320, size / 14), mode="wrap", truncate=2.5)
    rows, columns = (y + 0.5) * size, (x + 0.5) * size  # the disc lies within the noise
    fine = ndimage.map_coordinates(streaks / streaks.std(), (rows, columns), order=1, mode="grid-wrap")
    return 1 + rng.uniform(0.05, 0.09) * fine


def _light(picture: Picture, y: Plane, x: Plane, rng: np.random.Generator) -> Picture:
    """The picture under a light of random strength, colour, direction and contrast."""
    slope = rng.uniform(-0.4, 0.4, 2)
    light = rng.uniform(0.7, 1.25) * (1 + slope[0] * y + slope[1] * x)
    colour = 1 + rng.uniform(-0.03, 0.03, 3)
    return np.clip(picture * light[..., None] * colour, 0, 1) ** rng.uniform(0.85, 1.2)


def _disc(distance: Plane, radius: float, softness: float) -> Plane:
    """1 within the radius, 0 outside, with an edge as wide as the softness."""
    return np.clip((radius - distance) / softness + 0.5, 0, 1)


def _ring(distance: Plane, radius: float, width: float) -> Plane:
    """1 on a circle, falling to 0 at the width from it."""
    return np.clip(1 - np.abs(distance - radius) / width, 0, 1)


def _over(picture: Picture, colour: np.ndarray, alpha: Plane) -> Picture:
    """The colour laid over the picture."""
    return picture + alpha[..., None] * (colour - picture)


def _to_bytes(picture: Picture | Region) -> np.ndarray:
    """[0, 1], or False and True, to 8 bits."""
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def write_synthetic(
    root: Path,
    *,
    train: int = 60,
    test_normal: int = 20,
    test_defective: int = 30,
    size: int = 256,
    seed: int = 0,
) -> None:
    """Writes the data set in MVTec AD's layout below the root, whole or not at all; a finished one is left alone.

    Each picture depends on the seed, its split and its number alone, so a larger set begins with a smaller one.

    Args:
        root: the folder to make.
        train: pictures in `train/good`.
        test_normal: pictures in `test/good`.
        test_defective: defective pictures, dealt out to the defect types in turn.
        size: side of the pictures in pixels.
        seed: 0 or more.

    Raises:
        PatchadError: if the root holds anything else, or a number is too small.
    """
    counts = {"train": train, "test_normal": test_normal, "test_defective": test_defective}
    parameters = {"format": FORMAT, **counts, "size": size, "seed": seed}
    _check(parameters)
    if _is_finished(root, parameters):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".synthetic-", dir=root.parent) as folder:
        source = Path(folder) / "set"
        _write_all(source, parameters)
        _move(source, root, parameters)


def _check(parameters: dict[str, int]) -> None:
    least = {"train": 1, "test_normal": 0, "test_defective": 0, "size": SMALLEST, "seed": 0}
    for name, value in least.items():
        if parameters[name] < value:
            raise PatchadError(f"a synthetic set needs {name} {value} or more, not {parameters[name]}")


def _is_finished(root: Path, parameters: dict[str, int]) -> bool:
    """Whether the set is there already; False when the root is missing or empty.

    Raises:
        PatchadError: if the root holds anything else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise PatchadError(
            f"{root} holds no synthetic set ({MANIFEST} is missing); give another data.root, or --data.layout null to "
            "read images of your own there"
        ) from error
    if manifest != parameters:
        raise PatchadError(
            f"{root} holds a synthetic set made with {manifest}, not {parameters}; give another data.root, or delete "
            "this one to have it made anew"
        )
    return True


def _move(source: Path, root: Path, parameters: dict[str, int]) -> None:
    """Renames the finished set to the root, unless another process was first."""
    try:
        if root.is_dir():
            root.rmdir()  # empty: not every system renames onto an empty folder
        os.rename(source, root)
    except OSError:
        if not _is_finished(root, parameters):
            raise


def _write_all(root: Path, parameters: dict[str, int]) -> None:
    size, seed, counts = parameters["size"], parameters["seed"], ("train", "test_normal", "test_defective")
    images = [(split, number) for split, name in enumerate(counts) for number in range(parameters[name])]
    for split, number in track(images, "Writing the synthetic set", transient=True):
        rng = np.random.default_rng((seed, split, number))
        if split == 2:
            turn, kind = divmod(number, len(DEFECTS))
            _write_defective(root, list(DEFECTS)[kind], turn, size, rng)
        else:
            _write(root / ("train", "test")[split] / NORMAL / _name(number), _good_picture(size, rng))
    (root / MANIFEST).write_text(json.dumps(parameters, indent=1) + "\n")


def _write_defective(root: Path, kind: str, number: int, size: int, rng: np.random.Generator) -> None:
    painted, mask = paint_defect(_good_picture(size, rng), rng, kind)
    _write(root / "test" / kind / _name(number), painted)
    _write(root / "ground_truth" / kind / _name(number, "_mask"), mask)


def _write(path: Path, picture: Picture | Region) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_to_bytes(picture)).save(path, compress_level=1)


def _name(number: int, suffix: str = "") -> str:
    return f"{number:03d}{suffix}.png"
