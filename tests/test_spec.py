import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from patchad.errors import PatchadError
from patchad.models import EfficientNetLite0, PatchEncoder, WindowEncoder
from patchad.models.backbones import Backbone, Tap
from patchad.scoring import Scorer, ScorerFactory
from patchad.spec import Configurable, described, digest, hyperparameters, spec


class Inner(Configurable, nn.Module):
    def __init__(self, width: int, *, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)


class Outer(Inner):
    def __init__(self, inner: Inner, folder: Path) -> None:
        super().__init__(3)
        self.inner = inner


def test_an_object_is_named_by_its_class_path_and_its_arguments():
    value = spec(Outer(Inner(2, names=("a", "b")), folder=Path("here")))
    inner = {"class_path": f"{__name__}.Inner", "init_args": {"width": 2, "names": ["a", "b"]}}
    assert value == {"class_path": f"{__name__}.Outer", "init_args": {"inner": inner, "folder": "here"}}


class Passing(Inner):
    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)


def test_defaults_are_named_like_what_was_given():
    assert spec(Inner(2)) == spec(Inner(2, names=()))
    assert spec(WindowEncoder) == spec(partial(WindowEncoder, cells=1)) != spec(partial(WindowEncoder, cells=2))
    assert digest(WindowEncoder) == digest(partial(WindowEncoder, cells=1)) != digest(partial(WindowEncoder, cells=2))


def test_arguments_that_are_passed_on_to_the_base_class_keep_their_names():
    assert spec(Passing(Path("here"), width=2))["init_args"] == {"folder": "here", "width": 2}


def test_copies_and_pickles_keep_their_arguments():
    original = Inner(2, names=("a",))
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert spec(copied) == spec(original)
        assert torch.equal(copied.layer.weight, original.layer.weight)


def test_a_spec_survives_weights_only_loading():
    value, file = spec(partial(WindowEncoder, cells=2)), io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == value


def test_the_command_lines_parser_builds_the_same_objects_from_specs():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--encoder", type=Callable[[int, Tap], PatchEncoder])
    parser.add_argument("--scorer", type=ScorerFactory)
    parser.add_argument("--backbone", type=Backbone)
    given = {
        "encoder": spec(partial(WindowEncoder, cells=2)),
        "scorer": spec(partial(Scorer, image_score="max")),
        "backbone": spec(EfficientNetLite0(weights="none", trainable="stage4")),
    }
    built = parser.instantiate(parser.parse_object(given))
    assert built.encoder(16, Tap(0, 4, 3)).cells == 2
    assert built.scorer((16,)).image_score == "max"
    assert isinstance(built.backbone, EfficientNetLite0)
    again = {name: spec(built[name]) for name in given}
    assert again == given


@pytest.mark.parametrize("value", [lambda: 0, object(), partial(print, 1)])
def test_what_no_checkpoint_can_name_is_refused(value):
    with pytest.raises(PatchadError, match=r"^encoder is a"):
        spec(value, "encoder")


def test_what_lightning_stored_is_described_where_it_names_a_class():
    class Plain(Configurable):
        pass

    assert described(hyperparameters(Plain())) == {"class_path": spec(Plain)["class_path"], "init_args": {}}
    assert described({"learning_rate": 0.1}) == described({}) == {}
