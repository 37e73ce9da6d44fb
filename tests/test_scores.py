"""Out-of-distribution scores of one sweep: against the float64 reference, robustft.detection, and their properties."""

from __future__ import annotations

import planted
import pytest
import torch
from targets import case, each_body, each_device, each_target, placed, sizes
from torch import Tensor

import robustft
from robustft import detection
from robustft import functional as rf
from robustft.ops import reference

# N, K, D: below, at and above a panel's rows (128), a vector, and the eight vectors in which a maximum is looked for.
SHAPES = sizes(
    [(1, 1, 1), (1, 2, 37), (7, 10, 128), (127, 3, 37), (129, 257, 512), (300, 1031, 37)],
    [(1, 1, 1), (33, 3, 5), (40, 97, 20)],
)
SCALES = [(1.0, None), (1.0, 100.0), (0.01, 14.3), (0.01, 100.0)]


@pytest.fixture(params=["native", "reference"])
def backend(request):
    with robustft.backend(request.param):
        yield request.param


def unit(n: int, k: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Features near their class's embedding."""
    w, _ = planted.pairs(k, d)
    x = torch.nn.functional.normalize(w[torch.arange(n) % k] + planted.pairs(n, d, seed=3)[0], dim=1)
    return x.to(dtype), w.to(dtype)


@each_target
@pytest.mark.parametrize("scales", SCALES)
def test_scores_are_as_accurate_as_eager(scales, target):
    temperature, scale = scales
    floor = 1e-13 if target.dtype == torch.float64 else 1e-6
    s = torch.tensor(1 / temperature if scale is None else scale, dtype=torch.float64, device=target.device)
    for shape in SHAPES:
        with case(shape):
            x, w = placed(target, *unit(*shape))
            with robustft.backend(target.backend):
                ours = rf.concept_scores(x, w, temperature=temperature, logit_scale=scale)
            with robustft.backend("reference"):
                eager = rf.concept_scores(x, w, temperature=temperature, logit_scale=scale)
            exact = reference.concept_scores(x.double(), w.double(), temperature, s)
            for name, a, b, c in zip(ours._fields[:-1], ours, exact, eager, strict=False):
                assert a.dtype == (torch.float64 if target.dtype == torch.float64 else torch.float32)
                assert (a - b).abs().max() <= 3 * (c - b).abs().max() + floor * (1 + b.abs().max()), name
            cosines = x.double() @ w.double().T
            assert (cosines.amax(1) - cosines.gather(1, ours.prediction[:, None])[:, 0]).max() < 1e-6


@each_body
def test_scores_are_those_of_detection(target):
    x, w = placed(target, *unit(50, 12, 32))
    s, cosines = 30.0, x @ w.T
    with robustft.backend(target.backend):
        scores = rf.concept_scores(x, w, temperature=0.5, logit_scale=s)
    torch.testing.assert_close(scores.max_cosine, detection.max_cosine(cosines))
    torch.testing.assert_close(scores.mcm, detection.mcm(cosines, 0.5))
    torch.testing.assert_close(scores.msp, detection.msp(s * cosines))
    torch.testing.assert_close(scores.energy, detection.energy(cosines, 1 / s))
    torch.testing.assert_close(s * scores.energy, detection.energy(s * cosines))
    torch.testing.assert_close(scores.entropy, detection.entropy(s * cosines))
    assert torch.equal(scores.prediction, cosines.argmax(1))


@each_device
@pytest.mark.parametrize("body", ["target's", "reference"])
def test_confident_samples_stay_apart_as_softmax_keeps_them(body, target):
    # Two classes at right angles; p up to all but 1. The logarithm of a sum of exp(100 cosine) is as coarse as 8e-6.
    angle = torch.linspace(0.70, 0.77, 200, dtype=torch.float64)
    x, w = placed(target, torch.stack((angle.cos(), angle.sin()), 1), torch.eye(2, dtype=torch.float64))
    exact = (100 * x.double()).softmax(1).amax(1)
    with robustft.backend(target.backend if body != "reference" else body):
        scores = rf.concept_scores(x, w, temperature=0.01, logit_scale=100.0)
    for score in (scores.msp, scores.mcm):
        assert ((score - exact).abs() <= 2e-5 * (1 - exact) + 2e-7).all()
        apart = exact[:, None] - exact > 4e-5 * (1 - exact) + 5e-7
        assert (score[:, None] > score)[apart].all()


@each_body
def test_nan_among_the_cosines_makes_the_samples_scores_nan(target):
    x, w = placed(target, *unit(9, 5, 6))
    x[3, 2] = torch.nan
    broken = torch.cat((w[:4], torch.nan * w[4:]))
    for classes, expected in ((w, [3]), (broken, [*range(9)])):
        if target.backend == "reference":
            scores = reference.concept_scores(x, classes, 0.5, torch.tensor(9.0, dtype=w.dtype))
        else:
            scores = torch.ops.robustft.concept_scores(x, classes, 0.5, torch.tensor(9.0, device=w.device))[0]
        for score in scores[:5]:
            assert score.isnan().nonzero().flatten().tolist() == expected


@each_body
def test_mcm_is_msp_at_the_inverse_temperature(target):
    x, w = placed(target, *unit(40, 9, 16))
    with robustft.backend(target.backend):
        without = rf.concept_scores(x, w, temperature=0.25)
        assert torch.equal(without.mcm, without.msp)
        torch.testing.assert_close(rf.concept_scores(x, w, logit_scale=4.0).msp, without.mcm)


@each_target
def test_of_equal_classes_the_first_is_predicted(target, placeless_products):
    for n, k, d in sizes([(60, 70, 16), (65, 5, 37), (17, 101, 7)], [(34, 20, 16)]):
        x, w = placed(target, *unit(n, k, d))
        with robustft.backend(target.backend):
            assert (rf.concept_scores(x, torch.cat((w, w, w))).prediction < k).all()


@each_body
def test_one_class_is_certain(target):
    with robustft.backend(target.backend):
        scores = rf.concept_scores(*placed(target, *unit(5, 1, 3)), logit_scale=100.0)
    assert scores.mcm.tolist() == scores.msp.tolist() == [1.0] * 5 and scores.entropy.abs().max() == 0
    torch.testing.assert_close(scores.energy, scores.max_cosine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    (x, w), before = unit(900, 40, 24, dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(rf.concept_scores(x, w, logit_scale=50.0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_rows_do_not_depend_on_their_batch():
    x, w = unit(9000, 5, 8, torch.bfloat16)  # more rows than are converted at a time
    everyone, last = rf.concept_scores(x, w), rf.concept_scores(x[8100:], w)
    for a, b in zip(everyone, last, strict=True):
        torch.testing.assert_close(a[8100:], b, rtol=1e-6, atol=1e-7)


@each_body
def test_any_strides_and_what_lies_around_change_nothing(target):
    x, w = placed(target, *unit(70, 20, 24))

    def inside(a: Tensor) -> Tensor:
        return torch.nn.functional.pad(a, (3, 5, 32, 32), value=torch.nan)[32:-32, 3:-5]

    with robustft.backend(target.backend):
        expected = rf.concept_scores(x, w)
        for a in (inside(x), x.T.contiguous().T, torch.stack((x, x), -1).flatten(-2)[:, ::2]):
            for b in (inside(w), w.T.contiguous().T):
                for score, other in zip(rf.concept_scores(a, b), expected, strict=True):
                    torch.testing.assert_close(score, other)


def test_scores_have_no_gradient_and_ignore_autocast(backend):
    x, w = (a.requires_grad_() for a in unit(30, 6, 16, torch.float32))
    expected = rf.concept_scores(x, w, logit_scale=torch.tensor(20.0, requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = rf.concept_scores(x, w, logit_scale=20.0)
    assert not any(score.requires_grad for score in expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, under_autocast, strict=True))


def test_mixed_dtypes_are_promoted(backend):
    x, w = unit(30, 6, 16, torch.float32)
    expected = reference.concept_scores(x.bfloat16(), w, 1.0, torch.tensor(1.0))
    for a, b in zip(rf.concept_scores(x.bfloat16(), w), expected, strict=True):
        torch.testing.assert_close(a, b)


X, W = unit(4, 5, 3, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": 2 * X}, ValueError, "features has rows of norm 2 to 2; expected 1 within 0.001"),
        (
            {"features": X * torch.tensor([[1.0], [1.0], [torch.nan], [1.0]])},
            ValueError,
            "features has rows of norm nan",
        ),
        ({"class_embeddings": 0.98 * W.bfloat16()}, ValueError, "class_embeddings has rows of norm 0.9"),
        ({"class_embeddings": W[:, :2]}, ValueError, "class_embeddings has 2 dimensions; expected 3"),
        ({"features": X[0]}, ValueError, r"features has shape \(3,\)"),
        ({"features": X.long()}, TypeError, "features is torch.int64"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive number"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale is -1"),
        ({"logit_scale": 0}, ValueError, "logit_scale is 0"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        rf.concept_scores(**({"features": X, "class_embeddings": W} | change))
