"""What `--help` shows: what a verb needs, on one screen; `--help all` every option, those of data and model first."""

import argparse
import inspect
import re
import sys
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from patchad.commands import DetectorTrainer
from patchad.data.datamodule import PyramidDataModule
from patchad.export import TOLERANCE
from patchad.memory import MemoryBank
from patchad.module import PatchDetector
from patchad.scoring import Scorer

CONFIGS = Path(str(files("patchad.configs")))
PARTS = {"data": PyramidDataModule, "model": PatchDetector, "model.scorer": Scorer, "model.bank": MemoryBank}
"""Whose options the parser of a verb does not list, for another class may be given; these are the default ones."""


class Verb(NamedTuple):
    """The first screen of a verb.

    Attributes:
        needs: the arguments that it cannot do without.
        example: of its arguments.
        options: each with its value, and what it is; empty where a docstring says it.
        result: what it leaves.
        does: the verb in a sentence; empty where the docstring of the trainer's method is one for users.
    """

    needs: str
    example: str
    options: dict[str, str]
    result: str
    does: str = ""


FITTED = "--ckpt_path runs/version_0/checkpoints/last.ckpt"
CHECKPOINT = {"--ckpt_path FILE": "the checkpoint that patchad fit wrote."}
THRESHOLD = {"--model.scorer.target_fpr RATE": "another threshold, for another rate of false alarms on good images."}
PRODUCT = {"--product NAME": "of several products, one, or a list of some; as a rule all."}
SEVERAL = {"--ckpt_path FILE": "the checkpoint that patchad fit wrote, or the run folder of several products."}
PLACES = "another folder than the fit's; of several products, the one that holds theirs."
RUN = {"--trainer.logger.version NAME": "names the folder below runs, in place of version_N."}
VERBS = {
    "fit": Verb(
        "--data.root FOLDER",
        "--data.root bottle --config fast",
        {
            "--data.root FOLDER": "the folder of images, or one that holds such a folder for each of several products.",
            "--data.layout NAME": "",
            "--data.image_size PIXELS": "",
            "--model.scorer.target_fpr RATE": "",
            "--config NAME": "one of the configurations below, or a file; others, and options, lie on top.",
            "--trainer.max_epochs COUNT": "epochs of what is learned (--config learned, paper); else there are none.",
            "--ckpt_path FILE": "a checkpoint to go on from.",
            **PRODUCT,
            **RUN,
        },
        "Writes runs/version_N: checkpoints/last.ckpt, config.yaml, metrics.csv, pictures.\n"
        "Options of a class: --data.help, --model.help, --model.help Ensemble, --model.backbone.help VGG16.",
        "Learn what good images look like, and set the threshold.",
    ),
    "validate": Verb(
        "--ckpt_path FILE",
        FITTED,
        {**CHECKPOINT, "--data.root FOLDER": "another folder than the fit's.", **RUN},
        "Prints AUROCs; writes runs/version_N: metrics.csv, anomaly_maps.",
        "Measure a fitted detector on defects painted on good images.",
    ),
    "test": Verb(
        "--ckpt_path FILE",
        FITTED,
        {**SEVERAL, "--data.root FOLDER": PLACES, **PRODUCT, **THRESHOLD, **RUN},
        "Prints the figures; writes runs/version_N: report.html, scores.csv, contact_sheet.png, metrics.csv.\n"
        "Of several products, these lie in runs/version_N/PRODUCT, and runs/version_N/products.csv has all.",
        "Measure a fitted detector on labelled images, and report.",
    ),
    "predict": Verb(
        "--ckpt_path FILE --data.root FOLDER",
        f"{FITTED} --data.root NEW_FOLDER",
        {
            **SEVERAL,
            "--data.root FOLDER": "every image below it is scored; the first folder names one of several products.",
            "--maps KIND": "",
            **PRODUCT,
            **THRESHOLD,
            **RUN,
        },
        "Writes runs/version_N/predictions: scores.csv, and in maps a picture or map of each image.",
    ),
    "export": Verb(
        "--ckpt_path FILE",
        f"{FITTED} --output model.patchad",
        {
            **SEVERAL,
            "--output FILE": "the file; of several products, the folder of the files.",
            "--precision KIND": "float32, or int8, which is faster; needs --data.root with the images of the fit.",
            **PRODUCT,
        },
        "Writes the file; patchad.load(FILE)(IMAGE) scores by it.",
    ),
    "verify": Verb(
        "EXPORTED --ckpt_path FILE",
        f"model.patchad {FITTED}",
        {
            "EXPORTED": "what patchad export wrote.",
            "--ckpt_path FILE": "",
            "--images COUNT": "",
            "--data.root FOLDER": "another folder than the fit's.",
        },
        f"Prints differences; ends with code 2 where scores differ by more than {TOLERANCE:.0e} of their value.",
    ),
    "benchmark": Verb(
        "--ckpt_path FILE",
        FITTED,
        {
            **CHECKPOINT,
            "--batch_sizes COUNTS": "",
            "--repeats COUNT": "",
            "--data.root FOLDER": "another folder than the fit's.",
        },
        "Prints the milliseconds of each stage.",
    ),
    "threshold": Verb(
        "--ckpt_path FILE --target_fpr RATE --output FILE",
        "--ckpt_path last.ckpt --target_fpr 0.02 --output strict.ckpt",
        {**CHECKPOINT, "--target_fpr RATE": "", "--review_fpr RATE": "", "--output FILE": ""},
        "Writes the checkpoint; prints the limits before and after.",
    ),
    "update": Verb(
        "--ckpt_path FILE --output FILE --normal FOLDER",
        "--ckpt_path last.ckpt --normal false_alarms --output better.ckpt",
        {
            **CHECKPOINT,
            "--normal FOLDER": "",
            "--remove FOLDER": "",
            "--defects FOLDER": "",
            "--output FILE": "",
        },
        "Writes the checkpoint; prints scores, verdicts and limits before and after.",
    ),
}


class Help(argparse._HelpAction):
    """`--help` of a verb shows its first screen, `--help all` every option; without a verb, it lists them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.nargs, self.metavar = "?", "all"

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Prints it and ends the program."""
        assert isinstance(parser, ArgumentParser)
        verb = parser.prog.split()[-1]
        if verb not in VERBS:
            text = overview(parser)
        else:
            text = every_option(parser, verb) if values == "all" else first_screen(parser, verb)
        sys.stdout.write(text)  # at once: what reads it, such as head, may be gone before a second write
        parser.exit()


def overview(parser: ArgumentParser) -> str:
    """All verbs."""
    options = {"--version": "versions of patchad, torch and Lightning."}
    verbs = {
        **{verb: sentence(verb) for verb in VERBS},
        "score": "Score images by exported files, without torch.",
    }
    sections = {"verbs": verbs, "options": options}
    end = "patchad VERB --help says what it needs, patchad VERB --help all every option."
    return page("patchad VERB [options]", str(parser.description), sections, end)


def first_screen(parser: ArgumentParser, verb: str) -> str:
    """What a verb needs.

    Args:
        parser: of the verb.
        verb: one of `VERBS`.
    """
    needs, example, options, result, _ = VERBS[verb]
    known = {action.dest: action for one in (parser, *map(part, PARTS)) for action in one._actions}
    rows = {name: text or explanation(known[name.split()[0].strip("-")]) for name, text in options.items()}
    sections = {"options": {**rows, "--help all": "every option."}}
    if "--config NAME" in options:
        sections["configurations"] = {name: first_words(path) for name, path in packaged().items()}
    end = f"{result}\n\nexample: patchad {verb} {example}"
    return page(f"patchad {verb} {needs} [options]", sentence(verb), sections, end)


def every_option(parser: ArgumentParser, verb: str) -> str:
    """Every option of a verb, those of data and model before Lightning's.

    Args:
        parser: of the verb.
        verb: one of `VERBS`.
    """
    head = page(f"patchad {verb} {VERBS[verb].needs} [options]", sentence(verb), {}, "")
    parser.usage, parser.description = argparse.SUPPRESS, None
    return "\n".join([head, *(part(name).format_help() for name in PARTS), parser.format_help()])


def part(name: str) -> ArgumentParser:
    """A parser of the options of one of `PARTS`."""
    parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    parser.add_class_arguments(PARTS[name], name, skip={int("." in name)})  # the model tells its parts their sides
    return parser


def explanation(action: argparse.Action) -> str:
    """What the docstring says of an option, and its default."""
    default = list(action.default) if isinstance(action.default, tuple) else action.default  # as it is typed
    return f"{action.help} (default: {default})" if default is not None else str(action.help)


def sentence(verb: str) -> str:
    """What a verb does."""
    return VERBS[verb].does or str(inspect.getdoc(getattr(DetectorTrainer, verb))).splitlines()[0]


def packaged() -> dict[str, Path]:
    """The packaged configurations by their short names."""
    return {str(path.relative_to(CONFIGS).with_suffix("")): path for path in sorted(CONFIGS.rglob("*.yaml"))}


def first_words(path: Path) -> str:
    """The beginning of the comment that a configuration begins with, up to its first stop."""
    return re.split(r"[.:;]\s", path.read_text().removeprefix("# "), maxsplit=1)[0]


def page(usage: str, description: str, sections: dict[str, dict[str, str]], end: str) -> str:
    """A page of help as argparse lays it out.

    Args:
        usage: after the word.
        description: what comes next.
        sections: their titles, and of each the names (of options with their values) and what they are.
        end: what comes last, line by line.
    """
    layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)
    parser = argparse.ArgumentParser(
        usage=usage, description=description, epilog=end, add_help=False, formatter_class=layout
    )
    for title, rows in sections.items():
        group = parser.add_argument_group(title)
        for name, text in rows.items():
            option, _, value = name.partition(" ")
            group.add_argument(option, metavar=value if option.startswith("-") else name, help=text.replace("%", "%%"))
    return parser.format_help()
