"""OOD detection after fine-tuning (arXiv 2306.06048): scores of every model, against near and far unknowns.

Where a benchmark has words for negative texts, detectors of this decade too: NegLabel, its texts by CSP, and AdaNeg on
mixed streams; near, far and full-spectrum, which counts images of the classes by other studios as known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from robustft import clip
from robustft.clip.outputs import Outputs, evaluating, outputs_of
from robustft.data.small_clip import words
from robustft.detection.by_name import SCORES, label
from robustft.detection.detector import Detector
from robustft.detection.metrics import Separation, SpectrumMetrics, ood_metrics, spectrum_metrics
from robustft.detection.negatives import conjugated_negatives, conjugated_phrases
from robustft.methods import Classifier, DualClassifier, Predictor, TipAdapter, WiSEFT, zero_shot_classifier
from robustft.pipeline.study import field
from robustft.pipeline.study.findings import Claim, Measured, Section, Table, falls, higher
from robustft.pipeline.study.recipes import HOSTS
from robustft.pipeline.study.world import World
from robustft.pipeline.worlds import Benchmark

SHOTS = 16
FEW_SHOT = ("CoOp", "LoCoOp", "CLIP-Adapter", "Tip-Adapter-F")
NEG_LABEL, CSP, ADA_NEG = "NegLabel", "CSP", "AdaNeg"
UNFITTED = ("mcm", "energy", "max_cosine")
SPECTRA = (*map(label, UNFITTED), "k-NN", NEG_LABEL, CSP, ADA_NEG)
NEAR, FAR, FULL_NEAR, FULL_FAR = "near", "far", "full near", "full far"


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
    predictors |= field.further(world)
    for name in FEW_SHOT:
        predictors[name] = world.few_shot(HOSTS[name], SHOTS).classifier()
    predictors["Tip-Adapter"] = TipAdapter(world.zero_shot).fit(world.shots(SHOTS), world.data.validation).classifier()
    tables: dict[str, dict[str, dict[str, float]]] = {title(known): {} for known in unknowns}
    for name, predictor in predictors.items():
        rows = separation(world, predictor)
        for known in unknowns:
            tables[title(known)][name] = {score: row[known] for score, row in rows.items()}
    tables[negatives_of(bundled)] = negatives
    if bundled.superclasses:
        found = {name: spectra(world, single(p)) for name, p in predictors.items() if isinstance(single(p), Classifier)}
        tables |= {spectrum(score): {name: rows[score] for name, rows in found.items()} for score in SPECTRA}
    return Measured(tables, {})


def single(predictor: Predictor) -> Predictor:
    """Of two heads the one of the classes' names: negative texts are compared with these."""
    return predictor.default if isinstance(predictor, DualClassifier) else predictor


def spectrum(score: str) -> str:
    """The name of a detector's table."""
    return f"near, far and full-spectrum: {score}"


def spectra(world: World, predictor: Predictor) -> dict[str, dict[str, float]]:
    """What each of `SPECTRA` separates on a classifier, in %."""
    assert isinstance(predictor, Classifier)
    bundled, suite = world.benchmark, world.suite(predictor)
    dictionary = words(world.bundle)
    phrases = conjugated_phrases(bundled.adjectives, bundled.superclasses)
    chosen = [
        conjugated_negatives(
            predictor.model,
            world.bundle.tokenizer,
            predictor.class_embeddings,
            conjugated,
            world.benchmark.templates,
            nouns=nouns,
        ).embeddings
        for nouns, conjugated in ((dictionary, ()), ((), phrases))
    ]
    nouns, pool = chosen[0], torch.cat(chosen)
    detectors = {
        **{label(score): Detector(score) for score in UNFITTED},
        "k-NN": Detector("knn").fit(world.training(predictor), validation=world.validation(predictor)),
        NEG_LABEL: Detector("neg_label", negative_embeddings=nouns),
        CSP: Detector("neg_label", negative_embeddings=pool),
    }
    memory = Detector("ada_neg", class_embeddings=predictor.class_embeddings, negative_embeddings=nouns)
    near, far = (bundled.near,), (bundled.far, *bundled.further)

    def apart(detector: Detector) -> SpectrumMetrics:
        scored = suite.map(detector.scores)
        unknown, farther = ({name: scored.ood[name] for name in names} for names in (near, far))
        return spectrum_metrics(scored.id, near=unknown, far=farther, shifts=scored.shifts)

    def together(names: Sequence[str], full: bool) -> Separation:
        known = [suite.id, *(suite.shifts.values() if full else ())]
        return Separation.of({name: ood_metrics(*mixed(memory, known, suite.ood[name], world.seed)) for name in names})

    streamed = SpectrumMetrics(together(near, False), together(far, False), together(near, True), together(far, True))
    found = {name: percent(apart(detector)) for name, detector in detectors.items()}
    return found | {ADA_NEG: percent(streamed)}


def percent(found: SpectrumMetrics) -> dict[str, float]:
    """AUROC and FPR95 in %, means over near and over far OOD sets."""
    columns: dict[str, float] = {}
    for what, part in zip((NEAR, FAR, FULL_NEAR, FULL_FAR), found, strict=True):
        if part is not None:
            columns |= {f"AUROC {what}": 100 * part.auroc, f"FPR {what}": 100 * part.fpr}
    return columns


def mixed(detector: Detector, known: Sequence[Outputs], unknown: Outputs, seed: int) -> tuple[Tensor, Tensor]:
    """Scores of known and of unknown images that come in one stream, shuffled, to a detector with an empty memory."""
    together = Outputs.cat([part.only("features", "cosines") for part in (*known, unknown)])
    count, others = len(together.features), len(unknown.features)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    scores = torch.empty(count, dtype=torch.float64)
    scores[order] = detector.scores(together.map(lambda part: part[order])).double()
    return scores[: count - others], scores[count - others :]


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
    local, rows = patches(world, predictor), {}
    for score, entry in SCORES.items():
        if entry.needs_options:
            continue
        detector = Detector(score)
        if "patch_cosines" in entry.reads:
            if local is None:
                continue
            scores = {key: detector.scores(p) for key, p in local.items()}
        else:
            detector.fit(training, validation=world.validation(predictor))
            scores = {key: detector.scores(p) for key, p in {"id": suite.id, **suite.ood}.items()}
        rows[label(score)] = {known: 100 * ood_metrics(scores["id"], scores[known]).auroc for known in suite.ood}
    return rows


def patches(world: World, predictor: Predictor) -> dict[str, Outputs] | None:
    """Outputs with patches, of the ID test set and of the OOD sets; None for what has not one model with one head."""
    if not isinstance(predictor, Classifier):
        return None
    sets = {"id": world.tests.id, **world.tests.ood}
    found = {}
    with torch.no_grad(), evaluating(predictor.model):
        for name, (images, _) in sets.items():
            parts = [clip.encode_images_and_patches(predictor.model, batch) for batch in images.split(256)]
            features, local = (torch.cat(column) for column in zip(*parts, strict=True))
            found[name] = outputs_of(features, predictor.class_embeddings, patch_features=local)
    return found


def spectrum_claims() -> list[Claim]:
    """Whether detectors with negative texts stay ahead after fine-tuning, and where shifted images count as known."""
    spectra = {NEAR: "near unknowns", FAR: "far unknowns"}
    spectra |= {FULL_NEAR: f"{spectra[NEAR]}, full-spectrum", FULL_FAR: f"{spectra[FAR]}, full-spectrum"}

    def beats(name: str, better: str, worse: str, column: str) -> Callable[[Mapping[str, Table]], float]:
        column = f"AUROC {column}"
        return lambda tables: tables[spectrum(better)][name][column] - tables[spectrum(worse)][name][column]

    return [
        *(
            Claim(f"{when}, {better} beats {worse} against {what}", beats(name, better, worse, column))
            for when, name in (("Zero-shot", "zero-shot"), ("After CaRot", "CaRot"))
            for better, worse in ((NEG_LABEL, "MCM"), (CSP, NEG_LABEL), (ADA_NEG, NEG_LABEL))
            for column, what in spectra.items()
        ),
        *(
            Claim(
                f"By {score}, {name} is better than zero-shot against {what}",
                higher(spectrum(score), f"AUROC {column}", name, "zero-shot"),
            )
            for score in (NEG_LABEL, ADA_NEG)
            for name in ("FT", "CaRot")
            for column, what in spectra.items()
            if column in (FULL_NEAR, FULL_FAR)
        ),
    ]


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
            *(spectrum_claims() if bundled.superclasses else ()),
        ),
        notes={
            title(bundled.near): bundled.near_is,
            title(bundled.far): f"{bundled.far_is} Mahalanobis and k-NN learn the training features; L-MCM and "
            "GL-MCM look at the patches of one model with one head. "
            f"CoOp, LoCoOp and the adapters saw {SHOTS} images a class.",
            negatives: f"The negative labels are the names of half of the {bundled.near}. Images of these have been "
            "named, as the paper's words from WordNet may name unknowns too; images of the others, and "
            f"{bundled.far}, have not.",
            spectrum("MCM"): f"Near: {bundled.near}. Far: {', '.join((bundled.far, *bundled.further))}; means over the "
            "sets. Full-spectrum: images of the shifts count as known. FPR: of unknown images where 95 % of the known "
            "are kept. Of DRM the head of the classes' names.",
            spectrum(NEG_LABEL): "Negative texts are the 15 % least like the classes of all words that the model was "
            "pre-trained with, as the paper takes WordNet's; some may name unknowns.",
            spectrum(
                CSP
            ): "NegLabel's texts, and of adjectives with words for whole categories the 15 % least like the classes.",
            spectrum(
                ADA_NEG
            ): "NegLabel's texts, and a memory of test images. Each OOD set comes in one shuffled stream "
            "with the known images, the memory emptied in between, as published.",
        },
    )
