"""Every method on every architecture that open_clip lists, small: as benchmarks/results/architectures.json has it."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from targets import case, exhaustive

from benchmarks import architectures, small_architectures
from benchmarks.architectures import RESULTS, WORKS, comes_back, made, mixed, outcomes, scored, small, stepped
from robustft import clip, methods

SAMPLE = ("ViT-B-16-SigLIP2", "PE-Core-B-16", "convnext_large_d", "coca_ViT-B-32", "EVA02-B-16", "mt5-base-ViT-B-32")
HELD = json.loads(RESULTS.read_text())
GROUPS = HELD["structures"]
FIRST = {group["architectures"][0]: group for group in GROUPS}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


def once(name, method, folder):
    """A step of a method on an architecture, and what is asked of its classifier."""
    with architectures.quiet():
        world = small(name, folder)
        trained = made(method, world)
        stepped(trained, world.data)
        classifier = trained.classifier()
    comes_back(classifier, world, folder / name)
    mixed(classifier, world)
    scored(classifier, world.data["image"], "mcm")
    scored(classifier, world.data["image"], "gl_mcm")


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_is_trained_saved_mixed_and_scored(name, tmp_path):
    if "mt5" in name:
        pytest.importorskip("transformers")
    once(name, "CaRot", tmp_path)


@pytest.mark.exhaustive
def test_every_listed_architecture_is_trained_and_saved(tmp_path):
    for name in sorted(set(small_architectures.names()) - set(FIRST)):
        with case(name), architectures.quiet():
            world = small(name, tmp_path)
            method = made("FLYP", world)
            stepped(method, world.data)
            comes_back(method.classifier(), world, tmp_path / name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FIRST)
def test_every_method_works_on_every_structure_or_refuses_it_as_the_table_says(name, tmp_path):
    with architectures.quiet():
        world = small(name, tmp_path)
        found = outcomes(world, sorted(methods.every_method(), key="LoCoOp".__ne__), tmp_path / name)
    assert found == FIRST[name]["methods"]
    assert small_architectures.towers(world.model) == {key: FIRST[name][key] for key in ("image", "text")}


def test_the_table_has_every_architecture_and_every_method():
    named = [name for group in GROUPS for name in group["architectures"]]
    if HELD["open_clip"] == clip.import_open_clip().__version__:
        assert sorted(named) == sorted(small_architectures.names())
    assert len(named) == len(set(named))
    for group in GROUPS:
        assert list(group["methods"]) == list(methods.every_method())


def test_the_page_is_that_of_the_table():
    assert architectures.PAGE.read_text() == architectures.page(HELD)


def test_a_refusal_names_what_is_needed_and_what_to_take_instead():
    reasons = {reason for group in GROUPS for reason in group["methods"].values()} - {WORKS}
    assert reasons
    for reason in reasons:
        assert "need" in reason or "expected" in reason, reason
        assert any(name in reason for name in ("CoOp", "prompt learners")), reason


@pytest.mark.parametrize(
    "name", ["mt5-base-ViT-B-32", "ViT-H-14-worldwide", *exhaustive("nllb-clip-base", "roberta-ViT-B-32")]
)
def test_embeddings_of_its_tokens_are_encoded_as_the_tokens_themselves(name, tmp_path):
    if "ViT-H" not in name:
        pytest.importorskip("transformers")
    world = small(name, tmp_path)
    tokens = world.prompts["tokenizer"](["ant", "the bee", "cows"])
    words = clip.token_embedding(world.model)(tokens)
    torch.testing.assert_close(
        clip.encode_embedded_texts(world.model, words, tokens), clip.encode_texts(world.model, tokens)
    )
    others = clip.encode_embedded_texts(world.model, words.roll(1, 0), tokens)
    assert not torch.allclose(others, clip.encode_texts(world.model, tokens), atol=1e-5)


LAST_MAPS = {
    "convnext_base": "visual.head.proj.weight",
    "convnext_large_d": "visual.head.mlp.fc2.weight",
    "EVA02-B-16": "visual.trunk.head.weight",
    "MobileCLIP2-S0": "visual.trunk.head.fc.weight",
    "PE-Core-B-16": "visual.trunk.head.weight",
    "ViT-B-16-SigLIP": "visual.trunk.attn_pool.mlp.fc2.weight",
}


def test_the_last_linear_map_of_a_timm_tower_is_found_and_moves_its_features(tmp_path):
    for name, path in LAST_MAPS.items():
        with case(name):
            model = small(name, tmp_path).model
            found, parameter = clip.visual_projection(model), model.get_parameter(path)
            assert found.data_ptr() == parameter.data_ptr() and found.shape == parameter.T.shape
            assert found.shape[1] == clip.feature_width(model) == 16


def test_the_last_map_of_a_hugging_face_mlp_is_found(tmp_path):
    pytest.importorskip("transformers")
    model = small("mt5-base-ViT-B-32", tmp_path).model
    assert clip.text_projection(model).data_ptr() == model.text.proj[-1].weight.data_ptr()


def test_a_captioners_decoder_is_not_trained(tmp_path):
    world = small("coca_base", tmp_path)
    method = made("FLYP", world)
    assert not any(p.requires_grad for p in method.model.text_decoder.parameters())
    assert all(p.requires_grad for p in method.model.visual.parameters())


def test_a_tower_without_a_map_goes_without_the_penalties(tmp_path):
    world = small("ViT-SO400M-16-SigLIP-i18n-256", tmp_path)
    with pytest.warns(UserWarning, match="CaRot goes without the term of cross_weight: model: the text tower"):
        method = made("CaRot", world)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert method.step(world.data).terms.keys() == {"contrastive", "orthogonality"}
