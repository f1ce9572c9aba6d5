"""Arguments checked against their annotations: what a signature says is what a call must give.

A wrong argument is refused by name before any work, instead of failing somewhere inside another library. Kinds of values are
checked here, in one place; ranges and choices where they are explained (`__post_init__`, the first lines of a function).

Numbers are stricter than their annotations: a `float` must be finite, an `int` must fit into 64 bits, and a bool is neither.
Annotations that only a type checker can resolve (names imported under ``TYPE_CHECKING``) are not checked.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from refimpl.core.errors import OptionError, nearest

F = TypeVar("F", bound=Callable[..., Any])

_LOOKED_AT = 1000  # entries of a long list: enough to find a list of something else, without reading all of it
_SHOWN = 60  # characters of a value in a message
_WORDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string", type(None): "None"}


def checked(*but: str) -> Callable[[F], F]:
    """Decorator: a call's arguments must be of the kinds that the signature names.

    Args:
        but: parameters that the function checks itself, with a better message.

    Raises:
        OptionError: from a call with an argument of another kind, a missing one, or one that does not exist.

    Example:
        >>> @checked()
        ... def halves(text: str, times: int = 1) -> str:
        ...     return text[: len(text) // 2**times]
        >>> halves("abcd", times="1")
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: times='1': use a whole number
        >>> halves("abcd", tims=1)
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: halves has no argument 'tims'; use one of 'text', 'times' (did you mean 'times'?)
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        kinds: dict[str, Any] = {}  # resolved by the first call: a module may import what it names further down

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not kinds:
                names = vars(sys.modules[function.__module__])
                kinds.update({name: _resolved(p.annotation, names) for name, p in signature.parameters.items()})
                kinds.update(dict.fromkeys(but, Any))
            check_call(function.__name__, signature, kinds, args, kwargs)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


class Checked:
    """Base of classes whose constructors, also those that `dataclass` writes for subclasses, check their arguments.

    Raises:
        OptionError: from a call with an argument of another kind, a missing one, or one that does not exist.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Grid(Checked):
        ...     bits: int = 4
        >>> Grid(bits=2.5)
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: bits=2.5: use a whole number
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # copies are made without any, and then given their fields
            check_call(cls.__name__, *_constructor(cls), args, kwargs)  # type: ignore[arg-type]
        return super().__new__(cls)


@functools.cache
def _constructor(cls: type) -> tuple[inspect.Signature, dict[str, Any]]:
    """Signature of a class, and the kinds of its arguments: each field means what it means where it was written."""
    initialise = inspect.signature(cls.__init__)  # type: ignore[misc]
    parameters = list(initialise.parameters.values())[1:]
    fields = {
        name: (annotation, vars(sys.modules[base.__module__]))
        for base in reversed(cls.__mro__)
        for name, annotation in inspect.get_annotations(base).items()
    }
    start: Any = cls.__init__  # type: ignore[misc]
    own = vars(sys.modules[start.__module__]) if hasattr(start, "__module__") else {}
    kinds = {p.name: _resolved(*fields.get(p.name, (p.annotation, own))) for p in parameters}
    return initialise.replace(parameters=parameters), kinds


def check_call(
    name: str, signature: inspect.Signature, kinds: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Check the arguments of one call.

    Args:
        name: of what is called, for messages.
        signature: its parameters.
        kinds: the annotation of each.
        args, kwargs: of the call.

    Raises:
        OptionError: they do not fit.

    Example:
        >>> def double(x: float): ...
        >>> check_call("double", inspect.signature(double), {"x": float}, (math.nan,), {})
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: x=nan: use a finite number
    """
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        known = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for given in kwargs:
            if given not in known:
                raise OptionError(f"{name} has no argument {given!r}; use {nearest(given, known)}") from error
        raise OptionError(f"{name}: {error}; it takes {signature}".replace("<factory>", "...")) from error
    for argument, value in bound.items():
        kind, parameter = kinds[argument], signature.parameters[argument]
        each: Iterable[tuple[str, Any]] = [(argument, value)]
        if parameter.kind is parameter.VAR_POSITIONAL:
            each = [(f"{argument}[{place}]", entry) for place, entry in enumerate(value)]
        elif parameter.kind is parameter.VAR_KEYWORD:
            each = value.items()
        for where, entry in each:
            if not fits(entry, kind):
                place, wrong, wanted = _innermost(entry, kind)
                raise OptionError(f"{where}{place}={shown(wrong)}: use {words(wanted)}")


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of the kind that an annotation names.

    Args:
        value: anything.
        kind: the annotation, resolved; one that cannot be checked fits everything.

    Example:
        >>> fits(3, float), fits(3.0, int), fits((1, "a"), tuple[int, ...]), fits(None, Union[int, None])
        (True, False, False, True)
    """
    base, parts = get_origin(kind) or kind, get_args(kind)
    if base in (Union, types.UnionType):
        if isinstance(value, str) and Path in parts and ("\0" in value or not value):
            return False  # the folder "" would be the current one
        return any(fits(value, part) for part in parts)
    if base is None or base is type(None):
        return value is None
    if base is bool:
        return isinstance(value, bool)
    if base is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63
    if base is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and _finite(value)
    if base is Callable or not isinstance(base, type):
        return callable(value) if base is Callable else True
    if base is Path:
        return isinstance(value, os.PathLike)
    if base is tuple and parts:
        if parts[-1] is ...:
            return isinstance(value, tuple) and _all_fit(value, parts[0])
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if issubclass(base, Mapping):
        return isinstance(value, base) and (
            not parts or (_all_fit(value.keys(), parts[0]) and _all_fit(value.values(), parts[1]))
        )
    if base in (Sequence, Iterable, Collection) or issubclass(base, (list, set, frozenset)):
        row = base is Sequence and hasattr(value, "__array__") and getattr(value, "ndim", 0) == 1  # of numpy
        if not (row or isinstance(value, base)) or isinstance(value, (str, bytes)):
            return False
        return not parts or not isinstance(value, Collection) or _all_fit(value, parts[0])  # an iterator is not used up
    try:
        return isinstance(value, base)
    except TypeError:  # a protocol that says nothing at run time
        return True


def misfit(value: object, fields: Mapping[str, Any]) -> str | None:
    """What is wrong with a dictionary that was read from a file.

    Args:
        value: that was read.
        fields: the kind of each entry that it must have; others may be there.

    Returns:
        The reason in words; None if nothing is wrong.

    Example:
        >>> misfit({"bits": "4"}, {"bits": int}), misfit({"bits": 4}, {"bits": int})
        ("'bits' is '4', not a whole number", None)
    """
    if not isinstance(value, Mapping):
        return f"it holds {shown(value)}, not a dictionary"
    for name, kind in fields.items():
        if name not in value:
            return f"it has no {name!r}"
        if not fits(value[name], kind):
            place, wrong, wanted = _innermost(value[name], kind)
            return f"{name!r}{place} is {shown(wrong)}, not {words(wanted)}"
    return None


def words(kind: Any) -> str:
    """An annotation in words, for a message.

    Example:
        >>> words(Union[int, None]), words(tuple[float, float])
        ('a whole number or None', 'a tuple of 2: a finite number, a finite number')
    """
    base, parts = get_origin(kind) or kind, get_args(kind)
    if base in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(part) for part in parts))
    if base in _WORDS:
        return _WORDS[base]
    if base is Callable:
        return "a function"
    if base is tuple and parts and parts[-1] is not ...:
        return f"a tuple of {len(parts)}: {', '.join(map(words, parts))}"
    name = getattr(base, "__name__", str(base))
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return f"{article} {name}" + (f" of {', each '.join(words(p) for p in parts if p is not ...)}" if parts else "")


def shown(value: object) -> str:
    """A value on one short line, for a message.

    Example:
        >>> shown("a" * 100), shown(math.inf)
        ("'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...", 'inf')
    """
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of {value.dtype} {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever its repr may do: an error is being reported already
        text = type(value).__name__
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _innermost(value: Any, kind: Any) -> tuple[str, Any, Any]:
    """The entry of a list, tuple or dictionary that does not fit, as its place, itself and the kind it should have."""
    for part in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,):
        base, parts = get_origin(part), [each for each in get_args(part) if each is not ...]
        if not (isinstance(base, type) and parts and isinstance(value, base) and isinstance(value, Collection)):
            continue
        if isinstance(value, (str, bytes)) or (base is tuple and 1 < len(parts) != len(value)):
            continue
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for number, (place, entry) in enumerate(islice(entries, _LOOKED_AT)):
            wanted = parts[number] if base is tuple and len(parts) > 1 else parts[-1]
            if not fits(entry, wanted):
                deeper, wrong, wanted = _innermost(entry, wanted)
                return f"[{place!r}]{deeper}", wrong, wanted
    return "", value, kind


def _all_fit(values: Iterable[object], kind: Any) -> bool:
    return all(fits(value, kind) for value in islice(values, _LOOKED_AT))


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (OverflowError, TypeError):  # a whole number that no float can hold
        return False


def _resolved(annotation: Any, names: Mapping[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return Any if annotation is inspect.Parameter.empty else annotation
    try:
        return eval(annotation, dict(names))  # the package's own source
    except (NameError, AttributeError, TypeError, SyntaxError):
        return Any
