"""Whatever argument a public function is given, it computes, or its error names the argument.

Functions and valid calls come from the operators' registry and from the modules themselves: a function that is added
without a valid call here fails.
"""

from __future__ import annotations

import functools
import inspect
import warnings

import numpy as np
import pytest
import torch
from hostile import failures, few
from torch._subclasses.fake_tensor import FakeTensorMode

import robustft
from robustft import evaluation, functional
from robustft.calibration import calibrators, distance_aware, measures
from robustft.calibration import losses as calibration_losses
from robustft.detection import metrics, scores
from robustft.neighbors import NeighborIndex
from robustft.ops import registry
from robustft.ops.registry import Call, Source

Z = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
COSINES = torch.nn.functional.normalize(Z, dim=1)
GAUSSIANS = scores.fit_class_gaussians(Z, Y)
INDEX = NeighborIndex(Z)

VALID = {
    measures: {
        "calibration_report": Call((Z.softmax(1), Y), {"bins": 5, "batch_size": 512}),
        "fit_temperature": Call((Z, Y)),
        "temperature_matching_confidence": Call((Z, Y)),
    },
    calibration_losses: {
        "focal_loss": Call((Z, Y), {"gamma": 3.0}),
        "brier_loss": Call((Z, Y)),
        "dca_loss": Call((Z, Y)),
        "mdca_loss": Call((Z, Y)),
        "mmce_loss": Call((Z, Y), {"width": 0.4, "squared": False}),
        "margin_penalty": Call((Z, Y), {"margin": 1.0}),
        "confidence_penalty": Call((Z, Y)),
        "logit_range_penalty": Call((Z, Y, -1.0, 1.0)),
        "rescale_to_range": Call((Z, Z)),
    },
    distance_aware: {
        "distance_aware_scales": Call((Z, Z, Z, Z), {"k": 2, "known": 0.05}),
        "distance_aware_logits": Call((Z, torch.ones(3))),
    },
    scores: {
        "mcm": Call((COSINES,), {"temperature": 1.0}),
        "max_cosine": Call((COSINES,)),
        "msp": Call((Z,)),
        "energy": Call((Z,), {"temperature": 1.0}),
        "entropy": Call((Z,), {"temperature": 1.0}),
        "variance": Call((COSINES,), {"temperature": 1.0}),
        "local_mcm": Call((COSINES.reshape(3, 4, 3),), {"temperature": 1.0}),
        "gl_mcm": Call((COSINES[:3], COSINES.reshape(3, 4, 3)), {"temperature": 1.0, "local_weight": 1.0}),
        "neg_label": Call((COSINES, COSINES), {"temperature": 0.01, "groups": 1, "seed": 0}),
        "select_negatives": Call((COSINES, COSINES, 3), {"percentile": 0.9}),
        "fit_class_gaussians": Call((Z, Y), {"shrinkage": 0.1}),
        "mahalanobis": Call((Z, GAUSSIANS)),
        "knn_distance": Call((Z, INDEX, 2)),
    },
    metrics: {
        "ood_metrics": Call((Z[:, 0], Z[:, 1]), {"tpr": 0.95, "positive": "id"}),
        "threshold": Call((Z[:, 0],), {"tpr": 0.95}),
        "spectrum_metrics": Call((Z[:, 0],), {"near": {"a": Z[:, 1]}, "shifts": {"b": Z[:, 2]}}),
    },
}
INTERNAL = ("check_labelled", "distributions", "top_label_ece")  # which others call with what they have checked
OTHER = {(module, name): [call] for module, calls in VALID.items() for name, call in calls.items()}
FUNCTIONAL = {
    (functional, name): list(examples(Source("cpu", torch.float32))) for name, examples in registry.PUBLIC.items()
}
CALLS = FUNCTIONAL | OTHER


@pytest.mark.parametrize(("module", "name"), CALLS, ids=lambda part: getattr(part, "__name__", part))
@pytest.mark.filterwarnings("ignore")
def test_hostile_arguments_compute_or_raise_an_error_that_names_them(module, name):
    found = list(failures(getattr(module, name), CALLS[module, name][0], name, values=few))
    assert not found, "\n".join(found)


EVERY = [(module, name, i) for (module, name), calls in CALLS.items() for i in range(len(calls))]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("module", "name", "sample"), EVERY, ids=lambda part: getattr(part, "__name__", part))
@pytest.mark.filterwarnings("ignore")
def test_all_hostile_arguments_beside_every_sample_of_the_registry(module, name, sample):
    found = list(failures(getattr(module, name), CALLS[module, name][sample], name))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("function", [functional.group_risk, evaluation.group_accuracy], ids=lambda f: f.__name__)
def test_more_groups_than_any_memory_holds_are_refused_before_memory_is_taken(function):
    three = (Y, Y, Y) if function is evaluation.group_accuracy else (Z[:, 0], Y)
    with pytest.raises(ValueError, match="num_groups is 1000000000; expected at most"):
        function(*three, num_groups=10**9)


@pytest.mark.parametrize("module", VALID, ids=lambda module: module.__name__)
def test_every_public_function_has_a_valid_call_here(module):
    public = {
        name
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_") and name not in INTERNAL
    }
    assert public == set(VALID[module])


SHAPES = [name for name in registry.PUBLIC]


@pytest.mark.parametrize("name", SHAPES)
def test_meta_and_fake_tensors_compute_the_shapes_of_results(name):
    for call in list(registry.PUBLIC[name](Source("cpu", torch.float32)))[:2]:
        expected = shapes(getattr(functional, name)(*call.arguments, **call.options))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            arguments, options = converted(call, lambda tensor: tensor.detach().to("meta"))
            assert shapes(getattr(functional, name)(*arguments, **options)) == expected
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                arguments, options = converted(call, lambda tensor: mode.from_tensor(tensor.detach()))
                assert shapes(getattr(functional, name)(*arguments, **options)) == expected


def converted(call, change):
    def one(value):
        return change(value) if isinstance(value, torch.Tensor) else value

    return tuple(map(one, call.arguments)), {name: one(value) for name, value in call.options.items()}


def shapes(results):
    results = results if isinstance(results, tuple) else (results,)
    return [(tuple(result.shape), result.dtype) for result in results]


def test_torch_func_transforms_the_losses_by_the_reference_and_a_named_kernel_says_so():
    x, t = (torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    leaf = x.clone().requires_grad_()
    functional.contrastive_loss(leaf, t, 2.0).backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.func cannot transform")
        found = torch.func.grad(functional.contrastive_loss)(x, t, 2.0)
        torch.testing.assert_close(found, leaf.grad)
        each = torch.func.vmap(functional.contrastive_loss, in_dims=(0, None, None))(torch.stack([x, 2 * x]), t, 2.0)
        torch.testing.assert_close(each[1], functional.contrastive_loss(2 * x, t, 2.0))
        w, tangent = x[:, :3], t[:, :3]
        for squared in (False, True):
            penalty = functools.partial(functional.orthogonality_penalty, squared=squared)
            both = torch.func.vmap(penalty)(torch.stack([w, tangent]))
            torch.testing.assert_close(both, torch.stack([penalty(w), penalty(tangent)]))
            leaf = w.clone().requires_grad_()
            penalty(leaf).backward()
            _, slope = torch.func.jvp(penalty, (w,), (tangent,))
            torch.testing.assert_close(slope, (leaf.grad * tangent).sum())
    with robustft.backend("native"), pytest.raises(RuntimeError, match="reference"):
        torch.func.grad(functional.contrastive_loss)(x, t, 2.0)


@pytest.mark.parametrize(
    "kind", [calibrators.TemperatureScaling, calibrators.VectorScaling, calibrators.HistogramBinning]
)
def test_calibrators_take_numpy_and_refuse_what_holds_no_numbers(kind):
    logits = Z + 2 * torch.nn.functional.one_hot(Y, 3)
    calibrator = kind().fit(logits.numpy(), Y.numpy())
    assert torch.equal(calibrator.probabilities(Z.numpy()), calibrator.probabilities(Z))
    for bad in (None, "word", object(), Z.to("meta"), Z.to_sparse(), Z.to(torch.complex64), Z.long(), Z[:, :2]):
        with pytest.raises((TypeError, ValueError), match="logits"):
            calibrator.probabilities(bad)
        with pytest.raises((TypeError, ValueError), match="logits|labels"):
            kind().fit(bad, Y)


def test_numbers_of_numpy_count_as_numbers():
    assert torch.equal(functional.kth_neighbor_distance(Z, Z, np.int64(2)), functional.kth_neighbor_distance(Z, Z, 2))
    assert torch.equal(INDEX.kth_distance(Z, np.int64(2)), INDEX.kth_distance(Z, 2))
    assert torch.equal(scores.mcm(COSINES, np.float32(0.5)), scores.mcm(COSINES, 0.5))
