"""Models with a bias, SigLIP's: FLYP, CaRot and DRM train them by sigmoids, and freeze what the loss does not need."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny_clip import CONFIG

from robustft import clip
from robustft.methods import DRM, FLYP, CaRot, FineTune, LinearProbe, load_predictor, zero_shot_classifier

DESCRIPTIONS = {"ant": "six legs", "bee": "striped", "cow": "horns"}
BIASED = {**CONFIG["model_cfg"], "init_logit_bias": -3.0, "init_logit_scale": 2.0}


@pytest.fixture
def biased():
    torch.manual_seed(0)
    return open_clip.CLIP(**copy.deepcopy(BIASED)).double()


def sigmoid_terms(model, teacher, images, tokens, positive):
    """Contrastive loss and distillation of N x N matrices, from the formulas, in their own numbers."""

    def logits(m):
        u, t = F.normalize(m.encode_image(images), dim=-1), F.normalize(m.encode_text(tokens), dim=-1)
        return m.logit_scale.exp() * u @ t.T + m.logit_bias

    z = logits(model)
    contrastive = F.softplus(-(2.0 * positive - 1.0) * z).sum() / len(z)
    with torch.no_grad():
        p = logits(teacher).sigmoid()
    return contrastive, -(p * F.logsigmoid(z) + (1 - p) * F.logsigmoid(-z)).sum() / len(z)


@pytest.mark.parametrize("targets", ["diagonal", "label"])
def test_flyp_and_carot_equal_their_plain_restatement_at_every_step(biased, prompts, batches, targets):
    single = prompts | {"templates": ("a {}",), "targets": targets}
    still = {"cross_weight": 0.0, "orthogonality_weight": 0.0, "ema_interval": 2, "ema_start": 0.3, "ema_end": 0.3}
    for make in (FLYP, lambda model, **options: CaRot(model, total_steps=4, **still, **options)):
        method = make(biased, **single)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
        student, teacher = copy.deepcopy(biased), copy.deepcopy(biased)
        plain = torch.optim.SGD(student.parameters(), lr=0.05)
        for step, (images, labels) in enumerate(batches[:4]):
            tokens = single["tokenizer"]([f"a {single['class_names'][label]}" for label in labels.tolist()])
            positive = torch.eye(6) if targets == "diagonal" else (labels[:, None] == labels[None]).double()
            contrastive, distillation = sigmoid_terms(student, teacher, images, tokens, positive)
            distils = isinstance(method, CaRot) and step > 0
            loss = contrastive + (1.5 * distillation if distils else 0.0)
            out = method.step((images, labels))
            torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-12)
            assert ("distillation" in out.terms) == distils
            for value, descent in ((out.loss, optimizer), (loss, plain)):
                descent.zero_grad()
                value.backward()
                descent.step()
            method.after_step()
            if isinstance(method, CaRot) and step % 2 == 0:
                for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.data.lerp_(s.data, 0.7)
        for (name, p), q in zip(method.model.named_parameters(), student.named_parameters(), strict=True):
            torch.testing.assert_close(p, q[1], rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert not torch.equal(method.model.logit_bias, biased.logit_bias)


def test_the_loss_is_the_one_that_the_model_was_made_for_unless_it_is_named(biased, clip_model, prompts, batches):
    for model, options, expected in (
        (biased, {}, "sigmoid"),
        (biased, {"loss": "softmax"}, "softmax"),
        (biased, {"loss": "sigmoid"}, "sigmoid"),
        (clip_model, {}, "softmax"),
    ):
        method = FLYP(model, **options, **prompts)
        assert method.config["loss"] == expected
        softmax = FLYP(clip_model, **prompts)
        softmax.model.load_state_dict(method.model.state_dict(), strict=False)
        same = torch.allclose(method.step(batches[0]).loss, softmax.step(batches[0]).loss)
        assert same == (expected == "softmax")
    with pytest.raises(ValueError, match='loss="sigmoid" needs a model with a logit_bias.*"init_logit_bias": -10'):
        FLYP(clip_model, loss="sigmoid", **prompts)
    with pytest.raises(ValueError, match='loss must be "auto", "softmax" or "sigmoid", got \'ce\''):
        FLYP(clip_model, loss="ce", **prompts)


def test_label_smoothing_goes_with_a_softmax_alone(biased, prompts):
    for method, options in ((FLYP, {}), (DRM, {"descriptions": DESCRIPTIONS})):
        with pytest.raises(ValueError, match='label_smoothing is 0.1; expected 0.*loss="softmax" has it'):
            method(biased, label_smoothing=0.1, **options, **prompts)
        method(biased, label_smoothing=0.1, loss="softmax", **options, **prompts)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_what_is_trained_gets_a_gradient_and_the_rest_is_frozen(biased, prompts, batches, loss):
    """DistributedDataParallel fails for a parameter that wants a gradient and gets none."""
    proxy = torch.full((6,), 0.5, dtype=torch.float64)
    batch = {"image": batches[0][0], "label": batches[0][1], "core": proxy}
    drm = {"descriptions": DESCRIPTIONS, "proxy": None}
    for method in (
        FLYP(biased, loss=loss, **prompts),
        CaRot(biased, loss=loss, total_steps=4, **prompts),
        DRM(biased, loss=loss, **drm, **prompts),
        DRM(biased, loss=loss, empirical_weight=0.0, **drm, **prompts),
        FineTune(biased, **prompts),
        LinearProbe(biased, **prompts),
    ):
        method.step(batch).loss.backward()
        idle = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, (type(method).__name__, idle)
        by_sigmoid = (
            loss == "sigmoid" and method.config.get("empirical_weight", 1.0) != 0.0 and hasattr(method, "targets")
        )
        assert method.model.logit_bias.requires_grad == by_sigmoid
    assert biased.logit_bias.requires_grad  # of the model that was given


def test_match_probabilities_are_the_models_own_sigmoids_and_come_back_from_disk(biased, prompts, batches, tmp_path):
    images, config = batches[0][0], {"model_cfg": BIASED, "preprocess_cfg": {}}
    classifier = zero_shot_classifier(biased, **prompts)
    with torch.no_grad():
        u = F.normalize(biased.encode_image(images), dim=-1)
        expected = (biased.logit_scale.exp() * u @ classifier.class_embeddings.T + biased.logit_bias).sigmoid()
        found = classifier.match_probabilities(images)
        torch.testing.assert_close(found, expected)
        two = classifier.restrict(("cow", "ant"))
        torch.testing.assert_close(two.match_probabilities(images), found[:, [2, 0]])
        biased.float()
        exported = zero_shot_classifier(biased, **prompts).save(tmp_path / "export", config)
        torch.testing.assert_close(
            load_predictor(exported).match_probabilities(images.float()), found, rtol=0, atol=1e-4
        )


def test_a_classifier_that_no_sigmoid_trained_has_no_match_probabilities(biased, clip_model, prompts, batches):
    for classifier in (
        zero_shot_classifier(clip_model, **prompts),
        FLYP(biased, loss="softmax", **prompts).classifier(),
        FineTune(biased, **prompts).classifier(),
    ):
        with pytest.raises(ValueError, match="no logit_bias"):
            classifier.match_probabilities(batches[0][0])
    assert FLYP(biased, **prompts).classifier().logit_bias is not None


def test_the_models_bias_changes_no_probability_of_classes(biased, prompts, batches):
    classifier = zero_shot_classifier(biased, **prompts)
    before = classifier.probabilities(batches[0][0])
    with torch.no_grad():
        biased.logit_bias += 5.0
    torch.testing.assert_close(zero_shot_classifier(biased, **prompts).probabilities(batches[0][0]), before)
    assert clip.logit_bias(biased).item() == 2.0
