"""A saved classifier is an open_clip directory, and comes back with the same head and the same predictions."""

from __future__ import annotations

import json

import pytest
import torch

from robustft import clip, methods
from robustft.data import glyphworld
from robustft.evaluation.measure import Evaluation, predict
from robustft.pipeline import quickstart


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
        loaded = methods.load_classifier(first)
        again = methods.load_classifier(loaded.save(tmp_path / "second", clip.load(f"local-dir:{first}").config))
        for classifier in (loaded, again):
            assert classifier.classes == saved.classes
            assert classifier.state_dict().keys() == saved.state_dict().keys()
            assert all(torch.equal(v, classifier.state_dict()[k]) for k, v in saved.state_dict().items())
        theirs = clip.import_open_clip().create_model_and_transforms(f"local-dir:{first}")[0].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in bundle.model.state_dict().items())


def test_what_holds_no_head_is_refused_by_name(bundle, tmp_path):
    plain = clip.export(bundle.model, tmp_path / "plain", bundle.config)
    with pytest.raises(FileNotFoundError, match="classifier.safetensors: no such file"):
        methods.load_classifier(plain)
    for content in (b"", b"\x80\x04", (plain / clip.WEIGHTS_FILE).read_bytes()):
        (plain / clip.CLASSIFIER_FILE).write_bytes(content)
        with pytest.raises(ValueError, match="classifier.safetensors: truncated, or no head"):
            methods.load_classifier(plain)


def test_exports_of_the_quickstart_predict_what_its_table_says(tmp_path):
    out = tmp_path / "out"
    options = {"method_names": ("FT", "FLYP"), "quick": True, "limit_batches": 2, "progress": False}
    quickstart.quickstart(out, log=lambda _: None, **options)
    table = Evaluation.from_dict(json.loads((out / "metrics.json").read_text())).models
    for name in ("zero-shot", "FT", "WiSE FT", "FLYP", "WiSE FLYP"):
        classifier = methods.load_classifier(out / "export" / name.lower().replace(" ", "-"))
        data = quickstart.Data.load(classifier.model, limit=200)
        predictions = predict(classifier, data.test.id)
        accuracy = (predictions.logits.argmax(1) == predictions.labels).double().mean().item()
        assert accuracy == table[name].id_accuracy, name
    held = {path.name for path in (out / "export").iterdir()}
    assert held == {"zero-shot", "ft", "flyp", "wise-ft", "wise-flyp"}
