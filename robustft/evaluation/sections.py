"""The report's parts of HTML: tables of what an evaluation holds in detail, and the images that went wrong.

Each gives "" where there is nothing to show. What a model was not measured on has a dash.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence

from robustft.evaluation.mistakes import Mistake, WorstClass
from robustft.evaluation.results import Evaluation, ModelResult, SetResult
from robustft.evaluation.tables import listed, percent

NONE = "–"
RISK = 0.05
"""The share of errors for which the table of selective risk says how much can be answered."""


def section(heading: str, *parts: str) -> str:
    """A heading and what is under it."""
    return "\n".join([f"<h2>{html.escape(heading)}</h2>", *parts])


def caption(text: str) -> str:
    """What a table or a picture shows, in small letters."""
    return f"<p class=conventions>{html.escape(text)}</p>"


def html_table(rows: Sequence[Sequence[str]], best: Sequence[frozenset[int]] = ()) -> str:
    """A table, header first; `best[column]` are the body rows to stress."""
    header, *body = rows
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
    for i, row in enumerate(body):
        marks = (" class=best" if column < len(best) and i in best[column] else "" for column in range(len(row)))
        lines.append("".join(f"<td{m}>{html.escape(cell)}</td>" for m, cell in zip(marks, row, strict=True)))
    content = "".join(f"<tr>{line}</tr>\n" for line in lines[1:])
    return f"<div class=scroll><table><thead><tr>{lines[0]}</tr></thead>\n<tbody>{content}</tbody></table></div>"


def details(summary: str, *parts: str) -> str:
    """Parts that are opened by a click, and on paper; none, if all are empty."""
    content = [part for part in parts if part]
    if not content:
        return ""
    return "\n".join([f"<details><summary>{html.escape(summary)}</summary>", *content, "</details>"])


def set_tables(evaluation: Evaluation) -> tuple[str, ...]:
    """Accuracy and ECE on every labelled set, AUROC and FPR95 on every OOD set, and these where shifts count as ID."""
    labelled = [("accuracy / ECE", "ID", *evaluation.shifts)]
    unknown = [("AUROC / FPR95", *evaluation.ood)]
    full = [("AUROC / FPR95, shifted images count as ID", *evaluation.ood)]
    for name, m in evaluation.models.items():
        labelled.append((name, *(_accuracy_and_ece(s) for s in _sets(m, evaluation))))
        for rows, found in ((unknown, m.ood), (full, m.full_spectrum)):
            metrics = [found.get(k) for k in evaluation.ood]
            rows.append((name, *(NONE if o is None else f"{100 * o.auroc:.1f} / {100 * o.fpr:.1f}" for o in metrics)))
    measured = any(m.full_spectrum for m in evaluation.models.values())
    tables = [*([unknown] if evaluation.ood else []), *([full] if measured else [])]
    return (html_table(labelled), *(html_table(rows) for rows in tables))


def selective(evaluation: Evaluation) -> str:
    """AURC, AUGRC and how much can be answered, of every model on every labelled set."""
    body = []
    for name, m in evaluation.models.items():
        cells = []
        for s in _sets(m, evaluation):
            curve = s and s.selective
            cells.append(
                f"{_small(curve.aurc)} / {_small(curve.augrc)} / {percent(curve.at_risk(RISK).coverage)}"
                if curve
                else NONE
            )
        if set(cells) != {NONE}:
            body.append((name, *cells))
    if not body:
        return ""
    told = (
        "AURC: mean share of errors among the answered images, over how many are answered, the surest first. AUGRC: "
        "the same with the errors as a share of all images. Less is better. Last: the share of images that can be "
        f"answered with at most {RISK:.0%} errors among them, measured on these very images."
    )
    header = (f"AURC / AUGRC / answered at {RISK:.0%} errors", "ID", *evaluation.shifts)
    return html_table([header, *body]) + caption(told)


def conformal(evaluation: Evaluation) -> str:
    """Coverage, its band, and mean size of the conformal sets of every model on every labelled set."""
    body: list[tuple[str, ...]] = []
    promised: dict[str, str] = {}
    for name, m in evaluation.models.items():
        cells = []
        for s in _sets(m, evaluation):
            result = s and s.conformal
            if result is None:
                cells.append(NONE)
                continue
            row = result.report.all
            band = f"{percent(row.lower)}–{percent(row.upper)}"
            cells.append(f"{percent(row.coverage)} ({band}), {row.mean_size:.2f}")
            promised[name] = f"{result.rule.upper()} for {result.target:.4g}"
        if set(cells) != {NONE}:
            body.append((name, *cells))
    if not body:
        return ""
    kinds = dict.fromkeys(promised.values())
    asked = listed(kinds if len(kinds) == 1 else (f"{name}: {kind}" for name, kind in promised.items()))
    told = (
        f"Sets of classes ({asked}): how many hold the true class, in brackets what binomial "
        "noise leaves open (95 %), and how many classes they hold in the mean. The promise is for the ID set, on "
        "average over its images; under shift nothing is promised, and here it is measured."
    )
    return html_table([("coverage (band), size", "ID", *evaluation.shifts), *body]) + caption(told)


def conformal_strata(evaluation: Evaluation) -> str:
    """Coverage by size of the set, on the ID set."""
    found = {name: m.id.conformal for name, m in evaluation.models.items() if m.id.conformal}
    sizes = dict.fromkeys(row.label for result in found.values() for row in result.report.by_size)
    if not found:
        return ""
    rows = [("coverage by size of the set (images), ID", *sorted(sizes, key=_first_number))]
    for name, result in found.items():
        by_size = {row.label: f"{percent(row.coverage)} ({row.images})" for row in result.report.by_size}
        rows.append((name, *(by_size.get(size, NONE) for size in rows[0][1:])))
    return html_table(rows)


def stress(evaluation: Evaluation) -> str:
    """Accuracy and ECE by corruption, mean over its severities, of every model; names as `data.stress` gives them."""
    kinds: dict[str, list[str]] = {}
    for name in evaluation.shifts:
        kinds.setdefault(_kind(name), []).append(name)
    rows = [("accuracy / ECE", *evaluation.models)]
    rows.append(("none (ID)", *(_accuracy_and_ece(m.id) for m in evaluation.models.values())))
    for kind, names in kinds.items():
        rows.append((kind, *(_mean_accuracy_and_ece(m, names) for m in evaluation.models.values())))
    rows.append(("mean", *(_mean_accuracy_and_ece(m, evaluation.shifts) for m in evaluation.models.values())))
    severities = dict.fromkeys(name[len(_kind(name)) :].strip() for name in evaluation.shifts)
    told = (
        "The ID test images, corrupted: mean over severities "
        f"{listed(severities)} of each kind. Below, each severity. These are not other data: they show what a model "
        "minds, not how it will do elsewhere."
    )
    return html_table(rows) + caption(told)


def stress_by_severity(evaluation: Evaluation) -> str:
    """Accuracy and ECE on each corrupted set, a table a model."""
    severities = tuple(dict.fromkeys(name[len(_kind(name)) :].strip() for name in evaluation.shifts))
    tables = []
    for model, m in evaluation.models.items():
        rows = [(model, *(f"severity {s}" for s in severities))]
        for kind in dict.fromkeys(map(_kind, evaluation.shifts)):
            rows.append((kind, *(_accuracy_and_ece(m.shifts.get(f"{kind} {s}".strip())) for s in severities)))
        tables.append(html_table(rows))
    return "\n".join(tables)


def classes(evaluation: Evaluation, shown: Iterable[str]) -> str:
    """Recall, precision and ECE of every class of the ID set, the worst of the first model first."""
    models = {name: evaluation.models[name].id.classes for name in shown if evaluation.models[name].id.classes}
    if not models:
        return ""
    by_name = {name: {row.name: row for row in rows} for name, rows in models.items()}
    first = next(iter(models.values()))
    order = [row.name for row in sorted(first, key=lambda row: row.recall)]
    order += [name for name in dict.fromkeys(row.name for rows in models.values() for row in rows) if name not in order]
    rows = [("class (images)", *models)]
    for name in order:
        found = [by_name[model].get(name) for model in models]
        images = next(row.images for row in found if row)
        cells = (
            f"{percent(row.recall)} / {_percent(row.precision)} / {percent(row.ece)} ({percent(row.noise_floor)})"
            if row
            else NONE
            for row in found
        )
        rows.append((f"{name} ({images})", *cells))
    told = (
        "Each class of the ID set: recall, which is the accuracy on its images / precision / ECE of its images (noise "
        f"floor: with few images an ECE says little). The worst of {next(iter(models))} first."
    )
    return caption(told) + html_table(rows)


def groups(evaluation: Evaluation) -> str:
    """Accuracy and ECE of every group, a table a set that has groups; the worst group of a model is stressed."""
    parts = []
    for name in ("ID", *evaluation.shifts):
        found = {
            model: {row.name: row for row in s.groups}
            for model, m in evaluation.models.items()
            if (s := m.id if name == "ID" else m.shifts.get(name)) is not None and s.groups
        }
        if not found:
            continue
        names = list(dict.fromkeys(group for rows in found.values() for group in rows))
        images = {group: row.images for rows in found.values() for group, row in rows.items()}
        rows = [(f"{name}: group (images)", *found)]
        for group in names:
            cells = (
                f"{percent(row.accuracy)} / {percent(row.ece)} ({percent(row.noise_floor)})" if row else NONE
                for row in (table.get(group) for table in found.values())
            )
            rows.append((f"{group} ({images[group]})", *cells))
        worst: list[frozenset[int]] = [frozenset()]
        for table in found.values():
            least = min(row.accuracy for row in table.values())
            worst.append(frozenset(i for i, g in enumerate(names) if g in table and table[g].accuracy == least))
        parts.append(html_table(rows, worst))
    told = caption("Accuracy / ECE (noise floor). Bold: the worst group of a model.")
    return "\n".join([*parts, told]) if parts else ""


def mistakes(found: Mapping[str, Sequence[WorstClass]]) -> str:
    """Each model's worst classes, and their most confident mistakes as images with file names."""
    parts = []
    for model, worst in found.items():
        if not worst:
            continue
        parts.append(f"<h3>{html.escape(model)}</h3>")
        for c in worst:
            told = f"{c.name}: {percent(c.recall)} % of {c.images} right"
            images = "".join(map(_mistake, c.mistakes))
            parts.append(f"<p class=worst>{html.escape(told)}</p><div class=mistakes>{images}</div>")
    told = "The classes of lowest recall, and their most confident mistakes: what was predicted, how surely, the file."
    return "\n".join([caption(told), *parts]) if parts else ""


def _mistake(m: Mistake) -> str:
    said = f"{m.predicted}, {100 * m.confidence:.0f}\u00a0%"
    where = m.file.rsplit("/", 1)[-1] if m.file else f"image {m.row}"
    picture = "<div class=nothing></div>"
    if m.image is not None:
        import PIL.Image

        file = io.BytesIO()
        PIL.Image.fromarray(m.image).save(file, "PNG", optimize=True)
        data = base64.b64encode(file.getvalue()).decode()
        coarse = " class=coarse" if max(m.image.shape) <= 48 else ""
        picture = f'<img{coarse} alt="{html.escape(where)}" src="data:image/png;base64,{data}">'
    file_name = f'<span class=file title="{html.escape(m.file)}">{html.escape(where)}</span>'
    return f"<figure>{picture}<figcaption>{html.escape(said)}<br>{file_name}</figcaption></figure>"


def _sets(m: ModelResult, evaluation: Evaluation) -> list[SetResult | None]:
    return [m.id, *(m.shifts.get(name) for name in evaluation.shifts)]


def _accuracy_and_ece(s: SetResult | None) -> str:
    return NONE if s is None else f"{100 * s.calibration.accuracy:.1f} / {100 * s.calibration.ece:.1f}"


def _mean_accuracy_and_ece(m: ModelResult, names: Sequence[str]) -> str:
    reports = [m.shifts[name].calibration for name in names if name in m.shifts]
    if len(reports) < len(names):
        return NONE
    accuracy, ece = (sum(values) / len(reports) for values in zip(*((r.accuracy, r.ece) for r in reports), strict=True))
    return f"{100 * accuracy:.1f} / {100 * ece:.1f}"


def _kind(name: str) -> str:
    """The corruption of a stressed set, without its severity."""
    kind, _, severity = name.rpartition(" ")
    return kind if severity.isdecimal() and kind else name


def _first_number(label: str) -> int:
    return int("".join(c if c.isdecimal() else " " for c in label).split()[0]) + label.startswith("over")


def _small(value: float) -> str:
    return NONE if math.isnan(value) else f"{100 * value:.2f}"


def _percent(value: float | None) -> str:
    return NONE if value is None else percent(value)
