"""Calibration: how far confidence is from accuracy (`measures`), by whose conventions (`conventions`), what mends it
after training (`calibrators`) and what is trained with (`losses`)."""

from robustft.calibration.calibrators import (
    HistogramBinning,
    IsotonicCalibration,
    TemperatureScaling,
    VectorScaling,
)
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
    "HistogramBinning",
    "IsotonicCalibration",
    "TemperatureScaling",
    "VectorScaling",
    "calibration_report",
    "fit_temperature",
    "temperature_matching_confidence",
]
