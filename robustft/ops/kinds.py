"""What kind of thing an argument is, held against the annotation of its parameter.

    @checked
    def threshold(scores: Tensor | np.ndarray, tpr: float = 0.95) -> float

    threshold("word")       TypeError: scores is 'word'; expected a tensor or an array of numbers

A parameter is annotated once, for type checkers, readers and this check. What is compared at a call is worked out at
the function's first call: a call then costs a look at the type of each argument.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import numbers
import operator
import os
import reprlib
import types
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from typing_extensions import Unpack, get_type_hints

from robustft.ops import ranks

P = ParamSpec("P")
R = TypeVar("R")

Taker = Callable[[Any], Any]
"""Gives an argument as the function takes it, or raises a TypeError or ValueError that names it."""


def has_numbers(values: Tensor) -> bool:
    """Whether numbers can be read from it: meta and fake tensors have none, torch.func's transforms hide them."""
    return not (values.is_meta or isinstance(values, FakeTensor) or torch._C._are_functorch_transforms_active())


def dense(name: str, value: Any) -> Tensor:
    """The tensor, or an error: kernels read strided memory."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {described(value)}; expected a tensor")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a {kind} tensor; expected a dense one, as to_dense() or to_padded_tensor() gives")
    return value


def held(name: str, value: Any) -> Tensor:
    """A dense tensor that holds numbers."""
    if dense(name, value).is_meta:
        raise ValueError(f"{name} is a meta tensor, which holds no numbers; expected numbers")
    return value


def array(name: str, value: Any) -> Tensor:
    """A dense tensor of what is one, a numpy array or nested lists, holding numbers."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"{name} is {described(value)}; expected a tensor or an array of numbers") from error
    return held(name, value)


def described(value: Any) -> str:
    """What an argument was, in a few words: its type, and its value where that is short."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype}"
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return repr(value) if len(repr(value)) <= 40 else type(value).__name__
    if isinstance(value, (list, tuple, dict, set)):
        return f"{type(value).__name__} {reprlib.repr(value)}"
    return type(value).__name__


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose arguments are first held against its annotations, so that none of another kind gets in.

    Tensors have to be dense. numpy's scalars, and tensors of one number, become numbers where numbers are asked for;
    arrays become tensors where arrays are taken. Of a sequence or a mapping the entries are looked at too. Parameters
    that are `Any`, a protocol, or not annotated, are left alone. `**options: Unpack[T]` are those of the TypedDict T.
    """
    take = taking(function)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        given, options = take(args, kwargs)
        return function(*given, **options)

    return wrapper


Given = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call, by place and by name."""


def taking(function: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], Given]:
    """How `checked` takes the arguments of a call of the function."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    placed = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
    grouped = any(p.name == "group" for p in named) and "self" not in signature.parameters
    owned = "self" in signature.parameters and function.__name__ != "__init__"

    @functools.cache
    def takers() -> tuple[tuple[Taker | None, ...], dict[str, Taker]]:
        """By place, and by name."""
        space = inspect.unwrap(function).__globals__
        of = {p.name: _taker(p.name, _evaluated(p.annotation, space)) for p in named}
        for p in parameters:
            if p.kind is p.VAR_KEYWORD:
                of |= {name: _taker(name, kind) for name, kind in _unpacked(_evaluated(p.annotation, space)).items()}
        return tuple(of[name] for name in placed), {name: taker for name, taker in of.items() if taker is not None}

    def taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        by_place, by_name = takers()
        given = [value if take is None else take(value) for take, value in zip(by_place, args, strict=False)]
        if kwargs:
            kwargs = {name: by_name[name](value) if name in by_name else value for name, value in kwargs.items()}
        return (*given, *args[len(given) :]), kwargs

    def take(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        group = kwargs.get("group") if grouped else _group_of(args[0]) if owned and args else None
        if group is None or not isinstance(group, ranks.ProcessGroup):
            return taken(args, kwargs)

        # An error of one rank's arguments is raised by all: the others wait for this rank.
        def check() -> Given:
            signature.bind(*args, **kwargs)
            return taken(args, kwargs)

        return ranks.checked(group, check)

    return take if grouped or owned else taken


def _group_of(owner: Any) -> Any:
    """The process group over which a method of `owner` computes, if it has `rank_group`."""
    return owner.rank_group() if hasattr(type(owner), "rank_group") else None


def check_fields(instance: Any) -> None:
    """`checked` for a dataclass, to be called in its `__post_init__`: raises, and changes nothing."""
    cls = type(instance)
    if cls not in _FIELDS:
        _FIELDS[cls] = _field_takers(cls)
    for name, take in _FIELDS[cls].items():
        take(getattr(instance, name))


_FIELDS: dict[type, dict[str, Taker]] = {}


def _field_takers(cls: type) -> dict[str, Taker]:
    namespace = vars(inspect.getmodule(cls))
    found = {field.name: _taker(field.name, _evaluated(field.type, namespace)) for field in dataclasses.fields(cls)}
    return {name: taker for name, taker in found.items() if taker is not None}


def _evaluated(annotation: Any, namespace: dict[str, Any]) -> Any:
    """What an annotation says; `Any` where its names are those of type checkers alone."""
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        return eval(annotation, namespace) if isinstance(annotation, str) else annotation
    except NameError:
        return Any


def _unpacked(annotation: Any) -> dict[str, Any]:
    """The annotations of the TypedDict in `Unpack`, by name; none of anything else."""
    if get_origin(annotation) is not Unpack:
        return {}
    (options,) = get_args(annotation)
    return get_type_hints(options)


def _taker(name: str, annotation: Any) -> Taker | None:
    """How an argument of a parameter is taken; None for one that may be anything."""
    kinds = get_args(annotation) if _is_union(annotation) else (annotation,)
    kinds = tuple(part for kind in kinds for part in (get_args(kind) if _is_union(kind) else (kind,)))
    tests = [_test(kind) for kind in kinds]
    if any(test is None for test in tests):
        return None
    others = [test for test, kind in zip(tests, kinds, strict=True) if test is not None and kind not in _PLAIN]
    as_it_is = frozenset(kind for kind in kinds if kind in (float, str, bool, type(None)))
    takes = {kind: kind in kinds for kind in _PLAIN}
    devices = torch.device in kinds
    paths = any(isinstance(of := get_origin(kind) or kind, type) and issubclass(of, os.PathLike) for kind in kinds)
    words = " or ".join(dict.fromkeys(map(_words, kinds)))

    if devices or paths:
        as_it_is -= {str}
    plain_tensor = Tensor if takes[Tensor] and not takes[np.ndarray] else None

    def take(value: Any) -> Any:
        kind = type(value)
        if kind in as_it_is:
            return value
        if kind is plain_tensor and value.layout is torch.strided and not value.is_nested:
            return value
        if takes[np.ndarray]:
            return array(name, value)
        if takes[Tensor] and isinstance(value, Tensor):
            return dense(name, value)
        if paths and kind is str and not value:
            raise ValueError(f"{name} is an empty string; expected a path")
        if kind is str and takes[str] and not devices:
            return value
        if kind is int and takes[int]:
            return _int64(name, value)
        if any(test(value) for test in others):
            return value
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return value
        if takes[int] or takes[float] or takes[bool]:
            number = _one_number(value)
            if not isinstance(number, (bool, np.bool_)):
                if takes[int] and isinstance(number, numbers.Integral):
                    return _int64(name, operator.index(number))
                if takes[float] and isinstance(number, numbers.Real):
                    return _float64(name, number)
            elif takes[bool]:
                return bool(number)
        if takes[str] and takes[int] and not others:
            return value  # `memory`, whose check knows which words there are
        raise TypeError(f"{name} is {described(value)}; expected {words}")

    return take


_PLAIN = (Tensor, np.ndarray, float, int, bool, str, type(None))
"""Kinds that `_taker` takes itself, some of them converted."""


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _one_number(value: Any) -> Any:
    """The number in a tensor or array of one element, anything else as it is."""
    if isinstance(value, Tensor) and value.layout is torch.strided and value.numel() == 1 and has_numbers(value):
        return value.item()
    return value.item() if isinstance(value, np.ndarray) and value.shape == () else value


def _int64(name: str, value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value}; expected an integer of 64 bits")
    return value


def _float64(name: str, value: Any) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is {value}; expected a number that fits a float64") from error


def _test(kind: Any) -> Callable[[Any], bool] | None:
    """Whether a value is of a kind; None for kinds that say nothing."""
    if kind is Any:
        return None
    if _is_union(kind):
        tests = [_test(part) for part in get_args(kind)]
        known = [test for test in tests if test is not None]
        return (lambda value: any(test(value) for test in known)) if len(known) == len(tests) else None
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return lambda value: isinstance(value, tuple(map(type, parts)))  # which of them, the function says
    if origin is collections.abc.Callable or kind is collections.abc.Callable:
        return callable
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return _entries(*map(_test, parts))
    if origin is tuple and parts[-1:] != (...,):
        return _places(tuple(map(_test, parts)))
    if isinstance(origin, type) and issubclass(origin, collections.abc.Sequence):
        return _items(_test(parts[0]))
    if origin is collections.abc.Iterable:
        return lambda value: (
            _listed(value)
            or (isinstance(value, collections.abc.Iterable) and not isinstance(value, (str, bytes, Tensor, np.ndarray)))
        )
    if isinstance(origin, type):
        kind = origin
    if kind is None:
        kind = type(None)
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return None
    if kind is torch.device:
        return _is_device
    if kind is float:
        return lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is int:
        return lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return lambda value: isinstance(value, kind)


def _entries(key: Callable[[Any], bool] | None, value: Callable[[Any], bool] | None) -> Callable[[Any], bool]:
    def test(given: Any) -> bool:
        return (
            isinstance(given, collections.abc.Mapping)
            and (key is None or all(map(key, given)))
            and (value is None or all(map(value, given.values())))
        )

    return test


def _listed(given: Any) -> bool:
    """Whether it is a sequence: numpy's arrays and tensors of several numbers are, strings are not."""
    if isinstance(given, (Tensor, np.ndarray)):
        return given.ndim > 0
    return isinstance(given, collections.abc.Sequence) and not isinstance(given, (str, bytes))


def _items(item: Callable[[Any], bool] | None) -> Callable[[Any], bool]:
    return lambda given: _listed(given) and (item is None or all(item(_one_number(part)) for part in given))


def _places(items: tuple[Callable[[Any], bool] | None, ...]) -> Callable[[Any], bool]:
    def test(given: Any) -> bool:
        return (
            _listed(given)
            and len(given) == len(items)
            and all(item is None or item(_one_number(part)) for item, part in zip(items, given, strict=True))
        )

    return test


def _is_device(value: Any) -> bool:
    try:
        return isinstance(torch.device(value), torch.device) and not isinstance(value, bool)
    except (RuntimeError, TypeError, ValueError):
        return False


def _words(kind: Any) -> str:
    """What an error calls a kind."""
    if kind in _WORDS:
        return _WORDS[kind]
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is collections.abc.Callable or kind is collections.abc.Callable:
        return "a callable"
    if _is_union(kind):
        return " or ".join(map(_words, parts))
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return f"a mapping of {_plural(parts[0])} to {_plural(parts[1])}"
    if origin is tuple and parts[-1:] != (...,):
        return f"({', '.join(_words(part) for part in parts)})"
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        return f"a sequence of {_plural(parts[0])}"
    named = getattr(kind, "__name__", str(kind))
    return f"an {named}" if named[0] in "AEIOU" else f"a {named}"


def _plural(kind: Any) -> str:
    words = _words(kind)
    return " or ".join(f"{word.removeprefix('an ').removeprefix('a ')}s" for word in words.split(" or "))


_WORDS = {
    Any: "anything",
    Tensor: "a tensor",
    np.ndarray: "an array",
    float: "a number",
    int: "an integer",
    str: "a string",
    bool: "True or False",
    type(None): "None",
    os.PathLike[str]: "a path",
    torch.device: "a device",
    torch.nn.Module: "a module",
}
