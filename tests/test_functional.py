"""The public losses against the float64 reference, and their properties."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from itertools import product

import planted
import pytest
import targets
import torch
from targets import Target, case, gradients
from torch import Tensor

import robustft
from robustft import functional as rf
from robustft.ops import dispatch, reference, registry

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "reference"])
def backend(request):
    with robustft.backend(request.param):
        yield request.param


def assert_as_accurate_as_eager(function, *inputs: Tensor, dtype: torch.dtype) -> None:
    """Of the compiled CPU code: see targets.py."""
    targets.assert_as_accurate_as_eager(function, *inputs, target=Target("native", "cpu", dtype))


def test_loss_equals_clips_cross_entropies(backend):
    x, t = planted.pairs(50, 16)
    z = 14.3 * x @ t.T
    target = torch.arange(50)
    expected = (torch.nn.functional.cross_entropy(z, target) + torch.nn.functional.cross_entropy(z.T, target)) / 2
    torch.testing.assert_close(rf.contrastive_loss(x, t, 14.3), expected)


def test_reductions_agree(backend):
    x, t = planted.pairs(33, 16)
    weight = torch.rand(33, dtype=torch.float64)
    each = rf.contrastive_loss(x, t, 10.0, weight=weight, reduction="none")
    assert each.shape == (33,)
    torch.testing.assert_close(rf.contrastive_loss(x, t, 10.0, weight=weight, reduction="sum"), each.sum())
    torch.testing.assert_close(rf.contrastive_loss(x, t, 10.0, weight=weight), each.sum() / 33)


AVERAGED = [
    name for name, call in registry.PUBLIC.items() if "reduction" in inspect.signature(getattr(rf, name)).parameters
]


@pytest.mark.parametrize("name", AVERAGED)
def test_a_mean_is_that_of_the_single_losses_and_so_are_its_gradients(name):
    def found(mean: bool) -> list[Tensor]:
        def terms(*arguments, **options):
            terms = getattr(rf, name)(*arguments, **{**options, "reduction": "mean" if mean else "none"})
            terms = [terms] if isinstance(terms, Tensor) else list(terms)
            return [(k + 1.5) * (term if mean else term.mean()) for k, term in enumerate(terms)]

        return registry.outcomes(terms, registry.PUBLIC[name](registry.Source("cpu", torch.float64)))

    for mean, expected in zip(found(True), found(False), strict=True):
        assert mean.shape == expected.shape
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", AVERAGED)
def test_a_mean_may_be_differentiated_twice_over_while_its_graph_is_kept(name):
    (arguments, options), *_ = registry.PUBLIC[name](registry.Source("cpu", torch.float64))
    terms = getattr(rf, name)(*arguments, **{**options, "reduction": "mean"})
    leaves = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor) and a.requires_grad]
    total = terms if isinstance(terms, Tensor) else sum(terms)
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for gradient in first:
        gradient.zero_()
    for again, expected in zip(torch.autograd.grad(3 * total, leaves), kept, strict=True):
        torch.testing.assert_close(again, 3 * expected)


def test_distinct_labels_change_nothing(backend):
    x, t = planted.pairs(40, 16)
    labels = torch.randperm(40) * 10**12 - 7  # any integers, negative and beyond 32 bits too
    assert rf.contrastive_loss(x, t, 14.3, labels=labels) == rf.contrastive_loss(x, t, 14.3)


def test_loss_is_symmetric_in_images_and_texts(backend):
    x, t = planted.pairs(300, 16)
    torch.testing.assert_close(rf.contrastive_loss(x, t, 50.0), rf.contrastive_loss(t, x, 50.0), rtol=1e-13, atol=0)


def test_permuting_samples_permutes_losses(backend):
    x, t = planted.pairs(300, 16)
    order = torch.randperm(300)
    each = rf.contrastive_loss(x, t, 50.0, reduction="none")
    torch.testing.assert_close(rf.contrastive_loss(x[order], t[order], 50.0, reduction="none"), each[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_label_loss_is_never_negative(dtype, backend):
    x, t = planted.pairs(512, 64, noise=0.01)
    each = rf.contrastive_loss(x.to(dtype), t.to(dtype), 100.0, reduction="none")
    assert (each >= 0).all()


@pytest.mark.parametrize("case", ["identical rows", "opposite pairs", "huge scale"])
def test_extreme_features_stay_finite(case, backend):
    x, t = (f.float() for f in planted.pairs(300, 32))
    scale = 100.0
    if case == "identical rows":
        x, t = x[:1].expand(300, 32), t[:1].expand(300, 32)
    elif case == "opposite pairs":
        t = -x
    else:
        scale = 1e4
    value, dx, dt = gradients(lambda x, t: rf.contrastive_loss(x, t, scale), x, t)
    assert value.isfinite() and dx.isfinite().all() and dt.isfinite().all()
    if case == "identical rows":
        assert value.item() == pytest.approx(math.log(300), rel=1e-6)


def test_distillation_from_itself_is_the_entropy_and_has_no_gradient(backend):
    x, t = planted.pairs(60, 16)
    z = 14.3 * x @ t.T
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1) - (z.softmax(0) * z.log_softmax(0)).sum(0)

    def distillation(a, b):
        return rf.contrastive_distillation_loss(a, b, 14.3, x, t, 14.3).distillation

    value, dx, dt = gradients(distillation, x, t)
    assert value.item() == pytest.approx(entropy.mean().item(), rel=1e-12)
    assert dx.abs().max() < 1e-14 and dt.abs().max() < 1e-14


def test_distillation_survives_underflowing_student_probabilities(backend):
    x, t = (f.float() for f in planted.pairs(64, 32))
    xt, tt = (f.float() for f in planted.pairs(64, 32, seed=5))
    terms = rf.contrastive_distillation_loss(x, t, 1000.0, xt, tt, 1.0)
    assert terms.distillation.isfinite() and terms.distillation > 0


def test_teacher_gets_no_gradient(backend):
    x, t = (f.requires_grad_() for f in planted.pairs(8, 16))
    xt, tt = (f.requires_grad_() for f in planted.pairs(8, 16, seed=1))
    sum(rf.contrastive_distillation_loss(x, t, 10.0, xt, tt, 10.0)).backward()
    assert x.grad is not None and xt.grad is None and tt.grad is None


def test_autocast_changes_nothing(backend):
    x, t = (f.float().requires_grad_() for f in planted.pairs(60, 16))
    labels = torch.arange(60) % 7
    w = planted.pairs(7, 16)[0].float()
    s = torch.tensor(100.0)

    def everything():
        return [
            rf.contrastive_loss(x, t, s),
            *rf.contrastive_distillation_loss(x, t, s, t, x, 50.0),
            *rf.classification_loss(x, w, labels, s),
            *rf.dual_risk(x, w, w.flip(0), labels, torch.rand(60, 7, generator=torch.Generator().manual_seed(0)), s),
            rf.misalignment_penalty(x @ w.T, labels),
            rf.orthogonality_penalty(x),
        ]

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(everything()[:-2], expected[:-2], strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b)
        assert torch.equal(rf.orthogonality_penalty(x), expected[-1])


def test_nan_in_a_feature_reaches_the_loss(backend):
    x, t = (f.float() for f in planted.pairs(300, 16))
    x[270, 3] = torch.nan
    assert rf.contrastive_loss(x, t, 10.0).isnan()


def test_scale_gradient_matches_finite_differences():
    x, t = planted.pairs(300, 16)
    s = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    rf.contrastive_loss(x, t, s).backward()
    with torch.no_grad():
        slope = (rf.contrastive_loss(x, t, s + 1e-4) - rf.contrastive_loss(x, t, s - 1e-4)) / 2e-4
    assert s.grad.item() == pytest.approx(slope.item(), rel=1e-6)


def test_orthogonality_penalty_of_known_matrices(backend):
    assert rf.orthogonality_penalty(torch.eye(5)[:, :3]) == 0
    w = 2 * torch.eye(4, dtype=torch.float64)
    assert rf.orthogonality_penalty(w).item() == pytest.approx(6.0)  # || 3 I_4 ||_F
    assert rf.orthogonality_penalty(w, squared=True).item() == pytest.approx(36.0)


def test_orthogonality_penalty_has_zero_gradient_at_its_minimum(backend):
    w = torch.eye(4, requires_grad=True)
    rf.orthogonality_penalty(w).backward()
    assert torch.equal(w.grad, torch.zeros(4, 4))


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (3, 5), (1, 1)])
def test_orthogonality_penalty_gradients(backend, shape, squared):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda w: rf.orthogonality_penalty(w, squared=squared), w)
    torch.autograd.gradgradcheck(lambda w: rf.orthogonality_penalty(w, squared=squared), w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_orthogonality_penalty_is_the_formula_in_any_dtype_and_strides(backend, dtype):
    for (p, d), squared in product(((8, 10), (1, 1), (40, 1), (300, 129), (37, 300)), (False, True)):
        with case(p, d, squared):
            assert_orthogonality_penalty_is_the_formula(p, d, dtype, squared)


def assert_orthogonality_penalty_is_the_formula(p, d, dtype, squared):
    w = (torch.randn(p, 2 * d, generator=torch.Generator().manual_seed(0)) / p**0.5).to(dtype)[:, 1::2]

    def formula(w):
        wide = w.to(torch.promote_types(w.dtype, torch.float32))
        norm = torch.linalg.matrix_norm(wide.T @ wide - torch.eye(d, dtype=wide.dtype))
        return norm.square() if squared else norm

    def with_gradient(function, w):
        leaf = w.detach().requires_grad_()
        value = function(leaf)
        return value.detach(), torch.autograd.grad(3 * value, leaf)[0]

    value, gradient = with_gradient(lambda w: rf.orthogonality_penalty(w, squared=squared), w)
    eager, eager_gradient = with_gradient(formula, w)
    exact, exact_gradient = with_gradient(formula, w.double())
    assert value.dtype == eager.dtype and gradient.dtype == dtype
    assert (value - exact).abs() <= 3 * (eager - exact).abs() + 1e-6 * exact.abs()
    error, eager_error = ((g - exact_gradient).norm() for g in (gradient, eager_gradient))
    assert error <= 3 * eager_error + 1e-6 * exact_gradient.norm()


def test_orthogonality_penalty_does_not_depend_on_threads():
    w = torch.randn(700, 300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            value = rf.orthogonality_penalty(w)
            found.append((value.detach(), *torch.autograd.grad(value, w)))
    finally:
        torch.set_num_threads(before)
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-6)


def test_orthogonality_penalty_compiles_in_one_graph(backend):
    w = torch.randn(8, 5, requires_grad=True)
    compiled = torch.compile(rf.orthogonality_penalty, fullgraph=True, backend="aot_eager")
    values = [function(w) for function in (compiled, rf.orthogonality_penalty)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, w)[0] for value in values))


def test_orthogonality_penalty_is_nan_where_the_projection_is(backend):
    w = torch.eye(4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)).requires_grad_()
    value = rf.orthogonality_penalty(w)
    value.backward()
    assert value.isnan() and w.grad.isnan().any()


def test_group_risk_of_known_losses(backend):
    losses = torch.tensor([1.0, 3.0, 10.0, 2.0], requires_grad=True)
    risk = rf.group_risk(losses, torch.tensor([0, 0, 2, 0]), 4)
    assert risk.mean.tolist() == [2.0, 0.0, 10.0, 0.0] and risk.counts.tolist() == [3, 0, 1, 0]
    assert risk.worst == 10.0
    risk.worst.backward()
    assert losses.grad.tolist() == [0.0, 0.0, 1.0, 0.0]


X, T = (f.float() for f in planted.pairs(4, 8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text_features": T[:3]}, ValueError, r"text_features has shape \(3, 8\); expected \(4, 8\)"),
        ({"text_features": T[:, :5]}, ValueError, r"text_features has shape \(4, 5\)"),
        ({"image_features": X[0]}, ValueError, r"image_features has shape \(8,\); expected \(N, D\)"),
        ({"image_features": X.int()}, TypeError, "image_features is torch.int32"),
        ({"image_features": [[1.0]]}, TypeError, "image_features is list"),
        ({"image_features": X[:0], "text_features": T[:0]}, ValueError, "image_features has no rows"),
        ({"text_features": T.to("meta")}, ValueError, "text_features is on meta; expected cpu"),
        ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale has shape \(2,\)"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale is -1"),
        ({"logit_scale": torch.tensor(-1.0)}, ValueError, "logit_scale is -1"),
        ({"labels": [0, 1, 2, 3]}, TypeError, "labels is list"),
        ({"weight": [1.0]}, TypeError, "weight is list"),
        ({"labels": torch.arange(3)}, ValueError, r"labels has shape \(3,\); expected \(4,\)"),
        ({"labels": torch.rand(4)}, TypeError, "labels is torch.float32; expected integers"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        ({"weight": torch.ones(3)}, ValueError, r"weight is \(3,\)"),
        ({"reduction": "average"}, ValueError, "reduction is 'average'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"image_features": X, "text_features": T, "logit_scale": 10.0} | change
    with pytest.raises(error, match=message):
        rf.contrastive_loss(**arguments)


def test_teacher_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="teacher_image_features has 3 rows; expected 4"):
        rf.contrastive_distillation_loss(X, T, 10.0, X[:3], T[:3], 10.0)


def test_group_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"groups holds 0..3; expected values in \[0, 3\)"):
        rf.group_risk(torch.ones(4), torch.arange(4), 3)


def test_group_risk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        rf.group_risk(torch.ones(0), torch.ones(0, dtype=torch.int64), 2)


def test_a_gpus_backend_does_not_pretend_on_the_cpu():
    with robustft.backend("triton"), pytest.raises(RuntimeError, match="no such kernel"):
        rf.contrastive_loss(X, T, 10.0)


def test_a_thread_chooses_its_own_backend_and_leaves_the_others_theirs():
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        seen.append(dispatch.chosen())
        with robustft.backend("reference"):
            inside.set()
            leave.wait(60)
            seen.append(dispatch.chosen())
        seen.append(dispatch.chosen())

    with robustft.backend("native"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(60) and dispatch.chosen() == "native"
    assert dispatch.chosen() == "auto"  # though the other is still inside its block
    leave.set()
    thread.join()
    assert seen == ["auto", "reference", "auto"] and dispatch.chosen() == "auto"


def test_a_task_chooses_its_own_backend_and_leaves_the_others_theirs():
    async def task(name: str, enter: asyncio.Event, entered: asyncio.Event, leave: asyncio.Event) -> str:
        await enter.wait()
        with robustft.backend(name):
            entered.set()
            await leave.wait()
            return dispatch.chosen()

    async def both() -> list[str]:
        start, first, second = asyncio.Event(), asyncio.Event(), asyncio.Event()
        start.set()
        # The first leaves while the second is inside.
        return await asyncio.gather(task("native", start, first, second), task("reference", first, second, second))

    assert asyncio.run(both()) == ["native", "reference"]
    assert dispatch.chosen() == "auto"


def test_compiled_code_follows_the_backend():
    x, t = (f.float() for f in planted.pairs(9, 5))
    graphs = []

    def kept(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    torch.compiler.reset()
    loss = torch.compile(lambda x, t: rf.contrastive_loss(x, t, 10.0), fullgraph=True, backend=kept)
    for name in ("native", "reference", "native"):
        with robustft.backend(name):
            loss(x, t)
    with_operator = ["robustft.contrastive_loss" in str(sorted(targets)) for targets in graphs]
    assert with_operator == [True, False]


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'fast'"), robustft.backend("fast"):
        pass


def test_reference_statistics_are_the_kernels(backend):
    if backend == "reference":
        ops = reference
    else:
        rf.contrastive_loss(X, T, 1.0)
        ops = torch.ops.robustft
    x, t = planted.pairs(9, 5)
    xt, tt = planted.pairs(9, 6, seed=2)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4])
    inputs = (x, t[:7], torch.tensor(9.0), labels, labels[:7], xt, tt[:7], torch.tensor(4.0))
    options = () if backend == "reference" else (True, False, "highest")
    row, col, *_ = ops.similarity_statistics(*inputs, *options)
    z = 9 * x @ t[:7].T
    torch.testing.assert_close(9 * row[0] + row[1], z.logsumexp(1))
    torch.testing.assert_close(9 * col[0] + col[1], z.logsumexp(0))
    p = (4 * xt @ tt[:7].T).softmax(0)
    torch.testing.assert_close(col[7] + col[0], (p * (x @ t[:7].T)).sum(0))


@pytest.mark.parametrize("memory", [-1, 1.5, "all", True])
def test_bad_memory_is_named(memory):
    x, t = planted.pairs(4, 3)
    with pytest.raises(ValueError, match=f"memory is {memory!r}; expected 'auto' or a number of bytes"):
        rf.contrastive_loss(x, t, 10.0, memory=memory)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_in_the_features_reach_the_loss(bad, backend):
    x, t = (f.float() for f in planted.pairs(300, 16))
    x[7, 3] = bad
    for scale in (10.0, 100.0):
        each = rf.contrastive_loss(x, t, scale, reduction="none")
        assert not each[7].isfinite() and not rf.contrastive_loss(x, t, scale).isfinite()


def test_the_number_of_threads_may_change_between_forward_and_backward():
    x, t = (f.float().requires_grad_() for f in planted.pairs(700, 16))
    before = torch.get_num_threads()
    results = []
    try:
        for forward, backward in ((1, 1), (1, 5), (5, 1)):
            torch.set_num_threads(forward)
            loss = rf.contrastive_loss(x, t, 30.0)
            torch.set_num_threads(backward)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, t))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-8)
