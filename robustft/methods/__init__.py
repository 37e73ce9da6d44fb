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

`robustft.train.fit` is this loop with a learning-rate schedule, mixed precision, checkpoints and exact
resume. The model that you pass is copied and stays the zero-shot one, so before and after can be mixed
without more ado:

    zero_shot = zero_shot_classifier(model, tokenizer=tokenizer, class_names=names, templates=templates)
    wise = WiSEFT(zero_shot, method.classifier()).fit(validation).classifier()
"""

from robustft.methods.base import Classifier, Method, Outputs, Predictor, Step, load_classifier
from robustft.methods.carot import CaRot
from robustft.methods.clip_adapter import AdapterClassifier, CLIPAdapter
from robustft.methods.cocoop import CoCoOp, CoCoOpClassifier
from robustft.methods.coop import CoOp, KgCoOp
from robustft.methods.fine_tune import FineTune
from robustft.methods.flyp import FLYP
from robustft.methods.frozen import load_predictor
from robustft.methods.locoop import LoCoOp
from robustft.methods.maple import MaPLe, MaPLeClassifier
from robustft.methods.output_ensemble import Mixture, OutputEnsemble
from robustft.methods.proda import ProDA
from robustft.methods.tip_adapter import CacheClassifier, TipAdapter, TipAdapterF
from robustft.methods.wise_ft import WiSEFT
from robustft.methods.zero_shot import zero_shot_classifier

__all__ = [
    "AdapterClassifier",
    "CLIPAdapter",
    "CaRot",
    "CacheClassifier",
    "Classifier",
    "CoCoOp",
    "CoCoOpClassifier",
    "CoOp",
    "FLYP",
    "FineTune",
    "KgCoOp",
    "LoCoOp",
    "MaPLe",
    "MaPLeClassifier",
    "Method",
    "Mixture",
    "OutputEnsemble",
    "Outputs",
    "Predictor",
    "ProDA",
    "Step",
    "TipAdapter",
    "TipAdapterF",
    "WiSEFT",
    "load_classifier",
    "load_predictor",
    "zero_shot_classifier",
]
