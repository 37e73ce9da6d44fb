"""What nvcc makes of the CUDA sources, without a GPU: no warning, no spill, shared memory within every device's."""

from __future__ import annotations

import json
import shutil

import pytest

from benchmarks import cuda_resources

ROOT = cuda_resources.ROOT
SOURCES = [pytest.param(source, id=source.stem) for source in cuda_resources.SOURCES]


@pytest.mark.exhaustive  # minutes; the plain run has what nvcc said before, in the committed table
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile_without_warnings_spills_or_too_much_shared_memory(source):
    kernels = cuda_resources.compile_source(source, ("sm_80", "sm_90"))
    assert kernels and {kernel.architecture for kernel in kernels} == {"sm_80", "sm_90"}
    for kernel in kernels:
        assert kernel.spilled == kernel.stack == 0, kernel
        assert kernel.shared <= min(cuda_resources.SHARED_LIMITS.values()), kernel
        if kernel.name.startswith("neighbor_scores") and kernel.instructions:
            # A warp's step of 32 dimensions is 2 x 32 products from 2 x 8 loads. Copies: 6 a step, 18 to begin with.
            assert kernel.instructions == {"HMMA": 64, "LDGSTS": 24, "LDSM": 16}, kernel


def test_the_committed_table_is_of_these_kernels():
    written = json.loads((cuda_resources.ROOT / "benchmarks" / "results" / "cuda_resources.json").read_text())
    kernels = [cuda_resources.Kernel(**kernel) for kernel in written["results"]["kernels"]]
    assert {kernel.file for kernel in kernels} == {source.name for source in cuda_resources.SOURCES}
    assert all(kernel.spilled == 0 for kernel in kernels)
    assert cuda_resources.table(kernels) == (ROOT / "benchmarks" / "results" / "cuda_resources.md").read_text()
