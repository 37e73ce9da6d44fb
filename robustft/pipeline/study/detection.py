"""OOD detection after fine-tuning (arXiv 2306.06048): scores of every model, against near and far unknowns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from robustft.data import glyphworld
from robustft.detection.by_name import SCORES, label
from robustft.detection.detector import Detector
from robustft.detection.metrics import ood_metrics
from robustft.methods import Classifier, Predictor, TipAdapter, WiSEFT, zero_shot_classifier
from robustft.pipeline.study.findings import Claim, Measured, Section, Table, falls, higher
from robustft.pipeline.study.recipes import HOSTS
from robustft.pipeline.study.world import World

NEAR, FAR = "letters", "textures"
SHOTS = 16
FEW_SHOT = ("CoOp", "LoCoOp", "CLIP-Adapter", "Tip-Adapter-F")
NEGATIVES = "NegLabel, half of the letters named"
NAMED, UNNAMED = "named letters", "other letters"


def measure(world: World) -> Measured:
    predictors: dict[str, Predictor] = {"zero-shot": world.zero_shot}
    predictors |= {name: world.predictor(name) for name in ("FT", "LP-FT", "FLYP", "CaRot", "DRM")}
    wise = WiSEFT(world.zero_shot, world.classifier("CaRot")).fit(world.data.validation)
    predictors["WiSE CaRot"] = wise.classifier()
    negatives = {name: negative_labels(world, p) for name, p in predictors.items() if isinstance(p, Classifier)}
    for name in FEW_SHOT:
        predictors[name] = world.few_shot(HOSTS[name], SHOTS).classifier()
    predictors["Tip-Adapter"] = TipAdapter(world.zero_shot).fit(world.shots(SHOTS), world.data.validation).classifier()
    tables: dict[str, dict[str, dict[str, float]]] = {title(known): {} for known in (NEAR, FAR)}
    for name, predictor in predictors.items():
        rows = separation(world, predictor)
        for known in (NEAR, FAR):
            tables[title(known)][name] = {score: row[known] for score, row in rows.items()}
    return Measured(tables | {NEGATIVES: negatives}, {})


def negative_labels(world: World, predictor: Classifier) -> dict[str, float]:
    """AUROC in % of NegLabel, given the names of half of the letters, and of MCM."""
    letters, textures = world.tests.ood[NEAR], world.tests.ood[FAR]
    names = glyphworld.ood(NEAR).classes
    named = [name for label, name in enumerate(names) if label < len(names) // 2]
    negatives = zero_shot_classifier(predictor.model, **world.prompts | {"class_names": named}).class_embeddings
    unknowns = {UNNAMED: letters[0][letters[1] >= len(named)], NAMED: letters[0][letters[1] < len(named)]}
    detectors = {"MCM": Detector("mcm"), "NegLabel": Detector("neg_label", negative_embeddings=negatives)}
    row = {}
    for score, detector in detectors.items():
        known = detector.scores(predictor, world.tests.id[0])
        for what, images in (unknowns | {FAR: textures[0]}).items():
            row[f"{what}, {score}"] = 100 * ood_metrics(known, detector.scores(predictor, images)).auroc
    return row


def title(known: str) -> str:
    return f"AUROC against {known}"


def separation(world: World, predictor: Predictor) -> dict[str, dict[str, float]]:
    """AUROC in % of every score, against each set of unknowns."""
    suite, training = world.suite(predictor), world.training(predictor)
    rows = {}
    for score, entry in SCORES.items():
        if entry.needs_options:
            continue
        detector = Detector(score)
        if "patch_cosines" in entry.reads:
            if not isinstance(predictor, Classifier):
                continue
            detector.fit(predictor, world.data.validation)
            sets = {"id": world.tests.id[0], **{known: pair[0] for known, pair in world.tests.ood.items()}}
            scores = {key: detector.scores(predictor, images) for key, images in sets.items()}
        else:
            detector.fit(training, validation=world.validation(predictor))
            scores = {key: detector.scores(p) for key, p in {"id": suite.id, **suite.ood}.items()}
        rows[label(score)] = {known: 100 * ood_metrics(scores["id"], scores[known]).auroc for known in suite.ood}
    return rows


def gains(known: str, score: str, name: str) -> Callable[[Mapping[str, Table]], float]:
    return higher(title(known), score, name, "zero-shot")


SECTION = Section(
    name="detection",
    title="OOD detection after fine-tuning",
    question="Which score separates known from unknown, before and after fine-tuning; and is MCM, by which zero-shot "
    "models are scored, still the right one afterwards?",
    measure=measure,
    claims=(
        *(
            Claim(f"Zero-shot, MCM beats {score} against {known}", falls(title(known), "zero-shot", "MCM", score))
            for known in (NEAR, FAR)
            for score in ("MSP", "energy")
        ),
        *(
            Claim(f"After {name}, MCM beats {score} against {known}", falls(title(known), name, "MCM", score))
            for name in ("FT", "CaRot")
            for known in (NEAR, FAR)
            for score in ("MSP", "energy")
        ),
        *(
            Claim(
                f"After FT, MCM beats max cosine against {known}",
                falls(title(known), "FT", "MCM", "max cosine"),
            )
            for known in (NEAR, FAR)
        ),
        *(
            Claim(
                f"GL-MCM beats MCM for the zero-shot model against {known}",
                falls(title(known), "zero-shot", "GL-MCM", "MCM"),
            )
            for known in (NEAR, FAR)
        ),
        *(
            Claim(
                f"By MCM, {name} separates {known} better than zero-shot",
                higher(title(known), "MCM", name, "zero-shot"),
            )
            for name in ("FT", "CaRot")
            for known in (NEAR, FAR)
        ),
        *(
            Claim(
                f"By {score}, LoCoOp is better than CoOp against {known}", higher(title(known), score, "LoCoOp", "CoOp")
            )
            for score in ("MCM", "GL-MCM")
            for known in (NEAR, FAR)
        ),
        *(
            Claim(
                f"{when}, NegLabel beats MCM against {what} that it was not given",
                falls(NEGATIVES, name, f"{what}, NegLabel", f"{what}, MCM"),
            )
            for when, name in (("Zero-shot", "zero-shot"), ("After CaRot", "CaRot"))
            for what in (UNNAMED, FAR)
        ),
    ),
    notes={
        title(NEAR): "Letters in the style of the digits: near.",
        title(FAR): "Textures without any character: far. Mahalanobis and k-NN learn the training features; L-MCM and "
        "GL-MCM look at the patches of one model with one head. "
        f"CoOp, LoCoOp and the adapters saw {SHOTS} images a class.",
        NEGATIVES: "The negative labels are the names of half of the letters: of what this model can read, only "
        "letters are no digits. Images of these letters have been named, as the paper's words from WordNet may name "
        "unknowns too; images of the others, and textures, have not.",
    },
)
