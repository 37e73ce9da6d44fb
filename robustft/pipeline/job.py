"""The pipeline: methods are trained, mixed with zero-shot, calibrated, given a threshold, measured and reported.

    zero-shot ─┬─ each method                    trained on the training set
               ├─ WiSE-FT, OSE of each           mixed with zero-shot, the weight chosen on validation
               └─ one of them all                the best on validation: model/, with temperature and threshold
    every one on the test set, the shifts and the OOD sets, each of which is read once

Whatever is chosen is chosen on validation data. The folder holds all there is of a run:

    <folder>/config.yaml         what was asked for
             <method>/           metrics.jsonl, checkpoints/
             metrics.jsonl       the records of all methods
             report.html, metrics.json, figures/
             model/              what `robustft.load` reads
             predictions.csv     what it says about each image of the test sets
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from robustft import methods
from robustft.calibration.conformal import ConformalSets
from robustft.clip.loading import move
from robustft.clip.outputs import Outputs
from robustft.data.corruptions import stress
from robustft.data.images import ImageDataset
from robustft.data.opening import Data
from robustft.data.paths import PathDataset
from robustft.detection.by_name import SCORES, label
from robustft.detection.detector import Detector
from robustft.ensembles.tempering import Tempering
from robustft.evaluation.measure import accuracy, evaluate_predictions, groups_in, predict_sets
from robustft.evaluation.mistakes import worst_classes
from robustft.evaluation.report import write_report
from robustft.evaluation.results import Evaluation, Frontier, Suite
from robustft.files import write_text
from robustft.ops.processes import current
from robustft.pipeline.folder import MODEL_FOLDER, PREDICTIONS_FILE, Model, samples_of, save_model, write_predictions
from robustft.pipeline.recipes import Recipe
from robustft.pipeline.several import quiet
from robustft.pipeline.side_by_side import pays, train_apart
from robustft.pipeline.training import Materials, train_recipe
from robustft.predictors.base import Classifier, ModelPredictor, Predictor, predict_each
from robustft.predictors.logits import accuracy_and_nll, preference
from robustft.training.loop import History
from robustft.training.progress import to_stderr
from robustft.training.reporting import Record, Reporter, reporter

ZERO_SHOT = "zero-shot"
MODEL = "model"
"""The chosen one with its temperature, as a row of the tables."""
FRONTIER_ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Plan:
    """What a run does: which methods, how they are mixed, what is measured.

    recipes: by the names of the tables. ensembles: "wise" mixes weights, "ose" probabilities, and "auto" takes the
    first where the method leaves a `Classifier` to mix, the second where not. alphas: of the WiSE-FT curves in the
    report, () for none. score, tpr: of the detector. sets, coverage: rule and coverage of the conformal sets, "none"
    for none. details: measure classes, groups, risk and sets too, and the chosen model with its temperature as a row of
    its own. stress: corrupt the test images too. loop: further arguments of `robustft.fit`, validation: those of them
    that go with a validation set, None to train without. report_to: reporters of records. export_all: keep every model,
    not only the chosen one. Titles and notes are the report's.
    """

    recipes: Mapping[str, Recipe]
    ensembles: tuple[str, ...] = ("auto",)
    alphas: tuple[float, ...] = ()
    score: str = "mcm"
    tpr: float = 0.95
    sets: str = "none"
    coverage: float = 0.9
    details: bool = False
    stress: bool = False
    loop: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] | None = None
    report_to: tuple[str, ...] = ()
    export_all: bool = False
    title: str = "robustft"
    notes: tuple[str, ...] = ()
    highlight: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a run leaves in memory: the measurements, the WiSE curves, the report's path and the chosen model's name."""

    evaluation: Evaluation
    frontiers: tuple[Frontier, ...]
    report: Path
    chosen: str = ""


def run(
    folder: Path,
    plan: Plan,
    materials: Materials,
    config: Mapping[str, Any],
    *,
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = print,
    started: float | None = None,
) -> Result | None:
    """Does what `plan` says, in a folder that is held for it; None for a dry run, which writes nothing.

    config: what the report shows of how the run came about.
    """
    started = time.monotonic() if started is None else started
    processes = current()
    zero_shot = materials.zero_shot()
    predictors: dict[str, Predictor] = {ZERO_SHOT: zero_shot}
    records: dict[str, list[Record]] = {}
    apart = not dry_run and processes.count == 1 and pays(materials.bundle.model, len(plan.recipes))
    trained = partial(_trained, folder, _sharing_readers(plan) if apart else plan, materials, config)
    if apart:
        train_apart(
            {name: partial(trained, name, resume=resume, progress=progress) for name in plan.recipes}, to_stderr, log
        )
    for name in plan.recipes:
        method, history = trained(
            name,
            None,
            quiet if apart else log,
            resume=resume or apart,
            dry_run=dry_run,
            progress=progress and not apart,
            reports=processes.main and not apart,
        )
        records[name] = history.records
        predictors[name] = method.classifier()
    if dry_run:
        log("dry run: one batch went through every method; nothing was written")
        return None
    lines = [json.dumps({"method": name, **record}) for name, found in records.items() for record in found]
    processes.of_main(lambda: write_text(folder / "metrics.jsonl", "".join(line + "\n" for line in lines)))

    log("mixing with zero-shot (weights chosen on ID validation) and measuring")
    data = materials.data
    settings, curves = mix_all(plan, predictors, data.validation)
    chosen, model = choose(plan, predictors, data.validation, materials.plain, log)
    log(f"chosen on ID validation: {chosen}")
    settings["model"] = {"name": chosen, **model.settings()}

    tests, notes = suite_of(data), list(plan.notes)
    if data.test is None:
        notes.append("There is no test set: ID numbers are of the validation set, on which weights were chosen.")
    suites = predict_sets(predictors, tests)
    tests = _as_read(tests, suites[chosen])
    frontiers = [_frontier(name, curve, suites, tests, plan.alphas) for name, curve in curves.items() if plan.alphas]
    final = suites[chosen].map(model.cooled)
    extras: dict[str, Any] = {}
    if plan.details:
        suites[MODEL] = final
        notes.append(f"{MODEL} is {chosen} with its temperature, {model.temperature:.3f}: what the folder serves.")
        extras = {"details": True, "groups": tests.map(groups_in)}
        extras |= {} if model.conformal is None else {"conformal": {MODEL: model.conformal}}
    if SCORES[plan.score].learns:
        extras["detectors"] = {MODEL if plan.details else chosen: model.detector}
        notes.append(f"The {label(plan.score)} score learns from training images: only the chosen model's has done so.")
    evaluation = evaluate_predictions(suites, score=plan.score, **extras)
    stressed = _stressed(plan, predictors, model, tests) if plan.stress else None

    def write() -> Path:
        save_model(folder / MODEL_FOLDER, model, materials, evaluation, chosen, config)
        if plan.export_all:
            for name, predictor in predictors.items():
                if not isinstance(predictor, ModelPredictor):  # an ensemble is its members, which are kept
                    continue
                target = folder / "export" / name.lower().replace(" ", "-")
                predictor.save(target, materials.bundle.config, tokenizer=materials.bundle.tokenizer)
        write_predictions(folder / PREDICTIONS_FILE, tests, final, model)
        return write_report(
            folder,
            evaluation=evaluation,
            frontiers=frontiers,
            samples=samples_of(tests),
            config={**config, "chosen on ID validation": settings},
            title=plan.title,
            highlight=plan.highlight or None,
            notes=notes,
            training=records if plan.details else None,
            mistakes={MODEL: worst_classes(final.id, tests.id)} if plan.details else None,
            stress=stressed,
        )

    report = processes.of_main(write)
    log("")
    log(evaluation.table())
    log("")
    log(f"report: {report}   ({time.monotonic() - started:.0f} s)")
    return Result(evaluation, tuple(frontiers), report, chosen)


def _trained(
    folder: Path,
    plan: Plan,
    materials: Materials,
    config: Mapping[str, Any],
    name: str,
    tell: Callable[[str], None] | None,
    log: Callable[[str], None],
    *,
    resume: bool,
    progress: bool,
    dry_run: bool = False,
    reports: bool = True,
) -> tuple[methods.Method, History]:
    """A method of the plan, trained in its folder; `tell` receives how far it has come, None for a bar where there is a
    terminal, and `log` what was done."""
    with ExitStack() as held:
        reporters = [reporter(kind, folder / name, config) for kind in plan.report_to if reports and not dry_run]
        method, history = train_recipe(
            plan.recipes[name],
            materials,
            None if dry_run else folder / name,
            resume=resume,
            validation=plan.validation,
            dry_run=dry_run,
            progress=progress,
            log=tell,
            on_record=held.enter_context(_told(reporters)),
            **plan.loop,
        )
    best = "" if history.best is None else f", best after {history.best.step}: {history.best.value:.3f}"
    log(f"{name}: {history.steps} steps, {history.seconds:.0f} s{best}")
    return method, history


def _sharing_readers(plan: Plan) -> Plan:
    """The plan for trainings side by side, which have together the processes that read images."""
    if not (workers := plan.loop.get("workers")):
        return plan
    return replace(plan, loop={**plan.loop, "workers": max(1, workers // len(plan.recipes))})


def suite_of(data: Data) -> Suite[Any]:
    """The sets to measure on; without a test set, the validation set stands for it."""
    test = data.validation if data.test is None else data.test
    if test is None:
        raise ValueError("there is neither a test nor a validation set to measure on")
    return Suite(test, data.shifts, data.ood)


def _as_read(tests: Suite[Any], outputs: Suite[Outputs]) -> Suite[Any]:
    """The sets without the images that could not be read and were skipped, so that rows are outputs' rows again."""

    def kept(data: Any, found: Outputs) -> Any:
        left_out = {one.row for one in found.skipped}
        return data.subset([row for row in range(len(data)) if row not in left_out]) if left_out else data

    return Suite(
        kept(tests.id, outputs.id),
        {name: kept(data, outputs.shifts[name]) for name, data in tests.shifts.items()},
        {name: kept(data, outputs.ood[name]) for name, data in tests.ood.items()},
    )


def mix_all(
    plan: Plan, predictors: dict[str, Predictor], validation: Any
) -> tuple[dict[str, Any], dict[str, methods.WiSEFT]]:
    """Adds the ensembles of each method to `predictors`; what was chosen for them, and the WiSE-FT ones by name."""
    zero_shot = predictors[ZERO_SHOT]
    settings: dict[str, Any] = {}
    curves: dict[str, methods.WiSEFT] = {}
    for name in plan.recipes:
        fine_tuned = predictors[name]
        found: dict[str, Any] = {}
        kinds = set(plan.ensembles)
        mixes = isinstance(zero_shot, Classifier) and isinstance(fine_tuned, Classifier)
        if "auto" in kinds:
            kinds.add("wise" if mixes else "ose")
        if "wise" in kinds:
            if not (isinstance(zero_shot, Classifier) and isinstance(fine_tuned, Classifier)):
                raise ValueError(
                    f"{name} leaves a {type(fine_tuned).__name__}, which has no single head whose weights could be "
                    'mixed: use the ensemble "ose", or "auto"'
                )
            wise = methods.WiSEFT(zero_shot, fine_tuned).fit(validation)
            predictors[f"WiSE {name}"] = wise.classifier()
            curves[f"WiSE {name}"] = wise
            found["wise_alpha"] = wise.alpha_
        if "ose" in kinds:
            ose = methods.OutputEnsemble(zero_shot, fine_tuned, temperatures="fit").fit(validation)
            predictors[f"OSE {name}"] = ose.classifier()
            found |= {"ose_alpha": ose.alpha_, "ose_temperatures": ose.temperatures_}
        settings[name] = found
    return settings, curves


def choose(
    plan: Plan, predictors: Mapping[str, Predictor], validation: Any, train: Any, log: Callable[[str], None]
) -> tuple[str, Model]:
    """The predictor of highest accuracy on validation, of equals that of lower NLL, with temperature and threshold.

    train: the training images without augmentation, from which a score may learn."""
    outputs = dict(zip(predictors, predict_each(tuple(predictors.values()), validation), strict=True))
    scores = {name: accuracy_and_nll(found.logits, found.labels) for name, found in outputs.items()}
    name = min(scores, key=lambda key: preference(*scores[key]))
    tempering = Tempering(predictors[name])
    found = outputs[name]
    temperature = 1.0
    if accuracy(found) < 1.0:  # else NLL falls until the temperature is 0
        temperature = tempering.temperature_of(found)
    predictor = predictors[name] if temperature == 1.0 else tempering.at(temperature)
    cooled = found.replace(logits=found.logits / temperature)
    sets = None
    if plan.sets != "none":
        try:
            sets = ConformalSets(plan.sets, plan.coverage).fit(cooled)
        except ValueError as error:
            log(f"no sets of classes: {error}")
    detector = Detector(plan.score, tpr=plan.tpr)
    if SCORES[plan.score].learns:
        (learnt,) = predict_each((predictor,), train, parts=("logits", "labels", *detector.reads))
        return name, Model(predictor, detector.fit(learnt, validation=cooled), temperature, sets)
    return name, Model(predictor, detector.fit(cooled), temperature, sets)


def _stressed(plan: Plan, predictors: Mapping[str, Predictor], model: Model, tests: Suite[Any]) -> Evaluation | None:
    """Zero-shot, and the model that is served, on corrupted test images; None where the images are no files."""
    if not isinstance(tests.id, (PathDataset, ImageDataset)):
        return None
    sets = Suite(tests.id, stress(tests.id), {})
    found = {ZERO_SHOT: predictors[ZERO_SHOT], MODEL: model.predictor}
    return evaluate_predictions(predict_sets(found, sets, parts=("logits", "labels")), score=plan.score, detectors={})


@contextmanager
def _told(reporters: Sequence[Reporter]) -> Iterator[Callable[[Any], None] | None]:
    """Records go to all of these, which are closed at the end."""
    with ExitStack() as held:
        for one in reporters:
            held.callback(one.close)

        def tell(record: Any) -> None:
            for one in reporters:
                one(record)

        yield tell if reporters else None


def _frontier(
    name: str, wise: methods.WiSEFT, suites: Mapping[str, Suite[Outputs]], tests: Suite[Any], alphas: Sequence[float]
) -> Frontier:
    """The WiSE curve on the test sets; its ends and the chosen point are already predicted."""
    known = {0.0: suites[ZERO_SHOT], 1.0: suites[name.removeprefix("WiSE ")], wise.alpha_: suites[name]}
    points = sorted({*alphas, wise.alpha_})
    missing = [alpha for alpha in points if alpha not in known]
    along = dict(zip(map(str, missing), wise.along(missing), strict=True))
    between = predict_sets(along, replace(tests, ood={})) if along else {}
    known |= {alpha: between[str(alpha)] for alpha in missing}
    scores = [accuracies(known[alpha]) for alpha in points]
    return Frontier(name, tuple(points), tuple(s[0] for s in scores), tuple(s[1] for s in scores), wise.alpha_)


def accuracies(suite: Suite[Outputs]) -> tuple[float, float]:
    """ID accuracy and mean accuracy over the shifts; NaN without shifts."""
    shifts = [accuracy(outputs) for outputs in suite.shifts.values()]
    return accuracy(suite.id), sum(shifts) / len(shifts) if shifts else float("nan")


def training_workers(workers: int | None) -> int:
    """Processes that read training images: as many as are asked for, else one a core, at most 8."""
    return min(len(os.sched_getaffinity(0)), 8) if workers is None else workers


def to_device(bundle: Any, device: str) -> str:
    """Moves a bundle's model to a device, "auto" for the GPU if there is one, and says which it is."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    move(bundle.model, device)
    return device
