"""Calibration after training: maps of logits fitted on ID validation, in distribution and under shift."""

from __future__ import annotations

from torch import Tensor

from robustft.calibration.calibrators import HistogramBinning, IsotonicCalibration, TemperatureScaling, VectorScaling
from robustft.calibration.measures import calibration_report, temperature_matching_confidence
from robustft.clip.outputs import Outputs
from robustft.methods import Predictor
from robustft.pipeline.study.findings import Claim, Measured, Section, lower
from robustft.pipeline.study.recipes import HOST_SHOTS, HOSTS
from robustft.pipeline.study.world import World

COOP = f"CoOp, {HOST_SHOTS} shots"
MODELS = ("zero-shot", "FT", "CaRot", COOP)
NONE, TEMPERATURE, MATCHING = "as it is", "temperature", "temperature, confidence = accuracy"
CALIBRATORS = {
    TEMPERATURE: TemperatureScaling,
    "vector": VectorScaling,
    "isotonic": IsotonicCalibration,
    "histogram": HistogramBinning,
}


def measure(world: World) -> Measured:
    return Measured({name: calibrated(world, predictor(world, name)) for name in MODELS}, {})


def predictor(world: World, name: str) -> Predictor:
    match name:
        case "zero-shot":
            return world.zero_shot
        case _ if name == COOP:
            return world.few_shot(HOSTS["CoOp"], HOST_SHOTS).classifier()
    return world.predictor(name)


def calibrated(world: World, predictor: Predictor) -> dict[str, dict[str, float]]:
    """Every map on one model. Without an error on validation there is nothing to fit: all leave the model as it is."""
    validation, suite = world.validation(predictor), world.suite(predictor)
    z, y = validation.logits, validation.labels
    maps = {NONE: softmax}
    if bool((z.argmax(1) == y).all()):
        maps |= dict.fromkeys((*CALIBRATORS, MATCHING), softmax)
    else:
        maps |= {name: calibrator().fit(z, y).probabilities for name, calibrator in CALIBRATORS.items()}
        matching = temperature_matching_confidence(z, y)
        maps[MATCHING] = lambda logits: softmax(logits / matching)

    def report(p: Outputs, probabilities: Tensor) -> tuple[float, float, float]:
        found = calibration_report(probabilities, p.labels)
        return 100 * found.accuracy, 100 * found.ece, 100 * found.nll

    rows = {}
    for name, apply in maps.items():
        accuracy, ece, nll = report(suite.id, apply(suite.id.logits))
        shifts = [report(p, apply(p.logits)) for p in suite.shifts.values()]
        means = [sum(column) / len(shifts) for column in zip(*shifts, strict=True)]
        rows[name] = {"acc ID": accuracy, "ECE ID": ece, "NLL ID": nll}
        rows[name] |= dict(zip(("acc OOD", "ECE OOD", "NLL OOD"), means, strict=True))
    return rows


def softmax(logits: Tensor) -> Tensor:
    return logits.double().softmax(1)


SECTION = Section(
    name="calibration",
    title="Calibration after training: what held-out ID data can mend",
    question="Does a map of the logits, fitted on ID validation data, make a model honest in distribution; is it still "
    "so under shift; and is anything better than one temperature?",
    measure=measure,
    claims=(
        *(
            Claim(f"A temperature lowers {name}'s ECE {where}", lower(name, column, TEMPERATURE, NONE))
            for name in MODELS
            for where, column in (("in distribution", "ECE ID"), ("under shift", "ECE OOD"))
        ),
        *(
            Claim(f"{COOP}: {name} maps lower ECE more than a temperature", lower(COOP, "ECE ID", name, TEMPERATURE))
            for name in ("vector", "isotonic", "histogram")
        ),
        Claim(
            "CaRot as it is has a lower ECE under shift than FT with a temperature",
            lambda tables: tables["FT"][TEMPERATURE]["ECE OOD"] - tables["CaRot"][NONE]["ECE OOD"],
        ),
    ),
    notes={
        MODELS[-1]: "All are fitted on the ID validation images. NLL is in nats, times 100. A model without an error "
        "there stays as it is: no map has anything to learn from.",
    },
)
