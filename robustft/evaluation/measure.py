"""From classifiers and data sets to one table.

    predictions: features u (N, D), cosines (N, K), logits (N, K), labels (N,)
    on the ID set and on each shift:   accuracy and calibration of softmax(logits)
    ID against each semantic-OOD set:  AUROC and FPR95 of a score, ID positive: MCM = max softmax(cosines), tau = 1,
                                       or another of `detection.by_name` that learns nothing and reads no patches

"mean OOD" is the unweighted mean over the shifts (or over the OOD sets, for AUROC and FPR95). Every number is
computed once over a whole set and carries its convention; ECE carries the noise floor of its set.

A classifier is any object whose `outputs(images)` returns features, cosines and logits, as those of
robustft.methods do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from robustft.calibration.measures import Bin, CalibrationReport, calibration_report
from robustft.data.sources import batches
from robustft.detection.by_name import SCORES, Evidence, Pointwise
from robustft.detection.metrics import OODMetrics, ood_metrics
from robustft.ensembles.output_ensemble import PairPredictor
from robustft.ensembles.wise_ft import ALPHAS
from robustft.ops.precision import at_least_float32

TPR = 0.95
SCORE_BINS = 48


class Outputs(Protocol):
    """What a classifier makes of images: unit features (N, D), cosines (N, K), logits (N, K)."""

    features: Tensor
    cosines: Tensor
    logits: Tensor


class Classifier(Protocol):
    """Anything with `outputs(images)`."""

    def outputs(self, images: Tensor) -> Outputs: ...


@dataclass(frozen=True)
class Predictions:
    """One classifier's outputs on one labelled set, on the CPU: cosines and logits (N, K), labels (N,),
    features (N, D)."""

    cosines: Tensor
    logits: Tensor
    labels: Tensor
    features: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """softmax(logits) in float64 (N, K): in float32 a gap of 17 already reads as certainty."""
        return self.logits.double().softmax(-1)


class Ensemble(Protocol):
    """Anything with a classifier at each alpha, 0 the zero-shot one and 1 the fine-tuned one."""

    def at(self, alpha: float) -> Classifier: ...


T = TypeVar("T")


@dataclass(frozen=True)
class Suite(Generic[T]):
    """One T for the ID test set, each shift and each semantic-OOD set: data sets, predictions or results."""

    id: T
    shifts: Mapping[str, T]
    ood: Mapping[str, T]


class SetResult(NamedTuple):
    """A labelled set: acc1 is `calibration.accuracy`; acc5 is the share among the five (or K) likeliest
    classes."""

    acc5: float
    mean_per_class_recall: float
    calibration: CalibrationReport


class ScoreHistogram(NamedTuple):
    """OOD scores of one model in common bins: `edges` (B + 1), counts (B) of the ID set and of each OOD set."""

    edges: tuple[float, ...]
    id: tuple[int, ...]
    ood: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelResult:
    """Everything measured on one model; `pooled` is the calibration over all shifts' samples together."""

    id: SetResult
    shifts: dict[str, SetResult]
    ood: dict[str, OODMetrics]
    pooled: CalibrationReport | None = None
    scores: ScoreHistogram | None = None

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
        return {"mcm": "MCM", "msp": "MSP"}.get(self.score, self.score.replace("_", " "))

    def conventions(self) -> tuple[str, ...]:
        """What the numbers mean, one sentence each: to be printed wherever the numbers are."""
        first = next(iter(self.models.values()))
        lines = ["All numbers in %."]
        if first.shifts:
            lines.append(f"OOD: mean over {_join(first.shifts)}.")
        lines.append(
            f"ECE: {self.bins} equal-width bins, full set; in brackets its noise floor, "
            "the ECE of a perfectly calibrated model on as many samples."
        )
        if first.ood:
            score = "MCM (tau = 1, on cosines)" if self.score == "mcm" else self.score_label
            lines.append(
                f"AUROC and FPR95: {score}, mean over "
                f"{_join(first.ood)}; FPR95: ID positive, first threshold with TPR >= {TPR:.0%}."
            )
        return tuple(lines)

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The table's cells as text, header first."""
        detection = (f"{self.score_label} AUROC", "FPR95")
        header = ("model", "acc ID", "acc OOD", "ECE ID (floor)", "ECE OOD (floor)", *detection)
        body = (
            (
                name,
                _percent(m.id_accuracy),
                _percent(m.ood_accuracy),
                f"{_percent(m.id.calibration.ece)} ({_percent(m.id.calibration.noise_floor)})",
                f"{_percent(m.ood_ece)} ({_percent(m.ood_noise_floor)})" if m.shifts else "–",
                _percent(m.auroc),
                _percent(m.fpr),
            )
            for name, m in self.models.items()
        )
        return (header, *body)

    def table(self) -> str:
        """The table as text, and below it the conventions."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

        def line(row: tuple[str, ...]) -> str:
            return "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])

        text = [line(row) for row in rows]
        text.insert(1, "-" * max(map(len, text)))
        return "\n".join([*text, "", *self.conventions()])

    def markdown(self) -> str:
        """The table in Markdown, and below it the conventions."""
        header, *body = self.rows()
        lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (header, *body)]
        lines.insert(1, "|---|" + "---:|" * (len(header) - 1))
        return "\n".join([*lines, "", *(f"{line}  " for line in self.conventions())])

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
            "ood": [
                {"model": name, "dataset": set_name, "score": self.score, **metrics._asdict()}
                for name, m in self.models.items()
                for set_name, metrics in m.ood.items()
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """The Evaluation that `to_dict` wrote, also after a round trip through JSON."""
        models = {}
        for header in data["models"]:
            name = header["model"]
            sets = [s for s in data["results"] if s["model"] == name]
            ood = {o["dataset"]: o for o in data["ood"] if o["model"] == name}
            pooled = next((p for p in data["pooled"] if p["model"] == name), None)
            scores = header["scores"]
            models[name] = ModelResult(
                id=_set_result(next(s for s in sets if s["split"] == "id")),
                shifts={s["dataset"]: _set_result(s) for s in sets if s["split"] == "shift"},
                ood={k: OODMetrics(**{f: o[f] for f in OODMetrics._fields}) for k, o in ood.items()},
                pooled=pooled and _calibration({k: v for k, v in pooled.items() if k != "model"}),
                scores=scores
                and ScoreHistogram(
                    tuple(scores["edges"]),
                    tuple(scores["id"]),
                    {k: tuple(v) for k, v in scores["ood"].items()},
                ),
            )
        return cls(models, data["bins"], data.get("score", "mcm"))


def evaluate(
    classifiers: Mapping[str, Classifier],
    *,
    id: Any,
    shifts: Mapping[str, Any] | None = None,
    ood: Mapping[str, Any] | None = None,
    bins: int = 15,
    score: str = "mcm",
    batch_size: int = 256,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Measures each classifier on the ID test set, on shifts of it (same classes) and against semantic-OOD
    sets.

    Data sets are (images, labels) tensors or anything that `robustft.data.sources` takes; labels of OOD
    sets are not looked at. `score` tells ID from OOD: "mcm", "max_cosine", "msp", "energy", "entropy", "variance" or
    one registered with `detection.by_name.register`, at its defaults. `progress(done, total, what)` is called after
    each (classifier, set). Memory: one classifier's predictions.
    """
    _check_score(score)
    suite = Suite(id, shifts or {}, ood or {})
    total, done = len(classifiers) * (1 + len(suite.shifts) + len(suite.ood)), 0
    models = {}
    for name, classifier in classifiers.items():

        def run(dataset: Any, what: str, name: str = name, classifier: Classifier = classifier) -> Predictions:
            nonlocal done
            predictions = predict(classifier, dataset, batch_size)
            done += 1
            if progress is not None:
                progress(done, total, f"{name} on {what}")
            return predictions

        models[name] = _measure(
            Suite(
                run(suite.id, "id"),
                {k: run(d, k) for k, d in suite.shifts.items()},
                {k: run(d, k) for k, d in suite.ood.items()},
            ),
            bins,
            score,
        )
    return _evaluation(models, bins, score)


def frontier(
    ensemble: Ensemble,
    *,
    id: Any,
    shifts: Mapping[str, Any],
    alphas: Sequence[float] = ALPHAS,
    name: str | None = None,
    batch_size: int = 256,
) -> Frontier:
    """ID against mean-OOD accuracy of a `WiSEFT`, an `OutputEnsemble` or a `VRF.classifier` at every alpha.

    The honest way to compare ensembles: each may pick another point of its curve. `chosen` is the alpha that the
    ensemble has from held-out data, if it was fitted. Data sets as for `evaluate`; `name` defaults to the ensemble's
    type. Mixtures of outputs encode every set once; WiSE-FT once for each alpha. Memory: two models' predictions on a
    set.
    """
    if not shifts:
        raise ValueError("shifts is empty: a frontier needs at least one shifted set")

    def accuracies(dataset: Any) -> list[float]:
        classifiers = (ensemble.at(alpha) for alpha in alphas)
        return [_accuracy(p) for p in _predict_all(classifiers, dataset, batch_size)]

    id_accuracy, *ood = (accuracies(dataset) for dataset in (id, *shifts.values()))
    return Frontier(
        name or type(ensemble).__name__,
        tuple(alphas),
        tuple(id_accuracy),
        tuple(sum(column) / len(column) for column in zip(*ood, strict=True)),
        getattr(ensemble, "alpha_", None),
    )


def evaluate_predictions(
    predictions: Mapping[str, Suite[Predictions]], bins: int = 15, score: str = "mcm"
) -> Evaluation:
    """`evaluate` from ready predictions, one `Suite` of them per model."""
    _check_score(score)
    return _evaluation({name: _measure(suite, bins, score) for name, suite in predictions.items()}, bins, score)


@torch.no_grad()
def predict(classifier: Classifier, dataset: Any, batch_size: int = 256) -> Predictions:
    """One classifier's outputs on a whole set, in evaluation mode, on the CPU in at least float32.

    Images go to the device of the classifier's parameters. ValueError for NaN or infinite logits, naming how
    many rows.
    """
    if not callable(getattr(classifier, "outputs", None)):
        raise TypeError(f"a classifier must have outputs(images), got {type(classifier).__name__}")
    modules = tuple(_modules(classifier))
    device = next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))
    outputs, labels = [], []
    with _evaluating(modules):
        for images, target in batches(dataset, classifier, batch_size=batch_size):
            out = classifier.outputs(images.to(device))
            outputs.append([at_least_float32(part).cpu() for part in (out.features, out.cosines, out.logits)])
            labels.append(target.cpu())
    features, cosines, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    bad = int((~logits.isfinite()).any(1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(logits)} rows of the classifier's logits hold NaN or infinity")
    return Predictions(cosines, logits, torch.cat(labels), features)


def _predict_all(classifiers: Iterable[Classifier], dataset: Any, batch_size: int) -> Iterator[Predictions]:
    """Each classifier's predictions; pairs of the same two members, mixed in several ways, are encoded once."""
    members: dict[tuple[int, int], tuple[Predictions, Predictions]] = {}
    for classifier in classifiers:
        if not isinstance(classifier, PairPredictor):
            yield predict(classifier, dataset, batch_size)
            continue
        pair = classifier.zero_shot, classifier.fine_tuned
        key = id(pair[0]), id(pair[1])
        if key not in members:
            members[key] = tuple(predict(member, dataset, batch_size) for member in pair)
        zs, ft = members[key]
        out = classifier.combine(zs, ft)
        yield Predictions(out.cosines, out.logits, ft.labels, out.features)


def _accuracy(p: Predictions) -> float:
    return float((p.logits.argmax(-1) == p.labels).double().mean())


def _check_score(name: str) -> None:
    made = {n: make() for n, make in SCORES.items()}
    usable = sorted(n for n, s in made.items() if isinstance(s, Pointwise) and "patch_cosines" not in s.reads)
    if name not in usable:
        raise ValueError(
            f"score must be one of {usable}, got {name!r}; for one that learns, or reads patches or negative texts, "
            "fit a robustft.Detector and pass its scores to ood_metrics"
        )


def _measure(suite: Suite[Predictions], bins: int, score: str) -> ModelResult:
    shifts = list(suite.shifts.values())
    function = SCORES[score]()

    def scores(p: Predictions) -> Tensor:
        return function(Evidence(p.features, p.cosines, p.logits))

    id_scores, ood_scores = scores(suite.id), {k: scores(p) for k, p in suite.ood.items()}
    return ModelResult(
        id=_measure_set(suite.id, bins),
        shifts={k: _measure_set(p, bins) for k, p in suite.shifts.items()},
        ood={k: ood_metrics(id_scores, s, TPR) for k, s in ood_scores.items()},
        pooled=calibration_report(
            torch.cat([p.probabilities for p in shifts]), torch.cat([p.labels for p in shifts]), bins
        )
        if shifts
        else None,
        scores=_histogram(id_scores, ood_scores) if ood_scores else None,
    )


def _measure_set(p: Predictions, bins: int) -> SetResult:
    report = calibration_report(p.probabilities, p.labels, bins)
    hits = p.logits.topk(min(5, p.logits.shape[1]), dim=1).indices == p.labels[:, None]
    counts = torch.bincount(p.labels, minlength=p.logits.shape[1])
    right = torch.bincount(p.labels[hits[:, 0]], minlength=p.logits.shape[1])
    recall = (right / counts)[counts > 0].double().mean()
    return SetResult(float(hits.any(1).double().mean()), float(recall), report)


def _histogram(id_scores: Tensor, ood_scores: Mapping[str, Tensor]) -> ScoreHistogram:
    populations = [id_scores.double().numpy(), *(s.double().numpy() for s in ood_scores.values())]
    low, high = min(p.min() for p in populations), max(p.max() for p in populations)
    edges = np.linspace(low, high if high > low else low + 1e-6, SCORE_BINS + 1)
    counts = [tuple(np.histogram(p, edges)[0].tolist()) for p in populations]
    return ScoreHistogram(tuple(edges.tolist()), counts[0], dict(zip(ood_scores, counts[1:], strict=True)))


def _evaluation(models: dict[str, ModelResult], bins: int, score: str) -> Evaluation:
    if not models:
        raise ValueError("there must be at least one model to evaluate")
    return Evaluation(models, bins, score)


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
        },
    }


def _set_result(entry: Mapping[str, Any]) -> SetResult:
    metrics = dict(entry["metrics"])
    acc5, recall = metrics.pop("acc5"), metrics.pop("mean_per_class_recall")
    return SetResult(acc5, recall, _calibration({"accuracy": metrics.pop("acc1"), **metrics}))


def _fields(report: CalibrationReport) -> dict[str, Any]:
    return {**vars(report), "bins": [b._asdict() for b in report.bins]}


def _calibration(fields: Mapping[str, Any]) -> CalibrationReport:
    return CalibrationReport(**{**fields, "bins": tuple(Bin(**b) for b in fields["bins"])})


def _modules(owner: Any) -> Iterator[nn.Module]:
    """The modules that a classifier is or holds, also through other classifiers (an ensemble's members)."""
    if isinstance(owner, nn.Module):
        yield owner
    elif hasattr(owner, "outputs"):
        for value in vars(owner).values():
            for part in value if isinstance(value, (list, tuple)) else (value,):
                yield from _modules(part)


@contextmanager
def _evaluating(modules: tuple[nn.Module, ...]) -> Iterator[None]:
    training = [m for module in modules for m in module.modules() if m.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _mean(values: Iterator[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def _percent(fraction: float) -> str:
    return "–" if np.isnan(fraction) else f"{100 * fraction:.1f}"


def _join(names: Mapping[str, Any]) -> str:
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last
