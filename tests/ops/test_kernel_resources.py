"""What nvcc makes of the CUDA sources, without a GPU: no spill, shared memory within every device's.

And no warning: .ci/run builds with warnings as errors.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import robustft
from benchmarks import cuda_resources

ROOT = cuda_resources.ROOT
LIBRARY = Path(robustft.__file__).with_name("_ops_cuda.so")


@pytest.mark.exhaustive  # the plain run has what nvcc said before, in the committed table
@pytest.mark.skipif(not LIBRARY.exists(), reason="installed without a CUDA compiler")
@pytest.mark.skipif(cuda_resources.cuobjdump() is None, reason="no cuobjdump")
def test_the_built_kernels_neither_spill_nor_take_too_much_shared_memory():
    kernels = cuda_resources.kernels_of(LIBRARY, counted="neighbor_scores")
    written = json.loads((ROOT / "benchmarks" / "results" / "cuda_resources.json").read_text())["results"]["kernels"]
    architectures = {"sm_80", "sm_90"}
    expected = {(kernel["name"], kernel["architecture"]) for kernel in written}
    assert {(k.name, k.architecture) for k in kernels} == {(n, a) for n, a in expected if a in architectures}
    for kernel in kernels:
        assert kernel.spilled == kernel.stack == 0, kernel
        assert kernel.shared <= min(cuda_resources.SHARED_LIMITS.values()), kernel
        if kernel.name.startswith("neighbor_scores"):
            # A warp's step of 32 dimensions is 2 x 32 products from 2 x 8 loads. Copies: 6 a step, 18 to begin with.
            assert kernel.instructions == {"HMMA": 64, "LDGSTS": 24, "LDSM": 16}, kernel


def test_the_committed_table_is_of_these_kernels():
    written = json.loads((cuda_resources.ROOT / "benchmarks" / "results" / "cuda_resources.json").read_text())
    kernels = [cuda_resources.Kernel(**kernel) for kernel in written["results"]["kernels"]]
    assert {kernel.file for kernel in kernels} == {source.name for source in cuda_resources.SOURCES}
    assert all(kernel.spilled == 0 for kernel in kernels)
    assert cuda_resources.table(kernels) == (ROOT / "benchmarks" / "results" / "cuda_resources.md").read_text()
