"""From predictors and data sets to numbers, tables, pictures and one report."""

from robustft.evaluation.groups import group_accuracy, macro_f1, worst_group_accuracy
from robustft.evaluation.measure import evaluate, evaluate_predictions, frontier
from robustft.evaluation.results import Evaluation, Frontier, Suite
from robustft.evaluation.selective import SelectiveRisk, selective_risk

__all__ = [
    "Evaluation",
    "Frontier",
    "SelectiveRisk",
    "Suite",
    "evaluate",
    "evaluate_predictions",
    "frontier",
    "group_accuracy",
    "macro_f1",
    "selective_risk",
    "worst_group_accuracy",
]
