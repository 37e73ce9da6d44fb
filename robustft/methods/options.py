"""Options said once: the constructor names them, and the configuration is read from how it was called.

    class Ramp(Method):
        def __init__(self, model: nn.Module, *, power: float = 2.0, **shared: Unpack[Shared]) -> None:
            super().__init__(model, **shared)

    Ramp(model, **prompts).config         {"method": "Ramp", ..., "power": 2.0}
    inspect.signature(Ramp)               power and, by name, all that `Shared` holds

A class writes its own options into its signature, and hands on those of the class above, which a TypedDict names for
type checkers. The same TypedDict says at run time which names a constructor takes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from robustft import clip
from robustft.ops.kinds import checked


class Configured:
    """What keeps its constructor's arguments, in a form that JSON takes, as `config`.

    An entry that the constructor wrote into `config` itself, such as a default that it worked out, stays.
    `uncompared` names the arguments that `config` leaves out, because they change nothing in what is computed or
    stand there in another form.
    """

    uncompared: ClassVar[tuple[str, ...]] = ()
    __signature__: ClassVar[inspect.Signature]
    config: dict[str, Any]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__init__" in vars(cls):
            cls.__signature__ = _signature(cls)
            type.__setattr__(cls, "__init__", _recording(cls, vars(cls)["__init__"]))


def described(value: Any, name: str) -> Any:
    """The argument `name` as a checkpoint keeps it: equal for what trains alike, and made of what JSON has."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Configured():
            return {type(value).__name__: value.config}
        case nn.Module():
            return clip.fingerprint(value)
        case Tensor():
            return digest(value)
        case Mapping():
            return {str(key): described(part, name) for key, part in value.items()}
        case Set():
            return sorted(described(part, name) for part in value)
        case Sequence():
            return [described(part, name) for part in value]
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            return float(value)
        case os.PathLike():
            return os.fspath(value)
    if dataclasses.is_dataclass(value):
        return {field.name: described(getattr(value, field.name), name) for field in dataclasses.fields(value)}
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot compare: write what tells it apart into "
        f'config["{name}"], or leave it out by uncompared = ("{name}",)'
    )


def digest(*parts: Any) -> str:
    """64 bits, in hexadecimal, of tensors' values and of what else its `repr` tells apart."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            array = part.detach().cpu().contiguous().numpy()
            found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()


def check_weights(**weights: float) -> None:
    """ValueError naming the first that is negative or not finite."""
    for name, value in weights.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")


def _signature(cls: type[Configured]) -> inspect.Signature:
    """The constructor's own parameters, and of the class above those that it hands on."""
    init = vars(cls)["__init__"]
    named = list(inspect.signature(init).parameters.values())[1:]
    own = [parameter for parameter in named if parameter.kind is not parameter.VAR_KEYWORD]
    if own != named:
        known = {parameter.name for parameter in own}
        passed = _unpacked(named[-1].annotation, init)
        above = getattr(super(cls, cls), "__signature__", inspect.Signature()).parameters.values()
        for parameter in above:
            taken = passed is None or parameter.name in passed
            if taken and parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in known:
                own.append(parameter)
    return inspect.Signature(own)


def _unpacked(annotation: Any, init: Callable[..., None]) -> frozenset[str] | None:
    """The names in the TypedDict of `**options: Unpack[...]`; None where it is annotated otherwise."""
    if isinstance(annotation, str):
        annotation = eval(annotation, init.__globals__)
    options = get_args(annotation)
    return frozenset().union(*(part.__required_keys__ | part.__optional_keys__ for part in options)) or None


def _recording(cls: type[Configured], init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, of arguments of the kinds that it names, which then writes its own options into `config`."""
    signature, init = inspect.signature(init), checked(init)
    own = [name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD][1:]

    @functools.wraps(init)
    def recording(self: Configured, *arguments: Any, **options: Any) -> None:
        known = cls.__signature__.parameters
        if unknown := [name for name in options if name not in known]:
            raise TypeError(
                f"{type(self).__name__} got an unexpected keyword argument {unknown[0]!r}; it has {', '.join(known)}"
            )
        init(self, *arguments, **options)
        given = signature.bind(self, *arguments, **options)
        given.apply_defaults()
        config = vars(self).setdefault("config", {})
        for name in own:
            if name not in cls.uncompared and name not in config:
                config[name] = described(given.arguments[name], name)

    return recording
