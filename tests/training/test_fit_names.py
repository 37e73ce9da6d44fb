"""`fit` trains on the classes that a data set's names say; groups of any data set go along; the scale has a bound."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from PIL import Image
from tiny_clip import NAMES, TEMPLATES, letters
from torch import nn
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

from robustft.data.classes import _say
from robustft.functional import group_risk
from robustft.methods import DRM, FLYP, CLIPAdapter, CoCoOp, CoOp, FineTune, LinearProbe, MaPLe, ProDA, Step
from robustft.predictors import zero_shot_classifier
from robustft.training.loop import fit


@pytest.fixture(autouse=True)
def _unsaid():
    _say.cache_clear()


class Named(torch.utils.data.Dataset):
    """Images whose label y means classes[y]; as items, or as tensors at once."""

    def __init__(self, batches, classes):
        images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
        keep = [i for i, label in enumerate(labels.tolist()) if NAMES[label] in classes]
        self.images, self.classes = images[keep], list(classes)
        self.labels = torch.tensor([classes.index(NAMES[label]) for label in labels[keep].tolist()])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


class AtOnce(Named):
    def tensors(self, mean, std):
        return self.images, self.labels


def trained(model, data, kind=FLYP, prompts=None, **options):
    method = kind(model, **(prompts or {"tokenizer": letters, "class_names": NAMES, "templates": TEMPLATES}))
    settings = {"epochs": 2, "batch_size": 6, "lr": 1e-2, "log_every": 1, "progress": False}
    history = fit(method, data, **(settings | options))
    return method, history


@pytest.fixture
def model(clip_model):
    clip_model.visual.preprocess_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    return clip_model


@pytest.mark.parametrize(("form", "workers"), [(Named, 0), (Named, 1), (AtOnce, 0)])
def test_training_on_permuted_names_equals_training_in_the_methods_order(form, workers, model, batches):
    _, expected = trained(model, form(batches, NAMES))
    with pytest.warns(UserWarning, match="another order"):
        _, found = trained(model, form(batches, ("cow", "ant", "bee")), workers=workers)
    assert found.records == expected.records


def test_a_subset_of_the_classes_trains_on_mapped_labels(model, batches):
    some = Named(batches, ("cow", "bee"))
    labels = torch.tensor([NAMES.index(some.classes[label]) for label in some.labels.tolist()])
    _, expected = trained(model, (some.images, labels))
    with pytest.warns(UserWarning, match="2 of the 3 classes of the FLYP"):
        _, found = trained(model, some)
    assert found.records == expected.records


def test_other_names_are_refused_before_the_first_step(model, batches):
    data = Named(batches, NAMES)
    data.classes[1] = "wasp"
    with pytest.raises(ValueError, match="'wasp'.*unknown to the FLYP.*'bee'"):
        trained(model, data)


def test_groups_of_an_image_folder_and_of_its_subset_reach_the_worst_group_risk(tmp_path, model):
    for i, name in enumerate(NAMES * 4):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 255 - 20 * i, 7 * i)).save(tmp_path / name / f"{i}.png")
    folder = ImageFolder(tmp_path, lambda image: 4 * to_tensor(image).double() - 2)
    folder.groups = torch.arange(len(folder)) % 2
    seen = []

    class Recorded(FineTune):
        def step(self, batch):
            seen.append((batch["label"], batch["group"]))
            return super().step(batch)

    trained(model, folder, Recorded, batch_size=12, epochs=1)
    labels, groups = seen.pop()
    assert sorted(zip(labels.tolist(), groups.tolist(), strict=True)) == sorted(
        zip(folder.targets, folder.groups.tolist(), strict=True)
    )
    trained(model, Subset(folder, [5, 0, 7]), Recorded, batch_size=3, epochs=1)
    assert sorted(seen.pop()[1].tolist()) == [0, 1, 1]
    assert group_risk(torch.ones(12), groups, 2).counts.tolist() == [6, 6]


class Growing(FLYP):
    """A loss that the scale alone lowers."""

    def step(self, batch):
        return Step.of({"loss": -self.model.logit_scale}, {"loss": 1.0})


@pytest.mark.parametrize("bound", [100.0, 14.5, None])
def test_a_trained_scale_stays_within_its_bound_and_records_say_it(bound, model, batches):
    settings = {"lr": 0.2, "warmup": 0.0, "epochs": 40, "max_logit_scale": bound}
    method, history = trained(model, batches[0], Growing, **settings)
    scales = [record["logit_scale"] for record in history.records]
    assert scales[-1] == pytest.approx(method.model.logit_scale.exp().item())
    assert max(scales) > 120 if bound is None else max(scales) == pytest.approx(bound)


def test_a_scale_that_begins_above_the_bound_keeps_its_beginning_as_bound(model, batches):
    with torch.no_grad():
        model.logit_scale.fill_(math.log(120.0))
    _, history = trained(model, batches[0], Growing, lr=0.05, warmup=0.0, epochs=5)
    assert [record["logit_scale"] for record in history.records] == pytest.approx([120.0] * 5)


def test_a_frozen_scale_is_neither_bounded_nor_recorded(model, batches):
    model.logit_scale = nn.Parameter(torch.tensor(math.log(120.0), dtype=torch.float64), requires_grad=False)
    method, history = trained(model, batches[0])
    assert method.model.logit_scale.exp().item() == pytest.approx(120.0)
    assert "logit_scale" not in history.records[0]


def test_equal_names_say_nothing(model, batches):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, Named(batches, NAMES), epochs=1)


FOLDERS = {"n01": "ant", "n02": "bee", "n03": "cow"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FLYP, {}),
        (FineTune, {}),
        (LinearProbe, {}),
        (CoOp, {"context": 4}),
        (CoCoOp, {}),
        (MaPLe, {}),
        (ProDA, {"context": 4}),
        (CLIPAdapter, {}),
    ]
    + [(DRM, {"descriptions": {"ant": "six legs", "bee": "stripes", "cow": "horns"}})],
)
def test_a_mapping_names_folders_for_data_and_words_for_captions(kind, options, model, batches):
    words = kind(model, tokenizer=letters, class_names=NAMES, templates=TEMPLATES, **options)
    method = kind(model, tokenizer=letters, class_names=FOLDERS, templates=TEMPLATES, **options)
    assert method.classes == ("n01", "n02", "n03") and method.class_names == NAMES
    images, labels = batches[0]
    named = method.classifier()
    torch.testing.assert_close(named.logits(images), words.classifier().logits(images))
    data = type("Folders", (list,), {"classes": ["n03", "n01"]})([(images[0], 1), (images[1], 0), (images[2], 1)])
    with pytest.warns(UserWarning, match="2 of the 3 classes"):
        assert named.predict(data).classes == ("n01", "n03")
    assert named.predict(data).labels.tolist() == [0, 1, 0]


def test_a_zero_shot_classifier_has_the_folders_for_classes_and_the_words_in_its_head(model):
    predictor = zero_shot_classifier(model, tokenizer=letters, class_names=FOLDERS, templates=TEMPLATES)
    assert predictor.classes == tuple(FOLDERS)
    words = zero_shot_classifier(model, tokenizer=letters, class_names=NAMES, templates=TEMPLATES)
    assert torch.equal(predictor.class_embeddings, words.class_embeddings)
