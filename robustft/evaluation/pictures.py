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

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from robustft.calibration.measures import CalibrationReport
from robustft.evaluation.results import TPR, Evaluation, Frontier, ModelResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1f2329", "#6b7179", "#dfe2e6", "#fefefe"
BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
COLOURS = (ORANGE, BLUE, GREEN, PURPLE, AMBER, SKY)
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)))

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
    figure, (ax,) = panels(1, 1, panel=(6.6, 4.4), left=0.6, bottom=0.5)
    labels = [
        _Label(100 * m.id_accuracy, 100 * m.ood_accuracy, name, INK)
        for name, m in evaluation.models.items()
        if m.shifts
    ]
    curves = []
    members: dict[tuple[float, float], int] = {}
    for curve in frontiers:
        x, y = 100 * np.asarray(curve.id_accuracy), 100 * np.asarray(curve.ood_accuracy)
        end = (round(x[-1], 3), round(y[-1], 3))
        colour = COLOURS[(list(members).index(end) if end in members else len(members)) % len(COLOURS)]
        members[end] = members.get(end, -1) + 1
        ax.plot(x, y, color=colour, ls=LINES[members[end] % len(LINES)], lw=1.5, marker=".", ms=4, zorder=2)
        curves.append(np.stack([x, y], 1))
        if curve.chosen is None:
            labels.append(_Label(x[len(x) // 2], y[len(y) // 2], curve.name, colour))
            continue
        chosen = int(np.argmin(np.abs(np.asarray(curve.alphas) - curve.chosen)))
        # The chosen ensemble usually is a model of the table too: one point, one label, in the curve's
        # colour.
        twins = [p for p in labels if math.hypot(p.x - x[chosen], p.y - y[chosen]) < 0.05 and p.colour == INK]
        labels = [p for p in labels if p not in twins[:1]]
        name = twins[0].text if twins else curve.name
        labels.append(_Label(x[chosen], y[chosen], f"{name} (α = {curve.chosen:.2g})", colour))
    for label in labels:
        ax.plot(label.x, label.y, "o", color=label.colour, ms=7, mec=PAPER, mew=1.0, zorder=3)
    ax.set(xlabel="accuracy ID (%)", ylabel="mean accuracy under shift (%)")
    ax.margins(0.12)
    _write_labels(ax, labels, curves)
    return figure


def reliability(models: Mapping[str, ModelResult]) -> Figure:
    """Per model, dots at each bin's mean confidence and accuracy, their area the bin's share of the set."""
    columns = _columns(len(models))
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
            diagram.text(0.46 * k, 1.04, text, color=colour, transform=diagram.transAxes, fontweight="bold", fontsize=8)
        diagram.set_title(name, pad=17, parse_math=False)
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
    columns = _columns(len(models))
    figure, axes = panels(len(models), columns, panel=(2.2, 1.7), left=0.15, bottom=0.5, gap=(0.25, 0.4), top=0.28)
    for ax, (name, model) in zip(axes, models.items(), strict=False):
        if model.scores is None:
            raise ValueError(f"model {name!r} has no scores: it was measured without OOD sets")
        edges = np.asarray(model.scores.edges)
        share = np.asarray(model.scores.id) / sum(model.scores.id)
        ax.stairs(share, edges, fill=True, color=BLUE, alpha=0.25, lw=0)
        ax.stairs(share, edges, color=BLUE, lw=1.3)
        legend = [("ID", BLUE)]
        colours = itertools.cycle((ORANGE, GREEN, PURPLE, AMBER))
        for (other, counts), colour in zip(model.scores.ood.items(), colours, strict=False):
            ax.stairs(np.asarray(counts) / sum(counts), edges, color=colour, lw=1.3)
            legend.append((f"{other}  AUROC {100 * model.ood[other].auroc:.1f}", colour))
        top = ax.get_ylim()[1]
        ax.vlines(next(iter(model.ood.values())).threshold, 0, top, color=INK, lw=0.9, ls=LINES[2])
        ax.set_title(name, parse_math=False)
        ax.set(yticks=(), ylim=(0, top * (1.05 + 0.15 * len(legend))))
        ax.spines["left"].set_visible(False)
        ax.grid(False)
        ax.locator_params(axis="x", nbins=4)
        for k, (text, colour) in enumerate(legend):
            y = 0.99 - 0.1 * k
            ax.text(
                1,
                y,
                text,
                color=colour,
                transform=ax.transAxes,
                ha="right",
                va="top",
                fontsize=8,
                fontweight="bold",
                parse_math=False,
            )
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
    split: tuple[float, ...] | None = None,
) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels and their axes, row by row; all sizes in inches.

    `top` is left free above every row. With `split`, a panel is a column of axes of these relative heights.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, right = math.ceil(count / columns), 0.15
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


def _columns(count: int) -> int:
    """At most four, and rows as even as can be."""
    return math.ceil(count / math.ceil(count / 4))


def _reliability_curve(
    diagram: Axes, counts: Axes, report: CalibrationReport, colour: str, index: int, total: int
) -> None:
    lower, upper, count, confidence, accuracy = np.array(report.bins).T
    share, width = count / report.count, upper - lower
    diagram.plot(confidence, accuracy, color=colour, lw=1.1, alpha=0.7, zorder=2, clip_on=False)
    diagram.scatter(
        confidence,
        accuracy,
        5 + 90 * share,
        color=colour,
        edgecolors=PAPER,
        linewidths=0.5,
        zorder=3,
        clip_on=False,
    )
    each = 0.84 * width / total
    counts.bar(lower + 0.08 * width + index * each, share, each, align="edge", color=colour)


class _Label(NamedTuple):
    x: float
    y: float
    text: str
    colour: str


def _write_labels(ax: Axes, labels: Sequence[_Label], curves: Sequence[np.ndarray]) -> None:
    """Writes each label beside its point: at the place nearby that covers the fewest labels, points and
    pieces of curve."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    point = ax.figure.dpi / 72
    ax.autoscale_view()
    origins = ax.transData.transform([(label.x, label.y) for label in labels])
    along = np.linspace(0, 1, 6)[:, None]
    drawn = (a + (b - a) * along for c in curves for a, b in itertools.pairwise(ax.transData.transform(c)))
    pieces = np.concatenate([np.empty((0, 2)), *drawn])
    boxes = [Bbox.from_bounds(x - 4 * point, y - 4 * point, 8 * point, 8 * point) for x, y in origins]
    angles = np.deg2rad([0, 180, 35, 145, -35, -145, 90, -90])
    places = [r * np.array([math.cos(a), math.sin(a)]) for r in (9, 17, 27, 40, 55) for a in angles]

    for label, origin in zip(labels, origins, strict=True):
        text = ax.text(0, 0, label.text, color=label.colour, fontsize=8.5, va="center", zorder=5, parse_math=False)
        text.set_path_effects([withStroke(linewidth=2.5, foreground=PAPER)])
        size = text.get_window_extent()

        def box(place: np.ndarray, size: Bbox = size, origin: np.ndarray = origin) -> Bbox:
            # Right of the point it starts there, left of it it ends there, above and below it is centred.
            left = origin[0] + place[0] * point - size.width * (0.5 - 0.5 * np.clip(place[0] / 6, -1, 1))
            return Bbox.from_bounds(left, origin[1] + place[1] * point - size.height / 2, size.width, size.height)

        def cost(place: np.ndarray, box: Callable[..., Bbox] = box) -> float:
            b = box(place)
            inside = ax.bbox.x0 <= b.x0 and b.x1 <= ax.bbox.x1 and ax.bbox.y0 <= b.y0 and b.y1 <= ax.bbox.y1
            crossed = ((pieces > b.min) & (pieces < b.max)).all(1).sum()
            return 1000 * (not inside) + 20 * sum(map(b.overlaps, boxes)) + crossed + np.linalg.norm(place) / 4

        best = min(places, key=cost)
        b = box(best)
        boxes.append(b)
        to_data = ax.transData.inverted().transform
        x, y = to_data((b.x0, (b.y0 + b.y1) / 2))
        text.set_position((x, y))
        if np.linalg.norm(best) > 12:
            end = to_data(np.clip(origin, b.min, b.max))
            ax.plot(
                [label.x, end[0]],
                [label.y, end[1]],
                color=label.colour,
                lw=0.6,
                zorder=2,
                scalex=False,
                scaley=False,
            )
