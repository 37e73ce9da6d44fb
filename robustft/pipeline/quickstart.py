"""The main job on the bundled data: fine-tune a tiny CLIP in three ways, ensemble each, measure all, report.

    zero-shot ─┬─ FT, FLYP, CaRot             fine-tuned on handwritten digits
               ├─ WiSE-FT of each             weights mixed with the zero-shot ones
               └─ OSE of each                 probabilities mixed with the zero-shot ones
    every one on the ID test set, six shifts and two semantic-OOD sets

Whatever is chosen (mixing weights here, the recipes below by `python -m benchmarks.glyphworld --select`) is chosen on
the ID validation split. Everything written lies in one folder; a killed run resumes in it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustft import clip, methods
from robustft.clip.outputs import Outputs
from robustft.data import glyphworld
from robustft.data.pretrain import BATCH, PAIRS, Progress, pretrain
from robustft.data.sources import image_statistics
from robustft.ensembles.output_ensemble import mix
from robustft.evaluation.measure import accuracy, evaluate_predictions
from robustft.evaluation.results import Evaluation, Frontier, Suite
from robustft.files import move, write_text
from robustft.pipeline.recipes import QUICK_EPOCHS, RECIPES, Recipe
from robustft.training.loop import History, fit
from robustft.training.progress import SECONDS_BETWEEN_LINES
from robustft.training.run import configured, holds_run
from robustft.training.schedule import check_arguments

Tensors = tuple[Tensor, Tensor]


FRONTIER_ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Data:
    """Preprocessed splits: (images (N, 3, H, W), labels (N,)) each, and sample pictures of the test sets."""

    train: Tensors
    validation: Tensors
    test: Suite[Tensors]
    samples: dict[str, Any]

    @classmethod
    def load(cls, model: nn.Module, *, limit: int | None = None) -> Data:
        """GlyphWorld for a model's image statistics; `limit` keeps that many of each test set."""
        statistics = image_statistics(model)
        sets = {"ID": glyphworld.digits("test")}
        sets |= {name: glyphworld.shift(name) for name in glyphworld.SHIFTS}
        sets |= {name: glyphworld.ood(name) for name in glyphworld.OOD}

        def tensors(dataset: Any) -> Tensors:
            images, labels = dataset.tensors(*statistics)
            return images[:limit], labels[:limit]

        return cls(
            train=glyphworld.digits("train").tensors(*statistics),
            validation=glyphworld.digits("validation").tensors(*statistics),
            test=Suite(
                tensors(sets["ID"]),
                {name: tensors(sets[name]) for name in glyphworld.SHIFTS},
                {name: tensors(sets[name]) for name in glyphworld.OOD},
            ),
            samples={name: dataset.images[:12] for name, dataset in sets.items()},
        )

    def to(self, device: torch.device | str) -> Data:
        def move(pair: Tensors) -> Tensors:
            return pair[0].to(device), pair[1].to(device)

        test = Suite(
            move(self.test.id),
            {name: move(pair) for name, pair in self.test.shifts.items()},
            {name: move(pair) for name, pair in self.test.ood.items()},
        )
        return replace(self, train=move(self.train), validation=move(self.validation), test=test)


def make_method(recipe: Recipe, bundle: clip.Bundle, seed: int) -> methods.Method:
    """The recipe's method on a copy of the bundle's model."""
    return getattr(methods, recipe.method)(
        bundle.model,
        tokenizer=bundle.tokenizer,
        class_names=glyphworld.CLASS_NAMES,
        templates=glyphworld.TEMPLATES,
        seed=seed,
        **recipe.options,
    )


def train(recipe: Recipe, method: methods.Method, data: Data, seed: int, **options: Any) -> History:
    """Trains a method by its recipe; `options` go to `robustft.fit`."""
    return fit(
        method,
        data.train,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup,
        seed=seed,
        **options,
    )


def predict_suite(predictor: methods.Predictor, test: Suite[Tensors], *, ood: bool = True) -> Suite[Outputs]:
    """A predictor's outputs on the ID test set, the shifts and, if wanted, the semantic-OOD sets."""
    return (test if ood else replace(test, ood={})).map(predictor.predict)


def mix_suites(
    zero_shot: Suite[Outputs], fine_tuned: Suite[Outputs], alpha: float, temperatures: tuple[float, float]
) -> Suite[Outputs]:
    """What `OutputEnsemble.at(alpha)` predicts, from both members' outputs instead of two more passes."""
    return Suite(
        mix(zero_shot.id, fine_tuned.id, alpha, temperatures),
        {name: mix(p, fine_tuned.shifts[name], alpha, temperatures) for name, p in zero_shot.shifts.items()},
        {name: mix(p, fine_tuned.ood[name], alpha, temperatures) for name, p in zero_shot.ood.items()},
    )


def accuracies(suite: Suite[Outputs]) -> tuple[float, float]:
    """ID accuracy and mean accuracy over the shifts."""
    shifts = [accuracy(p) for p in suite.shifts.values()]
    return accuracy(suite.id), sum(shifts) / len(shifts)


@dataclass(frozen=True)
class Result:
    """What a quickstart leaves in memory: the measurements, the WiSE curves and the folder."""

    evaluation: Evaluation
    frontiers: tuple[Frontier, ...]
    report: Path


def quickstart(
    output: str | os.PathLike[str] = "runs/quickstart",
    *,
    seed: int = 0,
    method_names: Sequence[str] = tuple(RECIPES),
    quick: bool = False,
    device: str = "cpu",
    precision: str = "fp32",
    from_scratch: bool = False,
    pretrain_pairs: int | None = None,
    resume: bool = False,
    limit_batches: int | None = None,
    dry_run: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = print,
) -> Result | None:
    """Runs the main job and writes its report.

    Args:
        output: folder for everything; it must not hold another run, unless `resume`.
        seed: of the fine-tuning. The data and the bundled checkpoint do not depend on it.
        method_names: some of `RECIPES`.
        quick: fewer epochs and test images, less than half of the time.
        device, precision, limit_batches: as in `robustft.fit`.
        from_scratch: pre-train a model first instead of using the bundled one.
        pretrain_pairs: how many image-caption pairs that sees; None for as many as the bundled one saw.
        resume: continue the run in `output`.
        dry_run: one batch through every method, nothing written, None returned.
        progress: bars or lines during training.
        log: receives one line of text at a time.

    Raises: ValueError for unknown methods, FileExistsError for a folder that holds a run, BlockingIOError for one that
    another process works in, OSError for one that cannot be written, NonFiniteError from training.
    """
    unknown = [name for name in method_names if name not in RECIPES]
    if unknown or not method_names:
        raise ValueError(f"methods are {list(method_names)}; expected some of {', '.join(RECIPES)}")
    check_arguments(precision=precision, limit_batches=limit_batches)
    if pretrain_pairs is not None and (not from_scratch or pretrain_pairs < BATCH):
        raise ValueError(f"pretrain_pairs needs from_scratch and at least one batch of {BATCH}, got {pretrain_pairs}")
    started = time.monotonic()
    recipes = {name: RECIPES[name] for name in method_names}
    if quick:
        recipes = {name: replace(recipe, epochs=QUICK_EPOCHS) for name, recipe in recipes.items()}
    config = {
        "seed": seed,
        "quick": quick,
        "device": device,
        "precision": precision,
        "from_scratch": from_scratch,
        "pretrain_pairs": pretrain_pairs,
        "limit_batches": limit_batches,
        "methods": {name: asdict(recipe) for name, recipe in recipes.items()},
    }
    folder = Path(output)
    # A device that is not there, or data that cannot be read, must not claim the folder.
    bundle = glyphworld.load_clip()
    bundle.model.to(device)
    data = Data.load(bundle.model, limit=200 if quick else None).to(device)
    job = partial(_main_job, folder, recipes, config, bundle, data, progress=progress, log=log, started=started)
    if dry_run:
        return job(resume=False, dry_run=True)
    with configured(folder, config, resume):
        return job(resume=resume, dry_run=False)


def _main_job(
    folder: Path,
    recipes: Mapping[str, Recipe],
    config: Mapping[str, Any],
    bundle: clip.Bundle,
    data: Data,
    *,
    resume: bool,
    dry_run: bool,
    progress: bool,
    log: Callable[[str], None],
    started: float,
) -> Result | None:
    """The quickstart in a folder that is held for it; its configuration holds all that is not given."""
    seed, quick, precision, limit_batches = (config[key] for key in ("seed", "quick", "precision", "limit_batches"))
    if config["from_scratch"] and not dry_run:
        bundle = _pretrained(folder, seed, config["pretrain_pairs"] or PAIRS, log, progress)
        bundle.model.to(config["device"])
    log(
        f"GlyphWorld: {len(data.train[0])} training, {len(data.validation[0])} validation, "
        f"{len(data.test.id[0])} test digits; {len(data.test.shifts)} shifts, {len(data.test.ood)} OOD sets"
    )
    zero_shot = methods.zero_shot_classifier(
        bundle.model,
        tokenizer=bundle.tokenizer,
        class_names=glyphworld.CLASS_NAMES,
        templates=glyphworld.TEMPLATES,
    )
    classifiers: dict[str, Any] = {"zero-shot": zero_shot}
    records = []
    for name, recipe in recipes.items():
        method = make_method(recipe, bundle, seed)
        loop: dict[str, Any] = {
            "limit_batches": limit_batches,
            "precision": precision,
            "progress": progress,
            "dry_run": dry_run,
        }
        if not dry_run:
            loop |= {"output": folder / name, "resume": resume and holds_run(folder / name)}
        history = train(recipe, method, data, seed, **loop)
        log(f"{name}: {history.steps} steps, {history.seconds:.0f} s")
        records += [{"method": name, **record} for record in history.records]
        classifiers[name] = method.classifier()
    if dry_run:
        log("dry run: one batch went through every method; nothing was written")
        return None

    log("mixing with zero-shot (weights chosen on ID validation) and measuring")
    suites = {name: predict_suite(classifier, data.test) for name, classifier in classifiers.items()}
    frontiers, chosen = [], {}
    for name in recipes:
        wise = methods.WiSEFT(zero_shot, classifiers[name]).fit(data.validation)
        ose = methods.OutputEnsemble(zero_shot, classifiers[name], temperatures="fit").fit(data.validation)
        classifiers[f"WiSE {name}"] = wise.classifier()
        suites[f"WiSE {name}"] = predict_suite(classifiers[f"WiSE {name}"], data.test)
        suites[f"OSE {name}"] = mix_suites(suites["zero-shot"], suites[name], ose.alpha_, ose.temperatures_)
        chosen[name] = {"wise_alpha": wise.alpha_, "ose_alpha": ose.alpha_, "ose_temperatures": ose.temperatures_}
        frontiers.append(_wise_frontier(name, wise, suites, data, (0.0, 0.5, 1.0) if quick else FRONTIER_ALPHAS))
    evaluation = evaluate_predictions(suites)

    write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for name, classifier in classifiers.items():
        classifier.save(folder / "export" / name.lower().replace(" ", "-"), bundle.config)
    from robustft.evaluation.report import write_report

    report = write_report(
        folder,
        evaluation=evaluation,
        frontiers=frontiers,
        samples=data.samples,
        config={**config, "chosen on ID validation": chosen},
        title="robustft quickstart",
        highlight=["zero-shot", *recipes, *(f"WiSE {name}" for name in list(recipes)[-2:])],
        notes=(
            "A toy: a tiny CLIP pre-trained on synthetic glyphs, fine-tuned on 8x8 handwritten digits. It shows "
            "mechanisms, not the numbers of papers.",
        ),
    )
    log("")
    log(evaluation.table())
    log("")
    log(f"report: {report}   ({time.monotonic() - started:.0f} s)")
    return Result(evaluation, tuple(frontiers), report)


def _pretrained(folder: Path, seed: int, pairs: int, log: Callable[[str], None], progress: bool) -> clip.Bundle:
    # `pretrain` saves now and then to the file it is given: the finished one gets another name.
    unfinished, finished = folder / "pretraining.safetensors", folder / "pretrained.safetensors"
    if not finished.exists():
        log("pre-training on synthetic glyphs (resumes if interrupted)")
        told = time.monotonic()

        def tell(now: Progress) -> None:
            nonlocal told
            if time.monotonic() - told >= SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                log(
                    f"pre-training: {now.seen} of {now.pairs} pairs, {now.seen / now.seconds:.0f} a second, "
                    f"contrastive loss {now.contrastive:.2f}, class loss {now.classes:.3f}"
                )

        move(pretrain(unfinished, seed=seed, pairs=pairs, progress=tell if progress else None), finished)
    return glyphworld.load_clip(finished)


def _wise_frontier(
    name: str, wise: methods.WiSEFT, suites: dict[str, Suite[Outputs]], data: Data, alphas: Sequence[float]
) -> Frontier:
    """The WiSE curve on the test sets; its ends and the chosen point are already predicted."""
    known = {0.0: suites["zero-shot"], 1.0: suites[name], wise.alpha_: suites[f"WiSE {name}"]}
    points = sorted({*alphas, wise.alpha_})
    scores = [accuracies(known.get(a) or predict_suite(wise.at(a), data.test, ood=False)) for a in points]
    return Frontier(
        f"WiSE {name}", tuple(points), tuple(s[0] for s in scores), tuple(s[1] for s in scores), wise.alpha_
    )
