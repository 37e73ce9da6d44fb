"""Methods of one shape. A whole fine-tuning, in your own loop:

    method = CaRot(model, tokenizer=tokenizer, class_names=names, templates=templates, total_steps=steps)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-5)
    for epoch in range(epochs):
        for batch in loader:                 # (images, labels), (images, texts) or a dictionary of them
            out = method.step(batch)         # out.loss to differentiate, out.terms to log
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            method.after_step()              # schedules and teachers follow
    probabilities = method.classifier().probabilities(images)

`robustft.fit` is this loop with a learning-rate schedule, mixed precision, checkpoints and exact
resume. The model that you pass is copied and stays the zero-shot one, so before and after can be mixed
without more ado:

    zero_shot = zero_shot_classifier(model, tokenizer=tokenizer, class_names=names, templates=templates)
    wise = WiSEFT(zero_shot, method.classifier()).fit(validation).classifier()
"""

from robustft.clip.outputs import Outputs
from robustft.ensembles.output_ensemble import Mixture, OutputEnsemble
from robustft.ensembles.soups import GreedySoup, greedy_soup, uniform_soup
from robustft.ensembles.tempering import Tempering
from robustft.ensembles.vrf import VRF, VRFClassifier
from robustft.ensembles.vrf_features import RatioBin, VRFFeatures
from robustft.ensembles.wise_ft import WiSEFT
from robustft.methods.base import Method, Step
from robustft.methods.carot import CaRot
from robustft.methods.clip_adapter import AdapterClassifier, CLIPAdapter
from robustft.methods.cocoop import CoCoOp, CoCoOpClassifier
from robustft.methods.coop import CoOp, KgCoOp
from robustft.methods.core_proxy import CoreProxy, core_labels
from robustft.methods.drm import DRM
from robustft.methods.fine_tune import LPFT, FineTune
from robustft.methods.flyp import FLYP
from robustft.methods.linear_probe import LinearProbe
from robustft.methods.locoop import LoCoOp
from robustft.methods.maple import MaPLe, MaPLeClassifier
from robustft.methods.proda import ProDA
from robustft.methods.tip_adapter import CacheClassifier, TipAdapter, TipAdapterF
from robustft.methods.worst_case import CVaR, GroupDRO, Risk, WorstCaseFineTune, WorstGroup
from robustft.predictors.base import Classifier, Predictor
from robustft.predictors.dual import DualClassifier
from robustft.predictors.saving import load_predictor
from robustft.predictors.zero_shot import zero_shot_classifier

__all__ = [
    "AdapterClassifier",
    "CLIPAdapter",
    "CVaR",
    "CaRot",
    "CacheClassifier",
    "Classifier",
    "CoCoOp",
    "CoCoOpClassifier",
    "CoOp",
    "CoreProxy",
    "DRM",
    "DualClassifier",
    "FLYP",
    "FineTune",
    "GreedySoup",
    "GroupDRO",
    "KgCoOp",
    "LPFT",
    "LinearProbe",
    "LoCoOp",
    "MaPLe",
    "MaPLeClassifier",
    "Method",
    "Mixture",
    "OutputEnsemble",
    "Outputs",
    "Predictor",
    "ProDA",
    "RatioBin",
    "Risk",
    "Step",
    "Tempering",
    "TipAdapter",
    "TipAdapterF",
    "VRF",
    "VRFClassifier",
    "VRFFeatures",
    "WiSEFT",
    "WorstCaseFineTune",
    "WorstGroup",
    "core_labels",
    "greedy_soup",
    "load_predictor",
    "uniform_soup",
    "zero_shot_classifier",
]
