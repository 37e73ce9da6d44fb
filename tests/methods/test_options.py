"""A method's options: said once, in its constructor, and compared when a run is resumed."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from dataclasses import dataclass
from functools import partial
from typing import get_args

import pytest
import torch
from small_options import PROMPTED
from tiny_clip import letters
from torch import nn
from typing_extensions import Unpack

from robustft import fit, methods
from robustft.methods import DRM, FLYP, LPFT, CaRot, CoOp, CoreProxy, FineTune, GroupDRO, LinearProbe, WorstCaseFineTune
from robustft.methods.base import Method
from robustft.methods.linear_head import HeadOptions, LinearHead
from robustft.methods.objective import Objective
from robustft.methods.options import described

DESCRIPTIONS = ["six legs", "striped", "horns"]


def backwards(texts):
    """A tokenizer of the same form whose alphabet runs from z to a."""
    tokens = letters(texts)
    return torch.where((tokens > 0) & (tokens < 28), 28 - tokens, tokens)


def levels():
    """Every constructor of a method, its class, and what its `**options` unpack."""
    found = {}
    for kind in methods.every_method().values():
        for cls in kind.__mro__:
            if issubclass(cls, Method) and "__init__" in vars(cls):
                *_, last = inspect.signature(vars(cls)["__init__"]).parameters.values()
                if last.kind is last.VAR_KEYWORD:
                    (options,) = get_args(eval(last.annotation, inspect.unwrap(vars(cls)["__init__"]).__globals__))
                    found[cls] = options
    return found


@pytest.mark.parametrize(("kind", "options"), levels().items(), ids=lambda value: value.__name__)
def test_what_a_constructor_hands_on_is_known_above_it(kind, options):
    above = inspect.signature(super(kind, kind).__init__).parameters.keys() | {
        name for cls in kind.__mro__[1:] if "__signature__" in vars(cls) for name in cls.__signature__.parameters
    }
    assert set(options.__annotations__) <= above
    assert inspect.signature(kind).parameters.keys() >= {"model", "tokenizer", "class_names", "templates"}


def test_the_signature_names_every_option_and_its_default():
    found = inspect.signature(methods.KgCoOp).parameters
    assert {name: found[name].default for name in ("weight", "context", "position", "seed")} == {
        "weight": 8.0,
        "context": 16,
        "position": "end",
        "seed": 0,
    }
    assert "label_smoothing" not in inspect.signature(CaRot).parameters, "it takes none of FLYP's options"


def test_an_unknown_option_is_refused_by_name(clip_model, prompts):
    for kind, name in ((FineTune, "label_smothing"), (CaRot, "label_smoothing"), (LPFT, "start")):
        with pytest.raises(
            TypeError, match=f"{kind.__name__} got an unexpected keyword argument '{name}'; it has model,"
        ):
            kind(clip_model, **{name: None}, **prompts)


def test_the_configuration_holds_what_was_given_and_what_was_not(clip_model, prompts):
    config = FLYP(clip_model, targets="label", l2_sp=0.5, **prompts).config
    expected = {
        "method": "FLYP",
        "class_names": ["ant", "bee", "cow"],
        "total_steps": None,
        "seed": 0,
        "tune": None,
        "lora": None,
        "targets": "label",
        "loss": "softmax",
        "label_smoothing": 0.0,
        "l2_sp": 0.5,
        "misalignment": 0.0,
        "variant": "neg_log_ratio",
    }
    assert {name: value for name, value in config.items() if name != "captions"} == expected


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        (FLYP, {}, {"tokenizer": backwards}),
        (FLYP, {}, {"templates": ["one {}"]}),
        (FineTune, {}, {"objective": Objective(terms={"brier": 0.5})}),
        (LinearProbe, {}, {"init": "zero"}),
        (CaRot, {}, {"ema_interval": 3}),
        (CoOp, PROMPTED[CoOp], {"position": "front"}),
        (DRM, {"descriptions": DESCRIPTIONS}, {"descriptions": DESCRIPTIONS[::-1]}),
        (DRM, {"descriptions": DESCRIPTIONS}, {"proxy": CoreProxy(temperature=0.2)}),
        (WorstCaseFineTune, {"risk": GroupDRO(2)}, {"risk": GroupDRO(2, 0.5)}),
        (WorstCaseFineTune, {"risk": GroupDRO(2)}, {"risk": methods.WorstGroup(2)}),
    ],
)
def test_what_trains_otherwise_has_another_configuration(clip_model, prompts, kind, before, after):
    same, other = kind(clip_model, **prompts | before), kind(clip_model, **prompts | before | after)
    assert kind(clip_model, **prompts | before).config == same.config != other.config
    assert json.loads(json.dumps(other.config)) == other.config


def test_what_changes_no_number_does_not_keep_a_run_from_being_resumed(clip_model, prompts):
    for kind, options, changed in (
        (CoOp, PROMPTED[CoOp], {"chunk_size": 2}),
        (DRM, {"descriptions": DESCRIPTIONS}, {"beta": 0.3, "text_chunk": 2}),
        (
            DRM,
            {"descriptions": DESCRIPTIONS},
            {"descriptions": dict(zip(prompts["class_names"], DESCRIPTIONS, strict=True))},
        ),
    ):
        assert kind(clip_model, **prompts, **options).config == kind(clip_model, **prompts, **options | changed).config


def test_a_configuration_survives_copies_and_pickles(clip_model, prompts):
    method = LinearProbe(clip_model, init="zero", **prompts)
    for again in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert again.config == method.config and again.summary() == method.summary()


def test_an_option_that_cannot_be_compared_says_what_to_do():
    @dataclass
    class Plain:
        size: int = 3

    assert described({"a": (Plain(), None, torch.float32.is_floating_point)}, "x") == {"a": [{"size": 3}, None, True]}
    assert described(test_an_option_that_cannot_be_compared_says_what_to_do, "x").endswith("says_what_to_do")
    for value in (object(), partial(int, 3)):
        with pytest.raises(TypeError, match=rf'term is a {type(value).__name__}, .*config\["term"\].*uncompared'):
            described(value, "term")


class NormTune(LinearHead):
    """Fine-tuning of the image tower's norm layers and a linear head.

    Args:
        bias: of the norm layers, train it too.
        others: as for `LinearHead`.
    """

    def __init__(self, model: nn.Module, *, bias: bool = True, **options: Unpack[HeadOptions]) -> None:
        super().__init__(model, **options)
        norms = [module for module in self.model.visual.modules() if isinstance(module, nn.LayerNorm)]
        self.start_head(self.zero_shot_classifier(), [p for m in norms for p in (m.weight, m.bias)[: 1 + bias]])


def test_a_method_of_ones_own_is_a_few_lines(clip_model, prompts, batches, tmp_path):
    images, labels = (torch.cat(parts) for parts in zip(*batches[:2], strict=True))
    recipe = {"epochs": 3, "batch_size": 6, "lr": 0.01, "progress": False}
    method = NormTune(clip_model, label_smoothing=0.1, **prompts)
    assert NormTune.summary() == "Fine-tuning of the image tower's norm layers and a linear head."
    assert method.config["bias"] is True and method.config["objective"]["label_smoothing"] == 0.1
    before = method.step((images, labels)).loss
    fit(method, (images, labels), output=tmp_path, **recipe)
    assert method.step((images, labels)).loss < before
    assert torch.equal(method.model.visual.proj, clip_model.visual.proj)
    with pytest.raises(ValueError, match="method.bias was True and is False now"):
        fit(NormTune(clip_model, bias=False, **prompts), (images, labels), output=tmp_path, resume=True, **recipe)


def test_every_method_says_in_a_line_what_it_is_for():
    lines = [kind.summary() for kind in methods.every_method().values()]
    assert len(set(lines)) == len(lines) >= 15
    assert all(line and len(line) <= 120 for line in lines)
