"""How the losses may be run, whatever computes them: in a CUDA graph, on several streams, compiled, again.

On a GPU with its graphs and streams; on the CPU a graph is the call itself, and streams are threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import planted
import pytest
import torch
from targets import TARGETS, Target, each_device, exhaustive, placed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import robustft
from robustft import functional as rf
from robustft.ops import accelerator, dispatch, libraries, registry
from robustft.ops.arguments import VARIANTS

pytestmark = pytest.mark.skipif(
    dispatch.LIBRARIES["cpu"] != "loaded", reason="installed without compiled code (no compiler)"
)

ROUNDS = 5
# How a loss is run is no matter of its precision: on the CPU two dtypes stand for four.
OTHERS = [t for t in TARGETS if t.device == "cpu" and t.dtype in (torch.float64, torch.float16)]
SOME = [t for t in TARGETS if t not in OTHERS]
each_target = pytest.mark.parametrize("target", [*SOME, *exhaustive(*OTHERS)], ids=str)


class Inputs(NamedTuple):
    """Of every loss: features of students (N, D) and teachers, two heads (K, D), logits (N, K), and the rest."""

    x: Tensor
    t: Tensor
    x_teacher: Tensor
    t_teacher: Tensor
    w: Tensor
    v: Tensor
    z: Tensor
    core: Tensor
    bias: Tensor
    weight: Tensor
    scale: Tensor
    labels: Tensor


def made(target: Target, seed: int) -> Inputs:
    """Sizes that no tile, vector or panel divides."""
    n, k, d = (2053, 307, 72) if target.device == "cuda" else (131, 67, 37)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=generator)
    w, v = planted.pairs(k, d, seed=seed, noise=2.0)
    x, t = (normalize(w[labels] + 1.5 * f, dim=1) for f in planted.pairs(n, d, seed=seed))
    teachers = planted.pairs(n, d + 3, seed=seed)
    z = 3 * torch.randn(n, k, generator=generator)
    core, bias, weight = (torch.rand(*shape, generator=generator) for shape in ((n, k), (k,), (n,)))
    tensors = (x, t, *teachers, w, v, z, core, bias, weight, torch.tensor(20.0 + seed), labels)
    return Inputs(*placed(target, *tensors))


def contrastive(i: Inputs, **how) -> list[Tensor]:
    return [rf.contrastive_loss(i.x, i.t, i.scale, weight=i.weight, **how)]


def distillation(i: Inputs, **how) -> list[Tensor]:
    teacher = i.x_teacher, i.t_teacher, i.scale
    return [*rf.contrastive_distillation_loss(i.x, i.t, i.scale, *teacher, weight=i.weight, **how)]


def sigmoid(i: Inputs, **how) -> list[Tensor]:
    return [rf.sigmoid_contrastive_loss(i.x, i.t, i.scale, i.bias[0] - 9, weight=i.weight, **how)]


def sigmoid_distillation(i: Inputs, **how) -> list[Tensor]:
    teacher = i.x_teacher, i.t_teacher, i.scale, i.bias[1]
    return [*rf.sigmoid_contrastive_distillation_loss(i.x, i.t, i.scale, i.bias[0], *teacher, weight=i.weight, **how)]


def classification(i: Inputs, **how) -> list[Tensor]:
    return [*rf.classification_loss(i.x, i.w, i.labels, i.scale, bias=i.bias, **how)]


def dual(i: Inputs, soft: bool, **how) -> list[Tensor]:
    core = i.core if soft else i.core[:, 0]
    return [*rf.dual_risk(i.x, i.w, i.v, i.labels, core, i.scale, weight=i.weight, **how)]


def penalty(i: Inputs, **how) -> list[Tensor]:
    return [rf.misalignment_penalty(i.z, i.labels, **how)]


LOSSES: dict[str, Callable[[Inputs], list[Tensor]]] = {
    "contrastive": contrastive,
    "contrastive labels": lambda i: contrastive(i, labels=i.labels),
    "contrastive smoothing": partial(contrastive, label_smoothing=0.1),
    "contrastive panels": partial(contrastive, memory=0),
    "distillation": distillation,
    "distillation labels": lambda i: distillation(i, labels=i.labels),
    "distillation panels": partial(distillation, memory=0),
    "sigmoid": sigmoid,
    "sigmoid labels": lambda i: sigmoid(i, labels=i.labels),
    "sigmoid again": partial(sigmoid, memory=0),
    "sigmoid distillation": sigmoid_distillation,
    **{f"classification {variant}": partial(classification, variant=variant) for variant in VARIANTS},
    "classification top1": partial(classification, top1=True),
    "classification smoothing": partial(classification, label_smoothing=0.1),
    "classification panels": partial(classification, memory=0),
    "dual": partial(dual, soft=False),
    "dual soft": partial(dual, soft=True),
    "dual panels": partial(dual, soft=True, memory=0),
    **{f"penalty {variant}": partial(penalty, variant=variant) for variant in VARIANTS},
    "penalty top1 of errors": partial(penalty, top1=True, average="errors"),
    "scores": lambda i: [*rf.concept_scores(i.x, i.w, temperature=0.5, logit_scale=i.scale)],
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def computed(name: str, inputs: Inputs) -> list[Tensor]:
    """The loss's terms and, of their weighted sum, the gradients by whatever has one."""
    leaves = Inputs(*(a.detach().requires_grad_(a.is_floating_point()) for a in inputs))
    terms = LOSSES[name](leaves)
    if not any(term.requires_grad for term in terms):
        return terms
    value = sum((k + 1) * term for k, term in enumerate(terms))
    floating = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(value, floating, allow_unused=True)
    return [*(term.detach() for term in terms), *(g for g in gradients if g is not None)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def graphed(run: Callable[[], list[Tensor]], device: str) -> tuple[list[Tensor], Callable[[], object]]:
    """The run's results, and what computes them again, in the same memory, from what its inputs then hold."""
    if device == "cpu":
        results = run()
        return results, lambda: [a.copy_(b) for a, b in zip(results, run(), strict=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, outside the capture
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay


@each_loss
@each_target
def test_a_graph_replayed_on_other_inputs_computes_their_losses_and_gradients(name, target):
    inputs, others = (made(target, seed) for seed in (0, 1))
    with robustft.backend(target.backend):
        first, expected = computed(name, inputs), computed(name, others)
        results, replay = graphed(lambda: computed(name, inputs), target.device)
        replay()
        assert same(results, first) and not same(results, expected)
        for a, b in zip(inputs, others, strict=True):
            a.copy_(b)
        for _ in range(2):
            replay()
            assert same(results, expected)


def at_once(runs: list[Callable[[], list[Tensor]]], device: str) -> list[list[Tensor]]:
    """What each run returns, as often as there are rounds: each on a stream of its own, or in a thread."""
    if device == "cpu":
        with ThreadPoolExecutor(len(runs)) as pool:
            futures = [pool.submit(run) for _ in range(ROUNDS) for run in runs]
            return [future.result() for future in futures]
    streams = [torch.cuda.Stream() for _ in runs]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(ROUNDS):
        for stream, run in zip(streams, runs, strict=True):
            with torch.cuda.stream(stream):
                results.append(run())
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    return results


@each_loss
@each_target
def test_losses_on_two_streams_at_once_are_those_of_one(name, target):
    runs = [partial(computed, name, made(target, seed)) for seed in (0, 1)]
    with robustft.backend(target.backend):
        expected = [run() for run in runs]
        found = at_once(runs, target.device)
    assert len(found) == ROUNDS * len(runs)
    for k, results in enumerate(found):
        assert same(results, expected[k % len(runs)])


@each_loss
@each_target
def test_repeating_a_loss_repeats_its_bits(name, target):
    inputs = made(target, 0)
    with robustft.backend(target.backend):
        first = computed(name, inputs)
        assert all(term.isfinite().all() for term in first)
        assert all(same(computed(name, inputs), first) for _ in range(ROUNDS))


def surrounded(a: Tensor) -> Tensor:
    """The same numbers in the middle of NaN, or of labels that are no class."""
    if a.dim() == 0:
        return a
    wider = a.new_full([size + 70 for size in a.shape], torch.nan if a.is_floating_point() else 2**40)
    inside = wider[tuple(slice(3, 3 + size) for size in a.shape)]
    inside.copy_(a)
    return inside


@each_loss
@each_target
def test_neither_what_surrounds_inputs_nor_what_memory_held_is_read(name, target):
    inputs = made(target, 0)
    before = torch.are_deterministic_algorithms_enabled()
    with robustft.backend(target.backend):
        expected = computed(name, inputs)
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is full of NaN then
            assert torch.empty(9, device=target.device).isnan().all()
            found = computed(name, Inputs(*map(surrounded, inputs)))
        finally:
            torch.use_deterministic_algorithms(before)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


class Watched(TorchDispatchMode):
    """Names what copies between the host and the device, where that waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        devices = {a.device.type for a in (*args, result) if isinstance(a, Tensor)}
        if len(devices) > 1:
            self.copies.append(str(op))
        return result


@pytest.mark.skipif(accelerator.STATUS != "registered", reason=accelerator.STATUS)
@each_loss
def test_losses_neither_wait_for_a_gpu_nor_copy_to_it(name):
    # Tensors that only pretend to be on a GPU: asking them for a value is an error. What the operators launch behind
    # them, forward and backward, test_triton.py records on tensors that have no values either.
    real = made(Target("native", "cpu", torch.bfloat16), 0)
    with FakeTensorMode(), Watched() as watched:
        pretended = (torch.empty(a.shape, dtype=a.dtype, device="cuda") for a in real)
        LOSSES[name](Inputs(*(a.requires_grad_(a.is_floating_point()) for a in pretended)))
    assert watched.copies == []


@pytest.mark.skipif(accelerator.STATUS != "registered", reason=accelerator.STATUS)
def test_scales_that_are_numbers_are_not_copied_to_a_gpu():
    with FakeTensorMode(), Watched() as watched:
        x = torch.empty(9, 8, device="cuda")
        rf.contrastive_loss(x, x, 20.0)
    assert watched.copies == []


@pytest.mark.skipif(accelerator.INTERPRETED, reason="Triton's interpreter computes with tensors of the CPU")
@pytest.mark.parametrize("count", [1, *exhaustive(None)])
def test_losses_of_cpu_tensors_ask_nothing_of_triton(count):
    inputs = made(Target("native", "cpu", torch.float32), 0)
    operators = registry.OPERATORS.items()
    samples = [(name, a) for name, op in operators for a in op.samples("cpu", torch.float32)[:count]]
    samples = [(name, a) for name, a in samples if name != "neighbor_pack"]  # its results' sizes are not known before
    asked, known = set(), (accelerator.__file__, str(Path(accelerator.__file__).with_name("triton")) + os.sep)

    def note(frame, event, argument) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(known):
            asked.add(frame.f_code.co_name)

    before = {name for name in sys.modules if name.startswith("robustft.ops.triton")}
    sys.setprofile(note)
    try:
        for loss in LOSSES.values():
            terms = loss(Inputs(*(a.clone().requires_grad_(a.is_floating_point()) for a in inputs)))
            if terms[0].requires_grad:
                sum(term.sum() for term in terms).backward()
        with FakeTensorMode() as mode:
            for name, arguments in samples:
                fakes = (mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)
                getattr(torch.ops.robustft, name)(*fakes)
    finally:
        sys.setprofile(None)
    assert asked == set()
    assert {name for name in sys.modules if name.startswith("robustft.ops.triton")} == before


@pytest.mark.parametrize(
    "device, library, message",
    [
        ("cpu", "not built", "library for cpu not built; using the eager reference"),
        ("cuda", "not built", "library for cuda not built; using the eager reference"),
        (
            "cuda",
            "loaded",
            "library for cuda needs Triton for the losses, and Triton is not installed; using the eager",
        ),
        (
            "cuda",
            libraries._of_another_cuda("nvcc 13.0.88", "12.8"),
            "library for cuda not loaded: it was built by nvcc 13.0.88, and this torch is for CUDA 12.8; build it",
        ),
    ],
    ids=["host", "pretended GPU", "pretended GPU without Triton", "pretended GPU of an older CUDA"],
)
def test_without_compiled_code_everything_falls_back_with_one_warning(device, library, message, monkeypatch):
    monkeypatch.setitem(dispatch.LIBRARIES, device, library)
    monkeypatch.setattr(accelerator, "STATUS", "Triton is not installed")
    monkeypatch.setattr(registry, "BODIES", {})
    dispatch._warn_once.cache_clear()
    real = made(Target("native", "cpu", torch.float32), 0)
    with pytest.warns(RuntimeWarning) as warned:
        if device == "cpu":
            found = [LOSSES[name](real) for name in (*LOSSES, *LOSSES)]
        else:
            with FakeTensorMode():
                pretended = Inputs(*(torch.empty(a.shape, dtype=a.dtype, device=device) for a in real))
                found = [LOSSES[name](pretended) for name in (*LOSSES, *LOSSES)]
    dispatch._warn_once.cache_clear()
    (warning,) = warned.list
    assert message in str(warning.message)
    assert all(term.device.type == device for terms in found for term in terms)
    if device == "cpu":
        with robustft.backend("reference"):
            assert all(same(terms, LOSSES[name](real)) for terms, name in zip(found, LOSSES, strict=False))


@pytest.mark.parametrize("family", dict.fromkeys(name.split()[0] for name in LOSSES))
@each_device
def test_compiled_losses_are_the_eager_ones(family, target):
    """On a GPU by Inductor, whose code around the operators may round otherwise; on the CPU no code is generated."""
    inputs, differentiable = made(target, 0), family != "scores"
    leaves = [a for a in inputs if a.is_floating_point()]

    def terms(*leaves):
        i = Inputs(*leaves, inputs.labels)
        return [term for name, loss in LOSSES.items() if name.split()[0] == family for term in loss(i)]

    def results(function):
        mine = [leaf.detach().requires_grad_(differentiable) for leaf in leaves]
        found = function(*mine)
        if not differentiable:
            return found
        value = sum((k + 1) * term for k, term in enumerate(found))
        gradients = torch.autograd.grad(value, mine, allow_unused=True)
        return [*(term.detach() for term in found), *(g for g in gradients if g is not None)]

    torch.compiler.reset()
    backend = "inductor" if target.device == "cuda" else "aot_eager"
    with robustft.backend(target.backend):
        expected = results(terms)
        found = results(torch.compile(terms, fullgraph=True, backend=backend, dynamic=False))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_gpu_library_of_another_major_version_than_torchs_is_not_loaded(bare_python):
    assert libraries._of_another_cuda("nvcc 13.0.88", "13.2") is None
    assert libraries._of_another_cuda("", "12.8") is None  # built without a CUDA compiler
    if dispatch.LIBRARIES["cuda"] == "not built":
        pytest.skip("installed without a CUDA compiler")
    code = (
        "import torch; torch.version.cuda = '1.0'; load = torch.ops.load_library;"
        "torch.ops.load_library = lambda path: print(path) or load(path);"
        "from robustft.ops import libraries; print(libraries.LIBRARIES['cuda'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(robustft.__file__).parent.parent)}
    run = bare_python.run("-c", code, environment=environment, check=True)
    loaded, status = run.stdout.splitlines()
    assert loaded.endswith("_ops_cpu.so") and status.startswith("not loaded: it was built by nvcc")
