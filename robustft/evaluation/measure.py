"""From predictors and data sets to one `Evaluation`.

outputs: features u (N, D), cosines (N, K), logits (N, K), labels (N,)
on the ID set and on each shift:   accuracy and calibration of softmax(logits)
ID against each semantic-OOD set:  AUROC and FPR95 of a score, ID positive: MCM = max softmax(cosines), tau = 1,
                                   or another of `detection.by_name` that learns nothing and reads no patches
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from robustft.calibration.conformal import ConformalSets, coverage_report
from robustft.calibration.measures import calibration_report, top_label_ece
from robustft.clip.outputs import Outputs
from robustft.data.wrappers import group_names_of, groups_of
from robustft.detection.by_name import SCORES
from robustft.detection.detector import Detector
from robustft.detection.metrics import ood_metrics
from robustft.ensembles.wise_ft import ALPHAS, WiSEFT, check_alphas
from robustft.evaluation.groups import group_accuracy
from robustft.evaluation.results import (
    TPR,
    ClassResult,
    ConformalResult,
    Evaluation,
    Frontier,
    GroupResult,
    ModelResult,
    ScoreHistogram,
    SetResult,
    Suite,
)
from robustft.evaluation.selective import selective_risk
from robustft.evaluation.tables import listed
from robustft.ops.kinds import checked, described
from robustft.predictors.base import Predictor, predict_each

SCORE_BINS = 48


class Ensemble(Protocol):
    """Anything with a predictor at each alpha, 0 the zero-shot one and 1 the fine-tuned one."""

    def at(self, alpha: float) -> Predictor: ...


@checked
def evaluate(
    classifiers: Mapping[str, Predictor],
    *,
    id: Any,
    shifts: Mapping[str, Any] | None = None,
    ood: Mapping[str, Any] | None = None,
    bins: int = 15,
    score: str = "mcm",
    details: bool = False,
    conformal: Mapping[str, ConformalSets] | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Measures each classifier on the ID test set, on shifts of it (same classes) and against semantic-OOD
    sets.

    Data sets are (images, labels) tensors or anything that `robustft.data.sources` takes. Where they tell names of
    classes, labels are matched by name, and on a set with some of a classifier's classes it is restricted to these, as
    `Predictor.predict` does; on the OOD sets as on the ID set, whose scores theirs are compared with. Labels and names
    of OOD sets are not looked at. `score` tells ID from OOD: one of `robustft.detection.SCORES`, at its defaults, that
    learns nothing and reads no patches. `progress(done, total, what)` is called after each (classifier, set).

    Every set is read once for all classifiers, by `workers` processes (`robustft.data.sources.reading_workers`), and
    streams: what is kept of an image are its logits, and what the score reads of it, in each classifier.

    `details` measures selective risk, every class, and every group of data sets that tell theirs. `conformal` are the
    fitted sets of models, by name, whose coverage is measured on every labelled set of the classes of their fit.
    """
    check_score(score)
    _check_conformal(conformal, classifiers)
    sets = Suite(id, shifts or {}, ood or {})
    kept = tuple(dict.fromkeys(("logits", "labels", *SCORES[score].reads)))
    suites = predict_sets(
        classifiers,
        sets,
        batch_size=batch_size,
        workers=workers,
        parts=kept,
        progress=progress,
    )
    groups = sets.map(groups_in) if details else None
    return evaluate_predictions(suites, bins, score, details=details, conformal=conformal, groups=groups)


def predict_sets(
    classifiers: Mapping[str, Predictor],
    sets: Suite[Any],
    *,
    batch_size: int = 256,
    workers: int | None = None,
    parts: Sequence[str] = Outputs.PARTS,
    progress: Callable[[int, int, str], None] | None = None,
    predict: Callable[..., tuple[Outputs, ...]] = predict_each,
) -> dict[str, Suite[Outputs]]:
    """What each classifier makes of each set, which is read once for all of them; arguments as of `evaluate`.

    parts: of the outputs, those to keep. Memory: these, of all classifiers on all sets. predict: `predict_each`, or
    what does the same.
    """
    predictors = tuple(classifiers.values())
    total, done = len(predictors) * (1 + len(sets.shifts) + len(sets.ood)), 0

    def run(dataset: Any, what: str, used: Sequence[Predictor], labelled: bool = True) -> tuple[Outputs, ...]:
        nonlocal done
        found = predict(used, dataset, batch_size, labelled=labelled, workers=workers, parts=parts)
        for name in classifiers:
            done += 1
            if progress is not None:
                progress(done, total, f"{name} on {what}")
        return found

    known = run(sets.id, "id", predictors) if predictors else ()
    shifts_of = {k: run(d, k, predictors) for k, d in sets.shifts.items()}
    if sets.ood:
        predictors = tuple(predictor.matched(sets.id)[0] for predictor in predictors)
    ood_of = {k: run(d, k, predictors, labelled=False) for k, d in sets.ood.items()}
    return {
        name: Suite(known[i], {k: p[i] for k, p in shifts_of.items()}, {k: p[i] for k, p in ood_of.items()})
        for i, name in enumerate(classifiers)
    }


@checked
def frontier(
    ensemble: Ensemble,
    *,
    id: Any,
    shifts: Mapping[str, Any],
    alphas: Sequence[float] = ALPHAS,
    name: str | None = None,
    batch_size: int = 256,
    workers: int | None = None,
) -> Frontier:
    """ID against mean-OOD accuracy of a `WiSEFT`, an `OutputEnsemble` or a `VRF.classifier` at every alpha.

    The honest way to compare ensembles: each may pick another point of its curve. `chosen` is the alpha that the
    ensemble has from held-out data, if it was fitted. Data sets as for `evaluate`; `name` defaults to the ensemble's
    type. Every set is read once. Mixtures of outputs encode it once, WiSE-FT once for each alpha. Memory: the logits of
    all alphas on a set.
    """
    if not callable(getattr(ensemble, "at", None)):
        raise TypeError(f"ensemble is {described(ensemble)}; expected one that has at(alpha), such as a WiSEFT")
    if not shifts:
        raise ValueError("shifts is empty: a frontier needs at least one shifted set")

    check_alphas(alphas)

    def accuracies(dataset: Any) -> list[float]:
        along = ensemble.along(alphas) if isinstance(ensemble, WiSEFT) else [ensemble.at(alpha) for alpha in alphas]
        found = predict_each(along, dataset, batch_size, workers=workers, parts=("logits", "labels"))
        return [accuracy(outputs) for outputs in found]

    id_accuracy, *ood = (accuracies(dataset) for dataset in (id, *shifts.values()))
    return Frontier(
        name or type(ensemble).__name__,
        tuple(alphas),
        tuple(id_accuracy),
        tuple(sum(column) / len(column) for column in zip(*ood, strict=True)),
        getattr(ensemble, "alpha_", None),
    )


@checked
def evaluate_predictions(
    predictions: Mapping[str, Suite[Outputs]],
    bins: int = 15,
    score: str = "mcm",
    *,
    details: bool = False,
    conformal: Mapping[str, ConformalSets] | None = None,
    groups: Suite[Groups | None] | None = None,
    detectors: Mapping[str, Detector] | None = None,
) -> Evaluation:
    """`evaluate` from ready outputs with labels, one `Suite` of them per model.

    They need the logits. AUROC and FPR95 need the part that the score reads, for MCM the cosines; a model whose outputs
    lack it, as somebody else's logits do, has none. Logits of several widths need `Outputs.classes`, their columns'
    names; ValueError where they have none. `details` and `conformal` as in `evaluate`; `groups` are those of the sets,
    as `groups_in` finds them: `suite_of_data.map(groups_in)`. `detectors` are fitted ones of models, by name, for a
    `score` that learns: a model without one has no AUROC and FPR95.
    """
    check_score(score, fitted=detectors is not None)
    _check_conformal(conformal, predictions)
    if wrong := {name: one.score for name, one in (detectors or {}).items() if one.score != score}:
        raise ValueError(f"detectors score by {wrong}, expected {score!r}, as the table")
    extras = Extras(details, conformal or {}, groups, detectors or {})
    models = {name: _measure(name, suite, bins, score, extras) for name, suite in predictions.items()}
    return _evaluation(models, bins, score)


class Groups(NamedTuple):
    """The group of each image of a set (N,) int64, and the groups' names, where they have any."""

    of: Tensor
    names: tuple[str, ...] = ()


class Extras(NamedTuple):
    """What is measured beside the rest: on whom, of which images."""

    details: bool
    conformal: Mapping[str, ConformalSets]
    groups: Suite[Groups | None] | None
    detectors: Mapping[str, Detector]


def groups_in(dataset: Any) -> Groups | None:
    """The groups that a data set tells, by `.groups` and `.group_names`; None where it tells none."""
    groups = groups_of(dataset)
    if groups is None:
        return None
    return Groups(torch.as_tensor(groups).long(), group_names_of(dataset))


def _check_conformal(conformal: Mapping[str, ConformalSets] | None, models: Mapping[str, Any]) -> None:
    if unknown := [name for name in conformal or {} if name not in models]:
        raise ValueError(f"conformal names models that are not evaluated: {unknown}; there are {list(models)}")


def accuracy(outputs: Outputs) -> float:
    """Share of samples whose largest logit is their label's."""
    return float((outputs.logits.argmax(-1) == outputs.labels).double().mean())


def check_score(name: str, *, fitted: bool = False) -> None:
    """ValueError unless this is a score that can be computed from outputs alone, or one that learns from training
    images' outputs where it is to be `fitted`."""
    usable = sorted(name for name, entry in SCORES.items() if entry.of_outputs or (fitted and entry.of_fit))
    if name not in usable:
        raise ValueError(
            f"score must be one of {usable}, got {name!r}; for one that learns, or reads patches or negative texts, "
            "fit a robustft.Detector and pass its scores to ood_metrics"
        )


def _measure(model: str, suite: Suite[Outputs], bins: int, score: str, extras: Extras) -> ModelResult:
    shifts = list(suite.shifts.values())
    ood_scores: dict[str, Tensor] = {}
    entry = SCORES[score]
    detector = extras.detectors.get(model)
    ready = detector is not None or not entry.learns
    if suite.ood and ready and all(o.has(part) for o in (suite.id, *suite.ood.values()) for part in entry.reads):
        scores_of = entry() if detector is None else detector.scores
        id_scores, ood_scores = scores_of(suite.id), {k: scores_of(p) for k, p in suite.ood.items()}
    known: list[Tensor] = []
    if ood_scores and all(_comparable(p, suite.id, entry.reads) for p in shifts):
        known = [scores_of(p) for p in shifts]
    groups = extras.groups or Suite(None, {}, {})

    def measured(p: Outputs, groups_of_set: Groups | None) -> SetResult:
        return _measure_set(p, bins)._replace(**_extras(p, bins, extras, model, groups_of_set))

    return ModelResult(
        id=measured(suite.id, groups.id),
        shifts={k: measured(p, groups.shifts.get(k)) for k, p in suite.shifts.items()},
        ood={k: ood_metrics(id_scores, s, TPR) for k, s in ood_scores.items()},
        pooled=calibration_report(*_pooled(shifts), bins) if shifts else None,
        scores=_histogram(id_scores, ood_scores) if ood_scores else None,
        full_spectrum={k: ood_metrics(torch.cat([id_scores, *known]), s, TPR) for k, s in ood_scores.items()}
        if known
        else {},
    )


def _comparable(outputs: Outputs, others: Outputs, reads: Sequence[str]) -> bool:
    """Whether a score of the one compares with that of the others: of all it reads, over the same classes."""
    return outputs.classes == others.classes and all(
        outputs.has(part) and getattr(outputs, part).shape[-1] == getattr(others, part).shape[-1] for part in reads
    )


def _pooled(sets: Sequence[Outputs]) -> tuple[Tensor, Tensor]:
    """Probabilities (N, K), labels (N,) of all sets together, over the classes of all; 0 for those that a set lacks."""
    named = [p.classes for p in sets]
    widths = sorted({p.logits.shape[1] for p in sets})
    if len(widths) == 1 and len(set(named)) == 1:
        return torch.cat([p.probabilities for p in sets]), torch.cat([p.labels for p in sets])
    place = {name: i for i, name in enumerate(dict.fromkeys(name for names in named for name in names or ()))}
    if None in named or any(len(set(names)) < len(names) for names in named if names):
        raise ValueError(
            f"the shifts' logits have {listed(map(str, widths))} columns, and which class each is cannot be told: give "
            "outputs the names of theirs, Outputs(classes=...)"
        )
    probabilities, labels = [], []
    for p in sets:
        columns = torch.tensor([place[name] for name in p.classes or ()])
        wide = p.probabilities.new_zeros(len(p.labels), len(place))
        probabilities.append(wide.index_copy_(1, columns, p.probabilities))
        labels.append(columns[p.labels])
    return torch.cat(probabilities), torch.cat(labels)


def _measure_set(p: Outputs, bins: int) -> SetResult:
    report = calibration_report(p.probabilities, p.labels, bins)
    hits = p.logits.topk(min(5, p.logits.shape[1]), dim=1).indices == p.labels[:, None]
    counts = torch.bincount(p.labels, minlength=p.logits.shape[1])
    right = torch.bincount(p.labels[hits[:, 0]], minlength=p.logits.shape[1])
    recall = (right / counts)[counts > 0].double().mean()
    return SetResult(float(hits.any(1).double().mean()), float(recall), report)


def _extras(p: Outputs, bins: int, extras: Extras, model: str, groups: Groups | None) -> dict[str, Any]:
    """Further fields of the `SetResult` of a model on a set."""
    found: dict[str, Any] = {}
    sets = extras.conformal.get(model)
    if sets is not None and sets.classes_ == p.logits.shape[1]:
        report = coverage_report(sets.sets(p), p.labels, p.classes or ())
        report = report._replace(by_class=tuple(row for row in report.by_class if row.images))
        found["conformal"] = ConformalResult(sets.rule, sets.coverage, report)
    if not extras.details:
        return found
    confidence, predicted = (part.cpu() for part in p.probabilities.max(1))
    labels = p.labels.cpu()
    correct, c = predicted == labels, confidence.numpy()
    found["selective"] = selective_risk(confidence, correct).thinned()
    size = p.logits.shape[1]
    asked, given = torch.bincount(labels, minlength=size), torch.bincount(predicted, minlength=size)
    right = torch.bincount(labels[correct], minlength=size)

    def ece(rows: Tensor) -> tuple[float, float]:
        return top_label_ece(c[rows.numpy()], correct[rows].numpy(), bins)

    found["classes"] = tuple(
        ClassResult(
            p.classes[k] if p.classes else str(k),
            int(asked[k]),
            float(right[k] / asked[k]),
            float(right[k] / given[k]) if given[k] else None,
            *ece(labels == k),
        )
        for k in asked.nonzero()[:, 0].tolist()
    )
    if groups is not None:
        of = p.of_rows(groups.of, "groups").cpu()
        table = group_accuracy(predicted, labels, of)
        found["groups"] = tuple(
            GroupResult(
                groups.names[g] if groups.names else str(g),
                int(table.counts[g]),
                float(table.accuracy[g]),
                *ece(of == g),
            )
            for g in table.counts.nonzero()[:, 0].tolist()
        )
    return found


def _histogram(id_scores: Tensor, ood_scores: Mapping[str, Tensor]) -> ScoreHistogram:
    populations = [id_scores.double().numpy(), *(s.double().numpy() for s in ood_scores.values())]
    low, high = min(p.min() for p in populations), max(p.max() for p in populations)
    edges = np.linspace(low, high if high > low else low + 1e-6, SCORE_BINS + 1)
    counts = [tuple(np.histogram(p, edges)[0].tolist()) for p in populations]
    return ScoreHistogram(tuple(edges.tolist()), counts[0], dict(zip(ood_scores, counts[1:], strict=True)))


def _evaluation(models: dict[str, ModelResult], bins: int, score: str) -> Evaluation:
    if not models:
        raise ValueError("classifiers, or predictions, are empty: there must be at least one model to evaluate")
    return Evaluation(models, bins, score)
