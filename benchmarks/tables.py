"""The paper's tables, and more, on real data, as Markdown.

python -m benchmarks.tables --table default --data "{transistor: mvtec_ad/transistor, magnetic_tile: magnetic_tile}"

Rows stand in benchmarks/tables.yaml. Each is `patchad fit` and `patchad test`, run once and kept below `runs/tables`
under the hash of its resolved configuration, so a table that was stopped goes on where it was, and a fit with its last
checkpoint. The hash does not know the code: after a change that fits or scores differently, give another `--folder`.
Tables 2 to 5 take hours of a GPU: benchmarks/paper.py runs them in portions.
"""

import contextlib
import csv
import io
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import auto_cli
from torch import nn

import patchad.models
from benchmarks.speed import filled
from patchad import cli
from patchad.checkpoint import read_checkpoint
from patchad.model import PatchModel, ScoringModel
from patchad.models.backbones import Backbone
from patchad.spec import digest
from patchad.timing import alternate

TABLES: dict[str, list[dict[str, Any]]] = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text())
TILES = "magnetic_tile"
SPLITS = ("published", "by_tile")
SEEDED = ("bank", "learning")
"""Options of the model that have a seed."""
PAPER_STRIDES = {64: 16, 32: 4, 16: 2}
"""Of the tap that each side reads on VGG16, in pixels."""
COLUMNS = (
    "row",
    "data",
    "honest: detection / segmentation",
    "best epoch on test",
    "paper",
    "by defect and side",
    "ms per image",
    "configuration",
    "budget",
    "fit + test",
)
NO_WEIGHTS = "cannot download"
AUROCS = ("detection_auroc", "segmentation_auroc")
PEAK = """\
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""
"""Runs a command and says its peak memory in kB; it would count what is held here, were it started from here."""


class NoWeightsError(Exception):
    """Weights are neither in a file nor to be downloaded."""


class Images(NamedTuple):
    """A data set as options of the command line."""

    name: str
    options: list[str]


class Ran(NamedTuple):
    """What a command took: seconds, and the peak memory of its largest process in MB."""

    seconds: float
    megabytes: float


class Fitted(NamedTuple):
    """What one fit left.

    Attributes:
        home: its run folder.
        config: resolved.
        epochs: that were learned.
        of: so many are to be learned; 0 where nothing is.
        seconds: that it took, in all its parts, with its members' where it is an ensemble.
        megabytes: its peak memory.
    """

    home: Path
    config: dict[str, Any]
    epochs: int = 0
    of: int = 1
    seconds: float = 0.0
    megabytes: float = 0.0

    @property
    def checkpoint(self) -> Path:
        """That of the last epoch."""
        return self.home / "checkpoints" / "last.ckpt"

    @property
    def done(self) -> bool:
        """Whether there is nothing left to be learned."""
        return self.epochs == self.of


class Result(NamedTuple):
    """What one seed of a row gave.

    Attributes:
        metrics: of `patchad test`, in %.
        best: AUROCs of the epoch that is best on test, in %, and its number; None where none was looked for.
        milliseconds: per image, eager, batch 1.
        configuration: hash of the resolved configuration.
        budget: epochs, steps, and whether features were cached.
        seconds: of fit and of test.
    """

    metrics: dict[str, float]
    best: dict[str, float] | None
    milliseconds: float
    configuration: str
    budget: str
    seconds: tuple[float, float]


def main(
    table: str,
    data: dict[str, Path] | None = None,
    seeds: tuple[int, ...] = (0,),
    weights: Path = Path("weights"),
    folder: Path = Path("runs/tables"),
    validations: int = 1,
    options: tuple[str, ...] = (),
) -> None:
    """Prints one table, row by row.

    Args:
        table: which: default, 1 (sizes and times, no data), 2, 3, 4, 5, losses, precision.
        data: folder of each data set by name; `magnetic_tile` is tested by both its splits, and alone in table 4.
        seeds: of everything; rows of ablations take the first.
        weights: folder of files of ImageNet weights.
        folder: where runs are kept.
        validations: how often each fit is measured on the test images, for the protocol of the paper, which takes the
            best epoch on test; 1 measures the last epoch only, and both protocols agree.
        options: further ones for every row of `patchad fit`.
    """
    if table == "1":
        return print(*model_lines(TABLES[table]), sep="\n")
    print(f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n", flush=True)
    for row in TABLES[table]:
        for images in images_of(row, data or {}):
            chosen = seeds if row.get("seeds") == "all" else seeds[:1]
            try:
                fits = (fit(row, images, seed, weights, folder, validations, options) for seed in chosen)
                results = [tested(row, fitted) for fitted in fits]
                print(markdown(row, images, results), flush=True)
            except NoWeightsError:
                print(
                    f"| {row['name']} | {images.name} | not run: no weights |" + " |" * (len(COLUMNS) - 3), flush=True
                )


@torch.inference_mode()
def model_lines(rows: Sequence[dict[str, Any]], repeats: int = 10) -> list[str]:
    """Size, depth and time of each backbone up to its deepest tap, and of the whole model, with random weights.

    The model is the paper's; on a GPU it is timed in sliding mode, too, as the paper has it.
    """
    device, tasks = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    modes = ("dense", "sliding") if device.type == "cuda" else ("dense",)
    sizes = ("backbone", "convolutions", "its parameters", "those of the encoders", "its ms per image")
    columns = (*sizes, *(f"all, {mode}, ms per image" for mode in modes), "paper")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    models = {(row["name"], mode): paper_model(row["name"], mode).to(device) for row in rows for mode in modes}
    image = torch.rand(1, 3, 256, 256, device=device)
    for (name, mode), model in models.items():
        taps = sorted(set(model.encoder.tap_names.values()))
        tasks[name, "backbone"] = partial(model.encoder.backbone, image, taps)
        tasks[name, mode] = partial(model, image)
    medians = {task: statistics.median(runs) for task, runs in alternate(tasks, repeats, device).items()}
    for row in rows:
        name, encoder = row["name"], models[row["name"], "dense"].encoder
        used = encoder.backbone.until(encoder.tap_names.values())
        depth = sum(isinstance(layer, nn.Conv2d) for layer in used.modules())
        each = " | ".join(f"{medians[name, part]:.1f}" for part in ("backbone", *modes))
        cells = (name, f"{depth}", millions(used), millions(encoder.encoders), each, row.get("paper", "-"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def paper_model(name: str, mode: str) -> PatchModel:
    """The model of `--config paper` on a backbone with random weights, and 10 000 random vectors in each bank."""
    backbone = getattr(patchad.models, name)(weights="none")
    options = {"scoring_strides": {64: 16, 32: 4, 16: 4}} if mode == "sliding" else {}
    return filled(backbone, 10_000, mode=mode, taps=paper_taps(backbone), **options)


def paper_taps(backbone: Backbone) -> dict[int, str]:
    """For each side the deepest tap whose stride is at most that which the paper's has on VGG16."""
    strides = {name: tap.stride for name, tap in backbone.taps.items()}
    fitting = {side: [name for name in strides if strides[name] <= most] for side, most in PAPER_STRIDES.items()}
    return {
        side: names[-1] if names else min(strides, key=lambda name: strides[name]) for side, names in fitting.items()
    }


def millions(module: nn.Module) -> str:
    """Its parameters, in millions."""
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"


def images_of(row: dict[str, Any], data: Mapping[str, Path]) -> list[Images]:
    """The data sets of a row: all, or those that it names in `only`."""
    named = {name: root for name, root in data.items() if name in row.get("only", data)}
    return [images for name, root in named.items() for images in splits(name, root)]


def splits(name: str, root: Path) -> Iterator[Images]:
    """The data set, by both splits if it is Magnetic Tile."""
    if name != TILES:
        yield Images(name, ["--data.root", str(root)])
        return
    for split in SPLITS:
        layout = ["--data.layout", "MagneticTile", "--data.layout.split", split]
        yield Images(f"{name}, {split}", [*layout, "--data.root", str(root)])


def fit(
    row: dict[str, Any],
    images: Images,
    seed: int,
    weights: Path,
    folder: Path,
    validations: int,
    options: Sequence[str],
    deadline: float = math.inf,
) -> Fitted:
    """Fits, unless that was done before; first the members of an ensemble.

    Args:
        row: of tables.yaml.
        images: what it is fitted on.
        seed: of everything.
        weights: folder of files of weights.
        folder: where runs are kept.
        validations: how often it is measured on the test images; 1 is never before its end.
        options: further ones.
        deadline: seconds since 1970 after which no epoch begins; see `Progress`.

    Raises:
        NoWeightsError: if the weights are absent.
    """
    given = [*row.get("options", []), *named_weights(row, weights), *options]
    fit_member = partial(fit, images=images, seed=seed, weights=weights, folder=folder, validations=validations)
    members = [fit_member(member, options=options) for member in row.get("members", [])]
    if members:
        given += ["--model.members", json.dumps([str(member.checkpoint) for member in members])]
    place = [*images.options, *row.get("data", [])]
    resolved = configuration(*given, *place)
    key = f"{digest(without_place(resolved))}-{digest([place, validations])}-{seed}"
    epochs = resolved["trainer"]["max_epochs"]
    watched = ["--data.validate_on", "test" if validations > 1 else "none"]
    watched += ["--trainer.check_val_every_n_epoch", str(max(1, epochs // validations))]
    if deadline < math.inf:
        progress = {"class_path": "benchmarks.progress.Progress", "init_args": {"deadline": deadline}}
        watched += ["--trainer.callbacks", json.dumps([progress])]
    logged = ["--trainer.logger.save_dir", str(folder), "--trainer.logger.version", key]
    fitted = go_on(Fitted(folder / key, resolved), ["fit", *given, *place, *seeds(resolved, seed), *watched, *logged])
    return fitted._replace(seconds=fitted.seconds + sum(member.seconds for member in members))


def named_weights(row: dict[str, Any], weights: Path) -> list[str]:
    """The option of the file that a row names.

    Raises:
        NoWeightsError: if it is absent, and torchvision's are not meant.
    """
    path = weights / row.get("weights", ".")
    if path.is_file():
        return ["--model.backbone.weights", str(path)]
    if not row.get("download", True):
        raise NoWeightsError
    return []


def go_on(fitted: Fitted, command: Sequence[str]) -> Fitted:
    """Fits from the last checkpoint, if there is one, unless nothing is left to be learned."""
    note, logged = fitted.home / "fitted.json", fitted.home / "metrics.csv"
    if note.is_file():
        fitted = fitted._replace(**json.loads(note.read_text()))
    if fitted.done:
        return fitted
    if fitted.checkpoint.is_file():
        command = [*command, "--ckpt_path", str(fitted.checkpoint)]
    if logged.is_file():  # the logger would begin anew
        logged.rename(logged.with_name(f"metrics_{len(list(fitted.home.glob('metrics*'))):03}.csv"))
    ran = timed(*command)
    epochs, steps = progress(fitted.checkpoint)
    of = fitted.config["trainer"]["max_epochs"] if steps else 0
    took = {"seconds": fitted.seconds + ran.seconds, "megabytes": max(fitted.megabytes, ran.megabytes)}
    note.write_text(json.dumps({"epochs": epochs, "of": of, **took}))
    return fitted._replace(epochs=epochs, of=of, **took)


def progress(checkpoint: Path) -> tuple[int, int]:
    """How many epochs and steps were learned."""
    saved = read_checkpoint(checkpoint)
    return saved["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], saved["global_step"]


def seeds(config: dict[str, Any], seed: int) -> list[str]:
    """The options that seed all that a resolved configuration has."""
    model = config["model"]["init_args"]
    seeded = [f"model.{part}" for part in SEEDED if model.get(part)] + ["model"] * ("seed" in model)
    return ["--seed_everything", str(seed), *(f"--{part}.seed={seed}" for part in ("data", *seeded))]


def tested(row: dict[str, Any], fitted: Fitted) -> Result:
    """Tests what was fitted, unless that was done before."""
    home, checkpoint = fitted.home, fitted.checkpoint
    version = f"{home.name}-test-{digest(row.get('test', []))}" + ("" if fitted.done else f"-{fitted.epochs}")
    place = ["--trainer.logger.save_dir", str(home.parent), "--trainer.logger.version", version]
    test = ["--ckpt_path", str(checkpoint), *row.get("test", []), *place]
    seconds = once(home.with_name(version) / "test.json", lambda: timed("test", *test).seconds)
    return Result(
        metrics=measured(home.with_name(version) / "metrics.csv", "test/")[-1],
        best=best_epoch(home),
        milliseconds=once(home / "milliseconds.json", lambda: milliseconds(checkpoint, fitted.config)),
        configuration=digest(without_place(fitted.config)),
        budget=budget(fitted),
        seconds=(fitted.seconds, seconds),
    )


def configuration(*options: str) -> dict[str, Any]:
    """What a fit with these options resolves to.

    Raises:
        RuntimeError: if they are refused.
    """
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        cli.main(["fit", *options, "--print_config"])
    if not printed.getvalue():
        raise RuntimeError(f"patchad fit refuses {' '.join(options)}")
    return yaml.safe_load(printed.getvalue())


def timed(*arguments: str) -> Ran:
    """What a command of patchad takes, in a process of its own.

    Raises:
        NoWeightsError: if it ends with an error about weights.
    """
    return in_process([sys.executable, "-m", "patchad", *arguments])


def in_process(command: Sequence[str]) -> Ran:
    """What a command takes.

    Raises:
        NoWeightsError: if it ends with an error about weights.
        RuntimeError: if it ends with another one.
    """
    start = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True)
    if ended.returncode:
        if NO_WEIGHTS in ended.stderr:
            raise NoWeightsError
        raise RuntimeError(f"{' '.join(command)}\n{ended.stderr}")
    return Ran(time.perf_counter() - start, int(ended.stderr.split()[-1]) * 1024 / 1e6)


def once(path: Path, make: Any) -> Any:
    """What is kept in a file, or else what is made now, and kept when it is whole."""
    if not path.is_file():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made))
    return json.loads(path.read_text())


def without_place(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration without what differs between data sets, seeds and machines, and what only watches."""
    config = json.loads(json.dumps(config))
    for name in ("config", "ckpt_path", "seed_everything"):
        config.pop(name, None)
    for name in ("root", "layout", "seed", "num_workers", "max_megapixels", "validate_on"):
        config["data"]["init_args"].pop(name, None)
    for name in ("callbacks", "logger", "check_val_every_n_epoch", "default_root_dir"):
        config["trainer"].pop(name, None)
    model = config["model"]["init_args"]
    model.pop("seed", None)
    for part in SEEDED:
        if model.get(part):
            model[part]["init_args"].pop("seed", None)
    if "members" in model:  # each by the hash of its own configuration, with which its folder's name begins
        model["members"] = [Path(member).parent.parent.name[:8] for member in model["members"]]
    backbone = (model.get("backbone") or {}).get("init_args", {})
    if "weights" in backbone:
        backbone["weights"] = "none" if backbone["weights"] == "none" else "imagenet"
    return config


def measured(path: Path, prefix: str) -> list[dict[str, float]]:
    """The rows of a metrics file that have figures below a prefix, in %; none where nothing was logged."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [
            {name.removeprefix(prefix): 100 * float(value) for name, value in row.items() if value and prefix in name}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row]


def by_epoch(home: Path) -> dict[int, dict[str, float]]:
    """What a fit logged of each epoch, by its number, in all its parts; of one that was learned twice, the last."""
    epochs: dict[int, dict[str, float]] = {}
    for path in (*sorted(home.glob("metrics_*.csv")), *home.glob("metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                figures = {name: float(value) for name, value in row.items() if value and "/" in name}
                epochs.setdefault(int(row["epoch"]) + 1, {}).update(figures)
    return dict(sorted(epochs.items()))


def best_epoch(home: Path) -> dict[str, float] | None:
    """The paper's protocol: the epoch whose sum of both AUROCs is highest on test; None if none was measured."""
    rows = [
        {"epoch": epoch, **{name: 100 * figures[f"val/{name}"] for name in AUROCS}}
        for epoch, figures in by_epoch(home).items()
        if f"val/{AUROCS[0]}" in figures
    ]
    return max(rows, key=lambda row: sum(row[name] for name in AUROCS), default=None)


@torch.inference_mode()
def milliseconds(checkpoint: Path, config: dict[str, Any]) -> float:
    """Median time per image of the fitted model, eager, batch 1, on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ScoringModel.load(checkpoint, device)
    image = torch.rand(1, 3, *config["data"]["init_args"]["image_size"], device=device)
    return statistics.median(alternate({"model": lambda: model(image)}, 5, device)["model"])


def budget(fitted: Fitted) -> str:
    """Epochs, which there are none of where nothing is learned, steps, and whether features were cached."""
    _, steps = progress(fitted.checkpoint)
    learning = fitted.config["model"]["init_args"].get("learning") or {}
    cached = "cached" if learning.get("init_args", {}).get("cache") else "not cached"
    epochs = f"{fitted.epochs}" if fitted.done else f"{fitted.epochs} of {fitted.of}"
    return f"{epochs} epochs, {steps} steps, {cached}"


def markdown(row: dict[str, Any], images: Images, results: Sequence[Result]) -> str:
    """One line."""
    first = results[0]
    best = [result.best for result in results if result.best]
    fit, test = (statistics.mean(result.seconds[number] for result in results) for number in range(2))
    cells = [
        row["name"],
        images.name,
        pair([result.metrics for result in results]) + (f" ({len(results)} seeds)" if len(results) > 1 else ""),
        pair(best) if best else "-",
        row.get("paper", "-"),
        apart([result.metrics for result in results]),
        f"{first.milliseconds:.0f}",
        first.configuration,
        first.budget,
        f"{fit:.0f} s + {test:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def apart(metrics: Sequence[dict[str, float]]) -> str:
    """The pair of each defect and side."""
    parts = [name.removeprefix(AUROCS[0]) for name in metrics[0] if name.startswith(f"{AUROCS[0]}_")]
    return ", ".join(f"{part.split('_', 2)[2]} {pair(metrics, part)}" for part in parts)


def pair(metrics: Sequence[dict[str, float]], suffix: str = "") -> str:
    """Detection / segmentation: the mean over seeds, with its standard deviation where there are several."""
    return " / ".join(spread([figures[name + suffix] for figures in metrics]) for name in AUROCS)


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation where there are several.

    Example:
        >>> spread([98.0]), spread([98.0, 99.0])
        ('98.0', '98.5 ± 0.7')
    """
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
