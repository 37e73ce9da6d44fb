"""What an evaluation holds beyond its table: classes, groups, selective risk, conformal sets; and runs merged."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from robustft.calibration import ConformalSets, calibration_report, coverage_report
from robustft.clip.outputs import Outputs
from robustft.data import ImageDataset, PathDataset
from robustft.evaluation import (
    Evaluation,
    Groups,
    Suite,
    evaluate_predictions,
    group_accuracy,
    groups_in,
    selective_risk,
    worst_classes,
)

NAMES = ("ant", "bee", "cat", "dog")


def outputs(seed, n=120, gain=1.5):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)  # nothing is a dog
    logits = torch.randn(n, 4, generator=g, dtype=torch.float64)
    logits[torch.arange(n), labels] += gain
    return Outputs(logits=logits, labels=labels, classes=NAMES)


def suite(seed, shifts=("night",)):
    return Suite(outputs(seed), {name: outputs(seed + 1 + i, gain=0.3) for i, name in enumerate(shifts)}, {})


GROUPS = Suite(Groups(torch.arange(120) % 3, ("a", "b", "c")), {"night": None}, {})


@pytest.fixture(scope="module")
def detailed():
    sets = ConformalSets("thr", 0.8).fit(outputs(99, 400))
    return evaluate_predictions({"m": suite(0)}, details=True, conformal={"m": sets}, groups=GROUPS), sets


def test_details_are_those_of_their_own_functions(detailed):
    evaluation, sets = detailed
    found, p = evaluation.models["m"].id, outputs(0)
    confidence, predicted = p.probabilities.max(1)
    assert found.selective == selective_risk(confidence, predicted == p.labels).thinned()
    report = coverage_report(sets.sets(p), p.labels, NAMES)
    assert found.conformal.report.all == report.all and found.conformal.report.by_class == report.by_class[:3]
    assert [row.name for row in found.classes] == ["ant", "bee", "cat"]
    for k, row in enumerate(found.classes):
        rows = p.labels == k
        of_class = calibration_report(p.probabilities[rows], p.labels[rows])
        assert (row.images, row.recall) == (int(rows.sum()), pytest.approx(of_class.accuracy))
        assert (row.ece, row.noise_floor) == pytest.approx((of_class.ece, of_class.noise_floor))
        assert row.precision == pytest.approx(float((p.labels[predicted == k] == k).double().mean()))
    table = group_accuracy(p.logits, p.labels, GROUPS.id.of)
    assert [(row.name, row.images) for row in found.groups] == [("a", 40), ("b", 40), ("c", 40)]
    assert [row.accuracy for row in found.groups] == pytest.approx(table.accuracy.tolist())
    assert evaluation.models["m"].shifts["night"].groups == ()


def test_details_survive_json_and_are_absent_where_nobody_asked(detailed):
    evaluation, _ = detailed
    text = json.dumps(evaluation.to_dict(), allow_nan=False)
    assert Evaluation.from_dict(json.loads(text)) == evaluation
    plain = evaluate_predictions({"m": suite(0)})
    assert plain.models["m"].id[3:] == (None, None, (), ())
    assert not {"selective", "conformal", "classes", "groups"} & plain.to_dict()["results"][0]["metrics"].keys()
    assert plain.models["m"].id[:3] == evaluation.models["m"].id[:3]


def test_damaged_details_are_refused(detailed):
    data = json.loads(json.dumps(detailed[0].to_dict()))
    for path, value in (
        (("selective", "aurc"), "much"),
        (("selective", "risk"), [0.1]),
        (("classes", 0, "name"), 3),
        (("groups", 0, "ece"), "x"),
        (("conformal", "report", "all", "lower"), []),
    ):
        broken = json.loads(json.dumps(data))
        at = broken["results"][0]["metrics"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        with pytest.raises(ValueError, match="not what Evaluation.to_dict gives"):
            Evaluation.from_dict(broken)


def test_sets_of_other_classes_have_no_conformal_result_and_unknown_models_are_refused():
    sets = ConformalSets("thr", 0.8).fit(outputs(99, 400))
    few = Suite(outputs(0), {"part": Outputs(logits=torch.randn(9, 2), labels=torch.zeros(9).long())}, {})
    few.shifts["part"].classes = NAMES[:2]
    found = evaluate_predictions({"m": few}, conformal={"m": sets}).models["m"]
    assert found.id.conformal is not None and found.shifts["part"].conformal is None
    with pytest.raises(ValueError, match=r"conformal names models that are not evaluated: \['n'\]"):
        evaluate_predictions({"m": few}, conformal={"n": sets})


def test_groups_are_found_in_data_sets_and_in_subsets():
    data = ImageDataset(
        np.zeros((4, 2, 2, 3), np.uint8), torch.zeros(4).long(), ("a",), groups=torch.tensor([1, 0, 2, 1])
    )
    assert groups_in(data).of.tolist() == [1, 0, 2, 1] and groups_in(replace(data, groups=None)) is None
    assert groups_in(torch.utils.data.Subset(data, [2, 0])).of.tolist() == [2, 1]


def test_runs_merge_into_models_with_all_their_sets():
    monday = evaluate_predictions({"zero-shot": suite(0), "CaRot": suite(10)})
    tuesday = evaluate_predictions({"zero-shot": suite(0, ("night", "rain")), "CaRot": suite(20, ("night", "rain"))})
    merged = Evaluation.merge({"monday": monday, "tuesday": tuesday})
    assert list(merged.models) == ["zero-shot", "CaRot (monday)", "CaRot (tuesday)"]
    assert list(merged.models["zero-shot"].shifts) == ["night", "rain"]
    assert merged.models["zero-shot"].pooled == tuesday.models["zero-shot"].pooled
    assert merged.models["CaRot (monday)"] == monday.models["CaRot"]
    assert Evaluation.merge({"monday": monday}) == monday
    detailed = evaluate_predictions({"zero-shot": suite(0, ("night", "rain"))}, details=True)
    for runs in ({"x": monday, "y": detailed}, {"x": detailed, "y": monday}):
        assert Evaluation.merge(runs).models["zero-shot"].id.selective is not None
    assert Evaluation.from_dict(json.loads(json.dumps(merged.to_dict()))) == merged


def test_shifts_of_one_name_and_other_sizes_are_told_apart():
    small = evaluate_predictions({"a": suite(0)})
    large = evaluate_predictions({"b": Suite(outputs(5, 200), {"night": outputs(6, 200)}, {})})
    merged = Evaluation.merge({"one": small, "two": large})
    assert merged.shifts == ("night (one)", "night (two)")
    assert "ID test sets differ: 120 images (a) and 200 images (b)" in " ".join(merged.conventions())
    assert not any("differ" in line for line in small.conventions())


def test_runs_measured_in_other_ways_are_refused():
    one, two = evaluate_predictions({"a": suite(0)}), evaluate_predictions({"a": suite(0)}, bins=10)
    with pytest.raises(ValueError, match=r"the runs differ in bins: 15 \(x\) and 10 \(y\)"):
        Evaluation.merge({"x": one, "y": two})
    with pytest.raises(ValueError, match="at least one run"):
        Evaluation.merge({})
    other = evaluate_predictions({"a": suite(3), "a (y)": suite(4)})
    with pytest.raises(ValueError, match=r"model 'a \(y\)' is there twice"):
        Evaluation.merge({"x": one, "y": other})


def test_worst_classes_come_with_their_most_confident_mistakes(tmp_path):
    labels = [0, 0, 1, 1, 1, 2]
    for i in range(6):
        Image.new("RGB", (200, 100), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    data = PathDataset(tuple((tmp_path / f"{i}.png", k) for i, k in enumerate(labels)), ("x", "y", "z"), lambda _: 0)
    logits = torch.tensor([[2, 1, 0], [0, 1, 0], [3, 0, 0], [0, 3, 0], [5, 0, 0], [0, 0, 1]]).double()
    found = worst_classes(Outputs(logits=logits, labels=torch.tensor(labels), classes=("x", "y", "z")), data)
    assert [(c.name, c.images, c.recall) for c in found] == [("y", 3, pytest.approx(1 / 3)), ("x", 2, 0.5)]
    first = found[0].mistakes
    assert [(m.row, m.predicted) for m in first] == [(4, "x"), (2, "x")] and first[0].confidence > first[1].confidence
    assert first[0].file == str(tmp_path / "4.png") and first[0].image.shape == (48, 96, 3)
    assert first[0].image[0, 0, 0] == 160
    tensors = [(torch.zeros(3, 4, 4), k) for k in labels]
    plain = worst_classes(Outputs(logits=logits, labels=torch.tensor(labels)), tensors, classes=1, each=1)
    assert [m[:3] for m in plain[0].mistakes] == [(4, "", "0")] and plain[0].mistakes[0].image is None
    with pytest.raises(ValueError, match="outputs are of 6 images, but the data set has 5"):
        worst_classes(Outputs(logits=logits, labels=torch.tensor(labels)), tensors[:5])
