"""Arguments that several commands take: each is named, typed and described once, for all of them.

    @spelled_out
    def check_data(data, *, workers=None, **where: Unpack[TrainingSets])

A type checker reads the annotation. `spelled_out` puts the arguments into what help() shows and what flags.py reads,
the signature and the docstring, and gives the function those that a caller leaves out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypedDict, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ImageSets(TypedDict, total=False):
    """Where images to measure on are, and how a table of them is read.

    Args:
        shifts: further test sets of the same classes, NAME=DATA.
        ood: sets of other classes, which should not be accepted, NAME=DATA.
        images: folder that the paths of a table or a split are relative to.
        csv_img_key: column of a table with the image files.
        csv_label_key: column of a table with the classes.
        csv_split_key: column of a table that tells train, val and test.
        csv_separator: between the columns of a table.
        class_names: what the classes are called in captions: a file (lines, JSON list, JSON {folder: name}), or
            imagenet.
    """

    shifts: Mapping[str, str] | None
    ood: Mapping[str, str] | None
    images: str | None
    csv_img_key: str | None
    csv_label_key: str | None
    csv_split_key: str | None
    csv_separator: str | None
    class_names: str | Mapping[str, str] | Sequence[str] | None


class TrainingSets(ImageSets, total=False):
    """Where images to train and measure on are, and how a table of them is read.

    Args:
        csv_caption_key: column of a table with captions.
        groups: columns of a table that tell groups, such as the background.
    """

    csv_caption_key: str | None
    groups: Sequence[str]


GROUPS: Mapping[str, Any] = {f"Unpack[{kind.__name__}]": kind for kind in (ImageSets, TrainingSets)}
"""By the annotation of the `**` that takes them."""


def spelled_out(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with what the TypedDict of its `**` holds in its signature and its docstring, one by one.

    A default is None where the type has it, else empty. The function gets every one of them, given or not.
    """
    given = inspect.signature(function)
    *own, rest = given.parameters.values()
    group: Any = GROUPS[str(rest.annotation)]
    shared = []
    for name, annotation in group.__annotations__.items():
        kind = getattr(annotation, "__forward_arg__", annotation)
        default = None if kind.endswith("None") else ()
        shared.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    signature = given.replace(parameters=[*own, *shared])
    defaults = {parameter.name: parameter.default for parameter in shared}

    @wraps(function)
    def spelled(*args: P.args, **kwargs: P.kwargs) -> T:
        if unknown := [name for name in kwargs if name not in signature.parameters]:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}")
        kwargs.update({name: default for name, default in defaults.items() if name not in kwargs})
        return function(*args, **kwargs)

    vars(spelled)["__signature__"] = signature
    head, described, tail = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    lines, blank, notes = tail.partition("\n\n")
    spelled.__doc__ = head + described + lines.rstrip() + _described(group) + blank + notes
    return spelled


def _described(group: Any) -> str:
    """The lines of its "Args:", after those of the one that it extends."""
    parts = [kind for kind in GROUPS.values() if kind.__annotations__.items() <= group.__annotations__.items()]
    return "".join("\n" + (inspect.getdoc(part) or "").partition("Args:\n")[2].rstrip() for part in parts)
