"""Modules with another part, or another `forward`, of the same weights. Hooks would be seen by other threads that use
the module; these are not. A state, a copy and the names of the module do not know of them."""

from __future__ import annotations

from typing import Any

from torch import nn


def hooks_of(module: nn.Module) -> list[Any]:
    """The dictionaries of a module's hooks, which are empty while there are none."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [getattr(module, kind) for kind in kinds]


def view_of(module: nn.Module, as_a: type[nn.Module] | None = None, **others: dict[str, Any]) -> Any:
    """A module of the same class, or of another, with the same parts but for some of its dictionaries."""
    kind = as_a or type(module)
    view = kind.__new__(kind)
    view.__dict__ = module.__dict__ | others
    return view


def with_part(module: nn.Module, **parts: Any) -> Any:
    """The module with other modules in place of some that it holds itself."""
    return view_of(module, _modules={**module._modules, **parts})


def with_replaced(module: nn.Module, part: nn.Module, given: nn.Module) -> Any:
    """The module with another one in the place of a part of it, wherever that is."""
    if module is part:
        return given
    children = {name: child for name, child in module._modules.items() if child is not None}
    holding = {name: child for name, child in children.items() if any(one is part for one in child.modules())}
    return with_part(module, **{name: with_replaced(child, part, given) for name, child in holding.items()})
