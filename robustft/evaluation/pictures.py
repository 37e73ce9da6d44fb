"""The report's pictures, as matplotlib figures; nothing here touches pyplot's global state.

    frontier      ID against mean-OOD accuracy: a point a model, a curve an ensemble over its mixing weight
    reliability   accuracy over confidence, ID and pooled shifts, with the share of samples in each bin below
    scores        OOD scores of the ID set against each semantic-OOD set, with the threshold at 95 % TPR
    samples       a strip of images for each set

Margins are set in inches, for a layout engine takes longer than all the drawing. One ink, one paper and Okabe
and Ito's colours, told apart by every common kind of colour vision. Ink, paper and grid are colours that
occur nowhere else, so that the report can hand them over to the reader's light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from robustft.calibration.measures import CalibrationReport
from robustft.evaluation.labels import LONGEST, Label, labelled, short
from robustft.evaluation.results import TPR, Evaluation, Frontier, ModelResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

INK, MUTED, GRID, PAPER = "#1f2329", "#6b7179", "#dfe2e6", "#fefefe"
BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
COLOURS = (ORANGE, BLUE, GREEN, PURPLE, AMBER, SKY)
OOD_COLOURS = tuple(colour for colour in COLOURS if colour != BLUE)
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P")

STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": PAPER,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "path",
    "svg.hashsalt": "robustft",
}
"""For `matplotlib.rc_context`, around making and around saving a figure."""


def frontier(evaluation: Evaluation, frontiers: Sequence[Frontier] = ()) -> Figure:
    """ID accuracy against mean accuracy over the shifts, in %; ensembles of the same fine-tuned model share a
    colour."""
    return labelled(partial(_frontier, evaluation, frontiers), INK, PAPER)


def _frontier(
    evaluation: Evaluation, frontiers: Sequence[Frontier], column: float, height: float
) -> tuple[Figure, Axes, list[Label], list[np.ndarray]]:
    figure, (ax,) = panels(1, 1, panel=(6.6, max(4.4, height)), left=0.6, bottom=0.5, right=0.15 + column)
    labels = [
        Label(100 * m.id_accuracy, 100 * m.ood_accuracy, name, INK) for name, m in evaluation.models.items() if m.shifts
    ]
    curves = []
    members: dict[tuple[float, float], int] = {}
    for curve in frontiers:
        x, y = 100 * np.asarray(curve.id_accuracy), 100 * np.asarray(curve.ood_accuracy)
        end = (round(x[-1], 3), round(y[-1], 3))
        place = list(members).index(end) if end in members else len(members)
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        members[end] = members.get(end, -1) + 1
        ax.plot(x, y, color=colour, ls=LINES[members[end] % len(LINES)], lw=1.5, marker=marker, ms=3, zorder=2)
        curves.append(np.stack([x, y], 1))
        if curve.chosen is None:
            labels.append(Label(x[len(x) // 2], y[len(y) // 2], curve.name, colour))
            continue
        chosen = int(np.argmin(np.abs(np.asarray(curve.alphas) - curve.chosen)))
        # The chosen ensemble usually is a model of the table too: one point, one label, in the curve's
        # colour.
        twins = [p for p in labels if math.hypot(p.x - x[chosen], p.y - y[chosen]) < 0.05 and p.colour == INK]
        labels = [p for p in labels if p not in twins[:1]]
        name = short(twins[0].text if twins else curve.name, LONGEST - 11)
        labels.append(Label(x[chosen], y[chosen], f"{name} (α = {curve.chosen:.2g})", colour))
    for label in labels:
        ax.plot(label.x, label.y, "o", color=label.colour, ms=7, mec=PAPER, mew=1.0, zorder=3)
    ax.set(xlabel="accuracy ID (%)", ylabel="mean accuracy under shift (%)")
    ax.margins(0.12)
    ax.autoscale_view()
    return figure, ax, labels, curves


def reliability(models: Mapping[str, ModelResult]) -> Figure:
    """Per model, dots at each bin's mean confidence and accuracy, their area the bin's share of the set."""
    columns = columns_for(len(models))
    figure, axes = panels(
        len(models),
        columns,
        panel=(2.0, 2.7),
        left=0.5,
        bottom=0.45,
        gap=(0.3, 0.35),
        top=0.45,
        split=(3.4, 1),
    )
    for i, ((name, model), (diagram, counts)) in enumerate(zip(models.items(), axes, strict=False)):
        diagram.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=LINES[1], zorder=1)
        sets = [("ID", BLUE, model.id.calibration)]
        if model.pooled is not None:
            sets.append(("OOD", ORANGE, model.pooled))
        for k, (label, colour, report) in enumerate(sets):
            _reliability_curve(diagram, counts, report, colour, k, len(sets))
            text = f"{label} ECE {100 * report.ece:.1f}"
            at = {"transform": diagram.transAxes, "clip_on": False}
            diagram.plot(0.5 * k + 0.02, 1.07, MARKERS[k], color=colour, ms=4, scalex=False, scaley=False, **at)
            diagram.text(0.5 * k + 0.06, 1.04, text, color=INK, fontsize=8, **at)
        fit_title(diagram.set_title(name, pad=17, parse_math=False), diagram)
        diagram.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        diagram.tick_params(labelbottom=False, labelleft=i % columns == 0)
        counts.set(xlim=(0, 1), xticks=(0, 0.5, 1), yticks=(), ylim=(0, None))
        counts.grid(False)
        counts.spines["left"].set_visible(False)
        if i % columns == 0:
            diagram.set_ylabel("accuracy")
            counts.set_ylabel("share", color=MUTED, fontsize=8)
        if i >= len(models) - columns:
            counts.set_xlabel("confidence")
    return figure


def scores(models: Mapping[str, ModelResult], score: str = "MCM") -> Figure:
    """Histograms of the OOD scores of the ID set and the OOD sets, a panel a model; every model must have `scores`."""
    columns = columns_for(len(models))
    figure, axes = panels(len(models), columns, panel=(2.2, 1.7), left=0.15, bottom=0.5, gap=(0.25, 0.4), top=0.28)
    for ax, (name, model) in zip(axes, models.items(), strict=False):
        if model.scores is None:
            raise ValueError(f"model {name!r} has no scores: it was measured without OOD sets")
        edges = np.asarray(model.scores.edges)
        share = np.asarray(model.scores.id) / sum(model.scores.id)
        ax.stairs(share, edges, fill=True, color=BLUE, alpha=0.25, lw=0)
        ax.stairs(share, edges, color=BLUE, lw=1.3)
        legend: list[tuple[str, str, Any]] = [("ID", BLUE, LINES[0])]
        for k, (other, counts) in enumerate(model.scores.ood.items()):
            colour, dashes = OOD_COLOURS[k % len(OOD_COLOURS)], LINES[(k + 1) % len(LINES)]
            ax.stairs(np.asarray(counts) / sum(counts), edges, color=colour, lw=1.3, ls=dashes)
            legend.append((f"{short(other, 20)}  AUROC {100 * model.ood[other].auroc:.1f}", colour, dashes))
        top = ax.get_ylim()[1]
        ax.vlines(next(iter(model.ood.values())).threshold, 0, top, color=INK, lw=0.9, ls=LINES[2])
        fit_title(ax.set_title(name, parse_math=False), ax)
        ax.set(yticks=(), ylim=(0, top * (1.05 + 0.15 * len(legend))))
        ax.spines["left"].set_visible(False)
        ax.grid(False)
        ax.locator_params(axis="x", nbins=4)
        for k, (text, colour, dashes) in enumerate(legend):
            y = 0.95 - 0.1 * k
            right = {"transform": ax.transAxes, "zorder": 5}
            ax.plot([0.91, 1], [y, y], color=colour, ls=dashes, lw=1.8, scalex=False, scaley=False, **right)
            ax.text(0.89, y, text, color=INK, ha="right", va="center", fontsize=8, parse_math=False, **right)
    dotted = f"{score} score; dotted: the threshold that keeps {TPR:.0%} of ID"
    figure.supxlabel(dotted, fontsize=9, y=0.01, parse_math=False)
    return figure


def check_samples(images: Mapping[str, np.ndarray]) -> None:
    """ValueError, naming the set, unless each holds images (n, H, W, 3) uint8."""
    for name, array in images.items():
        array = np.asarray(array)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or len(array) == 0:
            raise ValueError(f"samples[{name!r}] must be uint8 (n, H, W, 3), got {array.dtype} {array.shape}")


def samples(images: Mapping[str, np.ndarray], columns: int = 12) -> Figure:
    """The first images of each set, (n, H, W, 3) uint8, a set a row."""
    check_samples(images)
    strips = {name: np.asarray(array)[:columns] for name, array in images.items()}
    columns = max(map(len, strips.values()))
    figure, axes = panels(len(strips), 1, panel=(0.6 * columns, 0.55), left=1.2, gap=(0, 0.06), top=0.05)
    for ax, (name, strip) in zip(axes, strips.items(), strict=True):
        _, height, width, _ = strip.shape
        pitch = width + max(1, width // 12)
        canvas = np.zeros((height, columns * pitch, 4), np.uint8)  # transparent between the images
        for i, image in enumerate(strip):
            canvas[:, i * pitch : i * pitch + width, :3] = image
            canvas[:, i * pitch : i * pitch + width, 3] = 255
        ax.imshow(canvas, interpolation="none")
        ax.set_anchor("W")
        ax.set_axis_off()
        ax.text(-0.015, 0.5, name, transform=ax.transAxes, ha="right", va="center", parse_math=False)
    return figure


def panels(
    count: int,
    columns: int,
    *,
    panel: tuple[float, float],
    left: float,
    bottom: float = 0.05,
    gap: tuple[float, float] = (0.0, 0.0),
    top: float = 0.1,
    right: float = 0.15,
    split: tuple[float, ...] | None = None,
) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels and their axes, row by row; all sizes in inches.

    `top` is left free above every row. With `split`, a panel is a column of axes of these relative heights.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(count / columns)
    width = left + columns * panel[0] + (columns - 1) * gap[0] + right
    height = rows * (panel[1] + top) + (rows - 1) * gap[1] + bottom
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)  # labels are measured before anything is saved
    cells = []
    for i in range(count):
        x = left + (i % columns) * (panel[0] + gap[0])
        y = height - (i // columns + 1) * (panel[1] + top) - (i // columns) * gap[1]
        spacing, shares = 0.08, split or (1.0,)
        unit = (panel[1] - spacing * (len(shares) - 1)) / sum(shares)
        axes: list[Axes] = []
        for share in reversed(shares):
            axes.insert(0, figure.add_axes((x / width, y / height, panel[0] / width, share * unit / height)))
            y += share * unit + spacing
        cells.append(tuple(axes) if split else axes[0])
    return figure, cells


def columns_for(count: int, most: int = 4) -> int:
    """At most so many, and rows as even as can be."""
    return math.ceil(count / math.ceil(count / most))


def fit_title(title: Text, ax: Axes) -> None:
    """Shortens a title, in its middle, to the width of its panel and a little of the gap beside it."""
    text, limit = title.get_text(), 1.05 * ax.bbox.width
    longest = len(text)
    while longest > 4 and (width := title.get_window_extent().width) > limit:
        longest = min(longest - 1, int(longest * limit / width))
        title.set_text(short(text, longest))


def _reliability_curve(
    diagram: Axes, counts: Axes, report: CalibrationReport, colour: str, index: int, total: int
) -> None:
    lower, upper, count, confidence, accuracy = np.array(report.bins).T
    share, width = count / report.count, upper - lower
    diagram.plot(confidence, accuracy, color=colour, ls=LINES[index], lw=1.1, alpha=0.7, zorder=2, clip_on=False)
    diagram.scatter(
        confidence,
        accuracy,
        5 + 90 * share,
        marker=MARKERS[index],
        color=colour,
        edgecolors=PAPER,
        linewidths=0.5,
        zorder=3,
        clip_on=False,
    )
    each = 0.84 * width / total
    counts.bar(lower + 0.08 * width + index * each, share, each, align="edge", color=colour)
