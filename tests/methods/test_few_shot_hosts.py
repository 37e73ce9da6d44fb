"""What holds for every prompt learner and every adapter that is trained."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from small_options import PROMPTED

import robustft
from robustft import clip
from robustft.methods import (
    CLIPAdapter,
    CoOp,
    KgCoOp,
    LoCoOp,
    MaPLe,
    OutputEnsemble,
    ProDA,
    TipAdapterF,
    WiSEFT,
    load_predictor,
    zero_shot_classifier,
)
from robustft.methods.objective import Objective

HOSTS = [*PROMPTED, CLIPAdapter, TipAdapterF]


def made(host, model, prompts, batches, **arguments):
    prompts = {**prompts, "templates": ("a {}",)}
    train = {"train": batches[8]} if host is TipAdapterF else {}
    return host(model, **PROMPTED.get(host, {}), **train, **prompts, **arguments)


def gradient(method, batch):
    """The step's terms and the gradient of all that is trained, as one vector."""
    method.zero_grad()
    out = method.step(batch)
    out.loss.backward()
    return out, torch.cat([p.grad.flatten() for p in method.parameters() if p.requires_grad])


@pytest.mark.parametrize("host", HOSTS)
def test_misalignment_adds_its_own_gradient(clip_model, prompts, batches, host):
    """That of the term, by central differences along a direction, and none where every label is on top."""
    plain, penalised = (
        made(host, clip_model, prompts, batches, objective=Objective(misalignment=weight)) for weight in (0.0, 1.0)
    )
    images = batches[0][0]
    top = plain.classifier().logits(images).argmax(1)
    (calm, g0), (out, g1) = (gradient(method, (images, (top + 1) % 3)) for method in (plain, penalised))
    torch.testing.assert_close(out.loss, calm.loss + out.terms["misalignment"])
    assert out.terms["misalignment"] > 0 and set(out.terms) == {*calm.terms, "misalignment"}
    direction = torch.randn(g0.shape, generator=torch.Generator().manual_seed(0), dtype=g0.dtype)
    terms = []
    for sign in (1, -1):
        moved, places = copy.deepcopy(penalised), iter(direction)
        with torch.no_grad():
            for p in moved.parameters():
                if p.requires_grad:
                    p += sign * 1e-6 * torch.stack([next(places) for _ in range(p.numel())]).view_as(p)
            terms.append(moved.step((images, (top + 1) % 3)).terms["misalignment"])
    torch.testing.assert_close((g1 - g0) @ direction, (terms[0] - terms[1]) / 2e-6, rtol=1e-5, atol=1e-7)
    # ProDA's training logits hold a variance, which may put another class on top.
    if host is not ProDA:
        (_, g0), (out, g1) = (gradient(method, (images, top)) for method in (plain, penalised))
        assert out.terms["misalignment"] == 0
        torch.testing.assert_close(g1, g0)


@pytest.mark.parametrize("host", HOSTS)
def test_checkpoints_hold_no_frozen_model_and_are_not_resumed_on_another(clip_model, prompts, batches, tmp_path, host):
    recipe = {"epochs": 1, "batch_size": 6, "lr": 0.01, "progress": False, "output": tmp_path}
    method = made(host, clip_model, prompts, batches, total_steps=1)
    robustft.fit(method, batches[0], **recipe)
    assert not any(name.startswith("model.") for name in method.state_dict())
    with torch.no_grad():
        clip_model.logit_scale += 0.1
    with pytest.raises(ValueError, match="under another configuration.*method.model was"):
        robustft.fit(made(host, clip_model, prompts, batches, total_steps=1), batches[0], resume=True, **recipe)


@pytest.mark.parametrize("host", HOSTS)
def test_training_leaves_the_model_as_it_was_and_learns(clip_model, prompts, batches, host):
    method = made(host, clip_model, prompts, batches)
    before = copy.deepcopy(method.model.state_dict())
    first = method.step(batches[0]).loss.item()
    robustft.fit(method, batches[0], epochs=30, batch_size=6, lr=0.05, weight_decay=0.0, progress=False)
    assert method.step(batches[0]).loss.item() < first
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())


@pytest.mark.parametrize("host", [host for host in HOSTS if host is not MaPLe])
def test_running_statistics_of_a_resnet_tower_are_used_and_kept(resnet_model, prompts, resnet_batches, host):
    method = made(host, resnet_model, prompts, resnet_batches).train()
    before = copy.deepcopy(method.model.state_dict())
    images, labels = resnet_batches[0]
    whole = method.classifier().logits(images)
    alone = torch.cat([method.classifier().logits(image[None]) for image in images])
    torch.testing.assert_close(alone, whole)
    _, g = gradient(method, (images, labels))
    assert g.isfinite().all() and g.norm() > 0
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())


@pytest.mark.parametrize("host", HOSTS)
def test_saved_classifiers_come_back_with_the_same_predictions(prompts, batches, tmp_path, host):
    config = {
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 2},
            "text_cfg": {"context_length": 15, "vocab_size": 30, "width": 8, "heads": 2, "layers": 2},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }
    torch.manual_seed(3)
    model = open_clip.CLIP(**config["model_cfg"])
    single = [(images.float(), labels) for images, labels in batches]
    method = made(host, model, prompts, single)
    robustft.fit(method, single[0], epochs=2, batch_size=6, lr=0.05, progress=False)
    images = single[1][0]
    classifier = method.classifier()
    for saved in (classifier, classifier.restrict(["cow", "ant"])):
        loaded = load_predictor(saved.save(tmp_path / "saved", config))
        assert type(loaded) is type(saved) and loaded.classes == saved.classes
        for found, expected in zip(loaded.outputs(images), saved.outputs(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loaded.logits(images), classifier.logits(images)[:, [2, 0]])


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_compose_with_ensembles_and_what_has_no_fixed_head_is_no_part_of_wise_ft(
    clip_model, prompts, batches, host
):
    zero_shot = zero_shot_classifier(clip_model, **prompts)
    classifier = made(host, clip_model, prompts, batches).classifier()
    images = batches[0][0]
    expected = 0.5 * zero_shot.probabilities(images) + 0.5 * classifier.probabilities(images)
    torch.testing.assert_close(OutputEnsemble(zero_shot, classifier).at(0.5).probabilities(images), expected)
    if host in (CoOp, KgCoOp, LoCoOp, ProDA):
        torch.testing.assert_close(WiSEFT(zero_shot, classifier).at(1.0).logits(images), classifier.logits(images))
    else:
        with pytest.raises(TypeError, match="fine_tuned must be a Classifier.*OutputEnsemble mixes"):
            WiSEFT(zero_shot, classifier)


@pytest.mark.parametrize("host", HOSTS)
def test_unit_features_in_the_images_place_train_alike_where_the_method_takes_them(clip_model, prompts, batches, host):
    images, labels = batches[0]
    u = clip.encode_images(clip_model, images).detach()
    first, second = (made(host, clip_model, prompts, batches) for _ in range(2))
    if host in (LoCoOp, MaPLe, CLIPAdapter):
        with pytest.raises(TypeError, match=r"images must be a tensor \(N, C, H, W\)"):
            second.step((u, labels))
        return
    torch.testing.assert_close(gradient(second, (u, labels)), gradient(first, (images, labels)))
