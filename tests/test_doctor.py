"""robustft doctor finds what is broken, says how to mend it, and claims nothing that it did not check."""

from __future__ import annotations

import pytest
import torch

from robustft import doctor, functional
from robustft.ops import dispatch

compiled = pytest.mark.skipif(dispatch.LIBRARIES["cpu"] != "loaded", reason="no compiled CPU operators here")


def operators() -> dict[str, doctor.Check]:
    found = {check.name: check for check in doctor.checks()}
    return {name: found[f"{name} (cpu)"] for name in doctor.OPERATORS}


class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


@compiled
def test_every_operator_is_compared_with_its_reference():
    for check in operators().values():
        assert check.passed and "largest difference from the reference" in check.found


@compiled
def test_a_kernel_with_one_nan_gradient_fails(monkeypatch):
    correct = functional.contrastive_loss

    def kernel(x, t, s, **options):
        return correct(x, t if dispatch._choice == "reference" else NaNGradient.apply(t), s, **options)

    monkeypatch.setattr(functional, "contrastive_loss", kernel)
    checks = operators()
    assert checks["contrastive_loss"].passed is False and "nan" in checks["contrastive_loss"].found
    assert checks["group_risk"].passed


def test_the_reference_is_not_said_to_agree_with_itself(monkeypatch):
    monkeypatch.setattr(dispatch, "_KERNELS", {})
    for check in operators().values():
        assert check.passed is None and check.found == "eager reference"


def test_the_cure_installs_from_the_source_tree():
    # A name would be looked for on a package index, where it may be anyone's.
    command = doctor.REINSTALL.split("   ")[0]
    assert command.split() == ["pip", "install", "--force-reinstall", "--no-deps", "."]
