"""Class names of a data set beside those of a predictor or a method."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from robustft.data.classes import _say, class_names, match_classes


@pytest.fixture(autouse=True)
def _unsaid():
    _say.cache_clear()


class Named(torch.utils.data.Dataset):
    def __init__(self, *classes):
        self.classes = list(classes)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.zeros(3, 2, 2), index


def test_equal_names_change_nothing_and_say_nothing(recwarn):
    matching = match_classes(["ant", "bee"], ("ant", "bee"))
    assert not matching.changes and not matching.partial and not recwarn.list
    assert matching.of(torch.tensor([1, 0])).tolist() == [1, 0]


def test_another_order_maps_labels_by_name_and_says_so_once():
    with pytest.warns(UserWarning, match="another order.*'cow', 'ant', 'bee'.*matched by name"):
        matching = match_classes(["cow", "ant", "bee"], ["ant", "bee", "cow"])
    assert matching.changes and not matching.partial
    assert matching.of(torch.tensor([0, 1, 2, 0], dtype=torch.int32)).tolist() == [2, 0, 1, 2]
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match_classes(["cow", "ant", "bee"], ["ant", "bee", "cow"])


def test_some_of_the_classes_are_a_subset_in_any_order():
    with pytest.warns(UserWarning, match="2 of the 3 classes.*not 'bee'"):
        matching = match_classes(["cow", "ant"], ["ant", "bee", "cow"])
    assert matching.partial and matching.classes_of_labels == (2, 0)


def test_a_subset_that_is_a_prefix_is_partial_though_no_label_changes():
    with pytest.warns(UserWarning, match="2 of the 3"):
        matching = match_classes(["ant", "bee"], ["ant", "bee", "cow"])
    assert matching.partial and not matching.changes


@pytest.mark.parametrize("names", [("n01440764", "bee", "cow"), ("ant", "bee", "cow", "dog"), ("dog",)])
def test_other_names_are_an_error_that_names_them(names):
    unknown = next(name for name in names if name not in ("ant", "bee", "cow"))
    with pytest.raises(ValueError, match=f"{unknown!r}.*class_names="):
        match_classes(names, ("ant", "bee", "cow"))


def test_a_repeated_name_is_taken_in_one_order_and_refused_in_another():
    names = ("crane", "bee", "crane")
    assert not match_classes(names, names).changes
    with pytest.raises(ValueError, match="'crane' names several classes"):
        match_classes(("bee", "crane", "crane"), names)
    with pytest.raises(ValueError, match="'crane' names several classes"):
        match_classes(("crane", "bee"), names)


def test_a_label_without_a_name_is_an_error():
    with pytest.raises(ValueError, match=r"labels hold 0..2, but the data set names 2"):
        match_classes(["ant", "bee"], ["ant", "bee"]).of(torch.tensor([0, 2]))


def test_names_are_found_where_data_sets_tell_them():
    named = Named("ant", "bee")
    assert class_names(named) == class_names(Subset(named, [0])) == ("ant", "bee")
    assert class_names(Subset(Subset(named, [0, 1]), [0])) == ("ant", "bee")
    hugging_face = SimpleNamespace(features={"image": None, "label": SimpleNamespace(names=["ant", "bee"])})
    assert class_names(hugging_face) == ("ant", "bee")
    assert class_names(ConcatDataset([named, Named("ant", "bee")])) == ("ant", "bee")
    assert class_names((torch.zeros(1), torch.zeros(1))) is class_names([1]) is None
    assert class_names(SimpleNamespace(classes=[0, 1])) is None


def test_parts_that_number_their_classes_differently_are_an_error():
    with pytest.raises(ValueError, match="'ant', 'bee' and 'bee', 'ant'"):
        class_names(ConcatDataset([Named("ant", "bee"), Named("bee", "ant")]))
