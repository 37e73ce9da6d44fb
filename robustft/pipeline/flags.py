"""A function's arguments as flags: its signature says names, types and defaults, its docstring what they mean.

    def train(data, *, output: str, lr: float | None = None, ...)      robustft train DATA --output O [--lr LR] ...
    a file of YAML with the same names                                 --config FILE, under any flag that is given

So an option is known once. Nothing heavy is loaded: the function is not called here.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

from robustft.pipeline.arguments import TrainingSets

HIDDEN = ("log", "progress")  # of callers in Python
NAMES = {"methods": "method", "shifts": "shift", "accumulate": "accum_freq"}
"""Flags that may be repeated are named in the singular; one is named as open_clip does."""
POSITIONAL = ("data", "run", "runs")


P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose arguments are held against its annotations at a call (`robustft.ops.kinds.checked`), which
    loads torch then. A path may be given where text is asked for."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        from robustft.ops import kinds

        taken: Any = kinds.checked(function)
        return taken(*map(_text, args), **{name: _text(value) for name, value in kwargs.items()})

    return wrapper


def check_word(name: str, word: Any, words: Any) -> None:
    """ValueError unless it is one of the words of a Literal."""
    if word not in typing.get_args(words):
        raise ValueError(f"{name} must be one of {', '.join(typing.get_args(words))}, got {word!r}")


def check_source(data: Any) -> None:
    """TypeError unless `data` is a place, or data that were opened."""
    from robustft.data.opening import Data
    from robustft.ops.kinds import described

    if not isinstance(data, (str, Data)) or data == "":
        raise TypeError(f"data is {described(data)}; expected a path, a pattern, or what robustft.data.open gave")


def _text(value: Any) -> Any:
    """Paths as text, in mappings too; anything else as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return {name: _text(part) for name, part in value.items()} if isinstance(value, Mapping) else value


class Option(NamedTuple):
    """An argument as a flag: its type from text, whether it takes several, and the words it is limited to."""

    name: str
    kind: type
    default: Any
    help: str
    several: bool = False
    pairs: bool = False
    choices: tuple[str, ...] | None = None

    @property
    def flag(self) -> str:
        return "--" + NAMES.get(self.name, self.name).replace("_", "-")


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a function, in the order of its signature; what its docstring does not describe is none."""
    told = described(function)
    space = vars(inspect.getmodule(function))
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in HIDDEN or name in POSITIONAL or name not in told:
            continue
        found[name] = _option(name, parameter, told[name], space)
    return found


def _option(name: str, parameter: inspect.Parameter, help: str, space: Mapping[str, Any]) -> Option:
    annotation = str(parameter.annotation)
    default = None if parameter.default is parameter.empty else parameter.default
    named = space.get(annotation.split(" ")[0])
    if typing.get_origin(named) is Literal:
        return Option(name, str, default, help, choices=tuple(map(str, typing.get_args(named))))
    if annotation.startswith("Mapping[str, str]"):
        return Option(name, str, {}, help, several=True, pairs=True)
    if annotation.startswith("Sequence[str]"):
        return Option(name, str, default, help, several=True)
    kinds: dict[str, type] = {"bool": bool, "int": int, "float": float}
    return Option(name, kinds.get(annotation.split(" ")[0], str), default, help)


def described(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstring's "Args:" say of each argument, without line breaks."""
    text = inspect.getdoc(function) or ""
    block = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for names, told in re.findall(r"^    ([\w, ]+): (.*?)(?=^    \S|\Z)", block[1] if block else "", re.M | re.S):
        for name in names.split(", "):
            found[name] = " ".join(told.split())
    return found


def add_flags(parser: argparse.ArgumentParser, function: Callable[..., Any]) -> None:
    """Gives a parser the flags of a function's options. What is not given stays away, so that a file can say it."""
    shared = parser.add_argument_group("images and tables")
    for option in options_of(function).values():
        place = shared if option.name in TrainingSets.__annotations__ else parser
        help = option.help.rstrip(".") + _shown(option.default)
        if option.kind is bool:
            place.add_argument(option.flag, dest=option.name, action="store_true", default=argparse.SUPPRESS, help=help)
            continue
        arguments: dict[str, Any] = {"type": option.kind}
        if option.several:
            arguments["nargs"] = "+"
        if option.pairs:
            arguments["type"], arguments["metavar"] = _pair, "NAME=DATA"
        elif option.choices:
            arguments["choices"] = option.choices
        elif option.kind is not bool:
            arguments["metavar"] = NAMES.get(option.name, option.name).rpartition("_")[2].upper()
        place.add_argument(
            option.flag, dest=option.name, default=argparse.SUPPRESS, help=help.replace("%", "%%"), **arguments
        )


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was parsed, with pairs as a dictionary; ValueError for a name that is given twice."""
    found = dict(options)
    for name, value in options.items():
        if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
            pairs: dict[str, str] = {}
            for key, item in value:
                if key in pairs:
                    raise ValueError(f"--{name.replace('_', '-')}: the name {key!r} is given twice")
                pairs[key] = item
            found[name] = pairs
    return found


def read_config(path: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments in a YAML file; ValueError, naming file and key, for unknown ones and other types."""
    import yaml

    from robustft.files import read_text

    try:
        found = yaml.safe_load(read_text(path, "YAML of options"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected options by name, got {found!r:.80}")
    known, signature = options_of(function), inspect.signature(function).parameters
    for name, value in found.items():
        if name not in signature or name in HIDDEN:
            close = ", ".join(sorted(known))
            raise ValueError(f"{path}: no option is called {name!r}; there are data, {close}")
        option = known.get(name)
        if option is None or value is None or isinstance(value, (dict, list)) or option.several:
            continue
        wanted: Any = (int, float) if option.kind is float else option.kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and option.kind is not bool):
            raise ValueError(f"{path}: {name} is {value!r:.80}, expected {option.kind.__name__}")
        if option.choices and value not in option.choices:
            raise ValueError(f"{path}: {name} is {value!r:.80}, expected one of {', '.join(option.choices)}")
    return found


def config_text(function: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """All options of a function as YAML: those that are given, and the defaults of the others."""
    import yaml

    whole = {"data": None, **{name: option.default for name, option in options_of(function).items()}} | dict(options)
    return yaml.safe_dump({name: _yaml(value) for name, value in whole.items()}, sort_keys=False)


def _yaml(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=DATA")
    return name, value


def _shown(default: Any) -> str:
    if default is None or default is False or isinstance(default, Mapping) or default == ():
        return ""
    words = " ".join(map(str, default)) if isinstance(default, Sequence) and not isinstance(default, str) else default
    return f" (default: {words})"
