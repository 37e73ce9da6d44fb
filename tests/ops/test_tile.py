"""The tile's products, in the arithmetic this processor uses for each precision, and what the losses make of them."""

from __future__ import annotations

import planted
import pytest
import torch
from targets import case

import robustft
from robustft import functional as rf
from robustft.ops import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.LIBRARIES["cpu"] != "loaded", reason="installed without compiled code (no compiler)"
)

PRECISIONS = ("highest", "high", "medium")
IEEE, BF16, BF16X3 = 0, 1, 2
# Largest error of a product of unit vectors. bf16: both factors rounded to 8 bits; bf16x3: their third parts, and low
# times low, are left out.
ERROR = {IEEE: 4e-7, BF16: 2**-8, BF16X3: 3 * 2**-18}


def arithmetic(dtype: torch.dtype, precision: str) -> int:
    return torch.ops.robustft.product_arithmetic(torch.zeros(1, dtype=dtype), precision).item()


@pytest.fixture(params=PRECISIONS)
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_arithmetic_follows_dtype_precision_and_processor():
    assert arithmetic(torch.float64, "medium") == arithmetic(torch.float32, "highest") == IEEE
    bf16 = {"avx512_bf16": (IEEE, BF16, BF16, IEEE), "amx": (BF16X3, BF16, BF16, IEEE)}
    expected = bf16.get(robustft.build_info()["active_isa"], (IEEE,) * 4)
    cases = (torch.float32, "high"), (torch.float32, "medium"), (torch.bfloat16, "highest"), (torch.float16, "high")
    assert tuple(arithmetic(*case) for case in cases) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_of_a_tile(dtype, precision):
    error = 1e-14 if dtype == torch.float64 else ERROR[arithmetic(dtype, precision)]
    for n, m, d in [(1, 1, 1), (16, 16, 32), (33, 47, 37), (100, 130, 512), (64, 64, 64), (65, 17, 129)]:
        with case(n, m, d):
            x, t = planted.pairs(n, d)[0].to(dtype), planted.pairs(m, d, seed=2)[0].to(dtype)
            g = torch.nn.functional.normalize(torch.randn(n, m, dtype=torch.float64), dim=None if n == 1 else 1)
            g = (g / max(n, m) ** 0.5).float()
            products = torch.ops.robustft.tile_products(x, t, g, precision)
            exact = x.double() @ t.double().T, g.double() @ t.double(), g.double().T @ x.double()
            for ours, expected in zip(products, exact, strict=True):
                assert (ours.double() - expected).abs().max() <= error * max(1.0, expected.abs().max())


def test_cosines_of_split_factors_are_within_two_millionths():
    x, t = planted.pairs(300, 512)[0].float(), planted.pairs(300, 512, seed=2)[0].float()
    s, _, _ = torch.ops.robustft.tile_products(x, t, torch.zeros(300, 300), "high")
    assert (s.double() - x.double() @ t.double().T).abs().max() <= 2e-6


def test_nan_and_inf_in_a_factor_reach_their_products(precision):
    x, t = planted.pairs(40, 37)[0].float(), planted.pairs(50, 37)[0].float()
    x[3, 5], t[7, 0], t[8, 1] = torch.nan, torch.inf, -torch.nan
    s, _, _ = torch.ops.robustft.tile_products(x, t, torch.zeros(40, 50), precision)
    expected = torch.zeros(40, 50, dtype=torch.bool)
    expected[3], expected[:, 7:9] = True, True
    assert torch.equal(~s.isfinite(), expected)


@pytest.mark.parametrize("shape", [(523, 37), (130, 512)])
@pytest.mark.parametrize("memory", ["auto", 0])
def test_losses_follow_the_precision_setting(shape, memory, precision):
    inputs = [f.float() for f in planted.pairs(*shape)]
    teacher = [f.float() for f in planted.pairs(*shape, seed=1)]

    def values(x, t, xt, tt):
        x, t = (f.clone().requires_grad_() for f in (x, t))
        softmaxes = rf.contrastive_distillation_loss(x, t, 8.0, xt, tt, 6.0, memory=memory)
        sigmoids = rf.sigmoid_contrastive_distillation_loss(x, t, 8.0, -5.0, xt, tt, 6.0, -4.0, memory=memory)
        sigmoid = (rf.sigmoid_contrastive_loss(x, t, 8.0, -5.0, memory=memory),)
        found = []
        for terms in (softmaxes, sigmoids, sigmoid):
            gradients = torch.autograd.grad(sum(terms), (x, t))
            found += [*(term.detach().double() for term in terms), *(g.double() for g in gradients)]
        return found

    ours = values(*inputs, *teacher)
    with robustft.backend("reference"):
        exact = values(*(f.double() for f in inputs + teacher))
    error = ERROR[arithmetic(torch.float32, precision)]
    for a, b in zip(ours, exact, strict=True):
        # Errors of the logits, 8 times those of the cosines, and of the gradients' own products.
        assert (a - b).abs().max() <= 16 * error * b.abs().max()
