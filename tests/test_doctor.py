"""robustft doctor finds what is broken, says how to mend it, and claims nothing that it did not check."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from robustft import doctor, functional
from robustft.ops import dispatch, registry

compiled = pytest.mark.skipif(dispatch.LIBRARIES["cpu"] != "loaded", reason="no compiled CPU operators here")


def operators() -> dict[str, doctor.Check]:
    """Its lines on the operators, by the name of the function."""
    lines = (check for check in doctor.checks() if check.name.endswith(" (cpu)"))
    return {check.name.removesuffix(" (cpu)"): check for check in lines}


class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


@pytest.mark.parametrize(
    ("driver", "of_torch", "passed", "found"),
    [
        (0, "13.0", None, "none"),
        (13, "13.2", None, "none"),
        (12, None, None, "none"),
        (12, "13.0", False, "not usable: its driver is for CUDA 12, and this torch for CUDA 13.0"),
    ],
)
def test_a_driver_older_than_torch_wants_is_said(driver, of_torch, passed, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    check = doctor._gpu()
    assert (check.name, check.passed, check.found) == ("GPU", passed, found)
    assert passed is None or check.cure == "update the NVIDIA driver, or install a torch for CUDA 12"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_there_is_no_driver_none_is_found():
    assert doctor._driver() == 0


@compiled
def test_every_operator_is_compared_with_its_reference():
    found = operators()
    assert set(found) == {name for name in registry.PUBLIC if name in registry.OPERATORS}
    for check in found.values():
        assert check.passed and "largest difference from the reference" in check.found


def test_the_registry_has_every_public_function():
    public = {
        name
        for name, function in inspect.getmembers(functional, inspect.isfunction)
        if function.__module__ == functional.__name__ and not name.startswith("_")
    }
    assert set(registry.PUBLIC) == public


@compiled
@pytest.mark.parametrize("name", [name for name in registry.PUBLIC if name not in registry.OPERATORS])
def test_public_functions_that_are_no_operator_have_none_of_their_own(name):
    """All that they run of robustft are operators of functions that doctor compares."""

    class Operators(TorchDispatchMode):
        names: set[str] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "robustft":
                self.names.add(function._opname)
            return function(*args, **(kwargs or {}))

    with Operators() as ran:
        for call in registry.PUBLIC[name](registry.Source("cpu", torch.float32)):
            getattr(functional, name)(*call.arguments, **call.options)
    assert ran.names <= set(registry.PUBLIC)


@compiled
def test_a_kernel_with_one_nan_gradient_fails(monkeypatch):
    correct = functional.contrastive_loss

    def kernel(x, t, s, **options):
        return correct(x, t if dispatch.chosen() == "reference" else NaNGradient.apply(t), s, **options)

    monkeypatch.setattr(functional, "contrastive_loss", kernel)
    checks = operators()
    assert checks["contrastive_loss"].passed is False and "nan" in checks["contrastive_loss"].found
    assert checks["group_risk"].passed


def test_the_reference_is_not_said_to_agree_with_itself(monkeypatch):
    monkeypatch.setattr(registry, "BODIES", {})
    for check in operators().values():
        assert check.passed is None and check.found == "eager reference"


def test_the_cure_installs_from_the_source_tree():
    # A name would be looked for on a package index, where it may be anyone's.
    command = doctor.REINSTALL.split("   ")[0]
    assert command.split() == ["pip", "install", "--force-reinstall", "--no-deps", "."]
