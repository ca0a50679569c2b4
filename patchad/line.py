"""The commands of a machine on the line, without torch: `patchad score`, `patchad benchmark` of an exported file."""

import argparse
import io
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np
from PIL import Image

from patchad.ahead import in_order
from patchad.arrivals import Arrivals
from patchad.decoding import Picture, read_picture
from patchad.drawing import outlined
from patchad.drift import Drift
from patchad.engines import RUNTIMES
from patchad.errors import PatchadError, check_range
from patchad.files import check_writable, map_name, naming, write_picture, write_whole
from patchad.folders import images_below
from patchad.journal import FORMATS, Format, add, opened, paths_so_far
from patchad.results import Row, Source, installed_version, row_of, unreadable
from patchad.runtime import ExportedDetector, load, to_rgb
from patchad.stages import measure_exported, process_memory, stage_table

STDIN = "-"
UNREADABLE, MISTAKE, INTERRUPTED, UNHEARD = 1, 2, 130, 141
"""Exit codes: images could not be read; what the caller can mend; Ctrl-C; who read the rows has left."""
PAUSE, SHARE = 0.2, 0.05
"""Seconds between two looks at a folder that fills, and the most of the time that is spent looking at it."""
LONGEST_SIDE = 1024
"""Pixels of an overlay, at most."""
SUFFIX = ".patchad"
"""Of the files of several products, whose names are before it."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Leaves it to `main`."""
        raise PatchadError(message)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command, and ends the process with one of the exit codes."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")  # any name of a file
    try:
        options = parser().parse_args(arguments)
        sys.exit(options.run(options))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its exit
        sys.exit(UNHEARD)
    except (PatchadError, OSError) as error:
        say(f"patchad: error: {error}")
        sys.exit(MISTAKE)


def parser() -> Parser:
    """The options of both commands."""
    made = Parser(prog="patchad", description="Scores images by a file that patchad export wrote.", allow_abbrev=False)
    made.add_argument("--version", action="version", version=versions())
    verbs = made.add_subparsers(required=True, metavar="score | benchmark")
    score = verbs.add_parser("score", help="score images", description="Scores images.", allow_abbrev=False)
    score.add_argument("--format", choices=FORMATS, default="csv", help="of the rows")
    score.add_argument("--output", type=Path, help="the file of the rows, instead of standard output")
    score.add_argument("--overlays", type=Path, help="a folder for each image with an outline of what is anomalous")
    score.add_argument("--target_fpr", type=float, help="share of normal images that may be called anomalous")
    score.add_argument("--review_fpr", type=float, help="share that may be called anomalous or be looked at")
    score.add_argument("--watch", action="store_true", help="go on with images that arrive in the folder")
    score.add_argument("--drift", type=int, metavar="IMAGES", help="tell when more of the last so many are unusual")
    score.add_argument("--product", metavar="NAME", help="of all images; as a rule their first folder names it")
    score.set_defaults(run=run_score)
    benchmark = verbs.add_parser("benchmark", help="time an exported file", allow_abbrev=False)
    benchmark.add_argument("--images", type=Path, help="a folder; by default, noise of the size that the file reads")
    benchmark.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="images per batch")
    benchmark.add_argument("--repeats", type=int, default=10, help="timed runs")
    benchmark.set_defaults(run=run_benchmark)
    models = {score: ", or a folder of such files, NAME.patchad for each product", benchmark: ""}
    for verb in models:
        verb.add_argument("model", type=Path, help=f"the file that patchad export wrote{models[verb]}")
        verb.add_argument("--threads", type=int, help="of the CPU; by default one per core")
        verb.add_argument("--runtime", choices=RUNTIMES, default="auto", help="by default the one that is faster here")
    score.add_argument("images", help="a folder, an image, or - for one path a line from standard input")
    return made


def versions() -> str:
    """Of patchad, and of torch and Lightning where they are installed, in one line; imports none of them."""
    others = [f"{name} {version(name)}" for name in ("torch", "pytorch_lightning") if find_spec(name)]
    return ", ".join([f"patchad {installed_version()}", *others])


class Stop:
    """Whether a signal has asked for the end; what is in work is not torn by it."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, *_: object) -> None:
        """Notes it."""
        self.asked = True


class Line:
    """Scores image files, on several threads if these call it, and keeps count.

    Args:
        detector: the exported file.
        root: of the images, whose folders overlays have, too; without it those below the current one, or the disk's.
        overlays: the folder for them; None draws none.
        drift: told of each p-value, in the order in which rows are counted.
        product: is named where drift is told; empty where there is one alone.

    Attributes:
        counts: images of each verdict.
        drift: see above.
        runtime: what runs the graph.
    """

    def __init__(
        self,
        detector: ExportedDetector,
        root: Path | None,
        overlays: Path | None,
        drift: Drift | None,
        product: str = "",
    ) -> None:
        self._detector, self._root, self._overlays = detector, root, overlays
        self.drift, self._product, self.runtime = drift, product, detector.runtime
        checkpoint = detector.metadata["checkpoint"]
        self._model, self._version = checkpoint["sha256"] if checkpoint else "", installed_version()
        self.counts: Counter[str] = Counter()

    def __call__(self, name: str) -> Row:
        """The row of an image.

        Args:
            name: the path of its file.
        """
        limits, source = self._detector.limits, Source(self._model, self._version, time_now())
        try:
            picture = read_picture(Path(name), self._detector.canvas)
        except PatchadError as error:
            return unreadable(name, str(error), limits, source)
        scored, region = self._detector.find(picture)
        self._show(Path(name), picture, region)
        return row_of(name, scored, limits, source, region=region)

    def count(self, row: Row) -> None:
        """Counts a row, in the order of the images; says where drift begins or ends with it."""
        self.counts[row.verdict] += 1
        if self.drift and row.p_value is not None and (change := self.drift.take(row.p_value)):
            say_of(self._product, change)

    def _show(self, path: Path, picture: Picture, region: np.ndarray) -> None:
        """Draws what is above the threshold of the map."""
        if self._overlays is None:
            return
        drawn, place = overlay(picture.pixels, region), self._overlays / place_below(self._root, path)
        name = map_name(place.name, ".overlay.png")
        try:
            write_picture(place.with_name(name), drawn)
        except OSError as error:
            raise PatchadError(str(error)) from error  # else it would seem to be of the file of rows


class Lines:
    """The lines of several products, which count together; as `Line` it may be called on several threads.

    Args:
        lines: by product.
        root: of the images; the first folder below it names their product.

    Attributes:
        counts: images of each verdict.
    """

    def __init__(self, lines: Mapping[str, Line], root: Path) -> None:
        self._lines, self._root, self._unknown = lines, root, set[str]()
        self.counts: Counter[str] = Counter()
        for line in lines.values():
            line.counts = self.counts

    def __call__(self, name: str) -> Row:
        """The row of an image; of one of no known product, there is no score.

        Args:
            name: the path of its file, below the root.
        """
        product = product_of(self._root, name)
        if line := self._lines.get(product):
            return line(name)
        reason = f"{self._root / product} is of no product: there is no {product}{SUFFIX}"
        if not product:
            reason = f"{name} lies in no folder of a product"
        return Row(name, reason=reason, version=installed_version(), time=time_now())

    def count(self, row: Row) -> None:
        """Counts a row, in the order of the images; says once of each product that it is not known."""
        product = product_of(self._root, row.path)
        if line := self._lines.get(product):
            line.count(row)
            return
        self.counts[row.verdict] += 1
        if product and product not in self._unknown:
            self._unknown.add(product)
            say(row.reason)


def product_of(root: Path, name: str) -> str:
    """The first folder below a root on the way to an image; empty for one that lies in the root itself."""
    return next(iter(Path(name).relative_to(root).parent.parts), "")


def overlay(pixels: np.ndarray, region: np.ndarray) -> Image.Image:
    """An image with the outline of a region, no larger than can be looked at.

    Args:
        pixels: as `to_rgb` takes them; of an image that was reduced, fewer than the region has.
        region: bool `[height, width]`; of it, no pixel is lost.
    """
    height, width = region.shape
    share = min(1.0, LONGEST_SIDE / max(height, width))
    size = (max(1, round(width * share)), max(1, round(height * share)))
    image = Image.fromarray((to_rgb(pixels).transpose(1, 2, 0) * 255).round().astype(np.uint8))
    image = image.resize(size, Image.Resampling.BOX if image.width > size[0] else Image.Resampling.BILINEAR)
    if share < 1:
        region = np.asarray(Image.fromarray(region.astype(np.float32)).resize(size, Image.Resampling.BOX)) > 0
    return Image.fromarray(outlined(np.asarray(image), region))


def time_now() -> str:
    """As ISO 8601 with the zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def place_below(root: Path | None, path: Path) -> Path:
    """The path from a root; without one from the current folder where it lies below that, else from the disk's."""
    if root is not None:
        return path.relative_to(root)
    whole, here = Path(os.path.abspath(path)), Path.cwd()
    return whole.relative_to(here if whole.is_relative_to(here) else whole.anchor)


def run_score(options: argparse.Namespace) -> int:
    """`patchad score`; returns its exit code."""
    begun = time.perf_counter()
    choose_product(options)
    check_score(options)
    names = image_names_of(options)
    stop = Stop() if options.watch else None
    lines = {product: line_of(product, path, options) for product, path in files_of(options, names).items()}
    line = Lines(lines, Path(options.images)) if options.model.is_dir() else lines[""]
    form = FORMATS[options.format]
    if stop:
        watch(line, options, form, stop)
    elif options.output:
        write_whole(options.output, lambda part: write_file(part, form, line, names, options.threads))
    else:
        write(sys.stdout, form, line, names, options.threads)
    told = ", ".join(f"{line.counts[verdict]} {verdict}" for verdict in ("anomalous", "review", "normal", "unreadable"))
    runtimes = " and ".join(sorted({each.runtime for each in lines.values()}))
    say(f"{line.counts.total()} images: {told}; {time.perf_counter() - begun:.1f} s by {runtimes}")
    for product, one in lines.items():
        if one.drift and not one.drift.full:
            told = f"drift: fewer than {options.drift} images were scored, and nothing can be said of them"
            say_of(product, told)
    return UNREADABLE if line.counts["unreadable"] and not stop else 0


def choose_product(options: argparse.Namespace) -> None:
    """Takes the file, and the folder of images if there is one, of the product that is named.

    Raises:
        PatchadError: if there is no such product, or it must be named.
    """
    images, model, product = Path(options.images), options.model, options.product
    if not model.is_dir():
        if product is not None:
            raise PatchadError(f"--product {product} chooses a file of a folder, and {model} is none; leave it out")
        return
    known = {path.stem: path for path in exported_below(model)}
    if product is None:
        if options.images == STDIN or images.is_file():
            raise PatchadError(f"{options.images} names no product; give --product, one of {', '.join(known)}")
        return
    if product not in known:
        raise PatchadError(f"--product {product} is none of {', '.join(known)}")
    options.model = known[product]
    if options.images != STDIN and (images / product).is_dir():
        options.images = str(images / product)


def exported_below(folder: Path) -> list[Path]:
    """The files of products in a folder.

    Raises:
        PatchadError: if there are none.
    """
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise PatchadError(f"{folder} is a folder without a file NAME{SUFFIX}; patchad export writes them")
    return files


def files_of(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Path]:
    """The exported files that are needed, by product; without a name where there is one alone."""
    if not options.model.is_dir():
        return {"": options.model}
    named = {product_of(Path(options.images), name) for name in names}
    return {path.stem: path for path in exported_below(options.model) if options.watch or path.stem in named}


def line_of(product: str, path: Path, options: argparse.Namespace) -> Line:
    """What scores by an exported file, of a product if there are several."""
    detector = load(path, options.threads, runtime=options.runtime, spinning=False)  # images are decoded beside it
    set_limits(detector, options, product)
    return Line(detector, root_of(options.images), options.overlays, drift_of(options, detector, product), product)


def check_score(options: argparse.Namespace) -> None:
    """Raises PatchadError, or OSError, where options do not fit each other or nothing can be written."""
    check_range({"--drift": options.drift}, 1)
    images, output = Path(options.images), options.output
    if options.images != STDIN and not images.exists():
        raise PatchadError(f"{images} does not exist; give a folder, an image, or - for paths from standard input")
    if options.watch and not images.is_dir():
        raise PatchadError(f"--watch follows a folder, and {images} is none")
    if options.watch and output is None:
        raise PatchadError("--watch needs --output, the file by which it knows what is done when it starts again")
    if options.review_fpr is not None and options.target_fpr is None:
        raise PatchadError(f"--review_fpr {options.review_fpr:g} needs --target_fpr, above which it begins")
    if options.overlays and images.is_dir() and options.overlays.resolve().is_relative_to(images.resolve()):
        raise PatchadError(f"--overlays {options.overlays} lies in {images}, where they would be scored, too")
    if output and output.is_dir():
        raise PatchadError(f"--output {output} is a folder; give a file, such as {output / 'scores.csv'}")
    if output:
        check_writable(output)


def image_names_of(options: argparse.Namespace) -> Iterable[str]:
    """Paths of the images to score; none where they are still to come."""
    if options.watch:
        return []
    if options.images == STDIN:
        return (name for line in sys.stdin if (name := line.rstrip("\r\n")))
    path = Path(options.images)
    return [str(image) for image in images_below(path)] if path.is_dir() else [options.images]


def root_of(images: str) -> Path | None:
    """The folder that images are told of from; None where their paths come from standard input."""
    path = Path(images)
    return None if images == STDIN else path if path.is_dir() else path.parent


def set_limits(detector: ExportedDetector, options: argparse.Namespace, product: str) -> None:
    """Sets the limits that are asked for; says where so few normal images cannot promise them."""
    target = options.target_fpr
    if target is None:
        return
    promised = detector.set_target_fpr(target, options.review_fpr)
    if promised > target:
        count = len(detector.normals)
        told = f"{count} normal images cannot promise a false-positive rate of {target:g}, only {promised:.3g}"
        say_of(product, told)


def drift_of(options: argparse.Namespace, detector: ExportedDetector, product: str) -> Drift | None:
    """What watches for drift, if that is asked for and can be."""
    if options.drift is None:
        return None
    try:
        return Drift(options.drift, len(detector.normals))
    except PatchadError as error:
        say_of(product, f"drift cannot be told: {error}")
        return None


def write(file: TextIO, form: Format, line: Line | Lines, names: Iterable[str], threads: int | None) -> None:
    """Writes the rows of images in their order, each as soon as it can be."""

    def take(row: Row) -> None:
        """Counts and writes a row."""
        line.count(row)
        add(file, form.line(row))

    add(file, form.head)
    in_order(line, take, names, threads)


def write_file(path: Path, form: Format, line: Line | Lines, names: Iterable[str], threads: int | None) -> None:
    """Writes them into a file."""
    with opened(path, "w") as file:
        write(file, form, line, names, threads)


def watch(line: Line | Lines, options: argparse.Namespace, form: Format, stop: Stop) -> None:
    """Adds a row for each image that arrives in a folder, until a signal asks for the end.

    Images in work then still get their rows.

    Args:
        line: scores them.
        options: the folder where they arrive, and the file: what is in it is done, and is not scored again.
        form: of the rows.
        stop: of the signals.
    """
    done = paths_so_far(options.output, form)
    with opened(options.output, "a") as file, naming(options.output):

        def take(row: Row) -> None:
            """Counts and writes a row, and remembers its image; tells of one that is gone."""
            if row.score is None and not os.path.exists(row.path):
                say_gone(row.path)
                return
            line.count(row)
            add(file, form.line(row))
            done.add(row.path)

        if not file.tell():
            add(file, form.head)
        for names in arriving(Arrivals(Path(options.images), done), stop):
            in_order(line, take, takewhile(lambda _: not stop.asked, names), options.threads)


def arriving(arrivals: Arrivals, stop: Stop) -> Iterator[list[str]]:
    """Paths of images as they arrive, those of one look together."""
    next_look = 0.0
    while not stop.asked:
        begun = time.monotonic()
        if begun >= next_look:
            whole, gone = arrivals.look(begun)
            next_look = begun + (time.monotonic() - begun) / SHARE
            for name in gone:
                say_gone(name)
            yield whole
        time.sleep(PAUSE)


def say_gone(name: str) -> None:
    """Tells of an image that went before it was scored."""
    say(f"{name} vanished before it was read, and is left out")


def run_benchmark(options: argparse.Namespace) -> int:
    """`patchad benchmark` of an exported file; returns its exit code."""
    check_range({"--repeats": options.repeats, "--batch_sizes": min(options.batch_sizes)}, 1)
    if options.images and not options.images.is_dir():
        raise PatchadError(f"--images {options.images} does not exist or is no folder")
    paths = images_below(options.images) if options.images else None
    if options.model.is_dir():
        files = ", ".join(map(str, exported_below(options.model)))
        raise PatchadError(f"patchad benchmark takes the file of one product; give one of {files}")
    detector = load(options.model, options.threads, runtime=options.runtime)
    size = detector.canvas.image_size
    noise = np.random.default_rng(0).random((3, *size), dtype=np.float32)
    threads = f"threads: {options.threads}" if options.threads else "one thread per core"
    print(f"{options.model}: {size[0]} x {size[1]} pixels; {detector.runtime}, {threads}")
    for count in options.batch_sizes:
        images = [paths[number * len(paths) // count] for number in range(count)] if paths else [noise] * count
        rows = measure_exported(detector, images, options.repeats)
        print(f"\nbatch {count}\n", stage_table(rows), sep="\n")
        rate = 1e3 * count / float(np.median(rows[-1].times))
        print(f"\n{rate:.1f} images/s, peak memory {process_memory():.0f} MB", flush=True)
    return 0


def say(text: str) -> None:
    """Tells the caller, beside the rows: one line."""
    print(" ".join(text.split()), file=sys.stderr, flush=True)


def say_of(product: str, text: str) -> None:
    """Tells it of a product, if there are several."""
    say(f"{product}: {text}" if product else text)
