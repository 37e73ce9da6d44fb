"""Soups are means of weights and heads, and a greedy one keeps what helps on validation data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from targets import case

from robustft import clip
from robustft.methods import Classifier, FineTune, LinearProbe, OutputEnsemble, greedy_soup, uniform_soup


@pytest.fixture(params=["vit", "resnet"])
def ingredients(request, clip_model, batches, resnet_model, resnet_batches, prompts):
    """Three fine-tunings of one model, one of them a probe with a bias; and images for them."""
    model, batches = (clip_model, batches) if request.param == "vit" else (resnet_model, resnet_batches)
    found = []
    for kind, order, lr in ((FineTune, 1, 0.02), (FineTune, -1, 0.05), (LinearProbe, 1, 0.5)):
        method = kind(model, **prompts)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)
        for batch in batches[::order]:
            optimizer.zero_grad()
            method.step(batch).loss.backward()
            optimizer.step()
        found.append(method.classifier())
    found[1].logit_scale.mul_(2.0)
    return found, batches[0][0]


def mean_state(states):
    """Sums over state dictionaries; integers are the first's."""
    return {k: sum(s[k] for s in states) / len(states) if v.is_floating_point() else v for k, v in states[0].items()}


def test_uniform_soup_is_the_mean_of_weights_head_scale_and_bias(ingredients):
    classifiers, images = ingredients
    soup = uniform_soup(classifiers)
    model = copy.deepcopy(classifiers[0].model)
    model.load_state_dict(mean_state([c.model.state_dict() for c in classifiers]))
    head = sum(c.logit_scale * c.class_embeddings for c in classifiers) / 3
    with torch.no_grad():
        expected = F.normalize(model.eval().encode_image(images), dim=-1) @ head.T + classifiers[2].bias / 3
    torch.testing.assert_close(soup.logits(images), expected)
    torch.testing.assert_close(soup.logit_scale, sum(c.logit_scale for c in classifiers) / 3)
    torch.testing.assert_close(uniform_soup(classifiers[::-1]).logits(images), expected)


def test_soup_of_one_and_of_equals_is_that_one_bit_for_bit(ingredients):
    (first, *_), images = ingredients
    for soup in (uniform_soup([first]), uniform_soup([first] * 3)):
        assert soup.model is not first.model
        assert all(torch.equal(v, soup.model.state_dict()[k]) for k, v in first.model.state_dict().items())
    torch.testing.assert_close(uniform_soup([first]).logits(images), first.logits(images))


def test_half_precision_weights_are_averaged_in_single():
    weights = torch.randn(5, 64).bfloat16()
    mean = clip.average_states({"w": w, "n": torch.tensor(n)} for n, w in enumerate(weights, start=5))
    exact = weights.double().mean(0).bfloat16()
    assert torch.equal(mean["w"], exact) and not torch.equal(sum(weights) / 5, exact)
    assert mean["n"] == 5


def plain_greedy(classifiers, images, labels):
    """The paper's recipe, with sums over state dictionaries."""

    def accuracy(members):
        model = copy.deepcopy(members[0].model).eval()
        model.load_state_dict(mean_state([m.model.state_dict() for m in members]))
        head = sum(m.logit_scale * m.class_embeddings for m in members) / len(members)
        bias = sum(torch.zeros(len(head)).to(head) if m.bias is None else m.bias for m in members) / len(members)
        z = F.normalize(model.encode_image(images), dim=-1) @ head.T + bias
        return (z.argmax(1) == labels).double().mean().item(), F.cross_entropy(z, labels).item()

    with torch.no_grad():
        own = [accuracy([c]) for c in classifiers]
        order = sorted(range(len(own)), key=lambda i: (-own[i][0], own[i][1]))
        kept, best = order[:1], own[order[0]][0]
        for i in order[1:]:
            trial, _ = accuracy([classifiers[m] for m in (*kept, i)])
            if trial >= best:
                kept, best = [*kept, i], trial
    return kept, [a for a, _ in own], best


def test_greedy_soup_equals_its_plain_restatement_and_never_loses_to_its_best_member(ingredients, validation):
    classifiers, images = ingredients
    data = F.interpolate(validation[0], size=images.shape[-1])
    answers = torch.stack([c.logits(data).argmax(1) for c in classifiers])
    for seed in range(4):
        with case(seed):
            chooser = torch.randint(3, (len(data),), generator=torch.Generator().manual_seed(seed))
            labels = answers[chooser, torch.arange(len(data))]  # each classifier is right now and then
            kept, own, best = plain_greedy(classifiers, data, labels)
            soup = greedy_soup(classifiers, (data, labels))
            assert soup.ingredients == tuple(kept) and soup.accuracies == pytest.approx(own)
            outputs = soup.classifier.predict((data, labels))
            accuracy = (outputs.logits.argmax(1) == labels).double().mean().item()
            assert accuracy == pytest.approx(best) and accuracy >= max(own)


def test_misuse_is_refused_with_a_reason(clip_model, resnet_model, prompts, validation):
    first = FineTune(clip_model, **prompts).classifier()
    with pytest.raises(ValueError, match="classifiers is empty"):
        uniform_soup([])
    with pytest.raises(ValueError, match="classifiers is empty"):
        greedy_soup([], validation)
    with pytest.raises(ValueError, match=r"classifiers\[1\] has other classes"):
        uniform_soup([first, first.restrict([0, 1])])
    with pytest.raises(TypeError, match=r"classifiers\[1\] is a Mixture.*OutputEnsemble"):
        uniform_soup([first, OutputEnsemble(first, first).at(0.5)])
    other = Classifier(resnet_model, first.class_embeddings, first.classes)
    with pytest.raises(ValueError, match="state 2 do not match.*keys only in the first state"):
        uniform_soup([first, other])
    with pytest.raises(ValueError, match="at least one"):
        clip.average_states([])
