from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from faulty import interrupt
from steps import step_each

from robustft import clip
from robustft.clip.prompts import read_descriptions
from robustft.methods import (
    DRM,
    FLYP,
    CoreProxy,
    DualClassifier,
    OutputEnsemble,
    WiSEFT,
    core_labels,
    load_predictor,
    zero_shot_classifier,
)
from robustft.training.loop import fit

DESCRIPTIONS = {"ant": ("six legs", "dark and thin"), "bee": "striped", "cow": ("horns", "large", "it moos")}
AFFINITY = CoreProxy(one_hot=0.0, spread=False)


@pytest.fixture
def described(prompts):
    return prompts | {"templates": ("a {}",), "descriptions": DESCRIPTIONS}


def optimizer_of(method, lr=0.05):
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)


def plain_core_embeddings(model, prompts):
    """Class by class: the unit mean of the unit features of its descriptions."""
    rows = []
    for name in prompts["class_names"]:
        texts = DESCRIPTIONS[name]
        features = model.encode_text(prompts["tokenizer"]([texts] if isinstance(texts, str) else list(texts)))
        rows.append(F.normalize(F.normalize(features, dim=-1).mean(0), dim=0))
    return torch.stack(rows)


def plain_affinity(model, images, labels, prompts):
    """Image by image: where its similarity to its class's descriptions lies among those of its class."""
    core = plain_core_embeddings(model, prompts)
    own = (F.normalize(model.encode_image(images), dim=-1) * core[labels]).sum(1)
    result = []
    for value, label in zip(own, labels, strict=True):
        same = own[labels == label]
        result.append((value - same.min()) / (same.max() - same.min()))
    return torch.stack(result).detach()


@pytest.mark.parametrize("weight, on_the_fly", [(1.0, True), (0.3, False)])
def test_drm_equals_its_plain_restatement_at_every_step(clip_model, described, batches, weight, on_the_fly):
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    q = plain_affinity(clip_model, images, labels, described)
    method = DRM(clip_model, worst_case_weight=weight, proxy=AFFINITY if on_the_fly else None, **described)
    if on_the_fly:
        method.prepare((images, labels))
    student = copy.deepcopy(clip_model)
    optimizer, plain = optimizer_of(method), torch.optim.SGD(student.parameters(), lr=0.05)
    for number, (x, y) in enumerate(batches):
        mine = q[6 * number : 6 * number + 6]
        out = method.step((x, y) if on_the_fly else {"image": x, "label": y, "core": mine})
        u = F.normalize(student.encode_image(x), dim=-1)
        names = [f"a {described['class_names'][label]}" for label in y.tolist()]
        t = F.normalize(student.encode_text(described["tokenizer"](names)), dim=-1)
        s, diagonal = student.logit_scale.exp(), torch.arange(6)
        contrastive = (F.cross_entropy(s * u @ t.T, diagonal) + F.cross_entropy(s * t @ u.T, diagonal)) / 2
        z = s * u @ plain_core_embeddings(student, described).T
        worst_case = -(mine * z.log_softmax(1)[diagonal, y]).mean()
        loss = contrastive + weight * worst_case
        # the proxy on the fly was ranged in float32
        torch.testing.assert_close(out.terms["contrastive"], contrastive.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.terms["worst_case"], worst_case.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
        step_each((optimizer, out.loss), (plain, loss))
        method.after_step()
    for (name, p), r in zip(method.model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, r, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    mixture = method.classifier().probabilities(images)
    with torch.no_grad():
        u = F.normalize(student.encode_image(images), dim=-1)
        w = F.normalize(student.encode_text(described["tokenizer"](["a ant", "a bee", "a cow"])), dim=-1)
        s, v = student.logit_scale.exp(), plain_core_embeddings(student, described)
        expected = ((s * u @ w.T).softmax(1) + (s * u @ v.T).softmax(1)) / 2
    torch.testing.assert_close(mixture, expected, rtol=1e-4, atol=1e-6)


def test_affinity_by_hand():
    similarities = torch.tensor([[0.2, 0.9], [0.3, 0.0], [0.6, 0.1], [0.1, 0.5], [0.8, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1])
    ranges = CoreProxy.ranges(similarities, labels)
    assert ranges.own.tolist() == [[0.2, 0.5], [0.6, 0.5]]
    assert ranges.all.tolist() == [[0.1, 0.0], [0.8, 0.9]]
    q = AFFINITY(similarities, labels, ranges)
    torch.testing.assert_close(q, torch.tensor([0.0, 0.25, 1.0, 1.0, 1.0], dtype=torch.float64))  # a point is 1
    mixed = CoreProxy(one_hot=0.2, spread=False)(similarities, labels, ranges)
    torch.testing.assert_close(mixed, 0.8 * q + 0.2)
    beyond = AFFINITY(torch.tensor([[-1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]), ranges)
    assert beyond.tolist() == [0.0, 1.0]
    # Of two classes, the other one takes all that is left.
    spread = CoreProxy(one_hot=0.0)(similarities, labels, ranges)
    torch.testing.assert_close(
        spread, torch.stack((q, 1 - q), 1)[torch.arange(5)[:, None], [[0, 1]] * 3 + [[1, 0]] * 2]
    )


def test_soft_labels_by_hand_do_not_depend_on_a_class_offset_or_spread():
    similarities = torch.tensor([[0.2, 0.9, 0.5], [0.3, 0.0, 0.1], [0.6, 0.1, 0.3]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    soft = CoreProxy("soft", temperature=0.5, one_hot=0.0)
    ranges = CoreProxy.ranges(similarities, labels)
    q = soft(similarities, labels, ranges)
    first = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64) / 0.5
    torch.testing.assert_close(q[0], first.exp() / first.exp().sum())
    moved = similarities * torch.tensor([1.0, 2.0, 0.3]) + torch.tensor([5.0, 0.0, -1.0])
    torch.testing.assert_close(soft(moved, labels, CoreProxy.ranges(moved, labels)), q)
    mixed = CoreProxy("soft", temperature=0.5, one_hot=0.25)(
        similarities, labels, CoreProxy.ranges(similarities, labels)
    )
    torch.testing.assert_close(mixed, 0.75 * q + 0.25 * torch.eye(3, dtype=torch.float64))


def test_spread_shares_the_rest_in_proportion_to_the_soft_labels():
    torch.manual_seed(0)
    similarities, labels = torch.rand(20, 5, dtype=torch.float64), torch.arange(20) % 5
    ranges = CoreProxy.ranges(similarities, labels)
    q = CoreProxy(temperature=0.01, one_hot=0.0)(similarities, labels, ranges)
    soft = CoreProxy("soft", temperature=0.01, one_hot=0.0)(similarities, labels, ranges)
    own = F.one_hot(labels).bool()
    torch.testing.assert_close(q[own], AFFINITY(similarities, labels, ranges))
    torch.testing.assert_close(q.sum(1), torch.ones(20, dtype=torch.float64))
    rest = soft.masked_fill(own, 0.0)
    rest = rest / rest.sum(1, keepdim=True)
    torch.testing.assert_close(q.masked_fill(own, 0.0), rest * (1 - q[own])[:, None])


def test_by_default_no_image_is_taught_another_class():
    torch.manual_seed(0)
    similarities, labels = torch.rand(200, 5), torch.arange(200) % 5
    q = CoreProxy()(similarities, labels, CoreProxy.ranges(similarities, labels))
    assert torch.equal(q.argmax(1), labels) and q.gather(1, labels[:, None]).min() >= 0.5


def test_a_class_without_images_counts_in_full_when_one_turns_up():
    similarities = torch.rand(4, 3)
    ranges = CoreProxy.ranges(similarities, torch.tensor([0, 0, 1, 1]))
    assert AFFINITY(similarities[:1], torch.tensor([2]), ranges).tolist() == [1.0]


@pytest.mark.parametrize("proxy", [AFFINITY, CoreProxy("soft"), CoreProxy(one_hot=0.1)])
def test_the_proxy_on_the_fly_is_the_one_computed_once(clip_model, described, batches, proxy, tmp_path):
    data = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    names = {key: value for key, value in described.items() if key != "templates"}
    once = core_labels(clip_model, data, proxy=proxy, cache=tmp_path, **names)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert torch.equal(core_labels(clip_model, data, proxy=proxy, cache=tmp_path, **names), once)
    assert file.stat().st_mtime_ns == written, "the second time, no image is encoded"
    method = DRM(clip_model, proxy=proxy, **described).prepare(data, cache=tmp_path)
    given = DRM(clip_model, proxy=None, **described)
    for number, (x, y) in enumerate(batches[:3]):
        core = once[6 * number : 6 * number + 6]
        expected = given.step({"image": x, "label": y, "core": core}).terms["worst_case"]
        actual = method.step((x, y)).terms["worst_case"]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_soft_labels_of_the_classes_present_are_dropped_elsewhere_not_renormalised(clip_model, described, batches):
    images, labels = batches[0][0], torch.tensor([2, 0, 0, 2, 2, 0])
    q = torch.rand(6, 3, dtype=torch.float64)
    method = DRM(clip_model, proxy=None, present_only=True, empirical_weight=0.0, **described)
    value = method.step({"image": images, "label": labels, "core": q}).loss
    u, v = F.normalize(clip_model.encode_image(images), dim=-1), plain_core_embeddings(clip_model, described)
    z = clip_model.logit_scale.exp() * u @ v[[0, 2]].T
    torch.testing.assert_close(value, -(q[:, [0, 2]] * z.log_softmax(1)).sum(1).mean(), rtol=1e-9, atol=0)
    confidences = method.step({"image": images, "label": labels, "core": q[:, 0]}).loss
    expected = -(q[:, 0] * z.log_softmax(1).gather(1, labels[:, None] // 2)[:, 0]).mean()
    torch.testing.assert_close(confidences, expected, rtol=1e-9, atol=0)


def test_without_a_worst_case_it_is_flyp_and_without_an_empirical_risk_cross_entropy(clip_model, described, batches):
    flyp = {key: value for key, value in described.items() if key != "descriptions"}
    methods = DRM(clip_model, worst_case_weight=0.0, **described).prepare(batches[0]), FLYP(clip_model, **flyp)
    outs = [method.step(batches[0]) for method in methods]
    assert torch.equal(outs[0].loss, outs[1].loss) and outs[0].terms.keys() == {"contrastive"}
    assert methods[0].state_dict().keys() == methods[1].state_dict().keys(), "no frozen model is kept"
    images, labels = batches[0]
    single = DRM(clip_model, empirical_weight=0.0, proxy=CoreProxy(one_hot=1.0), **described).prepare(batches[1])
    u, v = F.normalize(clip_model.encode_image(images), dim=-1), plain_core_embeddings(clip_model, described)
    expected = F.cross_entropy(clip_model.logit_scale.exp() * u @ v.T, labels)
    torch.testing.assert_close(single.step((images, labels)).loss, expected, rtol=1e-9, atol=0)


def test_chunks_and_recomputing_change_no_gradient(clip_model, described, batches):
    whole, chunked = (DRM(clip_model, proxy=None, text_chunk=chunk, **described) for chunk in (256, 2))
    for method in (whole, chunked):
        images, labels = batches[0]
        method.step({"image": images, "label": labels, "core": torch.full((6,), 0.5)}).loss.backward()
    for p, q in zip(whole.model.parameters(), chunked.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_run_that_stops_resumes_bit_for_bit(clip_model, described, batches, tmp_path):
    images, labels = (torch.cat(parts) for parts in zip(*batches[:4], strict=True))
    data, settings = (images, labels), {"epochs": 2, "batch_size": 6, "lr": 1e-2, "progress": False}

    def make():
        return DRM(clip_model, **described)

    whole = make().prepare(data)
    history = fit(whole, data, output=tmp_path / "whole", **settings)
    broken = make().prepare(data)
    interrupt(broken, 6)
    with pytest.raises(InterruptedError):
        fit(broken, data, output=tmp_path / "broken", **settings)
    resumed = make()  # its ranges come with the checkpoint
    assert fit(resumed, data, output=tmp_path / "broken", resume=True, **settings).records == history.records
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resnet_is_trained_and_its_frozen_copy_stays(resnet_model, described, resnet_batches, precision):
    resnet = resnet_model.float()
    data = torch.cat([images for images, _ in resnet_batches[:2]]).float(), torch.arange(12) % 3
    before = copy.deepcopy(resnet.state_dict())
    method = DRM(resnet, **described).prepare(data)
    frozen = copy.deepcopy(method.zero_shot.state_dict())
    fit(method, data, epochs=2, batch_size=6, lr=1e-3, precision=precision, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())
    assert all(torch.equal(value, frozen[name]) for name, value in method.zero_shot.state_dict().items())
    assert not torch.equal(method.model.visual.bn1.running_mean, before["visual.bn1.running_mean"])
    assert not torch.equal(method.model.text_projection, before["text_projection"])
    logits = method.classifier().logits(data[0])
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(12))


def test_the_mixture_is_exact_at_every_beta_and_restricts_before_the_softmax(clip_model, described, batches):
    dual = DRM(clip_model, worst_case_weight=0.0, beta=0.3, **described).classifier()
    images = batches[0][0]
    df, cd = dual.default.outputs(images), dual.core.outputs(images)
    for beta, classifier in ((0.3, dual), (0.0, dual.at(0.0)), (1.0, dual.at(1.0)), (0.8, dual.at(0.8))):
        out = classifier.outputs(images)
        expected = beta * df.logits.softmax(1) + (1 - beta) * cd.logits.softmax(1)
        torch.testing.assert_close(out.logits.exp(), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(classifier.probabilities(images), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(out.cosines, beta * df.cosines + (1 - beta) * cd.cosines)
        assert torch.equal(out.features, df.features)
    some = dual.restrict(["cow", "ant"])
    assert some.classes == ("cow", "ant")
    expected = 0.3 * df.logits[:, [2, 0]].softmax(1) + 0.7 * cd.logits[:, [2, 0]].softmax(1)
    torch.testing.assert_close(some.probabilities(images), expected, rtol=1e-12, atol=0)


def test_one_image_pass_serves_both_heads(clip_model, described, batches, monkeypatch):
    dual = DRM(clip_model, worst_case_weight=0.0, **described).classifier()
    calls = []
    original = clip.encode_images
    monkeypatch.setattr(clip, "encode_images", lambda *a, **k: calls.append(1) or original(*a, **k))
    dual.outputs(batches[0][0])
    assert len(calls) == 1


def test_heads_and_mixture_compose_with_the_ensembles(clip_model, described, batches):
    images, labels = batches[0]
    zero_shot = zero_shot_classifier(clip_model, **{k: v for k, v in described.items() if k != "descriptions"})
    method = DRM(clip_model, proxy=None, **described)
    with torch.no_grad():
        method.model.visual.proj.mul_(-1)
    dual = method.classifier()
    half = OutputEnsemble(zero_shot, dual).at(0.5).probabilities(images)
    torch.testing.assert_close(half, (zero_shot.probabilities(images) + dual.probabilities(images)) / 2)
    torch.testing.assert_close(WiSEFT(zero_shot, dual.default).at(1.0).logits(images), dual.default.logits(images))
    torch.testing.assert_close(dual.predict((images, labels)).logits, dual.logits(images))


def test_a_dual_classifier_comes_back_bit_for_bit(tmp_path):
    from robustft.data import glyphworld

    bundle = glyphworld.load_clip()
    torch.manual_seed(0)
    heads = torch.randn(2, 3, 64)
    saved = DualClassifier(bundle.model, *heads, ["a", "b", "é"], beta=0.3, logit_scale=7.5)
    loaded = load_predictor(saved.save(tmp_path / "dual", bundle.config))
    assert isinstance(loaded, DualClassifier) and loaded.classes == saved.classes
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in saved.state_dict().items())


def test_descriptions_are_matched_by_name_or_refused(clip_model, described, tmp_path):
    renamed = described | {"descriptions": {"ant": "x", "bee": "y", "cov": "z"}}
    with pytest.raises(ValueError, match="no description of 'cow'; no class called 'cov'"):
        DRM(clip_model, **renamed)
    with pytest.raises(ValueError, match="2 entries cannot be matched by position to 3"):
        DRM(clip_model, **(described | {"descriptions": ["x", "y"]}))
    path = tmp_path / "concepts.json"
    path.write_text('{"cow": "horns", "ant": ["six legs"], "bee": "striped"}')
    method = DRM(clip_model, **(described | {"descriptions": read_descriptions(path, described["class_names"])}))
    assert method.descriptions == (("six legs",), ("striped",), ("horns",))
    path.write_text('{"cow": "horns", "ant": "six legs", "bee": "striped", "ant": "none"}')
    with pytest.raises(ValueError, match="duplicate keys 'ant'"):
        read_descriptions(path, described["class_names"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"worst_case_weight": -1.0}, "worst_case_weight must be finite and not negative, got -1.0"),
        ({"worst_case_weight": 0.0, "empirical_weight": 0.0}, "nothing to train on"),
        ({"text_chunk": 0}, "text_chunk must be at least 1, got 0"),
        ({"beta": 1.1}, r"beta must lie in \[0, 1\], got 1.1"),
    ],
)
def test_arguments_out_of_range_are_refused(clip_model, described, arguments, message):
    with pytest.raises(ValueError, match=message):
        DRM(clip_model, **described, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "hard"}, "kind must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"one_hot": 1.5}, "one_hot must lie in"),
    ],
)
def test_proxies_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoreProxy(**arguments)


def test_what_the_proxy_needs_is_said(clip_model, described, batches):
    images, labels = batches[0]
    with pytest.raises(ValueError, match="call prepare"):
        DRM(clip_model, **described).step(batches[0])
    given = DRM(clip_model, proxy=None, **described)
    with pytest.raises(ValueError, match='in every batch, under "core"'):
        given.step(batches[0])
    with pytest.raises(ValueError, match="no proxy to prepare"):
        given.prepare(batches[0])
    with pytest.raises(ValueError, match=r'batch\["core"\] must be a tensor with a row for each of the 6 images'):
        given.step({"image": images, "label": labels, "core": torch.rand(5)})
    with pytest.raises(ValueError, match=r'batch\["core"\] must be \(N,\) or \(N, 3\), got \(6, 4\)'):
        given.step({"image": images, "label": labels, "core": torch.rand(6, 4)})
    with pytest.raises(ValueError, match="DRM needs labels"):
        given.step({"image": images, "text": ["a"] * 6, "core": torch.rand(6)})
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 2"):
        given.classifier(beta=2.0)
