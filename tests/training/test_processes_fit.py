"""`fit` on several processes ends as on one, and goes on with another number of them."""

from __future__ import annotations

import every_loss
import processes
import pytest
import torch
from targets import exhaustive

from robustft.training import adamw, optimization
from robustft.training.loop import fit

by_process = processes.by_process  # a fixture of this file's tests

EXACT = {"rtol": 1e-12, "atol": 1e-14}
AMPLIFIED = {"rtol": 1e-12, "atol": 1e-11}
"""Of the biases of keys under AdamW. Each adds one number to all scores of a softmax, so their gradient is 0, and what
is computed for it is rounding, about 1e-17. AdamW divides that by 1e-8, and goes 1e-3 of it in each of 4 or 6 steps."""


def sgd(method, lr, weight_decay):
    """Instead of AdamW: a step is as long as its gradient, however small that is."""
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)


def fitted(name, output=None, epochs="2", sparse=False, **options):
    batch = every_loss.data()
    held_out = batch["image"].flip(0)[:7], batch["label"].flip(0)[:7]
    method = every_loss.make(name)
    if sparse:
        method.model.token_embedding.sparse = True
    settings = {"batch_size": 6, "lr": 1e-3, "schedule": "constant", "warmup": 0.0, "progress": False, "log_every": 1}
    settings["restore_best"] = False
    history = fit(method, batch, epochs=int(epochs), output=output, validation=held_out, **(settings | options))
    return {"weights": method.state_dict(), "records": [list(r.items()) for r in history.records]}


def on_a_process(rank, name, output, accumulate="1", epochs="2", resume="", optimizer="AdamW"):
    torch.manual_seed(rank)
    if optimizer == "SGD":
        optimization.AdamW = sgd
    return fitted(name, output or None, epochs, accumulate=int(accumulate), resume=bool(resume))


def without_a_folder(rank, names):
    torch.manual_seed(rank)
    return [fitted(name) for name in names.split(";")]


def same(found, expected, biases=AMPLIFIED):
    for name, value in expected["weights"].items():
        bound = biases if name.endswith(("in_proj_bias", "qkv.bias", "kv.bias")) else EXACT
        torch.testing.assert_close({name: found["weights"][name]}, {name: value}, **bound)
    assert len(found["records"]) == len(expected["records"])
    for mine, theirs in zip(found["records"], expected["records"], strict=True):
        assert dict(mine) == pytest.approx(dict(theirs), rel=1e-12)


CASES = [(2, "CaRot"), *exhaustive((4, "WorstCaseFineTune"), (4, "DRM"), (2, "CoOp"), (2, "FineTune"))]


@pytest.mark.parametrize(("world", "name"), CASES)
def test_a_fit_is_the_same_on_any_number(world, name, by_process, tmp_path):
    expected = fitted(name, tmp_path / "one")
    for found in by_process(world, on_a_process, name, tmp_path / "run", 2):
        same(found, expected)
    names = [{str(p.relative_to(tmp_path / f)) for p in (tmp_path / f).rglob("*")} for f in ("run", "one")]
    assert {n.partition("/")[2] for n in names[0]} == {n.partition("/")[2] for n in names[1]}


@pytest.mark.exhaustive
def test_without_adam_every_weight_is_the_same_to_rounding(by_process, tmp_path, monkeypatch):
    monkeypatch.setattr(optimization, "AdamW", sgd)
    expected = fitted("CaRot", tmp_path / "one")
    for found in by_process(2, on_a_process, "CaRot", tmp_path / "run", 2, 2, "", "SGD"):
        same(found, expected, EXACT)


@pytest.mark.exhaustive
def test_two_processes_train_the_same_siglip(by_process):
    names = ["FLYP, SigLIP", "CaRot, SigLIP"]
    all_expected = [fitted(name) for name in names]
    start = every_loss.make(names[0]).state_dict()
    for found in by_process(2, without_a_folder, ";".join(names)):
        for mine, expected in zip(found, all_expected, strict=True):
            same(mine, expected)
            for name in ("model.logit_scale", "model.logit_bias", "model.visual.trunk.patch_embed.proj.weight"):
                assert not torch.equal(mine["weights"][name], start[name])


def test_a_run_goes_on_with_another_number(by_process, tmp_path):
    expected = fitted("CaRot", tmp_path / "one", "3")
    fitted("CaRot", tmp_path / "run", "1")
    for found in by_process(2, on_a_process, "CaRot", tmp_path / "run", 1, 2, "resume"):
        assert found["weights"]["steps"] == 5
    same(fitted("CaRot", tmp_path / "run", "3", resume=True), expected)


def with_a_sparse_table(rank):
    """As an AdamW leaves it that was made before the processes met; it counts as a large one here."""
    adamw.SMALLEST_TABLE = 1
    return fitted("FLYP, labels", sparse=True)


def test_a_table_that_was_sparse_before_is_averaged_too(by_process):
    expected = fitted("FLYP, labels")
    for found in by_process(2, with_a_sparse_table):
        same(found, expected)


def refused(rank):
    """What a fit says on a process whose arguments do not go with the others'."""
    found = {}
    for name, options in {"few": {"batch_size": 1}, "other": {"lr": 1e-3 * (1 + int(rank))}}.items():
        try:
            fitted("FLYP", None, **options)
        except ValueError as error:
            found[name] = str(error)
    return found


def test_what_does_not_go_together_is_refused_by_all(by_process):
    for found in by_process(2, refused):
        assert found["few"] == "batch_size must be at least the number of processes, 2, got batches of 1"
        assert "from process 0 to process 1, settings.lr was 0.001 and is 0.002 now" in found["other"]
