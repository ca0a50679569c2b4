"""Several products: a command runs once for each, in a run folder of its own, and ends with a table of all."""

import csv
import gc
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from pytorch_lightning import Callback
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from patchad import cli
from patchad.callbacks.rows import Rows
from patchad.callbacks.summary import percent
from patchad.cli import CONFIG_OPTIONS, PatchadCLI, option_values, read_config, resolve_configs
from patchad.conformal import conformal_threshold
from patchad.data.layouts import known_layout
from patchad.errors import PatchadError, printable
from patchad.files import write_whole
from patchad.folders import is_image
from patchad.loggers import RunLogger
from patchad.results import as_csv, cells

CHECKPOINT = "checkpoints/last.ckpt"
"""Below the run folder of a product."""
WIDEST = 10_000
"""Columns of a table: a terminal breaks its lines, and no path is cut."""
OWN = ("--product", "--trainer.logger.version")
"""Options that no product takes as they are given."""


class Fitted(NamedTuple):
    """What the fit of a product says of it.

    Attributes:
        normals: its normal images.
        threshold: scores above it are anomalous.
        promised: the false-positive rate.
        tests: its images to test.
        checkpoint: the file; empty where none was asked for.
    """

    normals: int
    threshold: float
    promised: float
    tests: int
    checkpoint: str


class Figures(NamedTuple):
    """What the test of a product found, as shares; None where there is no such figure.

    Attributes:
        detection_auroc: of images.
        segmentation_auroc: of pixels.
        pro: per-region overlap.
        false_alarms: normal images that were called anomalous.
        normals: normal images that have a score.
        missed: defective images that were called normal.
        defects: defective images that have a score.
    """

    detection_auroc: float | None
    segmentation_auroc: float | None
    pro: float | None
    false_alarms: int
    normals: int
    missed: int
    defects: int


SHARES = Figures._fields[:3]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command, of one product or of several, and ends the process with its code unless that is 0."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    try:
        commands = commands_of(command)
        code = run_all(command, commands) if commands else cli.run(command).code
    except (PatchadError, OSError) as error:
        print(printable(f"patchad: error: {error}"), file=sys.stderr)
        code = 2
    if code:
        sys.exit(code)


def commands_of(command: Sequence[str]) -> dict[str, list[str]]:
    """The command of each of several products, without the run folder; none where a command is of one product.

    Raises:
        PatchadError: if the command takes one product, or there are no such products.
    """
    verb, *options = [*resolve_configs(command)] or [""]
    run = next(iter(option_values(options, "--ckpt_path")), "")
    fitted = checkpoints_below(Path(run)) if run else {}
    if verb == "fit" and not fitted:
        rest = without(options, OWN)
        return {name: [verb, *rest, f"--data.root={root}"] for name, root in to_fit(options).items()}
    if not fitted:
        return {}
    if verb not in ("test", "predict", "export"):
        paths = ", ".join(map(str, fitted.values()))
        raise PatchadError(f"patchad {verb} takes the checkpoint of one product; give --ckpt_path one of {paths}")
    chosen, rest = choose(fitted, options), without(options, [*OWN, "--ckpt_path", "--output"])
    if verb == "export":
        folder = Path(last(options, "--output") or "models")
        return {name: of(verb, path, rest, f"--output={folder / name}.patchad") for name, path in chosen.items()}
    root = setting(options, "data.root")
    if root is None:
        return {name: of(verb, path, rest) for name, path in chosen.items()}
    places = places_below(Path(root), chosen, fitted)
    return {name: of(verb, chosen[name], rest, f"--data.root={place}") for name, place in places.items()}


def of(verb: str, checkpoint: Path, rest: Iterable[str], *own: str) -> list[str]:
    """The command of a product that was fitted."""
    return [verb, f"--ckpt_path={checkpoint}", *rest, *own]


def checkpoints_below(run: Path) -> dict[str, Path]:
    """The checkpoints of a run folder of several products, by product; none below another folder."""
    return {path.parts[-3]: path for path in sorted(run.glob(f"*/{CHECKPOINT}"))}


def to_fit(options: Sequence[str]) -> dict[str, Path]:
    """The folders of products below the root that is to be fitted, by product; none where it is of one product.

    A layout that is named is that of the root itself.
    """
    root = Path(setting(options, "data.root") or "")
    if setting(options, "data.layout") or not root.name or not root.is_dir() or known_layout(root):
        return {}
    folders = folders_of(root)
    products = {name: folder for name, folder in folders.items() if known_layout(folder)}
    if products:
        tell_left_out(root, "are no products: they have no layout that is known", folders.keys() - products.keys())
    return choose(products, options) if products else {}


def places_below(root: Path, chosen: Mapping[str, Path], fitted: Mapping[str, Path]) -> dict[str, Path]:
    """Where the images of each product are: in the folder of its name, or, of one that is named, in the root.

    Args:
        root: of the images.
        chosen: products that are asked for.
        fitted: all that there are.

    Raises:
        PatchadError: if the root has no folder of theirs.
    """
    if not root.is_dir():
        raise PatchadError(f"data.root {root} does not exist or is no folder")
    folders = folders_of(root)
    if not folders.keys() & fitted.keys() and len(chosen) == 1:
        return dict.fromkeys(chosen, root)
    places = {name: folders[name] for name in chosen if name in folders}
    if not places:
        there = ", ".join(folders) or "no folder"
        raise PatchadError(
            f"data.root {root} has no folder of {', '.join(chosen)}; it has {there}. Where all images below it are of "
            "one product, give --product NAME"
        )
    tell_left_out(root, "are of no product that was fitted", folders.keys() - fitted.keys())
    tell_left_out(root, "lie in no folder of a product", [path.name for path in root.iterdir() if is_image(path)])
    tell_left_out(root, "are not there", chosen.keys() - places.keys())
    return places


def folders_of(root: Path) -> dict[str, Path]:
    """The folders of a root by name, but for hidden ones."""
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def tell_left_out(root: Path, reason: str, names: Iterable[str]) -> None:
    """Names what of a root is left out, and why, if anything is."""
    if told := ", ".join(sorted(names)):
        print(printable(f"left out of {root}, for they {reason}: {told}"), file=sys.stderr)


def choose(products: Mapping[str, Path], options: Sequence[str]) -> dict[str, Path]:
    """The products that --product names, which may be lists; all where it names none.

    Raises:
        PatchadError: if it names another one.
    """
    given = option_values(options, "--product")
    lists = [yaml.load(value, yaml.BaseLoader) if value.startswith("[") else [value] for value in given]
    named = dict.fromkeys(name for names in lists for name in names)
    for name in named:
        if name not in products:
            raise PatchadError(f"--product {name} is none of {', '.join(products)}")
    return {name: products[name] for name in named or products}


def without(options: Sequence[str], names: Iterable[str]) -> list[str]:
    """The options without those of these names, and their values."""
    rest, values = list[str](), False
    for option in options:
        if option.partition("=")[0] in names:
            values = "=" not in option
        elif values and not option.startswith("--"):
            values = False
        else:
            rest.append(option)
    return rest


def last(options: Sequence[str], name: str) -> str | None:
    """The value of an option, of which the last one holds; None without."""
    return next(reversed(option_values(options, name)), None)


def setting(options: Sequence[str], name: str) -> Any:
    """The value of an option, on the command line or in a config file, of which the last one holds; None without."""
    found = None
    for option, following in zip(options, [*options[1:], ""], strict=True):
        key, is_whole, value = option.partition("=")
        value = value if is_whole else following
        if key in CONFIG_OPTIONS and Path(value).is_file():
            inner = in_config(read_config(Path(value)), name)
            found = found if inner is None else inner
        elif key == f"--{name}":
            found = None if value == "null" else value
    return found


def in_config(config: Any, name: str) -> Any:
    """The value of an option in the settings of a config file; None without."""
    for key in name.split("."):
        inner = config.get("init_args", config) if isinstance(config, dict) else {}
        config = inner.get(key) if isinstance(inner, dict) else None
    return config


# runs


def run_all(command: Sequence[str], commands: Mapping[str, list[str]]) -> int:
    """Runs the command of each product, also where one before has failed, and tells of all; returns the exit code."""
    verb, options = command[0], resolve_configs(command[1:])
    figures: dict[str, Any] = {}
    failures: dict[str, str] = {}
    codes = {0}
    read, tell = VERBS[verb]
    logger = None if verb == "export" else run_logger(options)
    folder = Path(logger.log_dir if logger else last(options, "--output") or "models")
    for number, (name, arguments) in enumerate(commands.items(), 1):
        print(printable(f"\nproduct {number} of {len(commands)}: {name}"), flush=True)
        own = [f"--trainer.logger.version={folder.relative_to(logger.root_dir) / name}"] if logger else []
        with environment():
            code, command_line, mistake = cli.run([*arguments, *own])
            if command_line:
                figures[name] = read(command_line)
        del command_line
        gc.collect()  # detectors refer to themselves in a circle: the next one needs the room
        codes.add(code)
        if code:
            failures[name] = mistake or "images could not be read"
    with suppress(OSError):  # there is something in it
        folder.rmdir()
    if figures:
        tell(figures, folder, options)
    for name, mistake in failures.items():
        print(printable(f"failed: {name}: {mistake}"), file=sys.stderr)
    return max(codes)


def run_logger(options: Sequence[str]) -> RunLogger:
    """That of the folder below which each product has a run folder; its number is taken by making it.

    Raises:
        PatchadError: if the logger has no such folder.
    """
    logger = setting(options, "trainer.logger")
    more = option_values(options, "--trainer.logger+")
    if more or (logger is not None and ("RunLogger" not in str(logger) or isinstance(logger, list))):
        raise PatchadError(
            f"--trainer.logger {' '.join(more) or logger}: the run folders of several products are RunLogger's; leave "
            "it out, or take one product at a time"
        )
    version = setting(options, "trainer.logger.version")
    version = int(version) if version and version.isdecimal() else version
    given = {key: setting(options, f"trainer.logger.{key}") for key in ("save_dir", "name")}
    taken = RunLogger(given["save_dir"] or "runs", given["name"], version)
    _ = taken.experiment  # makes it
    return taken


@contextmanager
def environment() -> Iterator[None]:
    """Puts back what Lightning tells further processes by environment variables: else the next run is one of them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# what is told


def of_fit(command_line: PatchadCLI) -> Fitted:
    """What a fit says of its product."""
    scorer = command_line.model.scorer
    _, promised = conformal_threshold(scorer.normals.cpu().numpy(), scorer.target_fpr)
    checkpoint = getattr(command_line.trainer.checkpoint_callback, "best_model_path", "")
    tests = len(command_line.datamodule.test_set)
    return Fitted(len(scorer.normals), float(scorer.threshold), promised, tests, checkpoint)


def of_test(command_line: PatchadCLI) -> Figures:
    """What a test found of its product."""
    metrics = command_line.trainer.callback_metrics
    values = (metrics.get(f"test/{name}") for name in SHARES)
    counts = Counter((row["label"], row["verdict"]) for row in rows_of(command_line))
    normals, defects = (
        sum(count for (label, _), count in counts.items() if label == kind) for kind in ("normal", "anomalous")
    )
    alarms, missed = counts["normal", "anomalous"], counts["anomalous", "normal"]
    shares = [None if value is None else float(value) for value in values]
    return Figures._make([*shares, alarms, normals, missed, defects])


def of_prediction(command_line: PatchadCLI) -> Counter[str]:
    """How many images of a product have which verdict."""
    return Counter(row["verdict"] for row in rows_of(command_line))


def rows_of(command_line: PatchadCLI) -> list[dict[str, str]]:
    """The rows that a test or a prediction wrote."""
    callbacks: list[Callback] = command_line.trainer.callbacks  # type: ignore[attr-defined]
    written = [one.folder / "scores.csv" for one in callbacks if isinstance(one, Rows) and hasattr(one, "rows")]
    return [row for path in written for row in read_rows(path)]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV by the names of its columns."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def tell_fitted(figures: Mapping[str, Fitted], folder: Path, options: Sequence[str]) -> None:
    """Prints a table, and what comes next."""
    rows = [
        [name, str(one.normals), f"{one.threshold:.4g}", f"at most {percent(one.promised)}", one.checkpoint]
        for name, one in figures.items()
    ]
    print_table(["product", "normal images", "threshold", "promised false alarms", "checkpoint"], rows)
    verb = "test" if any(one.tests for one in figures.values()) else "predict --data.root NEW_FOLDER"
    allowed = "".join(f" --allow {shlex.quote(module)}" for module in option_values(options, "--allow"))
    if any(one.checkpoint for one in figures.values()):
        print(printable(f"next: patchad {verb} --ckpt_path {folder}{allowed}"))


def tell_tested(figures: Mapping[str, Figures], folder: Path, options: Sequence[str]) -> None:
    """Prints a table, and writes it as `products.csv`."""
    rows = [*figures.items(), ("all", pooled(list(figures.values())))]
    titles = ["product", "detection AUROC", "segmentation AUROC", "PRO", "false alarms", "missed defects"]
    print_table(titles, [[name, *percents(one)] for name, one in rows])
    path = folder / "products.csv"
    lines = [("product", *Figures._fields), *(cells((name, *one)) for name, one in rows)]
    text = "".join(map(as_csv, lines)).encode("utf-8", "surrogateescape")
    write_whole(path, lambda part: part.write_bytes(text))
    reports = folder / "PRODUCT" / "report.html"
    print(printable(f"reports: {reports}\nfigures: {path}"))


def pooled(figures: Sequence[Figures]) -> Figures:
    """The means of the first three figures where there are such, and the sums of the counts.

    Example:
        >>> pooled([Figures(1.0, None, None, 1, 9, 0, 5), Figures(0.5, 0.75, None, 0, 3, 2, 7)])[:5]
        (0.75, 0.75, None, 1, 12)
    """
    columns = list(zip(*figures, strict=True))
    known = [[value for value in column if value is not None] for column in columns[: len(SHARES)]]
    means = [fmean(values) if values else None for values in known]
    return Figures._make([*means, *map(sum, columns[len(SHARES) :])])


def percents(figures: Figures) -> list[str]:
    """Figures as they are printed."""
    shares = ["-" if value is None else percent(value) for value in figures[: len(SHARES)]]
    return [*shares, f"{figures.false_alarms} of {figures.normals}", f"{figures.missed} of {figures.defects}"]


def tell_predicted(figures: Mapping[str, Counter[str]], folder: Path, options: Sequence[str]) -> None:
    """Prints a table, and where everything is."""
    verdicts = ("anomalous", "review", "normal", "unreadable")
    rows = [[name, *(str(counts[verdict]) for verdict in verdicts)] for name, counts in figures.items()]
    print_table(["product", *verdicts], rows)
    print(printable(f"predictions: {folder / 'PRODUCT' / 'predictions'}"))


def tell_exported(figures: Mapping[str, None], folder: Path, options: Sequence[str]) -> None:
    """Prints what comes next."""
    print(printable(f"\nexported: {', '.join(figures)} to {folder}\nnext:     patchad score {folder} IMAGES"))


@rank_zero_only
def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table without lines."""
    table = Table(*titles, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(printable, row))
    print(flush=True)
    Console(width=WIDEST, markup=False, highlight=False, emoji=False).print(table)


VERBS: dict[str, tuple[Callable[[PatchadCLI], Any], Callable[[Any, Path, Sequence[str]], None]]] = {
    "fit": (of_fit, tell_fitted),
    "test": (of_test, tell_tested),
    "predict": (of_prediction, tell_predicted),
    "export": (lambda _: None, tell_exported),
}
"""Of each command of several products, what is read of one that ran, and how all are told."""
