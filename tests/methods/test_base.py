import copy

import pytest
import torch
import torch.nn.functional as F

import robustft.methods
from robustft.methods import FLYP, CaRot, Classifier, FineTune, WiSEFT, zero_shot_classifier


def all_methods(model, prompts):
    return [
        FineTune(model, **prompts),
        FLYP(model, **prompts),
        CaRot(model, total_steps=9, ema_interval=3, **prompts),
    ]


@pytest.mark.filterwarnings("ignore:CaRot's teacher")
def test_the_loop_in_the_documentation_runs(clip_model, prompts, batches, validation):
    code = "\n".join(line[4:] for line in robustft.methods.__doc__.splitlines() if line.startswith("    "))
    space = {name: getattr(robustft.methods, name) for name in dir(robustft.methods)} | {
        "robustft": robustft,
        "model": clip_model,
        "tokenizer": prompts["tokenizer"],
        "names": prompts["class_names"],
        "templates": prompts["templates"],
        "loader": batches,
        "epochs": 2,
        "steps": 2 * len(batches),
        "images": batches[0][0],
        "validation": validation,
    }
    exec(code, space)
    assert int(space["method"].steps) == 18
    torch.testing.assert_close(space["probabilities"].sum(1), torch.ones(6, dtype=torch.float64))
    assert isinstance(space["wise"], Classifier)


def test_state_dict_carries_a_method_over_exactly(clip_model, prompts, batches):
    for first, second in zip(all_methods(clip_model, prompts), all_methods(clip_model, prompts), strict=True):
        optimizer = torch.optim.SGD([p for p in first.parameters() if p.requires_grad], lr=0.05)
        for batch in batches[:4]:
            optimizer.zero_grad()
            first.step(batch).loss.backward()
            optimizer.step()
            first.after_step()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        a, b = first.step(batches[4]), second.step(batches[4])
        assert torch.equal(a.loss, b.loss) and int(second.steps) == 4
        assert torch.equal(first.classifier().logits(batches[0][0]), second.classifier().logits(batches[0][0]))


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda x, y: (x, y + 2), ValueError, r"labels must lie in \[0, K\) with K = 3 classes, got [34]"),
        (lambda x, y: (x, y - 3), ValueError, "got -"),
        (lambda x, y: (x, y.float()), TypeError, "labels must be an integer tensor .*float32"),
        (lambda x, y: (x, y > 1), TypeError, "labels must be an integer tensor .*bool"),
        (lambda x, y: {"image": x, "label": y.tolist()}, TypeError, "labels must be an integer tensor .*list"),
        (lambda x, y: (x, y[:5]), ValueError, r"labels must have shape \(6,\).*\(5,\)"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "batch is empty"),
        (lambda x, y: (x[0], y), TypeError, r"images must be a tensor \(N, C, H, W\), got \(3, 8, 8\)"),
        (lambda x, y: ((255 * x).byte(), y), TypeError, "images must be floating point.*uint8"),
        (lambda x, y: (x.to("meta"), y), ValueError, "images are on meta, the model is on cpu"),
        (lambda x, y: (x, y, y), TypeError, "batch must be .*tuple of 3"),
        (lambda x, y: x, TypeError, "batch must be .*Tensor"),
        (lambda x, y: {"pixel_values": x}, ValueError, "pixel_values"),
        (lambda x, y: (x, ["a"] * 5), ValueError, "one text for each of the 6 images, got 5"),
        (lambda x, y: (x, "a"), TypeError, "texts must be a list"),
        (lambda x, y: (x, torch.rand(6, 15)), TypeError, "text tokens must be integers"),
        (
            lambda x, y: (x, y[:, None]),
            ValueError,
            r"text tokens must be \(N, 15\).*got \(6, 1\); labels would be \(N,\)",
        ),
        (lambda x, y: {"image": x, "text": y[:, None]}, ValueError, r"text tokens must be \(N, 15\)"),
    ],
)
def test_bad_batches_are_refused_with_a_reason(clip_model, prompts, batches, spoil, error, message):
    with pytest.raises(error, match=message):
        FLYP(clip_model, **prompts).step(spoil(*batches[0]))


def test_classifier_restricts_before_the_softmax_by_index_or_name(clip_model, prompts, batches):
    classifier = zero_shot_classifier(clip_model, **prompts)
    images = batches[0][0]
    expected = classifier.logits(images)[:, [2, 0]].softmax(-1)
    for classes in ([2, 0], ["cow", "ant"]):
        restricted = classifier.restrict(classes)
        assert restricted.classes == ("cow", "ant")
        torch.testing.assert_close(restricted.probabilities(images), expected)
    for classes in ([0, 3], [1, 1], [], [-1]):
        with pytest.raises(ValueError, match="distinct indices"):
            classifier.restrict(classes)
    with pytest.raises(ValueError, match="dog"):
        classifier.restrict(["ant", "dog"])
    twins = Classifier(clip_model, classifier.class_embeddings, ["crane", "bee", "crane"])
    with pytest.raises(ValueError, match="crane"):
        twins.restrict(["crane"])
    assert twins.restrict([2]).classes == ("crane",)


def test_classifier_outputs_follow_their_definition_with_a_free_head_and_bias(clip_model, batches):
    w, b = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    outputs = Classifier(clip_model, w, ["a", "b", "c"], logit_scale=7.0, bias=b).outputs(batches[0][0])
    u = F.normalize(clip_model.encode_image(batches[0][0]), dim=-1)
    torch.testing.assert_close(outputs.features, u)
    torch.testing.assert_close(outputs.cosines, F.cosine_similarity(u[:, None], w[None], dim=-1))
    torch.testing.assert_close(outputs.logits, 7.0 * u @ w.T + b)


def test_classifier_uses_the_models_own_scale(clip_model, prompts, batches):
    with torch.no_grad():
        clip_model.logit_scale.fill_(1.0)
    outputs = zero_shot_classifier(clip_model, **prompts).outputs(batches[0][0])
    torch.testing.assert_close(outputs.logits, outputs.cosines * torch.tensor(1.0).double().exp())


def test_classifier_evaluates_and_gives_every_module_its_mode_back(clip_model, prompts, batches):
    clip_model.train()
    clip_model.visual.ln_pre.eval()
    modes = [m.training for m in clip_model.modules()]
    seen = []
    clip_model.visual.register_forward_hook(lambda module, *_: seen.append(module.training))
    zero_shot_classifier(clip_model, **prompts).logits(batches[0][0])
    assert seen == [False] and [m.training for m in clip_model.modules()] == modes


def test_predict_over_tensors_and_datasets_equals_one_large_batch(clip_model, prompts, validation):
    classifier = zero_shot_classifier(clip_model, **prompts)
    images, labels = validation
    expected = classifier.outputs(images)
    for data in (validation, torch.utils.data.TensorDataset(images, labels)):
        outputs = classifier.predict(data, batch_size=7)
        assert torch.equal(outputs.labels, labels)
        torch.testing.assert_close(tuple(outputs.replace(labels=None)), tuple(expected))
        assert not outputs.logits.requires_grad
    with pytest.raises(ValueError, match="empty"):
        classifier.predict((images[:0], labels[:0]))


def test_head_of_the_wrong_size_is_refused(clip_model):
    with pytest.raises(ValueError, match=r"class_embeddings must be \(K, D\).*2 classes.*\(3, 8\)"):
        Classifier(clip_model, torch.zeros(3, 8), ["a", "b"])


def test_half_precision_models_give_single_precision_outputs(clip_model, prompts, batches):
    classifier = zero_shot_classifier(clip_model.bfloat16(), **prompts)
    outputs = classifier.outputs(batches[0][0].bfloat16())
    assert {part.dtype for part in outputs} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            tuple(classifier.outputs(batches[0][0].bfloat16())), tuple(outputs), atol=0.3, rtol=0.05
        )


def test_methods_without_randomness_of_their_own_agree_with_the_zero_shot_model_before_training(
    clip_model, prompts, batches
):
    images = batches[0][0]
    expected = zero_shot_classifier(clip_model, **prompts).logits(images)
    for method in all_methods(clip_model, prompts):
        torch.testing.assert_close(method.classifier().logits(images), expected)
    wise = WiSEFT(zero_shot_classifier(clip_model, **prompts), method.classifier())
    torch.testing.assert_close(wise.at(0.3).logits(images), expected)
