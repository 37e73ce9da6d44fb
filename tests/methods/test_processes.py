"""A batch of which several processes have some rows has the loss and the gradients that it has on one."""

from __future__ import annotations

import re

import every_loss
import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from every_loss import OPTIONS, gradients, make
from targets import exhaustive
from tiny_clip import letters
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

by_process = processes.by_process  # a fixture of this file's tests

EXACT = {"rtol": 1e-10, "atol": 1e-12}
CUTS = {2: (0, 8, 13), 4: (0, 4, 7, 10, 13)}  # uneven ones


def averaged(found):
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return found


def spread_step(rank, parts, names):
    """By name of the method the loss, terms and mean gradients over all processes."""
    found = {}
    batch = rows(rank)
    for name in names.split(";"):
        method = make(name)
        out = method(batch, parts=int(parts), group=dist.group.WORLD)
        found[name] = {"loss": out.loss.detach(), **out.terms}, averaged(gradients(method, out.loss))
    return found


def rows(rank):
    """Those of a process."""
    mine = slice(*CUTS[dist.get_world_size()][rank : rank + 2])
    return {name: value[mine] for name, value in every_loss.data().items()}


SOME = ["FLYP", "CaRot", "CaRot, SigLIP", "FineTune, of a batch", "WorstCaseFineTune"]
ALL = [name for name in OPTIONS if name != "MaPLe, of a batch"]
CASES = [(2, 1, SOME), *exhaustive((2, 1, list(OPTIONS)), (2, 3, ALL), (4, 1, list(OPTIONS)), (4, 2, ALL))]


@pytest.mark.parametrize(("world", "parts", "names"), CASES)
def test_processes_equal_one(world, parts, names, by_process):
    found = by_process(world, spread_step, parts, ";".join(names))
    assert all(list(of_process) == names for of_process in found)
    for name in names:
        method = make(name)
        whole = method(every_loss.data())
        expected = {"loss": whole.loss.detach(), **whole.terms}, gradients(method, whole.loss)
        for of_process in found:
            torch.testing.assert_close(of_process[name], expected, **EXACT)


def captioned(batch, form):
    texts = [f"a {'abc'[label]}" for label in batch["label"].tolist()]
    return batch["image"], texts if form == "words" else letters(texts)


def own_loops(rank):
    """A loop as people write it, with captions of its own, and what is said where the group is left out."""
    found = {}
    for form in ("words", "tokens"):
        method = make("FLYP")
        method.misalignment = 0.0
        wrapped = DistributedDataParallel(method)
        found[form] = gradients(method, wrapped(captioned(rows(rank), form), group=dist.group.WORLD).loss)
    alone = make("CaRot")
    with pytest.raises(RuntimeError, match=r"method\(batch, group=torch.distributed.group.WORLD\)") as error:
        alone.step(rows(rank))
    mine = rows(rank)
    mine["label"][:] = 7 if rank else 0
    with pytest.raises(ValueError) as bad:
        alone(mine, group=dist.group.WORLD)
    found["said"] = [str(error.value), str(bad.value)]
    return found


def test_a_loop_of_ones_own_has_the_gradients_of_the_whole_batch(by_process):
    for found in by_process(2, own_loops):
        for form in ("words", "tokens"):
            method = make("FLYP")
            method.misalignment = 0.0
            expected = gradients(method, method(captioned(every_loss.data(), form)).loss)
            torch.testing.assert_close(found[form], expected, **EXACT)
        alone, bad = found["said"]
        assert alone.startswith("CaRot.step sees the rows of this process alone, and torch.distributed runs 2")
        assert re.search("labels must lie in .*7", bad)


def sharded(model):
    scale = model.logit_scale
    model.logit_scale = torch.nn.Parameter(scale.detach().reshape(1), requires_grad=scale.requires_grad)
    for tower in (model.visual.transformer, model.transformer):
        for block in tower.resblocks:
            fully_shard(block)
    fully_shard(model)
    for name in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, name)


def of_fsdp(rank, name, folder):
    """All parameters after three steps, between the second and the third of which the run begins again."""

    def begun():
        method = make(name)
        sharded(method.model)
        if name == "CaRot":
            sharded(method.teacher)
        return method, torch.optim.AdamW(method.parameters(), lr=1e-2)

    def step(method, optimizer):
        optimizer.zero_grad()
        out = method(rows(rank), group=dist.group.WORLD)
        out.loss.backward()
        optimizer.step()
        method.after_step()

    method, optimizer = begun()
    step(method, optimizer)
    step(method, optimizer)
    weights, moments = get_state_dict(method, optimizer)
    dcp.save({"method": weights, "optimizer": moments}, checkpoint_id=folder)
    method, optimizer = begun()
    weights, moments = get_state_dict(method, optimizer)
    dcp.load({"method": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(method, optimizer, model_state_dict=weights, optim_state_dict=moments)
    step(method, optimizer)
    return {key: getattr(p, "full_tensor", lambda p=p: p)().detach() for key, p in method.named_parameters()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["FLYP, labels", "CaRot"])
def test_weights_that_fsdp_divides_move_as_whole_ones(name, by_process, tmp_path):
    method = make(name)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        method(every_loss.data()).loss.backward()
        optimizer.step()
        method.after_step()
    for found in by_process(2, of_fsdp, name, tmp_path / "checkpoint"):
        for key, p in method.named_parameters():
            torch.testing.assert_close(found[key].reshape(p.shape), p.detach(), rtol=1e-8, atol=1e-8)
