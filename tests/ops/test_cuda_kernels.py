"""On a GPU: what the shared suites do not ask of the CUDA operators. Sizes of real use, graphs, streams, repetition."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import robustft
from robustft import functional as rf
from robustft.ops import dispatch

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or dispatch.LIBRARIES["cuda"] != "loaded",
        reason="no GPU, or nothing compiled for it",
    ),
    pytest.mark.parametrize("device", ["cuda"], indirect=True),
]


def exact_kth(queries: torch.Tensor, points: torch.Tensor, k: int) -> torch.Tensor:
    with robustft.backend("reference"):
        return rf.kth_neighbor_distance(queries, points, k)


@pytest.mark.parametrize("k", [1, 300, 5000])
@pytest.mark.parametrize("d", [37, 512])
def test_many_queries_of_many_points_are_searched_exactly(d, k, device):
    points, queries = normalize(torch.randn(200_003, d), dim=1), normalize(torch.randn(9001, d), dim=1)
    found = rf.kth_neighbor_distance(queries, points, k)
    some = torch.randperm(9001)[:100]
    torch.testing.assert_close(found[some], exact_kth(queries[some], points, k), rtol=1e-6, atol=0)
    assert torch.equal(rf.kth_neighbor_distance(queries, points, k), found)
    assert torch.equal(rf.kth_neighbor_distance(queries[some], points, k), found[some])
    if k <= 300:
        distances, indices = rf.nearest_neighbors(queries, points, k)
        assert torch.equal(distances[:, -1], found)
        torch.testing.assert_close((queries - points[indices[:, 0]]).square().sum(1), distances[:, 0])


def test_scores_of_tensor_cores_lie_within_the_bound(device):
    # Offsets and norms that differ by orders make sums that cancel: what the bound on rounding is for.
    points = torch.randn(20_000, 768) * torch.logspace(-2, 2, 20_000)[torch.randperm(20_000), None]
    queries = points[:500] + 0.1 * torch.randn(500, 768)
    for k in (1, 50):
        torch.testing.assert_close(
            rf.kth_neighbor_distance(queries, points, k), exact_kth(queries, points, k), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("n", [512, 100_003])
def test_risks_are_captured_in_a_graph(n, device):
    losses, groups = torch.randn(n, requires_grad=True), torch.randint(0, 50, (n,))

    def objective():
        risk = rf.group_risk(losses, groups, 50)
        value = rf.cvar(losses, 0.3) + risk.worst + risk.mean.square().sum()
        # Detached: what keeps its graph keeps what the first call made on the stream that is not captured.
        return value.detach(), *torch.autograd.grad(value, losses)

    expected = objective()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(objective(), expected, strict=True))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = objective()
    with torch.no_grad():
        losses.mul_(-2)
    graph.replay()
    for a, b in zip(captured, objective(), strict=True):
        assert torch.equal(a, b)


def test_searches_wait_for_nothing(device):
    points, queries = torch.randn(20_000, 64), torch.randn(1000, 64)
    packed = torch.ops.robustft.neighbor_pack(points, 2048)
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.robustft.kth_neighbor_distance(queries, points, *packed, 9, True)
        torch.ops.robustft.nearest_neighbors(queries, points, *packed, 9, True)
    finally:
        torch.cuda.set_sync_debug_mode(previous)


def test_losses_outside_all_groups_are_counted_nowhere(device):
    losses = torch.tensor([1.0, 5.0, 2.0, 9.0], requires_grad=True)
    risk = rf.group_risk(losses, torch.tensor([0, -1, 0, 2]), 2)
    assert risk.mean.tolist() == [1.5, 0] and risk.worst == 1.5 and risk.counts.tolist() == [2, 0]
    (risk.mean.sum() + risk.worst).backward()
    assert losses.grad.tolist() == [1, 0, 1, 0]
