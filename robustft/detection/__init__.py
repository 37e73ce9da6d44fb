"""Out-of-distribution detection: scores (`scores`, by name in `by_name`), a threshold on one (`detector`), and how well
scores separate two populations (`metrics`); what a score remembers of a stream (`memory`), and texts for those that
need some (`negatives`)."""

from robustft.detection.by_name import SCORES, register, table
from robustft.detection.detector import Detector
from robustft.detection.memory import AdaNegMemory
from robustft.detection.metrics import OODMetrics, Separation, SpectrumMetrics, ood_metrics, spectrum_metrics, threshold
from robustft.detection.negatives import Negatives, conjugated_negatives, conjugated_phrases
from robustft.detection.scores import energy, entropy, max_cosine, mcm, msp

__all__ = [
    "SCORES",
    "AdaNegMemory",
    "Detector",
    "Negatives",
    "OODMetrics",
    "Separation",
    "SpectrumMetrics",
    "conjugated_negatives",
    "conjugated_phrases",
    "energy",
    "entropy",
    "max_cosine",
    "mcm",
    "msp",
    "ood_metrics",
    "register",
    "spectrum_metrics",
    "table",
    "threshold",
]
