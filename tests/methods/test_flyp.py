import copy

import pytest
import torch
import torch.nn.functional as F

from robustft.methods import FLYP, CaRot, flyp


def train(method, batches):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
    outs = []
    for batch in batches:
        outs.append(method.step(batch))
        optimizer.zero_grad()
        outs[-1].loss.backward()
        optimizer.step()
        method.after_step()
    return outs


@pytest.mark.parametrize("targets, smoothing", [("diagonal", 0.0), ("diagonal", 0.1), ("label", 0.0), ("label", 0.2)])
def test_flyp_equals_its_plain_restatement_at_every_step(clip_model, prompts, batches, targets, smoothing):
    single = prompts | {"templates": ("a {}",)}
    method = FLYP(clip_model, targets=targets, label_smoothing=smoothing, **single)
    outs = train(method, batches)
    student = copy.deepcopy(clip_model)
    plain = torch.optim.SGD(student.parameters(), lr=0.05)
    for out, (images, labels) in zip(outs, batches, strict=True):
        tokens = single["tokenizer"]([f"a {single['class_names'][label]}" for label in labels.tolist()])
        u, t = F.normalize(student.encode_image(images), dim=-1), F.normalize(student.encode_text(tokens), dim=-1)
        z = student.logit_scale.exp() * u @ t.T
        positive = torch.eye(6) if targets == "diagonal" else labels[:, None] == labels[None]
        target = positive.double() / positive.sum(1, keepdim=True)
        target = (1 - smoothing) * target + smoothing / 6
        rows, columns = -(target * z.log_softmax(1)).sum(1), -(target * z.T.log_softmax(1)).sum(1)
        loss = (rows + columns).mean() / 2
        torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(out.terms["contrastive"], loss.detach(), rtol=1e-9, atol=1e-12)
        plain.zero_grad()
        loss.backward()
        plain.step()
    for (name, p), q in zip(method.model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_captions_are_of_the_labels_and_use_every_template(clip_model, prompts):
    method = FLYP(clip_model, **prompts)
    labels = torch.arange(3).repeat(100)
    images = torch.zeros(300, 3, 8, 8, dtype=torch.float64)
    pairs = method.pairs((images, labels))
    of_class = [
        {tuple(row) for row in prompts["tokenizer"]([t.format(name) for t in prompts["templates"]]).tolist()}
        for name in prompts["class_names"]
    ]
    length = len(next(iter(of_class[0])))
    drawn = [tuple(row) for row in F.pad(pairs.tokens, (0, length - pairs.tokens.shape[1]))[pairs.rows].tolist()]
    assert len(pairs.tokens) == 9 and pairs.tokens.shape[1] < length
    assert all(row in of_class[label] for row, label in zip(drawn, labels.tolist(), strict=True))
    assert all(100 > drawn.count(row) > 10 for row in set(drawn))


def test_captions_that_repeat_in_a_batch_are_encoded_once(clip_model, prompts, batches, monkeypatch):
    images, texts = batches[0][0], ["a bee", "ant", "a bee", "ant", "the cow here"]
    images = images.repeat(3, 1, 1, 1)[:5]
    for method in (FLYP(clip_model, **prompts), CaRot(clip_model, total_steps=9, **prompts)):
        encoded = []
        tower = method.model.transformer.register_forward_hook(lambda _m, _i, out, seen=encoded: seen.append(len(out)))
        found = method.step((images, texts)).loss
        assert encoded == [3]
        tower.remove()
        with monkeypatch.context() as patched:
            patched.setattr(flyp, "distinct", lambda tokens: (tokens, None))
            expected = method.step((images, texts)).loss
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_captions_are_a_function_of_seed_and_step(clip_model, prompts, batches):
    def captions(seed, step):
        method = FLYP(clip_model, seed=seed, **prompts)
        method.steps.fill_(step)
        pairs = method.pairs((batches[0][0].repeat(10, 1, 1, 1), batches[0][1].repeat(10)))
        return pairs.tokens[pairs.rows]

    torch.manual_seed(0)
    first = captions(0, 5)
    torch.manual_seed(1)
    assert torch.equal(captions(0, 5), first)
    assert not torch.equal(captions(0, 6), first)
    assert not torch.equal(captions(1, 5), first)
    assert not torch.equal(captions(2**32, 5), first), "seeds that agree in their lower 32 bits differ too"


def test_every_form_of_a_batch_gives_the_same_loss(clip_model, prompts, batches):
    single = prompts | {"templates": ("a {}",)}
    images, labels = batches[0]
    texts = [f"a {single['class_names'][label]}" for label in labels.tolist()]
    method = FLYP(clip_model, **single)
    losses = [
        method.step(batch).loss
        for batch in (
            (images, labels),
            [images, labels.int()],
            (images, texts),
            (images, tuple(texts)),
            (images, single["tokenizer"](texts)),
            {"image": images, "label": labels},
            {"image": images, "text": texts},
            {"image": images, "text": texts, "label": labels, "path": ["x"] * 6},
        )
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-12, atol=0)


def test_targets_by_label_need_labels(clip_model, prompts, batches):
    with pytest.raises(ValueError, match='targets="label" needs labels'):
        FLYP(clip_model, targets="label", **prompts).step((batches[0][0], ["a"] * 6))


def test_the_model_that_was_passed_stays_zero_shot_and_frozen_weights_stay_frozen(clip_model, prompts, batches):
    clip_model.token_embedding.weight.requires_grad_(False)
    before = copy.deepcopy(clip_model.state_dict())
    method = FLYP(clip_model, **prompts)
    train(method, batches[:2])
    assert all(torch.equal(value, before[name]) for name, value in clip_model.state_dict().items())
    assert torch.equal(method.model.token_embedding.weight, before["token_embedding.weight"])
    assert not torch.equal(method.model.visual.proj, before["visual.proj"])


@pytest.mark.parametrize("kind", [FLYP, CaRot])
def test_misalignment_is_cmps_penalty_over_the_classes_of_the_batch(kind, clip_model, prompts, batches):
    images, labels = batches[0][0], torch.tensor([0, 2, 2, 0, 2, 0])  # class 1 is not there
    steps = [kind(clip_model, **prompts, total_steps=9, misalignment=m, variant="softplus") for m in (0.0, 0.7)]
    plain, with_penalty = (method.step((images, labels)) for method in steps)

    pairs = steps[1].pairs((images, labels))
    u, t = steps[1].features(steps[1].model, pairs)
    w = torch.stack([F.normalize(t[labels == c].mean(0), dim=0) for c in (0, 2)])
    z = clip_model.logit_scale.exp() * u @ w.T
    y = (labels == 2).long()
    errors = z.gather(1, 1 - y[:, None]) > z.gather(1, y[:, None])  # two classes: the other one, if it is above
    ratio = (z.gather(1, y[:, None]) - z.gather(1, 1 - y[:, None])).exp()
    penalty = (torch.log1p(1 / ratio) * errors).mean()
    assert penalty > 0
    torch.testing.assert_close(with_penalty.terms["misalignment"], penalty.detach())
    torch.testing.assert_close(with_penalty.loss, plain.loss + 0.7 * penalty)
    with pytest.raises(ValueError, match="misalignment needs labels"):
        steps[1].step((images, ["a ant"] * 6))
