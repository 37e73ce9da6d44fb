"""Mixtures of models: of weights (WiSE-FT, LiNeS, soups, Model Stock) and of outputs (OSE, tempering, VRF)."""

from robustft.ensembles.lines import LiNeS
from robustft.ensembles.output_ensemble import Mixture, OutputEnsemble
from robustft.ensembles.soups import GreedySoup, greedy_soup, model_stock, uniform_soup
from robustft.ensembles.tempering import Tempering
from robustft.ensembles.vrf import VRF, VRFClassifier
from robustft.ensembles.vrf_features import RatioBin, VRFFeatures
from robustft.ensembles.wise_ft import WiSEFT

__all__ = [
    "GreedySoup",
    "LiNeS",
    "Mixture",
    "OutputEnsemble",
    "RatioBin",
    "Tempering",
    "VRF",
    "VRFClassifier",
    "VRFFeatures",
    "WiSEFT",
    "greedy_soup",
    "model_stock",
    "uniform_soup",
]
