"""What came beside and since CaRot: TRACER's teacher and terms, terms that hold to the pre-trained model, and mixtures
of weights that choose more than one number or none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from robustft.ensembles import LiNeS, model_stock
from robustft.methods import Predictor, WiSEFT
from robustft.pipeline.recipes import RECIPES, Recipe
from robustft.pipeline.study.findings import Claim, Measured, Section, higher, lower
from robustft.pipeline.study.world import World, of_kind, tables
from robustft.predictors.base import Classifier

TRACER, HELD, MIXED = "TRACER's parts", "terms that hold to the pre-trained model", "mixtures of weights"
BETA, FEATURES, PERSPECTIVES = "CaRot, beta teacher", "+ feature distillation", "+ all perspectives (TRACER)"
CROSS, WITHOUT = "+ cross distillation", "all perspectives, no projection terms"
STOCK = "Model Stock of two FT"


def _carot(**options: Any) -> Recipe:
    return replace(RECIPES["CaRot"], options={"teacher": "beta", **options})


ALL = {"feature_weight": 1.0, "cross_distillation_weight": 1.0, "interactive_weight": 1.0}
PARTS = {
    BETA: _carot(),
    FEATURES: _carot(feature_weight=1.0),
    CROSS: _carot(feature_weight=1.0, cross_distillation_weight=1.0),
    PERSPECTIVES: _carot(**ALL),
    WITHOUT: _carot(**ALL, orthogonality_weight=0.0, cross_weight=0.0),
}
ANCHORED = {
    "Lipsum-FT": replace(RECIPES["FT"], method="LipsumFT"),
    "CAR-FT": replace(RECIPES["FT"], method="CARFT"),
    "StarFT": replace(RECIPES["FLYP"], method="StarFT"),
}


def held_to(world: World) -> dict[str, Predictor]:
    """By name, what is trained with a term that holds it to the pre-trained model."""
    bundled = world.benchmark
    options: dict[str, dict[str, Any]] = {
        "StarFT": {"spurious": bundled.by_chance},
        "CAR-FT": {"contexts": bundled.contexts or None},
    }
    return {name: world.train(recipe, **options.get(name, {})).classifier() for name, recipe in ANCHORED.items()}


def stock(world: World) -> Predictor:
    again = of_kind(Classifier, world.train(RECIPES["FT"], run=1))
    return model_stock(world.zero_shot, [world.classifier("FT"), again])


def further(world: World) -> dict[str, Predictor]:
    """What other sections look at, too."""
    return {"TRACER": world.train(PARTS[PERSPECTIVES]).classifier(), **held_to(world), STOCK: stock(world)}


def measure(world: World) -> Measured:
    zero_shot, validation = world.zero_shot, world.data.validation
    plain = {name: world.classifier(name) for name in ("FT", "FLYP", "CaRot")}
    tracer: dict[str, Predictor] = {"CaRot": plain["CaRot"]}
    tracer |= {name: world.train(recipe).classifier() for name, recipe in PARTS.items()}
    held: dict[str, Predictor] = {"zero-shot": zero_shot, "FT": plain["FT"], "FLYP": plain["FLYP"]}
    held |= held_to(world)
    mixed: dict[str, Predictor] = {"FT": plain["FT"], "CaRot": plain["CaRot"]}
    for name in ("FT", "CaRot"):
        mixed[f"WiSE {name}"] = WiSEFT(zero_shot, plain[name]).fit(validation).classifier()
        mixed[f"LiNeS {name}"] = LiNeS(zero_shot, plain[name]).fit(validation).classifier()
    mixed[STOCK] = stock(world)
    groups = {TRACER: tracer, HELD: held, MIXED: mixed}
    return Measured(tables(world, groups), {})


SECTION = Section(
    name="field",
    title="Beside and since CaRot: TRACER, Lipsum-FT, CAR-FT, StarFT, LiNeS, Model Stock",
    question="Does a teacher that weighs the whole run help CaRot, do terms that hold to the pre-trained model keep "
    "accuracy under shift, and do mixtures by depth or by angle beat a mixture by one number?",
    measure=measure,
    claims=(
        Claim("The beta teacher makes CaRot more accurate under shift", higher(TRACER, "acc OOD", BETA, "CaRot")),
        Claim("The beta teacher lowers CaRot's ECE under shift", lower(TRACER, "ECE OOD", BETA, "CaRot")),
        Claim(
            "TRACER's further perspectives add accuracy under shift to that",
            higher(TRACER, "acc OOD", PERSPECTIVES, BETA),
        ),
        *(
            Claim(f"{name} is more accurate under shift than {base}", higher(HELD, "acc OOD", name, base))
            for name, base in (("Lipsum-FT", "FT"), ("CAR-FT", "FT"), ("StarFT", "FLYP"))
        ),
        *(
            Claim(
                f"LiNeS {name} is more accurate under shift than {than}",
                higher(MIXED, "acc OOD", f"LiNeS {name}", than),
            )
            for name in ("FT", "CaRot")
            for than in (name, f"WiSE {name}")
        ),
        Claim(f"{STOCK} is more accurate under shift than FT", higher(MIXED, "acc OOD", STOCK, "FT")),
        Claim(f"{STOCK} is more accurate under shift than WiSE FT", higher(MIXED, "acc OOD", STOCK, "WiSE FT")),
    ),
    notes={
        TRACER: "The weights of TRACER's further terms are 1: no published command tells them. But for the last row "
        "CaRot's projection terms stay.",
        HELD: "Every weight is the method's default. StarFT's captions put the class where it is by chance. "
        "CAR-FT's contexts are the templates, or such captions where the model does not tell the templates apart.",
        MIXED: "WiSE-FT's and LiNeS' numbers are chosen on ID validation data. Model Stock chooses nothing; its second "
        "run has another order of the images.",
    },
)
