"""Compositions: any training, then any ensemble, then a temperature, then any detector; is one better at everything?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

from robustft.detection.detector import Detector
from robustft.detection.metrics import ood_metrics
from robustft.evaluation.measure import evaluate_predictions
from robustft.methods import VRF, Classifier, Predictor, Tempering, WiSEFT, uniform_soup
from robustft.pipeline.recipes import RECIPES
from robustft.pipeline.study.findings import Claim, Measured, Section, Table
from robustft.pipeline.study.recipes import DRM
from robustft.pipeline.study.world import World, of_kind
from robustft.pipeline.worlds import Benchmark
from robustft.predictors.logits import accuracy_and_nll, preference

SINGLES, COMPOSED = "single methods", "compositions"
HALF = 0.5  # WiSE-FT's recommendation where no data tell (arXiv 2109.01903, section 4)
SOUP = "soup of LP-FT, CaRot + CMP and DRM"  # this and the next two were found by looking at seed 0's test sets
WITH_ZERO_SHOT = "soup of zero-shot, LP-FT, CaRot + CMP and DRM"
MOSTLY = 0.9
MIXED = f"{SOUP}, WiSE {MOSTLY}"
SOUPS = (SOUP, WITH_ZERO_SHOT, MIXED)
NAMES = (
    "CaRot + CMP",
    f"CaRot, WiSE {HALF}",
    f"CaRot + CMP, WiSE {HALF}",
    "CaRot, VRF, temperature",
    f"DRM, WiSE {HALF}",
    f"FT, WiSE {HALF}",
    *SOUPS,
)
KNN = "AUROC, k-NN"
HIGHER, LOWER = ("acc ID", "acc OOD", KNN), ("ECE OOD",)
AXES = (*HIGHER, *LOWER)
VALIDATION = ("acc validation", "NLL validation")


def measure(world: World) -> Measured:
    zero_shot = world.zero_shot
    plain = {name: world.classifier(name) for name in ("LP-FT", *RECIPES)}
    dual, carot = world.drm(DRM), plain["CaRot"]
    single: dict[str, Predictor] = {"zero-shot": zero_shot, **plain, "DRM": dual}
    recipe = replace(RECIPES["CaRot"], options={**RECIPES["CaRot"].options, "misalignment": 1.0})
    penalised = of_kind(Classifier, world.train(recipe))

    def wise(fine_tuned: Classifier, alpha: float = HALF) -> Classifier:
        return WiSEFT(zero_shot, fine_tuned).at(alpha)

    calibrated = Tempering(vrf(world, carot), rule="confidence").fit(world.data.validation).classifier()
    members = [plain["LP-FT"], penalised, dual.default]
    soup = uniform_soup(members)
    soups = (soup, uniform_soup([zero_shot, *members]), wise(soup, MOSTLY))
    composed = (penalised, wise(carot), wise(penalised), calibrated, wise(dual.default), wise(plain["FT"]), *soups)
    tables = {SINGLES: single, COMPOSED: dict(zip(NAMES, composed, strict=True))}
    return Measured({t: {name: row(world, p) for name, p in group.items()} for t, group in tables.items()}, {})


def vrf(world: World, fine_tuned: Predictor) -> Predictor:
    train, validation = (world.pair(fine_tuned, part) for part in (world.data.train, world.data.validation))
    return VRF().fit(train, validation).classifier(world.zero_shot, fine_tuned)


def row(world: World, predictor: Predictor) -> dict[str, float]:
    """A predictor's numbers in %, and how two detectors on it separate known from unknown."""
    suite, held_out = world.suite(predictor), world.validation(predictor)
    result = evaluate_predictions({"it": suite}).models["it"]
    found = {
        "acc ID": 100 * result.id_accuracy,
        "acc OOD": 100 * result.ood_accuracy,
        "ECE OOD": 100 * result.ood_ece,
        "AUROC, MCM": 100 * result.auroc,
    }
    right, nll = accuracy_and_nll(held_out.logits, held_out.labels)
    found |= dict(zip(VALIDATION, (100 * right, 100 * nll), strict=True))
    detector = Detector("knn").fit(world.training(predictor), validation=held_out)
    known = detector.scores(suite.id)
    auroc = [ood_metrics(known, detector.scores(p)).auroc for p in suite.ood.values()]
    return found | {KNN: 100 * sum(auroc) / len(auroc)}


CHOSEN = "The composition that ID validation chooses"


def named(name: str, tables: Mapping[str, Table]) -> str:
    """A composition by its name, or the one of the highest ID validation accuracy; of equals that of the lowest NLL."""
    if name != CHOSEN:
        return name
    rows = tables[COMPOSED]
    return min(rows, key=lambda row: preference(*(rows[row][column] for column in VALIDATION)))


def dominates(name: str, slack: float = 0.0) -> Callable[[Mapping[str, Table]], float]:
    """The least of a composition's four leads over the best single method, each of them another one perhaps.

    `slack` is given away on ID accuracy, where little is left to win.
    """

    def margin(tables: Mapping[str, Table]) -> float:
        leads = {column: lead(name, column)(tables) for column in AXES}
        leads["acc ID"] += slack
        return min(leads.values())

    return margin


def lead(name: str, column: str) -> Callable[[Mapping[str, Table]], float]:
    """A composition's lead over the best single method in one column."""

    def margin(tables: Mapping[str, Table]) -> float:
        ours, singles = tables[COMPOSED][named(name, tables)][column], [s[column] for s in tables[SINGLES].values()]
        return ours - max(singles) if column in HIGHER else min(singles) - ours

    return margin


def fight(one: str, other: str) -> Callable[[Mapping[str, Table]], float]:
    """By how much models that are better at one thing are worse at another: minus the rank correlation, of all rows."""

    from scipy.stats import spearmanr

    def margin(tables: Mapping[str, Table]) -> float:
        rows = [row for table in (SINGLES, COMPOSED) for row in tables[table].values()]
        columns = [[row[axis] * (1 if axis in HIGHER else -1) for row in rows] for axis in (one, other)]
        return -float(spearmanr(*columns).statistic)

    return margin


def section(bundled: Benchmark) -> Section:
    """The section on a benchmark; one is chosen on ID validation where that tells trained models apart."""
    image = 100 / bundled.tested
    found = f"The soups were found by looking at {bundled.looked_at}. "
    claims = [
        *(Claim(f"{name}: beats every single method at everything", dominates(name)) for name in NAMES),
        *(Claim(f"{name}: the same, but for one image of ID", dominates(name, 2 * image)) for name in SOUPS),
        *(
            Claim(f"{WITH_ZERO_SHOT}: beats every single method in {column}", lead(WITH_ZERO_SHOT, column))
            for column in AXES
        ),
    ]
    if bundled.tells:
        claims += [
            Claim(f"{CHOSEN} beats every single method at everything", dominates(CHOSEN)),
            *(Claim(f"{CHOSEN} beats every single method in {column}", lead(CHOSEN, column)) for column in AXES),
            *(
                Claim(
                    f"{one} and {other} fight: of all models, those better at one are worse at the other",
                    fight(one, other),
                    "of rank correlation",
                )
                for one, other in itertools.combinations(AXES, 2)
            ),
        ]
    return Section(
        name="compositions",
        title="Compositions: one recipe for everything?",
        question="Is there a composition of training, ensemble, temperature and detector that beats every single "
        "method on ID accuracy, accuracy and ECE under shift, and OOD detection at once?",
        measure=measure,
        claims=claims,
        notes={
            COMPOSED: f"WiSE {HALF}: the weight that WiSE-FT recommends where no data tell. {found}Everything: ID "
            "accuracy, accuracy and ECE under shift, and AUROC by the k-NN detector for all; the margin is the least "
            "of the four leads over the best single method.",
        },
    )
