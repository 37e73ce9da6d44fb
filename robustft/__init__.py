"""robustft: robust fine-tuning of CLIP-like models.

Fused losses in `robustft.functional` and `robustft.losses`; methods (`robustft.CaRot`, `robustft.FLYP`, ...) that fit
any training loop; calibration, OOD detection and evaluation. Importing this loads nothing, not even torch: a name is
imported on first use. The operators `torch.ops.robustft` are there as soon as `robustft.functional` is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = {
    "calibration": "HistogramBinning IsotonicCalibration TemperatureScaling VectorScaling "
    "calibration_report fit_temperature",
    "detection": "Detector ood_metrics",
    "ensembles": "VRF LiNeS OutputEnsemble Tempering VRFFeatures WiSEFT greedy_soup model_stock uniform_soup",
    "evaluation": "macro_f1 worst_group_accuracy",
    "losses": "CaRotLoss ClassificationLoss ContrastiveLoss DualRiskLoss SigmoidContrastiveLoss",
    "methods": "CARFT CaRot CLIPAdapter CoCoOp CoOp DRM FineTune FLYP KgCoOp LinearProbe LipsumFT LoCoOp LPFT MaPLe "
    "ProDA StarFT TipAdapter TipAdapterF WorstCaseFineTune",
    "methods.objective": "Objective",
    "neighbors": "NeighborIndex",
    "ops.dispatch": "backend build_info",
    "pipeline.serving": "Pipeline Prediction load",
    "pipeline.train": "Run train",
    "predictors": "load_predictor zero_shot_classifier",
    "training": "fit",
}
"""Where the names at the top of the package live."""

_LAZY = {name: f"robustft.{room}" for room, names in _ROOMS.items() for name in names.split()}
_MODULES = (
    "calibration clip data detection ensembles evaluation functional losses methods neighbors "
    "pipeline predictors training"
).split()

__all__ = [*_LAZY, *_MODULES]

if TYPE_CHECKING:  # the same names, for type checkers and editors; a test holds the two together
    from robustft import calibration as calibration
    from robustft import clip as clip
    from robustft import data as data
    from robustft import detection as detection
    from robustft import ensembles as ensembles
    from robustft import evaluation as evaluation
    from robustft import functional as functional
    from robustft import losses as losses
    from robustft import methods as methods
    from robustft import neighbors as neighbors
    from robustft import pipeline as pipeline
    from robustft import predictors as predictors
    from robustft import training as training
    from robustft.calibration import HistogramBinning as HistogramBinning
    from robustft.calibration import IsotonicCalibration as IsotonicCalibration
    from robustft.calibration import TemperatureScaling as TemperatureScaling
    from robustft.calibration import VectorScaling as VectorScaling
    from robustft.calibration import calibration_report as calibration_report
    from robustft.calibration import fit_temperature as fit_temperature
    from robustft.detection import Detector as Detector
    from robustft.detection import ood_metrics as ood_metrics
    from robustft.ensembles import VRF as VRF
    from robustft.ensembles import LiNeS as LiNeS
    from robustft.ensembles import OutputEnsemble as OutputEnsemble
    from robustft.ensembles import Tempering as Tempering
    from robustft.ensembles import VRFFeatures as VRFFeatures
    from robustft.ensembles import WiSEFT as WiSEFT
    from robustft.ensembles import greedy_soup as greedy_soup
    from robustft.ensembles import model_stock as model_stock
    from robustft.ensembles import uniform_soup as uniform_soup
    from robustft.evaluation import macro_f1 as macro_f1
    from robustft.evaluation import worst_group_accuracy as worst_group_accuracy
    from robustft.losses import CaRotLoss as CaRotLoss
    from robustft.losses import ClassificationLoss as ClassificationLoss
    from robustft.losses import ContrastiveLoss as ContrastiveLoss
    from robustft.losses import DualRiskLoss as DualRiskLoss
    from robustft.losses import SigmoidContrastiveLoss as SigmoidContrastiveLoss
    from robustft.methods import CARFT as CARFT
    from robustft.methods import DRM as DRM
    from robustft.methods import FLYP as FLYP
    from robustft.methods import LPFT as LPFT
    from robustft.methods import CaRot as CaRot
    from robustft.methods import CLIPAdapter as CLIPAdapter
    from robustft.methods import CoCoOp as CoCoOp
    from robustft.methods import CoOp as CoOp
    from robustft.methods import FineTune as FineTune
    from robustft.methods import KgCoOp as KgCoOp
    from robustft.methods import LinearProbe as LinearProbe
    from robustft.methods import LipsumFT as LipsumFT
    from robustft.methods import LoCoOp as LoCoOp
    from robustft.methods import MaPLe as MaPLe
    from robustft.methods import ProDA as ProDA
    from robustft.methods import StarFT as StarFT
    from robustft.methods import TipAdapter as TipAdapter
    from robustft.methods import TipAdapterF as TipAdapterF
    from robustft.methods import WorstCaseFineTune as WorstCaseFineTune
    from robustft.methods.objective import Objective as Objective
    from robustft.neighbors import NeighborIndex as NeighborIndex
    from robustft.ops.dispatch import backend as backend
    from robustft.ops.dispatch import build_info as build_info
    from robustft.pipeline.serving import Pipeline as Pipeline
    from robustft.pipeline.serving import Prediction as Prediction
    from robustft.pipeline.serving import load as load
    from robustft.pipeline.train import Run as Run
    from robustft.pipeline.train import train as train
    from robustft.predictors import load_predictor as load_predictor
    from robustft.predictors import zero_shot_classifier as zero_shot_classifier
    from robustft.training import fit as fit


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"robustft.{name}")
    raise AttributeError(f"module 'robustft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
