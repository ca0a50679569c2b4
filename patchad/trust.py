"""What a checkpoint may name: patchad's own classes and those of modules that the user allows, each in its slot."""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from patchad.errors import PatchadError
from patchad.spec import Configurable, Kind

NUMBERS = (bool, int, float, type(None))
EXPANDED = "${"
"""What OmegaConf takes for the name of a setting, or of a variable of the environment."""
_trusted = {"patchad"}


def allow(*modules: str) -> None:
    """Lets checkpoints name classes of modules, which are then imported: only what runs nothing that you do not trust.

    Args:
        modules: names, as in `import`; a package is allowed with all that lies below it.

    Example:
        >>> allow("mine")
    """
    _trusted.update(module.partition(".")[0] for module in modules)


def made(kind: type[Kind], described: Mapping[str, Any], name: str = "the checkpoint") -> Kind:
    """An object of the class or of a subclass, from the `spec` in a checkpoint, which an error calls by that name.

    Raises:
        PatchadError: if there is no such subclass, it is not trusted (`patchad.trust`), or an argument does not fit.

    Example:
        >>> made(Configurable, {"class_path": "patchad.losses.Position", "init_args": {"weight": 0.5}}).weight
        0.5
    """
    check_trusted(kind, described, name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "made", fail_untyped=False)
    try:
        return parser.instantiate_classes(parser.parse_object({"made": dict(described)}))["made"]
    except ArgumentError as error:
        raise PatchadError(f"{name} names {described['class_path']}, which cannot be made: {error}") from error


def check_trusted(kind: type, described: Any, name: str) -> None:
    """Raises PatchadError unless a `spec` names a subclass, and fitting ones within it, of trusted modules alone.

    Nothing is imported that is not trusted, and nothing is called.

    Args:
        kind: what the class extends.
        described: `class_path` and `init_args`, as `patchad.spec.spec` writes them.
        name: what to call it in an error.
    """
    _check(described, [kind], name, frozenset(_trusted))


def check_slots(kind: type, described: Any, name: str) -> None:
    """As `check_trusted`, of what the user configured: classes may be of any module, but must fit their slots."""
    _check(described, [kind], name, None)


def foreign_modules(described: Any) -> set[str]:
    """The modules or packages, beside patchad, whose classes a `spec` names.

    Example:
        >>> foreign_modules({"losses": [{"class_path": "mine.Spread"}, {"class_path": "patchad.losses.Position"}]})
        {'mine'}
    """
    if isinstance(described, Mapping):
        own = str(described.get("class_path", "patchad")).partition(".")[0]
        return {own}.union(*map(foreign_modules, described.values())) - {"patchad"}
    if isinstance(described, (list, tuple)):
        return set().union(*map(foreign_modules, described))
    return set()


def _check(value: Any, kinds: Collection[type], name: str, trusted: Collection[str] | None) -> None:
    if trusted is None and not kinds:
        return  # what the user gives an argument without annotation
    if isinstance(value, Mapping) and "class_path" in value:
        _check_object(value, kinds, name, trusted)
    elif isinstance(value, Mapping):
        _check([*value, *value.values()], kinds, name, trusted)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check(item, kinds, name, trusted)
    elif isinstance(value, str):
        _check_text(value, kinds, name, trusted)
    elif callable(value) and kinds:  # a class or a function, which the parser has found already
        _check_class(value, kinds, name)


def _check_text(value: str, kinds: Collection[type], name: str, trusted: Collection[str] | None) -> None:
    """A string in the slot of a class names one."""
    if trusted is not None and EXPANDED in value:
        raise PatchadError(f"{name} holds {value!r}, which would be read from the environment; give the value itself")
    if kinds and not {str, Path}.intersection(kinds):
        _check_object({"class_path": value}, kinds, name, trusted)


def _check_object(
    described: Mapping[str, Any], kinds: Collection[type], name: str, trusted: Collection[str] | None
) -> None:
    path = described["class_path"]
    module = str(path).partition(".")[0]
    if trusted is not None and module not in trusted:
        raise PatchadError(
            f"{name} names {path}, which is not patchad's and may run anything; if you wrote or trust it, give "
            f"--allow {module} (in Python, patchad.allow({module!r}))"
        )
    slots = {argument: set(classes(hint)) for argument, hint in hints(_check_class(path, kinds, name)).items()}
    for arguments in ("init_args", "dict_kwargs"):
        for argument, value in (described.get(arguments) or {}).items():
            _check(value, slots.get(argument, ()), f"{name}.{argument}", trusted)


def _check_class(path: Any, kinds: Collection[type], name: str) -> type:
    """The class of that path; where annotations do not say of which kind it must be, one that a `spec` may hold."""
    try:
        named = resolve_name(path) if isinstance(path, str) else path
    except (ImportError, AttributeError, ValueError) as error:
        raise PatchadError(f"{name} names {path}, which is not there: {error}") from error
    wanted = tuple(kinds) or (Configurable,)
    if not (inspect.isclass(named) and issubclass(named, wanted)):
        kind = " or ".join(sorted(kind.__name__ for kind in wanted))
        raise PatchadError(f"{name} names {path}, which is no {kind}")
    return named


def hints(kind: type) -> dict[str, Any]:
    """Annotations of the arguments of a class, those that it hands on to its bases among them, as far as known."""
    known: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if "__init__" in vars(base):
            with contextlib.suppress(NameError):  # of what is imported for type checkers alone
                known |= get_type_hints(vars(base)["__init__"])
    return known


def classes(hint: Any) -> Iterator[type]:
    """The classes, beside numbers, of which an argument of that annotation takes objects, or makes them.

    Example:
        >>> from collections.abc import Callable
        >>> [kind.__name__ for kind in classes(dict[str, Path] | Callable[[int], PatchadError] | None)]
        ['str', 'Path', 'PatchadError']
    """
    if inspect.isclass(hint) and not get_args(hint) and hint not in NUMBERS:
        yield hint
    for part in get_args(hint):
        yield from classes(part)
