"""What learns from labels learns them by name: the caches of few-shot methods, DRM's proxy, soups, detectors."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_clip import NAMES

from robustft import Detector
from robustft.clip.features import encode
from robustft.data.classes import _say
from robustft.ensembles import OutputEnsemble, Tempering, VRFFeatures, greedy_soup
from robustft.evaluation import frontier
from robustft.methods import DRM, TipAdapter, core_labels
from robustft.predictors import Classifier, zero_shot_classifier

pytestmark = pytest.mark.filterwarnings("ignore:the data set has")
DESCRIPTIONS = {"ant": "six legs", "bee": "stripes", "cow": "horns"}


@pytest.fixture(autouse=True)
def _unsaid():
    _say.cache_clear()


class Named(torch.utils.data.Dataset):
    """Images of the classes of NAMES that `classes` has, numbered in their order."""

    def __init__(self, pair, classes=NAMES):
        images, labels = pair
        keep = [i for i, label in enumerate(labels.tolist()) if NAMES[label] in classes]
        self.pair = images[keep], labels[keep]
        self.images, self.classes = images[keep], list(classes)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.classes.index(NAMES[int(self.pair[1][index])])


@pytest.fixture
def model(clip_model):
    return clip_model


@pytest.fixture
def zero_shot(model, prompts):
    return zero_shot_classifier(model, **prompts)


PERMUTED, SOME = ("cow", "ant", "bee"), ("cow", "ant")


@pytest.mark.parametrize("classes", [PERMUTED, SOME])
def test_tip_adapters_cache_holds_classes_whatever_their_order_in_the_data(classes, zero_shot, batches, validation):
    train = Named(batches[0], classes)
    plain = TipAdapter(zero_shot).fit(train.pair, validation, alphas=(0.5, 1.0), betas=(1.0, 2.0))
    named = TipAdapter(zero_shot).fit(train, Named(validation, PERMUTED), alphas=(0.5, 1.0), betas=(1.0, 2.0))
    assert torch.equal(plain.labels_, named.labels_) and plain.accuracies_ == named.accuracies_
    torch.testing.assert_close(plain.keys_, named.keys_)


@pytest.mark.parametrize("classes", [PERMUTED, SOME])
def test_features_that_were_encoded_keep_what_their_labels_mean(classes, zero_shot, batches, tmp_path):
    train = Named(batches[0], classes)
    train.fingerprint = "train"
    plain = TipAdapter(zero_shot).fit(train)
    for _ in range(2):  # the second time from the cache
        features = encode(zero_shot.model, train, cache=tmp_path)
        assert features.classes == classes
        named = TipAdapter(zero_shot).fit(features, features, alphas=(1.0,), betas=(1.0,))
        assert torch.equal(plain.labels_, named.labels_)


def test_logits_of_classes_in_two_orders_are_not_mixed(zero_shot, batches):
    one, two = (zero_shot.restrict(order).predict(batches[0]) for order in ([0, 1, 2], [2, 0, 1]))
    with pytest.raises(ValueError, match=r"another order of them: \('ant', 'bee', 'cow'\) and \('cow', 'ant', 'bee'\)"):
        VRFFeatures(one, two)


def test_tip_adapter_is_chosen_among_the_classes_of_the_validation_set(zero_shot, batches, validation):
    some = Named(validation, SOME)
    fitted = TipAdapter(zero_shot).fit(batches[0], some, alphas=(1.0,), betas=(1.0,))
    outputs = fitted.classifier().restrict([0, 2]).predict(some)
    assert fitted.accuracies_[0][0] == (outputs.logits.argmax(1) == outputs.labels).double().mean()


def test_core_labels_and_ranges_are_of_the_classes_that_names_say(model, prompts, batches):
    data = Named(batches[0], PERMUTED)
    given = prompts | {"descriptions": DESCRIPTIONS}
    known = {name: given[name] for name in ("tokenizer", "class_names", "descriptions")}
    torch.testing.assert_close(core_labels(model, data, **known), core_labels(model, data.pair, **known))
    one, two = (DRM(model, **given).prepare(pair) for pair in (data.pair, data))
    torch.testing.assert_close(one.ranges, two.ranges)


def test_a_detector_learns_the_classes_that_names_say(zero_shot, batches, validation):
    train = tuple(torch.cat(column) for column in zip(*batches, strict=True))
    held_out = [(image, -7) for image in validation[0]]  # labels of the validation set are not looked at
    one, two = (
        Detector("mahalanobis").fit(zero_shot, data, validation=held_out) for data in (train, Named(train, PERMUTED))
    )
    assert one.threshold_ == pytest.approx(two.threshold_)
    other = type("Other", (list,), {"classes": ["ant", "wasp", "cow"]})(zip(*train, strict=True))
    with pytest.raises(ValueError, match="'wasp'"):
        Detector("mahalanobis").fit(zero_shot, other, validation=held_out)
    Detector("mcm").fit(zero_shot, other)


@pytest.mark.filterwarnings("ignore:mean confidence cannot meet accuracy")  # of what was not trained
def test_soups_and_temperatures_are_fitted_by_name(zero_shot, validation):
    other = Classifier(zero_shot.model, zero_shot.class_embeddings.flip(0), NAMES)
    one, two = (greedy_soup([zero_shot, other], data) for data in (validation, Named(validation, PERMUTED)))
    assert (one.accuracies, one.ingredients) == (two.accuracies, two.ingredients)
    some = Named(validation, SOME)
    restricted = Tempering(zero_shot.restrict([0, 2]), "confidence").fit(some)
    assert Tempering(zero_shot, "confidence").fit(some).temperature_ == restricted.temperature_


def test_features_of_a_subset_are_kept_under_its_data_set_and_indices(model, validation, tmp_path):
    class Told(Named):
        fingerprint = "told"

    data = Told(validation)
    first, again, other = (torch.utils.data.Subset(data, rows) for rows in ([3, 1], torch.tensor([3, 1]), [1, 3]))
    assert encode(model, first, cache=tmp_path).labels.tolist() == [data[3][1], data[1][1]]
    encode(model, again, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert encode(model, other, cache=tmp_path).labels.tolist() == [data[1][1], data[3][1]]
    assert len(list(tmp_path.iterdir())) == 1  # the same images
    encode(model, torch.utils.data.ConcatDataset([first, other]), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    data.transform = lambda image: image
    with pytest.raises(ValueError, match=r"dataset\.dataset\.transform \(function\) cannot be told"):
        encode(model, first, cache=tmp_path)


def test_labels_beyond_the_classes_are_an_error_and_no_accuracy(zero_shot, validation):
    images, labels = validation
    wrong = images, labels + 1  # counted from 1
    ensemble = OutputEnsemble(zero_shot, zero_shot)
    for work in (
        zero_shot.predict,
        ensemble.fit,
        lambda data: greedy_soup([zero_shot], data),
        lambda data: frontier(ensemble, id=validation, shifts={"a": data}, alphas=(0.0,)),
    ):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\], numbers of classes, got 3"):
            work(wrong)


def test_members_of_images_that_are_normalised_otherwise_are_not_mixed(model, prompts):
    members = []
    for mean in (0.5, 0.1):
        other = copy.deepcopy(model)
        other.visual.image_mean, other.visual.image_std = (mean,) * 3, (0.25,) * 3
        members.append(zero_shot_classifier(other, **prompts))
    OutputEnsemble(members[0], members[0])
    with pytest.raises(ValueError, match="one set of images cannot be shown to both"):
        OutputEnsemble(*members)
