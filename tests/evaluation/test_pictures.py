"""The report's pictures: no name on another, colours that every eye tells apart, lines that differ without colours."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from test_report import SHIFTS, curve, suite

from robustft.evaluation import Evaluation, Frontier, curves, evaluate_predictions, pictures, report
from robustft.evaluation.labels import short
from robustft.evaluation.results import ModelResult


def names_of(figure, ax):
    """Boxes of the frontier's names, and of the whole figure, in pixels."""
    matplotlib.figure.Figure.draw_without_rendering(figure)
    return [text.get_window_extent() for text in ax.texts], figure.bbox


def at(result, id_accuracy, ood_accuracy):
    """A model of these accuracies."""

    def of(found, accuracy):
        return found._replace(calibration=replace(found.calibration, accuracy=accuracy))

    return ModelResult(of(result.id, id_accuracy), {"s": of(result.id, ood_accuracy)}, {})


@pytest.mark.parametrize(("models", "spread", "length"), [(24, 0.1, 10), (24, 0.001, 30), (9, 0.0, 90), (1, 0.0, 10)])
def test_no_name_of_the_frontier_meets_another_a_point_or_the_edge(models, spread, length):
    places = 0.7 + spread * np.random.default_rng(models).random((models, 2))
    one = evaluate_predictions({"m": suite(0, SHIFTS[:1], ())}).models["m"]
    evaluation = Evaluation({f"{i} {'n' * length}": at(one, *place) for i, place in enumerate(places)}, 15)
    with matplotlib.rc_context(pictures.STYLE):
        figure = pictures.frontier(evaluation)
        boxes, whole = names_of(figure, figure.axes[0])
        ax = figure.axes[0]
        dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(boxes) == models == len(dots)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = [ax.transData.transform(dot.get_xydata()[0]) for dot in dots]
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(whole.x0 <= b.x0 and b.x1 <= whole.x1 and whole.y0 <= b.y0 and b.y1 <= whole.y1 for b in boxes)


def test_names_of_curves_and_models_meet_neither():
    evaluation = evaluate_predictions({name: suite(100 * i) for i, name in enumerate(("a", "b", "c"))})
    many = [curve(evaluation), *(Frontier(f"curve {k}", (0.0, 1.0), (0.7, 0.8), (0.5, 0.6)) for k in range(9))]
    with matplotlib.rc_context(pictures.STYLE):
        figure = pictures.frontier(evaluation, many)
        boxes, _ = names_of(figure, figure.axes[0])
    assert len(boxes) == 12 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_long_titles_end_before_the_next_panel():
    evaluation = evaluate_predictions({f"{i} {'a long name ' * 5}": suite(i) for i in range(4)})
    with matplotlib.rc_context(pictures.STYLE):
        for figure in (pictures.reliability(evaluation.models), pictures.scores(evaluation.models)):
            boxes = [ax._left_title.get_window_extent() for ax in figure.axes if ax._left_title.get_text()]
            assert len(boxes) == 4 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert short("abcdefghij", 5) == "ab…ij" and short("abc", 5) == "abc"


def seen(colours, matrix):
    """CIELAB of sRGB colours, as an eye sees them whose linear RGB is multiplied by a matrix."""
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.array(matrix).T).clip(0, 1)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


# Machado et al. 2009, severity 1.0.
EYES = {
    "most": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("eye", EYES)
def test_colours_differ_for_every_eye_and_from_the_paper(eye, scheme):
    light, dark = report.CSS.split("prefers-color-scheme: dark")[:2]
    palette = dict(re.findall(r"--(\w+): (#\w{6})", light if scheme == "light" else dark))
    *colours, paper = (palette[name] for name in ("orange", "blue", "green", "purple", "amber", "sky", "paper"))
    if scheme == "light":
        assert tuple(colours) == pictures.COLOURS and paper == pictures.PAPER
    colours.append(paper)
    lab = seen(colours, EYES[eye])
    least = min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2))
    assert least > 10, least


def test_lines_differ_in_more_than_their_colour():
    looks = [curves.line_of(k, 10) for k in range(18)]
    assert len({(look["color"], look["ls"]) for look in looks}) == 18
    assert all(a["ls"] != b["ls"] and a["marker"] != b["marker"] for a, b in itertools.pairwise(looks[:6]))


def test_training_curves_take_several_runs_and_what_each_has():
    runs = {
        "one": [
            {"step": i, "epoch": 1, "loss": 1 / i, "gradient_norm": None, "note": "x", "lr": 0.1} for i in (1, 2, 3)
        ],
        "two": [{"step": 2, "loss": 0.4, "validation": {"accuracy": 0.5}, "broken": float("nan")}],
    }
    assert curves.measured(runs) == ["loss", "validation accuracy", "lr"]
    with matplotlib.rc_context(pictures.STYLE):
        figure = curves.training(runs)
    loss, accuracy, _ = figure.axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[1, 1], [2, 0.5], [3, 1 / 3]], [[2, 0.4]]]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[2, 0.5]]]
    assert [text.get_text() for text in figure.texts] == ["one", "two"]


def test_risk_curves_have_a_panel_a_set():
    evaluation = evaluate_predictions({"a": suite(0), "b": suite(9)}, details=True)
    with matplotlib.rc_context(pictures.STYLE):
        figure = curves.risk(evaluation.models, evaluation.shifts)
    assert [ax._left_title.get_text() for ax in figure.axes] == ["ID", *SHIFTS]
    end = figure.axes[0].lines[1].get_xydata()[-1]
    assert end.tolist() == pytest.approx([100, 100 * (1 - evaluation.models["b"].id_accuracy)])
