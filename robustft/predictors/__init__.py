"""What turns images into `Outputs` over classes, whatever it was trained by, and how it is kept."""

from robustft.clip.outputs import Outputs
from robustft.predictors.base import Classifier, Predictor, load_classifier
from robustft.predictors.dual import DualClassifier
from robustft.predictors.zero_shot import zero_shot_classifier

__all__ = ["Classifier", "DualClassifier", "Outputs", "Predictor", "load_classifier", "zero_shot_classifier"]
