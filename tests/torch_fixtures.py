"""What every test gets or may ask for, of torch: its seed, its device, products as a GPU has them."""

from __future__ import annotations

import pytest
import torch
from targets import INTERPRETED


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    """The test runs once a device, and its new tensors lie there."""
    if request.param != "cpu":
        torch.set_default_device(request.param)
    yield torch.device(request.param)
    torch.set_default_device(None)


@pytest.fixture
def placeless_products(monkeypatch):
    """Entries of a product that do not depend on where they lie in it, as on a GPU: those of the BLAS with which the
    interpreter multiplies do, by what rounding float64 to float32 leaves nothing of."""
    if INTERPRETED:
        import numpy
        from triton.runtime import interpreter

        def dot(self, a, b, d, *_):
            product = numpy.matmul(a.data.astype(numpy.float64), b.data.astype(numpy.float64)) + d.data
            return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
