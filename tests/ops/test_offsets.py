"""Addresses beyond 32 bits: inputs whose rows lie far apart, and more logits than 32 bits count.

The far rows lie in memory that is reserved, not used: what no row touches is never given a page.
"""

from __future__ import annotations

import mmap

import planted
import pytest
import torch
from targets import INTERPRETED, TARGETS, Target, each_device, placed, sizes
from torch import Tensor
from torch.nn.functional import normalize

import robustft
from robustft import functional as rf
from robustft.ops import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.LIBRARIES["cpu"] != "loaded", reason="installed without compiled code (no compiler)"
)
# float64 is the CPU's alone, and twice the address space; the interpreter takes its time.
DTYPES = {torch.float32} if INTERPRETED else {torch.float32, torch.bfloat16, torch.float16}
each_float = pytest.mark.parametrize("target", [t for t in TARGETS if t.dtype in DTYPES], ids=str)


def reserved(entries: int, like: Tensor) -> Tensor:
    if like.device.type == "cuda":
        return like.new_empty(entries)
    size = entries * like.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=like.dtype)


def far_apart(a: Tensor) -> Tensor:
    """The same rows, of which the last begins beyond 2^31 entries after the first."""
    rows, columns = a.shape
    stride = 2**31 // (rows - 1) + 1
    memory = reserved((rows - 1) * stride + columns, a)
    far = memory.as_strided((rows, columns), (stride, 1))
    far.copy_(a)
    assert far.stride(0) * (rows - 1) > 2**31
    return far


# 131 rows are near enough to be read where they are, three are copied (robustft/ops/triton/launch.py).
@pytest.mark.parametrize("n", [131, 3])
@each_float
def test_rows_further_apart_than_32_bits_are_read_where_they_are(n, target):
    x, t = placed(target, *planted.pairs(n, 9))
    labels, scale = torch.arange(n, device=target.device), torch.tensor(20.0, device=target.device)

    def results(*pair: Tensor) -> list[Tensor]:
        pair = [a.detach().requires_grad_() for a in pair]
        terms = [*rf.contrastive_distillation_loss(*pair, scale, *pair, scale, memory=0)]
        terms += rf.classification_loss(*pair, labels, scale)
        terms += [rf.misalignment_penalty(pair[0], labels % 9)]
        gradients = torch.autograd.grad(sum((k + 1) * term for k, term in enumerate(terms)), pair)
        scores = rf.concept_scores(*pair, logit_scale=scale)
        return [*(term.detach() for term in terms), *gradients, *scores]

    with robustft.backend(target.backend):
        for a, b in zip(results(far_apart(x), far_apart(t)), results(x, t), strict=True):
            torch.testing.assert_close(a, b)


def reference_contrastive(x: Tensor, t: Tensor, scale: float, rows: int) -> list[Tensor]:
    """Losses and gradients in float64, some rows of logits at a time."""
    x, t = x.double(), t.double()
    n = len(x)
    row_lse, col_lse = x.new_empty(n), x.new_full((n,), -torch.inf)
    for start in range(0, n, rows):
        z = scale * x[start : start + rows] @ t.T
        row_lse[start : start + rows] = z.logsumexp(1)
        col_lse = torch.logaddexp(col_lse, z.logsumexp(0))
    pair = scale * (x * t).sum(1)
    dx, dt = torch.empty_like(x), torch.zeros_like(t)
    for start in range(0, n, rows):
        here = slice(start, start + rows)
        z = scale * x[here] @ t.T
        g = 0.5 * ((z - row_lse[here, None]).exp() + (z - col_lse).exp())
        dx[here] = scale * (g @ t - t[here])
        dt += scale * (g.T @ x[here])
        dt[here] -= scale * x[here]
    return [(row_lse + col_lse) / 2 - pair, dx, dt]


MEMORY = sizes([2**36, 0], [0])  # of so few logits as are interpreted, test_contrastive.py has all


def some(target: Target, large, small):
    """Of a GPU so many logits that 32 bits do not count them; elsewhere the same test of few."""
    return large if target.device == "cuda" else small


@pytest.mark.parametrize("memory", MEMORY)
@each_float
def test_losses_of_more_pairs_than_32_bits_count_are_as_exact(memory, target):
    n, d = some(target, (65_537, 40), (67, 40))
    x, t = placed(target, *planted.pairs(n, d, noise=2.0))
    with robustft.backend(target.backend):
        x, t = x.requires_grad_(), t.requires_grad_()
        each = rf.contrastive_loss(x, t, torch.tensor(30.0, device=target.device), memory=memory, reduction="none")
        found = [each.detach(), *torch.autograd.grad(each.sum(), (x, t))]
    tolerance = 2e-5 if target.dtype == torch.float32 else 2e-2
    for a, b in zip(found, reference_contrastive(x.detach(), t.detach(), 30.0, 1024), strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()
        assert (a[-1].double() - b[-1]).norm() <= 5 * tolerance * b[-1].norm() + 1e-6


@pytest.mark.parametrize("memory", MEMORY)
@each_float
def test_class_losses_of_more_logits_than_32_bits_count_are_those_of_their_parts(memory, target):
    n, k, d = some(target, (53_003, 41_003, 24), (67, 35, 9))
    x, w = placed(target, normalize(torch.randn(n, d), dim=1), normalize(torch.randn(k, d), dim=1))
    labels, core = (torch.arange(n) * 7 % k).to(target.device), torch.rand(n).to(target.device)
    scale = torch.tensor(20.0, device=target.device)

    def results(rows: slice) -> list[Tensor]:
        leaves = [a.detach().requires_grad_() for a in (x[rows], w)]
        how = {"memory": memory, "reduction": "none"}
        terms = [*rf.classification_loss(*leaves, labels[rows], scale, label_smoothing=0.1, **how)]
        terms += rf.dual_risk(leaves[0], leaves[1], leaves[1].flip(0), labels[rows], core[rows], scale, **how)
        gradients = torch.autograd.grad(sum((j + 1) * term.sum() for j, term in enumerate(terms)), leaves)
        return [*(term.detach() for term in terms), *gradients]

    tolerance = 1e-4 if target.dtype == torch.float32 else 3e-2
    part = -(-n // some(target, 8, 2))
    with robustft.backend(target.backend):
        *by_row, dw = results(slice(0, n))
        total = torch.zeros_like(dw, dtype=torch.float64)
        for start in range(0, n, part):
            *expected, of_part = results(slice(start, start + part))
            total += of_part
            for a, b in zip(by_row, expected, strict=True):
                assert (a[start : start + part].double() - b).norm() <= tolerance * b.double().norm()
    assert (dw.double() - total).norm() <= tolerance * total.norm()


@each_float
def test_penalties_of_more_logits_than_32_bits_count_are_those_of_their_parts(target):
    n, k = some(target, (53_003, 41_003), (131, 67))
    z = torch.randn(n, k, device=target.device, dtype=target.dtype)
    labels = torch.arange(n, device=target.device) * 7 % k
    tail = slice(n - 100, n)
    with robustft.backend(target.backend):
        results = []
        for rows in (slice(0, n), tail):
            leaf = z[rows].detach().requires_grad_()
            each = rf.misalignment_penalty(leaf, labels[rows], reduction="none")
            results.append([each.detach()[-100:], torch.autograd.grad(each.sum(), leaf)[0][-100:]])
        torch.testing.assert_close(*results)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter has room for planes that are hardly used")
@pytest.mark.parametrize("loss", ["contrastive", "classes"])
@each_device
def test_planes_of_more_entries_than_32_bits_count_are_kept_and_read(loss, target, monkeypatch):
    from robustft.ops import layouts

    x, t = placed(target, *planted.pairs(131, 9))
    labels, scale = torch.arange(131) % 5, torch.tensor(20.0)

    def results() -> list[Tensor]:
        a, b = x.clone().requires_grad_(), t.clone().requires_grad_()
        if loss == "contrastive":
            terms = rf.contrastive_distillation_loss(a, b, scale, t, x, scale)
        else:
            terms = rf.dual_risk(a, b[:5], b[5:10], labels, torch.full((131, 5), 0.3), scale)
        return [*(term.detach() for term in terms), *torch.autograd.grad(sum(terms), (a, b))]

    monkeypatch.setitem(layouts.TRITON_KEPT, torch.float32, torch.bfloat16)
    with robustft.backend(target.backend):
        expected = results()
        monkeypatch.setattr(layouts, "pitch", lambda m: 2**23)  # two planes of 131 rows
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
