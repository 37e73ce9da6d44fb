"""Towers that torch.compile has compiled, while a method takes a step.

What is compiled is the `forward` of blocks: the parts of a tower that are alike, such as a transformer's, share their
code, so that one is compiled for all of them, with its backward. Parameters, names, states and copies of the model do
not know of it: a block has the compiled `forward` only inside `with`, where the loss and its gradients are computed.
Validation, checkpoints and `classifier()` find the model as it was.

    image blocks    shapes as they are: a batch of another size is compiled for once
    text blocks     any number of texts, of any length: both differ from step to step
    a hook inside   a block, as methods and users may put there, has it run as it is: torch.compile does not look
                    whether hooks come and go. Hooks of the block itself (deep prompts) are called around its code

CUDA graphs. "reduce-overhead" and "max-autotune" have torch record what a device is told, which pays where the launches
take longer than the work. A recording is kept for each shape. So there the stack of an image tower's blocks is compiled
whole, one recording each way, and texts, whose shapes differ, are compiled without. A graph of the whole step, with the
loss and the update in it, is left out: the rate, the captions' shapes, labels that are looked at on the host, a teacher
that moves every so many steps and the loss scale of fp16 are decided on the host in the middle of the step, and a graph
would repeat them as they were at its recording: a wrong number, and no error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from robustft.clip.encoding import text_tower
from robustft.clip.views import hooks_of
from robustft.machine import CompileMode, compiler_found
from robustft.methods.base import Method
from robustft.methods.unsaved import Unsaved
from robustft.ops.kinds import checked

GRAPHS = ("reduce-overhead", "max-autotune")  # the modes in which torch records CUDA graphs
KINDS = 4  # of blocks in a tower, by their weights' shapes; one that has more is compiled whole
LIMIT = 64  # shapes and states that code is compiled for, before torch runs it as it is: 8 by default


class Unit(NamedTuple):
    """What is compiled at once, and whether it meets new shapes at each step."""

    module: nn.Module
    of_texts: bool


class CompiledTowers:
    """Inside `with`, the towers of a method run code that torch.compile has made of them, in the backward too.

    Every model that the method holds is compiled, frozen ones and teachers too, where a step first calls it. It is made
    once for a run, and entered at each step; DistributedDataParallel and FSDP may wrap the method before or after that.
    The same numbers to rounding; dropout has other draws. Outside the towers are as they were.

    Args:
        method: whose towers these are, on the device that it will train on.
        mode: of torch.compile: "default"; "reduce-overhead", CUDA graphs of the image towers; "max-autotune", kernels
            by measurement, and these graphs on a GPU; "max-autotune-no-cudagraphs".
        backend: of torch.compile.

    Raises:
        ValueError: an unknown mode or backend, CUDA graphs on another device, or a method without towers.
        RuntimeError: a compiler is missing (C++ for the CPU, Triton for a GPU), at once; or torch.compile has failed,
            when the block is left.
    """

    @checked
    def __init__(self, method: Method, mode: CompileMode = "default", *, backend: str = "inductor") -> None:
        device = method.steps.device
        check_compiler(mode, device, backend)
        self.graphs = mode in GRAPHS and device.type == "cuda"
        self.units = list(_units(method, whole=self.graphs))
        if not self.units:
            raise ValueError(f"compile must be False for this {type(method).__name__}: it holds no towers")
        self.mode, self.backend = mode, backend
        self._forwards: list[tuple[dict[str, Any], Callable[..., Any]]] = []
        self._held: list[ExitStack] = []

    def __enter__(self) -> CompiledTowers:
        if not self._forwards:  # loads a part of torch that takes seconds
            options = self._options()
            self._forwards = [(vars(unit.module), _compiled(unit, options)) for unit in self.units]
        held = ExitStack()
        held.enter_context(torch._dynamo.config.patch(recompile_limit=LIMIT))
        for attributes, forward in self._forwards:
            held.callback(_restore, attributes, attributes.get("forward"))
            attributes["forward"] = forward
        self._held.append(held)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._held.pop().close()
        cause = error
        while cause is not None:
            if type(cause).__module__.startswith(("torch._dynamo", "torch._inductor")):
                told = " ".join(str(cause).split())
                raise RuntimeError(
                    f"torch.compile could not compile a tower ({type(cause).__name__}: {told:.300}). All that it "
                    "reports stands above; compile=False trains without it"
                ) from error
            cause = cause.__cause__

    def _options(self) -> dict[str, Any]:
        if not self.graphs:
            return {"backend": self.backend, "mode": self.mode}
        from torch._inductor import list_mode_options

        modes = {**list_mode_options(self.mode), "triton.cudagraph_skip_dynamic_graphs": True}
        return {"backend": self.backend, "options": modes}


def check_compiler(mode: str, device: torch.device, backend: str = "inductor") -> None:
    """What `CompiledTowers` raises for a mode, and where there is no compiler for the device."""
    if mode not in get_args(CompileMode):
        raise ValueError(
            f"compile must be False, True or a mode, one of {', '.join(get_args(CompileMode))}, got {mode!r}"
        )
    if mode == "reduce-overhead" and device.type != "cuda":
        raise ValueError(
            f"compile='reduce-overhead' records CUDA graphs, and the method is on {device}: pass compile=True"
        )
    if backend != "inductor":
        if backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
            raise ValueError(f"backend must be one of {', '.join(known)}, got {backend!r}")
        return
    if device.type == "cpu" and not compiler_found():
        raise RuntimeError(
            "compile needs a C++ compiler for the CPU, and there is none: install one (Debian: apt install g++), name "
            "it in the environment variable CXX, or pass compile=False"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise RuntimeError("compile needs Triton for a GPU: pip install triton, or pass compile=False")


def _compiled(unit: Unit, options: dict[str, Any]) -> Callable[..., Any]:
    """The unit's `forward`, compiled; as it is, while there is a hook inside."""
    eager = unit.module.forward
    compiled = torch.compile(eager, dynamic=unit.of_texts, **options)
    inside = [module for module in unit.module.modules() if module is not unit.module]
    hooks = [kind for module in inside for kind in hooks_of(module)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return eager(*args, **kwargs) if any(hooks) else compiled(*args, **kwargs)

    return forward


def _restore(attributes: dict[str, Any], forward: Any) -> None:
    if forward is None:
        del attributes["forward"]
    else:
        attributes["forward"] = forward


def _units(method: Method, *, whole: bool) -> Iterator[Unit]:
    """What is compiled of each model in a method, each once. whole: stacks of image blocks in the place of blocks."""
    seen: set[int] = set()
    for model in _modules(method):
        visual = getattr(model, "visual", None)
        if not isinstance(visual, nn.Module) or not callable(getattr(model, "encode_image", None)):
            continue
        found = [Unit(module, False) for module in _of_images(visual, whole)]
        found += [Unit(block, True) for _, blocks in _stacks(text_tower(model), leaving=visual) for block in blocks]
        for unit in found:
            if id(unit.module) not in seen:
                seen.add(id(unit.module))
                yield unit


def _modules(root: nn.Module) -> Iterator[nn.Module]:
    """All modules, those too that a method holds beside its state."""
    for module in root.modules():
        yield module
        if isinstance(module, Unsaved):
            for held in module.held:
                yield from _modules(held)


def _of_images(visual: nn.Module, whole: bool) -> list[nn.Module]:
    """The blocks of an image tower; the tower itself where these are of too many kinds, as a ResNet's, or are none."""
    stacks = list(_stacks(visual))
    blocks = [block for _, blocks in stacks for block in blocks]
    if not 1 <= len(set(map(_kind, blocks))) <= KINDS:
        return [visual]
    return [parent for parent, _ in stacks] if whole and len(stacks) == 1 else blocks


def _stacks(module: nn.Module, leaving: nn.Module | None = None) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Lists of blocks, each with the module whose `forward` runs through it: the outermost lists whose parts have parts
    of their own, are of one class and of at most two kinds."""
    for child in module.children():
        if child is leaving:
            continue
        parts = list(child.children())
        listed = isinstance(child, (nn.ModuleList, nn.Sequential)) and parts
        if listed and len(set(map(type, parts))) == 1 and any(parts[0].children()) and len(set(map(_kind, parts))) <= 2:
            yield module, parts
        else:
            yield from _stacks(child)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    return (type(block), *(tuple(p.shape) for p in block.parameters()))
