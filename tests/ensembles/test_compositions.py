"""Methods in one another: each step through the public names, each result against what it is made of."""

import pytest
import torch
import torch.nn.functional as F

import robustft
from robustft.detection import mcm
from robustft.evaluation import evaluate, frontier
from robustft.methods import OutputEnsemble, Tempering, VRFFeatures, WiSEFT, zero_shot_classifier

pytestmark = pytest.mark.filterwarnings("ignore:the failure set has")


def trained(method, batches, lr):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        method.step(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        method.after_step()
    return method.classifier()


def data_for(members, count, seed, size=8, dtype=torch.float64):
    """Images whose label is what one member or the other says, or chance: each is right now and then."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=g, dtype=torch.float64)
    images = F.interpolate(images, size=size).to(dtype)
    with torch.no_grad():
        answers = torch.stack([*(m.logits(images).argmax(1) for m in members), torch.randint(3, (count,), generator=g)])
    chosen = torch.randint(3, (count,), generator=g)
    return images, answers[chosen, torch.arange(count)]


@pytest.fixture(params=["vit", "resnet"])
def case(request, clip_model, batches, resnet_model, resnet_batches):
    return (clip_model, batches) if request.param == "vit" else (resnet_model, resnet_batches)


def test_carot_then_vrf_then_temperature_then_mcm(case, prompts):
    model, batches = case
    size = batches[0][0].shape[-1]
    zero_shot = zero_shot_classifier(model, **prompts)
    carot = trained(robustft.CaRot(model, total_steps=9, ema_interval=2, **prompts), batches, lr=0.03)
    members = zero_shot, carot
    train, validation, test = (data_for(members, n, seed, size) for n, seed in ((60, 1), (50, 2), (40, 3)))

    features = [VRFFeatures.of(*members, data) for data in (train, validation, test)]
    vrf = robustft.VRF().fit(*features[:2])
    ensemble = vrf.classifier(*members)
    scaling = Tempering(ensemble).fit(validation)
    calibrated = scaling.classifier()
    result = calibrated.predict(test)

    with torch.no_grad():  # the same once more, from the towers
        u = F.normalize(carot.model.eval().encode_image(test[0]), dim=-1)
        logits = [
            m.logit_scale * F.normalize(m.model.eval().encode_image(test[0]), dim=-1) @ m.class_embeddings.T
            for m in members
        ]
        cosines = [z / m.logit_scale for z, m in zip(logits, members, strict=True)]
    d = torch.cdist(u, vrf.failure_set_).square().kthvalue(vrf.k_, dim=1).values
    w = torch.sigmoid((vrf.a_ - d) / vrf.b_)[:, None]
    zs, ft = (F.softmax(z / t, dim=1) for z, t in zip(logits, vrf.temperatures_, strict=True))
    p = w * ft + (1 - w) * zs
    torch.testing.assert_close(ensemble.probabilities(test[0]), p)
    torch.testing.assert_close(vrf.probabilities(features[2]), p)
    torch.testing.assert_close(result.probabilities, F.softmax(p.log() / scaling.temperature_, dim=1))
    torch.testing.assert_close(mcm(result.cosines), F.softmax(w * cosines[1] + (1 - w) * cosines[0], dim=1).amax(1))
    assert torch.equal(result.logits.argmax(1), p.argmax(1)), "a temperature changes no answer"

    outside = torch.randn(30, 3, size, size, dtype=torch.float64), torch.zeros(30, dtype=torch.int64)
    table = evaluate({"VRF": calibrated}, id=test, shifts={"noise": test}, ood={"outside": outside}).models["VRF"]
    assert table.id_accuracy == (p.argmax(1) == test[1]).double().mean().item()
    assert 0.0 <= table.auroc <= 1.0


def test_vrf_over_wise_ft_and_over_a_soup_of_methods(clip_model, prompts, batches):
    zero_shot = zero_shot_classifier(clip_model, **prompts)
    flyp = trained(robustft.FLYP(clip_model, **prompts), batches, 0.3)
    carot = trained(robustft.CaRot(clip_model, total_steps=9, ema_interval=2, **prompts), batches, 0.3)
    tuned = trained(robustft.FineTune(clip_model, **prompts), batches, 0.3)
    soup = robustft.uniform_soup([flyp, carot, tuned])
    for fine_tuned in (WiSEFT(zero_shot, flyp).at(0.6), soup):
        sets = [data_for((zero_shot, fine_tuned), 60, seed) for seed in (1, 2)]
        vrf = robustft.VRF(temperatures=None).fit(*(VRFFeatures.of(zero_shot, fine_tuned, data) for data in sets))
        classifier = vrf.classifier(zero_shot, fine_tuned)
        images = sets[1][0][:9]
        w = vrf.weights(fine_tuned.outputs(images).features.detach())[:, None]
        expected = w * fine_tuned.probabilities(images) + (1 - w) * zero_shot.probabilities(images)
        torch.testing.assert_close(classifier.probabilities(images), expected)
        assert 0.0 < w.std(), "the samples' shares differ"


def test_restricted_vrf_keeps_its_weights_and_restricts_before_the_softmax(clip_model, prompts, batches):
    zero_shot = zero_shot_classifier(clip_model, **prompts)
    tuned = trained(robustft.FineTune(clip_model, **prompts), batches, 0.3)
    train, validation = (data_for((zero_shot, tuned), 60, seed) for seed in (1, 2))
    vrf = robustft.VRF().fit(*(VRFFeatures.of(zero_shot, tuned, data) for data in (train, validation)))
    images, keep = validation[0][:7], ["cow", "ant"]
    part = vrf.classifier(zero_shot, tuned).restrict(keep)
    w = vrf.weights(tuned.outputs(images).features.detach())[:, None]
    zs, ft = (
        F.softmax(m.logits(images)[:, [2, 0]] / t, dim=1)
        for m, t in zip((zero_shot, tuned), vrf.temperatures_, strict=True)
    )
    torch.testing.assert_close(part.probabilities(images), w * ft + (1 - w) * zs)
    assert part.classes == ("cow", "ant")


def test_linear_probe_vrf_encodes_once(case, prompts, monkeypatch):
    model, batches = case
    probe = robustft.LinearProbe(model, **prompts)
    fine_tuned = trained(probe, batches, 1.0)
    members = probe.zero_shot_classifier(), fine_tuned
    train, validation = (data_for(members, 60, seed, batches[0][0].shape[-1]) for seed in (1, 2))
    calls = []
    encode = probe.model.encode_image
    monkeypatch.setattr(probe.model, "encode_image", lambda images: calls.append(len(images)) or encode(images))
    features = [VRFFeatures.of(*members, data) for data in (train, validation)]
    vrf = robustft.VRF().fit(*features)
    p = vrf.classifier(*members).probabilities(validation[0])
    OutputEnsemble(*members).at(0.5).probabilities(validation[0])
    OutputEnsemble(*members).fit(validation)
    assert calls == [60, 60, 60, 60, 60]
    u = features[1].features
    torch.testing.assert_close(features[1].zero_shot.logits, members[0].head_outputs(u).logits)
    torch.testing.assert_close(p, vrf.probabilities(features[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vrf_of_low_precision_models_is_its_restatement_on_their_own_features(case, prompts, dtype):
    model, batches = case
    batches = [(images.float(), labels) for images, labels in batches]
    model = model.to(dtype)
    zero_shot, tuned = (
        zero_shot_classifier(model, **prompts),
        trained(robustft.FineTune(model, **prompts), batches, 0.3),
    )
    size = batches[0][0].shape[-1]
    train, validation = (data_for((zero_shot, tuned), 60, s, size, torch.float32) for s in (1, 2))
    sets = [VRFFeatures.of(zero_shot, tuned, data) for data in (train, validation)]
    vrf = robustft.VRF().fit(*sets)
    with torch.no_grad():  # as in `of`: bfloat16 attention has another kernel with gradients
        p = vrf.classifier(zero_shot, tuned).probabilities(validation[0])
    assert p.dtype == torch.float32
    wide = [part.double() for part in (sets[1].features, sets[1].zero_shot.logits, sets[1].fine_tuned.logits)]
    d = torch.cdist(wide[0], vrf.failure_set_.double()).square().kthvalue(vrf.k_, dim=1).values
    w = torch.sigmoid((vrf.a_ - d) / vrf.b_)[:, None]
    t_zs, t_ft = vrf.temperatures_
    expected = w * F.softmax(wide[2] / t_ft, dim=1) + (1 - w) * F.softmax(wide[1] / t_zs, dim=1)
    torch.testing.assert_close(p.double(), expected, rtol=1e-4, atol=1e-5)


def test_frontiers_of_all_ensembles_are_what_their_classifiers_score(clip_model, prompts, batches):
    zero_shot = zero_shot_classifier(clip_model, **prompts)
    tuned = trained(robustft.FineTune(clip_model, **prompts), batches, 0.3)
    train, validation, first, second = (data_for((zero_shot, tuned), 60, seed) for seed in (1, 2, 3, 4))
    vrf = robustft.VRF().fit(*(VRFFeatures.of(zero_shot, tuned, data) for data in (train, validation)))
    ensembles = {
        "WiSEFT": WiSEFT(zero_shot, tuned).fit(validation),
        "OutputEnsemble": OutputEnsemble(zero_shot, tuned, temperatures="nll").fit(validation),
        "VRFClassifier": vrf.classifier(zero_shot, tuned),
    }
    for name, ensemble in ensembles.items():
        found = frontier(ensemble, id=validation, shifts={"a": first, "b": second}, alphas=(0.0, 0.3, 1.0))
        for alpha, id_accuracy, ood_accuracy in zip(found.alphas, found.id_accuracy, found.ood_accuracy, strict=True):
            classifier = ensemble.at(alpha)
            scores = [
                (classifier.logits(images).argmax(1) == labels).double().mean().item()
                for images, labels in (validation, first, second)
            ]
            assert id_accuracy == pytest.approx(scores[0]) and ood_accuracy == pytest.approx(sum(scores[1:]) / 2)
        assert found.name == name and found.chosen == ensemble.alpha_
        for alpha, member in ((0, zero_shot), (1, tuned)):
            torch.testing.assert_close(ensemble.at(alpha).logits(first[0]).argmax(1), member.logits(first[0]).argmax(1))
    assert frontier(WiSEFT(zero_shot, tuned), id=first, shifts={"b": second}, alphas=(0.5,)).chosen is None
    with pytest.raises(ValueError, match="shifts is empty"):
        frontier(ensembles["WiSEFT"], id=first, shifts={})


def test_temperature_of_a_classifier_is_one_again_and_of_an_ensemble_divides_its_logits(clip_model, prompts, batches):
    zero_shot = zero_shot_classifier(clip_model, **prompts)
    probe = trained(robustft.LinearProbe(clip_model, **prompts), batches, 1.0)
    images, labels = validation = data_for((zero_shot, probe), 80, 1)
    for predictor in (probe, OutputEnsemble(zero_shot, probe).at(0.5)):
        for rule in ("nll", "confidence"):
            scaling = Tempering(predictor, rule).fit(validation)
            scaled, t = scaling.classifier(), scaling.temperature_
            torch.testing.assert_close(scaled.logits(images), predictor.logits(images) / t)
            torch.testing.assert_close(scaled.outputs(images).cosines, predictor.outputs(images).cosines)
            torch.testing.assert_close(
                scaled.restrict([2, 1]).logits(images), scaled.restrict(["cow", "bee"]).logits(images)
            )
            if rule == "nll":
                here, *beside = (F.cross_entropy(scaling.at(t * f).logits(images), labels) for f in (1.0, 0.99, 1.01))
                assert here < min(beside)
            else:
                accuracy = (scaled.logits(images).argmax(1) == labels).double().mean()
                assert abs(scaled.probabilities(images).amax(1).mean() - accuracy) <= 1.1e-3
    assert isinstance(Tempering(probe).at(2.0), robustft.methods.Classifier)
    with pytest.raises(ValueError, match="call fit"):
        Tempering(probe).classifier()
    with pytest.raises(ValueError, match="rule must be 'confidence' or 'nll'"):
        Tempering(probe, "ece")
    with pytest.raises(ValueError, match="temperature must be positive"):
        Tempering(probe).at(0.0)
