"""Calibration: how far confidence is from accuracy (`measures`), by whose conventions (`conventions`), what mends it
after training (`calibrators`), on classes never trained on too (`distance_aware`), what is trained with (`losses`), and
sets of classes with a guarantee (`conformal`)."""

from robustft.calibration.calibrators import (
    HistogramBinning,
    IsotonicCalibration,
    TemperatureScaling,
    VectorScaling,
)
from robustft.calibration.conformal import ConformalSets, Coverage, CoverageReport, coverage_report
from robustft.calibration.distance_aware import distance_aware_logits, distance_aware_scales
from robustft.calibration.measures import (
    Bin,
    CalibrationReport,
    calibration_report,
    fit_temperature,
    temperature_matching_confidence,
)

__all__ = [
    "Bin",
    "CalibrationReport",
    "ConformalSets",
    "Coverage",
    "CoverageReport",
    "HistogramBinning",
    "IsotonicCalibration",
    "TemperatureScaling",
    "VectorScaling",
    "calibration_report",
    "coverage_report",
    "distance_aware_logits",
    "distance_aware_scales",
    "fit_temperature",
    "temperature_matching_confidence",
]
