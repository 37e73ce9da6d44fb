"""The evaluation as one HTML file that needs nothing else, with its pictures and numbers beside it.

    <directory>/report.html      tables, pictures (inline SVG), configuration; no request leaves it
               /figures/*.png    the same pictures
               /metrics.json     every number; `Evaluation.from_dict` reads it back

The pictures' colours become CSS variables, so that they follow the reader's light or dark scheme.
Files are written whole or not at all; those of an earlier report are replaced.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from robustft.evaluation import curves, pictures, sections
from robustft.evaluation.mistakes import WorstClass
from robustft.evaluation.results import Evaluation, Frontier
from robustft.files import write_file, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIGHLIGHTS = 6
DPI = 130

_VARIABLES = {
    pictures.INK: "var(--ink)",
    pictures.MUTED: "var(--muted)",
    pictures.GRID: "var(--grid)",
    pictures.PAPER: "var(--paper)",
    pictures.BLUE: "var(--blue)",
    pictures.ORANGE: "var(--orange)",
    pictures.GREEN: "var(--green)",
    pictures.PURPLE: "var(--purple)",
    pictures.AMBER: "var(--amber)",
    pictures.SKY: "var(--sky)",
}

CSS = """
:root { color-scheme: light dark; --ink: #1f2329; --muted: #6b7179; --grid: #dfe2e6; --paper: #fefefe;
  --blue: #0072b2; --orange: #d55e00; --green: #009e73; --purple: #cc79a7; --amber: #e69f00; --sky: #56b4e9; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --muted: #9aa1a9; --grid: #33383f; --paper: #16191d;
    --blue: #3f97dc; --orange: #e8702a; --green: #1fb58a; --purple: #d79aba; --amber: #f0c04a; --sky: #a9dbf8; }
} body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 62rem; background: var(--paper); color:
var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { margin: .4rem 0; max-width: 46rem; }
.conventions, figcaption { color: var(--muted); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th { font-weight: 600; color: var(--muted); border-bottom: 1.5px solid var(--muted); vertical-align: bottom; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr + tr td { border-top: 1px solid var(--grid); }
.best { font-weight: 700; }
.config td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: .6rem 0; }
svg { display: block; width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; margin-top: 1.6rem; }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--paper); }
.worst { font-weight: 600; font-size: .9rem; margin: .9rem 0 .2rem; overflow-wrap: anywhere; }
.mistakes { display: flex; flex-wrap: wrap; gap: .6rem; }
.mistakes figure { width: 7rem; margin: 0; }
.mistakes figcaption { line-height: 1.25; font-size: .75rem; overflow-wrap: anywhere; }
.mistakes img, .nothing { display: block; width: 6rem; height: 6rem; object-fit: contain; background: var(--grid);
  margin-bottom: .2rem; }
.coarse { image-rendering: pixelated; }
.file { color: var(--ink); }
@media (max-width: 40rem) {
  body { padding: 1rem .8rem 3rem; }
  .scroll th:first-child, .scroll td:first-child { white-space: normal; overflow-wrap: break-word;
    min-width: 26vw; max-width: 38vw; }
}
@media print {
  :root { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  svg { min-width: 0 !important; }
  th, td { padding: .15rem .35rem; white-space: normal; }
  table { font-size: .75rem; }
  figure, tr, .worst { break-inside: avoid; }
  h2, h3, summary, .worst, h2 + p { break-after: avoid; }
  thead { display: table-header-group; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


_FRONTIER = (
    "Mean accuracy over the shifts against accuracy on the ID test set. A curve mixes the zero-shot with "
    "a fine-tuned model; curves of the same fine-tuned model share a colour. The labelled dot on a curve "
    "is the weight alpha chosen on held-out ID data."
)
_RELIABILITY = (
    "Accuracy over confidence, with the share of the set in each bin below. Under the diagonal a model is"
    " over-confident. A dot's area is its bin's share. OOD: the samples of all shifts together, so its "
    "ECE is not the table's mean."
)
_SCORES = (
    "{score} of the ID test set and of sets without any known class. What lies right of the dotted line is "
    "accepted as in-distribution."
)
_SAMPLES = "The first images of each set."
_RISK = (
    "The share of errors among the images that a model answers, if it answers the surest only. At the right end it "
    "answers all."
)
_TRAINING = "What was logged while training, over steps."


class Drawing(NamedTuple):
    name: str
    heading: str
    caption: str
    draw: Callable[[], Figure]


def write_report(
    directory: str | Path,
    *,
    evaluation: Evaluation,
    frontiers: Sequence[Frontier] = (),
    samples: Mapping[str, np.ndarray] | None = None,
    config: Mapping[str, Any] | None = None,
    title: str = "robustft",
    notes: Sequence[str] = (),
    highlight: Sequence[str] | None = None,
    training: Mapping[str, curves.Records] | None = None,
    mistakes: Mapping[str, Sequence[WorstClass]] | None = None,
    stress: Evaluation | None = None,
) -> Path:
    """Writes `report.html`, `figures/*.png` and `metrics.json` into `directory` and returns the path of the
    first.

    `samples` are images of each set, (n, H, W, 3) uint8; `notes` are paragraphs under the title; `highlight`
    names the models that get a reliability diagram, a score histogram, a risk curve and a column in the table of
    classes (default: the first six). `training` are the records of metrics.jsonl, by the name of the run or method;
    `mistakes` what `evaluation.worst_classes` found, by model; `stress` an evaluation whose shifts are those of
    `robustft.data.stress`. What `evaluate(..., details=True, conformal=...)` measured is shown where it is there. Takes
    seconds, most of them in matplotlib. The numbers are written first, and a picture that cannot be drawn is left out
    with a RuntimeWarning. Models may have seen different sets. ValueError for a highlighted model that was not
    evaluated and for `samples` that are no images; OSError where the directory cannot be written.
    """
    models = evaluation.models
    unknown = [name for name in highlight or () if name not in models]
    if unknown:
        raise ValueError(f"highlight names models that were not evaluated: {unknown}; there are {list(models)}")
    pictures.check_samples(samples or {})
    shown = {name: models[name] for name in (highlight or list(models)[:HIGHLIGHTS])}
    scored = {name: m for name, m in shown.items() if m.scores is not None}
    selective = {name: m for name, m in shown.items() if m.id.selective is not None}
    directory = Path(directory)
    numbers = {
        "title": title,
        "notes": list(notes),
        **evaluation.to_dict(),
        "frontiers": [asdict(f) for f in frontiers],
        **({} if stress is None else {"stress": stress.to_dict()}),
        "config": dict(config or {}),
    }
    write_json(directory / "metrics.json", _plain(numbers), allow_nan=False)

    def drawn(name: str, heading: str, caption: str, draw: Callable[[], Figure], *more: str) -> str:
        drawing = Drawing(name, heading, caption, draw)
        return "\n".join([_section(drawing, directory / "figures" / f"{name}.png"), *more])

    parts: list[str] = []
    if evaluation.shifts:
        draw = partial(pictures.frontier, evaluation, frontiers)
        parts.append(drawn("frontier", "In distribution and under shift", _FRONTIER, draw))
    parts.append(drawn("reliability", "Reliability", _RELIABILITY, partial(pictures.reliability, shown)))
    if scored:
        label = evaluation.score_label
        caption, draw = _SCORES.format(score=label), partial(pictures.scores, scored, label)
        parts.append(drawn("scores", "Detection", caption, draw))
    if selective:
        draw = partial(curves.risk, selective, evaluation.shifts[: curves.PANELS - 1])
        table = sections.selective(evaluation)
        parts.append(drawn("risk", "Answering the surest only", _RISK, draw, table))
    if table := sections.conformal(evaluation):
        parts.append(sections.section("Sets of classes", table, sections.conformal_strata(evaluation)))
    if stress is not None and stress.shifts:
        by_severity = sections.details("Each severity", sections.stress_by_severity(stress))
        parts.append(sections.section("Under stress", sections.stress(stress), by_severity))
    if table := sections.groups(evaluation):
        parts.append(sections.section("Groups", table))
    if images := sections.mistakes(mistakes or {}):
        parts.append(sections.section("Worst classes", images))
    if samples:
        parts.append(drawn("samples", "The sets", _SAMPLES, partial(pictures.samples, samples)))
    if training and curves.measured(training):
        parts.append(drawn("training", "Training", _TRAINING, partial(curves.training, training)))
    parts.append(sections.details("Each set", *sections.set_tables(evaluation)))
    parts.append(sections.details("Each class", sections.classes(evaluation, shown)))
    path = directory / "report.html"
    write_text(path, _page(evaluation, title, notes, parts, config or {}))
    return path


def _section(drawing: Drawing, path: Path) -> str:
    """A picture's part of the page; its PNG goes to `path`. One that cannot be drawn says so, and a warning does."""
    try:
        png, svg = render(drawing)
    except Exception as error:  # of matplotlib or its fonts: the numbers must not be lost for it
        told = f"{drawing.name} could not be drawn: {type(error).__name__}: {error}"
        warnings.warn(told, RuntimeWarning, stacklevel=4)
        path.unlink(missing_ok=True)
        return f"<h2>{drawing.heading}</h2>\n<p>{html.escape(told)}</p>"
    write_file(path, png)
    return (
        f"<h2>{drawing.heading}</h2>\n<figure><div class=scroll>{svg}</div>\n"
        f"<figcaption>{drawing.caption}</figcaption></figure>"
    )


def _page(
    evaluation: Evaluation,
    title: str,
    notes: Sequence[str],
    content: Sequence[str],
    config: Mapping[str, Any],
) -> str:
    conventions = " ".join(evaluation.conventions())
    parts = [
        "<!doctype html>",
        "<html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        sections.html_table(evaluation.rows(), _best(evaluation)),
        f"<p class=conventions>{html.escape(conventions)} Bold: the best of its column.</p>",
        *filter(None, content),
    ]
    if config:
        rows = "".join(
            f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in _flat(_plain(config))
        )
        parts.append(f"<details><summary>Configuration</summary><table class=config>{rows}</table></details>")
    return "\n".join([*parts, "</body></html>", ""])


def _best(evaluation: Evaluation) -> list[frozenset[int]]:
    """Rows that hold the best value, as printed, of each column of `Evaluation.rows`."""
    columns = [
        [
            (m.id_accuracy, m.ood_accuracy, -m.id.calibration.ece, -m.ood_ece, m.auroc, -m.fpr)[k]
            for m in evaluation.models.values()
        ]
        for k in range(6)
    ]
    best: list[frozenset[int]] = [frozenset()]
    for values in columns:
        printed = [round(v, 3) for v in values]
        best.append(frozenset(i for i, v in enumerate(printed) if v == max(printed)))
    return best if len(evaluation.models) > 1 else []


def render(drawing: Drawing) -> tuple[bytes, str]:
    """A picture as PNG, and as an SVG element for use in HTML."""
    from matplotlib import style

    png, svg = io.BytesIO(), io.StringIO()
    with style.context(pictures.STYLE):
        figure = drawing.draw()
        figure.savefig(png, format="png", dpi=DPI)
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # The natural size becomes a limit for wide screens; below a floor, on phones, the picture scrolls.
    width = float(text.split('width="', 1)[1].split("pt", 1)[0]) * 96 / 72
    size = f"max-width: {1.15 * width:.0f}px; min-width: {min(0.8 * width, 560):.0f}px"
    text = re.sub(r' width="[\d.]+pt"', f' role="img" aria-label="{drawing.heading}" style="{size}"', text, count=1)
    text = re.sub(r' height="[\d.]+pt"', "", text, count=1)
    return png.getvalue(), text


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _plain(value: Any) -> Any:
    """JSON's own types: mappings and sequences alike, numpy scalars as numbers, NaN and infinity as null,
    else text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(k): _plain(v) for k, v in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(v) for v in value]
        case np.generic() | np.ndarray():
            return _plain(value.tolist())
        case _:
            return str(value)
