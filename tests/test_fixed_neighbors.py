"""The fixed-point filter of neighbour searches (csrc/cpu/neighbors/fixed.h) finds to the bit what float32 products and
float64 brute force find, on the data that are hardest for its bound."""

from __future__ import annotations

import pytest
import torch
from targets import exhaustive
from torch import Tensor
from torch.nn.functional import normalize

import robustft
from robustft import functional as rf
from robustft.ops import dispatch
from robustft.ops import neighbors as native

pytestmark = pytest.mark.skipif(
    dispatch.LIBRARIES["cpu"] != "loaded" or robustft.build_info()["active_isa"] != "avx2",
    reason="fixed point is the filter of processors with AVX2 alone",
)


def plain(n: int, d: int) -> tuple[Tensor, Tensor]:
    points = normalize(torch.randn(n, d), dim=1)
    return normalize(torch.randn(40, d), dim=1), points


def near_duplicates(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Many points nearer to one another than the bound is wide."""
    queries, points = plain(n, d)
    points[::2] = points[0] + 1e-5 * torch.randn(len(points[::2]), d)
    return torch.cat((queries[:20], points[:20] + 1e-5 * torch.randn(20, d))), points


def identical(n: int, d: int) -> tuple[Tensor, Tensor]:
    queries, points = plain(n, d)
    points = points[torch.arange(n) % 50]
    return torch.cat((queries[:20], points[:20])), points


def uneven_norms(n: int, d: int) -> tuple[Tensor, Tensor]:
    queries, points = plain(n, d)
    return queries, points * torch.logspace(-4, 4, n)[torch.randperm(n), None]


def outlier(n: int, d: int) -> tuple[Tensor, Tensor]:
    """One row so long that the others are lost in its rounding: almost all are left to be measured."""
    queries, points = plain(n, d)
    points[n // 2] *= 1e5
    return queries, points


def offset(n: int, d: int) -> tuple[Tensor, Tensor]:
    queries, points = plain(n, d)
    return queries + 30, points + 30


def opposite(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Products as large as fixed point has them, of either sign."""
    signs = (1 - 2 * (torch.arange(n) % 2))[:, None]
    points = signs * (torch.ones(n, d) + 1e-3 * torch.rand(n, d))
    return torch.cat((points[:20], -1e4 * points[:20])), points


def subnormal(n: int, d: int) -> tuple[Tensor, Tensor]:
    queries, points = plain(n, d)
    return torch.cat((queries[:20], 1e-41 * queries[20:])), points


CASES = [plain, near_duplicates, identical, uneven_norms, outlier, offset, opposite, subnormal]
SIZES = [(9001, 37), (700, 512), *exhaustive((9001, 128), (900, 768), (333, 2049))]


def without_filter(packed: native.PackedPoints) -> native.PackedPoints:
    """The same points, searched by float32 products."""
    return packed._replace(filter=packed.filter[:0])


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("case", CASES)
def test_fixed_point_finds_the_bits_of_float32_products_and_the_values_of_float64(case, n, d):
    queries, points = case(n, d)
    packed = native.pack(points)
    assert packed.filter.numel() == (n + 15) // 16 * 16 * ((d + 1) // 2 * 2)
    differences = "donot_use_mm_for_euclid_dist"
    exact = torch.cdist(queries.double(), points.double(), compute_mode=differences).square().sort(1).values
    for k in (1, 300, n):
        kth = native.kth_distance(queries, points, packed, k, True)
        assert torch.equal(kth, native.kth_distance(queries, points, without_filter(packed), k, True))
        allowed = 1e-6 * exact[:, k - 1] + torch.where(exact[:, k - 1] < 1e-37, 1e-44, 0)  # float32's subnormal numbers
        assert ((kth.double() - exact[:, k - 1]).abs() <= allowed).all()
        if k < n:
            found = native.nearest(queries, points, packed, k, True)
            expected = native.nearest(queries, points, without_filter(packed), k, True)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
            assert torch.equal(found[0][:, -1], kth)


def test_rounding_as_bad_as_the_bound_allows_loses_no_neighbour():
    # The scale of these points is 1. Each element of the nearest one is rounded down by all but half, of all others up,
    # in the direction of the query: they score higher than it by as much as the bound says, and no more.
    d = 64
    rows = torch.tensor([1000.51] * 200 + [1000.49] + [1000.51] * 200 + [(32766 - d**0.5 / 2) / d**0.5])
    points = torch.cat((rows, -rows))[:, None].expand(-1, d).contiguous()  # around 0
    queries = torch.full((3, d), 990.0)
    packed = native.pack(points)
    distances, indices = native.nearest(queries, points, packed, 1, True)
    assert indices.flatten().tolist() == [200] * 3
    assert torch.equal(native.kth_distance(queries, points, packed, 1, True), distances[:, 0])
    bounds = packed.bounds.clone()
    bounds[1] = 0  # of the points' rounding
    assert (native.nearest(queries, points, packed._replace(bounds=bounds), 1, True)[1] != 200).all()


def test_neither_threads_nor_the_queries_that_come_together_change_a_bit():
    queries, points = near_duplicates(9001, 64)
    packed = native.pack(points)
    expected = native.nearest(queries, points, packed, 40, True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for size in (5, 17) if count == 1 else (1, 2, 40):
                parts = [native.nearest(part, points, packed, 40, True) for part in queries.split(size)]
                assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), expected))
    finally:
        torch.set_num_threads(threads)


def test_a_filter_that_lies_is_not_noticed_and_so_these_tests_read_it():
    queries, points = plain(9001, 64)
    packed = native.pack(points)
    lying = packed._replace(filter=packed.filter.flip(0))
    expected = native.kth_distance(queries, points, packed, 3, True)
    assert not torch.equal(native.kth_distance(queries, points, lying, 3, True), expected)


def test_a_query_that_is_not_finite_spoils_no_other():
    queries, points = plain(9001, 64)
    packed = native.pack(points)
    expected = native.nearest(queries, points, packed, 5, True)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = queries.clone()
        spoilt[3, 7] = bad
        distances, indices = torch.ops.robustft.nearest_neighbors(spoilt, *packed, 5, True)
        kept = torch.arange(40) != 3
        assert distances[3].isnan().all()
        assert torch.equal(distances[kept], expected[0][kept]) and torch.equal(indices[kept], expected[1][kept])


def test_what_gains_nothing_is_left_without_a_filter():
    queries, points = plain(9001, 64)
    assert native.pack(points[:, :31]).filter.numel() == 0
    assert native.pack(points.double()).filter.numel() == 0
    assert native.pack(points, filter=False).filter.numel() == 0
    assert native.pack(1e-20 * points).filter.numel() == 0 and native.pack(points[:1]).filter.numel() == 0
    index = robustft.NeighborIndex(points)
    assert torch.equal(index.kth_distance(queries, 9), rf.kth_neighbor_distance(queries, points, 9))


def test_a_filter_of_other_points_is_refused():
    queries, points = plain(900, 64)
    packed = native.pack(points)
    for other in (packed.filter[1:], packed.filter[:-1], packed.filter.repeat(2)):
        with pytest.raises(RuntimeError, match="the filter is not what neighbor_pack makes"):
            torch.ops.robustft.kth_neighbor_distance(queries, *packed._replace(filter=other), 3, True)
