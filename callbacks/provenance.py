"""Where the figures of a test come from: model, data, settings, versions, command."""

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer

from patchad.conformal import conformal_threshold
from patchad.data.datamodule import PyramidDataModule
from patchad.detector import Detector
from patchad.results import Source
from patchad.spec import defaults, described, digest, spec

PACKAGES = ("patchad", "torch", "pytorch-lightning")
LONGEST = 80
"""Characters of a setting."""
ELSEWHERE = ("root", "backbone.weights")
"""Settings that are told elsewhere, or that the checkpoint has in their place."""


def provenance(trainer: Trainer, detector: Detector, source: Source) -> dict[str, str]:
    """What a test was of, by name, in words.

    Args:
        trainer: of the test.
        detector: which was tested.
        source: what scored the images, and when.
    """
    data: PyramidDataModule = trainer.datamodule  # type: ignore[attr-defined]
    scorer, normals = detector.scorer, detector.scorer.normals.cpu().numpy()
    promised = conformal_threshold(normals, scorer.target_fpr)[1] if len(normals) else 1.0
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return {
        "checkpoint": f"{trainer.ckpt_path or 'none'}",
        "checksum": source.model or "none",
        "images": f"{data.root}, read as {type(data.layout).__name__}",
        "threshold": f"{scorer.limits.threshold:.5g}, by {len(normals)} normal images: it promises false alarms on at "
        f"most {100 * promised:.3g} % of such images ({100 * scorer.target_fpr:.3g} % asked for)",
        "map threshold": f"{scorer.limits.map_threshold:.5g}",
        "detector": type(detector).__name__,
        "settings of the detector": changed(detector.hparams, type(detector)),
        "settings of the data": changed(data.hparams, type(data)),
        "date": source.time,
        "versions": f"{packages}, Python {platform.python_version()}",
        "command": command(sys.argv),
    }


def command(arguments: Sequence[str]) -> str:
    """The command as it was given, without the settings of the checkpoint, which the command line puts first.

    Example:
        >>> command(["/bin/patchad", "test", "--config", "{}", "--ckpt_path", "my last.ckpt"])
        "patchad test --ckpt_path 'my last.ckpt'"
    """
    program, *words = arguments
    if words[1:2] == ["--config"] and words[2].startswith("{"):
        del words[1:3]
    name = Path(program).name
    return shlex.join(["patchad" if name == "__main__.py" else name, *words])


def changed(hyperparameters: Mapping[str, Any], kind: type) -> str:
    """The settings of an object of a class that are not its defaults, in words.

    Args:
        hyperparameters: what Lightning stores of it.
        kind: the class.
    """
    usual = flat(spec(defaults(kind)))
    found = flat(described(hyperparameters).get("init_args", {}))
    different = {name: value for name, value in found.items() if usual.get(name) != value and name not in ELSEWHERE}
    return ", ".join(f"{name} {in_short(value)}" for name, value in different.items()) or "the defaults"


def in_short(value: Any) -> str:
    """A setting as it is read; one that is too long, such as the members of an ensemble, by its digest.

    Example:
        >>> in_short([96, 96]), in_short(99 * [0])
        ('[96, 96]', '(digest 226ee305)')
    """
    return str(value) if len(str(value)) <= LONGEST else f"(digest {digest(value)})"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their names on the command line; an object by the name of its class.

    Example:
        >>> flat({"bank": {"class_path": "patchad.memory.MemoryBank", "init_args": {"seed": 0}}, "mode": "dense"})
        {'bank': 'MemoryBank', 'bank.seed': 0, 'mode': 'dense'}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and "class_path" in value:
            found[f"{prefix}{name}"] = value["class_path"].rpartition(".")[2]
            found |= flat(value.get("init_args", {}), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
