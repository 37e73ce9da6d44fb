from __future__ import annotations

import html
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from robustft.calibration import ConformalSets
from robustft.clip.outputs import Outputs
from robustft.evaluation import Evaluation, Frontier, Groups, Suite, evaluate_predictions, worst_classes
from robustft.evaluation.report import write_report

SHIFTS, OOD = ("inverted", "noisy"), ("letters", "textures")


def predictions(seed: int, n: int = 80, k: int = 5, gain: float = 2.0) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    cosines = (0.3 * torch.randn(n, k, generator=g)).clamp(-1, 1)
    labels = torch.randint(k, (n,), generator=g)
    logits = 4 * cosines
    logits[torch.arange(n), labels] += gain
    return Outputs(cosines=cosines, logits=logits, labels=labels)


def suite(seed: int, shifts=SHIFTS, ood=OOD) -> Suite[Outputs]:
    return Suite(
        predictions(seed),
        {s: predictions(seed + 10 + i, gain=0.5) for i, s in enumerate(shifts)},
        {s: predictions(seed + 20 + i, gain=0.0) for i, s in enumerate(ood)},
    )


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate_predictions({"zero-shot": suite(0), "FT $<b>&": suite(100), "WiSE-FT": suite(200)})


def curve(evaluation: Evaluation) -> Frontier:
    a, m, b = evaluation.models.values()
    return Frontier(
        "WiSE",
        (0.0, 0.5, 1.0),
        (a.id_accuracy, b.id_accuracy, m.id_accuracy),
        (a.ood_accuracy, b.ood_accuracy, m.ood_accuracy),
        0.5,
    )


@pytest.fixture(scope="module")
def report(evaluation, tmp_path_factory) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    return write_report(
        tmp_path_factory.mktemp("run") / "new" / "folder",
        evaluation=evaluation,
        frontiers=[curve(evaluation)],
        samples={"id": images, "inverted": 255 - images[:2]},
        config={
            "seed": 3,
            "train": {"lr": 0.1, "path": Path("a/b"), "bad": math.nan},
            "dtype": torch.float32,
        },
        title="A <run>",
        notes=["A toy & no more."],
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A report of everything that can be shown."""
    sets = {"a <b>": ConformalSets("aps", 0.8).fit(predictions(7, 300))}
    models = {"a <b>": suite(0), "other": suite(100, SHIFTS[:1])}
    groups = Suite(Groups(torch.arange(80) % 2, ("in <door>", "out")), {}, {})
    images = [(PIL.Image.new("RGB", (9, 9), (3 * i, 0, 0)), 0) for i in range(80)]
    stressed = evaluate_predictions({"a <b>": suite(0, ("blur 1", "blur 5", "noise 1", "noise 5"), ())})
    return write_report(
        tmp_path_factory.mktemp("full"),
        evaluation=evaluate_predictions(models, details=True, conformal=sets, groups=groups),
        training={"a <b>": [{"step": i, "loss": 1 / i} for i in (1, 2, 3)], "$x": [{"step": 2, "loss": 0.5}]},
        mistakes={"a <b>": worst_classes(predictions(0), images)},
        stress=stressed,
        highlight=["a <b>"],
    )


def test_the_full_report_shows_all_its_parts(full):
    text = full.read_text()
    headings = re.findall(r"<(?:h2|summary)>(.*?)</", text)
    assert headings == [
        "In distribution and under shift",
        "Reliability",
        "Detection",
        "Answering the surest only",
        "Sets of classes",
        "Under stress",
        "Each severity",
        "Groups",
        "Worst classes",
        "Training",
        "Each set",
        "Each class",
    ]
    evaluation = evaluate_predictions({"a <b>": suite(0)}, details=True).models["a <b>"]
    for row in evaluation.id.classes:
        assert f"<td>{row.name} ({row.images})</td><td>{100 * row.recall:.1f} / " in text
    assert "<td>in &lt;door&gt; (40)</td>" in text and text.count("<img ") > 5
    first = worst_classes(predictions(0), [(None, 0)] * 80)[0].mistakes[0]
    assert f">image {first.row}</span>" in text
    assert "APS for 0.8" in text and "<td>noise</td>" in text and "<b>" not in text
    stressed = json.loads((full.parent / "metrics.json").read_text())["stress"]
    assert Evaluation.from_dict(stressed).shifts == ("blur 1", "blur 5", "noise 1", "noise 5")
    # Of the other model, whose sets nobody fitted and which did not see the second shift, there is a dash.
    assert re.search(r"<tr><td>other</td>(<td>[\d. /]+</td>){2}<td>–</td></tr>", text)


def test_the_table_of_stress_is_the_mean_over_severities(full):
    shifts = evaluate_predictions({"m": suite(0, ("blur 1", "blur 5", "noise 1", "noise 5"), ())}).models["m"].shifts
    reports = [shifts[name].calibration for name in ("noise 1", "noise 5")]
    cell = f"{50 * sum(r.accuracy for r in reports):.1f} / {50 * sum(r.ece for r in reports):.1f}"
    assert f"<tr><td>noise</td><td>{cell}</td></tr>" in full.read_text()


def test_paper_has_its_own_style(full):
    text = full.read_text()
    printed = text[text.index("@media print") : text.index("</style>")]
    assert "details::details-content" in printed and "break-inside: avoid" in printed
    assert "@media screen and (prefers-color-scheme: dark)" in text


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href")]


@pytest.mark.parametrize("which", ["report", "full"])
def test_the_report_is_one_well_formed_file_that_requests_nothing(which, request):
    text = request.getfixturevalue(which).read_text()
    links = Links()
    links.feed(text)
    assert links.open == []
    assert links.found and all(v.startswith(("#", "data:image/png;base64,")) for v in links.found)
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)
    assert not re.findall(r'(?<!xmlns=")(?<!xmlns:xlink=")https?://', text)


LAID_OUT = """<script>addEventListener("load", () => {
  const words = [...document.querySelectorAll("h1, h2, p, li, th, td, summary, figcaption, svg, img, pre")];
  const boxes = words.filter(e => e.getClientRects().length).map(e => [e, e.getBoundingClientRect()]);
  const meet = ([a, p], [b, q]) => !a.contains(b) && !b.contains(a) && p.width * p.height * q.width * q.height > 0 &&
    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
    Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 1;
  const name = ([e]) => e.tagName + " " + e.textContent.trim().slice(0, 30);
  const overlaps = boxes.flatMap((a, i) => boxes.slice(0, i).filter(b => meet(a, b)).map(b => [name(a), name(b)]));
  const root = document.documentElement;
  const found = {boxes: boxes.length, overlaps, wider: root.scrollWidth - root.clientWidth,
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"))};
  document.body.dataset.found = JSON.stringify(found);
})</script>"""


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium")
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_fetches_nothing_and_lays_nothing_over_another(full, width, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(full.read_text().replace("<details", "<details open").replace("</body>", LAID_OUT + "</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    shown = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}/profile", page.as_uri()], capture_output=True, text=True
    )
    found = json.loads(html.unescape(re.search('data-found="(.*?)"', shown.stdout)[1]))
    assert found.pop("boxes") > 100 and found == {"overlaps": [], "wider": 0, "fetched": []}


def test_the_report_shows_table_conventions_notes_and_configuration(report, evaluation):
    text = report.read_text()
    for row in evaluation.rows()[1:]:
        for cell in row:
            assert re.search(rf"<td[^>]*>{re.escape(html.escape(cell))}</td>", text), cell
    for sentence in (*evaluation.conventions(), "A <run>", "A toy & no more."):
        assert html.escape(sentence) in text
    for key, value in (("seed", "3"), ("train.lr", "0.1"), ("train.path", "a/b"), ("dtype", "torch.float32")):
        assert f"<tr><td>{key}</td><td>{value}</td></tr>" in text
    assert "<b>" not in text


def test_the_best_of_each_column_is_bold(report, evaluation):
    table = re.search(r"<tbody>(.*?)</tbody>", report.read_text(), re.S)[1]
    rows = [re.findall(r"<td( class=best)?>", row) for row in table.split("</tr>")[:3]]
    accuracies = [m.id_accuracy for m in evaluation.models.values()]
    assert [bool(row[1]) for row in rows] == [a == max(accuracies) for a in accuracies]
    eces = [m.ood_ece for m in evaluation.models.values()]
    assert [bool(row[4]) for row in rows] == [e == min(eces) for e in eces]


def test_every_picture_is_drawn_twice_as_svg_and_as_png(report):
    drawn = re.findall(r"<svg.*?</svg>", report.read_text(), re.S)
    pngs = sorted(p.name for p in (report.parent / "figures").iterdir())
    assert pngs == ["frontier.png", "reliability.png", "samples.png", "scores.png"] and len(drawn) == 4
    for svg in drawn:
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert "var(--ink)" in svg and "#1f2329" not in svg
    for name in pngs:
        data = (report.parent / "figures" / name).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 300 and height > 100


def test_metrics_json_gives_the_evaluation_back(report, evaluation):
    data = json.loads((report.parent / "metrics.json").read_text())
    assert Evaluation.from_dict(data) == evaluation
    assert data["frontiers"][0]["chosen"] == 0.5 and data["config"]["train"]["bad"] is None


SEED = {"seed": 0}


@pytest.fixture(scope="module")
def highlighted(evaluation, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("highlighted")
    return write_report(folder, evaluation=evaluation, config=SEED, highlight=["WiSE-FT"])


def test_a_second_report_replaces_the_first_and_is_identical(highlighted, evaluation):
    first = highlighted.read_bytes()
    second = write_report(highlighted.parent, evaluation=evaluation, config=SEED, highlight=["WiSE-FT"])
    assert second.read_bytes() == first
    assert not [p for p in highlighted.parent.rglob("*") if p.name.startswith(".")]


def test_pictures_without_data_are_left_out(tmp_path):
    plain = evaluate_predictions({"only": suite(0, shifts=(), ood=())})
    write_report(tmp_path, evaluation=plain)
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["reliability.png"]


def test_highlight_chooses_models(highlighted, evaluation, tmp_path):
    every = write_report(tmp_path, evaluation=evaluation, config=SEED)
    assert len(highlighted.read_text()) < len(every.read_text())
    with pytest.raises(ValueError, match="not evaluated: .'nobody'"):
        write_report(tmp_path, evaluation=evaluation, highlight=["nobody"])


def test_labels_of_the_frontier_meet_no_other_label(evaluation):
    import matplotlib

    from robustft.evaluation import pictures

    with matplotlib.rc_context(pictures.STYLE):
        figure = pictures.frontier(evaluation, [curve(evaluation)])
        texts = [t for t in figure.axes[0].texts]
        boxes = [t.get_window_extent() for t in texts]
    assert {t.get_text() for t in texts} == {"zero-shot", "FT $<b>&", "WiSE-FT (α = 0.5)"}
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_global_state_of_pyplot_is_not_touched(report):
    import matplotlib

    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    assert matplotlib.rcParams["font.size"] == matplotlib.rcParamsDefault["font.size"]


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_samples_that_are_no_pictures_are_refused(bad, evaluation, tmp_path):
    with pytest.raises(ValueError, match=r"samples\['x'\] must be uint8 \(n, H, W, 3\)"):
        write_report(tmp_path, evaluation=evaluation, samples={"x": bad})


def test_models_that_saw_different_sets_share_a_report_that_says_who_saw_what(tmp_path):
    evaluation = evaluate_predictions(
        {"none": suite(0, (), ()), "some": suite(1, SHIFTS[:1], OOD[1:]), "all": suite(2)}
    )
    page = write_report(tmp_path, evaluation=evaluation).read_text()
    assert "OOD: mean over inverted and noisy (some without noisy)." in evaluation.conventions()
    assert "textures and letters (some without letters)" in html.unescape(page)
    assert page.count("<td>–</td>") >= 5


def test_dollars_in_the_names_of_sets_and_models_are_text(tmp_path):
    names = ("a$_{", "$^$^"), ("$x", "o^{$$")
    evaluation = evaluate_predictions({"$\\frac{": suite(0, *names)}, score="msp")
    samples = {"$\\bad": np.zeros((2, 8, 8, 3), np.uint8)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path, evaluation=evaluation, samples=samples, title="$^")
    assert len(list((tmp_path / "figures").glob("*.png"))) == 4


def test_a_picture_that_cannot_be_drawn_loses_no_number(tmp_path, evaluation, monkeypatch):
    def broken(*_):
        raise RuntimeError("no <font>")

    monkeypatch.setattr("robustft.evaluation.pictures.reliability", broken)
    with pytest.warns(RuntimeWarning, match="reliability could not be drawn: RuntimeError: no <font>"):
        page = write_report(tmp_path, evaluation=evaluation).read_text()
    assert "no &lt;font&gt;" in page and "<h2>Detection</h2>" in page
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert Evaluation.from_dict(numbers) == evaluation


def test_an_unwritable_directory_says_so(evaluation, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_report(tmp_path / "file", evaluation=evaluation)
