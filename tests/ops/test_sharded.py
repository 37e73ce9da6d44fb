"""A batch spread over two processes gives the loss and the gradients of one process holding all of it."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import planted
import pytest
import torch
import torch.distributed as dist

import robustft
from robustft import functional as rf
from robustft import losses

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
    bias = s / -5
    single = rf.sigmoid_contrastive_loss(x, t, s, bias, labels=labels, **options)
    again = rf.sigmoid_contrastive_loss(x, t, s, bias, group=group, reduction=reduction, memory=0)
    pairs = rf.sigmoid_contrastive_distillation_loss(x, t, s, bias, *teacher, 9.0, -2.0, **options)
    sigmoid = single + 5 * again + 6 * pairs.contrastive + 7 * pairs.distillation
    return plain + 2 * terms.contrastive + 3 * terms.distillation + sigmoid


def part(rank: int, backend: str, reduction: str) -> list[torch.Tensor]:
    """One rank's value and gradients."""
    with robustft.backend(backend):
        x, t, s, *rest = inputs(rank)
        value = objective(x, t, s, *rest, reduction, dist.group.WORLD)
        return [value.detach(), *torch.autograd.grad(value.sum(), (x, t, s))]


def averaged(rank: int) -> list[list[torch.Tensor]]:
    """One rank's value and gradients of open_clip's loss module, and of ours in its place."""
    x, t, s, *_ = inputs(rank)
    b = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    found = []
    for siglip in (open_clips_loss().SigLipLoss, losses.SigmoidContrastiveLoss):
        value = siglip(rank=rank, world_size=WORLD)(x, t, s, b)
        found.append([value.detach(), *torch.autograd.grad(value, (x, t, s, b))])
    return found


def open_clips_loss():
    """Its file alone: the package takes seconds to import."""
    path = Path(find_spec("open_clip").origin).with_name("loss.py")
    spec = spec_from_file_location("open_clips_loss", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def uneven(rank: int) -> str:
    x, t = (f.float() for f in planted.pairs(6 + 2 * rank, 4))
    with pytest.raises(ValueError) as error:
        rf.contrastive_loss(x, t, 10.0, group=dist.group.WORLD)
    return str(error.value)


@pytest.fixture
def by_rank(python, tmp_path):
    """What a function of this file returns on each rank of a process group."""

    def results(function, *arguments: str) -> list:
        code = f"import sys; sys.path[:0] = {sys.path!r}; import test_sharded; test_sharded.run(*sys.argv[1:])"
        paths = [tmp_path / str(rank) for rank in range(WORLD)]
        ranks = [python.start("-c", code, str(path), function.__name__, *arguments) for path in paths]
        for done in [rank.wait() for rank in ranks]:
            assert done.returncode == 0, done.stderr
        return [torch.load(path, weights_only=True) for path in paths]

    return results


def run(path: str, function: str, *arguments: str) -> None:
    """A rank: its number is the file's name, and the ranks meet at a file beside it."""
    rank = int(Path(path).name)
    meeting = Path(path).with_name("meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    torch.save(globals()[function](rank, *arguments), path)
    dist.destroy_process_group()


@pytest.mark.parametrize(("backend", "reduction"), [("auto", "mean"), ("auto", "none"), ("reference", "sum")])
def test_two_processes_equal_one(backend, reduction, by_rank):
    values, dx, dt, ds = zip(*by_rank(part, backend, reduction), strict=True)

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


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("open_clip") is None, reason="open_clip is not installed")
def test_two_processes_with_the_sigmoid_module_have_the_gradients_of_open_clips(by_rank):
    theirs, ours = zip(*by_rank(averaged), strict=True)
    mean = sum(rank[0] for rank in theirs) / WORLD
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[0], mean)
        torch.testing.assert_close(mine[1:3], other[1:3])
    for k in (3, 4):  # what an average over ranks makes of the numbers' gradients
        torch.testing.assert_close(sum(rank[k] for rank in ours), sum(rank[k] for rank in theirs))


def test_uneven_batches_are_refused_on_every_rank(by_rank):
    for message in by_rank(uneven):
        assert "rank 0: (6, 4) torch.float32 on cpu; rank 1: (8, 4)" in message
