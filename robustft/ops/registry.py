"""Every operator, declared once by its family: what torch is told of it, what computes it where, what to try it on.

csrc/ops.cpp has the schemas, csrc/ the compiled kernels. A family's file here (contrastive.py, risks.py, ...) adds the
rest by `register(Op("cvar", ...))` when it is imported. Whoever needs a list of operators reads this one:

    for name, op in registry.OPERATORS.items():         # also kernels that others are made of, and `NAME_backward`
        for arguments in op.samples("cpu", torch.float32, seed=0):
            getattr(torch.ops.robustft, name)(*arguments)

    for name, examples in registry.PUBLIC.items():      # the functions of robustft.functional
        for call in examples(Source("cpu", torch.float32, seed=0)):
            getattr(functional, name)(*call.arguments, **call.options)

    registry.body("cvar", tensor.device, tensor.dtype)  # "compiled", "triton" or, where no body exists, "reference"

Samples are small and valid; tensors that get a gradient have `requires_grad`. Samples of NAME_backward are what NAME's
autograd hands to it. An operator named like a public function is what computes that function; the function's reference
is itself under `robustft.backend("reference")`. A function in PUBLIC without such an operator is plain torch.

To add an operator: its schema in csrc/ops.cpp, its `Op` in a family's file, its eager form in reference.py, its kernel
in csrc/cpu/ or triton/, its public function in functional.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from robustft.ops import accelerator
from robustft.ops.arguments import FLOATS
from robustft.ops.libraries import LIBRARIES

Body = Literal["reference", "compiled", "triton"]
"""What computes an operator: the eager form in reference.py, csrc/, or a kernel in robustft/ops/triton."""


class Source:
    """Where samples come from: tensors of one device and dtype, the same for the same seed."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype = torch.device(device), dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, grad: bool = False) -> Tensor:
        """Standard normal numbers."""
        return self._placed(torch.randn(shape, generator=self._generator), grad)

    def uniform(self, *shape: int, grad: bool = False) -> Tensor:
        """Numbers in [0, 1)."""
        return self._placed(torch.rand(shape, generator=self._generator), grad)

    def features(self, n: int, d: int, grad: bool = True) -> Tensor:
        """(n, d), rows of unit norm."""
        return self._placed(normalize(torch.randn(n, d, generator=self._generator), dim=1), grad)

    def labels(self, n: int, k: int) -> Tensor:
        """(n,) integers in [0, k), all of them where n allows it."""
        return (torch.arange(n) % k)[torch.randperm(n, generator=self._generator)].to(self.device)

    def scale(self, value: float, grad: bool = True) -> Tensor:
        """A multiplied-out logit scale, 0-d."""
        return self._placed(torch.tensor(value, dtype=torch.float64), grad)

    def _placed(self, values: Tensor, grad: bool) -> Tensor:
        return values.to(self.device, self.dtype).requires_grad_(grad)


class Call(NamedTuple):
    """How a function of `robustft.functional` may be called."""

    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = MappingProxyType({})


class Backward(NamedTuple):
    """An operator's autograd formula, and its gradient, an operator of its own: NAME_backward.

    The gradient is an operator so that torch.compile sees it; it refuses to be differentiated.
    """

    setup: Callable[[Any, tuple, Any], None]
    formula: Callable[..., Any]
    fake: Callable[..., object]
    body: Callable[..., object] | None = None
    results: int = 1
    """How many of the operator's outputs callers want; the others are there for the gradient."""
    means: bool = False
    """Whether the operator's body in Python takes `mean=True`: then these results are means, 0-d, and its gradient's
    body takes gradients by them."""
    joined: int | None = None
    """The place of an input that callers give `call` as two tensors: one below the other they are the operator's.
    Bodies in Python take the two as a tuple as well."""

    def pair(self, given: tuple) -> tuple:
        """The inputs of a body in Python, of those that `call` was given."""
        if self.joined is None:
            return given
        first, end = self.joined, self.joined + 2
        return *given[:first], given[first:end], *given[end:]

    def part(self, values: tuple) -> tuple:
        """What belongs to the inputs of `call`, of what belongs to the operator's: gradients, or the inputs."""
        if self.joined is None:
            return values
        whole, end = values[self.joined], self.joined + 1
        return *values[: self.joined], *((None, None) if whole is None else whole.chunk(2)), *values[end:]


@dataclass(frozen=True)
class Op:
    """An operator that csrc/ops.cpp declares."""

    name: str
    fake: Callable[..., object]
    """Shapes and dtypes of its results, for tracing."""
    sample: Callable[[Source], Iterable[tuple]]
    """Arguments to try it on."""
    body: Callable[..., object] | None = None
    """A body in Python, below autograd, for devices that have none of their own; with `Backward.means` it also takes
    `mean=True`."""
    kernel: str | None = None
    """The operator that `body` needs, where it needs one."""
    backward: Backward | None = None
    triton: str | None = None
    """The module in robustft.ops.triton that has a body under the operator's name (and one of NAME_backward)."""
    public: Callable[[Source], Iterable[Call]] | None = None
    """Calls of the function of the same name in `robustft.functional`."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    """What `sample` may be asked for."""

    @property
    def by_triton(self) -> bool:
        """Whether Triton has a body of it, or of what its own body needs."""
        return self.triton is not None or (self.kernel is not None and OPERATORS[self.kernel].by_triton)

    def samples(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> list[tuple]:
        """Arguments of that device and dtype; none for a dtype that the operator does not take."""
        return list(self.sample(Source(device, dtype, seed))) if dtype in self.dtypes else []


OPERATORS: dict[str, Op] = {}
"""Every declared operator by name, those that others need before them."""
PUBLIC: dict[str, Callable[[Source], Iterable[Call]]] = {}
"""Every public function of `robustft.functional`, and how it may be called."""
BODIES: dict[tuple[str, str], Body] = {}
"""What computes an operator on a device type; nothing where only the reference does. Asked of torch's dispatcher."""

library = torch.library.Library("robustft", "FRAGMENT")
_direct: dict[str, type[torch.autograd.Function]] = {}
_python: dict[str, dict[str, Callable[..., Any]]] = {}
"""By name and device type, the bodies in Python of operators that have none of their own there."""


def register(op: Op) -> None:
    """Declares an operator, and its gradient if it has one, to torch and to all that read this registry."""
    OPERATORS[op.name] = op
    if op.public is not None:
        PUBLIC[op.name] = op.public
    if LIBRARIES["cpu"] == "loaded":
        _tell_torch(op)
    if op.backward is not None:
        name, of = f"{op.name}_backward", op.backward
        register(Op(name, of.fake, lambda source: _backward_samples(op, source), of.body, op.kernel, None, op.triton))


def body(op: str, device: torch.device, dtype: torch.dtype) -> Body:
    """What torch's dispatcher has for such tensors, whatever backend is chosen; "reference" where there is nothing."""
    found = BODIES.get((op, device.type), "reference")
    if found == "triton" and not accelerator.suits(device, dtype):
        return "reference"
    return found


def call(name: str, *inputs: Any, weight: Tensor | None = None, reduction: str = "none") -> tuple[Tensor, ...]:
    """What callers want of the operator `name`, `reduced`, computed in the way that costs least.

    In eager mode that is one node of autograd: around register_autograd's Python kernel, the operator's own if its body
    is Python too, and a node of the reduction's. Each of them takes longer than a loss on 64 pairs. The formulas are
    the same ones, so nothing else changes.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        of = _backward(name)
        inputs = of.pair(inputs)
        if weight is None and reduction == "mean" and of.means and (body := _python_body(name, inputs)):
            return body(*inputs, mean=True)[: of.results]
        found = computed(name, *inputs)[: of.results]
    elif weight is None:
        return _direct[name].apply(*inputs, reduction)
    else:
        found = _direct[name].apply(*inputs, "none")
    return found if reduction == "none" and weight is None else tuple(reduced(of, weight, reduction) for of in found)


def gradient(name: str, *inputs: Any) -> Any:
    """The operator `name`_backward, for the formulas of `Backward`."""
    if torch.is_grad_enabled():  # create_graph: the operator refuses
        return getattr(torch.ops.robustft, f"{name}_backward")(*_joined(inputs))
    return computed(f"{name}_backward", *inputs)


def reduced(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Losses (n,) times their weights, and of these what `reduction` says: "mean", "sum" or, for all, "none"."""
    if weight is not None:
        losses = losses * weight
    match reduction:
        case "mean":
            return losses.mean()
        case "sum":
            return losses.sum()
        case _:
            return losses


def _backward(name: str) -> Backward:
    backward = OPERATORS[name].backward
    assert backward is not None
    return backward


def computed(name: str, *inputs: Any) -> Any:
    """What the operator `name` gives, no gradient being wanted: where no trace or mode looks on, by its Python body."""
    body = _python_body(name, inputs)
    return getattr(torch.ops.robustft, name).default(*_joined(inputs)) if body is None else body(*inputs)


def _joined(inputs: tuple) -> tuple:
    """An operator's inputs, of those of its body in Python: the tensors of a tuple one below the other."""
    return tuple(torch.cat(value) if isinstance(value, tuple) else value for value in inputs)


def _python_body(name: str, inputs: tuple) -> Callable[..., Any] | None:
    """The body in Python of an operator, for these inputs, if it has one and no trace or mode looks on."""
    bodies = _python.get(name)
    if bodies is None or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    for value in inputs:
        if isinstance(value, Tensor):
            return bodies.get(value.device.type)
    return None


def outcomes(function: Callable[..., Any], calls: Iterable[Call]) -> list[Tensor]:
    """What a function of PUBLIC gives when it is called so, and the gradients of its results' sum."""
    found: list[Tensor] = []
    for arguments, options in calls:
        out = function(*arguments, **options)
        out = [out] if isinstance(out, Tensor) else list(out)
        leaves = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor) and a.requires_grad]
        sums = [term.double().sum() for term in out if term.requires_grad]
        found += [*out, *(torch.autograd.grad(torch.stack(sums).sum(), leaves) if sums else ())]
    return found


def _tell_torch(op: Op) -> None:
    torch.library.register_fake(f"robustft::{op.name}", op.fake, lib=library)
    if op.body is not None:
        library.impl(op.name, op.body, "CompositeExplicitAutograd")
    if op.triton is not None and accelerator.STATUS == "registered":
        kernel, key = accelerator.body(op.triton, op.name), accelerator.DEVICE.upper()
        library.impl(op.name, kernel, key, allow_override=accelerator.INTERPRETED)
    if op.backward is not None:
        setup, formula, *_ = op.backward
        torch.library.register_autograd(f"robustft::{op.name}", formula, setup_context=setup, lib=library)
        _direct[op.name] = _direct_function(op.name, op.backward)
    elif op.name.endswith("_backward"):
        torch.library.register_autograd(
            f"robustft::{op.name}", _no_second_derivative, setup_context=lambda ctx, inputs, output: None, lib=library
        )
    for device in LIBRARIES:
        found = _body_on(op, device)
        if found is not None:
            BODIES[op.name, device] = found
        if op.body is not None and found == "compiled" and not _has_kernel(op, device):
            _python.setdefault(op.name, {})[device] = op.body


def _has_kernel(op: Op, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"robustft::{op.name}", device.upper())


def _body_on(op: Op, device: str) -> Body | None:
    if _has_kernel(op, device):
        return "triton" if op.triton is not None and device == accelerator.DEVICE else "compiled"
    return None if op.kernel is None else BODIES.get((op.kernel, device))


def _direct_function(name: str, of: Backward) -> type[torch.autograd.Function]:
    below = torch._C._AutoDispatchBelowAutograd
    """Without it the operators would call register_autograd's Python kernels after all, to find nothing to record."""

    operator, joins, results = getattr(torch.ops.robustft, name).default, of.joined is not None, of.results

    def forward(ctx, *given):
        inputs, reduction = given[:-1], given[-1]
        with below():
            if joins:
                inputs = of.pair(inputs)
            body = _python_body(name, inputs)
            if body is not None and of.means and reduction == "mean":
                output = body(*inputs, mean=True)
                ctx.reduction = "none"  # the gradients of what the body returned are what its gradient takes
                of.setup(ctx, inputs, output)
                return output[:results]
            if body is None and joins:
                inputs = _joined(inputs)
            output = operator(*inputs) if body is None else body(*inputs)
            of.setup(ctx, inputs, output)
            found, ctx.reduction = output[:results], reduction
            if reduction == "none":
                return found
            ctx.count = found[0].shape[0]
            return tuple(reduced(losses, None, reduction) for losses in found)

    def by_losses(ctx, grad):
        if grad is None or ctx.reduction == "none":
            return grad
        if grad.device.type == "cpu" and not (torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack()):
            number = grad.item()  # one tensor rather than three
            return grad.new_full((ctx.count,), number / ctx.count if ctx.reduction == "mean" else number)
        return (grad / ctx.count if ctx.reduction == "mean" else grad).expand(ctx.count)

    def backward(ctx, *grads):
        if torch.is_grad_enabled():  # create_graph: the gradient's own formula refuses
            return *of.part(of.formula(ctx, *(by_losses(ctx, grad) for grad in grads))), None
        unpacked = _Unpacked(ctx)
        with below():
            if ctx.reduction != "none":
                grads = tuple(by_losses(ctx, grad) for grad in grads)
            found = of.formula(unpacked, *grads)
            return *(of.part(found) if joins else found), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


class _Unpacked:
    """A context whose saved tensors are at hand: a checkpoint computes them when they are asked for, by autograd."""

    def __init__(self, ctx: Any):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "robustft: the gradient of a fused loss cannot be differentiated again; robustft.backend('reference') can"
    )


class _Recorded(TorchDispatchMode):
    """The arguments with which one operator is called in this block."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is getattr(torch.ops.robustft, self.name).default:
            self.calls.append(tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
        return function(*args, **(kwargs or {}))


def _backward_samples(op: Op, source: Source) -> Iterator[tuple]:
    for arguments in op.sample(source):
        outputs = getattr(torch.ops.robustft, op.name)(*arguments)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        with _Recorded(f"{op.name}_backward") as recorded:
            sum(out.sum() for out in outputs if out.requires_grad).backward()
        yield from recorded.calls


# What declarations share.


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def both(g: Tensor | None, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of two losses of which one may not have been used."""
    if g is None:
        assert h is not None
        return torch.zeros_like(h), h
    return g, torch.zeros_like(g) if h is None else h


def setup_two_losses(ctx: Any, inputs: tuple, output: Any) -> None:
    """Saves the tensors of an operator whose last input says what to keep, and what it returns beside two losses."""
    *tensors, _ = inputs
    _, _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def contiguous_like(tensor: Tensor) -> Tensor:
    """An empty tensor of its shape and dtype, as kernels return them, for fakes."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
