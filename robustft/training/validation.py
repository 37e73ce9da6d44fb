"""Measuring a method while it is trained: which weights were the best, and when to stop.

After every so many steps, and after the last, the classifier learnt so far predicts a held-out set. `Outputs` become

    validation_accuracy, validation_ece, validation_nll     as `robustft.evaluate` has them
    validation_worst_group                                  where the set has groups
    validation_<name>                                       the metric, where it is a function

and the metric, one of these, says whether the weights are the best so far. Nothing that the training draws or keeps
changes: a run with validation has, bit for bit, the weights of one without, until it is stopped early.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustft.calibration.measures import calibration_report
from robustft.clip.outputs import Outputs, evaluating
from robustft.data.classes import Matching
from robustft.data.seeds import stateless_seed
from robustft.data.sources import Source
from robustft.evaluation.groups import worst_group_accuracy
from robustft.methods.base import Method
from robustft.predictors.base import Predictor, each_batch, predict_each
from robustft.training.guards import own_generators
from robustft.training.schedule import check_arguments

Metric = Callable[[Outputs], float]
HIGHER_IS_BETTER = {"accuracy": True, "ece": False, "nll": False, "worst_group": True}
"""The metrics that `fit` knows by name."""


class Best(NamedTuple):
    """The step after which the metric was best, and its value there."""

    step: int
    value: float


class Validation:
    """A set and a metric, the best value so far, and how many validations have passed since.

    Args:
        method: whose classifier is measured.
        data: labelled images, any of what `robustft.data.sources` names, matched to the method's classes by name; or
            features in their place, where the method takes them.
        metric: a name of `HIGHER_IS_BETTER`, or a function of the outputs on the whole set.
        higher_is_better: of a function; None for a name.
        every: steps from one validation to the next.
        patience: validations without a better value after which training ends; None for no end.
        seed: of what the set's own transform draws.
        workers: processes that read images; None: as `robustft.data.sources.reading_workers` says.
        brief: look at one batch only.

    Raises: ValueError, TypeError, naming the argument.
    """

    def __init__(
        self,
        method: Method,
        data: Any,
        *,
        metric: str | Metric = "accuracy",
        higher_is_better: bool | None = None,
        every: int = 1,
        patience: int | None = None,
        seed: int = 0,
        workers: int | None = None,
        brief: bool = False,
    ) -> None:
        check_arguments(patience=patience)
        of = f"the {type(method).__name__}"
        source = Source(data, method.model, name="validation", classes=method.classes, of=of)
        about = source.check_training(len(method.class_names), method.takes_features)
        self.method, self.data, self.every, self.patience = method, data, every, patience
        self.seed, self.workers, self.brief = seed, workers, brief
        self.groups = _groups(source)
        self.features = _features(source)
        self.metric, self.name, self.higher_is_better = _named(metric, higher_is_better, self.groups)
        self.config = {"data": about, "metric": _told(metric), "every": every}
        self.best: Best | None = None
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        """Whether patience has come to its end."""
        return self.patience is not None and self.waited >= self.patience

    def due(self, step: int, total: int) -> bool:
        """Whether there is a validation after `step` of so many."""
        return step % self.every == 0 or step == total

    def state(self) -> dict[str, Any]:
        """What a resumed run must go on with."""
        return {"best": None if self.best is None else list(self.best), "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        self.best = None if state["best"] is None else Best(*state["best"])
        self.waited = state["waited"]

    def measure(self, step: int) -> dict[str, float]:
        """Every measure of the classifier as it is after `step`, by the names that records have.

        ValueError where the metric is no number.
        """
        with own_generators(self.method.steps.device):
            number = stateless_seed(self.seed, "validation")
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
            outputs = self._outputs()
            found = _measures(outputs, self._groups_of(outputs))
            if callable(self.metric):
                found[self.name] = float(self.metric(outputs))
        if math.isnan(found[self.name]):
            raise ValueError(f"metric {self.name!r} of the validation after step {step} is no number")
        return {f"validation_{name}": value for name, value in found.items()}

    def judge(self, step: int, measures: dict[str, float]) -> bool:
        """Whether these are the best so far; equal ones are not better."""
        value = measures[f"validation_{self.name}"]
        better = self.best is None or (value > self.best.value if self.higher_is_better else value < self.best.value)
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best = Best(step, value)
        return better

    def _groups_of(self, outputs: Outputs) -> Tensor | None:
        if self.groups is None or self.brief:
            return None if self.groups is None else self.groups[: len(outputs.labels)]
        return outputs.of_rows(self.groups, "validation's groups")

    def _outputs(self) -> Outputs:
        predictor = self.method.classifier()
        if self.features is not None:
            return _of_features(*predictor.matched(self.data), *self.features)
        if self.brief:
            (outputs,) = next(each_batch((predictor,), self.data, workers=0))
        else:
            (outputs,) = predict_each((predictor,), self.data, workers=self.workers)
        return outputs


def _named(
    metric: str | Metric, higher_is_better: bool | None, groups: Tensor | None
) -> tuple[str | Metric, str, bool]:
    if callable(metric):
        if higher_is_better is None:
            raise ValueError("higher_is_better must be True or False for a metric that is a function, got None")
        name = getattr(metric, "__name__", type(metric).__name__)
        if name in HIGHER_IS_BETTER:
            raise ValueError(f"metric is a function with the name of another metric, {name!r}: call it otherwise")
        return metric, name, higher_is_better
    if metric not in HIGHER_IS_BETTER:
        known = ", ".join(map(repr, HIGHER_IS_BETTER))
        raise ValueError(f"metric must be one of {known}, or a function of Outputs, got {metric!r}")
    if higher_is_better not in (None, HIGHER_IS_BETTER[metric]):
        raise ValueError(f"higher_is_better must be None for the metric {metric!r}, which is known, got False or True")
    if metric == "worst_group" and groups is None:
        raise ValueError('metric="worst_group" needs a validation set with groups: `.groups`, or a column "group"')
    return metric, metric, HIGHER_IS_BETTER[metric]


def _told(metric: str | Metric) -> str:
    """What tells the metric from others."""
    if isinstance(metric, str):
        return metric
    kind = metric if hasattr(metric, "__qualname__") else type(metric)
    return f"{kind.__module__}.{kind.__qualname__}"


def _groups(source: Source) -> Tensor | None:
    groups = source.groups if source.columns is None else source.columns.get("group")
    if groups is None:
        return None
    groups = torch.as_tensor(groups).cpu()
    if groups.shape != (len(source),):
        raise ValueError(f"validation: expected groups ({len(source)},), got {tuple(groups.shape)}")
    return groups


def _features(source: Source) -> tuple[Tensor, Tensor] | None:
    if source.columns is None or source.columns["image"].ndim != 2:
        return None
    return source.columns["image"], source.columns["label"]


@torch.no_grad()
def _of_features(predictor: Predictor, matching: Matching | None, u: Tensor, labels: Tensor) -> Outputs:
    """Outputs of unit features (N, D), with labels (N,) that mean the method's classes, on the CPU."""
    device = next(predictor.parameters()).device
    if matching is not None and matching.partial:
        labels = torch.searchsorted(torch.tensor(matching.kept, device=labels.device), labels.long())
    with evaluating(predictor):
        outputs = predictor.head_outputs(u.to(device)).map(Tensor.cpu)
    return outputs.replace(labels=labels.long().cpu(), classes=predictor.classes)


def _measures(outputs: Outputs, groups: Tensor | None) -> dict[str, float]:
    report = calibration_report(outputs.probabilities, outputs.labels)
    found = {"accuracy": report.accuracy, "ece": report.ece, "nll": report.nll}
    if groups is not None:
        found["worst_group"] = worst_group_accuracy(outputs.logits, outputs.labels, groups)
    return found
