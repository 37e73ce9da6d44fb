"""The CUDA operators' own sources, run on the processor by tests/cuda_emulation, against the CPU's operators.

Threads run in another order with every seed: a result that needs a barrier that is not there would differ.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from targets import case, exhaustive
from torch.nn.functional import normalize

import robustft
from robustft import functional as rf
from robustft.ops import dispatch

TESTS = Path(__file__).parent.parent
SOURCES = TESTS.parent / "csrc" / "cuda"
pytestmark = [
    pytest.mark.exhaustive,  # the properties are those of the CPU's tests; to compile the sources takes 12 s a worker
    pytest.mark.skipif(not SOURCES.exists(), reason="csrc/ is not beside the tests"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(dispatch.LIBRARIES["cpu"] != "loaded", reason="installed without compiled code"),
]


@pytest.fixture(scope="session")
def operators(request, tmp_path_factory):
    """Compiled once for all workers, and for later runs that have the same sources."""
    if cache := getattr(request.config, "cache", None):
        folder = cache.mkdir("cuda_emulation")
    else:
        folder = tmp_path_factory.getbasetemp()
        folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # in which every worker has a folder
    library = folder / f"{digest()}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker compiles, the others wait for it
        if not library.exists():
            for earlier in folder.glob("*.so"):
                earlier.unlink()
            compile_to(library)
    torch.ops.load_library(str(library))
    return torch.ops.robustft_emulation


def digest() -> str:
    """Of all that the library is made of."""
    files = sorted(file for place in (SOURCES.parent, TESTS / "cuda_emulation") for file in place.rglob("*.*"))
    content = [file.read_bytes() for file in files]
    return hashlib.sha256(
        b"".join((*content, torch.__version__.encode(), inspect.getsource(compile_to).encode()))
    ).hexdigest()[:16]


def compile_to(library: Path) -> None:
    torch_dir = Path(torch.__file__).parent
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-I", str(TESTS / "cuda_emulation"), "-isystem", str(torch_dir / "include")]
    command += [str(TESTS / "cuda_emulation" / "operators.cpp"), "-o", f"{library}.new"]
    command += ["-L", str(torch_dir / "lib"), "-Wl,--no-as-needed", "-ltorch_cpu"]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr[-4000:]
    os.replace(f"{library}.new", library)


@pytest.fixture(params=[1, *exhaustive(2)], autouse=True)
def order(request, operators):
    operators.set_order(request.param)


def losses(kind: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    v = torch.randn(n, dtype=torch.float64)
    match kind:
        case "ties":
            v = (2 * v).round()
        case "NaN":
            v[::7] = torch.nan
        case "infinite":
            v[::5], v[1::5] = torch.inf, -torch.inf
    return v.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "ties", "NaN", "infinite"])
def test_cvar_is_that_of_the_cpu(operators, kind, dtype):
    for n in (1, 2, 33, 1024, 1025, 2500):
        v = losses(kind, n, dtype)
        for alpha in (1e-9, 0.37, 1.0):
            (value, boundary), expected = operators.cvar(v, alpha), torch.ops.robustft.cvar(v, alpha)
            torch.testing.assert_close(value, expected[0], equal_nan=True)
            assert torch.equal(boundary.nan_to_num(7.0), expected[1].nan_to_num(7.0))
            grad = torch.tensor(0.7, dtype=value.dtype)
            gradient = operators.cvar_backward(grad, v, alpha, boundary)
            assert torch.equal(gradient, torch.ops.robustft.cvar_backward(grad, v, alpha, expected[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "ties", "NaN", "infinite"])
def test_group_risk_is_that_of_the_cpu(operators, kind, dtype):
    for n in (1, 31, 257, 1000):
        v, groups = losses(kind, n, dtype), torch.randint(0, 40, (n,))
        groups[groups == 3] = 2
        risk, expected = operators.group_risk(v, groups, 41), torch.ops.robustft.group_risk(v, groups, 41)
        for a, b in zip(risk, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-6)
        mean, worst = torch.randn(41, dtype=risk[0].dtype), torch.randn((), dtype=risk[0].dtype)
        for gradients in ((mean, worst), (mean, None), (None, worst)):
            arguments = *gradients, groups, *expected[2:]
            gradient = operators.group_risk_backward(*arguments)
            assert torch.equal(gradient, torch.ops.robustft.group_risk_backward(*arguments))


def test_losses_outside_all_groups_are_counted_nowhere(operators):
    v, groups = torch.tensor([1.0, 5.0, 2.0, 9.0]), torch.tensor([0, -1, 0, 2])
    mean, worst, worst_group, counts = operators.group_risk(v, groups, 2)
    assert mean.tolist() == [1.5, 0] and worst == 1.5 and worst_group == 0 and counts.tolist() == [2, 0]
    gradient = operators.group_risk_backward(torch.ones(2), torch.ones(()), groups, worst_group, counts)
    assert gradient.tolist() == [1, 0, 1, 0]
    assert [float(a.sum()) for a in operators.group_risk(v, groups + 7, 2)] == [0, 0, 0, 0]


def cases():
    """By name, queries, points and how many are sampled; shapes about the tile's 128 x 256 x 32."""
    unit = normalize(torch.randn(1301, 33), dim=1)
    copies = unit[:200].repeat_interleave(5, 0)
    scale = torch.logspace(-3, 3, 1000)[torch.randperm(1000), None]
    return {
        "unit vectors": (normalize(torch.randn(131, 33), dim=1), unit, 300),
        "no sample": (normalize(torch.randn(3, 33), dim=1), unit, 0),
        "points themselves": (unit[::13], unit, 256),
        "far from the origin": (100 + torch.randn(20, 64), 100 + torch.randn(1024, 64), 256),
        "equal points": (copies[:40] + 1e-3 * torch.randn(40, 33), copies, 128),
        "uneven norms": (5 * torch.randn(17, 24), scale * torch.randn(1000, 24), 256),
        "one dimension": (torch.randn(33, 1), torch.randn(900, 1), 256),
        "beyond float's squares": (1e-25 * torch.randn(5, 24), 1e-25 * torch.randn(300, 24), 64),
        "one point": (torch.randn(2, 7), torch.randn(1, 7), 1),
    }


QUICK = "no sample", "one dimension", "beyond float's squares", "one point"


@pytest.mark.parametrize("name", [*QUICK, *exhaustive(*(name for name in cases() if name not in QUICK))])
def test_neighbors_are_exactly_those_of_the_reference(name, operators):
    queries, points, samples = cases()[name]
    packed = points, *operators.neighbor_pack(points, samples)
    for k in sorted({1, min(17, len(points)), len(points)}):
        with case(k):
            with robustft.backend("reference"):
                distances, indices = rf.nearest_neighbors(queries, points, k, squared=False)
            kth = operators.kth_neighbor_distance(queries, *packed, k, False)
            torch.testing.assert_close(kth, distances[:, -1], rtol=1e-6, atol=0)
            if k < len(points):
                nearest = operators.nearest_neighbors(queries, *packed, k, False)
                torch.testing.assert_close(nearest[0], distances, rtol=1e-6, atol=0)
                assert torch.equal(nearest[1], indices)
                assert torch.equal(nearest[0][:, -1], kth)


def test_packed_points_are_those_of_the_cpu(operators):
    points = 3 + torch.randn(700, 37)
    centre, bias, filter, sample, bounds = operators.neighbor_pack(points, 20)
    rows = filter.view(torch.bfloat16).view(700, 64)
    torch.testing.assert_close(centre, points.mean(0))
    exact = points - centre
    assert torch.equal(rows[:, :37], exact.bfloat16()) and not rows[:, 37:].any()
    torch.testing.assert_close(bias, exact.square().sum(1) / 2)
    residual = (exact - exact.bfloat16().float()).norm(dim=1).max()
    torch.testing.assert_close(bounds, torch.stack((exact.norm(dim=1).max(), residual, torch.tensor(1.0))).double())
    assert (torch.cdist(sample, exact).argmin(1).sort().values // 35 == torch.arange(20)).all()  # one of each 35
    points[699, 36] = torch.inf
    assert operators.neighbor_pack(points, 20)[4][0].isnan()


def test_results_come_from_the_filter(operators):
    # Points whose bias says that they are far away cannot be found by it; measured directly they would be.
    points, queries = normalize(torch.randn(1100, 40), dim=1), normalize(torch.randn(70, 40), dim=1)
    packed = operators.neighbor_pack(points, 256)
    hidden = rf.nearest_neighbors(queries, points, 1).indices.unique()
    packed[1][hidden] = 1e30
    rest = torch.ones(1100, dtype=torch.bool)
    rest[hidden] = False
    found = operators.kth_neighbor_distance(queries, points, *packed, 1, True)
    assert torch.equal(found, rf.kth_neighbor_distance(queries, points[rest], 1))


@pytest.mark.parametrize("misled", [0.3, *exhaustive(-3.0, 1.0, 3.0)])
def test_a_misleading_sample_never_changes_a_result(operators, misled):
    # Thresholds too low give more hits than there is room for, thresholds too high give too few: both end in distances.
    points, queries = torch.randn(8400, 3), torch.randn(8, 3)
    centre, bias, filter, sample, bounds = operators.neighbor_pack(points, 200)
    sample = misled * (queries - centre).repeat(25, 1)
    for k in (1, 40):
        found = operators.nearest_neighbors(queries, points, centre, bias, filter, sample, bounds, k, True)
        expected = rf.nearest_neighbors(queries, points, k)
        assert torch.equal(found[1], expected.indices)
        torch.testing.assert_close(found[0], expected.distances, rtol=1e-6, atol=0)


@pytest.mark.exhaustive  # test_neighbors.py has it of the CPU; 4,100 emulated queries take long
def test_queries_in_two_pieces_and_alone_give_the_same_bits(operators):
    points, queries = torch.randn(40, 3), torch.randn(4100, 3)
    packed = points, *operators.neighbor_pack(points, 0)
    together = operators.kth_neighbor_distance(queries, *packed, 5, True)
    torch.testing.assert_close(together, rf.kth_neighbor_distance(queries, points, 5), rtol=1e-6, atol=0)
    for rows in (slice(0, 1), slice(4090, 4100)):
        assert torch.equal(operators.kth_neighbor_distance(queries[rows], *packed, 5, True), together[rows])


def test_queries_that_are_not_finite_are_nan_away(operators):
    points, queries = torch.randn(50, 4), torch.randn(4, 4)
    queries[1, 2], queries[2, 0] = torch.nan, -torch.inf
    packed = points, *operators.neighbor_pack(points, 0)
    assert operators.kth_neighbor_distance(queries, *packed, 3, True).isnan().tolist() == [False, True, True, False]
    assert operators.kth_neighbor_distance(queries[:0], *packed, 3, True).shape == (0,)
    assert operators.nearest_neighbors(queries[:0], *packed, 3, True)[1].shape == (0, 3)
