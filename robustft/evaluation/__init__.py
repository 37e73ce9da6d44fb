"""From predictors and data sets to numbers, tables, pictures and one report."""

from robustft.evaluation.groups import group_accuracy, macro_f1, worst_group_accuracy
from robustft.evaluation.measure import (
    Evaluation,
    Frontier,
    Predictions,
    Suite,
    evaluate,
    evaluate_predictions,
    frontier,
    predict,
)

__all__ = [
    "Evaluation",
    "Frontier",
    "Predictions",
    "Suite",
    "evaluate",
    "evaluate_predictions",
    "frontier",
    "group_accuracy",
    "macro_f1",
    "predict",
    "worst_group_accuracy",
]
