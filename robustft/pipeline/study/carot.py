"""CaRot (arXiv 2311.01723): accuracy and calibration under shift, its three terms, and its teacher's pace."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from robustft.methods import OutputEnsemble, Predictor, WiSEFT, greedy_soup, uniform_soup
from robustft.pipeline.recipes import RECIPES, Recipe
from robustft.pipeline.study.findings import Claim, Measured, Section, higher, lower
from robustft.pipeline.study.world import World, accuracy, tables
from robustft.pipeline.worlds import Benchmark

CAROT = RECIPES["CaRot"]
METHODS, TERMS, TEACHERS, SHIFTS = "methods", "terms", "teachers", "accuracy by shift"


def _ft(**options: float) -> Recipe:
    return replace(RECIPES["FT"], options=options)


def _with(**options: float) -> Recipe:
    return replace(CAROT, options={**CAROT.options, **options})


ALONE, PROJECTIONS, DISTILLED, ALL = "contrastive (FLYP)", "+ orthogonality, cross", "+ distillation", "all (CaRot)"
ABLATIONS = {
    ALONE: RECIPES["FLYP"],
    PROJECTIONS: _with(distillation_weight=0.0),
    DISTILLED: _with(orthogonality_weight=0.0, cross_weight=0.0),
    "all but cross": _with(cross_weight=0.0),
    ALL: CAROT,
}
FROZEN, ALWAYS = "frozen", "every step"


def lagged(bundled: Benchmark) -> str:
    return f"every 2 of {bundled.steps} steps"


def measure(world: World) -> Measured:
    zero_shot = world.zero_shot
    plain = {name: world.classifier(name) for name in ("FT", "LP-FT", "FLYP", "CaRot")}
    predictors: dict[str, Predictor] = {"zero-shot": zero_shot, **plain}
    for name in ("FT", "FLYP", "CaRot"):
        wise = WiSEFT(zero_shot, plain[name]).fit(world.data.validation)
        predictors[f"WiSE {name}"] = wise.classifier()
        predictors[f"OSE {name}"] = (
            OutputEnsemble(zero_shot, predictors[name], temperatures="fit").fit(world.data.validation).classifier()
        )
    predictors |= {
        "LP": world.classifier("LP"),
        "FT, label smoothing 0.1": world.train(_ft(label_smoothing=0.1)).classifier(),
        "FT, L2-SP": world.train(replace(_ft(l2_sp=1e-2), weight_decay=0.0)).classifier(),
    }
    ingredients = list(plain.values())
    predictors["uniform soup of the four"] = uniform_soup(ingredients)
    predictors["greedy soup of the four"] = greedy_soup(ingredients, world.data.validation).classifier
    terms: dict[str, Predictor] = {name: world.train(recipe).classifier() for name, recipe in ABLATIONS.items()}
    teachers: dict[str, Predictor] = {}
    intervals = {FROZEN: 10**6, "every 5": 5, lagged(world.benchmark): CAROT.options["ema_interval"], ALWAYS: 1}
    for name, interval in intervals.items():
        teachers[name] = world.train(_with(ema_interval=interval)).classifier()
    groups = {METHODS: predictors, TERMS: terms, TEACHERS: teachers}
    of_shifts = {name: by_shift(world, predictors[name]) for name in ("zero-shot", *plain, "WiSE CaRot")}
    return Measured(tables(world, groups) | {SHIFTS: of_shifts}, {})


def by_shift(world: World, predictor: Predictor) -> dict[str, float]:
    """Accuracy in % on each shift, and its means over those that pre-training saw and did not see, if it saw some."""
    found = {name: accuracy(outputs) for name, outputs in world.suite(predictor).shifts.items()}
    seen = world.benchmark.seen
    if not seen:
        return found
    parts = {"mean, seen": seen, "mean, unseen": [name for name in found if name not in seen]}
    return {what: fmean(found[name] for name in names) for what, names in parts.items()} | found


def section(bundled: Benchmark) -> Section:
    """The section on a benchmark whose runs have its number of steps."""
    return Section(
        name="carot",
        title="CaRot: accuracy and calibration under shift",
        question="Does CaRot keep accuracy and calibration under shift where other fine-tuning loses them, which of "
        "its terms does it, and at what pace should the teacher follow?",
        measure=measure,
        claims=(
            *(
                Claim(f"CaRot is more accurate under shift than {name}", higher(METHODS, "acc OOD", "CaRot", name))
                for name in ("FLYP", "FT", "LP-FT", "WiSE FLYP")
            ),
            *(
                Claim(f"CaRot's ECE under shift is lower than {name}'s", lower(METHODS, "ECE OOD", "CaRot", name))
                for name in ("FLYP", "FT", "LP-FT", "WiSE FLYP")
            ),
            Claim(
                "Zero-shot's ECE under shift is still lower than CaRot's",
                lower(METHODS, "ECE OOD", "zero-shot", "CaRot"),
            ),
            Claim(
                "The projection terms alone raise accuracy under shift", higher(TERMS, "acc OOD", PROJECTIONS, ALONE)
            ),
            Claim("The projection terms alone lower ECE under shift", lower(TERMS, "ECE OOD", PROJECTIONS, ALONE)),
            Claim("Distillation alone raises accuracy under shift", higher(TERMS, "acc OOD", DISTILLED, ALONE)),
            Claim("Distillation alone lowers ECE under shift", lower(TERMS, "ECE OOD", DISTILLED, ALONE)),
            Claim(
                "Both together are more accurate under shift than distillation",
                higher(TERMS, "acc OOD", ALL, DISTILLED),
            ),
            Claim(
                "A lagged teacher beats a frozen one under shift", higher(TEACHERS, "acc OOD", lagged(bundled), FROZEN)
            ),
            Claim(
                "A teacher that moves every step is worse under shift",
                higher(TEACHERS, "acc OOD", lagged(bundled), ALWAYS),
            ),
        ),
        notes={
            METHODS: "Mixing weights (WiSE, OSE), temperatures (OSE) and the greedy soup's ingredients are chosen on "
            "ID validation. The four: FT, LP-FT, FLYP and CaRot.",
            TEACHERS: "A frozen teacher follows the first step only. The paper's 500 of 25,030 steps are "
            f"{500 / 25030 * bundled.steps:.1f} of {bundled.steps}.",
            SHIFTS: "In %."
            + (f" Pre-training saw {', '.join(bundled.seen)}, and none of the others." if bundled.seen else ""),
        },
    )
