from __future__ import annotations

import os
import sys
from pathlib import Path

# Set before torch starts its pool: on a busy machine two threads that wait for each other are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# `benchmarks` beside the tests; last, so that robustft is the installed one.
sys.path.append(str(Path(__file__).parent.parent))

import pytest  # noqa: E402  (the environment above must come first)
import torch  # noqa: E402


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
