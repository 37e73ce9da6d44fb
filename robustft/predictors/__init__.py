"""What turns images into `Outputs` over classes, whatever it was trained by, and how it is kept."""

from robustft.clip.outputs import Outputs
from robustft.predictors.base import Classifier, ModelPredictor, Predictor
from robustft.predictors.dual import DualClassifier
from robustft.predictors.saving import load_predictor
from robustft.predictors.zero_shot import zero_shot_classifier

__all__ = [
    "Classifier",
    "DualClassifier",
    "ModelPredictor",
    "Outputs",
    "Predictor",
    "load_predictor",
    "zero_shot_classifier",
]
