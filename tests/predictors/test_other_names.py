"""Classes of `class_names={folder: word}` keep both names, through training, mixing and files."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from PIL import Image
from tiny_clip import CONFIG, NAMES, TEMPLATES, letters

import robustft
from robustft.data import open as open_data
from robustft.data.classes import ClassNames, _say, match_classes
from robustft.ensembles import OutputEnsemble, Tempering, WiSEFT, uniform_soup
from robustft.methods import FineTune, TipAdapter
from robustft.predictors import Classifier, DualClassifier, zero_shot_classifier

pytestmark = pytest.mark.filterwarnings("ignore:the data set has")
FOLDERS = {"n01": "ant", "n02": "bee", "n03": "cow"}
PROMPTS = {"tokenizer": letters, "templates": TEMPLATES}
SAVED = ("fine-tuned", "tempered", "dual", "cache")  # one of each kind of file, the mixture in the tempered one


@pytest.fixture(autouse=True)
def _unsaid():
    _say.cache_clear()


def named(pair, classes, numbers):
    """Three images, whose labels are the places of classes 0, 1, 2 in `classes`."""
    rows = [(image, classes.index(numbers[label])) for image, label in zip(pair[0], (2, 0, 2), strict=False)]
    return type("Named", (list,), {"classes": classes})(rows)


def predictors(model, batch):
    zero_shot = zero_shot_classifier(model, class_names=FOLDERS, **PROMPTS)
    tuned = FineTune(model, class_names=FOLDERS, **PROMPTS).classifier()
    mixture = OutputEnsemble(zero_shot, tuned).at(0.3)
    head = zero_shot.class_embeddings
    return {
        "zero-shot": zero_shot,
        "fine-tuned": tuned,
        "given": Classifier(model, head, FOLDERS),
        "WiSE-FT": WiSEFT(zero_shot, tuned).at(0.5),
        "soup": uniform_soup([zero_shot, tuned]),
        "mixture": mixture,
        "tempered": Tempering(mixture).at(2.0),
        "dual": DualClassifier(model, head, head.flip(0), zero_shot.classes),
        "cache": TipAdapter(zero_shot).fit(batch).classifier(),
    }


def test_a_predictor_meets_data_by_folders_and_by_words_after_it_was_saved(clip_model, batches, tmp_path):
    by_folder = named(batches[0], ["n03", "n01"], tuple(FOLDERS))
    by_word = named(batches[0], ["cow", "bee", "ant"], NAMES)
    for name, predictor in predictors(clip_model, batches[0]).items():
        loaded = predictor
        if name in SAVED:
            loaded = robustft.load_predictor(predictor.save(tmp_path / name, CONFIG), dtype=torch.float64)
        for one in (predictor, loaded, loaded.restrict(["n01", "n02", "n03"])):
            assert one.classes == tuple(FOLDERS), name
            found, words = one.predict(by_folder), one.predict(by_word)
            assert found.labels.tolist() == [1, 0, 1] and found.classes == ("n01", "n03"), name
            assert words.labels.tolist() == [2, 0, 2] and words.classes == tuple(FOLDERS), name
        part, same = loaded.restrict(["cow", "ant"]), loaded.restrict(["n03", "n01"])
        assert part.classes == same.classes == ("n03", "n01"), name
        assert torch.equal(part.logits(batches[0][0]), same.logits(batches[0][0])), name


def test_data_that_were_renamed_still_meet_predictors_of_the_folders(clip_model, batches, tmp_path):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (40 * i, 9, 250 - 60 * i)).save(tmp_path / folder / f"{i}.png")
    data = open_data(tmp_path, class_names=FOLDERS, near_duplicates=False)
    assert data.classes == data.train.classes == NAMES
    trained = FineTune(clip_model, class_names=data.classes, **PROMPTS).classifier()
    assert trained.classes == NAMES
    outputs = trained.predict(named(batches[0], ["n03", "n01"], tuple(FOLDERS)))
    assert outputs.labels.tolist() == [1, 0, 1] and outputs.classes == ("ant", "cow")
    assert match_classes(data.classes, ("n03", "n01", "n02")).classes_of_labels == (1, 2, 0)
    assert match_classes(data.train.relabelled(data.classes).classes, tuple(FOLDERS)).changes is False


def test_names_go_before_other_names():
    swapped = ClassNames.of({"ant": "bee", "bee": "ant"})
    assert match_classes(("bee", "ant"), swapped).classes_of_labels == (1, 0)
    with pytest.raises(ValueError, match="'bee'"):  # some by folder and some by word: nothing says that it is meant
        match_classes(("n01", "bee"), ClassNames.of(FOLDERS))
    digits = ClassNames.of({"n01": "1", "n02": "0"})
    assert match_classes(("0", "1"), digits).classes_of_labels == (1, 0)


def test_other_names_are_copied_pickled_and_of_every_class():
    names = ClassNames.of(FOLDERS)
    for same in (
        names,
        copy.deepcopy(names),
        pickle.loads(pickle.dumps(names)),
        ClassNames(names),
        names.at((0, 1, 2)),
    ):
        assert same == tuple(FOLDERS) and same.also == (NAMES,)
    assert names.at([2, 0]).also == (("cow", "ant"),) and names.renamed("abc").also == (tuple(FOLDERS), NAMES)
    assert ClassNames.of({"a": "a"}).also == ()
    with pytest.raises(ValueError, match="also names 1 classes; expected 2"):
        ClassNames(("a", "b"), [("c",)])
