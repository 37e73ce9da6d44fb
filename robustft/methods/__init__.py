"""Methods of one shape. A whole fine-tuning, in your own loop:

    method = CaRot(model, tokenizer=tokenizer, class_names=names, templates=templates, total_steps=steps)
    optimizer = robustft.training.AdamW(method, lr=1e-5)
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

This file is the list of what there is. A method is one line here: `name as name` tells type checkers that it is meant
for others, and `every_method` finds it.
"""

from robustft.clip.outputs import Outputs as Outputs
from robustft.ensembles.output_ensemble import Mixture as Mixture
from robustft.ensembles.output_ensemble import OutputEnsemble as OutputEnsemble
from robustft.ensembles.soups import GreedySoup as GreedySoup
from robustft.ensembles.soups import greedy_soup as greedy_soup
from robustft.ensembles.soups import uniform_soup as uniform_soup
from robustft.ensembles.tempering import Tempering as Tempering
from robustft.ensembles.vrf import VRF as VRF
from robustft.ensembles.vrf import VRFClassifier as VRFClassifier
from robustft.ensembles.vrf_features import RatioBin as RatioBin
from robustft.ensembles.vrf_features import VRFFeatures as VRFFeatures
from robustft.ensembles.wise_ft import WiSEFT as WiSEFT
from robustft.methods.base import Method as Method
from robustft.methods.base import Step as Step
from robustft.methods.car_ft import CARFT as CARFT
from robustft.methods.carot import CaRot as CaRot
from robustft.methods.clip_adapter import AdapterClassifier as AdapterClassifier
from robustft.methods.clip_adapter import CLIPAdapter as CLIPAdapter
from robustft.methods.cocoop import CoCoOp as CoCoOp
from robustft.methods.cocoop import CoCoOpClassifier as CoCoOpClassifier
from robustft.methods.coop import CoOp as CoOp
from robustft.methods.coop import KgCoOp as KgCoOp
from robustft.methods.core_proxy import CoreProxy as CoreProxy
from robustft.methods.core_proxy import core_labels as core_labels
from robustft.methods.drm import DRM as DRM
from robustft.methods.fine_tune import LPFT as LPFT
from robustft.methods.fine_tune import FineTune as FineTune
from robustft.methods.flyp import FLYP as FLYP
from robustft.methods.linear_probe import LinearProbe as LinearProbe
from robustft.methods.lipsum_ft import LipsumFT as LipsumFT
from robustft.methods.locoop import LoCoOp as LoCoOp
from robustft.methods.maple import MaPLe as MaPLe
from robustft.methods.maple import MaPLeClassifier as MaPLeClassifier
from robustft.methods.proda import ProDA as ProDA
from robustft.methods.starft import StarFT as StarFT
from robustft.methods.tip_adapter import CacheClassifier as CacheClassifier
from robustft.methods.tip_adapter import TipAdapter as TipAdapter
from robustft.methods.tip_adapter import TipAdapterF as TipAdapterF
from robustft.methods.worst_case import CVaR as CVaR
from robustft.methods.worst_case import GroupDRO as GroupDRO
from robustft.methods.worst_case import Risk as Risk
from robustft.methods.worst_case import WorstCaseFineTune as WorstCaseFineTune
from robustft.methods.worst_case import WorstGroup as WorstGroup
from robustft.predictors.base import Classifier as Classifier
from robustft.predictors.base import Predictor as Predictor
from robustft.predictors.dual import DualClassifier as DualClassifier
from robustft.predictors.saving import load_predictor as load_predictor
from robustft.predictors.zero_shot import zero_shot_classifier as zero_shot_classifier


def every_method() -> dict[str, type[Method]]:
    """The methods that train, by name; `summary()` of each says in a line what it is for."""
    kinds = {name: kind for name, kind in globals().items() if isinstance(kind, type) and issubclass(kind, Method)}
    del kinds["Method"]
    return dict(sorted(kinds.items()))
