"""The operators as torch sees them: schema, fake kernels, autograd, compile; and the compiled code's own promises."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import planted
import pytest
import torch
from targets import exhaustive

import robustft
from robustft import functional as rf
from robustft.ops import dispatch, libraries, registry

pytestmark = pytest.mark.skipif(
    dispatch.LIBRARIES["cpu"] != "loaded", reason="installed without compiled code (no compiler)"
)

PACKAGE = Path(robustft.__file__).parent


def operator_inputs(n: int = 9, d: int = 5, requires_grad: bool = True):
    x, t = (f.requires_grad_(requires_grad) for f in planted.pairs(n, d))
    s = torch.tensor(7.0, dtype=torch.float64, requires_grad=requires_grad)
    teacher = (*planted.pairs(n, d + 1, seed=1), torch.tensor(5.0, dtype=torch.float64))
    return x, t, s, teacher, torch.arange(n) // 2


@pytest.mark.parametrize("name", registry.OPERATORS)
@pytest.mark.parametrize(
    ("dtype", "part"),
    [(torch.float64, slice(1)), *exhaustive((torch.float64, slice(1, None)), (torch.bfloat16, slice(None)))],
    ids=["first", "others", "bfloat16"],
)
def test_every_operator_passes_opcheck(name, dtype, part):
    op = registry.OPERATORS[name]
    for row, arguments in enumerate(op.samples("cpu", dtype if dtype in op.dtypes else torch.float32)[part]):
        # A graph of another dtype differs by what the fake kernel says of it: the dynamic ones, which take by far the
        # longest, are made of one sample.
        known = dtype == torch.bfloat16 and row > 0
        checks = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")} if known else {}
        torch.library.opcheck(getattr(torch.ops.robustft, name).default, arguments, **checks)


def test_the_registry_has_every_operator_that_is_declared():
    # Fragments of the namespace that tests declare do not count: these are in csrc/ops.cpp.
    declared = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("robustft::")}
    assert {f"robustft::{name}" for name in registry.OPERATORS} == declared


@pytest.mark.parametrize("name", registry.OPERATORS)
def test_samples_are_the_same_for_a_seed_and_mark_what_gets_a_gradient(name):
    op = registry.OPERATORS[name]
    first, again = (op.samples("cpu", torch.float64, seed=3) for _ in range(2))
    assert len(first) > 0
    for mine, other in zip(first, again, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        differentiable = any(isinstance(a, torch.Tensor) and a.requires_grad for a in mine)
        assert differentiable == (op.backward is not None)


WITHOUT_GRADIENT = (
    *("similarity_statistics", "similarity_gradient", "class_statistics", "class_gradient", "class_scores"),
    *("unit_scores", "sigmoid_totals", "sigmoid_scaled"),
    *("pair_losses", "pair_gradients", "sigmoid_sweep", "vector_softplus", "vector_exp"),
    *("class_losses", "class_gradients", "dual_losses", "dual_gradients"),
    *("tile_products", "product_arithmetic", "group_sums", "concept_scores", "row_norms"),
    *("neighbor_pack", "kth_neighbor_distance", "nearest_neighbors"),
)
"""Operators that are differentiated by what calls them, or not at all: anything else declares its `Backward`."""


def test_every_operator_declares_its_gradient_or_that_it_has_none():
    found = {name for name, op in registry.OPERATORS.items() if op.backward is None and not name.endswith("_backward")}
    assert found == set(WITHOUT_GRADIENT)


@pytest.mark.parametrize("name", [name for name, op in registry.OPERATORS.items() if op.backward is not None])
def test_every_gradient_passes_gradcheck_on_the_samples_of_its_operator(name):
    op = registry.OPERATORS[name]
    samples = op.samples("cpu", torch.float64)
    assert samples
    for arguments in samples:
        assert torch.autograd.gradcheck(
            *of_leaves(lambda *given: registry.call(name, *op.backward.part(given)), arguments)
        )


@pytest.mark.parametrize("name", registry.PUBLIC)
def test_every_public_function_passes_gradcheck_on_its_samples(name):
    for arguments, options in registry.PUBLIC[name](registry.Source("cpu", torch.float64)):
        names, placed = tuple(options), len(arguments)

        def called(*given, count=placed, names=names):
            return getattr(rf, name)(*given[:count], **dict(zip(names, given[count:], strict=True)))

        if name == "group_dro":
            continue  # whose gradient holds the weights constant that the losses have moved: test_risks.py
        function, leaves = of_leaves(called, (*arguments, *options.values()))
        if name in ("concept_scores", "kth_neighbor_distance", "nearest_neighbors", "group_dro_weights"):
            assert not function(*leaves)  # no result has a gradient
        else:
            assert torch.autograd.gradcheck(function, leaves)


def of_leaves(function, arguments):
    """The function of those arguments that get a gradient, with the results that have one; and these arguments."""
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.requires_grad]

    def of(*leaves):
        given = list(arguments)
        for place, leaf in zip(places, leaves, strict=True):
            given[place] = leaf
        results = function(*given)
        results = results if isinstance(results, (tuple, list)) else (results,)
        return tuple(result for result in results if result.requires_grad)

    return of, tuple(arguments[place] for place in places)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("with_labels", [False, True])
def test_contrastive_loss_passes_gradcheck(smoothing, with_labels):
    x, t, s, _, labels = operator_inputs()
    weight = torch.rand(9, dtype=torch.float64, requires_grad=True)
    labels = labels if with_labels else None

    def loss(x, t, s, weight):
        return rf.contrastive_loss(x, t, s, labels=labels, label_smoothing=smoothing, weight=weight, reduction="none")

    assert torch.autograd.gradcheck(loss, (x, t, s, weight))


def test_contrastive_distillation_loss_passes_gradcheck():
    x, t, s, teacher, labels = operator_inputs()
    weight = torch.rand(9, dtype=torch.float64, requires_grad=True)

    def loss(x, t, s, weight):
        return tuple(
            rf.contrastive_distillation_loss(x, t, s, *teacher, labels=labels, weight=weight, reduction="none")
        )

    assert torch.autograd.gradcheck(loss, (x, t, s, weight))


def test_group_risk_passes_gradcheck():
    losses = torch.rand(9, dtype=torch.float64, requires_grad=True)
    groups = torch.arange(9) % 4
    assert torch.autograd.gradcheck(lambda losses: tuple(rf.group_risk(losses, groups, 5)[:2]), losses)


def test_second_derivative_is_refused_not_wrong():
    x, t, s, _, _ = operator_inputs()
    for leaf in (x, s):
        for loss in (rf.contrastive_loss(x, t, s), rf.sigmoid_contrastive_loss(x, t, s, -1.0)):
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="cannot be differentiated again"):
                torch.autograd.grad(first.sum(), leaf, allow_unused=True)


@pytest.mark.parametrize("dynamic", [False, *exhaustive(True)])
def test_losses_compile_without_a_graph_break(dynamic):
    def objective(x, t, s, xt, tt):
        terms = rf.contrastive_distillation_loss(x, t, s.exp(), xt, tt, 5.0)
        y = torch.arange(len(x)) % 4
        classes = rf.classification_loss(x, t[:4], y, s.exp(), variant="neg_ratio")
        risks = rf.dual_risk(x, t[:4], t[4:8], y, torch.ones(len(x), 4) / 4, s.exp())
        score = rf.concept_scores(x, t[:4], logit_scale=s.exp()).mcm.sum() * s
        pairs = rf.sigmoid_contrastive_distillation_loss(x, t, s.exp(), -s, xt, tt, 5.0, -1.0)
        heads = (*classes, *risks, score, *pairs, rf.sigmoid_contrastive_loss(x, t, s.exp(), -s))
        return terms.contrastive + 1.5 * terms.distillation + rf.contrastive_loss(x, t, s.exp()) + sum(heads)

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (9, 12) if dynamic else (9,):  # a graph of fixed sizes is another for other sizes
        x, t, s, teacher, _ = operator_inputs(n)
        s = s.log().detach().requires_grad_()
        expected = torch.autograd.grad(objective(x, t, s, *teacher[:2]), (x, t, s))
        actual = torch.autograd.grad(compiled(x, t, s, *teacher[:2]), (x, t, s))
        torch.testing.assert_close(actual, expected)


def test_risks_compile_without_a_graph_break():
    labels, weights = torch.arange(9) % 4, torch.full((4,), 0.25)

    def objective(z):
        each = rf.misalignment_penalty(z, labels, reduction="none")
        errors = rf.misalignment_penalty(z, labels, average="errors")
        risk = rf.group_risk(each, labels, 4)
        return rf.cvar(each, 0.3) + errors + risk.worst + rf.group_dro(each, labels, weights, 0.1).loss

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    z = torch.randn(9, 6, requires_grad=True)
    torch.testing.assert_close(compiled(z), objective(z))
    torch.testing.assert_close(*(torch.autograd.grad(f(z), z) for f in (compiled, objective)))


@pytest.mark.parametrize("name", ["misalignment_penalty", "cvar", "group_risk"])
def test_second_derivative_of_risks_is_refused(name):
    z, labels = torch.randn(9, 5, requires_grad=True), torch.arange(9) % 4
    value = {
        "misalignment_penalty": lambda: rf.misalignment_penalty(z, labels, variant="softplus"),
        "cvar": lambda: rf.cvar(z[:, 0].square(), 0.3),
        "group_risk": lambda: rf.group_risk(z[:, 0].square(), labels, 4).worst,
    }[name]()
    value = value.square()  # so that the gradient depends on z through the loss's own
    (first,) = torch.autograd.grad(value, z, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first.sum(), z)


def test_fake_tensors_give_the_real_shapes_and_dtypes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(6, 8, dtype=torch.bfloat16, requires_grad=True)
        t = torch.empty(6, 8, dtype=torch.bfloat16)
        for loss in (
            rf.contrastive_loss(x, t, 10.0, reduction="none"),
            rf.sigmoid_contrastive_loss(x, t, 10.0, -10.0, reduction="none"),
            rf.sigmoid_contrastive_loss(x, t, 10.0, -10.0),
        ):
            assert loss.shape in ((6,), ()) and loss.dtype == torch.float32
            loss.sum().backward()
            assert x.grad.shape == (6, 8) and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vector_exp_is_within_two_units_in_the_last_place(dtype):
    low, high = (-87.3, 88.7) if dtype == torch.float32 else (-708.3, 709.7)
    x = torch.cat((torch.linspace(low, high, 1_000_003, dtype=dtype), torch.linspace(-1, 1, 1001, dtype=dtype)))
    exact = x.double().exp()
    ours = torch.ops.robustft.vector_exp(x)
    if dtype == torch.float64:
        spacing = torch.nextafter(exact, torch.full_like(exact, torch.inf)) - exact
    else:
        rounded = exact.float()
        spacing = (torch.nextafter(rounded, torch.full_like(rounded, torch.inf)) - rounded).double()
    assert ((ours.double() - exact).abs() / spacing).max() <= 2


def test_vector_exp_at_the_ends():
    x = torch.tensor([-torch.inf, -200.0, 0.0, 200.0, torch.inf, torch.nan])
    y = torch.ops.robustft.vector_exp(x)
    assert y[:5].tolist() == [0.0, 0.0, 1.0, torch.inf, torch.inf] and y[5].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vector_softplus_and_sigmoid_are_within_a_few_units_in_the_last_place(dtype):
    low = -87.3 if dtype == torch.float32 else -700.0
    z = torch.cat((torch.linspace(low, 100, 1_000_003, dtype=dtype), torch.linspace(-1, 1, 1001, dtype=dtype)))
    softplus, sigmoid = torch.ops.robustft.vector_softplus(z)
    wide = z.double()
    # logaddexp is precise where its result is not much less than 1, and log1p of the exponential where it is.
    exact = torch.where(wide < 0, wide.exp().log1p(), torch.logaddexp(wide, wide.new_zeros(())))
    limit = 4 * torch.finfo(dtype).eps
    assert ((softplus.double() - exact) / exact).abs().max() <= limit
    exact = torch.where(wide < 0, wide.exp() / (1 + wide.exp()), 1 / (1 + (-wide).exp()))
    assert ((sigmoid.double() - exact) / exact).abs().max() <= limit
    ends = torch.tensor([-torch.inf, -200.0, 200.0, torch.inf, torch.nan], dtype=torch.float32)
    softplus, sigmoid = (part.tolist() for part in torch.ops.robustft.vector_softplus(ends))
    assert softplus[:4] == [0.0, 0.0, 200.0, torch.inf] and sigmoid[:4] == [0.0, 0.0, 1.0, 1.0]
    assert softplus[4] != softplus[4] and sigmoid[4] != sigmoid[4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_of_a_tile_do_not_magnify_errors_by_the_scale(dtype):
    n, m, scale = 64, 128, torch.tensor(100.0, dtype=torch.float64)
    x, t = torch.linspace(-0.55, 0.7, n, dtype=dtype)[:, None], torch.ones(m, 1, dtype=dtype)  # S is x, exactly
    labels = torch.arange(n), torch.arange(n, n + m)
    arguments = (x, t, scale, *labels, None, None, None, False, True, "highest")
    _, _, centers, kept = torch.ops.robustft.similarity_statistics(*arguments)
    center = centers[0, 0, 0].item()
    assert center == round(center)
    exact = (scale * x.double() - center * torch.tensor(2.0, dtype=torch.float64).log()).exp().expand(n, m)
    error = ((kept.double() - exact).abs() / exact).max()
    if dtype == torch.float64:
        assert error < 1e-13
    else:  # without fused multiply-add, that of rounding logits as large as 92
        fused = dispatch.build_info()["active_isa"] != "portable"
        assert error < (2.5e-7 if fused else 6e-6)


PEAKS = """
import json, os, sys, torch, traceback
from robustft import functional as rf

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

def peak(kind, n):
    x, t = (torch.nn.functional.normalize(torch.randn(n, 64), dim=1).requires_grad_() for _ in range(2))
    s = torch.tensor(50.0, requires_grad=True)
    def run(x, t):
        if kind.startswith("sigmoid"):
            return rf.sigmoid_contrastive_loss(x, t, s, -s, memory=0 if kind == "sigmoid at 0" else "auto")
        if kind == "teacher":
            return sum(rf.contrastive_distillation_loss(x, t, s, x.detach(), t.detach(), 40.0, memory=0))
        return rf.contrastive_loss(x, t, s, memory=0)
    run(x[:600], t[:600]).backward()  # what is allocated once: threads, workspaces
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = status("VmRSS")
    run(x, t).backward()
    return status("VmHWM") - before

for case in json.loads(sys.argv[1]):  # each in a process that has held nothing before
    if (child := os.fork()) == 0:
        try:
            print(json.dumps(peak(*case)), flush=True)
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


# Processes of their own run elsewhere than in the source tree: there `import robustft` would find the sources, which
# hold no compiled code, instead of the installed package.


def test_no_matrix_of_n_squared_is_ever_held(python):
    cases = [(kind, n) for kind in ("student", "teacher", "sigmoid", "sigmoid at 0") for n in (1024, 4096)]
    run = python.run("-c", PEAKS, json.dumps(cases), check=True)
    peaks = dict(zip(cases, map(json.loads, run.stdout.splitlines()), strict=True))
    for (kind, n), peak in peaks.items():
        # 4 times the samples: gradients and vectors grow by 4 n (2 d + ~40) bytes, an n x n matrix of floats by 63 MB.
        assert peak - peaks[kind, 1024] < 3 * 1024 * 4 * (4 * 64 + 80) + 4e6, (peaks, run.stderr)
        assert n == 1024 or peak < 30e6, peaks


VARIANT = """
import sys, torch, robustft
sys.path.insert(0, sys.argv[1])
import planted
from robustft import functional as rf
assert robustft.build_info()["active_isa"] == sys.argv[2]
def computed(dtype):
    x, t = (f.to(dtype).requires_grad_() for f in planted.pairs(523, 37))
    xt, tt = (f.to(dtype) for f in planted.pairs(523, 20, seed=1))
    s = torch.tensor(60.0, dtype=dtype, requires_grad=True)
    labels = torch.arange(523) // 3
    terms = rf.contrastive_distillation_loss(x, t, s, xt, tt, 30.0, labels=labels)
    loss = terms.contrastive + 1.5 * terms.distillation + rf.contrastive_loss(x, t, s, label_smoothing=0.1)
    loss = loss + rf.sigmoid_contrastive_loss(x, t, s, -s / 9, labels=labels)
    loss = loss + sum(rf.sigmoid_contrastive_distillation_loss(x, t, s, -s / 9, xt, tt, 30.0, -3.0))
    loss = loss + sum(rf.classification_loss(x, t[:101], labels % 101, s, bias=t[:101, 0]))
    loss = loss + sum(rf.dual_risk(x, t[:101], t[101:202], labels % 101, x[:, :1].expand(-1, 101).abs(), s))
    out = list(rf.concept_scores(x, t[:101], logit_scale=s))
    out += [loss, *torch.autograd.grad(loss, (x, t, s))]
    for half in (dtype, torch.bfloat16, torch.float16):
        z = (60 * x.detach()).to(half).requires_grad_()
        each = rf.misalignment_penalty(z, labels % 37, variant="softplus", reduction="none")
        risk = rf.cvar(each, 0.3) + rf.group_risk(each, labels % 11, 11).worst
        out += [each, *(g.to(dtype) for g in torch.autograd.grad(risk, z))]
    return [o.detach() for o in out]
found = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    found.append(computed(torch.float32) + computed(torch.float64))
torch.save(found, sys.argv[3])
"""


def test_every_instruction_set_and_thread_count_agrees(tmp_path, python):
    def by_threads(isa: str) -> list[list[torch.Tensor]]:
        arguments = [str(Path(__file__).parent.parent), isa, str(tmp_path / isa)]
        python.run("-c", VARIANT, *arguments, environment={**os.environ, "ROBUSTFT_CPU_ISA": isa}, check=True)
        return torch.load(tmp_path / isa, weights_only=True)

    best = robustft.build_info()["detected_isa"]
    found = {isa: by_threads(isa) for isa in libraries.ISA_NAMES[: libraries.ISA_NAMES.index(best) + 1]}
    for of_isa in found.values():
        for of_threads in of_isa:
            for a, b in zip(of_threads, found[best][0], strict=True):
                tolerance = 1e-12 if b.dtype == torch.float64 else 3e-6
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_unknown_instruction_set_is_refused(python):
    environment = {**os.environ, "ROBUSTFT_CPU_ISA": "avx3"}
    run = python.run("-c", "import robustft; robustft.build_info()", environment=environment)
    assert run.returncode != 0 and "ROBUSTFT_CPU_ISA is 'avx3'" in run.stderr


def test_libraries_import_no_cplusplus_symbol_of_torch():
    libraries = sorted(PACKAGE.glob("_ops_*.so"))
    assert libraries
    for library in libraries:
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", "-C", str(library)], capture_output=True, text=True, check=True
        ).stdout
        assert "aoti_torch" in symbols  # nm did read the library
        assert not [line for line in symbols.splitlines() if "at::" in line or "c10::" in line]


def test_without_compiled_code_the_reference_runs_and_says_so_once(tmp_path, python):
    shutil.copytree(PACKAGE, tmp_path / "robustft", ignore=shutil.ignore_patterns("*.so", "assets"))
    code = (
        "import warnings, torch\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import robustft\n"
        "    x = torch.eye(3)\n"
        "    values = [robustft.functional.contrastive_loss(x, x, 5.0).item() for _ in range(3)]\n"
        "    robustft.functional.group_risk(torch.ones(3), torch.zeros(3, dtype=torch.int64), 1)\n"
        "print(len(caught), caught[0].message, values[0])\n"
    )
    run = python.run("-c", code, environment={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)
    count, *message, value = run.stdout.split()
    assert int(count) == 1 and "not built; using the eager reference" in " ".join(message)
    x = torch.eye(3)
    assert float(value) == pytest.approx(rf.contrastive_loss(x, x, 5.0).item(), rel=1e-6)


def test_importing_robustft_loads_no_heavy_library(bare_python):
    heavy = ("open_clip", "torchvision", "matplotlib", "sklearn", "PIL")
    code = f"import sys, robustft; print([m for m in {heavy} if m in sys.modules])"
    assert bare_python.run("-c", code, check=True).stdout.strip() == "[]"
