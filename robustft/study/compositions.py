"""Compositions: any training, then any ensemble, then a temperature, then any detector; is one better at everything?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from robustft.data import glyphworld
from robustft.detection import ood_metrics
from robustft.detector import Detector
from robustft.evaluate import evaluate_predictions
from robustft.methods import (
    VRF,
    Classifier,
    CoreProxy,
    DualClassifier,
    Predictor,
    Tempering,
    VRFFeatures,
    WiSEFT,
    core_labels,
    uniform_soup,
)
from robustft.quickstart import RECIPES
from robustft.study.drm import DRM
from robustft.study.findings import Claim, Measured, Section, Table
from robustft.study.world import World

SINGLES, COMPOSED = "single methods", "compositions"
HALF = 0.5  # WiSE-FT's recommendation where no data tell (arXiv 2109.01903, section 4)
MOSTLY = 0.8  # of the fine-tuned soup: found, with the soup, by looking at seed 0's test sets
SOUP = f"soup of FT, CaRot + CMP and DRM, WiSE {MOSTLY}"
NAMES = (
    "CaRot + CMP",
    f"CaRot, WiSE {HALF}",
    f"CaRot + CMP, WiSE {HALF}",
    f"CaRot + CMP, WiSE {HALF}, k-NN detector",
    "CaRot, VRF, temperature",
    "CaRot, VRF, temperature, k-NN detector",
    f"DRM, WiSE {HALF}",
    f"FT, WiSE {HALF}",
    SOUP,
    f"{SOUP}, k-NN detector",
)
HIGHER, LOWER = ("acc ID", "acc OOD", "AUROC"), ("ECE OOD",)


def measure(world: World) -> Measured:
    zero_shot = world.zero_shot
    single: dict[str, Predictor] = {"zero-shot": zero_shot, "LP-FT": world.lp_ft()}
    single |= {name: world.classifier(name) for name in RECIPES}
    dual = drm(world)
    single["DRM"], carot = dual, single["CaRot"]
    penalised = world.train(
        replace(RECIPES["CaRot"], options={**RECIPES["CaRot"].options, "misalignment": 1.0})
    ).classifier()

    def wise(fine_tuned: Classifier, alpha: float = HALF) -> Classifier:
        return WiSEFT(zero_shot, fine_tuned).at(alpha)

    calibrated = Tempering(vrf(world, carot), rule="confidence").fit(world.data.validation).classifier()
    soup = wise(uniform_soup([single["FT"], penalised, dual.default]), MOSTLY)
    composed = {
        "CaRot + CMP": row(world, penalised),
        f"CaRot, WiSE {HALF}": row(world, wise(carot)),
        f"CaRot + CMP, WiSE {HALF}": row(world, wise(penalised)),
        f"CaRot + CMP, WiSE {HALF}, k-NN detector": row(world, wise(penalised), "knn"),
        "CaRot, VRF, temperature": row(world, calibrated),
        "CaRot, VRF, temperature, k-NN detector": row(world, calibrated, "knn"),
        f"DRM, WiSE {HALF}": row(world, wise(dual.default)),
        f"FT, WiSE {HALF}": row(world, wise(single["FT"])),
        SOUP: row(world, soup),
        f"{SOUP}, k-NN detector": row(world, soup, "knn"),
    }
    return Measured({SINGLES: {name: row(world, p) for name, p in single.items()}, COMPOSED: composed}, {})


def drm(world: World) -> DualClassifier:
    """DRM on the digits, with its default proxy and lambda."""
    images, labels = world.data.train
    core = core_labels(
        world.bundle.model,
        world.data.train,
        tokenizer=world.bundle.tokenizer,
        class_names=glyphworld.CLASS_NAMES,
        descriptions=glyphworld.CONCEPTS,
        proxy=CoreProxy(),
    )
    data = {"image": images, "label": labels, "core": core}
    return world.train(DRM, data, what="digits-core", descriptions=glyphworld.CONCEPTS, proxy=None).classifier()


def vrf(world: World, fine_tuned: Predictor) -> Predictor:
    train, validation = (
        VRFFeatures.of(world.zero_shot, fine_tuned, pair) for pair in (world.data.train, world.data.validation)
    )
    return VRF().fit(train, validation).classifier(world.zero_shot, fine_tuned)


def row(world: World, predictor: Predictor, score: str = "mcm") -> dict[str, float]:
    """The four numbers of a predictor and a detector, in %."""
    suite = world.suite(predictor)
    result = evaluate_predictions({"it": suite}).models["it"]
    detector = Detector(score).fit(world.training(predictor), validation=world.validation(predictor))
    known = detector.scores(suite.id)
    auroc = [ood_metrics(known, detector.scores(p)).auroc for p in suite.ood.values()]
    return {
        "acc ID": 100 * result.id_accuracy,
        "acc OOD": 100 * result.ood_accuracy,
        "ECE OOD": 100 * result.ood_ece,
        "AUROC": 100 * sum(auroc) / len(auroc),
    }


def dominates(name: str) -> Callable[[Mapping[str, Table]], float]:
    """The least of a composition's four leads over the best single method, each of them another one perhaps."""

    def margin(tables: Mapping[str, Table]) -> float:
        ours, singles = tables[COMPOSED][name], tables[SINGLES].values()
        leads = [ours[c] - max(s[c] for s in singles) for c in HIGHER]
        return min(leads + [min(s[c] for s in singles) - ours[c] for c in LOWER])

    return margin


SECTION = Section(
    name="compositions",
    title="Compositions: one recipe for everything?",
    question="Is there a composition of training, ensemble, temperature and detector that beats every single method on "
    "ID accuracy, accuracy and ECE under shift, and OOD detection at once?",
    measure=measure,
    claims=tuple(Claim(f"{name}: beats every single method at everything", dominates(name)) for name in NAMES),
    notes={
        SINGLES: "AUROC: MCM.",
        COMPOSED: f"AUROC: MCM, unless another detector is named. WiSE {HALF}: the weight that WiSE-FT recommends "
        f"where no data tell. The soup and its {MOSTLY} were found by looking at seed 0's test sets, so that seeds 1 "
        "and 2 are its test. A claim's margin: the least of the four leads over the best single method.",
    },
)
