"""CMP (arXiv 2501.17595): few-shot hosts with and without the misalignment penalty, its variants, 1 to 16 shots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from robustft.calibration.measures import calibration_report, fit_temperature
from robustft.methods import Predictor, TipAdapter
from robustft.pipeline.recipes import Recipe
from robustft.pipeline.study.findings import Claim, Measured, Plot, Section, higher, lower
from robustft.pipeline.study.recipes import HOST_SHOTS, HOSTS
from robustft.pipeline.study.world import World
from robustft.pipeline.worlds import Benchmark

VARIANTS = ("neg_log_ratio", "neg_ratio", "softplus", "ratio")
SWEPT = "CoOp"  # the host of variants and shots
SHOTS = (1, 2, 4, 8, 16)
QUICK_SHOTS = (1, 4)
USUAL_WEIGHTS = {
    "brier": 1.0,
    "dca": 1.0,
    "mdca": 1.0,
    "mmce": 2.0,
    "mbls": 0.1,
    "confidence_penalty": 0.1,
    "logit_range": 10.0,
}
OTHER_TERMS: Mapping[str, dict[str, Any]] = {
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "focal loss, gamma 2": {"focal": 2.0},
    "ZS-Norm": {"rescale": "zero_shot"},
    **{f"{name}, weight {weight:g}": {"terms": {name: weight}} for name, weight in USUAL_WEIGHTS.items()},
}
CMP: Mapping[str, Any] = {"misalignment": 1.0}
OURS, RELEASED = "log-ratio (default)", "ratio (released)"
NAMES = {"neg_log_ratio": OURS, "ratio": RELEASED}


def measure(world: World) -> Measured:
    hosts: dict[str, dict[str, float]] = {"zero-shot": columns(world, world.zero_shot)}
    for name, recipe in HOSTS.items():
        for suffix, objective in (("", {}), (" + CMP", CMP)):
            hosts[name + suffix] = columns(world, trained(world, recipe, HOST_SHOTS, objective))
    cached = TipAdapter(world.zero_shot).fit(world.shots(HOST_SHOTS), world.data.validation)
    hosts["Tip-Adapter"] = columns(world, cached.classifier())
    variants = {"none": hosts[SWEPT]}
    for variant in VARIANTS:
        swept = CMP if NAMES.get(variant) == OURS else {**CMP, "variant": variant}
        variants[NAMES.get(variant, variant)] = columns(world, trained(world, HOSTS[SWEPT], HOST_SHOTS, swept))
    for name, objective in OTHER_TERMS.items():
        variants[name] = columns(world, trained(world, HOSTS[SWEPT], HOST_SHOTS, objective))
    few, errors = {}, {}
    counts = QUICK_SHOTS if world.quick else SHOTS
    for name, objective in ((SWEPT, {}), (f"{SWEPT} + CMP", CMP)):
        rows = [columns(world, trained(world, HOSTS[SWEPT], count, objective)) for count in counts]
        few[name] = list(map(float, counts)), [row["acc ID"] for row in rows]
        errors[name] = list(map(float, counts)), [row["ECE ID"] for row in rows]
    return Measured({HOSTED: hosts, OF_VARIANTS: variants}, {"accuracy-shots": few, "ece-shots": errors})


HOSTED, OF_VARIANTS = f"hosts, {HOST_SHOTS} shots", f"{SWEPT}'s objective, {HOST_SHOTS} shots"


def trained(world: World, recipe: Recipe, count: int, objective: Mapping[str, Any]) -> Predictor:
    """A host under an objective, on `count` images a class."""
    if objective:
        recipe = replace(recipe, options={**recipe.options, "objective": dict(objective)})
    return world.few_shot(recipe, count).classifier()


def columns(world: World, predictor: Predictor) -> dict[str, float]:
    """In %: on the ID test set, with the temperature of ID validation too, and on the shifts."""
    validation, test = world.validation(predictor), world.outputs(predictor, world.tests.id)
    temperature = fit_temperature(validation.logits, validation.labels)
    report = calibration_report(test.probabilities, test.labels)
    scaled = calibration_report((test.logits.double() / temperature).softmax(-1), test.labels)
    shifted = [world.outputs(predictor, part) for part in world.tests.shifts.values()]
    reports = [calibration_report(p.probabilities, p.labels) for p in shifted]
    return {
        "acc ID": 100 * report.accuracy,
        "ECE ID": 100 * report.ece,
        "ACE ID": 100 * report.ace,
        "ECE ID, temperature": 100 * scaled.ece,
        "acc OOD": 100 * sum(r.accuracy for r in reports) / len(reports),
        "ECE OOD": 100 * sum(r.ece for r in reports) / len(reports),
    }


def section(bundled: Benchmark) -> Section:
    """The section on a benchmark, whose test set's size says how much of an ECE is noise."""
    return Section(
        name="cmp",
        title="CMP: a penalty on confident mistakes",
        question="Does the misalignment penalty make few-shot hosts better calibrated, which form of it, and is it "
        "better than a temperature?",
        measure=measure,
        claims=(
            *(Claim(f"CMP lowers {name}'s ECE", lower(HOSTED, "ECE ID", f"{name} + CMP", name)) for name in HOSTS),
            *(
                Claim(f"CMP lowers {name}'s ECE under shift", lower(HOSTED, "ECE OOD", f"{name} + CMP", name))
                for name in HOSTS
            ),
            *(
                Claim(f"CMP costs {name} no accuracy", higher(HOSTED, "acc ID", f"{name} + CMP", name))
                for name in HOSTS
            ),
            Claim("The released ratio lowers ECE", lower(OF_VARIANTS, "ECE ID", RELEASED, "none")),
            Claim("The released ratio lowers accuracy", lower(OF_VARIANTS, "acc ID", RELEASED, "none")),
            Claim("The log-ratio is more accurate than the ratio", higher(OF_VARIANTS, "acc ID", OURS, RELEASED)),
        ),
        plots=(
            Plot(
                "accuracy-shots",
                "Accuracy against shots",
                "images a class",
                "accuracy ID (%)",
                "Thin lines: single seeds, which draw other images.",
                logarithmic=True,
            ),
            Plot(
                "ece-shots",
                "ECE against shots",
                "images a class",
                "ECE ID (%)",
                f"The noise floor at {bundled.tested} images is near {bundled.noise_floor}.",
                logarithmic=True,
            ),
        ),
        notes={
            HOSTED: "CMP: weight 1, the log-ratio. ECE ID, temperature: with the temperature of lowest NLL on ID "
            "validation, which costs nothing and is what a penalty competes with. The hosts' recipes are the same "
            "with and without the penalty.",
            OF_VARIANTS: "First CMP's variants, then other terms, of their usual weights.",
        },
    )
