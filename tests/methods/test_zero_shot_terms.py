"""Terms that compare with the zero-shot model, on every method that takes an objective, against plain restatements."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_options import PROMPTED
from tiny_clip import letters

from robustft import clip, fit
from robustft.methods import (
    LPFT,
    CLIPAdapter,
    CoOp,
    FineTune,
    LinearProbe,
    MaPLe,
    ProDA,
    TipAdapterF,
    WorstCaseFineTune,
)
from robustft.methods.objective import Objective
from robustft.methods.worst_case import CVaR

RANGE = Objective(terms={"logit_range": 0.7})
OPTIONS = {
    **PROMPTED,
    CLIPAdapter: {"ratio": 0.9, "seed": 1},  # at seed 0 the two hidden units are dead for every image
}
HOSTS = [FineTune, LPFT, LinearProbe, *OPTIONS, TipAdapterF]
RESNET_HOSTS = [host for host in HOSTS if host is not MaPLe]


def made(host, model, prompts, batches, **arguments):
    arguments |= OPTIONS.get(host, {})
    if host is TipAdapterF:
        arguments["train"] = batches[8]
    if host is LPFT:
        arguments["probe"] = moved(LinearProbe(model, **prompts)).classifier()
    return host(model, **prompts, **arguments)


def trained(method):
    return [p for p in method.parameters() if p.requires_grad]


def moved(method, size=0.3):
    """The method a random step away from its start, where logits leave the zero-shot range."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in trained(method):
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return method


@torch.no_grad()
def plain_zero_shot(model, images, prompts):
    """s u w^T of the model in evaluation mode, without robustft."""
    model = copy.deepcopy(model).eval()
    u = F.normalize(model.encode_image(images), dim=-1)
    means = []
    for name in prompts["class_names"]:
        texts = letters([template.format(name) for template in prompts["templates"]])
        means.append(F.normalize(model.encode_text(texts), dim=-1).mean(0))
    return model.logit_scale.exp() * u @ F.normalize(torch.stack(means), dim=-1).T


def plain_penalty(z, z0):
    """Sample by sample and class by class, what lies above or below the sample's own zero-shot range."""
    cells = [max(0.0, v - row0.max()) + max(0.0, row0.min() - v) for row, row0 in zip(z, z0, strict=True) for v in row]
    return sum(cells) / len(cells)


@torch.no_grad()
def own_logits(method, images, labels):
    """The logits that a step trains: of the classifier, for ProDA with the variance of its prompts in them."""
    if not isinstance(method, ProDA):
        return method.classifier().logits(images)
    u, w = method.image_features(images), method.prompt_embeddings(method.chosen())
    s, m = method.model.logit_scale.exp(), w.mean(0)
    z = s * u @ m.T
    for i, y in enumerate(labels):
        for c in range(len(m)):
            difference = (w[:, c] - m[c]) - (w[:, y] - m[y])
            z[i, c] += s**2 / 2 * (u[i].square() * difference.square().sum(0) / (len(w) + 1)).sum()
    return z


@pytest.mark.parametrize("host", HOSTS)
def test_the_penalty_is_that_of_the_hosts_logits_and_each_samples_zero_shot_range(clip_model, prompts, batches, host):
    images, labels = batches[0]
    plain, penalised = (
        moved(made(host, clip_model, prompts, batches, objective=objective)) for objective in (Objective(), RANGE)
    )
    z0, z = plain_zero_shot(clip_model, images, prompts), own_logits(penalised, images, labels)
    expected, without, out = plain_penalty(z, z0), plain.step(batches[0]), penalised.step(batches[0])
    assert expected > 0.01 and set(out.terms) == {*without.terms, "logit_range"}
    torch.testing.assert_close(out.terms["logit_range"], expected)
    torch.testing.assert_close(out.terms["cross_entropy"], F.cross_entropy(z, labels))
    torch.testing.assert_close(out.loss, without.loss + 0.7 * expected)
    if host.takes_features:
        u = clip.encode_images(clip_model.eval(), images).detach()
        torch.testing.assert_close(penalised.step((u, labels)).loss, out.loss)
    assert plain.reference(images) is None


@pytest.mark.parametrize("host", HOSTS)
def test_the_penaltys_gradient_is_its_own_and_none_goes_to_the_range(clip_model, prompts, batches, host):
    """By central differences along a direction, in which the zero-shot range stays where it was."""
    gradients = []
    for objective in (Objective(), RANGE):
        method = moved(made(host, clip_model, prompts, batches, objective=objective))
        method.step(batches[0]).loss.backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in trained(method)])
    generator = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained(method)]
    slope = sum(((g1 - g0) * d).sum() for g0, g1, d in zip(*gradients, direction, strict=True))
    terms = []
    for sign in (1, -1):
        beside = copy.deepcopy(method)
        with torch.no_grad():
            for p, d in zip(trained(beside), direction, strict=True):
                p += sign * 1e-6 * d
        terms.append(beside.step(batches[0]).terms["logit_range"])
    torch.testing.assert_close(slope, 0.7 * (terms[0] - terms[1]) / 2e-6, rtol=1e-5, atol=1e-7)
    assert slope.abs() > 1e-4


@pytest.mark.parametrize("host", RESNET_HOSTS)
def test_the_range_is_of_running_statistics_that_training_does_not_move(resnet_model, prompts, resnet_batches, host):
    method = made(host, resnet_model, prompts, resnet_batches, objective=RANGE).train()
    images = resnet_batches[0][0]
    expected = plain_zero_shot(resnet_model, images, prompts)
    for batch in resnet_batches[1:3]:
        method.step(batch).loss.backward()
        moved(method, 0.01)
    torch.testing.assert_close(method.reference(images), expected)


@pytest.mark.parametrize("host", [FineTune, LinearProbe, CLIPAdapter])
def test_hosts_that_start_as_the_zero_shot_model_start_without_penalty(clip_model, prompts, batches, host):
    options = {"ratio": 0.0} if host is CLIPAdapter else {}
    method = host(clip_model, objective=RANGE, **options, **prompts)
    assert method.step(batches[0]).terms["logit_range"] < 1e-14
    if host is not CLIPAdapter:  # ratio 0 leaves the adapter out for good
        assert moved(method).step(batches[0]).terms["logit_range"] > 0.01


@pytest.mark.parametrize("host", [FineTune, LPFT])
def test_zs_norm_is_cross_entropy_in_the_zero_shot_range(clip_model, prompts, batches, host):
    images, labels = batches[0]
    method = moved(made(host, clip_model, prompts, batches, objective=Objective(rescale="zero_shot")))
    z, z0 = own_logits(method, images, labels), plain_zero_shot(clip_model, images, prompts)
    rows = [
        (row - row.min()) / (row.max() - row.min()) * (row0.max() - row0.min()) + row0.min()
        for row, row0 in zip(z, z0, strict=True)
    ]
    torch.testing.assert_close(method.step(batches[0]).loss.detach(), F.cross_entropy(torch.stack(rows), labels))


@pytest.mark.parametrize("host", [FineTune, LPFT, LinearProbe, CoOp, ProDA, MaPLe])
def test_a_resumed_run_ends_bit_for_bit_and_saves_no_second_model(clip_model, prompts, batches, tmp_path, host):
    data = tuple(torch.cat(parts) for parts in zip(*batches[:3], strict=True))
    recipe = {"epochs": 2, "batch_size": 6, "lr": 0.01, "progress": False}

    def method(**changed):
        return made(host, clip_model, prompts | changed, batches, objective=RANGE, total_steps=6)

    whole, stopped, resumed = method(), method(), method()
    fit(whole, data, **recipe)
    after_step = stopped.after_step

    def stop():
        after_step()
        if int(stopped.steps) == 4:
            raise RuntimeError("power cut")

    stopped.after_step = stop
    with pytest.raises(RuntimeError, match="power cut"):
        fit(stopped, data, output=tmp_path, **recipe)
    fit(resumed, data, output=tmp_path, resume=True, **recipe)
    state, again = whole.state_dict(), resumed.state_dict()
    assert state.keys() == made(host, clip_model, prompts, batches).state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    with pytest.raises(ValueError, match="under another configuration.*method.zero_shot.prompts was"):
        fit(method(templates=("some {}",)), data, output=tmp_path, resume=True, **recipe)


def test_the_range_follows_the_methods_precision_and_stays_in_single(clip_model, prompts, batches):
    images, labels = batches[0]
    expected = moved(FineTune(clip_model, objective=RANGE, **prompts)).step((images, labels)).terms["logit_range"]
    single = moved(FineTune(clip_model, objective=RANGE, **prompts)).float()
    found = single.step((images.float(), labels)).terms["logit_range"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = single.step((images.float(), labels)).terms["logit_range"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.05)
    half = FineTune(clip_model.bfloat16(), objective=RANGE, **prompts)
    assert half.reference(images.bfloat16()).dtype == torch.float32
    half.step((images.bfloat16(), labels)).loss.backward()
    assert all(p.grad.isfinite().all() for p in trained(half))


def test_risks_of_single_samples_refuse_what_is_no_loss_of_samples(clip_model, prompts):
    for objective in (RANGE, Objective(rescale="zero_shot")):
        with pytest.raises(ValueError, match="expected cross-entropy, with the misalignment penalty"):
            WorstCaseFineTune(clip_model, risk=CVaR(0.5), objective=objective, **prompts)
