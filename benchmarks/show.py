"""Results as text: a line a row while it runs, the bar at the end, the Markdown tables, and the plots against N."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustft.files import write_file

from . import bar

Record = Mapping[str, Any]
PRODUCTS_HIGH = 3
"""bfloat16 products that "high" takes for one of float32."""
CAPTION = (
    "Times are medians over interleaved rounds, with quartiles. Memory is the peak beyond inputs and results "
    "(gradients among them), in a process of its own. Rates count the least work, by the formula given; the share is "
    'of the best matrix product of the run: float32\'s at "highest", at "high" a third of bfloat16\'s if that is more, '
    "for bfloat16 the faster of both."
)


def middle(seconds: Iterable[float]) -> float:
    return bar.quantile(sorted(seconds), 0.5)


def duration(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{1e3 * seconds:.3g} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.3g} us"
    )


def share(record: Record, candidate: str) -> float | None:
    """The candidate's rate over the GEMM rate it could have; None where no products are counted."""
    if not record["flops"]:
        return None
    single, half = record["gemm"]["float32"], record["gemm"]["bfloat16"]
    match record["row"]["dtype"], record["row"]["precision"]:
        case "bfloat16", _:
            roof = max(single, half)
        case _, "high":
            roof = max(single, half / PRODUCTS_HIGH)
        case _:
            roof = single
    return record["flops"] / middle(record["candidates"][candidate]["seconds"]) / roof


def measured(record: Record) -> list[str]:
    """Candidates that were timed."""
    return [name for name, c in record["candidates"].items() if "seconds" in c]


def line(record: Record) -> str:
    """One row: robustft's time, and the peers' as multiples of it."""
    names = measured(record)
    if "robustft" not in names:
        return f"{record['name']:54} not available: {record['candidates']['robustft']['missing']}"
    part = share(record, "robustft")
    own = duration(middle(record["candidates"]["robustft"]["seconds"]))
    own += f" ({100 * part:.0f} % of GEMM)" if part is not None else ""
    others = [
        f"{name} {bar.speedup(record['candidates'], 'robustft', name)[0]:.2f}x" for name in names if name != "robustft"
    ]
    return f"{record['name']:54} {own:25} {', '.join(others)}"


def verdicts(machine: Record, records: Sequence[Record], quick: bool) -> str:
    """The bar for each number of threads: each criterion met, or by how much not; and the rows slower than eager."""
    lines = []
    for threads in sorted({r["threads"] for r in records}):
        own = [r for r in records if r["threads"] == threads]
        lines += [
            "",
            f"The bar, {_threads(threads)}" + (", at smaller sizes (--quick)" if quick else "") + ":",
        ]
        by_name = {r["name"]: r for r in own}
        asked = bar.bar(quick)
        found = [bar.judge(criterion, by_name) for criterion in asked if str(criterion.row) in by_name]
        for v in found:
            lines.append(f"  {v.status:13} {v.criterion.row}, {demand(v.criterion)}: {v.text}")
        met = sum(v.status == "met" for v in found)
        absent = sum(v.status == "not available" for v in found)
        unmeasured = len(asked) - len(found)
        lines.append(
            f"  {met} of {len(asked)} met"
            + (f", {absent} not available" if absent else "")
            + (f", {unmeasured} not measured in this run" if unmeasured else "")
            + "."
        )
        ratios = bar.against_eager(own)
        slower = [f"  not met       {name}: {ratio:.2f}x eager" for name, ratio in ratios if ratio < 1]
        amx = "an additional criterion" if not machine["amx"] else "asked of machines without AMX only"
        lines += [f"Never slower than eager ({amx}):", *slower]
        lines.append(f"  {len(ratios) - len(slower)} of {len(ratios)} rows met.")
    return "\n".join(lines[1:])


def demand(criterion: bar.Criterion) -> str:
    ours = "" if criterion.ours == "robustft" else f"{criterion.ours}, "
    match criterion.measure:
        case "speed":
            return f"{ours}{criterion.must:g}x {criterion.peer}"
        case "memory":
            return f"{ours}{criterion.must / bar.MB:.1f} MB beyond inputs and gradients"
        case _:
            return f"{ours}relative error"


def markdown(machine: Record, records: Sequence[Record], quick: bool, plots: Mapping[str, str]) -> str:
    """The whole report; `plots` are picture files by work."""
    where = f"{machine['cpu']}, {machine['isa']}{' with AMX' if machine['amx'] else ''}, {machine['cores']} cores"
    lines = [
        f"# Benchmarks: {machine['cpu']}",
        "",
        f"{where}; torch {machine['torch']}, robustft {machine['robustft']}, its code {machine['code']}.",
        "",
        'A row: `python -m benchmarks --threads THREADS --only "WORK ROW"`' + (" with `--quick`." if quick else "."),
    ]
    lines += ["", CAPTION, "", "```", verdicts(machine, records, quick), "```"]
    for work in dict.fromkeys(r["row"]["work"] for r in records):
        own = [r for r in records if r["row"]["work"] == work]
        lines += ["", f"## {work}", ""]
        lines += [f"Least work: {own[0]['formula']}.", ""] if own[0]["formula"] != "none" else []
        lines += [f"![{work}]({plots[work]})", ""] if work in plots else []
        lines += _table(own)
    return "\n".join([*lines, ""])


def _table(records: Sequence[Record]) -> list[str]:
    lines = [
        "| row | threads | candidate | time | of robustft's | memory | GFLOP/s | share of GEMM | error |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        row = record["name"].split(" ", 1)[1]
        for name, candidate in record["candidates"].items():
            cells = _cells(record, name, candidate)
            lines.append(f"| {row} | {record['threads']} | {name} | " + " | ".join(cells) + " |")
    return lines


def _cells(record: Record, name: str, candidate: Record) -> list[str]:
    if "missing" in candidate:
        return [candidate["missing"].replace("|", "\\|"), *[""] * 5]
    ordered = sorted(candidate["seconds"])
    median, low, high = (duration(bar.quantile(ordered, q)) for q in (0.5, 0.25, 0.75))
    ratio = bar.speedup(record["candidates"], "robustft", name)[0]
    memory = f"{candidate['extra_bytes'] / bar.MB:,.0f} MB" if "extra_bytes" in candidate else candidate["failed"]
    part = share(record, name)
    rate = f"{record['flops'] / middle(ordered) / 1e9:,.0f}" if record["flops"] else ""
    return [
        f"{median} ({low} to {high})", f"{ratio:.2f}x", memory, rate,
        "" if part is None else f"{100 * part:.0f} %", f"{candidate['error']:.0e}",
    ]  # fmt: skip


def plot(records: Sequence[Record], folder: Path, stem: str) -> dict[str, str]:
    """A PNG for each work that has at least two sizes of one shape: time, memory and share of GEMM against N.

    Drawn from the rows with the most threads, and the shape that has the most sizes. Gives the file names by work.
    """
    written = {}
    threads = max((r["threads"] for r in records), default=0)
    for work in dict.fromkeys(r["row"]["work"] for r in records):
        shapes: dict[tuple[Any, ...], list[Record]] = {}
        for record in records:
            row = record["row"]
            if row["work"] == work and record["threads"] == threads and measured(record):
                shapes.setdefault(tuple(row[key] for key in ("d", "k", "dtype", "precision")), []).append(record)
        sweep = sorted(max(shapes.values(), key=len, default=[]), key=lambda r: r["row"]["n"])
        if len(sweep) > 1:
            written[work] = f"{stem}-{work}.png"
            _draw(sweep, folder / written[work])
    return written


def _draw(sweep: Sequence[Record], path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from robustft.evaluation.pictures import COLOURS, LINES, STYLE

    panels = {
        "time, s": lambda record, name: middle(record["candidates"][name]["seconds"]),
        "memory beyond inputs and results, MB": lambda record, name: _plain_megabytes(record["candidates"][name]),
        "share of GEMM, %": lambda record, name: 100 * (share(record, name) or 0),
    }
    names = list(dict.fromkeys(name for record in sweep for name in measured(record)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axes, (title, value) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for i, name in enumerate(names):
                points = [(r["row"]["n"], value(r, name)) for r in sweep if name in measured(r)]
                style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS)], "marker": "o"}
                axes.plot(*zip(*points, strict=True), label=name, markersize=3, **style)
            axes.set_xscale("log", base=2)
            if "share" not in title:
                axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("N")
        figure.axes[0].legend(frameon=False)
        figure.suptitle(f"{sweep[-1]['name']} and smaller, {_threads(sweep[0]['threads'])}")
        png = io.BytesIO()
        FigureCanvasAgg(figure).print_png(png)
    write_file(path, png.getvalue())


def _plain_megabytes(candidate: Record) -> float:
    """At least a tenth, for the logarithmic axis; NaN, which is not drawn, where it was not measured."""
    return max(0.1, candidate["extra_bytes"] / bar.MB) if "extra_bytes" in candidate else float("nan")


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")
