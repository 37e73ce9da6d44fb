"""Modules with another part, or another `forward`, of the same weights. Hooks would be seen by other threads that use
the module; these are not. A state, a copy and the names of the module do not know of them."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Attributes of a module that hold its hooks."""


def shared(module: nn.Module, as_a: type[nn.Module] | None = None, **others: dict[str, Any]) -> Any:
    """A module of the same class, or of another, with the same parts but for some of its dictionaries."""
    kind = as_a or type(module)
    view = kind.__new__(kind)
    view.__dict__ = module.__dict__ | others
    return view


def with_part(module: nn.Module, **parts: Any) -> Any:
    """The module with other modules in place of some that it holds itself."""
    return shared(module, _modules={**module._modules, **parts})


def with_given(module: nn.Module, part: nn.Module, given: nn.Module) -> Any:
    """The module with another one in the place of a part of it, wherever that is."""
    if module is part:
        return given
    children = {name: child for name, child in module._modules.items() if child is not None}
    holding = {name: child for name, child in children.items() if any(one is part for one in child.modules())}
    return with_part(module, **{name: with_given(child, part, given) for name, child in holding.items()})
