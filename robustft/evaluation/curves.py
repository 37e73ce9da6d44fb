"""The report's curves over something: training over steps, risk over coverage. Figures as in `pictures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robustft.evaluation.labels import short
from robustft.evaluation.pictures import COLOURS, INK, LINES, MARKERS, columns_for, fit_title, panels
from robustft.evaluation.results import ModelResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 12
_NO_CURVES = ("step", "epoch", "seconds")
Records = Sequence[Mapping[str, Any]]


def measured(runs: Mapping[str, Records]) -> list[str]:
    """What the records of runs hold that can be drawn over steps: the loss first, then what was validated,
    then as they come."""
    names = dict.fromkeys(
        name
        for records in runs.values()
        for record in records
        for name, value in _numbers(record).items()
        if name not in _NO_CURVES and math.isfinite(value)
    )
    return sorted(names, key=lambda name: (name != "loss", not name.startswith("validation")))


def training(runs: Mapping[str, Records]) -> Figure:
    """What was logged over steps, a panel each and a line a run; `PANELS` panels at most."""
    names = measured(runs)[:PANELS]
    columns = columns_for(len(names), 3)
    figure, axes = _with_legend(list(runs), len(names), columns, panel=(2.3, 1.5), left=0.6)
    for i, (name, ax) in enumerate(zip(names, axes, strict=True)):
        for k, records in enumerate(runs.values()):
            rows = [(r["step"], v) for r in map(_numbers, records) if (v := r.get(name)) is not None and "step" in r]
            if rows:
                x, y = np.array(rows, float).T
                ax.plot(x, y, **line_of(k, len(rows)))
        fit_title(ax.set_title(name, parse_math=False), ax)
        ax.locator_params(axis="x", nbins=4)
        ax.locator_params(axis="y", nbins=4)
        if i >= len(names) - columns:
            ax.set_xlabel("step")
    return figure


def risk(models: Mapping[str, ModelResult], sets: Sequence[str]) -> Figure:
    """The share of errors among the answered images over the share that is answered: a panel a set, a line a model."""
    columns = columns_for(1 + len(sets), 3)
    figure, axes = _with_legend(list(models), 1 + len(sets), columns, panel=(2.3, 1.6), left=0.55)
    for i, (name, ax) in enumerate(zip(("ID", *sets), axes, strict=True)):
        for k, m in enumerate(models.values()):
            result = m.shifts.get(name) if i else m.id
            if result is not None and result.selective is not None:
                curve = result.selective
                x, y = 100 * np.array(curve.coverage), 100 * np.array(curve.risk)
                ax.plot(x, y, **line_of(k, len(x)), clip_on=False)
        fit_title(ax.set_title(name, parse_math=False), ax)
        ax.set(xlim=(0, 100), ylim=(0, None), xticks=(0, 50, 100))
        ax.locator_params(axis="y", nbins=4)
        if i % columns == 0:
            ax.set_ylabel("errors (%)")
        if i >= 1 + len(sets) - columns:
            ax.set_xlabel("answered (%)")
    return figure


def line_of(k: int, points: int) -> dict[str, Any]:
    """Colour, dashes and marker of the k-th line: no two of the first 18 are alike, nor neighbours without colours."""
    colour, dashes = COLOURS[k % len(COLOURS)], LINES[(k + k // len(COLOURS)) % len(LINES)]
    marker = MARKERS[k % len(MARKERS)] if points <= 40 else None
    return {"color": colour, "ls": dashes, "lw": 1.3, "marker": marker, "ms": 3, "zorder": 3}


def _with_legend(
    names: Sequence[str], count: int, columns: int, *, panel: tuple[float, float], left: float
) -> tuple[Figure, list[Axes]]:
    """Panels, and above them a legend of the lines, in columns of one width; none for a single line."""
    from matplotlib.lines import Line2D

    width = left + columns * panel[0] + (columns - 1) * 0.45
    each = max(1, int(width / 2.4)) if len(names) > 1 else 1
    rows = math.ceil(len(names) / each) if len(names) > 1 else 0
    figure, axes = panels(count, columns, panel=panel, left=left, bottom=0.45 + 0.2 * rows, gap=(0.45, 0.4), top=0.28)
    height = figure.get_figheight()
    for k, name in enumerate(names if rows else ()):
        x, y = left + (k % each) * (width - left) / each, 0.2 * (rows - k // each) - 0.1
        unit = figure.get_figwidth()
        handle = Line2D([x / unit, (x + 0.3) / unit], [y / height, y / height], transform=figure.transFigure)
        handle.set(**{**line_of(k, 1), "markevery": [1]})
        figure.add_artist(handle)
        longest = int((width - left) / each * 14) - 6
        text = figure.text((x + 0.38) / unit, y / height, short(name, longest), va="center", color=INK, fontsize=8)
        text.set_parse_math(False)
    return figure, axes


def _numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record, those of a record in it under both names."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found
