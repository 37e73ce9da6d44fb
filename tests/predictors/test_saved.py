"""A saved classifier is an open_clip directory, and comes back with the same head and the same predictions."""

from __future__ import annotations

import copy
import shutil
import warnings

import pytest
import torch
from damage import change
from tiny_clip import CONFIG

import robustft
from robustft import clip, methods
from robustft.data import glyphworld
from robustft.predictors.saving import ENSEMBLE_FILE


@pytest.fixture(scope="module")
def bundle():
    return glyphworld.load_clip()


def test_a_classifier_comes_back_bit_for_bit_and_is_saved_again(bundle, tmp_path):
    torch.manual_seed(0)
    head, bias = torch.randn(3, 64), torch.randn(3)
    for saved in (
        methods.Classifier(bundle.model, head, ["a", "b", "é"], logit_scale=7.5, bias=bias),
        methods.Classifier(bundle.model, head, ["a", "b", "é"]).restrict(["é", "a"]),
    ):
        first = saved.save(tmp_path / "first", bundle.config)  # the second replaces the first's
        loaded = methods.load_predictor(first)
        again = methods.load_predictor(loaded.save(tmp_path / "second", clip.load(f"local-dir:{first}").config))
        for classifier in (loaded, again):
            assert classifier.classes == saved.classes
            assert classifier.state_dict().keys() == saved.state_dict().keys()
            assert all(torch.equal(v, classifier.state_dict()[k]) for k, v in saved.state_dict().items())
        theirs = clip.import_open_clip().create_model_and_transforms(f"local-dir:{first}")[0].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in bundle.model.state_dict().items())


def test_what_holds_no_head_is_refused_by_name(bundle, tmp_path):
    plain = clip.export(bundle.model, tmp_path / "plain", bundle.config)
    with pytest.raises(FileNotFoundError, match="classifier.safetensors: no such file"):
        methods.load_predictor(plain)
    for content in (b"", b"\x80\x04", (plain / clip.WEIGHTS_FILE).read_bytes()):
        (plain / clip.CLASSIFIER_FILE).write_bytes(content)
        with pytest.raises(ValueError, match="classifier.safetensors: truncated, or no object"):
            methods.load_predictor(plain)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("class_embeddings", torch.nan, ""),
        ("class_embeddings", torch.zeros(2, 64), "one row for each of the 3 classes"),
        ("class_embeddings", torch.zeros(3, 64, dtype=torch.int64), "floating point"),
        ("logit_scale", 0.0, "logit_scale must be positive"),
        ("logit_scale", torch.inf, "logit_scale must be finite"),
        ("bias", torch.zeros(4), "one row for each of the 3 classes"),
        ("classes", "abc", "classes must be a list of names"),
        ("colour", "red", "colour"),
    ],
)
def test_a_head_of_impossible_values_is_refused_with_the_files_name(bundle, tmp_path, name, value, message):
    saved = methods.Classifier(bundle.model, torch.randn(3, 64), ["a", "b", "c"], bias=torch.zeros(3))
    path = saved.save(tmp_path / "head", bundle.config) / clip.CLASSIFIER_FILE
    change(path, name, value)
    with pytest.raises(ValueError, match=f"{clip.CLASSIFIER_FILE}: .*{message}"):
        robustft.load_predictor(path.parent)


@pytest.fixture(scope="module")
def saved_ensembles(tmp_path_factory):
    """By kind, the folder of one."""
    torch.manual_seed(0)
    model = clip.import_open_clip().CLIP(**copy.deepcopy(CONFIG["model_cfg"])).eval()
    one, other = (methods.Classifier(model, torch.randn(3, 8), ["a", "b", "c"]) for _ in range(2))
    u = torch.nn.functional.normalize(torch.randn(60, 8), dim=1)
    zs, ft = one.head_outputs(u), other.head_outputs(u)
    labels = torch.where(torch.arange(60) % 3 > 0, ft.logits.argmax(1), zs.logits.argmax(1))
    data = methods.VRFFeatures(zs.only("logits"), ft.replace(labels=labels))
    mixture = methods.OutputEnsemble(one, other, (1.5, 2.0)).at(0.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the failure set has")
        vrf = methods.VRF(temperatures=(1.2, 0.8)).fit(data, data).classifier(one, other)
    made = {"mixture": mixture, "tempered": methods.Tempering(mixture).at(2.0), "vrf": vrf}
    folder = tmp_path_factory.mktemp("ensembles")
    saved = {kind: predictor.save(folder / kind, CONFIG) for kind, predictor in made.items()}
    for path in saved.values():
        robustft.load_predictor(path)
    return saved


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("mixture", "temperatures", [1.0, 0.0]),
        ("mixture", "temperatures", [1.0]),
        ("mixture", "temperatures", None),
        ("mixture", "alpha", -0.5),
        ("mixture", "alpha", "much"),
        ("tempered", "temperature", -1.0),
        ("tempered", "temperature", float("nan")),
        ("vrf", "temperatures", [0.0, 1.0]),
        ("vrf", "b", -1.0),
        ("vrf", "a", float("nan")),
        ("vrf", "k", 10**6),
        ("vrf", "weighting", "step"),
        ("vrf", "grid", [[1.0]]),
        ("vrf", "failure_set", torch.nan),
        ("vrf", "validation_distances", torch.inf),
    ],
)
def test_an_ensemble_of_impossible_values_is_refused_with_the_files_name(saved_ensembles, tmp_path, kind, name, value):
    saved = shutil.copytree(saved_ensembles[kind], tmp_path / "ensemble")
    change(saved / ENSEMBLE_FILE, name, value)
    with pytest.raises(ValueError, match=f"{ENSEMBLE_FILE}: "):
        robustft.load_predictor(saved)


def test_every_kind_is_known_whatever_was_imported_before(bundle, tmp_path, python):
    torch.manual_seed(0)
    prompts = {"tokenizer": bundle.tokenizer, "class_names": ("a", "b"), "templates": ("{}",)}
    zero_shot = methods.zero_shot_classifier(bundle.model, **prompts)
    train = methods.TipAdapter(zero_shot).fit(clip.Features(torch.eye(64)[:4], torch.arange(4) % 2))
    train.classifier().save(tmp_path / "cache", bundle.config)
    methods.OutputEnsemble(zero_shot, zero_shot).at(0.5).save(tmp_path / "mixture", bundle.config)
    program = "from robustft.predictors import load_predictor as load; print(*(type(load(d)).__name__ for d in {}))"
    run = python.run("-c", program.format([str(tmp_path / "mixture"), str(tmp_path / "cache")]))
    assert run.stdout.split() == ["Mixture", "CacheClassifier"], run.stderr[-2000:]


def test_a_predictor_of_ones_own_may_not_take_the_name_of_robustfts(bundle):
    with pytest.raises(TypeError, match="robustft has a predictor of kind 'Classifier'"):
        type("Classifier", (methods.Predictor,), {})


def test_a_head_of_another_models_width_is_refused_with_both_widths(bundle, tmp_path):
    saved = methods.Classifier(bundle.model, torch.randn(3, 64), ["a", "b", "c"])
    path = saved.save(tmp_path / "head", bundle.config) / clip.CLASSIFIER_FILE
    change(path, "class_embeddings", torch.randn(3, 32))
    with pytest.raises(ValueError, match=f"{clip.CLASSIFIER_FILE}: .*class_embeddings .*width 32.* width 64"):
        robustft.load_predictor(path.parent)
