"""Towers that compute their activations again train alike; workers stay."""

from __future__ import annotations

import os

import open_clip
import pytest
import torch
from targets import exhaustive
from test_fit import Noisy, Stop, before_update, data, letters, make, run, stop
from test_validation import held_out, same, state

from robustft.methods import FLYP, CaRot, CoOp, FineTune, MaPLe


def flags(method):
    return [m.grad_checkpointing for m in method.model.modules() if hasattr(m, "grad_checkpointing")]


@pytest.mark.parametrize("kind", [FLYP, *exhaustive(CaRot, FineTune, CoOp)])
def test_recomputed_activations_give_the_same_weights(kind):
    # With dropout: the second time, the same tokens must go.
    options = {"context": 2} if kind is CoOp else {}
    plain, recomputing = (make(kind, dropout=0.5, total_steps=None, **options) for _ in range(2))
    seen = []
    run(plain, limit_batches=1, validation=held_out())
    before_update(recomputing, 1, lambda: seen.extend(flags(recomputing)))
    run(recomputing, limit_batches=1, validation=held_out(), grad_checkpointing=True)
    assert same(state(recomputing), state(plain))
    assert seen == [True, True] and flags(recomputing) == [False, False]


def test_fewer_activations_are_kept():
    def kept(**options):
        torch.manual_seed(0)
        bytes_kept = []
        method = before_update(make(FLYP), 0, stop)
        original = method.step

        def step(batch):
            with torch.autograd.graph.saved_tensors_hooks(lambda x: bytes_kept.append(x.nbytes) or x, lambda x: x):
                return original(batch)

        method.step = step
        with pytest.raises(Stop):
            run(method, **options)
        return sum(bytes_kept)

    assert 0 < kept(grad_checkpointing=True) < 0.7 * kept()


def test_what_cannot_recompute_is_named():
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 16}
    text = {"context_length": 9, "vocab_size": 30, "width": 8, "heads": 2, "layers": 1}
    names = {"tokenizer": letters, "class_names": ("ant", "bee", "cow"), "templates": ("a {}",)}
    resnet = FLYP(open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text), **names)
    with pytest.raises(
        ValueError, match="grad_checkpointing must be False: the ModifiedResNet image tower of the CLIP"
    ):
        run(resnet, data=(torch.randn(8, 3, 32, 32), data()[1][:8]), grad_checkpointing=True)
    assert flags(resnet) == [False]
    with pytest.raises(ValueError, match="grad_checkpointing must be False for MaPLe"):
        run(make(MaPLe, total_steps=None), grad_checkpointing=True)


class Processes(Noisy):
    """Which process made an item goes along as its group."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"image": image, "label": label, "group": os.getpid()}


def test_workers_stay_from_epoch_to_epoch():
    processes, method = set(), make(FineTune)
    original = method.step
    method.step = lambda batch: (processes.update(batch["group"].tolist()), original(batch))[1]
    run(method, data=Processes(), workers=2)
    assert len(processes) == 2 and os.getpid() not in processes
