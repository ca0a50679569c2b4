"""The paper's tables, and more, on real data, as Markdown.

python -m benchmarks.tables --table 3 --data "{transistor: mvtec_ad/transistor, magnetic_tile: magnetic_tile}"

Rows stand in benchmarks/tables.yaml. Each is `patchad fit` and `patchad test`, run once and kept below `runs/tables`
under the hash of its resolved configuration, so a table that was stopped goes on where it was. The hash does not know
the code: after a change that fits or scores differently, give another `--folder`.
"""

import contextlib
import csv
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
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
from patchad.model import ScoringModel
from patchad.spec import digest
from patchad.timing import alternate

TABLES: dict[str, list[dict[str, Any]]] = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text())
SPLITS = ("published", "by_tile")
SEEDED = ("bank", "learning")
"""Options of the model that have a seed."""
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


class NoWeightsError(Exception):
    """ImageNet weights are neither in a file nor to be downloaded."""


class Images(NamedTuple):
    """A data set as options of the command line."""

    name: str
    options: list[str]


class Fitted(NamedTuple):
    """What one fit left.

    Attributes:
        home: its run folder.
        config: resolved.
        seconds: that it took, with its members' where it is an ensemble.
    """

    home: Path
    config: dict[str, Any]
    seconds: float

    @property
    def checkpoint(self) -> Path:
        """That of the last epoch."""
        return self.home / "checkpoints" / "last.ckpt"


class Result(NamedTuple):
    """What one seed of a row gave.

    Attributes:
        metrics: of `patchad test`, in %.
        best: AUROCs of the epoch that is best on test, in %; None where none was looked for.
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
        data: folder of each data set by name; `magnetic_tile` is tested by both its splits.
        seeds: of everything; rows of ablations take the first.
        weights: folder of files of ImageNet weights.
        folder: where runs are kept.
        validations: how often each fit is measured on the test images, for the protocol of the paper, which takes the
            best epoch on test; 1 measures the last epoch only, and both protocols agree.
        options: further ones for every row of `patchad fit`.
    """
    if table == "1":
        return print_models([row["name"] for row in TABLES[table]])
    print(f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n", flush=True)
    for row in TABLES[table]:
        for images in (images for name, root in (data or {}).items() for images in splits(name, root)):
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
def print_models(names: Sequence[str], repeats: int = 10) -> None:
    """Size, depth and time of each backbone up to its deepest tap, and of the whole model, with random weights."""
    print("| backbone | convolutions | its parameters | those of the encoders | its ms per image | all ms per image |")
    print("|---|---|---|---|---|---|")
    scoring = {name: filled(getattr(patchad.models, name)(weights="none")) for name in names}
    image, tasks = torch.rand(1, 3, 256, 256), {}
    for name, model in scoring.items():
        taps = sorted(set(model.encoder.tap_names.values()))
        tasks[name, "backbone"] = partial(model.encoder.backbone, image, taps)
        tasks[name, "all"] = partial(model, image)
    times = {task: statistics.median(runs) for task, runs in alternate(tasks, repeats).items()}
    for name, model in scoring.items():
        encoder = model.encoder
        used = encoder.backbone.until(encoder.tap_names.values())
        depth = sum(isinstance(layer, nn.Conv2d) for layer in used.modules())
        sizes = f"{millions(used)} | {millions(encoder.encoders)}"
        print(f"| {name} | {depth} | {sizes} | {times[name, 'backbone']:.1f} | {times[name, 'all']:.1f} |")


def millions(module: nn.Module) -> str:
    """Its parameters, in millions."""
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"


def splits(name: str, root: Path) -> Iterator[Images]:
    """The data set, by both splits if it is Magnetic Tile."""
    if name != "magnetic_tile":
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
) -> Fitted:
    """Fits, unless that was done before; first the members of an ensemble.

    Raises:
        NoWeightsError: if the weights are absent.
    """
    given = [*row.get("options", []), *options]
    if "weights" in row and (weights / row["weights"]).is_file():
        given += ["--model.backbone.weights", str(weights / row["weights"])]
    members = [fit(member, images, seed, weights, folder, validations, options) for member in row.get("members", [])]
    if members:
        given += ["--model.members", json.dumps([str(member.checkpoint) for member in members])]
    resolved = configuration(*given, *images.options)
    key = f"{digest(without_place(resolved))}-{digest([images.options, validations])}-{seed}"
    epochs = resolved["trainer"]["max_epochs"]
    watched = ["--data.validate_on", "test" if validations > 1 else "none"]
    watched += ["--trainer.check_val_every_n_epoch", str(max(1, epochs // validations))]
    place = ["--trainer.logger.save_dir", str(folder), "--trainer.logger.version", key]
    command = ["fit", *given, *images.options, *seeds(resolved, seed), *watched, *place]
    seconds = once(folder / key / "fit.json", lambda: timed(*command))
    return Fitted(folder / key, resolved, seconds + sum(member.seconds for member in members))


def seeds(config: dict[str, Any], seed: int) -> list[str]:
    """The options that seed all that a resolved configuration has."""
    seeded = [f"model.{part}" for part in SEEDED if config["model"]["init_args"].get(part)]
    return ["--seed_everything", str(seed), *(f"--{part}.seed={seed}" for part in ("data", *seeded))]


def tested(row: dict[str, Any], fitted: Fitted) -> Result:
    """Tests what was fitted, unless that was done before."""
    home, checkpoint, resolved = fitted.home, fitted.checkpoint, fitted.config
    version = f"{home.name}-test-{digest(row.get('test', []))}"
    place = ["--trainer.logger.save_dir", str(home.parent), "--trainer.logger.version", version]
    test = ["--ckpt_path", str(checkpoint), *row.get("test", []), *place]
    seconds = once(home.with_name(version) / "test.json", lambda: timed("test", *test))
    return Result(
        metrics=measured(home.with_name(version) / "metrics.csv", "test/")[-1],
        best=best_epoch(home / "metrics.csv"),
        milliseconds=once(home / "milliseconds.json", lambda: milliseconds(checkpoint, resolved)),
        configuration=digest(without_place(resolved)),
        budget=budget(checkpoint, resolved),
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


def timed(*arguments: str) -> float:
    """The seconds that a command of patchad takes, in a process of its own.

    Raises:
        NoWeightsError: if it ends with an error about weights.
    """
    command, start = [sys.executable, "-m", "patchad", *arguments], time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        if NO_WEIGHTS in ended.stderr:
            raise NoWeightsError
        raise RuntimeError(f"{' '.join(command)}\n{ended.stderr}")
    return time.perf_counter() - start


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
    for part in SEEDED:
        if model.get(part):
            model[part]["init_args"].pop("seed", None)
    if "members" in model:  # each by the hash of its own configuration, with which its folder's name begins
        model["members"] = [Path(member).parent.parent.name[:8] for member in model["members"]]
    else:
        backbone = model["backbone"]["init_args"]
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


def best_epoch(path: Path) -> dict[str, float] | None:
    """The paper's protocol: the epoch whose sum of both AUROCs is highest on test; None if none was measured."""
    return max(measured(path, "val/"), key=lambda row: sum(row[name] for name in AUROCS), default=None)


@torch.inference_mode()
def milliseconds(checkpoint: Path, config: dict[str, Any]) -> float:
    """Median time per image of the fitted model, eager, batch 1."""
    model = ScoringModel.load(checkpoint)
    image = torch.rand(1, 3, *config["data"]["init_args"]["image_size"])
    return statistics.median(alternate({"model": lambda: model(image)}, repeats=5)["model"])


def budget(checkpoint: Path, config: dict[str, Any]) -> str:
    """Epochs, which there are none of where nothing is learned, steps, and whether features were cached."""
    steps = torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"]
    epochs = config["trainer"]["max_epochs"] if steps else 0
    learning = config["model"]["init_args"].get("learning")
    cached = "cached" if learning and learning["init_args"].get("cache") else "not cached"
    return f"{epochs} epochs, {steps} steps, {cached}"


def markdown(row: dict[str, Any], images: Images, results: Sequence[Result]) -> str:
    """One line."""
    first = results[0]
    parts = [name.removeprefix(AUROCS[0]) for name in first.metrics if name.startswith(f"{AUROCS[0]}_")]
    apart = [f"{part.split('_', 2)[2]} {pair([result.metrics for result in results], part)}" for part in parts]
    best = [result.best for result in results if result.best]
    fit, test = (statistics.mean(result.seconds[number] for result in results) for number in range(2))
    cells = [
        row["name"],
        images.name,
        pair([result.metrics for result in results]) + (f" ({len(results)} seeds)" if len(results) > 1 else ""),
        pair(best) if best else "-",
        row.get("paper", "-"),
        ", ".join(apart),
        f"{first.milliseconds:.0f}",
        first.configuration,
        first.budget,
        f"{fit:.0f} s + {test:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


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
