from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from faulty import interrupt
from steps import step_each

from robustft.data import ImageDataset
from robustft.methods import Classifier, CVaR, FineTune, GroupDRO, WorstCaseFineTune, WorstGroup
from robustft.methods.objective import TERMS, Objective
from robustft.training.loop import fit


def grouped(batches):
    generator = torch.Generator().manual_seed(5)
    return [{"image": x, "label": y, "group": torch.randint(0, 4, (6,), generator=generator)} for x, y in batches]


def plain_head(model, prompts):
    rows = []
    for name in prompts["class_names"]:
        tokens = prompts["tokenizer"]([template.format(name) for template in prompts["templates"]])
        rows.append(F.normalize(F.normalize(model.encode_text(tokens), dim=-1).mean(0), dim=0))
    return model.logit_scale.exp().item() * torch.stack(rows).detach()


def plain_worst_group(losses, groups, state):
    return torch.stack([losses[groups == g].mean() for g in groups.unique()]).max()


def plain_group_dro(losses, groups, state):
    """Algorithm 1 of arXiv 1911.08731 with all groups of a batch at once."""
    q = state.setdefault("q", torch.full((4,), 0.25, dtype=torch.float64))
    risks = torch.stack([losses[groups == g].mean() if (groups == g).any() else losses.sum() * 0 for g in range(4)])
    q = q * (0.5 * risks.detach()).exp()
    state["q"] = q / q.sum()
    return (state["q"] * risks).sum()


def plain_cvar(losses, groups, state):
    """Of 6 losses the worst 2.4: two whole ones and 0.4 of the third."""
    worst = losses.sort(descending=True).values
    return (worst[0] + worst[1] + 0.4 * worst[2]) / 2.4


@pytest.mark.parametrize(
    "risk, plain_risk",
    [(WorstGroup(4), plain_worst_group), (GroupDRO(4, 0.5), plain_group_dro), (CVaR(0.4), plain_cvar)],
    ids=["worst group", "group DRO", "CVaR"],
)
def test_worst_case_equals_its_plain_restatement_at_every_step(clip_model, prompts, batches, risk, plain_risk):
    penalised = Objective(label_smoothing=0.1, misalignment=0.5, variant="softplus")
    method = WorstCaseFineTune(clip_model, risk=risk, objective=penalised, **prompts)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    student, state = copy.deepcopy(clip_model), {}
    head = plain_head(student, prompts).requires_grad_()
    plain = torch.optim.SGD([*student.visual.parameters(), head], lr=0.01)
    for batch in grouped(batches):
        out = method.step(batch)
        z = F.normalize(student.encode_image(batch["image"]), dim=-1) @ head.T
        entropies, p = F.cross_entropy(z, batch["label"], label_smoothing=0.1, reduction="none"), z.softmax(1)
        own = p.gather(1, batch["label"][:, None])
        losses = entropies + 0.5 * ((p * (p > own)).sum(1) / own[:, 0]).log1p()
        loss = plain_risk(losses, batch["group"], state)
        torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=1e-9)  # the weights are float32
        torch.testing.assert_close(out.terms["cross_entropy"], entropies.detach().mean(), rtol=1e-6, atol=1e-9)
        step_each((optimizer, out.loss), (plain, loss))
        method.after_step()
    torch.testing.assert_close(method.head, head, rtol=1e-5, atol=1e-7)
    for p, q in zip(method.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    if "q" in state:
        torch.testing.assert_close(method.risk.weights.double(), state["q"], rtol=1e-5, atol=0)
        assert torch.equal(risk.weights, torch.full((4,), 0.25)), "the risk that was passed is copied"


def test_a_step_without_after_step_leaves_the_weights(clip_model, prompts, batches):
    method, batch = WorstCaseFineTune(clip_model, risk=GroupDRO(4, 1.0), **prompts), grouped(batches)[0]
    first = method.step(batch).loss
    assert torch.equal(method.step(batch).loss, first)
    method.after_step()
    assert not torch.equal(method.step(batch).loss, first)


def test_cvar_of_everything_is_fine_tuning_from_a_probe_and_with_a_penalty_too(clip_model, prompts, batches):
    probe = Classifier(clip_model, torch.randn(3, 8).double(), prompts["class_names"], bias=torch.randn(3).double())
    options = prompts | {"start": probe, "l2_sp": 0.1, "label_smoothing": 0.2}
    mean, risk = FineTune(clip_model, **options), WorstCaseFineTune(clip_model, risk=CVaR(1.0), **options)
    for method in (mean, risk):
        with torch.no_grad():
            method.head.add_(0.1)  # away from its start, where the penalty is 0
    torch.testing.assert_close(risk.step(batches[0]).loss, mean.step(batches[0]).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [lambda: GroupDRO(4, 0.5), lambda: CVaR(0.5)])
def test_run_that_stops_resumes_bit_for_bit(clip_model, prompts, batches, tmp_path, kind):
    parts = grouped(batches[:4])
    data = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    settings = {"epochs": 2, "batch_size": 6, "lr": 1e-2, "progress": False}

    def make():
        return WorstCaseFineTune(clip_model, risk=kind(), **prompts)

    whole = make()
    history = fit(whole, data, output=tmp_path / "whole", **settings)
    broken = make()
    interrupt(broken, 6)
    with pytest.raises(InterruptedError):
        fit(broken, data, output=tmp_path / "broken", **settings)
    resumed = make()
    assert fit(resumed, data, output=tmp_path / "broken", resume=True, **settings).records == history.records
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    other = data | {"group": data["group"].flip(0)}
    with pytest.raises(ValueError, match="data.columns.group was"):
        fit(make(), other, output=tmp_path / "broken", resume=True, **settings)


def test_groups_of_a_data_set_reach_the_method(clip_model, prompts, monkeypatch):
    pixels = torch.randint(0, 255, (12, 8, 8, 3), dtype=torch.uint8).numpy()
    groups = torch.arange(12) % 4
    data = ImageDataset(pixels, torch.arange(12) % 3, prompts["class_names"], groups=groups)
    clip_model.visual.preprocess_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    method = WorstCaseFineTune(clip_model.float(), risk=WorstGroup(4), **prompts)
    seen = []
    original = method.step
    method.step = lambda batch: seen.append(batch) or original(batch)
    fit(method, data, epochs=1, batch_size=6, lr=1e-3, progress=False)
    images, _ = data.tensors((0.5,) * 3, (0.25,) * 3)
    for batch in seen:
        for image, label, group in zip(batch["image"], batch["label"], batch["group"], strict=True):
            row = int((images == image).flatten(1).all(1).nonzero())
            assert (label, group) == (row % 3, row % 4)


def test_what_is_missing_or_out_of_range_is_said(clip_model, prompts, batches):
    dro = WorstCaseFineTune(clip_model, risk=GroupDRO(4), **prompts)
    with pytest.raises(ValueError, match='GroupDRO needs batches with "group"'):
        dro.step(batches[0])
    with pytest.raises(ValueError, match="groups"):
        dro.step(grouped(batches)[0] | {"group": torch.full((6,), 4)})
    with pytest.raises(TypeError, match="risk is 0.5; expected a Risk"):
        WorstCaseFineTune(clip_model, risk=0.5, **prompts)
    name = next(iter(TERMS))
    for objective, message in (
        (Objective(terms={name: 1.0}), f"single samples, .*{name}"),
        (Objective(focal=2.0), "focal, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            WorstCaseFineTune(clip_model, risk=CVaR(0.5), objective=objective, **prompts)
    for make, message in (
        (lambda: GroupDRO(0), "num_groups must be at least 1, got 0"),
        (lambda: GroupDRO(2, -1.0), "step_size must be finite and not negative"),
        (lambda: CVaR(0.0), r"alpha must lie in \(0, 1\], got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
