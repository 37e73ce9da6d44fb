"""VRF (arXiv 2411.06966): the frontier against mixtures in weights and in outputs, and accuracy against distance."""

from __future__ import annotations

from statistics import fmean
from typing import Any, NamedTuple

from robustft.ensembles.wise_ft import ALPHAS
from robustft.evaluation.measure import Ensemble
from robustft.methods import VRF, OutputEnsemble, Predictor, WiSEFT
from robustft.pipeline.study.findings import Claim, Curve, Measured, Plot, Section, Table, falls, higher
from robustft.pipeline.study.world import World, accuracy, columns

FINE_TUNED = ("FT", "FLYP", "CaRot", "LP")
ABLATED = "FLYP"
VARIANTS: dict[str, dict[str, Any]] = {
    "VRF, NLL temperatures": {"temperatures": "nll"},
    "VRF, no temperatures": {"temperatures": None},
    "VRF, linear weight": {"weighting": "linear"},
    "VRF, binary weight": {"weighting": "binary"},
    "VRF, whole training set": {"reference": "train"},
    "VRF, released k": {"k": "released"},
}
WITHIN = 1.0  # points of ID accuracy that a frontier's best point may give up
BINS = 8


def measure(world: World) -> Measured:
    tables: dict[str, Table] = {}
    curves: dict[str, dict[str, Curve]] = {"ratio": {}}
    ratios = tables["accuracy ratio under shift"] = {}
    for name in FINE_TUNED:
        found = compare(world, name)
        tables[name], curves[f"frontier-{name}"] = found.table, found.frontiers
        curves["ratio"][name] = found.ratio
        ratios[name] = {"nearest": found.ratio[1][0], "farthest": found.ratio[1][-1]}
    return Measured(tables, curves)


class Comparison(NamedTuple):
    table: Table
    frontiers: dict[str, Curve]
    ratio: Curve


def compare(world: World, name: str) -> Comparison:
    """Every ensemble of one fine-tuned model with the zero-shot one."""
    zero_shot, fine_tuned, data = world.zero_shot, world.classifier(name), world.data
    train, validation = (world.pair(fine_tuned, part) for part in (data.train, data.validation))
    vrf = VRF().fit(train, validation)
    wise = WiSEFT(zero_shot, fine_tuned).fit(data.validation)
    ose = OutputEnsemble(zero_shot, fine_tuned).fit(data.validation)
    calibrated = OutputEnsemble(zero_shot, fine_tuned, temperatures="fit").fit(data.validation)
    predictors: dict[str, Predictor] = {
        "zero-shot": zero_shot,
        name: fine_tuned,
        "WSE": wise.classifier(),
        "OSE": ose.classifier(),
        "OSE, temperatures": calibrated.classifier(),
        "VRF": vrf.classifier(zero_shot, fine_tuned),
    }
    if name == ABLATED:
        for variant, options in VARIANTS.items():
            if options.get("temperatures") == "nll" and bool(validation.correct()[1].all()):
                continue  # NLL has no minimum where the fine-tuned model makes no error
            predictors[variant] = VRF(**options).fit(train, validation).classifier(zero_shot, fine_tuned)
    table = columns({row: world.suite(predictor) for row, predictor in predictors.items()})

    ensembles: dict[str, Ensemble] = {
        "WSE": wise,
        "OSE": ose,
        "OSE, temperatures": calibrated,
        "VRF": vrf.classifier(zero_shot, fine_tuned),
    }
    frontiers = {row: frontier(world, ensemble) for row, ensemble in ensembles.items()}
    for row, points in frontiers.items():
        table[row]["best OOD"] = best(points, fine_tuned=table[name]["acc ID"])
    bins = vrf.accuracy_ratio(world.pair(fine_tuned, *world.tests.shifts.values()), BINS)
    return Comparison(table, frontiers, ([0.5 * (b.lower + b.upper) for b in bins], [b.ratio for b in bins]))


def frontier(world: World, ensemble: Ensemble) -> Curve:
    """An ensemble at every mixing weight: points (ID, mean over the shifts), in %."""
    along = [ensemble.at(alpha) for alpha in ALPHAS]
    known = [accuracy(world.outputs(predictor, world.tests.id)) for predictor in along]
    shifts = world.tests.shifts.values()
    return known, [fmean(accuracy(world.outputs(predictor, part)) for part in shifts) for predictor in along]


def best(curve: Curve, fine_tuned: float) -> float:
    """The best accuracy under shift on a frontier within `WITHIN` points of the fine-tuned model's ID accuracy."""
    return max(ood for id, ood in zip(*curve, strict=True) if id >= fine_tuned - WITHIN)


SECTION = Section(
    name="vrf",
    title="VRF: weights by the distance to what zero-shot gets wrong",
    question="Does the ratio of accuracies fall with the distance to the zero-shot-failure set, and is an ensemble "
    "weighed by it better than one of constant weights, in weights (WSE) or outputs (OSE)?",
    measure=measure,
    claims=(
        *(
            Claim(
                f"Near the failure set {name} gains more over zero-shot than far from it",
                falls("accuracy ratio under shift", name, "nearest", "farthest"),
                "in ratio",
            )
            for name in FINE_TUNED
        ),
        *(
            Claim(f"{name} + VRF is more accurate under shift than {name}", higher(name, "acc OOD", "VRF", name))
            for name in FINE_TUNED
        ),
        *(
            Claim(
                f"{name}: VRF's frontier is above that of OSE with temperatures",
                higher(name, "best OOD", "VRF", "OSE, temperatures"),
            )
            for name in FINE_TUNED
        ),
        *(
            Claim(f"{name}: VRF's frontier is above WSE's", higher(name, "best OOD", "VRF", "WSE"))
            for name in FINE_TUNED
        ),
        Claim(
            "The failure set serves better than the whole training set",
            higher(ABLATED, "acc OOD", "VRF", "VRF, whole training set"),
        ),
        Claim(
            "A sigmoid weight serves better than a binary one", higher(ABLATED, "acc OOD", "VRF", "VRF, binary weight")
        ),
    ),
    plots=(
        *(
            Plot(
                f"frontier-{name}",
                f"{name} and zero-shot, mixed",
                "accuracy ID (%)",
                "mean accuracy under shift (%)",
                "From zero-shot to fine-tuned by tenths of the mixing weight; for VRF of its mean on ID validation. "
                "Thin lines: single seeds.",
            )
            for name in FINE_TUNED
        ),
        Plot(
            "ratio",
            "Accuracy ratio against distance",
            "squared distance to the failure set",
            "accuracy, fine-tuned / zero-shot",
            f"All shifted samples together in {BINS} bins of equal size, by their distance to the failure set.",
        ),
    ),
    notes={
        name: f"best OOD: the best point of a frontier whose ID accuracy is within {WITHIN:g} point of {name}'s. It "
        "compares frontiers, by the test sets; the other columns are of weights chosen on ID validation, where many "
        "are equally good: of those VRF takes the one nearest to zero-shot, a rule that was set with GlyphWorld's "
        "shifts in view, WSE and OSE that of the lowest NLL. "
        "NLL temperatures: of the seeds in which the fine-tuned model errs on validation data at all."
        for name in FINE_TUNED
    },
)
