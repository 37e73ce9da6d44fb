"""Adapters of image features against plain float64 restatements of their papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import CONFIG

from robustft.clip import Features
from robustft.methods import Classifier, CLIPAdapter, TipAdapter, TipAdapterF, load_predictor, zero_shot_classifier
from robustft.methods.objective import Objective
from robustft.methods.tip_adapter import ALPHA, BETA


@pytest.fixture
def train(batches):
    return tuple(torch.cat(parts) for parts in zip(*batches[:3], strict=True))


def unit_features(model, images):
    return F.normalize(model.encode_image(images), dim=-1).detach()


def plain_cache(u, keys, labels, beta):
    """The sum over cache entries of each class, one entry after the other."""
    z = torch.zeros(len(u), 3, dtype=u.dtype)
    for key, label in zip(keys, labels, strict=True):
        z = z + torch.exp(-beta * (1 - u @ key))[:, None] * F.one_hot(label, 3)
    return z


def train_beside(method, trained, batches, plain_loss, lr):
    optimizers = [torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)]
    optimizers.append(torch.optim.SGD(trained, lr=lr))
    for images, labels in batches:
        out, loss = method.step((images, labels)), plain_loss(images, labels)
        torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-11)
        for optimizer, value in zip(optimizers, (out.loss, loss), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        method.after_step()


# CLIP-Adapter


@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_clip_adapter_equals_its_plain_restatement_at_every_step(clip_model, prompts, batches, ratio):
    method = CLIPAdapter(clip_model, ratio=ratio, **prompts)
    down, up = (layer.weight.detach().clone().requires_grad_() for layer in (method.down, method.up))
    assert down.shape == (2, 8) and up.shape == (8, 2)
    w = zero_shot_classifier(clip_model, **prompts).class_embeddings
    scale = clip_model.logit_scale.exp().detach()

    def plain_logits(images):
        x = clip_model.encode_image(images).detach()
        a = torch.relu(torch.relu(x @ down.T) @ up.T)
        return scale * F.normalize(ratio * a + (1 - ratio) * x, dim=-1) @ w.T

    train_beside(
        method, [down, up], batches[:5], lambda images, labels: F.cross_entropy(plain_logits(images), labels), 0.1
    )
    torch.testing.assert_close(method.down.weight, down, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(method.up.weight, up, rtol=1e-8, atol=1e-10)
    images = batches[8][0]
    torch.testing.assert_close(method.classifier().logits(images), plain_logits(images).detach())


def test_an_adapter_of_ratio_zero_is_the_zero_shot_classifier(clip_model, prompts, batches):
    zero_shot = zero_shot_classifier(clip_model, **prompts).outputs(batches[0][0])
    adapted = CLIPAdapter(clip_model, ratio=0.0, **prompts).classifier().outputs(batches[0][0])
    torch.testing.assert_close(tuple(adapted), tuple(zero_shot))


# Tip-Adapter


def test_tip_adapter_is_the_papers_formula(clip_model, prompts, batches, train):
    zero_shot = zero_shot_classifier(clip_model, **prompts)
    tip = TipAdapter(zero_shot).fit(train)
    assert (tip.alpha_, tip.beta_) == (ALPHA, BETA) == (1.17, 1.0)
    u, keys = unit_features(clip_model, batches[8][0]), unit_features(clip_model, train[0])
    scale = clip_model.logit_scale.exp().detach()
    expected = scale * u @ zero_shot.class_embeddings.T + 1.17 * plain_cache(u, keys, train[1], 1.0)
    outputs = tip.classifier().outputs(batches[8][0])
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.cosines, u @ zero_shot.class_embeddings.T)
    torch.testing.assert_close(outputs.features, u)


def test_features_and_data_fill_the_same_cache(clip_model, prompts, train, validation):
    zero_shot = zero_shot_classifier(clip_model, **prompts)
    from_data = TipAdapter(zero_shot).fit(train, validation)
    given = [Features(unit_features(clip_model, images), labels) for images, labels in (train, validation)]
    from_features = TipAdapter(zero_shot).fit(*given)
    torch.testing.assert_close(from_data.keys_, from_features.keys_)
    assert (from_data.alpha_, from_data.beta_) == (from_features.alpha_, from_features.beta_)


def test_alpha_and_beta_are_the_best_of_the_grid_on_the_validation_set(clip_model, prompts, train, validation):
    zero_shot = zero_shot_classifier(clip_model, **prompts)
    alphas, betas = (0.3, 1.0, 8.0), (0.5, 5.0, 20.0)
    tip = TipAdapter(zero_shot).fit(train, validation, alphas=alphas, betas=betas)
    found = {}
    for a, alpha in enumerate(alphas):
        for b, beta in enumerate(betas):
            one = TipAdapter(zero_shot, alpha=alpha, beta=beta).fit(train).classifier()
            outputs = one.predict(validation)
            accuracy = (outputs.logits.argmax(1) == outputs.labels).double().mean().item()
            nll = F.cross_entropy(outputs.logits, outputs.labels).item()
            assert tip.accuracies_[a][b] == accuracy and tip.nlls_[a][b] == pytest.approx(nll, rel=1e-9)
            found[alpha, beta] = (-accuracy, round(nll, 9))
    assert (tip.alpha_, tip.beta_) == min(found, key=found.get)
    assert len({accuracy for accuracy, _ in found.values()}) > 1, "a grid that can be chosen from"


def test_tip_adapter_f_equals_its_plain_restatement_at_every_step(clip_model, prompts, batches, train):
    method = TipAdapterF(clip_model, train=train, alpha=2.0, beta=3.0, **prompts)
    keys = unit_features(clip_model, train[0]).requires_grad_()
    w, scale = zero_shot_classifier(clip_model, **prompts).class_embeddings, clip_model.logit_scale.exp().detach()

    def plain_logits(images):
        u = unit_features(clip_model, images)
        return scale * u @ w.T + 2.0 * plain_cache(u, keys, train[1], 3.0)

    train_beside(
        method, [keys], batches[3:8], lambda images, labels: F.cross_entropy(plain_logits(images), labels), 0.3
    )
    torch.testing.assert_close(method.keys, keys, rtol=1e-8, atol=1e-10)
    assert (keys.norm(dim=1) - 1).abs().max() > 1e-3, "trained keys are not normalised again"
    torch.testing.assert_close(method.classifier().logits(batches[8][0]), plain_logits(batches[8][0]).detach())


def test_tip_adapter_f_starts_as_tip_adapter_and_its_choice_is_in_its_state(clip_model, prompts, train, validation):
    method = TipAdapterF(clip_model, train=train, **prompts)
    tip = TipAdapter(zero_shot_classifier(clip_model, **prompts)).fit(train)
    images = validation[0]
    torch.testing.assert_close(method.classifier().logits(images), tip.classifier().logits(images))
    tip.fit(train, validation)
    method.select(validation)
    assert (float(method.alpha), float(method.beta)) == (tip.alpha_, tip.beta_) != (ALPHA, BETA)
    other = TipAdapterF(clip_model, train=(torch.zeros_like(train[0]), train[1]), **prompts)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.classifier().logits(images), method.classifier().logits(images))


def test_a_restricted_cache_forgets_the_other_classes_before_the_softmax(clip_model, prompts, train, batches):
    classifier = TipAdapter(zero_shot_classifier(clip_model, **prompts)).fit(train).classifier()
    restricted = classifier.restrict(["cow", "ant"])
    expected = classifier.logits(batches[0][0])[:, [2, 0]]
    torch.testing.assert_close(restricted.logits(batches[0][0]), expected)
    assert restricted.classes == ("cow", "ant") and len(restricted.keys) == int((train[1] != 1).sum())


def test_bad_arguments_are_refused(clip_model, prompts, train, validation):
    zero_shot = zero_shot_classifier(clip_model, **prompts)
    biased = Classifier(clip_model, zero_shot.class_embeddings, prompts["class_names"], bias=torch.zeros(3))
    narrow = Features(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
    beyond = Features(torch.zeros(2, 8), torch.tensor([0, 3]))
    for call, message in (
        (lambda: TipAdapter(biased), "zero_shot has a bias"),
        (lambda: TipAdapter(zero_shot, alpha=-1.0), "alpha must be finite and not negative, got -1.0"),
        (lambda: TipAdapter(zero_shot).classifier(), "call fit"),
        (lambda: TipAdapter(zero_shot).fit(narrow), r"features must be \(M, 8\).*\(2, 5\)"),
        (lambda: TipAdapter(zero_shot).fit(beyond), "labels must lie in"),
        (lambda: TipAdapter(zero_shot).fit(train, validation, betas=()), "must not be empty"),
        (lambda: TipAdapter(zero_shot).fit(train, validation, betas=(float("inf"),)), "beta must be finite"),
        (lambda: TipAdapterF(clip_model, train=train, beta=-2.0, **prompts), "beta must be finite"),
        (lambda: CLIPAdapter(clip_model, ratio=1.5, **prompts), "ratio must lie"),
        (lambda: CLIPAdapter(clip_model, reduction=0, **prompts), "reduction must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_misalignment_reaches_each_adapter(clip_model, prompts, train, batches):
    """Its gradient is that of the penalty on the logits, and zero where all are right."""
    images, _ = batches[0]
    for host, arguments in ((CLIPAdapter, {}), (TipAdapterF, {"train": train})):
        plain, penalised = (
            host(clip_model, objective=Objective(misalignment=weight), **arguments, **prompts) for weight in (0.0, 1.0)
        )
        right = plain.classifier().logits(images).argmax(1)
        for labels, same in ((right, True), ((right + 1) % 3, False)):
            gradients = []
            for method in (plain, penalised):
                method.zero_grad()
                method.step((images, labels)).loss.backward()
                gradients.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.requires_grad]))
            assert torch.allclose(*gradients, rtol=1e-10, atol=1e-12) is same


def test_a_directory_without_a_whole_predictor_is_refused(clip_model, prompts, train, tmp_path):
    classifier = TipAdapter(zero_shot_classifier(clip_model, **prompts)).fit(train).classifier()
    head = classifier.save(tmp_path / "saved", CONFIG) / "classifier.safetensors"
    whole = head.read_bytes()
    for content in (b"", whole[:200], whole.replace(b"CacheClassifier", b"LatchClassifier")):
        head.write_bytes(content)
        with pytest.raises(
            ValueError, match="classifier.safetensors: (truncated|holds a LatchClassifier, expected one of)"
        ):
            load_predictor(tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="classifier.safetensors: no such file"):
        load_predictor(tmp_path)
