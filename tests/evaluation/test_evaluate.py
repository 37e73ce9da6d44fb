from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from robustft import detection
from robustft.calibration.measures import calibration_report
from robustft.detection import mcm, ood_metrics
from robustft.evaluation import Evaluation, Frontier, Suite, evaluate, evaluate_predictions
from robustft.evaluation.sections import set_tables
from robustft.predictors import Outputs, Predictor


class Toy(Predictor):
    def __init__(self, seed: int, scale: float = 8.0, classes: int = 6) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(nn.functional.normalize(torch.randn(classes, 48, generator=g), dim=-1))
        self.dropout = nn.Dropout(0.9)
        self.scale = scale

    def outputs(self, images):
        u = nn.functional.normalize(self.dropout(images.flatten(1)), dim=-1)
        return Outputs(u, u @ self.w.T, self.scale * (u @ self.w.T))


class Pair(Predictor):
    """A predictor that holds two, and leaves their mode to whoever asks."""

    def __init__(self, *members) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def outputs(self, images):
        return Outputs(*((a + b) / 2 for a, b in zip(*(m.outputs(images) for m in self.members), strict=True)))


def pictures(seed: int, n: int = 60, classes: int = 6):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, 4, generator=g), torch.randint(classes, (n,), generator=g)


@pytest.fixture
def suite():
    return {
        "id": pictures(0),
        "shifts": {"inverted": pictures(1), "noisy": pictures(2, n=45)},
        "ood": {"letters": pictures(3, n=30), "textures": pictures(4, n=20)},
    }


def _outputs(model: Predictor, suite) -> Suite[Outputs]:
    return Suite(suite["id"], suite["shifts"], suite["ood"]).map(model.predict)


@pytest.fixture
def evaluation(suite):
    return evaluate({"zero-shot": Toy(0), "FT": Toy(1, scale=30.0)}, **suite)


def test_predictions_are_made_in_evaluation_mode_without_gradient_and_modes_come_back():
    images, labels = pictures(0)
    model = Toy(0).train()
    p = model.predict((images, labels), batch_size=7)
    expected = nn.functional.normalize(images.flatten(1), dim=-1)
    torch.testing.assert_close(p.features, expected)
    torch.testing.assert_close(p.logits, 8.0 * p.cosines)
    assert torch.equal(p.labels, labels) and not p.logits.requires_grad
    assert model.training and model.dropout.training
    pair = Pair(model, Toy(1).train()).predict((images, labels))
    torch.testing.assert_close(pair.features, expected)
    torch.testing.assert_close(p.probabilities, (8.0 * p.cosines).double().softmax(-1))


def test_every_number_is_that_of_calibration_and_detection_on_the_whole_set(suite, evaluation):
    for name, model in (("zero-shot", Toy(0)), ("FT", Toy(1, scale=30.0))):
        result = evaluation.models[name]
        p = {k: model.predict(d) for k, d in {"id": suite["id"], **suite["shifts"], **suite["ood"]}.items()}
        assert result.id.calibration == calibration_report(p["id"].probabilities, p["id"].labels)
        for k, s in result.shifts.items():
            assert s.calibration == calibration_report(p[k].probabilities, p[k].labels)
        for k, m in result.ood.items():
            assert m == ood_metrics(mcm(p["id"].cosines), mcm(p[k].cosines))
        assert result.ood_accuracy == pytest.approx(np.mean([s.calibration.accuracy for s in result.shifts.values()]))
        assert result.ood_ece == pytest.approx(np.mean([s.calibration.ece for s in result.shifts.values()]))
        assert result.auroc == pytest.approx(np.mean([m.auroc for m in result.ood.values()]))
        assert result.fpr == pytest.approx(np.mean([m.fpr for m in result.ood.values()]))
        pooled = result.pooled
        assert pooled.count == 105 and pooled.accuracy == pytest.approx(
            (60 * result.shifts["inverted"].calibration.accuracy + 45 * result.shifts["noisy"].calibration.accuracy)
            / 105
        )
        assert sum(result.scores.id) == 60 and sum(result.scores.ood["letters"]) == 30


def test_top_five_and_class_recall_equal_scikit_learn(evaluation, suite):
    metrics = pytest.importorskip("sklearn.metrics")
    p = Toy(0).predict(suite["id"])
    found = evaluation.models["zero-shot"].id
    assert found.acc5 == pytest.approx(metrics.top_k_accuracy_score(p.labels, p.logits, k=5, labels=range(6)))
    assert found.mean_per_class_recall == pytest.approx(metrics.balanced_accuracy_score(p.labels, p.logits.argmax(1)))


def test_ready_predictions_give_the_same_evaluation(suite, evaluation):
    models = {"zero-shot": Toy(0), "FT": Toy(1, scale=30.0)}
    ready = {
        name: Suite(
            m.predict(suite["id"]),
            {k: m.predict(d) for k, d in suite["shifts"].items()},
            {k: m.predict(d) for k, d in suite["ood"].items()},
        )
        for name, m in models.items()
    }
    assert evaluate_predictions(ready) == evaluation


def test_an_evaluation_survives_json(evaluation):
    text = json.dumps(evaluation.to_dict(), allow_nan=False)
    assert Evaluation.from_dict(json.loads(text)) == evaluation == Evaluation.from_dict(evaluation.to_dict())


def test_results_follow_the_schema_of_clip_benchmark(evaluation):
    data = evaluation.to_dict()
    assert [(r["model"], r["dataset"]) for r in data["results"]] == [
        (m, d) for m in ("zero-shot", "FT") for d in ("id", "inverted", "noisy")
    ]
    for r in data["results"]:
        assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= r.keys()
        assert {"acc1", "acc5", "mean_per_class_recall", "ece", "noise_floor", "nll", "brier"} <= r["metrics"].keys()


def test_the_table_has_a_row_a_model_and_its_conventions_below(evaluation):
    lines = evaluation.table().splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["zero-shot", "FT"]
    r = evaluation.models["FT"]
    for value in (
        r.id_accuracy,
        r.ood_accuracy,
        r.id.calibration.ece,
        r.ood_ece,
        r.ood_noise_floor,
        r.auroc,
        r.fpr,
    ):
        assert f"{100 * value:.1f}" in lines[3]
    footer = " ".join(lines[4:])
    assert "15 equal-width bins, full set" in footer and "FPR95: ID positive" in footer
    assert "inverted and noisy" in footer and "letters and textures" in footer
    assert max(map(len, lines[:4])) <= 100
    markdown = evaluation.markdown().splitlines()
    assert markdown[0].startswith("| model | acc ID | acc OOD") and {line.count("|") for line in markdown[:4]} == {8}


def test_without_shifts_or_ood_sets_their_columns_are_dashes():
    e = evaluate({"a": Toy(0)}, id=pictures(0))
    assert e.rows()[1].count("–") == 4
    assert e.models["a"].pooled is None and e.models["a"].scores is None
    assert Evaluation.from_dict(json.loads(json.dumps(e.to_dict(), allow_nan=False))) == e


def test_progress_counts_every_model_and_set(suite):
    seen = []
    evaluate({"a": Toy(0), "b": Toy(1)}, **suite, progress=lambda *a: seen.append(a))
    assert [(done, total) for done, total, _ in seen] == [(i, 10) for i in range(1, 11)]
    assert seen[0][2] == "a on id" and seen[-1][2] == "b on textures"


def test_bad_input_is_named(suite):
    class Broken(Toy):
        def outputs(self, images):
            out = super().outputs(images)
            out.logits[3] = torch.nan
            return out

    with pytest.raises(ValueError, match="1 of 60 rows of the classifier's logits hold NaN"):
        Broken(0).predict(suite["id"])
    with pytest.raises(TypeError, match=r"classifiers is .*expected a mapping of strings to Predictors"):
        evaluate({"a": nn.Linear(1, 1)}, **suite)
    with pytest.raises(ValueError, match="at least one model"):
        evaluate({}, **suite)
    images, labels = suite["id"]
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\]"):
        evaluate({"a": Toy(0)}, id=(images, labels + 1))
    with pytest.raises(ValueError, match="one length.*2, 2 and 1"):
        Frontier("WiSE", (0.0, 1.0), (0.1, 0.2), (0.3,))


def test_ood_labels_are_not_looked_at(suite):
    images, _ = suite["ood"]["letters"]
    suite["ood"]["letters"] = images, torch.full((30,), -1)
    assert evaluate({"a": Toy(0)}, **suite).models["a"].ood.keys() == {"letters", "textures"}


def test_somebody_elses_logits_are_measured_without_cosines_and_have_no_score_of_cosines(suite):
    known, far = ({"logits": 9 * torch.randn(50, 6), "labels": torch.arange(50) % 6} for _ in range(2))
    given = {"theirs": Suite(Outputs(**known), {"shift": Outputs(**far)}, {"far": Outputs(logits=far["logits"])})}
    found = evaluate_predictions(given, score="msp").models["theirs"]
    assert found.id.calibration == calibration_report(known["logits"].double().softmax(-1), known["labels"])
    assert found.ood["far"] == ood_metrics(*(detection.msp(of["logits"]) for of in (known, far)))
    beside = evaluate_predictions(given | {"ours": _outputs(Toy(1), suite)})
    assert beside.models["theirs"].ood == {} and beside.models["theirs"].id == found.id
    assert beside.rows()[1][-2:] == ("–", "–") and beside.ood == ("letters", "textures")
    assert Evaluation.from_dict(json.loads(json.dumps(beside.to_dict()))) == beside
    without = {"theirs": Suite(Outputs(**known), {}, {})}
    assert evaluate_predictions(without).models["theirs"].id == found.id


def test_outputs_hold_what_they_are_given_and_name_what_they_lack():
    p = Outputs(logits=torch.zeros(2, 3), labels=torch.zeros(2, dtype=torch.long))
    assert not p.has("features") and torch.equal(p.probabilities, torch.full((2, 3), 1 / 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="features are needed here, but these outputs hold logits"):
        p.replace(labels=None).features.sum()
    both = Outputs.cat([p, p.map(lambda part: part + 1)])
    assert both.logits[:, 0].tolist() == [0, 0, 1, 1] and both.only("labels", "features").has("labels")
    assert [part.shape for part in p.replace(labels=None, features=torch.zeros(2, 8))] == [(2, 8), (2, 3)]


@pytest.mark.parametrize("score", ["msp", "max_cosine", "energy"])
def test_another_score_is_that_of_detection_and_named_everywhere(suite, score):
    e = evaluate({"FT": Toy(1, scale=30.0)}, **suite, score=score)
    known, letters = (Toy(1, scale=30.0).predict(d) for d in (suite["id"], suite["ood"]["letters"]))
    function, field = getattr(detection, score), "cosines" if score == "max_cosine" else "logits"
    assert e.models["FT"].ood["letters"] == ood_metrics(*(function(getattr(p, field)) for p in (known, letters)))
    label = {"msp": "MSP", "max_cosine": "max cosine", "energy": "energy"}[score]
    assert f"{label} AUROC" in e.table() and f"AUROC and FPR95: {label}, mean over" in e.table()
    data = json.loads(json.dumps(e.to_dict(), allow_nan=False))
    assert f"{score}_auroc" in data["models"][0]["summary"] and {o["score"] for o in data["ood"]} == {score}
    assert Evaluation.from_dict(data) == e


@pytest.mark.parametrize("score", ["MCM", "knn", "gl_mcm", "neg_label"])
def test_scores_that_need_more_than_predictions_are_referred_to_the_detector(suite, score):
    with pytest.raises(ValueError, match=f"score must be one of .*'mcm'.*got '{score}'; .* fit a robustft.Detector"):
        evaluate({"FT": Toy(1)}, **suite, score=score)


def test_the_full_spectrum_counts_all_shifted_images_as_id_and_needs_all_classes_of_every_shift(suite):
    model = Toy(1)
    outputs = _outputs(model, suite)
    e = evaluate({"FT": model}, **suite)
    known = torch.cat([mcm(p.cosines) for p in (outputs.id, *outputs.shifts.values())])
    expected = {name: ood_metrics(known, mcm(p.cosines)) for name, p in outputs.ood.items()}
    assert e.models["FT"].full_spectrum == expected != e.models["FT"].ood
    assert Evaluation.from_dict(json.loads(json.dumps(e.to_dict()))) == e
    labelled, unknown, full = set_tables(e)
    assert "shifted images count as ID" in full and "shifted" not in labelled + unknown
    assert f"{100 * expected['letters'].auroc:.1f} / {100 * expected['letters'].fpr:.1f}" in full
    fewer = outputs.shifts["noisy"].map(lambda part: part[:, :4] if part.ndim == 2 else part % 4)
    some = Suite(outputs.id, {**outputs.shifts, "noisy": fewer.replace(features=None)}, outputs.ood)
    named = some.map(lambda p: p.replace(classes=tuple("abcdef")[: p.logits.shape[1]]))
    part = evaluate_predictions({"FT": named})
    assert part.models["FT"].full_spectrum == {} and len(set_tables(part)) == 2
    named = outputs.map(lambda p: p.replace(classes=tuple("abcdef")))
    others = {**named.shifts, "noisy": outputs.shifts["noisy"].replace(classes=tuple("uvwxyz"))}
    assert evaluate_predictions({"FT": Suite(named.id, others, named.ood)}).models["FT"].full_spectrum == {}
    assert evaluate_predictions({"FT": named}).models["FT"].full_spectrum == expected
    other = evaluate({"FT": model}, **{**suite, "ood": {"more": pictures(9)}})
    assert list(Evaluation.merge({"a": e, "b": other}).models["FT"].full_spectrum) == ["letters", "textures", "more"]
