"""A live object <-> its class path and plain arguments, so that checkpoints and configs hold no pickled objects."""

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from patchad.errors import PatchadError

Kind = TypeVar("Kind")  # beartype, which checks the tests' calls, does not know Self here

INSTANTIATOR = "pytorch_lightning.cli.instantiate_module"


class Configurable:
    """Remembers the arguments of its construction, defaults among them; subclasses do nothing for it.

    Example:
        >>> class Smoothing(Configurable):
        ...     def __init__(self, sigma: float = 1.0) -> None:
        ...         self.sigma = sigma
        >>> Smoothing(2.0).init_args
        {'sigma': 2.0}
    """

    init_args: dict[str, Any]

    def __new__(cls: type[Kind], *args: Any, **kwargs: Any) -> Kind:
        """A bare object that knows its arguments."""
        self = object.__new__(cls)
        signature = inspect.signature(cls.__init__)
        arguments = dict(list(signature.bind_partial(self, *args, **kwargs).arguments.items())[1:])
        arguments = {**defaults(cls), **arguments}
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # what goes on to the base class has names, too
                arguments |= arguments.pop(name, {})
        object.__setattr__(self, "init_args", arguments)
        return self


def defaults(kind: type) -> dict[str, Any]:
    """The arguments of a class that need not be given, in its order."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty
    }


def class_path(kind: type) -> str:
    """Where a class is imported from."""
    return f"{kind.__module__}.{kind.__qualname__}"


def spec(value: Any, name: str = "argument") -> Any:
    """The value in plain numbers, strings, lists and dicts; objects as `class_path` and `init_args`.

    Args:
        value: a plain value, a `Configurable`, a class or a `functools.partial` of one, or a collection of these.
        name: what to call the value in an error.

    Raises:
        PatchadError: if the value is none of these.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: spec(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [spec(item, name) for item in value]
    return object_spec(value, name)


def object_spec(value: Any, name: str) -> dict[str, Any]:
    """`class_path` and `init_args` of an object, or of a factory of objects.

    Raises:
        PatchadError: if the value is neither.
    """
    if isinstance(value, Configurable):
        return {"class_path": class_path(type(value)), "init_args": spec(value.init_args, name)}
    if isinstance(value, type):
        return factory_spec(value, {}, name)
    if isinstance(value, functools.partial):
        return partial_spec(value, name)
    raise PatchadError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot name; give a class, a functools.partial of a "
        "class, or an object whose class extends patchad.spec.Configurable"
    )


def partial_spec(factory: functools.partial, name: str) -> dict[str, Any]:
    """`class_path` and `init_args` of a factory: `partial(Class, ...)`, or jsonargparse's `partial(make, Class, ...)`.

    Raises:
        PatchadError: if there is no class in it.
    """
    kinds = [part for part in (factory.func, *factory.args) if isinstance(part, type)]
    if len(kinds) != 1:
        raise PatchadError(f"{name} is a functools.partial of {factory.func}; give a partial of a class, by keywords")
    return factory_spec(kinds[0], factory.keywords, name)


def factory_spec(kind: type, keywords: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`class_path` and `init_args` of a class that is called later: what is given, and its defaults.

    Example:
        >>> factory_spec(Path, {"parts": 3}, "argument")
        {'class_path': 'pathlib.Path', 'init_args': {'parts': 3}}
    """
    return {"class_path": class_path(kind), "init_args": spec({**defaults(kind), **keywords}, name)}


def digest(value: Any) -> str:
    """Eight hexadecimal digits that tell settings apart.

    Args:
        value: a `Configurable`, or plain numbers, strings, lists and dicts.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(spec(value), sort_keys=True).encode()).hexdigest()[:8]


def changed_settings(fitted: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What a fit had otherwise, in words; empty where nothing changed.

    Example:
        >>> changed_settings({"mode": "dense", "tile": 8}, {"mode": "sliding", "tile": 8})
        'mode dense, not sliding'
    """
    names = [name for name in fitted if current.get(name) != fitted[name]]
    return "; ".join(f"{name} {fitted[name]}, not {current.get(name)}" for name in names)


def described(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The `spec` of what Lightning stored in a checkpoint; empty where it stored none."""
    if "_class_path" not in hyperparameters:
        return {}
    arguments = {name: value for name, value in hyperparameters.items() if name not in ("_class_path", "_instantiator")}
    return {"class_path": hyperparameters["_class_path"], "init_args": arguments}


def hyperparameters(configurable: Configurable) -> dict[str, Any]:
    """What Lightning stores in a checkpoint to build the object again, in the format of its command line.

    Raises:
        PatchadError: if an argument cannot be named.
    """
    arguments = {name: spec(value, name) for name, value in configurable.init_args.items()}
    return {**arguments, "_class_path": class_path(type(configurable)), "_instantiator": INSTANTIATOR}
