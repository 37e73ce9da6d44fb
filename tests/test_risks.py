"""Penalties and risks of logits and losses that exist already: the float64 reference, exact values, odd inputs."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import targets
import torch
from targets import TARGETS, Target, case, each_body, each_target, gradients, placed, sizes
from torch import Tensor

import robustft
from robustft import functional as rf
from robustft.ops import dispatch, reference
from robustft.ops.arguments import VARIANTS

compiled = pytest.mark.skipif(dispatch.LIBRARIES["cpu"] != "loaded", reason="installed without compiled code")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [target for target in TARGETS if target.dtype in (torch.bfloat16, torch.float16)]
REFERENCES = sizes([Target("reference", "cpu", dtype) for dtype in DTYPES], [])
each_half = pytest.mark.parametrize("target", HALVES, ids=str)
ROWS = sizes([1, 2, 7, 16, 17, 131], [1, 131])
# Below, at and above every vector's width, and what a GPU's program reads at once.
CLASSES = sizes([1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 33, 1000, 1100], [1, 2, 17, 1100])


@pytest.fixture(params=["native", "reference"])
def backend(request):
    with robustft.backend(request.param):
        yield request.param


def assert_as_accurate_as_eager(function, *inputs: Tensor, dtype: torch.dtype) -> None:
    """Of the compiled code for the device on which new tensors lie."""
    target = Target("native", torch.get_default_device().type, dtype)
    targets.assert_as_accurate_as_eager(function, *inputs, target=target)


def logits(n: int, k: int, scale: float = 14.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the rows right, the others with few or many classes above the label."""
    z, labels = scale * torch.randn(n, k, dtype=torch.float64).tanh(), torch.randint(0, k, (n,))
    z[torch.arange(0, n, 2), labels[::2]] = scale
    return z, labels


@compiled
@each_target
@pytest.mark.parametrize("top1", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_penalty_is_as_accurate_as_eager(variant, top1, target):
    for n, k in [(n, k) for k in CLASSES for n in sizes([2, 17], [5])] + [(n, 13) for n in ROWS]:
        for scale in sizes([1.0, 100.0], [100.0]):
            z, labels = logits(n, k, scale)
            labels, weight = labels.to(target.device), torch.rand(n)

            def penalty(z, weight):
                each = rf.misalignment_penalty(z, labels, variant=variant, top1=top1, reduction="none")  # noqa: B023
                return (each * weight).sum() / n  # noqa: B023

            targets.assert_as_accurate_as_eager(penalty, z, weight, target=target)


@compiled
@pytest.mark.parametrize("average", ["batch", "errors"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_target
def test_penalty_reductions_are_the_references(average, reduction, target):
    z, labels = logits(33, 10)
    labels = labels.to(target.device)

    def penalty(z):
        return rf.misalignment_penalty(z, labels, average=average, reduction=reduction).sum()

    targets.assert_as_accurate_as_eager(penalty, z, target=target)


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("top1", [False, True])
def test_penalty_passes_gradcheck(variant, top1):
    z, labels = logits(9, 5, 3.0)
    each = {"variant": variant, "top1": top1, "reduction": "none"}
    assert torch.autograd.gradcheck(lambda z: rf.misalignment_penalty(z, labels, **each), z.requires_grad_())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("top1", [False, True])
@each_body
def test_rows_without_a_misranked_class_have_exactly_no_penalty(variant, top1, target):
    z = torch.randn(40, 21)
    twice = torch.cat((z, z), 1)
    logits_and_labels = {
        "right": (z, z.argmax(1)),
        "identical": (torch.full((40, 21), 3.7), torch.zeros(40, dtype=torch.int64)),
        "duplicate classes": (twice, z.argmax(1) + 21),
        "one class": (z[:, :1], torch.zeros(40, dtype=torch.int64)),
    }
    for name, pair in logits_and_labels.items():
        with case(name), robustft.backend(target.backend):
            z, labels = placed(target, *pair)
            leaf = z.clone().requires_grad_()
            each = rf.misalignment_penalty(leaf, labels, variant=variant, top1=top1, reduction="none")
            # A gradient that is not finite does not reach such a row either.
            each.backward(torch.full_like(each, torch.inf))
            assert torch.equal(each, torch.zeros_like(each)) and torch.equal(leaf.grad, torch.zeros_like(z))


@each_body
def test_every_row_wrong_counts_every_other_class(target):
    (z,) = placed(target, torch.randn(30, 11, dtype=torch.float64))
    labels = z.argmin(1)
    others = z.scatter(1, labels[:, None], -torch.inf).logsumexp(1) - z.gather(1, labels[:, None])[:, 0]
    with robustft.backend(target.backend):
        torch.testing.assert_close(rf.misalignment_penalty(z, labels, reduction="none"), others)
        assert rf.misalignment_penalty(z, labels) == rf.misalignment_penalty(z, labels, average="errors")


@compiled
@each_target
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "misaligned", "one column"])
def test_any_strides_give_the_same_bits(layout, target):
    z, labels = placed(target, *logits(37, 19))
    match layout:
        case "transposed":
            other = z.T.contiguous().T
        case "strided":
            other = torch.stack((z, z), 2).reshape(37, 38)[:, ::2]
        case "expanded":
            z = z[:1].expand(37, 19)
            other = z.contiguous()
        case "misaligned":
            other = torch.cat((z.new_zeros(1), z.flatten()))[1:].view(37, 19)
        case _:
            other = z[:, :1].T.contiguous().T
            z, labels = z[:, :1], labels * 0
    results = []
    with robustft.backend(target.backend):
        for version in (z, other):
            leaf = version.detach().requires_grad_()
            value = rf.misalignment_penalty(leaf, labels)
            results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@compiled
@each_target
@pytest.mark.parametrize("top1", [False, True])
def test_memory_beside_the_logits_is_not_read(top1, target):
    n = sizes([19], [3])[0]
    for k in CLASSES:
        with case(k), robustft.backend(target.backend):
            z, labels = placed(target, *logits(n, k))
            penalty = partial(rf.misalignment_penalty, labels=labels, top1=top1)
            leaf = z.new_full((n + 2, k + 7), torch.nan)
            inner = slice(1, n + 1), slice(3, 3 + k)
            leaf[inner] = z
            value = penalty(leaf.requires_grad_()[inner])
            (grad,) = torch.autograd.grad(value, leaf)
            inside = gradients(penalty, z)
            assert value.double() == inside[0] and torch.equal(grad[inner].double(), inside[1])


@pytest.mark.parametrize("target", [*TARGETS, *REFERENCES], ids=str)
def test_nan_in_a_row_is_nan_in_its_penalty_alone(target):
    for variant, top1 in product(VARIANTS, (False, True)):
        with case(variant, top1), robustft.backend(target.backend):
            z, labels = placed(target, *logits(12, 37))
            z[3, 20], z[6, labels[6]] = torch.nan, torch.nan
            each = rf.misalignment_penalty(z, labels, variant=variant, top1=top1, reduction="none")
            assert each.isnan().nonzero().flatten().tolist() == [3, 6]
            assert rf.misalignment_penalty(z, labels, variant=variant, top1=top1).isnan()


@pytest.mark.parametrize("target", [*TARGETS, *REFERENCES], ids=str)
@pytest.mark.parametrize("top1", [False, True])
def test_infinite_logits_have_their_limits(top1, target):
    inf = torch.inf
    z = torch.tensor(
        [[0.0, inf, 1.0], [inf, 0.0, 1.0], [-inf, 0.0, 0.0], [-inf, -inf, -inf], [inf, inf, 0.0], [0.0, -inf, -inf]]
    )
    z, labels = placed(target, z, torch.zeros(6, dtype=torch.int64))
    for variant, limit in (("neg_log_ratio", inf), ("neg_ratio", 1.0), ("softplus", inf), ("ratio", 0.0)):
        with robustft.backend(target.backend):
            each = rf.misalignment_penalty(z, labels, variant=variant, top1=top1, reduction="none")
        assert each.tolist() == [limit, 0.0, limit, 0.0, 0.0, 0.0]


@compiled
@each_half
def test_every_half_precision_number_is_widened_as_torch_does(target):
    step = sizes([1], [97])[0]
    z = torch.arange(-(2**15), 2**15, step).to(torch.int16).view(target.dtype).reshape(-1, 1)
    z, labels = placed(target, z, torch.zeros(len(z), dtype=torch.int64))
    for k in (1, 33):  # part of a vector, and whole ones: with top1 the first kept row is the highest logit
        rows = torch.cat((z, z.new_full((len(z), k - 1), -torch.inf)), 1)
        highest = torch.ops.robustft.misalignment_penalty(rows, labels, "ratio", True)[2][0]
        torch.testing.assert_close(highest, z[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@compiled
@each_half
def test_gradients_are_rounded_as_torch_does(target):
    count = sizes([400_000], [400])[0]
    bits = torch.randint(-(2**31), 2**31, (count,)).to(torch.int32)
    special = torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e30, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 1e-45])
    near = (2.0 ** torch.randint(-27, 18, (count,))) * (1 + torch.randint(0, 2**13, (count,)) / 2**12)
    c = torch.cat((bits.view(torch.float32), special, -special, near, -near)).to(target.device)
    # Class 1 alone ranks above label 0: its gradient is c, the label's -c.
    z, labels = placed(target, torch.zeros(len(c), 2), torch.zeros(len(c), dtype=torch.int64))
    z[:, 1] = 1
    kept = torch.ops.robustft.misalignment_penalty(z, labels, "neg_log_ratio", False)[2]
    gradient = torch.ops.robustft.misalignment_penalty_backward(c, z, labels, False, kept)
    expected = torch.stack((-c, c), 1).to(target.dtype)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


LOSSES = [1, 2, 7, 31, 64, 257, 1000]
ALPHAS = [1e-9, 0.01, 0.1, 0.3, 1 / 3, 0.5, 0.999, 1.0]


@pytest.mark.usefixtures("device")
@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "signs", "huge range"])
def test_cvar_is_as_accurate_as_eager(kind, dtype):
    for n in LOSSES:
        losses = torch.randn(n, dtype=torch.float64)
        match kind:
            case "distinct":
                losses = losses.exp()
            case "ties":
                losses = torch.randint(-2, 3, (n,)).double()
            case "equal":
                losses = torch.full((n,), 0.3, dtype=torch.float64)
            case "huge range":
                losses = losses.sign() * (2.5 * losses).exp()
        for alpha in ALPHAS:
            assert_as_accurate_as_eager(lambda v: rf.cvar(v, alpha), losses, dtype=dtype)  # noqa: B023


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("alpha", [1e-6, 0.1, 0.25, 0.6, 1.0])
def test_cvar_counts_the_earlier_of_equal_losses(alpha, backend):
    losses = torch.tensor([1.0, 2.0, -0.0, 2.0, 2.0, 0.0, 2.0, 1.0], dtype=torch.float64).repeat(3).requires_grad_()
    (grad,) = torch.autograd.grad(rf.cvar(losses, alpha), losses)
    budget = alpha * 24
    order = sorted(range(24), key=lambda i: (-losses[i].item(), i))
    for rank, i in enumerate(order):
        assert grad[i].item() == pytest.approx(min(max(budget - rank, 0), 1) / budget, abs=1e-12)


@pytest.mark.usefixtures("device")
def test_cvar_ends_are_the_maximum_and_the_mean(backend):
    losses = torch.randn(1001, dtype=torch.float64)
    assert rf.cvar(losses, 1e-12) == losses.max()
    assert rf.cvar(losses, 1 / 1001).item() == pytest.approx(losses.max().item(), rel=1e-12)
    torch.testing.assert_close(rf.cvar(losses, 1.0), losses.mean())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_losses_reach_cvar(dtype, backend):
    for count, alpha in product((1, 5, 100), (1e-6, 0.2, 1.0)):
        with case(count, alpha):
            losses = torch.randn(100).to(dtype)
            losses[torch.randperm(100)[:count]] = torch.nan
            losses[3] = -losses[3]  # NaN of either sign, should it be one
            assert rf.cvar(losses, alpha).isnan()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_losses_count_where_they_rank(dtype, backend):
    losses = torch.tensor([1.0, -torch.inf, 3.0, 2.0]).to(dtype).requires_grad_()
    value = rf.cvar(losses, 0.5)
    value.backward()
    assert value == 2.5 and losses.grad.tolist() == [0.0, 0.0, 0.5, 0.5]
    assert rf.cvar(losses, 1.0) == -torch.inf
    assert rf.cvar(torch.tensor([1.0, torch.inf, 3.0]).to(dtype), 0.1) == torch.inf


@pytest.mark.usefixtures("device")
@compiled
def test_cvar_of_any_strides_and_beside_poison():
    losses = torch.randn(33)
    poisoned = torch.full((35, 3), torch.nan)
    poisoned[1:34, 1] = losses
    assert torch.equal(rf.cvar(poisoned[1:34, 1], 0.3), rf.cvar(losses, 0.3))
    assert rf.cvar(losses[:1].expand(9), 0.3) == losses[0]


@pytest.mark.usefixtures("device")
@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_groups", [1, 3, 40])
def test_group_objectives_are_as_accurate_as_eager(num_groups, dtype):
    for n in (1, 2, 3, 4, 5, 257):
        losses, groups = torch.randn(n).exp(), torch.randint(0, num_groups, (n,))
        weights = torch.rand(num_groups, dtype=torch.float64)

        def risks(losses):
            risk = rf.group_risk(losses, groups, num_groups)  # noqa: B023
            dro = rf.group_dro(losses, groups, weights, 0.3)  # noqa: B023
            return risk.mean.square().sum(), risk.worst, dro.loss

        assert_as_accurate_as_eager(risks, losses, dtype=dtype)


@pytest.mark.usefixtures("device")
@compiled
@pytest.mark.parametrize("term", [0, 1])
def test_group_risk_terms_have_their_own_gradients(term):
    losses, groups = torch.rand(11, dtype=torch.float64, requires_grad=True), torch.arange(11) % 3
    assert torch.autograd.gradcheck(lambda losses: rf.group_risk(losses, groups, 4)[term], losses)


@pytest.mark.usefixtures("device")
@compiled
def test_compiled_group_risk_is_what_other_devices_compose():
    losses, groups = torch.randn(50), torch.randint(0, 6, (50,))
    ours = torch.ops.robustft.group_risk(losses, groups, 8)
    composed = reference.risk_of_sums(*torch.ops.robustft.group_sums(losses, groups, 8))
    torch.testing.assert_close(ours, composed)
    from robustft.ops import risks

    inputs = (torch.randn(8), torch.tensor(0.7))
    for mean, worst in (inputs, (None, inputs[1]), (inputs[0], None)):
        ours_back = torch.ops.robustft.group_risk_backward(mean, worst, groups, ours[2], ours[3])
        torch.testing.assert_close(ours_back, risks._group_risk_gradient(mean, worst, groups, ours[2], ours[3]))


@pytest.mark.usefixtures("device")
def test_worst_group_may_be_negative_and_nan_is_worst(backend):
    losses, groups = torch.tensor([-3.0, -2.0, -5.0]), torch.tensor([0, 2, 2])
    assert rf.group_risk(losses, groups, 4).worst == -3.0
    losses[1] = torch.nan
    risk = rf.group_risk(losses, groups, 4)
    assert risk.worst.isnan() and risk.mean[:2].tolist() == [-3.0, 0.0]


@pytest.mark.usefixtures("device")
def test_group_dro_weights_follow_algorithm_1(backend):
    q, risk = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 0.0, 9.0]).double()
    updated = rf.group_dro_weights(q, risk, 0.7)
    expected = q * (0.7 * risk).exp()
    torch.testing.assert_close(updated, expected / expected.sum())
    torch.testing.assert_close(rf.group_dro_weights(5 * q, risk, 0.7), updated)
    torch.testing.assert_close(rf.group_dro_weights(q, risk, 0.0), q)


def test_group_dro_weights_do_not_overflow():
    updated = rf.group_dro_weights(torch.full((3,), 1 / 3), torch.tensor([1e30, 5.0, 1e30]), 100.0)
    torch.testing.assert_close(updated, torch.tensor([0.5, 0.0, 0.5]))


@pytest.mark.usefixtures("device")
def test_absent_groups_keep_their_weights_relative_to_each_other(backend):
    q = torch.tensor([0.1, 0.2, 0.3, 0.4])
    means, counts = torch.tensor([1.5, torch.nan, torch.nan, 0.5]), torch.tensor([2, 0, 0, 7])
    updated = rf.group_dro_weights(q, means, 1.0, counts)
    assert updated.sum().item() == pytest.approx(1) and (updated[2] / updated[1]).item() == pytest.approx(1.5)
    assert (updated[0] / updated[1]).item() == pytest.approx(0.5 * math.exp(1.5))


@pytest.mark.usefixtures("device")
def test_group_dro_by_hand(backend):
    losses = torch.tensor([1.0, 3.0, 10.0, 2.0], dtype=torch.float64, requires_grad=True)
    q = torch.full((4,), 0.25, dtype=torch.float64, requires_grad=True)
    objective = rf.group_dro(losses, torch.tensor([0, 0, 2, 0]), q, 0.1)
    odds = torch.tensor([math.exp(0.2), 1.0, math.exp(1.0), 1.0], dtype=torch.float64)
    torch.testing.assert_close(objective.weights, odds / odds.sum())
    assert objective.mean.tolist() == [2.0, 0.0, 10.0, 0.0] and objective.counts.tolist() == [3, 0, 1, 0]
    torch.testing.assert_close(objective.loss, (objective.weights * objective.mean).sum())
    objective.loss.backward()
    share = objective.weights / objective.counts.clamp(min=1)
    torch.testing.assert_close(losses.grad, share[torch.tensor([0, 0, 2, 0])])
    assert q.grad is None and not objective.weights.requires_grad


def test_group_dro_finds_the_minimax_of_two_groups():
    # Losses (t - 1)^2 and 4 (t + 1)^2: the largest is least where they are equal, at t = -1/3.
    t, q = torch.zeros((), dtype=torch.float64, requires_grad=True), torch.full((2,), 0.5, dtype=torch.float64)
    optimizer = torch.optim.SGD([t], lr=0.05)
    for _ in range(600):
        losses = torch.stack(((t - 1) ** 2, 4 * (t + 1) ** 2))
        loss, q, *_ = rf.group_dro(losses, torch.arange(2), q, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert t.item() == pytest.approx(-1 / 3, abs=0.01)


@compiled
def test_repeating_repeats_every_bit_on_one_thread_and_two():
    z, labels = (a.float() if a.is_floating_point() else a for a in logits(700, 129))
    losses = torch.randn(5000)

    def everything():
        penalty = gradients(lambda z: rf.misalignment_penalty(z, labels), z)
        risk = gradients(lambda v: sum(rf.group_risk(v, labels.repeat(8)[:5000], 129)[:2]).sum(), losses)
        return *penalty, *risk, *gradients(lambda v: rf.cvar(v, 0.37), losses)

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 1, 2, 2):
            torch.set_num_threads(count)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other[1], results[0][1])  # rows do not depend on the threads
        assert all(torch.equal(a, b) for a, b in zip(other[2:], results[0][2:], strict=True))
    assert results[0][0] == results[1][0] and results[2][0] == results[3][0]


V, G = torch.ones(4), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rf.cvar([1.0], 0.5), TypeError, "losses is list"),
        (lambda: rf.cvar(V.int(), 0.5), ValueError, r"losses is \(4,\) torch.int32"),
        (lambda: rf.cvar(V[:0], 0.5), ValueError, "not empty"),
        (lambda: rf.cvar(V, 1.5), ValueError, "alpha is 1.5"),
        (lambda: rf.cvar(V, math.nan), ValueError, "alpha is nan"),
        (lambda: rf.misalignment_penalty([[1.0]], G), TypeError, "logits is list"),
        (lambda: rf.misalignment_penalty(V, G), ValueError, r"logits is \(4,\) torch.float32"),
        (lambda: rf.misalignment_penalty(V[:, None], G), ValueError, r"labels holds 0..1; expected values in \[0, 1\)"),
        (lambda: rf.misalignment_penalty(torch.ones(4, 2), G, variant="log"), ValueError, "variant is 'log'"),
        (lambda: rf.misalignment_penalty(torch.ones(4, 2), G, average="all"), ValueError, "average is 'all'"),
        (lambda: rf.misalignment_penalty(torch.ones(4, 2), G, reduction="max"), ValueError, "reduction is 'max'"),
        (lambda: rf.group_risk(V, [0, 1, 1, 0], 2), TypeError, "groups is list"),
        (lambda: rf.group_risk(V, G.bool(), 2), ValueError, r"groups is \(4,\) torch.bool"),
        (lambda: rf.group_risk(V, G[:3], 2), ValueError, r"groups is \(3,\)"),
        (lambda: rf.group_risk(V, G, 0), ValueError, "num_groups is 0"),
        (lambda: rf.group_dro(V, G, torch.ones(1), 0.1), ValueError, r"groups holds 0..1; expected values in \[0, 1\)"),
        (lambda: rf.group_dro(V, G, [1.0, 1.0], 0.1), TypeError, "weights is list"),
        (lambda: rf.group_dro(V, G, torch.ones(2).half(), 0.1), ValueError, r"weights is \(2,\) torch.float16"),
        (lambda: rf.group_dro(V, G, torch.tensor([1.0, -1.0]), 0.1), ValueError, "weights holds -1.0..1.0"),
        (lambda: rf.group_dro(V, G, torch.zeros(2), 0.1), ValueError, "not all zero"),
        (lambda: rf.group_dro(V, G, torch.ones(2), -0.1), ValueError, "step_size is -0.1"),
        (lambda: rf.group_dro_weights(torch.ones(2), torch.ones(3), 0.1), ValueError, r"group_means is \(3,\)"),
        (lambda: rf.group_dro_weights(torch.ones(2), torch.ones(2), 0.1, G), ValueError, r"counts is \(4,\)"),
        (lambda: rf.group_dro_weights(torch.ones(2), [1.0, 1.0], 0.1), TypeError, "group_means is list"),
    ],
)
def test_bad_arguments_are_named(call, error, message, backend):
    with pytest.raises(error, match=message):
        call()
