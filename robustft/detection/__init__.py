"""Out-of-distribution detection: scores (`scores`, by name in `by_name`), a threshold on one (`detector`), and how well
scores separate two populations (`metrics`)."""

from robustft.detection.by_name import SCORES, register, table
from robustft.detection.detector import Detector
from robustft.detection.metrics import OODMetrics, ood_metrics, threshold
from robustft.detection.scores import energy, entropy, max_cosine, mcm, msp

__all__ = [
    "SCORES",
    "Detector",
    "OODMetrics",
    "energy",
    "entropy",
    "max_cosine",
    "mcm",
    "msp",
    "ood_metrics",
    "register",
    "table",
    "threshold",
]
