"""The study as one HTML file that needs nothing else, and as one Markdown file of tables.

Colours of pictures become CSS variables, as in `robustft.evaluation.report`, whose look both share.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from robustft.evaluation import pictures, report, sections
from robustft.pipeline.study.findings import Finding, Measured, Plot, Section, find, joined, spread
from robustft.pipeline.worlds import Benchmark

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Answer(NamedTuple):
    """A section with what was measured in each seed."""

    section: Section
    seeds: Sequence[Measured]

    @property
    def findings(self) -> list[Finding]:
        return [find(claim, self.seeds) for claim in self.section.claims]


INTRODUCTION = (
    "A toy that shows mechanisms: {toy}. "
    "It replicates no table of a paper. Each claim below is read off this toy alone: whether it appears here.",
    "Mixing weights, temperatures, VRF's a and b, DRM's proxy and lambda, Tip-Adapter's alpha and beta are chosen on "
    "ID validation data, {chosen}; "
    "the rest of the recipes is fixed. "
    "Numbers are means ± standard deviations over fine-tuning seeds, in % unless said otherwise; "
    "{measured}. "
    "A margin is positive where a seed agrees with the claim. A claim appears if every seed agrees and the mean margin "
    "exceeds its standard deviation; without any effect, one claim in four would have three seeds that agree in sign.",
)


def introduction(bundled: Benchmark) -> list[str]:
    """What is said of every study on a benchmark."""
    return [text.format(toy=bundled.toy, measured=bundled.measured, chosen=bundled.chosen) for text in INTRODUCTION]


def markdown(answers: Sequence[Answer], command: str, machine: str, bundled: Benchmark) -> str:
    lines = ["# The study", "", f"`{command}`; {machine}.", ""]
    lines += [line for text in introduction(bundled) for line in (text, "")]
    for answer in answers:
        section = answer.section
        lines += [f"## {section.title}", "", section.question, ""]
        lines += _markdown_table(_verdicts(answer)) + [""]
        for table in answer.seeds[0].tables:
            lines += [f"**{table}**", "", *_markdown_table(joined(answer.seeds, table)), ""]
            lines += [section.notes[table], ""] if table in section.notes else []
    return "\n".join(lines)


def page(answers: Sequence[Answer], command: str, machine: str, bundled: Benchmark) -> tuple[str, dict[str, bytes]]:
    """The HTML, and the pictures as PNG by name."""
    title = "robustft study"
    parts = [
        "<!doctype html>",
        "<html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{report.CSS}</style></head><body>",
        f"<h1>{title}</h1>",
        *(f"<p>{html.escape(text)}</p>" for text in introduction(bundled)),
        f"<p class=conventions><code>{html.escape(command)}</code>; {html.escape(machine)}.</p>",
    ]
    images = {}
    for answer in answers:
        section = answer.section
        parts += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.question)}</p>"]
        parts.append(sections.html_table(_verdicts(answer)))
        for table in answer.seeds[0].tables:
            parts += [f"<h3>{html.escape(table)}</h3>", sections.html_table(joined(answer.seeds, table))]
            if table in section.notes:
                parts.append(f"<p class=conventions>{html.escape(section.notes[table])}</p>")
        for plot in section.plots:
            drawing = report.Drawing(plot.name, plot.title, plot.caption, partial(_draw, plot, answer.seeds))
            images[plot.name], svg = report.render(drawing)
            parts.append(
                f"<h3>{html.escape(plot.title)}</h3><figure><div class=scroll>{svg}</div>"
                f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
            )
    return "\n".join([*parts, "</body></html>", ""]), images


def summary(answers: Sequence[Answer]) -> str:
    """Each claim with its verdict, as text for a terminal."""
    lines = []
    for answer in answers:
        lines += ["", answer.section.title]
        lines += [f"  {f.verdict:22} {f.claim.text} ({_margin(f)})" for f in answer.findings]
    return "\n".join(lines)


def _verdicts(answer: Answer) -> tuple[tuple[str, ...], ...]:
    rows = [(f.claim.text, f.verdict, _margin(f)) for f in answer.findings]
    return (("claim", "here", "margin"), *rows)


def _margin(finding: Finding) -> str:
    digits = 1 if finding.claim.unit == "points" else 2
    return f"{spread(finding.margins, digits)} {finding.claim.unit}"


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]


def _draw(plot: Plot, seeds: Sequence[Measured]) -> Figure:
    """A line a curve through its mean over the seeds, which share their x where these are a grid; thin lines a seed."""
    figure, (ax,) = pictures.panels(1, 1, panel=(5.6, 3.4), left=0.6, bottom=0.5, top=0.15)
    for k, name in enumerate(seeds[0].curves[plot.name]):
        colour = pictures.COLOURS[k % len(pictures.COLOURS)]
        dashes = pictures.LINES[(k // len(pictures.COLOURS)) % len(pictures.LINES)]
        curves = [np.asarray(s.curves[plot.name][name], dtype=float) for s in seeds]
        for x, y in curves:
            ax.plot(x, y, color=colour, ls=dashes, lw=0.6, alpha=0.4, zorder=1)
        x, y = np.nanmean(np.stack(curves), axis=0)
        ax.plot(x, y, color=colour, ls=dashes, lw=1.6, marker=".", ms=5, label=name, zorder=2)
    ax.set(xlabel=plot.x, ylabel=plot.y)
    if plot.logarithmic:
        ax.set_xscale("log")
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.set_xticks([], minor=True)
    columns = math.ceil(len(seeds[0].curves[plot.name]) / 8)
    ax.legend(frameon=False, fontsize=8, ncols=columns)
    return figure
