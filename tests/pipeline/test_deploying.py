"""A pipeline as one graph, by every form: what it computes, what it holds, and what is said where there is none."""

from __future__ import annotations

import sys

import pytest
import torch
from targets import exhaustive

from benchmarks.deploy import ARCHITECTURES, pipeline_of
from robustft.detection import Detector, by_name
from robustft.functional import misalignment_penalty
from robustft.pipeline import deploying
from robustft.pipeline.deploying import TOLERANCES, write_graph
from robustft.pipeline.exporting import export_run
from robustft.pipeline.serving import Pipeline

NEAR = {"fp32": 1e-5, "fp16": 1e-2}  # what small models keep to


def close(pipeline, found, images, bits):
    expected = pipeline.outputs(images).probabilities
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=NEAR[bits])
    torch.testing.assert_close(found[1], pipeline.detector.scores(pipeline.outputs(images)), rtol=0, atol=NEAR[bits])


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP2", *exhaustive("ViT-B-16", "RN50", "convnext_base")])
@torch.no_grad()
def test_what_is_traced_is_the_image_tower_in_the_precision_and_the_head_in_float32(name, tmp_path):
    pipeline, images = pipeline_of(name, tmp_path)
    before = {key: (value.dtype, value.clone()) for key, value in pipeline.predictor.state_dict().items()}
    module = deploying._decisions(pipeline, "fp16", images[:1])
    close(pipeline, module(images), images, "fp16")
    held = {key.removeprefix("predictor."): value.dtype for key, value in module.state_dict().items()}
    towers = {key: dtype for key, dtype in held.items() if key.startswith("model.visual.")}
    assert {*held} - {*towers} == {"class_embeddings", "logit_scale"}
    assert {held["class_embeddings"], held["logit_scale"]} == {torch.float32}
    assert {*towers.values()} == {torch.float16}
    for key, (dtype, value) in before.items():  # of the pipeline, which goes on
        assert pipeline.predictor.state_dict()[key].dtype == dtype
        assert torch.equal(pipeline.predictor.state_dict()[key], value)


# `python -m benchmarks.deploy` has the whole grid, which takes minutes.
SOME = [(name, "onnx", "fp16") for name in ARCHITECTURES]  # test_own_images.py has fp32
SOME += [("ViT-B-16", "torch-export", "fp32"), ("ViT-B-16", "aot-inductor", "fp16")]


@pytest.mark.parametrize(("name", "form", "bits"), exhaustive(*SOME))
def test_a_graph_computes_what_the_pipeline_does_for_any_number_of_images(name, form, bits, tmp_path, monkeypatch):
    pipeline, images = pipeline_of(name, tmp_path)
    sizes, differences = [], deploying._differences

    def noting(pipeline, run, some):
        close(pipeline, run(some), some, bits)
        sizes.append(len(some))
        return differences(pipeline, run, some)

    monkeypatch.setattr(deploying, "_differences", noting)
    if name == "RN50":  # weights that are too large for one file lie beside it
        monkeypatch.setattr(deploying, "ONNX_BYTES", 0)
    apart = write_graph(pipeline, tmp_path, form, bits, images)
    assert apart <= TOLERANCES[bits] and sizes == [1, 6]  # traced with two
    assert (apart > 1e-6) == (bits == "fp16")
    assert (tmp_path / "model.onnx.data").exists() == (name == "RN50")


def scored_by(pipeline, monkeypatch, reads, score):
    """The pipeline with a score of somebody's own."""
    monkeypatch.setitem(by_name.SCORES, "own", by_name._entry(score, reads))
    images = torch.randn(6, 3, 8, 8)
    return Pipeline(pipeline.predictor, Detector("own", tpr=0.5).fit(pipeline.predictor, images), pipeline.transform)


def to_the_most_likely(logits):
    return misalignment_penalty(logits, logits.argmax(1), reduction="none")


def by_a_function_of_bessels(cosines):
    return torch.special.bessel_j0(cosines.amax(1))


def by_a_branch(cosines):
    return cosines.amax(1) if float(cosines.max()) > 0.0 else cosines.amin(1)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("form", "score", "words"),
    [
        ("torch-export", to_the_most_likely, "robustft.* is an operation of robustft's own, which other programs lack"),
        ("onnx", by_a_function_of_bessels, "onnx cannot have this model: .*bessel_j0"),
        ("torch-export", by_a_branch, "torch-export cannot have this model: "),
    ],
)
def test_an_operation_that_a_form_does_not_have_is_named(form, score, words, tmp_path, monkeypatch):
    pipeline, images = pipeline_of("ViT-B-16", tmp_path)
    own = scored_by(pipeline, monkeypatch, ("logits" if "likely" in score.__name__ else "cosines",), score)
    with pytest.raises(ValueError, match=words):
        write_graph(own, tmp_path, form, "fp32", images)


def test_what_is_missing_is_named_before_anything_is_traced(tmp_path, monkeypatch):
    pipeline, images = pipeline_of("ViT-B-16", tmp_path)
    monkeypatch.setattr(deploying, "_traced", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnx needs onnxruntime, .*pip install 'robustft\[onnx\]'"):
        write_graph(pipeline, tmp_path, "onnx", "fp32", images)
    monkeypatch.setattr(deploying, "compiler_found", lambda: False)
    with pytest.raises(RuntimeError, match=r"aot-inductor needs a C\+\+ compiler"):
        write_graph(pipeline, tmp_path, "aot-inductor", "fp32", images)
    learnt, images = pipeline_of("ViT-B-16", tmp_path, score="knn")
    with pytest.raises(ValueError, match="score 'knn' learns or reads patches and cannot be exported"):
        write_graph(learnt, tmp_path, "torch-export", "fp32", images)
    with pytest.raises(ValueError, match="precision is 'fp16', but transformers keeps the weights as they are"):
        export_run(tmp_path, to="transformers", output=tmp_path / "out", precision="fp16")


def test_features_that_float16_does_not_have_are_no_small_difference(tmp_path):
    pipeline, images = pipeline_of("ViT-B-16", tmp_path, score="energy")
    with torch.no_grad():
        pipeline.predictor.model.visual.proj *= 1e7
        module = deploying._decisions(pipeline, "fp16", images[:1])
        apart = deploying._differences(pipeline, module, images)
    assert not float(apart.max()) <= TOLERANCES["fp16"]
