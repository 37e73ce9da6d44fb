"""From predictors and data sets to numbers, tables, pictures and one report."""

from robustft.evaluation.groups import group_accuracy, macro_f1, worst_group_accuracy
from robustft.evaluation.measure import Groups, evaluate, evaluate_predictions, frontier, groups_in
from robustft.evaluation.mistakes import Mistake, WorstClass, worst_classes
from robustft.evaluation.results import Evaluation, Frontier, Suite
from robustft.evaluation.selective import SelectiveRisk, selective_risk

__all__ = [
    "Evaluation",
    "Frontier",
    "Groups",
    "Mistake",
    "SelectiveRisk",
    "Suite",
    "WorstClass",
    "evaluate",
    "evaluate_predictions",
    "frontier",
    "group_accuracy",
    "groups_in",
    "macro_f1",
    "selective_risk",
    "worst_classes",
    "worst_group_accuracy",
]
