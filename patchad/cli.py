"""The command line: `patchad fit`, `test`, `predict` and what else there is."""

import errno
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentError
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher

from patchad.checkpoint import check_exists, read_checkpoint
from patchad.commands import DetectorTrainer
from patchad.data.datamodule import PyramidDataModule
from patchad.detector import Detector
from patchad.ensemble import Ensemble  # noqa: F401  # so that --model Ensemble finds it
from patchad.errors import PatchadError, check_range
from patchad.files import is_below_here
from patchad.help import CONFIGS, Help, packaged
from patchad.loggers import join
from patchad.peers import DifferNet, MCuePushU, PaDiM  # noqa: F401  # as above
from patchad.spec import described, spec
from patchad.trust import allow, check_slots, check_trusted, foreign_modules

CONFIG_OPTIONS = ("--config", "-c")
PARTS = {"model": Detector, "data": PyramidDataModule}
"""What a config and a checkpoint name by class_path."""
OWN_VERBS = ("predict", "export", "verify", "benchmark", "threshold", "update")
"""Of `DetectorTrainer`."""
LIGHTNINGS_WORDS = ("best", "last", "hpc", "null")
"""What `fit --ckpt_path` takes beside a path."""
LEAST = {"check_val_every_n_epoch": 1, "accumulate_grad_batches": 1, "gradient_clip_val": 0, "log_every_n_steps": 0}
"""Options of Lightning's by which it would divide, or which it takes as they are, and their least value."""
UNFIT = {
    "overfit_batches": "each epoch draws patches of its own; give --trainer.limit_train_batches",
    "barebones": "it leaves out what a run is for, checkpoints and figures; leave it out",
}
"""Options of Lightning's that no detector can have, and what to do instead."""

UNION = "Does not validate against any of the Union subtypes"
STRUCTURE = re.compile(
    rf"Parser key|Problem with|Type .* expects|{UNION}|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
)
"""Lines of jsonargparse's that tell where, but not what."""
SLOT = re.compile(r"^Type .* expects a function or a callable class: ")
"""What comes before the reason where a class is wanted."""
EXPECTED = re.compile(r"Expected an? (?:<class ')?(?:\w+\.)*([^'<>]+?(?:\[.*\])?)(?:'>)?$")
GIVEN = re.compile(
    r"(?:Got value: |Given value: (?:NestedArg\(key='.*', val=)?)'?(?!Namespace)([^'\n]*?)'?\)?(?:\. Got|$)", re.M
)
"""What types it would take, and what it was given."""
OTHERS_REFUSALS = (ArgumentError, MisconfigurationException, OmegaConfBaseException, ModuleNotFoundError)
"""What jsonargparse, Lightning and OmegaConf raise of an option, and what comes of a library that is not there."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk or a quota without room says."""

EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # frozen backbones are meant to be
    r"The dirpath has changed",  # a test has a run folder of its own
    r".*configure_optimizers` will be overridden",  # by --optimizer, as the user asked
    r"Total length of `list` across ranks is zero",  # data.validate_on none, as the user asked
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with newer torch
)
"""Warnings of Lightning about what patchad does on purpose, or about Lightning itself."""


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder, and hands it to the loggers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves out the checkpoint that a fit goes on with: who fits by the file begins anew."""
        if stage == "fit":
            self.config = self.config.clone()
            self.config.ckpt_path = None
        super().setup(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Names the run folder where a full disk refused a file of Lightning's, which does not say which."""
        if isinstance(exception, OSError) and exception.errno in FULL and exception.filename is None:
            exception.filename = getattr(trainer.logger, "log_dir", None) or trainer.default_root_dir

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hands it over; the file is Lightning's."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": config})


class PatchadCLI(LightningCLI):
    """LightningCLI with patchad's defaults, and a checkpoint that brings its settings along."""

    def init_parser(self, **settings: Any) -> LightningArgumentParser:
        """Lightning's, with the help of `patchad.help`."""
        parser = super().init_parser(add_help=False, **settings)
        parser.add_argument("-h", "--help", action=Help, help="Show what is needed, or all options, and exit.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Every subcommand starts from the packaged default.yaml, and may trust a checkpoint's classes."""
        parser._option_string_actions["--model.help"].const = "patchad.PatchDetector"  # not its base
        parser.default_config_files = [str(CONFIGS / "default.yaml")]
        parser.add_argument(
            "--allow",
            type=str | list[str],
            default=[],
            help="Modules of your own, such as mine, whose classes a checkpoint may name.",
        )
        parser.add_argument(
            "--product",
            type=str | list[str],
            default=[],
            help="Of several products, one, or a list of some, to fit, test, predict or export; as a rule all.",
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and those of `DetectorTrainer`."""
        own = {name: {"model", "datamodule"} for name in OWN_VERBS}
        return {**LightningCLI.subcommands(), **own}

    def _parse_ckpt_path(self) -> None:
        """Checks one that a config names; Lightning would put the checkpoint's settings above the caller's options."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and not is_lightnings(str(path)):
            check_exists(Path(path), "--ckpt_path")

    def before_instantiate_classes(self) -> None:
        """Refuses what would be called and is no class of its slot."""
        config = self.config[self.config.subcommand]
        for name, kind in PARTS.items():
            check_slots(kind, config[name].as_dict(), name)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Also checks what Lightning would trip over later."""
        super().parse_arguments(parser, args)
        self._check_keys()
        config = self.config[self.config.subcommand]
        if config.product:
            raise PatchadError(
                f"--product {config.product}: there are no several products to choose from; leave it out"
            )
        if not isinstance(config.seed_everything, bool):
            check_range({"--seed_everything": config.seed_everything}, 0, 2**32 - 1)
        for name, least in LEAST.items():
            check_range({f"--trainer.{name}": config.trainer[name]}, least)
        for name, instead in UNFIT.items():
            if value := config.trainer[name]:
                raise PatchadError(f"--trainer.{name} {value}: {instead}")
        if self.config.subcommand != "fit" and not config.get("ckpt_path"):
            raise PatchadError("no detector: give --ckpt_path, the checkpoint that patchad fit wrote")
        if config.get("lr_scheduler") and not config.get("optimizer"):
            raise PatchadError("--lr_scheduler has nothing to steer: give --optimizer, too")

    def _check_keys(self) -> None:
        """Refuses keys of config files that no option has, which the parser takes where they are empty."""
        options = self._subcommand_parsers[self.config.subcommand].get_defaults().keys()
        known = {*self.subcommands(), *(name.partition(".")[0] for name in options)}
        for path in (value for option in CONFIG_OPTIONS for value in option_values(sys.argv[1:], option)):
            if "{" not in path and (unknown := read_config(Path(path)).keys() - known):
                raise PatchadError(f"--config {path} has {', '.join(map(str, unknown))}, which is no option")

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        """Lightning's; what it refuses is an option."""
        try:
            trainer = super().instantiate_trainer(**settings)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise PatchadError(f"--trainer: {' '.join(str(error).split())}") from error
        join(trainer.loggers, self._group, self.config.subcommand)
        cores = os.cpu_count() or 1
        if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:
            processes = f"{trainer.num_devices} starts as many processes, on {cores} cores"
            raise PatchadError(f"--trainer.devices {processes}; give at most {cores}")
        if self.config.subcommand == "fit" and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            strategy = self.config.fit.trainer.strategy
            raise PatchadError(f"--trainer.strategy {strategy} loses with its processes what was fitted; give ddp")
        return trainer

    def _group(self) -> str:
        """That of the model, which a checkpoint knows."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path is None or is_lightnings(str(path)):
            return self.model.group
        return read_checkpoint(Path(path), "--ckpt_path")["patchad_group"]

    def instantiate_classes(self) -> None:
        """Also notes where a checkpoint says what the data are."""
        super().instantiate_classes()
        self.datamodule.from_checkpoint = self.config[self.config.subcommand].get("ckpt_path") is not None

    def test(self, **settings: Any) -> None:
        """Lightning's, without its table: the `Report` callback prints a shorter one."""
        self.trainer.test(**{**settings, "verbose": False})

    def after_fit(self) -> None:
        """Validates what had no epochs to do it in; says where everything is and what comes next."""
        if not self.model.learns:
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if checkpoint and self.trainer.is_global_zero:
            verb = "test" if len(self.datamodule.test_set) else "predict --data.root NEW_FOLDER"
            named = [described(self.model.hparams), described(self.datamodule.hparams), spec(self.model.model)]
            options = "".join(f" --allow {module}" for module in sorted(foreign_modules(named)))
            print(f"checkpoint: {checkpoint}\nnext:       patchad {verb} --ckpt_path {checkpoint}{options}")


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: 0; 1 where images could not be read; 2 where the user can mend something.
        command_line: what ran; None where something is to be mended.
        mistake: what the user can mend, in one line.
    """

    code: int
    command_line: PatchadCLI | None = None
    mistake: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command, and ends the process with its code unless that is 0."""
    if code := run(sys.argv[1:] if arguments is None else arguments).code:
        sys.exit(code)


def run(command: Sequence[str]) -> Ended:
    """Runs one command; what the user can mend is printed as one line."""
    # else `deterministic` fills all that torch allocates with nan; we read only what was written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for expected in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", expected)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # a file may have a name that the terminal cannot show
    sys.path.insert(0, os.getcwd())  # a user's own classes are named by class_path from the current folder
    try:
        command_line = parse_and_run(command)
    except (ValueError, OSError, *OTHERS_REFUSALS) as error:
        mistake = find_mistake(error)
        if mistake is None:
            raise
        print(f"patchad: error: {mistake}", file=sys.stderr)
        return Ended(2, mistake=mistake)
    return Ended(1 if command_line.model.doubts.errors else 0, command_line)


def parse_and_run(command: Sequence[str]) -> PatchadCLI:
    """Runs one command, by `sys.argv`, from which Lightning starts further processes."""
    resolved = resolve_configs(nest_nulls(name_exported(list(command))))
    allow(*allowed_modules(resolved))
    sys.argv[1:] = with_checkpoint_settings(resolved)
    command_line = PatchadCLI(
        Detector,
        PyramidDataModule,
        trainer_class=DetectorTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "parser_mode": "omegaconf",
            "prog": "patchad",
            "description": "Finds defects after seeing good images only.",
            "exit_on_error": False,
            "allow_abbrev": False,
        },
        seed_everything_default=0,
    )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else its threads may abort the process at its exit
    return command_line


def name_exported(arguments: list[str]) -> list[str]:
    """The arguments with the file of `patchad verify FILE` named, as Lightning's parser wants it."""
    if arguments[:1] == ["verify"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        return ["verify", "--exported", *arguments[1:]]
    return arguments


def nest_nulls(arguments: Iterable[str]) -> list[str]:
    """The arguments with `--model.bank.max_vectors null` as `--model.bank {max_vectors: null}`.

    Of an option of a class that is given by class_path, jsonargparse 4.53 takes null for the word None.

    Example:
        >>> nest_nulls(["fit", "--model.bank.max_vectors", "null", "--model.tile=null"])
        ['fit', '--model.bank={max_vectors: null}', '--model.tile=null']
    """
    nested: list[str] = []
    for argument in arguments:
        option = nested.pop() if argument == "null" and nested and nested[-1].startswith("--") else ""
        whole = f"{option}=null" if option else argument
        match = re.fullmatch(r"(--\w+\.\w+)\.(\w+)=null", whole)
        nested += [f"{match[1]}={{{match[2]}: null}}"] if match else filter(None, [option, argument])
    return nested


def resolve_configs(arguments: Iterable[str]) -> list[str]:
    """The arguments with short config names replaced by the packaged files: `--config quickstart`."""
    resolved: list[str] = []
    for argument in arguments:
        option, separator, value = argument.partition("=")
        if resolved and resolved[-1] in CONFIG_OPTIONS:
            resolved.append(packaged_config(argument))
        elif separator and option in CONFIG_OPTIONS:
            resolved.append(f"{option}={packaged_config(value)}")
        else:
            resolved.append(argument)
    return resolved


def packaged_config(name: str) -> str:
    """The path of a packaged config; a name that is an existing file, or no packaged one, is left as it is.

    Raises:
        PatchadError: if a short name fits nothing.
    """
    if "{" in name or Path(name).is_file() or Path(name).suffix in (".yaml", ".yml", ".json"):
        return name  # a config in braces may be too long for a path
    if name not in packaged():
        raise PatchadError(f"--config {name} is neither a file nor one of {', '.join(packaged())}")
    return str(packaged()[name])


def with_checkpoint_settings(arguments: list[str]) -> list[str]:
    """The arguments with the checkpoint's settings as a first config, so that later options override them.

    Raises:
        PatchadError: if the checkpoint is missing or not readable.
    """
    path = next(iter(option_values(arguments, "--ckpt_path")), None)
    if path == "":
        raise PatchadError("--ckpt_path is empty; patchad fit prints the path of its checkpoint")
    if path is None or (arguments[0] == "fit" and is_lightnings(path)):
        return arguments
    settings = read_settings(Path(path), with_weights=arguments[0] == "fit")  # further fits may begin anew by them
    return [arguments[0], "--config", json.dumps(settings), *arguments[1:]]


def allowed_modules(arguments: Sequence[str]) -> set[str]:
    """The modules that `--allow` names, on the command line or in a config file of the user's."""
    named: list[Any] = option_values(arguments, "--allow")
    for path in (value for option in CONFIG_OPTIONS for value in option_values(arguments, option)):
        if "{" not in path and Path(path).is_file():
            named.append(read_config(Path(path)).get("allow"))
    return {name for value in named for name in re.findall(r"[\w.]+", str(value or ""))}


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a config file.

    Raises:
        PatchadError: if it is no YAML, or holds no settings.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PatchadError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise PatchadError(f"--config {path} holds {config!r}; give settings, such as model: or data:")
    return config


def is_lightnings(path: str) -> bool:
    """Whether only Lightning knows where that checkpoint is."""
    return path in LIGHTNINGS_WORDS or "://" in path


def option_values(arguments: Sequence[str], option: str) -> list[str]:
    """The values of each `--option value` and `--option=value`."""
    following = [*arguments, ""][1:]
    return [
        argument.partition("=")[2] if "=" in argument else value
        for argument, value in zip(arguments, following, strict=True)
        if argument.partition("=")[0] == option
    ]


def read_settings(path: Path, with_weights: bool = False) -> dict[str, dict]:
    """class_path and init_args of the detector and of the datamodule of a checkpoint.

    Args:
        path: of the checkpoint.
        with_weights: whether the backbone gets those that it began with, too, before it gets the checkpoint's.

    Raises:
        PatchadError: if the checkpoint is missing, not readable, or of another format.
    """
    checkpoint = read_checkpoint(path, "--ckpt_path")
    stored = {name: dict(checkpoint.get(kind.CHECKPOINT_HYPER_PARAMS_KEY, {})) for name, kind in PARTS.items()}
    if with_weights and "patchad_backbone" in checkpoint:
        stored["model"]["backbone"] = checkpoint["patchad_backbone"]
    settings = {name: named for name, parameters in stored.items() if (named := described(parameters))}
    for name, kind in PARTS.items():
        check_trusted(kind, settings.get(name), f"--ckpt_path {path}: {name}")
    keep_cache_inside(settings.get("model", {}))
    return settings


def keep_cache_inside(model: dict[str, Any]) -> None:
    """Lets features be cached where the checkpoint says only if that is below the current folder."""
    learning = model.get("init_args", {}).get("learning") or {}
    cache = (learning.get("init_args", {}).get("cache") or {}).get("init_args", {})
    if not is_below_here(Path(cache.get("folder", ""))):
        del cache["folder"]


def find_mistake(error: BaseException) -> str | None:
    """What the user can mend, in one line; None where the error is a bug.

    jsonargparse wraps what constructors raise, and data workers pass on their traceback as text.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, PatchadError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None or isinstance(error, OSError):
        last = str(cause or error).strip().splitlines()[-1]
        return last.removeprefix(f"{PatchadError.__module__}.PatchadError: ")
    if isinstance(error, ArgumentError) or str(error).startswith(UNION):
        return explained(str(error))
    mendable = isinstance(error, OTHERS_REFUSALS) or "ckpt_path=" in str(error)  # Lightning's of best, last and hpc
    return " ".join(str(error).split()) if mendable else None


def explained(text: str) -> str:
    r"""What jsonargparse says of an option, in one line: its name, and what it would take.

    Example:
        >>> explained('Parser key "data":\n  Parser key "seed":\n    Expected a <class \'int\'>. Got value: x')
        '--data.seed: expected int, not x'
    """
    lines = [SLOT.sub("", line.strip(" -").partition(". Got value: ")[0]) for line in text.splitlines()]
    reasons = [EXPECTED.sub(r"expected \1", line) for line in lines if line and not STRUCTURE.match(line)]
    keys, given = re.findall(r'Parser key "([^"]+)"', text), GIVEN.findall(text)
    said = "; or ".join(dict.fromkeys(reasons)) + (f", not {given[0]}" if given else "")
    if "expected tuple" in said and re.fullmatch(r"\d+([,x]\d+)+", given[0]):
        said += f'; give "[{given[0].replace("x", ",")}]"'
    return f"--{'.'.join(keys)}: {said}" if keys else said
