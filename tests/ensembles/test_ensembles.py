import copy

import pytest
import torch
import torch.nn.functional as F

from robustft import clip
from robustft.evaluation import frontier
from robustft.methods import FineTune, OutputEnsemble, WiSEFT, zero_shot_classifier
from robustft.predictors.base import predict_each
from robustft.predictors.logits import accuracy_and_nll


@pytest.fixture
def pair(clip_model, prompts, batches):
    """A zero-shot classifier and one that a few steps of FT have moved well away from it."""
    method = FineTune(clip_model, **prompts)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.2)
    for batch in batches:
        optimizer.zero_grad()
        method.step(batch).loss.backward()
        optimizer.step()
        method.after_step()
    return zero_shot_classifier(clip_model, **prompts), method.classifier()


@pytest.fixture
def held_out(pair, validation):
    """Labels that either classifier is right about now and then, so that each has a finite temperature."""
    images, labels = validation
    predicted = torch.stack([member.logits(images).argmax(1) for member in pair])
    chooser = torch.arange(len(labels)) % 3
    return images, torch.where(chooser == 2, labels, predicted[chooser.clamp(max=1), torch.arange(len(labels))])


def test_wise_ft_interpolates_towers_and_head_and_is_exact_at_its_ends(pair, batches):
    zero_shot, fine_tuned = pair
    images, alpha = batches[0][0], 0.3
    wise = WiSEFT(zero_shot, fine_tuned)
    assert torch.equal(wise.at(0.0).outputs(images).features, zero_shot.outputs(images).features)
    assert torch.equal(wise.at(1.0).outputs(images).features, fine_tuned.outputs(images).features)
    torch.testing.assert_close(wise.at(0.0).logits(images), zero_shot.logits(images))
    torch.testing.assert_close(wise.at(1.0).logits(images), fine_tuned.logits(images))
    model = copy.deepcopy(zero_shot.model)
    model.load_state_dict(
        {
            name: (1 - alpha) * value + alpha * fine_tuned.model.state_dict()[name]
            for name, value in zero_shot.model.state_dict().items()
        }
    )
    head = (1 - alpha) * zero_shot.logit_scale * zero_shot.class_embeddings
    head = head + alpha * fine_tuned.logit_scale * fine_tuned.class_embeddings
    expected = F.normalize(model.encode_image(images), dim=-1) @ head.T
    torch.testing.assert_close(wise.at(alpha).logits(images), expected)
    assert wise.at(alpha).classes == zero_shot.classes


def test_wise_ft_mixes_scale_and_bias(pair, batches):
    zero_shot, fine_tuned = pair
    zero_shot.logit_scale.fill_(2.0)
    fine_tuned.bias = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    middle = WiSEFT(zero_shot, fine_tuned).at(0.25)
    assert torch.equal(middle.bias, 0.25 * fine_tuned.bias)
    torch.testing.assert_close(middle.logit_scale, 0.75 * zero_shot.logit_scale + 0.25 * fine_tuned.logit_scale)


def test_output_ensemble_mixes_probabilities(pair, batches):
    zero_shot, fine_tuned = pair
    images, alpha, temperatures = batches[0][0], 0.3, (0.5, 3.0)
    zs, ft = zero_shot.outputs(images), fine_tuned.outputs(images)
    mixture = OutputEnsemble(zero_shot, fine_tuned, temperatures).at(alpha)
    p = (1 - alpha) * (zs.logits / 0.5).softmax(-1) + alpha * (ft.logits / 3.0).softmax(-1)
    outputs = mixture.outputs(images)
    torch.testing.assert_close(mixture.probabilities(images), p)
    torch.testing.assert_close(outputs.logits, p.log())
    torch.testing.assert_close(outputs.cosines, (1 - alpha) * zs.cosines + alpha * ft.cosines)
    assert torch.equal(outputs.features, ft.features)
    keep = [2, 0]
    restricted = (1 - alpha) * (zs.logits[:, keep] / 0.5).softmax(-1) + alpha * (ft.logits[:, keep] / 3.0).softmax(-1)
    torch.testing.assert_close(mixture.restrict(keep).probabilities(images), restricted)
    assert mixture.restrict(keep).classes == ("cow", "ant")


def test_output_ensemble_is_exact_and_finite_at_its_ends(pair, batches):
    zero_shot, fine_tuned = pair
    images = batches[0][0]
    ensemble = OutputEnsemble(zero_shot, fine_tuned)
    torch.testing.assert_close(ensemble.at(0).probabilities(images), zero_shot.probabilities(images))
    torch.testing.assert_close(ensemble.at(1).probabilities(images), fine_tuned.probabilities(images))
    zero_shot.logit_scale.fill_(1e4)  # probabilities underflow, their logarithms do not
    assert ensemble.at(0).logits(images).isfinite().all() and ensemble.at(0.5).logits(images).isfinite().all()


@pytest.mark.parametrize("make", [WiSEFT, OutputEnsemble, lambda a, b: OutputEnsemble(a, b, "fit")])
def test_fit_chooses_alpha_by_held_out_accuracy_and_breaks_ties_by_nll(pair, held_out, make):
    images, labels = held_out
    ensemble = make(*pair).fit(held_out, alphas=(0.0, 0.25, 0.5, 0.75, 1.0))
    accuracies, nlls = [], []
    for alpha in ensemble.alphas_:
        logits = ensemble.at(alpha).logits(images)
        accuracies.append((logits.argmax(1) == labels).double().mean().item())
        nlls.append(F.cross_entropy(logits, labels).item())
    assert ensemble.accuracies_ == pytest.approx(accuracies) and ensemble.nlls_ == pytest.approx(nlls)
    ties = [i for i, accuracy in enumerate(accuracies) if accuracy == max(accuracies)]
    assert ensemble.alpha_ == ensemble.alphas_[min(ties, key=lambda i: nlls[i])]
    assert torch.equal(ensemble.classifier().logits(images), ensemble.at(ensemble.alpha_).logits(images))


def test_fitted_temperatures_make_confidence_equal_accuracy(pair, held_out):
    ensemble = OutputEnsemble(*pair, temperatures="fit").fit(held_out)
    for member, temperature in zip(pair, ensemble.temperatures_, strict=True):
        outputs = member.predict(held_out)
        accuracy = (outputs.logits.argmax(1) == outputs.labels).double().mean()
        confidence = (outputs.logits.double() / temperature).softmax(1).amax(1).mean()
        assert abs(confidence - accuracy) <= 1.1e-3


def test_misuse_is_refused_with_a_reason(pair):
    zero_shot, fine_tuned = pair
    with pytest.raises(ValueError, match="same classes"):
        WiSEFT(zero_shot, fine_tuned.restrict([0, 1]))
    with pytest.raises(ValueError, match="same classes.*order"):
        OutputEnsemble(zero_shot, fine_tuned.restrict([1, 0, 2]))
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1.5"):
        WiSEFT(zero_shot, fine_tuned).at(1.5)
    with pytest.raises(ValueError, match="call fit"):
        WiSEFT(zero_shot, fine_tuned).classifier()
    with pytest.raises(ValueError, match="call fit"):
        OutputEnsemble(zero_shot, fine_tuned, "fit").at(0.5)
    with pytest.raises(ValueError, match="temperatures must be positive"):
        OutputEnsemble(zero_shot, fine_tuned, (1.0, 0.0))
    with pytest.raises(ValueError, match="temperatures must be None"):
        OutputEnsemble(zero_shot, fine_tuned, "auto")


def test_a_fit_reads_every_image_once_and_finds_what_each_alpha_predicts(pair, held_out):
    zero_shot, fine_tuned = pair
    images, labels = held_out

    class Counted(torch.utils.data.Dataset):
        read: list[int] = []

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            self.read.append(index)
            return images[index], int(labels[index])

    data = Counted()
    wise = WiSEFT(zero_shot, fine_tuned).fit(data)
    assert data.read == list(range(len(images)))
    nlls = []
    for alpha in wise.alphas_:
        outputs = wise.at(alpha).predict(data)
        nlls.append(accuracy_and_nll(outputs.logits, outputs.labels)[1])
    assert wise.nlls_ == tuple(nlls)

    data.read.clear()
    curve = frontier(wise, id=data, shifts={"same": data}, alphas=(0.0, 0.5))
    assert data.read == 2 * list(range(len(images))) and curve.id_accuracy == curve.ood_accuracy


def test_predictors_whose_towers_are_equal_are_encoded_once(pair, held_out, monkeypatch):
    zero_shot, fine_tuned = pair
    end = WiSEFT(zero_shot, fine_tuned).at(1.0)
    mixed = OutputEnsemble(zero_shot, fine_tuned).at(0.3)
    used = (zero_shot, fine_tuned, end, mixed)
    expected = [one.predict(held_out) for one in used]
    encode, passes = clip.encode_images, []
    monkeypatch.setattr(clip, "encode_images", lambda *given: passes.append(given[0]) or encode(*given))
    for found, known in zip(predict_each(used, held_out), expected, strict=True):
        assert torch.equal(found.features, known.features) and torch.equal(found.logits, known.logits)
    assert passes == [zero_shot.model, fine_tuned.model]
    end.model.visual.proj.data[0, 0] += 1e-12
    predict_each(used, held_out)
    assert passes[2:] == [zero_shot.model, fine_tuned.model, end.model]
