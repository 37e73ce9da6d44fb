"""What was found about models: by set, by model, over an ensemble's weights; as numbers, as JSON, as rows of a table.

"mean OOD" is the unweighted mean over the shifts (or over the OOD sets, for AUROC and FPR95). Every number is computed
once over a whole set and carries its convention; ECE carries the noise floor of its set.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from robustft.calibration.conformal import Coverage, CoverageReport
from robustft.calibration.measures import Bin, CalibrationReport
from robustft.detection.by_name import SCORES, label
from robustft.detection.metrics import OODMetrics
from robustft.evaluation import tables
from robustft.evaluation.selective import SelectiveRisk
from robustft.evaluation.tables import listed, percent
from robustft.files import read_json, refusing
from robustft.ops.kinds import check_fields, checked

TPR = 0.95


T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Suite(Generic[T]):
    """One T for the ID test set, each shift and each semantic-OOD set: data sets, outputs or results."""

    id: T
    shifts: Mapping[str, T]
    ood: Mapping[str, T]

    def __post_init__(self) -> None:
        check_fields(self)

    def map(self, function: Callable[[T], U]) -> Suite[U]:
        """The same of a function of each."""
        return Suite(
            function(self.id),
            {name: function(value) for name, value in self.shifts.items()},
            {name: function(value) for name, value in self.ood.items()},
        )


class ClassResult(NamedTuple):
    """The images of one class: the share of them predicted right, which is the class's accuracy and its recall; the
    share that are of it among the images predicted as it, None where there are none; and their ECE."""

    name: str
    images: int
    recall: float
    precision: float | None
    ece: float
    noise_floor: float


class GroupResult(NamedTuple):
    """The images of one group, such as a background or a place."""

    name: str
    images: int
    accuracy: float
    ece: float
    noise_floor: float


class ConformalResult(NamedTuple):
    """How a model's conformal sets, of a rule and for a coverage, did on a labelled set; classes that occur alone."""

    rule: str
    target: float
    report: CoverageReport


class SetResult(NamedTuple):
    """A labelled set: acc1 is `calibration.accuracy`; acc5 is the share among the five (or K) likeliest
    classes. The rest is there where it was asked for; `classes` and `groups` are those that occur."""

    acc5: float
    mean_per_class_recall: float
    calibration: CalibrationReport
    selective: SelectiveRisk | None = None
    conformal: ConformalResult | None = None
    classes: tuple[ClassResult, ...] = ()
    groups: tuple[GroupResult, ...] = ()


class ScoreHistogram(NamedTuple):
    """OOD scores of one model in common bins: `edges` (B + 1), counts (B) of the ID set and of each OOD set."""

    edges: tuple[float, ...]
    id: tuple[int, ...]
    ood: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelResult:
    """Everything measured on one model; `pooled` is the calibration over all shifts' samples together, `full_spectrum`
    what `ood` is where all shifts' images count as ID too. It is empty where a shift lacks some of the classes."""

    id: SetResult
    shifts: dict[str, SetResult]
    ood: dict[str, OODMetrics]
    pooled: CalibrationReport | None = None
    scores: ScoreHistogram | None = None
    full_spectrum: dict[str, OODMetrics] = field(default_factory=dict)

    @property
    def id_accuracy(self) -> float:
        return self.id.calibration.accuracy

    @property
    def ood_accuracy(self) -> float:
        """Mean accuracy over the shifts; NaN without shifts."""
        return _mean(s.calibration.accuracy for s in self.shifts.values())

    @property
    def ood_ece(self) -> float:
        return _mean(s.calibration.ece for s in self.shifts.values())

    @property
    def ood_noise_floor(self) -> float:
        return _mean(s.calibration.noise_floor for s in self.shifts.values())

    @property
    def auroc(self) -> float:
        """Mean AUROC over the OOD sets; NaN without any."""
        return _mean(m.auroc for m in self.ood.values())

    @property
    def fpr(self) -> float:
        return _mean(m.fpr for m in self.ood.values())


@dataclass(frozen=True)
class Frontier:
    """ID against mean-OOD accuracy of an ensemble over its mixing weight; `chosen` is the alpha picked on
    held-out ID data."""

    name: str
    alphas: tuple[float, ...]
    id_accuracy: tuple[float, ...]
    ood_accuracy: tuple[float, ...]
    chosen: float | None = None

    def __post_init__(self) -> None:
        if not len(self.alphas) == len(self.id_accuracy) == len(self.ood_accuracy) > 0:
            raise ValueError(
                "alphas, id_accuracy and ood_accuracy must have one length, at least 1, got "
                f"{len(self.alphas)}, {len(self.id_accuracy)} and {len(self.ood_accuracy)}"
            )


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found, by model name in the order given; `bins` is the number of ECE bins, `score` the name of
    the OOD score."""

    models: dict[str, ModelResult]
    bins: int
    score: str = "mcm"

    @property
    def score_label(self) -> str:
        """The score's name as tables and pictures have it."""
        return label(self.score)

    @property
    def shifts(self) -> tuple[str, ...]:
        """The shifts that any model was measured on."""
        return tuple(dict.fromkeys(name for m in self.models.values() for name in m.shifts))

    @property
    def ood(self) -> tuple[str, ...]:
        """The OOD sets that any model was measured on."""
        return tuple(dict.fromkeys(name for m in self.models.values() for name in m.ood))

    def _seen(self, kind: str) -> str:
        """Sets that means are over, and which models saw others of them."""
        names = getattr(self, kind)
        fewer = {
            model: [name for name in names if name not in getattr(m, kind)]
            for model, m in self.models.items()
            if getattr(m, kind)
        }
        told = [f"{model} without {listed(missing)}" for model, missing in fewer.items() if missing]
        return listed(names) + (f" ({'; '.join(told)})" if told else "")

    def conventions(self) -> tuple[str, ...]:
        """What the numbers mean, one sentence each: to be printed wherever the numbers are."""
        lines = ["All numbers in %."]
        sizes: dict[int, list[str]] = {}
        for name, m in self.models.items():
            sizes.setdefault(m.id.calibration.count, []).append(name)
        if len(sizes) > 1:
            told = listed(f"{count} images ({', '.join(names)})" for count, names in sizes.items())
            lines.append(f"ID test sets differ: {told}; do not compare numbers across them.")
        if self.shifts:
            lines.append(f"OOD: mean over {self._seen('shifts')}.")
        lines.append(
            f"ECE: {self.bins} equal-width bins, full set; in brackets its noise floor, "
            "the ECE of a perfectly calibrated model on as many samples."
        )
        if self.ood:
            convention = SCORES[self.score].convention if self.score in SCORES else ""
            lines.append(
                f"AUROC and FPR95: {self.score_label}{f' ({convention})' if convention else ''}, mean over "
                f"{self._seen('ood')}; FPR95: ID positive, first threshold with TPR >= {TPR:.0%}."
            )
        return tuple(lines)

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The table's cells as text, header first."""
        detection = (f"{self.score_label} AUROC", "FPR95")
        header = ("model", "acc ID", "acc OOD", "ECE ID (floor)", "ECE OOD (floor)", *detection)
        body = (
            (
                name,
                percent(m.id_accuracy),
                percent(m.ood_accuracy),
                f"{percent(m.id.calibration.ece)} ({percent(m.id.calibration.noise_floor)})",
                f"{percent(m.ood_ece)} ({percent(m.ood_noise_floor)})" if m.shifts else "–",
                percent(m.auroc),
                percent(m.fpr),
            )
            for name, m in self.models.items()
        )
        return (header, *body)

    def table(self) -> str:
        """The table as text, and below it the conventions."""
        return tables.text(self.rows(), self.conventions())

    def markdown(self) -> str:
        """The table in Markdown, and below it the conventions."""
        return tables.markdown(self.rows(), self.conventions())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `results` is a list in CLIP_benchmark's schema (with more metrics), one entry per model
        and set.

        `from_dict` gives an equal Evaluation back.
        """
        return {
            "conventions": list(self.conventions()),
            "bins": self.bins,
            "score": self.score,
            "models": [
                {"model": name, "summary": _summary(m, self.score), "scores": m.scores and m.scores._asdict()}
                for name, m in self.models.items()
            ],
            "results": [
                entry
                for name, m in self.models.items()
                for entry in (
                    _entry(name, "id", "id", m.id),
                    *(_entry(name, set_name, "shift", s) for set_name, s in m.shifts.items()),
                )
            ],
            "pooled": [{"model": name, **_fields(m.pooled)} for name, m in self.models.items() if m.pooled is not None],
            **{
                kind: [
                    {"model": name, "dataset": set_name, "score": self.score, **metrics._asdict()}
                    for name, m in self.models.items()
                    for set_name, metrics in getattr(m, kind).items()
                ]
                for kind in ("ood", "full_spectrum")
            },
        }

    @classmethod
    @checked
    def merge(cls, runs: Mapping[str, Evaluation]) -> Evaluation:
        """One Evaluation of those of several runs, by the runs' names, made at different times and on different sets.

        A model that several runs have, with equal numbers (to rounding) on the sets that they share, is one model with
        all their sets. Models of one name and other numbers get the name of their run: "CaRot (tuesday)". So do shifts
        of one name that have other numbers of images in them. Sets that a model did not see have a dash in the tables.
        ValueError for no runs, and for different scores or numbers of bins: their numbers do not compare.
        """
        if not runs:
            raise ValueError("runs is empty: there must be at least one run to merge")
        for what in ("bins", "score"):
            found = {name: getattr(run, what) for name, run in runs.items()}
            if len(set(found.values())) > 1:
                told = listed(f"{value!r} ({name})" for name, value in found.items())
                raise ValueError(f"the runs differ in {what}: {told}; measure them again in one way")
        renamed = {run: e._with_shifts_of_their_own(run, list(runs.values())) for run, e in runs.items()}
        owners: dict[str, list[str]] = {}
        for run, models in renamed.items():
            for model in models:
                owners.setdefault(model, []).append(run)
        merged: dict[str, ModelResult] = {}
        for model, names in owners.items():
            results = [renamed[run][model] for run in names]
            if all(_agree(a, b) for a, b in itertools.combinations(results, 2)):
                merged[model] = functools.reduce(_joined, results)
                continue
            for run, result in zip(names, results, strict=True):
                own = f"{model} ({run})"
                if own in owners or own in merged:
                    raise ValueError(f"model {own!r} is there twice: give the run {run!r} another name")
                merged[own] = result
        first = next(iter(runs.values()))
        return cls(merged, first.bins, first.score)

    def _with_shifts_of_their_own(self, run: str, others: Sequence[Evaluation]) -> dict[str, ModelResult]:
        """The models, with the run in the name of every shift that has other numbers of images elsewhere."""
        sizes: dict[str, set[int]] = {}
        for other in others:
            for m in other.models.values():
                for name, result in m.shifts.items():
                    sizes.setdefault(name, set()).add(result.calibration.count)
        return {
            model: replace(
                m, shifts={f"{name} ({run})" if len(sizes[name]) > 1 else name: s for name, s in m.shifts.items()}
            )
            for model, m in self.models.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """The Evaluation that `to_dict` wrote, also after a round trip through JSON; ValueError for other data."""
        try:
            return cls._from(data)
        except (AttributeError, LookupError, TypeError, ValueError, StopIteration) as error:
            raise ValueError(f"data: not what Evaluation.to_dict gives: {error!r:.200}") from error

    @classmethod
    def _from(cls, data: Mapping[str, Any]) -> Evaluation:
        models = {}
        for header in data["models"]:
            name = header["model"]
            sets = [s for s in data["results"] if s["model"] == name]
            ood, full_spectrum = (
                {
                    o["dataset"]: OODMetrics(**_numbers({f: o[f] for f in OODMetrics._fields}))
                    for o in data[kind]
                    if o["model"] == name
                }
                for kind in ("ood", "full_spectrum")
            )
            pooled = next((p for p in data["pooled"] if p["model"] == name), None)
            scores = header["scores"]
            models[name] = ModelResult(
                id=_set_result(next(s for s in sets if s["split"] == "id")),
                shifts={s["dataset"]: _set_result(s) for s in sets if s["split"] == "shift"},
                ood=ood,
                pooled=pooled and _calibration({k: v for k, v in pooled.items() if k != "model"}),
                scores=scores
                and ScoreHistogram(
                    tuple(scores["edges"]),
                    tuple(scores["id"]),
                    {k: tuple(v) for k, v in scores["ood"].items()},
                ),
                full_spectrum=full_spectrum,
            )
        bins, score = data["bins"], data.get("score", "mcm")
        if type(bins) is not int or bins < 1 or score not in SCORES:
            raise ValueError(f"bins is {bins!r:.80}, score is {score!r:.80}")
        return cls(models, bins, score)


def _agree(a: ModelResult, b: ModelResult) -> bool:
    """Whether nothing that both were measured on differs by more than the rounding of another machine."""
    shared = [(a.id, b.id), *((a.shifts[name], b.shifts[name]) for name in a.shifts if name in b.shifts)]
    return all(
        math.isclose(getattr(x.calibration, what), getattr(y.calibration, what), rel_tol=1e-5)
        for x, y in shared
        for what in ("count", "accuracy", "confidence", "brier", "nll")
    ) and all(math.isclose(a.ood[name].auroc, b.ood[name].auroc, rel_tol=1e-4) for name in a.ood if name in b.ood)


def _joined(a: ModelResult, b: ModelResult) -> ModelResult:
    """All sets of two measurements that agree, in more detail where one has it. What is over several sets at once, the
    pooled calibration, the full spectrum and the histogram, is of the one with more of them."""
    more_shifts, more_ood = (max(a, b, key=lambda m: len(getattr(m, kind))) for kind in ("shifts", "ood"))

    def fuller(*found: SetResult | None) -> SetResult:
        return max((s for s in found if s is not None), key=lambda s: sum(map(bool, s)))

    names = dict.fromkeys([*a.shifts, *b.shifts])
    shifts = {name: fuller(a.shifts.get(name), b.shifts.get(name)) for name in names}
    same = a.shifts.keys() == b.shifts.keys()
    full_spectrum = {**a.full_spectrum, **b.full_spectrum} if same else more_shifts.full_spectrum
    ood = {**a.ood, **b.ood}
    return ModelResult(fuller(a.id, b.id), shifts, ood, more_shifts.pooled, more_ood.scores, full_spectrum)


@checked
def read_evaluation(path: str | Path) -> Evaluation:
    """The Evaluation in a report's metrics.json; ValueError, naming the file, for a damaged one."""
    path = Path(path)
    data = read_json(path, "the numbers of an evaluation")
    with refusing(path, "evaluation"):
        return Evaluation.from_dict(data)


def _summary(m: ModelResult, score: str) -> dict[str, float | None]:
    values = {
        "id_accuracy": m.id_accuracy,
        "ood_accuracy": m.ood_accuracy,
        "id_ece": m.id.calibration.ece,
        "id_noise_floor": m.id.calibration.noise_floor,
        "ood_ece": m.ood_ece,
        "ood_noise_floor": m.ood_noise_floor,
        f"{score}_auroc": m.auroc,
        f"{score}_fpr95": m.fpr,
    }
    return {key: None if np.isnan(value) else value for key, value in values.items()}


def _entry(model: str, dataset: str, split: str, s: SetResult) -> dict[str, Any]:
    calibration = _fields(s.calibration)
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": "",
        "task": "zeroshot_classification",
        "language": "en",
        "split": split,
        "metrics": {
            "acc1": calibration.pop("accuracy"),
            "acc5": s.acc5,
            "mean_per_class_recall": s.mean_per_class_recall,
            **calibration,
            **{name: _json(part) for name, part in zip(_PARTS, s[-len(_PARTS) :], strict=True) if part},
        },
    }


def _set_result(entry: Mapping[str, Any]) -> SetResult:
    metrics = dict(entry["metrics"])
    acc5, recall = metrics.pop("acc5"), metrics.pop("mean_per_class_recall")
    _numbers({"acc5": acc5, "mean_per_class_recall": recall})
    selective, conformal, classes, groups = (metrics.pop(name, None) for name in _PARTS)
    return SetResult(
        acc5,
        recall,
        _calibration({"accuracy": metrics.pop("acc1"), **metrics}),
        selective and _selective(selective),
        conformal and _conformal(conformal),
        tuple(_row(ClassResult, row) for row in classes or ()),
        tuple(_row(GroupResult, row) for row in groups or ()),
    )


_PARTS = ("selective", "conformal", "classes", "groups")


def _json(value: Any) -> Any:
    """Named tuples and data classes as dictionaries, whatever they are in."""
    if isinstance(value, SelectiveRisk):
        return dict(vars(value))
    if hasattr(value, "_asdict"):
        return {name: _json(part) for name, part in value._asdict().items()}
    return [_json(part) for part in value] if isinstance(value, tuple) else value


def _selective(fields: Mapping[str, Any]) -> SelectiveRisk:
    curve = {name: tuple(fields[name]) for name in ("coverage", "risk", "threshold")}
    _numbers({name: value for name, value in fields.items() if name not in curve})
    for name, values in curve.items():
        _numbers({f"{name}[{i}]": value for i, value in enumerate(values)})
    if len({len(values) for values in curve.values()}) > 1:
        raise ValueError("coverage, risk and threshold differ in length")
    return SelectiveRisk(**{**fields, **curve})


def _conformal(fields: Mapping[str, Any]) -> ConformalResult:
    report = fields["report"]
    strata = (tuple(_row(Coverage, row) for row in report[name]) for name in ("by_size", "by_class"))
    _numbers({"target": fields["target"]})
    return ConformalResult(
        str(fields["rule"]), fields["target"], CoverageReport(_row(Coverage, report["all"]), *strata)
    )


Row = TypeVar("Row", ClassResult, GroupResult, Coverage)


def _row(kind: type[Row], fields: Mapping[str, Any]) -> Row:
    """A row of a table from its numbers and its name."""
    words = {name: value for name, value in fields.items() if name in ("name", "label")}
    if not all(isinstance(word, str) for word in words.values()):
        raise TypeError(f"{words!r:.80}: expected text")
    return kind(**words, **_numbers({name: value for name, value in fields.items() if name not in words}))


def _fields(report: CalibrationReport) -> dict[str, Any]:
    return {**vars(report), "bins": [b._asdict() for b in report.bins]}


def _calibration(fields: Mapping[str, Any]) -> CalibrationReport:
    _numbers({name: value for name, value in fields.items() if name not in ("bins", "scheme", "protocol")})
    return CalibrationReport(**{**fields, "bins": tuple(Bin(**_numbers(b)) for b in fields["bins"])})


def _numbers(values: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in values.items():
        if name == "positive":
            if value not in ("id", "ood"):
                raise ValueError(f"positive is {value!r:.80}, expected 'id' or 'ood'")
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name} is {value!r:.80}, expected a number")
    return values


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
