"""Exact neighbours against float64 brute force, on the data where fast formulas fail; and NeighborIndex."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from targets import exhaustive
from torch import Tensor
from torch.nn.functional import normalize

import robustft
from robustft import NeighborIndex
from robustft import functional as rf
from robustft.ops import dispatch, libraries
from robustft.ops import neighbors as native

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(dispatch.LIBRARIES["cpu"] != "loaded", reason="installed without compiled code")


def brute_force(queries: Tensor, points: Tensor) -> Tensor:
    """(Q, N) squared distances in float64, by differences."""
    exact = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return exact.square()


def expansion(queries: Tensor, points: Tensor) -> Tensor:
    """(Q, N) squared distances as libraries compute them from a float32 product: |q|^2 + |x|^2 - 2 q.x."""
    products = queries.float() @ points.float().T
    return queries.float().square().sum(1)[:, None] + points.float().square().sum(1) - 2 * products


def relative_error(distances: Tensor, exact: Tensor) -> float:
    error = (distances.double() - exact).abs()
    return (error / torch.where(exact == 0, 1e-30, exact)).max().item()  # where it is 0 nothing else will do


def clustered(n: int, d: int, classes: int = 50, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Unit vectors sorted by class, and their classes' centres."""
    centres = torch.randn(classes, d)
    labels = torch.randint(0, classes, (n,)).sort().values
    return normalize(centres[labels] + spread * torch.randn(n, d), dim=1), centres


def random_unit():
    return normalize(torch.randn(67, 96), dim=1), normalize(torch.randn(9001, 96), dim=1)


def class_sorted():
    points, centres = clustered(9003, 64)
    return normalize(centres[::2] + 0.3 * torch.randn(25, 64), dim=1), points


def duplicated():
    points, _ = clustered(3000, 48)
    return points[:60] + 0.01 * torch.randn(60, 48), points.repeat_interleave(3, 0)


def near_duplicates():
    points, _ = clustered(9000, 128)
    return points[:50] + 1e-4 * torch.randn(50, 128) / 128**0.5, points


def offset():
    return 100 + torch.randn(40, 64), 100 + torch.randn(9000, 64)


def same():
    points, _ = clustered(9000, 64)
    return points[100:140], points


def odd():
    return torch.randn(19, 37), torch.randn(501, 37)


def one_point():
    return torch.randn(5, 7), torch.randn(1, 7)


def one_dimension():
    return torch.randn(33, 1), torch.randn(9000, 1)


def uneven_norms():
    scale = torch.logspace(-3, 3, 9000)[torch.randperm(9000), None]
    return 5 * torch.randn(33, 24), torch.randn(9000, 24) * scale


def tiny():
    return 1e-25 * torch.randn(33, 24), 1e-25 * torch.randn(900, 24)


CASES = [random_unit, class_sorted, duplicated, near_duplicates, offset, same, odd, one_point, one_dimension]
CASES += [uneven_norms]


def ranks(n: int) -> list[int]:
    return sorted({k for k in (1, 2, 17, 300, n // 2, n) if 1 <= k <= n})


@pytest.fixture(params=["native", "reference"])
def backend(request):
    if request.param == "native" and dispatch.LIBRARIES["cpu"] != "loaded":
        pytest.skip("installed without compiled code")
    with robustft.backend(request.param):
        yield request.param


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", CASES)
def test_kth_distance_has_the_precision_of_float32(case, backend):
    queries, points = case()
    exact = brute_force(queries, points).sort(1).values
    for k in ranks(len(points)):
        assert relative_error(rf.kth_neighbor_distance(queries, points, k), exact[:, k - 1]) <= 1e-6
        plain = rf.kth_neighbor_distance(queries, points, k, squared=False)
        assert relative_error(plain, exact[:, k - 1].sqrt()) <= 1e-6


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", CASES)
def test_nearest_are_those_of_float64(case, backend):
    queries, points = case()
    exact = brute_force(queries, points)
    for k in (k for k in ranks(len(points)) if k <= 300):
        distances, indices = rf.nearest_neighbors(queries, points, k)
        assert distances.shape == indices.shape == (len(queries), k) and indices.dtype == torch.int64
        assert relative_error(distances, exact.sort(1).values[:, :k]) <= 1e-6
        assert relative_error(distances, exact.gather(1, indices)) <= 1e-6
        assert (indices.sort(1).values.diff(dim=1) > 0).all()  # each once
        tied = distances.diff(dim=1) == 0
        assert (distances.diff(dim=1) >= 0).all() and (indices.diff(dim=1)[tied] > 0).all()


@pytest.mark.parametrize(("case", "off"), [(near_duplicates, 1e-2), (offset, 1e-5), (same, 1e-6)])
def test_the_norm_expansion_fails_where_these_pass(case, off):
    queries, points = case()
    exact = brute_force(queries, points).sort(1).values[:, 0]
    error = (expansion(queries, points).sort(1).values[:, 0].double() - exact).abs() / exact.clamp(min=1e-3)
    assert (error / off).max() > 1 or relative_error(expansion(queries, points).amin(1), exact) > 1


@pytest.mark.usefixtures("device")
def test_a_query_that_is_a_point_is_exactly_0_away(backend):
    queries, points = same()
    distances, indices = rf.nearest_neighbors(queries, points, 1)
    assert (distances == 0).all() and indices[:, 0].tolist() == list(range(100, 140))
    assert (rf.kth_neighbor_distance(queries, points, 1) == 0).all()


@pytest.mark.usefixtures("device")
def test_ties_come_in_the_order_of_indices(backend):
    points = torch.eye(5).repeat(2000, 1)
    distances, indices = rf.nearest_neighbors(torch.eye(5)[2:3], points, 2003)
    assert (distances[:, :2000] == 0).all() and (distances[:, 2000:] == 2).all()
    assert indices[0, :2000].tolist() == list(range(2, 10000, 5)) and indices[0, 2000:].tolist() == [0, 1, 3]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_widened_and_results_as_precise(dtype, backend):
    queries, points = (t.to(dtype) for t in class_sorted())
    exact = brute_force(queries, points).sort(1).values[:, 29]
    distances = rf.kth_neighbor_distance(queries, points, 30)
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(distances, exact) <= (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.usefixtures("device")
def test_magnitudes_beyond_the_squares_of_float32(backend):
    queries, points = tiny()
    exact = brute_force(queries, points).sqrt().sort(1).values[:, 4]
    assert relative_error(rf.kth_neighbor_distance(queries, points, 5, squared=False), exact) <= 1e-6
    large = rf.kth_neighbor_distance(1e30 * queries / 1e-25, 1e30 * points / 1e-25, 5, squared=False)
    torch.testing.assert_close(large / 1e30, (exact / 1e-25).float(), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("device")
def test_strides_do_not_matter(backend):
    queries, points = odd()
    expected = rf.kth_neighbor_distance(queries, points, 9)
    wide = torch.randn(501, 80)[:, 3:77:2].copy_(points)
    assert torch.equal(rf.kth_neighbor_distance(queries.T.contiguous().T, wide, 9), expected)
    assert torch.equal(rf.kth_neighbor_distance(queries[:1].expand(4, -1), points, 9), expected[:1].expand(4))


@pytest.mark.usefixtures("device")
def test_no_queries_no_results(backend):
    points = torch.randn(20, 3)
    assert rf.kth_neighbor_distance(torch.empty(0, 3), points, 4).shape == (0,)
    assert rf.nearest_neighbors(torch.empty(0, 3), points, 4).indices.shape == (0, 4)


@pytest.mark.usefixtures("device")
def test_inputs_that_require_a_gradient_are_detached(backend):
    points = torch.randn(20, 3, requires_grad=True)
    assert not rf.kth_neighbor_distance(points, points, 4).requires_grad
    assert not rf.nearest_neighbors(points, points, 4).distances.requires_grad


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused(bad, backend):
    for n in (30, 9000):
        for where in (0, n // 2, n - 1):
            clean, spoilt = torch.randn(n, 5), torch.randn(n, 5)
            spoilt[where, 3] = bad
            for search in (rf.kth_neighbor_distance, rf.nearest_neighbors):
                with pytest.raises(ValueError, match="points holds NaN or infinity"):
                    search(clean[:20], spoilt, 2)
            with pytest.raises(ValueError, match="queries holds NaN or infinity"):
                rf.kth_neighbor_distance(spoilt, clean[:100], 2)


def test_arguments_are_named_in_errors(backend):
    x = torch.randn(6, 4)
    for k in (0, -1, 7):
        with pytest.raises(ValueError, match=rf"k is {k}; expected an integer in \[1, 6\]"):
            rf.kth_neighbor_distance(x, x, k)
    for k in (1.0, True, "2"):
        with pytest.raises(TypeError, match="k is"):
            rf.nearest_neighbors(x, x, k)
    for queries, points, error, match in (
        (x, x[:0], ValueError, "points has shape .* at least one"),
        (x[0], x, ValueError, "queries has shape"),
        (x, x[0], ValueError, "points has shape"),
        (x[:, :3], x, ValueError, "queries has 3 dimensions; expected 4"),
        (x.long(), x, TypeError, "queries is torch.int64"),
        (x.tolist(), x, TypeError, "queries is list"),
    ):
        with pytest.raises(error, match=match):
            rf.kth_neighbor_distance(queries, points, 1)


def test_autocast_changes_nothing(backend):
    queries, points = odd()
    expected = rf.kth_neighbor_distance(queries, points, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rf.kth_neighbor_distance(queries, points, 9), expected)


# The compiled search: what it promises beyond the values.


@pytest.mark.usefixtures("device")
@compiled
@pytest.mark.parametrize("case", [class_sorted, near_duplicates, offset])
def test_one_query_at_a_time_gives_the_same_bits_as_all_together(case):
    queries, points = case()
    queries = queries.repeat(12, 1) + 1e-3 * torch.randn(12 * len(queries), queries.shape[1])
    index = NeighborIndex(points)
    together, indices = index.nearest(queries, 40)
    assert torch.equal(index.kth_distance(queries, 40), together[:, -1])
    for count in (1, 3, 20):
        distances, some = index.nearest(queries[:count], 40)
        assert torch.equal(distances, together[:count]) and torch.equal(some, indices[:count])


@pytest.mark.usefixtures("device")
@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [37, 64, 192])  # blocks take multiples of 64
def test_all_points_in_order_begin_with_the_nearest_few_bit_for_bit(d, dtype):
    points = torch.randn(301, d, dtype=dtype)
    points[200:250] = points[:50]  # ties
    queries = torch.randn(11, d, dtype=dtype)
    for squared in (True, False):
        distances, indices = rf.nearest_neighbors(queries, points, 301, squared=squared)
        before, after = indices[:, :-1], indices[:, 1:]
        steps = distances.diff(dim=1)
        assert ((steps > 0) | ((steps == 0) & (before < after))).all()
        for k in (7, 40, 150, 298):
            few, some = rf.nearest_neighbors(queries, points, k, squared=squared)
            assert torch.equal(few, distances[:, :k]) and torch.equal(some, indices[:, :k])
        for count in (1, 5, 6):  # in blocks of four, the last of them partial
            few, some = rf.nearest_neighbors(queries[:count], points, 301, squared=squared)
            assert torch.equal(few, distances[:count]) and torch.equal(some, indices[:count])


def scaled(factor: float):
    """Rows whose squares leave float32's range, above or below, or which are subnormal themselves."""
    return lambda n, d: (factor * torch.rand(26, d), factor * torch.rand(n, d))


def identical(n: int, d: int) -> tuple[Tensor, Tensor]:
    points = torch.randn(n, d)[torch.arange(n) % 7]
    return torch.cat((points[:13], torch.randn(13, d))), points


def ever_nearer(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Each query is nearer to its point, down to the last bits."""
    points = torch.randn(n, d)
    return points[:26] + torch.logspace(-1, -9, 26)[:, None] * torch.randn(26, d), points


def apart(distance: float):
    """Two groups that no centre brings near the origin."""

    def groups(n: int, d: int) -> tuple[Tensor, Tensor]:
        queries, points = torch.randn(26, d), torch.randn(n, d)
        queries[::2] += distance
        points[::2] += distance
        return queries, points

    return groups


def whole_numbers(n: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-3, 4, (26, d)).float(), torch.randint(-3, 4, (n, d)).float()


def of_all_sizes(n: int, d: int) -> tuple[Tensor, Tensor]:
    scale = torch.logspace(-22, 18, n)[torch.randperm(n), None]
    return torch.randn(26, d) * scale[:26], torch.randn(n, d) * scale


def not_finite(n: int, d: int) -> tuple[Tensor, Tensor]:
    queries = torch.randn(26, d)
    queries[3, 0], queries[7, -1], queries[8, 0] = torch.nan, torch.inf, -torch.inf
    return queries, torch.randn(n, d)


HARD = {
    "plain": scaled(1),
    "huge": scaled(3e38),
    "tiny": scaled(3e-20),
    "subnormal": scaled(1e-43),
    **{f"{distance:g} apart": apart(distance) for distance in (1e2, 1e3, 1e4, 1e5, 1e6)},
    **{case.__name__: case for case in (identical, ever_nearer, whole_numbers, of_all_sizes, not_finite)},
}


@compiled
@pytest.mark.parametrize("d", [1, 37, 512, *exhaustive(2, 64, 1024)])
@pytest.mark.parametrize("case", HARD)
def test_distances_from_products_have_the_bits_of_differences(case, d):
    queries, points = HARD[case](301, d)
    packed = native.pack(points)
    for squared in (True, False):
        for k in (301, 290, 51, 50):  # sixths of the points and fewer are searched by the filter
            together = torch.ops.robustft.nearest_neighbors(queries, *packed, k, squared)
            # One query alone is measured by differences.
            alone = [torch.ops.robustft.nearest_neighbors(q, *packed, k, squared) for q in queries.split(1)]
            distances, indices = map(torch.cat, zip(*alone, strict=True))
            assert torch.equal(together[1], indices)
            assert torch.equal(together[0].view(torch.int32), distances.view(torch.int32))


def with_sample(packed: native.PackedPoints, rows: Tensor) -> native.PackedPoints:
    """The same points, their sample replaced: what the search guesses its thresholds from."""
    return packed._replace(sample=rows[torch.arange(len(packed.sample)) % len(rows)].contiguous())


@pytest.mark.usefixtures("device")
@compiled
@pytest.mark.parametrize("misled", ["all far too near", "all far too far", "a few rows only"])
def test_a_misleading_sample_costs_time_and_never_the_result(misled):
    queries, points = class_sorted()
    queries = queries.repeat(3, 1)  # enough to make a guess worth while
    packed = native.pack(points)
    match misled:
        case "all far too near":
            packed = with_sample(packed, 3 * (queries - packed.centre))
        case "all far too far":
            packed = with_sample(packed, -3 * (queries - packed.centre))
        case _:
            packed = packed._replace(sample=packed.sample[:40].contiguous())
    for k in (1, 30):
        expected = rf.kth_neighbor_distance(queries, points, k)
        assert torch.equal(torch.ops.robustft.kth_neighbor_distance(queries, *packed, k, True), expected)
        nearest = torch.ops.robustft.nearest_neighbors(queries, *packed, k, True)[1]
        assert torch.equal(nearest, rf.nearest_neighbors(queries, points, k).indices)


@pytest.mark.usefixtures("device")
@compiled
def test_thresholds_just_too_high_are_noticed():
    # In one dimension errors of products are as large as their bound. Scores q x - x^2 / 2 end at q^2 / 2, near 0.5
    # here; thresholds a little below that cut off some of the k best.
    points, queries = torch.randn(9000, 1), 1 + 0.01 * torch.randn(64, 1)
    packed = native.pack(points)
    expected = brute_force(queries, points).sort(1).values[:, 29]
    for highest in torch.linspace(0.47, 0.53, 61):
        misled = packed._replace(sample=torch.full_like(packed.sample, highest))
        distances = torch.ops.robustft.kth_neighbor_distance(queries, *misled, 30, True)
        assert relative_error(distances, expected) <= 1e-6


@pytest.mark.usefixtures("device")
@compiled
def test_an_order_that_gets_ever_nearer_is_searched_exactly():
    points = torch.linspace(4, 1, 30011)[:, None] * normalize(torch.randn(30011, 16), dim=1)
    queries = 0.01 * torch.randn(70, 16)
    exact = brute_force(queries, points).sort(1).values
    for packed in (native.pack(points), native.PackedPoints(points, *torch.ops.robustft.neighbor_pack(points, 0))):
        for k in (1, 300):
            distances = torch.ops.robustft.kth_neighbor_distance(queries, *packed, k, True)
            assert relative_error(distances, exact[:, k - 1]) <= 1e-6


@pytest.mark.usefixtures("device")
@compiled
def test_more_equal_points_than_hits_fit_are_searched_exactly():
    points = torch.cat((normalize(torch.randn(400, 8), dim=1), torch.full((70000, 8), 8**-0.5)))
    queries = points[:300] + 0.1 * torch.randn(300, 8)
    expected = brute_force(queries, points).sort(1).values
    for k in (1, 500):
        assert relative_error(rf.kth_neighbor_distance(queries, points, k), expected[:, k - 1]) <= 1e-6
    with robustft.backend("reference"):
        indices = rf.nearest_neighbors(queries[:20], points, 500).indices
    assert torch.equal(rf.nearest_neighbors(queries[:20], points, 500).indices, indices)


@compiled
def test_products_of_rounded_factors_are_allowed_for():
    queries, points = class_sorted()
    expected = rf.kth_neighbor_distance(queries, points, 30)
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(rf.kth_neighbor_distance(queries, points, 30), expected)
    finally:
        torch.set_float32_matmul_precision(previous)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, *exhaustive(torch.float64)])
def test_neighbor_operators_pass_opcheck(dtype, device):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("on a GPU float64 points are searched by the reference")
    points, queries = torch.randn(40, 6, dtype=dtype), torch.randn(9, 6, dtype=dtype)
    operators = torch.ops.robustft
    torch.library.opcheck(operators.neighbor_pack.default, (points, 10))
    packed = operators.neighbor_pack(points, 10)
    torch.library.opcheck(operators.kth_neighbor_distance.default, (queries, points, *packed, 3, True))
    torch.library.opcheck(operators.nearest_neighbors.default, (queries, points, *packed, 3, False))


@compiled
def test_searches_compile_without_a_graph_break():
    def search(queries, points):
        return rf.kth_neighbor_distance(queries, points, 3), *rf.nearest_neighbors(queries, points, 3)

    queries, points = torch.randn(9, 6), torch.randn(40, 6)
    compiled_search = torch.compile(search, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled_search(queries, points), search(queries, points), strict=True):
        assert torch.equal(a, b)


@compiled
def test_operators_refuse_what_was_not_packed_from_the_points():
    points = torch.randn(40, 6)
    packed = torch.ops.robustft.neighbor_pack(points[:30], 0)
    with pytest.raises(RuntimeError, match="not what neighbor_pack made"):
        torch.ops.robustft.kth_neighbor_distance(points, points, *packed, 3, True)


# NeighborIndex


@pytest.mark.usefixtures("device")
def test_index_searches_as_the_functions_do(backend):
    queries, points = class_sorted()
    index = NeighborIndex(points)
    assert len(index) == len(points) and torch.equal(index.points, points)
    for squared in (True, False):
        expected = rf.kth_neighbor_distance(queries, points, 20, squared=squared)
        assert torch.equal(index.kth_distance(queries, 20, squared=squared), expected)
        expected = rf.nearest_neighbors(queries, points, 20, squared=squared)
        for a, b in zip(index.nearest(queries, 20, squared=squared), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("device")
def test_added_points_are_found(backend):
    queries, points = class_sorted()
    index = NeighborIndex(points[:1000])
    index.kth_distance(queries, 20)
    assert index.add(points[1000:8000].half().float()).add(points[8000:]) is index and len(index) == len(points)
    whole = torch.cat((points[:1000], points[1000:8000].half().float(), points[8000:]))
    expected = rf.nearest_neighbors(queries, whole, 20)
    assert torch.equal(index.nearest(queries, 20).indices, expected.indices)
    index.add(points[:0])
    assert torch.equal(index.kth_distance(queries, 20), expected.distances[:, -1])


def test_index_refuses_what_does_not_fit():
    index = NeighborIndex(torch.randn(10, 4))
    with pytest.raises(ValueError, match="points is .*; expected"):
        index.add(torch.randn(3, 5))
    with pytest.raises(ValueError, match="points holds NaN"):
        index.add(torch.full((1, 4), torch.nan))
    with pytest.raises(ValueError, match="points holds NaN"):
        NeighborIndex(torch.full((1, 4), torch.inf))
    with pytest.raises(TypeError, match="float64"):
        index.add(torch.randn(3, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="float64"):
        index.kth_distance(torch.randn(3, 4, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="k is 11"):
        index.kth_distance(torch.randn(3, 4), 11)
    assert len(index) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_index_is_the_same(tmp_path, dtype):
    queries, points = (t.to(dtype) for t in class_sorted())
    index = NeighborIndex(points)
    index.save(tmp_path / "index.safetensors")
    loaded = NeighborIndex.load(tmp_path / "index.safetensors")
    assert torch.equal(loaded.points, points) and loaded.points.dtype == dtype
    assert torch.equal(loaded.kth_distance(queries, 7), index.kth_distance(queries, 7))
    assert [file.name for file in tmp_path.iterdir()] == ["index.safetensors"]


def test_loading_another_file_says_what_it_is_not(tmp_path):
    save_file({"weights": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: .*no NeighborIndex saved by robustft"):
        NeighborIndex.load(tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("no tensors here")
    with pytest.raises(ValueError, match="truncated, or no NeighborIndex"):
        NeighborIndex.load(tmp_path / "notes.txt")
    NeighborIndex(torch.randn(50, 4)).save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated, or no NeighborIndex"):
        NeighborIndex.load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        NeighborIndex.load(tmp_path / "absent")


@compiled
def test_nbytes_is_points_and_little_more():
    points = torch.randn(20000, 64)
    packed_bytes = 2 * points.numel() if robustft.build_info()["active_isa"] in ("amx", "avx512_bf16", "avx2") else 0
    expected = points.nbytes + 4 * 20000 + packed_bytes + 2048 * 64 * 4
    assert expected <= NeighborIndex(points).nbytes <= expected + 64 * 2 * 16 + 1000


PEAK = """
import json, torch
from robustft import NeighborIndex
points, queries = torch.randn(60000, 32), torch.randn(1200, 32)
index = NeighborIndex(points)
index.kth_distance(queries[:300], 100)  # what is allocated once: threads, workspaces of the products
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = status("VmRSS")
index.kth_distance(queries, 100)
print(json.dumps(status("VmHWM") - before))
"""


@compiled
def test_no_matrix_of_queries_by_points_is_ever_held(python):
    peak = json.loads(python.run("-c", PEAK, check=True).stdout)
    assert peak < 40e6  # all distances would be 288 MB, one block's 246 MB


VARIANT = """
import sys, torch, robustft
from robustft import functional as rf
assert robustft.build_info()["active_isa"] == sys.argv[1]
def computed():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for n, d, m in ((9001, 37, 400), (700, 64, 33), (20000, 100, 1)):
            points, queries = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
            points[::3] += 4
            for offset in (0, 100):
                found = rf.nearest_neighbors(queries + offset, points + offset, 50)
                distances = rf.kth_neighbor_distance(queries + offset, points + offset, 50)
                assert torch.equal(distances, found.distances[:, -1])
                yield from found
                many, one = (rf.nearest_neighbors(queries[:m] + offset, points + offset, n) for m in (13, 1))
                assert all(torch.equal(a[:1], b) for a, b in zip(many, one, strict=True))
for threads in (1, 2):
    torch.set_num_threads(threads)
    torch.save(list(computed()), f"{sys.argv[2]}-{threads}")
"""


@compiled
def test_every_instruction_set_and_thread_count_finds_the_same(tmp_path, python):
    names = libraries.ISA_NAMES[: libraries.ISA_NAMES.index(robustft.build_info()["active_isa"]) + 1]
    results = {}
    for isa in names:
        if isa == "avx512" and not robustft.build_info()["detected_isa"].startswith(("avx512", "amx")):
            continue  # bfloat16's instructions are emulated, beside narrower vectors
        environment = {**os.environ, "ROBUSTFT_CPU_ISA": isa}
        python.run("-c", VARIANT, isa, tmp_path / isa, environment=environment, check=True)
        results |= {(isa, n): torch.load(tmp_path / f"{isa}-{n}", weights_only=True) for n in (1, 2)}
    for isa in {isa for isa, _ in results}:
        for a, b in zip(results[isa, 1], results[isa, 2], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(results[isa, 1], results["portable", 1], strict=True):
            if a.dtype == torch.int64:
                assert (a == b).double().mean() > 0.999  # a tie may be broken by the last bit of a sum
            else:
                torch.testing.assert_close(a, b, rtol=1e-12 if a.dtype == torch.float64 else 2e-7, atol=0)
