"""A batch spread over two processes gives the loss and the gradients of one process holding all of it."""

from __future__ import annotations

import planted
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import robustft
from robustft import functional as rf

N, D, WORLD = 14, 8, 2


def inputs(rank: int | None = None):
    """All samples, or one rank's half."""
    mine = slice(None) if rank is None else slice(rank * N // WORLD, (rank + 1) * N // WORLD)
    x, t = (f[mine].clone().requires_grad_() for f in planted.pairs(N, D))
    teacher = [f[mine] for f in planted.pairs(N, D + 1, seed=1)]
    s = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(0.5, 2, N, dtype=torch.float64)[mine]
    return x, t, s, teacher, weight, (torch.arange(N) // 3)[mine]


def objective(x, t, s, teacher, weight, labels, reduction, group=None):
    options = {"weight": weight, "reduction": reduction, "group": group}
    plain = rf.contrastive_loss(x, t, s, label_smoothing=0.1, **options)
    terms = rf.contrastive_distillation_loss(x, t, s, *teacher, 9.0, labels=labels, **options)
    return plain + 2 * terms.contrastive + 3 * terms.distillation


def worker(rank: int, port: int, backend: str, reduction: str, queue) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    with robustft.backend(backend):
        x, t, s, *rest = inputs(rank)
        value = objective(x, t, s, *rest, reduction, dist.group.WORLD)
        grads = torch.autograd.grad(value.sum(), (x, t, s))
    queue.put((rank, *(v.detach().numpy() for v in (value, *grads))))
    dist.destroy_process_group()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("backend", "reduction"), [("auto", "mean"), ("auto", "none"), ("reference", "sum")])
def test_two_processes_equal_one(backend, reduction):
    context = mp.get_context("spawn")
    queue = context.Queue()
    mp.start_processes(worker, (free_port(), backend, reduction, queue), WORLD, start_method="spawn")
    ranks = sorted((queue.get() for _ in range(WORLD)), key=lambda r: r[0])
    values, dx, dt, ds = ([torch.from_numpy(r[k]) for r in ranks] for k in range(1, 5))

    x, t, s, *rest = inputs()
    value = objective(x, t, s, *rest, reduction)
    expected = torch.autograd.grad(value.sum(), (x, t, s))
    if reduction == "none":
        torch.testing.assert_close(torch.cat(values), value.detach())
    else:
        for local in values:
            torch.testing.assert_close(local, value.detach())
    torch.testing.assert_close(torch.cat(dx), expected[0])
    torch.testing.assert_close(torch.cat(dt), expected[1])
    torch.testing.assert_close(sum(ds), expected[2])


def uneven_worker(rank: int, port: int, queue) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    x, t = (f.float() for f in planted.pairs(6 + 2 * rank, 4))
    try:
        rf.contrastive_loss(x, t, 10.0, group=dist.group.WORLD)
    except ValueError as error:
        queue.put(str(error))
    dist.destroy_process_group()


def test_uneven_batches_are_refused_on_every_rank():
    queue = mp.get_context("spawn").Queue()
    mp.start_processes(uneven_worker, (free_port(), queue), WORLD, start_method="spawn")
    for _ in range(WORLD):
        assert "rank 0: 6 samples of 4 dimensions" in queue.get(timeout=30)
