"""robustft: robust fine-tuning of CLIP-like models.

Fused losses in `robustft.functional` and `robustft.losses`; methods (`robustft.CaRot`, `robustft.FLYP`, ...) that fit
any training loop; calibration, OOD detection and evaluation. Importing this loads torch and nothing heavier: the rest
is imported on first use.
"""

from __future__ import annotations

from importlib import import_module

from robustft import functional
from robustft.ops.dispatch import backend, build_info

__version__ = "0.1.0"

_METHODS = (
    *("FineTune", "FLYP", "CaRot", "DRM", "WorstCaseFineTune", "LinearProbe", "LPFT"),
    *("CoOp", "KgCoOp", "CoCoOp", "LoCoOp", "ProDA", "MaPLe", "CLIPAdapter", "TipAdapter", "TipAdapterF"),
    *("VRF", "VRFFeatures", "WiSEFT", "OutputEnsemble", "Tempering", "uniform_soup", "greedy_soup"),
    "zero_shot_classifier",
)
_LAZY = {
    **dict.fromkeys(_METHODS, "robustft.methods"),
    **dict.fromkeys(("ContrastiveLoss", "CaRotLoss", "ClassificationLoss", "DualRiskLoss"), "robustft.losses"),
    **dict.fromkeys(
        (
            *("calibration_report", "fit_temperature"),
            *("HistogramBinning", "IsotonicCalibration", "TemperatureScaling", "VectorScaling"),
        ),
        "robustft.calibration",
    ),
    **dict.fromkeys(("macro_f1", "worst_group_accuracy"), "robustft.evaluation"),
    **dict.fromkeys(("Detector", "ood_metrics"), "robustft.detection"),
    "Objective": "robustft.methods.objective",
    "fit": "robustft.training",
    "NeighborIndex": "robustft.neighbors",
}
_MODULES = (
    "calibration",
    "clip",
    "data",
    "detection",
    "ensembles",
    "evaluation",
    "losses",
    "methods",
    "neighbors",
    "pipeline",
    "predictors",
    "training",
)

__all__ = ["backend", "build_info", "functional", *_LAZY, *_MODULES]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"robustft.{name}")
    raise AttributeError(f"module 'robustft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
