"""The linear probe and what starts from it, against plain restatements; exact resume; features in the images' place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from steps import step_each

from robustft import fit
from robustft.methods import FLYP, LPFT, FineTune, LinearProbe, WiSEFT, zero_shot_classifier
from robustft.methods.objective import Objective

OBJECTIVE = Objective(label_smoothing=0.1, misalignment=0.5)


def descend(method, batches, lr):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        method.step(batch).loss.backward()
        optimizer.step()
        method.after_step()
    return method


def plain_objective(z, labels):
    """Smoothed cross-entropy, and the negative logarithm of CMP's ratio, sample by sample."""
    penalty = []
    for row, y in zip(z, labels, strict=True):
        above = row[row > row[y]]
        penalty.append((above.logsumexp(0) - row[y]) if len(above) else row[y] * 0)
    return F.cross_entropy(z, labels, label_smoothing=0.1) + 0.5 * torch.stack(penalty).mean()


@pytest.fixture(params=["vit", "resnet"])
def case(request, clip_model, batches, resnet_model, resnet_batches):
    return (clip_model, batches) if request.param == "vit" else (resnet_model, resnet_batches)


@pytest.mark.parametrize("init", ["zero_shot", "zero"])
@pytest.mark.parametrize("bias", [True, False])
def test_probe_equals_its_plain_restatement_and_leaves_the_tower_alone(case, prompts, init, bias):
    model, batches = case
    probe = LinearProbe(model, init=init, bias=bias, objective=OBJECTIVE, **prompts).train()
    descend(probe, batches, lr=0.5)

    zero_shot = zero_shot_classifier(model, **prompts)
    w = (init == "zero_shot") * zero_shot.logit_scale * zero_shot.class_embeddings
    w, b = w.clone().requires_grad_(), torch.zeros(3, dtype=torch.float64, requires_grad=bias)
    features = [zero_shot.outputs(images).features.detach() for images, _ in batches]
    for u, (_, labels) in zip(features, batches, strict=True):
        loss = plain_objective(u @ w.T + b, labels)
        gradients = torch.autograd.grad(loss, [w, b] if bias else [w])
        with torch.no_grad():
            for p, g in zip((w, b), gradients, strict=False):
                p -= 0.5 * g
    torch.testing.assert_close(probe.classifier().logits(batches[0][0]), features[0] @ w.T + b, rtol=1e-8, atol=1e-9)
    assert (probe.classifier().bias is not None) == bias
    state = probe.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "running statistics too"
    assert {name for name, p in probe.named_parameters() if p.requires_grad} == {"head"} | ({"bias"} if bias else set())


def test_training_on_features_equals_training_on_their_images(clip_model, prompts, batches):
    on_images, on_features = (LinearProbe(clip_model, **prompts) for _ in range(2))
    descend(on_images, batches, 0.5)
    descend(on_features, [(on_features.features(images), labels) for images, labels in batches], 0.5)
    assert torch.equal(on_images.head, on_features.head) and torch.equal(on_images.bias, on_features.bias)
    data = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    options = {"epochs": 2, "batch_size": 9, "lr": 0.1, "progress": False}
    fit(on_images, data, **options)
    fit(on_features, (on_features.features(data[0]), data[1]), **options)
    torch.testing.assert_close(on_images.head, on_features.head)
    with pytest.raises(TypeError, match=r"images must be a tensor \(N, C, H, W\), got \(6, 8\)"):
        FineTune(clip_model, **prompts).step((on_features.features(batches[0][0]), batches[0][1]))


@pytest.mark.parametrize("kind", [LinearProbe, LPFT])
def test_a_run_that_is_resumed_ends_bit_for_bit_like_a_whole_one(clip_model, prompts, batches, tmp_path, kind):
    data = torch.cat([x for x, _ in batches]).float(), torch.cat([y for _, y in batches])
    model = clip_model.float()
    probe = descend(LinearProbe(model, **prompts), [(x.float(), y) for x, y in batches[:3]], 0.5).classifier()
    options = {"epochs": 3, "batch_size": 9, "lr": 1e-2, "progress": False}

    def make(head=probe):
        return kind(model, l2_sp=0.1, probe=head, **prompts) if kind is LPFT else kind(model, **prompts)

    whole, stopped, resumed = make(), make(), make()
    fit(whole, data, output=tmp_path / "whole", **options)
    kept, count = stopped.after_step, iter(range(99))

    def stop():
        kept()
        if next(count) == 7:
            raise RuntimeError("killed")

    stopped.after_step = stop
    with pytest.raises(RuntimeError, match="killed"):
        fit(stopped, data, output=tmp_path / "killed", **options)
    fit(resumed, data, output=tmp_path / "killed", resume=True, **options)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    if kind is LPFT:
        other = LinearProbe(model, **prompts).classifier()
        with pytest.raises(ValueError, match="another configuration: method.start"):
            fit(make(other), data, output=tmp_path / "killed", resume=True, **options)


def test_lp_ft_starts_as_the_probe_and_trains_tower_head_and_bias(clip_model, prompts, batches):
    probe = descend(LinearProbe(clip_model, **prompts), batches, 0.5).classifier()
    method = LPFT(clip_model, probe=probe, **prompts)
    images, labels = batches[0]
    torch.testing.assert_close(method.classifier().logits(images), probe.logits(images))
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert trained == {"head", "bias"} | {f"model.visual.{name}" for name, _ in clip_model.visual.named_parameters()}
    method.step((images, labels)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in (method.head, method.bias, method.model.visual.proj))
    with pytest.raises(ValueError, match="same classes in the same order"):
        LPFT(clip_model, probe=probe.restrict([1, 0, 2]), **prompts)


def test_lp_ft_with_l2_sp_equals_its_plain_restatement_at_every_step(case, prompts):
    """A probe's head and bias on frozen features, then tower, head and bias at once, pulled to where they start."""
    model, batches = case
    probe = descend(LinearProbe(model, **prompts), batches[:4], 0.5)
    method = LPFT(model, probe=probe.classifier(), l2_sp=0.3, **prompts).train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)

    student, zero_shot = copy.deepcopy(model), zero_shot_classifier(model, **prompts)
    w = (zero_shot.logit_scale * zero_shot.class_embeddings).clone().requires_grad_()
    b = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        features = [F.normalize(student.eval().encode_image(images), dim=-1) for images, _ in batches[:4]]
    plain = torch.optim.SGD([w, b], lr=0.5)
    for u, (_, labels) in zip(features, batches[:4], strict=True):
        plain.zero_grad()
        F.cross_entropy(u @ w.T + b, labels).backward()
        plain.step()
    tuned = [w, b, *student.train().visual.parameters()]
    start = [p.detach().clone() for p in tuned]
    plain = torch.optim.SGD(tuned, lr=0.01)
    for images, labels in batches[4:]:
        out = method.step((images, labels))
        loss = F.cross_entropy(F.normalize(student.encode_image(images), dim=-1) @ w.T + b, labels)
        loss = loss + 0.3 / 2 * sum((p - p0).square().sum() for p, p0 in zip(tuned, start, strict=True))
        torch.testing.assert_close(out.loss, loss)
        step_each((optimizer, out.loss), (plain, loss))
        method.after_step()
    torch.testing.assert_close((method.head, method.bias), (w, b))
    for name, value in student.state_dict().items():
        torch.testing.assert_close(method.model.state_dict()[name], value)


def test_l2_sp_adds_half_the_squared_distance_to_the_start(clip_model, prompts, batches):
    for kind in (FineTune, FLYP):
        free, pulled = kind(clip_model, **prompts), kind(clip_model, l2_sp=0.3, **prompts)
        start = {name: p.detach().clone() for name, p in pulled.named_parameters() if p.requires_grad}
        for method in (free, pulled):
            with torch.no_grad():
                for i, p in enumerate(q for q in method.parameters() if q.requires_grad):
                    p += 0.01 * (i + 1)
        moved = {name: p.detach() for name, p in pulled.named_parameters() if p.requires_grad}
        distance = sum(0.5 * (moved[name] - start[name]).square().sum() for name in start)
        plain, out = free.step(batches[0]), pulled.step(batches[0])
        torch.testing.assert_close(out.loss, plain.loss + 0.3 * distance)
        torch.testing.assert_close(out.terms["l2_sp"], distance)
        plain.loss.backward()
        out.loss.backward()
        free_gradients = {name: p.grad for name, p in free.named_parameters()}
        for name, p in pulled.named_parameters():
            if p.requires_grad and free_gradients[name] is not None:
                torch.testing.assert_close(p.grad, free_gradients[name] + 0.3 * (moved[name] - start[name]))
        with pytest.raises(ValueError, match="l2_sp is -1"):
            kind(clip_model, l2_sp=-1, **prompts)


def test_fine_tune_computes_its_objective(clip_model, prompts, batches):
    images, labels = batches[0]
    method = FineTune(clip_model, objective=OBJECTIVE, **prompts)
    loss, terms = method.step((images, labels))
    logits = F.normalize(clip_model.encode_image(images), dim=-1) @ method.head.T
    torch.testing.assert_close(loss, plain_objective(logits, labels))
    assert set(terms) == {"cross_entropy", "misalignment"}
    same = FineTune(clip_model, label_smoothing=0.1, objective=Objective(misalignment=0.5), **prompts)
    assert same.objective == method.objective and same.config == method.config
    with pytest.raises(ValueError, match="label_smoothing is 0.2 and the objective's 0.1: give one"):
        FineTune(clip_model, label_smoothing=0.2, objective=OBJECTIVE, **prompts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe_and_fine_tuning_learn_in_low_precision(case, prompts, dtype):
    model, batches = case
    images, labels = batches[0][0].float(), batches[0][1]
    model = model.to(dtype)
    for kind in (LinearProbe, FineTune):
        method = kind(model, **prompts)
        before = method.step((images, labels)).loss.item()
        descend(method, [(images, labels)] * 10, 0.2)
        assert method.step((images, labels)).loss.item() < before
        outputs = method.classifier().outputs(images)
        assert all(part.dtype == torch.float32 for part in outputs)
        restated = outputs.features @ method.head.T + (0 if method.bias is None else method.bias)
        torch.testing.assert_close(outputs.logits, restated, rtol=1e-4, atol=1e-4)


def test_probe_shares_its_tower_with_its_zero_shot_classifier_and_wise_ft_mixes_heads(clip_model, prompts, batches):
    probe = descend(LinearProbe(clip_model, **prompts), batches, 0.5)
    zero_shot, fine_tuned = probe.zero_shot_classifier(), probe.classifier()
    images = batches[0][0]
    mixed = WiSEFT(zero_shot, fine_tuned).at(0.25).logits(images)
    torch.testing.assert_close(mixed, 0.75 * zero_shot.logits(images) + 0.25 * fine_tuned.logits(images))
    torch.testing.assert_close(zero_shot.logits(images), zero_shot_classifier(clip_model, **prompts).logits(images))


def test_misuse_is_refused_with_a_reason(clip_model, prompts, batches):
    with pytest.raises(ValueError, match='init must be "zero_shot" or "zero"'):
        LinearProbe(clip_model, init="random", **prompts)
    with pytest.raises(ValueError, match="LinearProbe needs labels"):
        LinearProbe(clip_model, **prompts).step((batches[0][0], ["a"] * 6))
    with pytest.raises(TypeError, match=r"\(N, C, H, W\) or features \(N, D\), got \(3, 8, 8\)"):
        LinearProbe(clip_model, **prompts).step((batches[0][0][0], batches[0][1]))
    assert all(p.requires_grad for p in clip_model.parameters()), "the model that was passed is left alone"
