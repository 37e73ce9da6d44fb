"""Names beside points of a picture: no name on another, on a point, or beyond the picture's edge.

A name goes to the nearest place around its point where it covers no other name and no point, and crosses as little of
the curves as can be. What finds no such place is written in a column right of the axes, with a line to its point. The
picture is made anew with room for the column until every name has a place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

LINE = 0.17  # inches from a name of the column to the next
LONGEST = 44  # characters of a name


class Label(NamedTuple):
    """A name and its point, in data coordinates, with the colour of its line."""

    x: float
    y: float
    text: str
    colour: str


Draw = Callable[[float, float], "tuple[Figure, Axes, list[Label], list[np.ndarray]]"]


def labelled(draw: Draw, ink: str, paper: str) -> Figure:
    """The figure of `draw(column, height)`, with all its labels written.

    `draw` makes a figure whose axes are at least `height` inches high and have `column` inches free on their right; it
    gives the figure, the axes, the labels and the curves (n, 2), both in data coordinates.
    """
    beside: set[int] = set()
    column = height = 0.0
    while True:
        figure, ax, labels, curves = draw(column, height)
        texts = [_text(ax, label, ink, paper) for label in labels]
        sizes = [text.get_window_extent() for text in texts]
        placed = _near(ax, labels, curves, sizes, beside)
        homeless = {i for i, box in enumerate(placed) if box is None}
        if homeless <= beside:
            break
        beside |= homeless
        column = max(sizes[i].width for i in beside) / figure.dpi + 0.45
        height = LINE * (len(beside) + 1)
    order = sorted(beside, key=lambda i: (-labels[i].y, -labels[i].x, i))
    middles = _column(ax, [ax.transData.transform((labels[i].x, labels[i].y))[1] for i in order], LINE * figure.dpi)
    boxes = dict(zip(order, middles, strict=True))
    for i, (label, text) in enumerate(zip(labels, texts, strict=True)):
        box = placed[i]
        if box is None:
            place = np.array([ax.bbox.x1 + 0.3 * figure.dpi, boxes[i]])
            end = place - [3 * figure.dpi / 72, 0]
        else:
            place = np.array([box.x0, (box.y0 + box.y1) / 2])
            origin = ax.transData.transform((label.x, label.y))
            end = np.clip(origin, box.min, box.max)
            if np.linalg.norm(end - origin) < 12 * figure.dpi / 72:
                end = origin
        to_data = ax.transData.inverted().transform
        left, middle = to_data(place)
        text.set_position((left, middle))
        x, y = to_data(end)
        if (x, y) != (label.x, label.y):
            (line,) = ax.plot(
                [label.x, x], [label.y, y], color=label.colour, lw=0.6, zorder=2, scalex=False, scaley=False
            )
            line.set_clip_on(False)
    return figure


def short(name: str, longest: int = LONGEST) -> str:
    """The name, without its middle where it is longer."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def _text(ax: Axes, label: Label, ink: str, paper: str) -> Text:
    from matplotlib.patheffects import withStroke

    text = ax.text(label.x, label.y, short(label.text), color=ink, fontsize=8.5, va="center", zorder=5)
    text.set_parse_math(False)
    text.set_path_effects([withStroke(linewidth=2.5, foreground=paper)])
    return text


def _near(
    ax: Axes, labels: Sequence[Label], curves: Sequence[np.ndarray], sizes: Sequence[Bbox], beside: set[int]
) -> list[Bbox | None]:
    """A box for each label in the axes, None for those that are to stand beside them or find no place."""
    from matplotlib.transforms import Bbox

    point = ax.figure.dpi / 72
    origins = ax.transData.transform([(label.x, label.y) for label in labels]) if labels else np.empty((0, 2))
    along = np.linspace(0, 1, 6)[:, None]
    drawn = (a + (b - a) * along for c in curves for a, b in itertools.pairwise(ax.transData.transform(c)))
    pieces = np.concatenate([np.empty((0, 2)), *drawn])
    angles = np.deg2rad([0, 180, 35, 145, -35, -145, 90, -90])
    places = np.array([[r * math.cos(a), r * math.sin(a)] for r in (9, 17, 27, 40, 55) for a in angles])
    sides = np.stack([np.clip(places[:, 0] / 6, -1, 1), np.zeros(len(places))], 1)
    taken = [[x - 4 * point, y - 4 * point, x + 4 * point, y + 4 * point] for x, y in origins]  # at first, the points
    found: list[Bbox | None] = []
    for i, (origin, size) in enumerate(zip(origins, sizes, strict=True)):
        # Right of the point it starts there, left of it it ends there, above and below it is centred.
        low = origin + places * point - np.array([size.width, size.height]) * (0.5 - 0.5 * sides)
        boxes = np.concatenate([low, low + [size.width, size.height]], 1)
        free = (boxes[:, :2] >= ax.bbox.min).all(1) & (boxes[:, 2:] <= ax.bbox.max).all(1)
        for x0, y0, x1, y1 in taken:
            free &= (boxes[:, 2] < x0) | (boxes[:, 0] > x1) | (boxes[:, 3] < y0) | (boxes[:, 1] > y1)
        if i in beside or not free.any():
            found.append(None)
            continue
        crossed = ((pieces[:, None] > boxes[:, :2]) & (pieces[:, None] < boxes[:, 2:])).all(2).sum(0)
        best = boxes[np.where(free, crossed + np.linalg.norm(places, axis=1) / 4, np.inf).argmin()]
        taken.append(best.tolist())
        found.append(Bbox.from_extents(*best))
    return found


def _column(ax: Axes, wanted: Sequence[float], line: float) -> list[float]:
    """Middles of lines, from the top down and `line` apart, within the height of the axes, near those `wanted`."""
    middles: list[float] = []
    for y in wanted:
        middles.append(min(y, middles[-1] - line if middles else ax.bbox.y1 - line / 2))
    floor = ax.bbox.y0 + line / 2
    for i in reversed(range(len(middles))):
        middles[i] = max(middles[i], floor)
        floor = middles[i] + line
    return middles
