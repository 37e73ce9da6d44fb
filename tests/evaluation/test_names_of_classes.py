"""Labels meet a predictor's classes by name: on a set in another order, on one with some of the classes, on others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from robustft.calibration.measures import calibration_report
from robustft.data import glyphworld
from robustft.data.classes import _say
from robustft.ensembles import OutputEnsemble, VRFFeatures, WiSEFT
from robustft.evaluation import Suite, evaluate, evaluate_predictions, frontier
from robustft.evaluation.measure import accuracy
from robustft.predictors import Classifier, Outputs, zero_shot_classifier

pytestmark = pytest.mark.filterwarnings("ignore:the data set has")
NAMES = glyphworld.CLASS_NAMES


@pytest.fixture(autouse=True)
def _unsaid():
    _say.cache_clear()


@pytest.fixture(scope="module")
def digits():
    return glyphworld.digits("test").subset(range(120))


@pytest.fixture(scope="module")
def letters():
    return glyphworld.ood("letters").subset(range(20))


@pytest.fixture(scope="module")
def classifier():
    bundle = glyphworld.load_clip()
    return zero_shot_classifier(
        bundle.model, tokenizer=bundle.tokenizer, class_names=NAMES, templates=glyphworld.TEMPLATES
    )


@pytest.fixture(scope="module")
def fine_tuned(classifier):
    """Another head, as training would leave."""
    g = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(classifier.class_embeddings.shape, generator=g)
    return Classifier(classifier.model, classifier.class_embeddings + noise, NAMES)


def in_order(data, names):
    """The same images, with labels into their classes in another order, or into some of them."""
    keep = [i for i, label in enumerate(data.labels.tolist()) if data.classes[label] in names]
    kept = data.subset(keep)
    labels = torch.tensor([names.index(kept.classes[label]) for label in kept.labels.tolist()])
    return replace(kept, labels=labels, classes=tuple(names))


SORTED = sorted(NAMES)
SOME = ["the digit seven", "the digit one", "the digit four"]


def test_evaluate_of_sorted_names_equals_that_of_the_models_order(classifier, digits):
    alone = evaluate({"m": classifier}, id=digits)
    with pytest.warns(UserWarning, match="another order"):
        assert evaluate({"m": classifier}, id=in_order(digits, SORTED)).models["m"].id == alone.models["m"].id
    assert alone.models["m"].id_accuracy > 0.7


def test_a_shift_with_some_classes_is_measured_among_them(classifier, digits):
    some = in_order(digits, SOME)
    expected = evaluate({"m": classifier.restrict(sorted(SOME, key=NAMES.index))}, id=some).models["m"]
    with pytest.warns(UserWarning, match="3 of the 10 classes"):
        found = evaluate({"m": classifier}, id=digits, shifts={"some": some}).models["m"]
    assert found.shifts["some"].calibration == expected.id.calibration
    assert found.shifts["some"].calibration.accuracy > 0.7
    outputs = classifier.predict(some)
    assert outputs.classes == tuple(sorted(SOME, key=NAMES.index)) and outputs.logits.shape[1] == 3


def test_other_names_are_an_error_except_on_ood_sets_whose_labels_nobody_reads(classifier, digits, letters):
    with pytest.raises(ValueError, match="'the letter a'.*unknown to the predictor"):
        evaluate({"m": classifier}, id=letters)
    with pytest.raises(ValueError, match="'the letter a'"):
        classifier.predict(letters)
    named = evaluate({"m": classifier}, id=digits, ood={"letters": letters})
    tensors = letters.tensors(*(classifier.model.visual.image_mean, classifier.model.visual.image_std))
    assert named.models["m"].ood == evaluate({"m": classifier}, id=digits, ood={"letters": tensors}).models["m"].ood
    assert not classifier.predict(letters, labelled=False).has("labels")


def test_ood_scores_are_over_the_classes_of_the_id_set(classifier, digits, letters):
    some = in_order(digits, SOME)
    restricted = classifier.restrict(sorted(SOME, key=NAMES.index))
    expected = evaluate({"m": restricted}, id=some, ood={"letters": letters}).models["m"]
    found = evaluate({"m": classifier}, id=some, ood={"letters": letters}).models["m"]
    assert found.ood == expected.ood and found.scores == expected.scores


def test_a_frontier_of_named_sets_equals_that_of_the_models_order(classifier, fine_tuned, digits):
    ensemble = OutputEnsemble(classifier, fine_tuned)
    some = in_order(digits, SOME)
    expected = frontier(ensemble, id=digits, shifts={"all": digits}, alphas=(0.0, 0.5, 1.0))
    found = frontier(ensemble, id=in_order(digits, SORTED), shifts={"all": digits}, alphas=(0.0, 0.5, 1.0))
    assert found == expected
    part = frontier(ensemble, id=digits, shifts={"some": some}, alphas=(0.5,))
    keep = sorted(SOME, key=NAMES.index)
    assert part.ood_accuracy == (accuracy(ensemble.at(0.5).restrict(keep).predict(some)),)


def test_ensembles_are_fitted_by_name(classifier, fine_tuned, digits):
    mixed = in_order(digits, SORTED)
    for make in (lambda: WiSEFT(classifier, fine_tuned), lambda: OutputEnsemble(classifier, fine_tuned, "confidence")):
        one, two = (make().fit(data, alphas=(0.0, 0.5, 1.0)) for data in (digits, mixed))
        assert (one.alpha_, one.accuracies_, one.nlls_) == (two.alpha_, two.accuracies_, two.nlls_)
    one, two = (VRFFeatures.of(classifier, fine_tuned, data) for data in (digits, mixed))
    assert torch.equal(one.labels, two.labels) and torch.equal(one.zero_shot.logits, two.zero_shot.logits)
    assert VRFFeatures.of(classifier, fine_tuned, in_order(digits, SOME)).zero_shot.logits.shape[1] == 3


def test_pooled_calibration_of_shifts_of_several_widths_is_over_the_classes_of_all(classifier, digits):
    halves = [in_order(digits, SOME), in_order(digits, ["the digit two", "the digit one"])]
    found = evaluate({"m": classifier}, id=digits, shifts={"a": halves[0], "b": halves[1]}).models["m"].pooled
    probabilities, labels = [], []
    for half in halves:
        outputs = classifier.predict(half)
        columns = [NAMES.index(name) for name in outputs.classes]
        wide = torch.zeros(len(half), 10, dtype=torch.float64)
        wide[:, columns] = outputs.probabilities
        probabilities.append(wide)
        labels.append(torch.tensor([NAMES.index(half.classes[label]) for label in half.labels.tolist()]))
    expected = calibration_report(torch.cat(probabilities), torch.cat(labels))
    for name in ("accuracy", "ece", "brier", "nll", "count"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12)


def test_unnamed_logits_of_several_widths_are_an_error_that_says_how_to_name_them():
    def outputs(width):
        return Outputs(logits=torch.randn(9, width), labels=torch.zeros(9, dtype=torch.int64))

    suite = Suite(outputs(4), {"a": outputs(4), "b": outputs(2)}, {})
    with pytest.raises(ValueError, match=r"2 and 4 columns.*Outputs\(classes="):
        evaluate_predictions({"m": suite})
