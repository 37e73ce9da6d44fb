"""OOD detection after fine-tuning (arXiv 2306.06048): scores of every model, against near and far unknowns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from robustft.detection.by_name import SCORES, label
from robustft.detection.detector import Detector
from robustft.detection.metrics import ood_metrics
from robustft.methods import Classifier, Predictor, TipAdapter, WiSEFT, zero_shot_classifier
from robustft.pipeline.recipes import DEFAULT_WORLD
from robustft.pipeline.study.findings import Claim, Measured, Section, Table, falls, higher
from robustft.pipeline.study.recipes import HOSTS
from robustft.pipeline.study.world import World
from robustft.pipeline.worlds import Benchmark, benchmark

SHOTS = 16
FEW_SHOT = ("CoOp", "LoCoOp", "CLIP-Adapter", "Tip-Adapter-F")


def negatives_of(bundled: Benchmark) -> str:
    return f"NegLabel, half of the {bundled.near} named"


def unnamed_in(bundled: Benchmark) -> str:
    return f"other {bundled.near}"


def measure(world: World) -> Measured:
    bundled = world.benchmark
    unknowns = bundled.near, bundled.far
    predictors: dict[str, Predictor] = {"zero-shot": world.zero_shot}
    predictors |= {name: world.predictor(name) for name in ("FT", "LP-FT", "FLYP", "CaRot", "DRM")}
    wise = WiSEFT(world.zero_shot, world.classifier("CaRot")).fit(world.data.validation)
    predictors["WiSE CaRot"] = wise.classifier()
    negatives = {name: negative_labels(world, p) for name, p in predictors.items() if isinstance(p, Classifier)}
    for name in FEW_SHOT:
        predictors[name] = world.few_shot(HOSTS[name], SHOTS).classifier()
    predictors["Tip-Adapter"] = TipAdapter(world.zero_shot).fit(world.shots(SHOTS), world.data.validation).classifier()
    tables: dict[str, dict[str, dict[str, float]]] = {title(known): {} for known in unknowns}
    for name, predictor in predictors.items():
        rows = separation(world, predictor)
        for known in unknowns:
            tables[title(known)][name] = {score: row[known] for score, row in rows.items()}
    return Measured(tables | {negatives_of(bundled): negatives}, {})


def negative_labels(world: World, predictor: Classifier) -> dict[str, float]:
    """AUROC in % of NegLabel, given the names of half of the near unknowns, and of MCM."""
    bundled = world.benchmark
    (images, labels), (far, _) = world.tests.ood[bundled.near], world.tests.ood[bundled.far]
    names = world.sets.ood[bundled.near].classes
    named = [name for label, name in enumerate(names) if label < len(names) // 2]
    negatives = zero_shot_classifier(predictor.model, **world.prompts | {"class_names": named}).class_embeddings
    unknowns = {
        unnamed_in(bundled): images[labels >= len(named)],
        f"named {bundled.near}": images[labels < len(named)],
        bundled.far: far,
    }
    detectors = {"MCM": Detector("mcm"), "NegLabel": Detector("neg_label", negative_embeddings=negatives)}
    row = {}
    for score, detector in detectors.items():
        known = detector.scores(predictor, world.tests.id[0])
        for what, shown in unknowns.items():
            row[f"{what}, {score}"] = 100 * ood_metrics(known, detector.scores(predictor, shown)).auroc
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


def section(bundled: Benchmark) -> Section:
    """The section on a benchmark's unknowns."""
    unknowns, negatives = (bundled.near, bundled.far), negatives_of(bundled)
    return Section(
        name="detection",
        title="OOD detection after fine-tuning",
        question="Which score separates known from unknown, before and after fine-tuning; and is MCM, by which "
        "zero-shot models are scored, still the right one afterwards?",
        measure=measure,
        claims=(
            *(
                Claim(f"Zero-shot, MCM beats {score} against {known}", falls(title(known), "zero-shot", "MCM", score))
                for known in unknowns
                for score in ("MSP", "energy")
            ),
            *(
                Claim(f"After {name}, MCM beats {score} against {known}", falls(title(known), name, "MCM", score))
                for name in ("FT", "CaRot")
                for known in unknowns
                for score in ("MSP", "energy")
            ),
            *(
                Claim(
                    f"After FT, MCM beats max cosine against {known}",
                    falls(title(known), "FT", "MCM", "max cosine"),
                )
                for known in unknowns
            ),
            *(
                Claim(
                    f"GL-MCM beats MCM for the zero-shot model against {known}",
                    falls(title(known), "zero-shot", "GL-MCM", "MCM"),
                )
                for known in unknowns
            ),
            *(
                Claim(
                    f"By MCM, {name} separates {known} better than zero-shot",
                    higher(title(known), "MCM", name, "zero-shot"),
                )
                for name in ("FT", "CaRot")
                for known in unknowns
            ),
            *(
                Claim(
                    f"By {score}, LoCoOp is better than CoOp against {known}",
                    higher(title(known), score, "LoCoOp", "CoOp"),
                )
                for score in ("MCM", "GL-MCM")
                for known in unknowns
            ),
            *(
                Claim(
                    f"{when}, NegLabel beats MCM against {what} that it was not given",
                    falls(negatives, name, f"{what}, NegLabel", f"{what}, MCM"),
                )
                for when, name in (("Zero-shot", "zero-shot"), ("After CaRot", "CaRot"))
                for what in (unnamed_in(bundled), bundled.far)
            ),
        ),
        notes={
            title(bundled.near): bundled.near_is,
            title(bundled.far): f"{bundled.far_is} Mahalanobis and k-NN learn the training features; L-MCM and "
            "GL-MCM look at the patches of one model with one head. "
            f"CoOp, LoCoOp and the adapters saw {SHOTS} images a class.",
            negatives: f"The negative labels are the names of half of the {bundled.near}. Images of these have been "
            "named, as the paper's words from WordNet may name unknowns too; images of the others, and "
            f"{bundled.far}, have not.",
        },
    )


SECTION = section(benchmark(DEFAULT_WORLD))
