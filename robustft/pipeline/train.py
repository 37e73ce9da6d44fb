"""`train`: from data that lie somewhere to a run folder. It is what `robustft train` does, with the same options.

Nothing heavy is loaded before it is called: the command line reads the signature and its description.
"""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import Unpack

from robustft.machine import PROCESS_TIMEOUT, CompileMode, Decay, Loss, Precision, Towers, Tune
from robustft.pipeline import flags
from robustft.pipeline.arguments import TrainingSets, spelled_out
from robustft.pipeline.recipes import LORA_LR, NEEDS, OWN, Recipe, recipe_named
from robustft.pipeline.several import by_all

if TYPE_CHECKING:
    from robustft.data.opening import Data
    from robustft.evaluation.results import Evaluation
    from robustft.pipeline.serving import Pipeline

Ensemble = Literal["auto", "wise", "ose", "both", "none"]
OnBadImage = Literal["raise", "skip"]
Keep = Literal["best", "last"]
Sets = Literal["thr", "aps", "raps", "none"]


@dataclass(frozen=True)
class Run:
    """A run folder: where it lies, what was measured, which model was chosen; `load()` gives it ready for images."""

    folder: Path
    evaluation: Evaluation
    chosen: str

    @property
    def report(self) -> Path:
        """The page with tables and pictures."""
        return self.folder / "report.html"

    def load(self, **options: Any) -> Pipeline:
        """`robustft.load` of this run."""
        from robustft.pipeline.serving import load

        return load(self.folder, **options)


@spelled_out
@flags.checked
@by_all
def train(
    data: str | os.PathLike[str] | Data,
    *,
    output: str | os.PathLike[str],
    model: str = "ViT-B-16-quickgelu",
    pretrained: str | os.PathLike[str] | None = None,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] | str = ("CaRot",),
    loss: Loss = "auto",
    validation: str | None = None,
    test: str | None = None,
    templates: str | Sequence[str] = "photo",
    descriptions: str | None = None,
    tune: Tune | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    lora_targets: Sequence[str] = (),
    lora_towers: Towers | None = None,
    shots: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    lr: float | None = None,
    wd: float | None = None,
    warmup_fraction: float | None = None,
    schedule: Decay = "cosine",
    precision: Precision = "fp32",
    grad_checkpointing: bool = False,
    compile: bool = False,
    compile_mode: CompileMode | None = None,
    validate_every: float = 1.0,
    metric: str = "accuracy",
    patience: int | None = None,
    keep: Keep = "best",
    report_to: Sequence[str] = (),
    limit_batches: int | None = None,
    ensemble: Ensemble = "auto",
    score: str = "mcm",
    tpr: float = 0.95,
    sets: Sets = "aps",
    coverage: float = 0.9,
    stress: bool = False,
    seed: int = 0,
    device: str = "auto",
    workers: int | None = None,
    process_timeout: float = PROCESS_TIMEOUT,
    on_bad_image: OnBadImage = "raise",
    cache: str | os.PathLike[str] | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = print,
    **where: Unpack[TrainingSets],
) -> Run | None:
    """Fine-tunes a model on your images, chooses on validation data, measures, and leaves a folder that serves.

    Args:
        data: a folder, a table (.csv, .tsv, .jsonl), a split (.json), shards (.tar): see docs/own_data.md.
        output: folder for everything; it must not hold another run, unless it is resumed.
        model: an architecture that open_clip knows, hf-hub:ORG/REPO or local-dir:FOLDER.
        pretrained: a tag of the architecture, or a file of weights.
        methods: how to fine-tune; several are compared. robustft train --list-methods names them, and module:Class is
            one of your own.
        loss: that FLYP, CaRot and DRM train both towers by: softmax (CLIP), sigmoid (SigLIP); auto takes the one that
            the model was made for.
        validation: labelled data to choose on, if DATA has none; else a part of the training images is held out.
        test: labelled data to measure on, if DATA has none.
        templates: of captions: photo, simple (7), imagenet (80), or a file with one a line.
        descriptions: JSON file {class: [descriptions]}; turns on DRM.
        tune: which parameters of the model are trained, where not what the method trains by itself.
        lora_rank: rank of the adapters of --tune lora; see docs/lora.md for all of these.
        lora_alpha: of the adapters: their update is multiplied by alpha / rank.
        lora_dropout: share of the adapters' inputs that training leaves out.
        lora_targets: layers that get adapters, by the ends of their names or patterns; by default all linear maps.
        lora_towers: which towers get adapters.
        shots: train on so many images of each class.
        epochs: over the training images.
        batch_size: images a step; contrastive methods like it large.
        accumulate: parts of a batch that go through the towers one after the other, in the memory of one: the same
            step in more time.
        lr: highest learning rate.
        wd: weight decay.
        warmup_fraction: share of all steps over which the rate rises.
        schedule: of the rate after its rise: cosine, linear, constant.
        precision: of the training.
        grad_checkpointing: compute activations again in the backward: less memory, more time.
        compile: compile the towers by torch.compile, which takes minutes at the start.
        compile_mode: of torch.compile, which this turns on; reduce-overhead records CUDA graphs.
        validate_every: epochs, or parts of one, between measurements on validation data; 0 for none.
        metric: what is best on validation data: accuracy, ece, nll, worst_group.
        patience: stop after so many validations without a better value.
        keep: weights to go on with: best on validation data, or last.
        report_to: where records go too: tensorboard, wandb, mlflow, trackio, jsonl.
        limit_batches: at most so many batches an epoch.
        ensemble: mix with zero-shot: wise (weights), ose (probabilities), both, none; auto takes what a method allows.
        score: OOD score of the detector; one that learns (knn, mahalanobis) does from the training images.
            robustft.detection.table() tells them all.
        tpr: share of in-distribution images that the threshold keeps.
        sets: sets of classes that hold the true one with a guarantee (conformal): thr, aps, raps, none.
        coverage: how often a set is to hold the true class.
        stress: measure on corrupted test images too, for want of shifted data.
        seed: of everything random.
        device: cpu, cuda, cuda:1, ...; auto takes the GPU if there is one.
        workers: processes that read images; by default one a core.
        process_timeout: seconds after which a process of several (torchrun) that does not answer ends the others.
        on_bad_image: raise stops at an image that cannot be read; skip goes on without it, and counts.
        cache: folder that keeps zero-shot heads, and the image features of methods with a frozen tower, for other runs.
        resume: continue the run that the output folder holds.
        dry_run: one batch through every method, write nothing.
        progress: show bars or lines during training.
        log: receives one line of text at a time.

    Files of classes that are no words (n01440764) want `class_names`. The epochs, rates and so on that are not given
    are each method's own (`robustft.pipeline.recipes.OWN`); in a configuration file `methods` may be
    {name: {method, lr, epochs, batch_size, weight_decay, warmup, options}} instead of names.

    Raises: ValueError for data, names or options that do not fit together, FileNotFoundError for missing files,
    FileExistsError for a folder that holds a run, BlockingIOError for one that another process works in,
    NonFiniteError from training. Nothing is written before all of it is known to fit.
    """
    arguments = {**locals(), **where}
    del arguments["where"]
    from robustft.calibration.conformal import ConformalSets
    from robustft.detection.detector import Detector
    from robustft.evaluation.measure import check_score
    from robustft.ops.processes import current
    from robustft.pipeline import job, opening
    from robustft.pipeline.seen import SPLIT_FILE, keep_split
    from robustft.training.compiling import check_compiler
    from robustft.training.reporting import REPORTERS
    from robustft.training.run import configured
    from robustft.training.schedule import check_arguments

    started = time.monotonic()
    recipes = _recipes(arguments)
    flags.check_source(data)
    for name, kind in (("ensemble", Ensemble), ("keep", Keep), ("sets", Sets), ("on_bad_image", OnBadImage)):
        flags.check_word(name, arguments[name], kind)
    check_arguments(schedule=schedule, precision=precision, accumulate=accumulate)
    for name, recipe in recipes.items():
        if accumulate > recipe.batch_size:
            raise ValueError(f"accumulate must be at most batch_size, {recipe.batch_size} of {name}, got {accumulate}")
    if sets != "none":
        ConformalSets(sets, coverage)
    if unknown := [kind for kind in report_to if kind not in REPORTERS]:
        raise ValueError(f"report_to holds {unknown}; expected some of {', '.join(REPORTERS)}")
    check_score(score, fitted=True)
    Detector(score, tpr=tpr)
    opened = opening.open_materials(arguments, log)
    opening.check_needs(recipes, opened)
    if compiled := compile_mode or compile:
        check_compiler(compile_mode or "default", next(opened.bundle.model.parameters()).device)
    config = opening.config_of(arguments) | {"methods": {name: asdict(recipe) for name, recipe in recipes.items()}}
    validation_loop = {
        "metric": metric,
        "validate_every": validate_every,
        "patience": patience,
        "restore_best": keep == "best",
    }
    ensembles: dict[str, tuple[str, ...]] = {"both": ("wise", "ose"), "none": ()}
    plan = job.Plan(
        recipes,
        ensembles=ensembles.get(ensemble, (ensemble,)),
        alphas=job.FRONTIER_ALPHAS if opened.data.shifts else (),
        score=score,
        tpr=tpr,
        sets=sets,
        coverage=coverage,
        details=True,
        stress=stress,
        loop={
            "schedule": schedule,
            "precision": precision,
            "grad_checkpointing": grad_checkpointing,
            "compile": compiled,
            "limit_batches": limit_batches,
            "accumulate": accumulate,
            "workers": job.training_workers(workers),
            "process_timeout": process_timeout,
        },
        validation=validation_loop if validate_every else None,
        report_to=tuple(report_to),
        title=f"robustft: {Path(output).name}",
        notes=opened.data.understood,
    )
    folder = Path(output)
    work = partial(job.run, folder, plan, opened, config, progress=progress, log=log, started=started)
    if dry_run:
        work(dry_run=True)
        return None
    processes = current()
    with ExitStack() as held:
        processes.of_main(lambda: held.enter_context(configured(folder, config, resume)))
        processes.of_main(lambda: keep_split(folder / SPLIT_FILE, opened.data))
        result = work(resume=resume)
    if result is None:
        raise AssertionError("only a dry run has no result")
    return Run(folder, result.evaluation, result.chosen)


def _recipes(arguments: Mapping[str, Any]) -> dict[str, Recipe]:
    """The recipes that are asked for, by name, with the changes that are."""
    asked = arguments["methods"]
    names = {"weight_decay": "wd", "warmup": "warmup_fraction"}
    fields = ("epochs", "batch_size", "lr", "weight_decay", "warmup")
    changes = {f: arguments[names.get(f, f)] for f in fields if arguments[names.get(f, f)] is not None}
    check = {**changes, "precision": arguments["precision"], "limit_batches": arguments["limit_batches"]}
    if (wd := arguments["wd"]) is not None and not 0.0 <= wd < math.inf:
        raise ValueError(f"wd must be finite and not negative, got {wd}")
    if (share := arguments["warmup_fraction"]) is not None and not 0.0 <= share < 1.0:
        raise ValueError(f"warmup_fraction is a share of all steps and must lie in [0, 1), got {share}")
    for name in ("epochs", "batch_size", "limit_batches"):
        if check.get(name) is not None and check[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {check[name]}")
    if isinstance(asked, str):
        asked = (asked,)
    recipes: dict[str, Recipe] = {}
    if isinstance(asked, Mapping):
        for name, given in asked.items():
            base = recipe_named(str(given.get("method", name)))[1] if "lr" not in given else None
            try:
                recipe = Recipe(**given) if base is None else replace(base, **given)
            except TypeError as error:
                raise ValueError(f"methods: {name}: {error}") from error
            recipes[str(name)] = _tuned(replace(recipe, **changes), arguments, {*given, *changes})
    else:
        recipes = {
            key: _tuned(replace(recipe, **changes), arguments, changes) for key, recipe in map(recipe_named, asked)
        }
    if arguments["descriptions"] is not None and not any(recipe.method == "DRM" for recipe in recipes.values()):
        key, recipe = recipe_named("DRM")
        recipes[key] = _tuned(replace(recipe, **changes), arguments, changes)
    if not recipes:
        raise ValueError("methods is empty: expected at least one")
    return recipes if arguments["loss"] == "auto" else _by_loss(recipes, arguments["loss"])


def _by_loss(recipes: dict[str, Recipe], loss: str) -> dict[str, Recipe]:
    """The recipes, with a loss for the methods that take one."""
    from robustft.pipeline.training import method_class

    flags.check_word("loss", loss, Loss)
    takes = {name for name, recipe in recipes.items() if "loss" in inspect.signature(method_class(recipe)).parameters}
    if not takes:
        raise ValueError(f"loss is {loss!r}, but {', '.join(recipes)} train no captions: leave it out")
    return {
        name: replace(recipe, options={"loss": loss, **recipe.options}) if name in takes else recipe
        for name, recipe in recipes.items()
    }


def _tuned(recipe: Recipe, arguments: Mapping[str, Any], given: Iterable[str]) -> Recipe:
    """A recipe of which what is asked for is trained; adapters at a rate of their own, where none is given."""
    names = [name for name in arguments if name.startswith("lora_")]
    lora = {name.removeprefix("lora_"): value for name in names if (value := arguments[name]) is not None}
    if not len(lora["targets"]):  # a list where the run was saved
        del lora["targets"]
    tune = arguments["tune"]
    options = ({} if tune is None else {"tune": tune}) | ({"lora": lora} if lora else {})
    lr = LORA_LR if tune == "lora" and "lr" not in given else recipe.lr
    return replace(recipe, lr=lr, options=recipe.options | options)


def methods_table() -> str:
    """What each method is for, what it needs, and how it is trained unless told otherwise."""
    from robustft import methods

    lines = []
    for name, recipe in OWN.items():
        summary = getattr(methods, recipe.options.get("risk", {}).get("risk", recipe.method)).__doc__ or ""
        lines.append(f"{name}: {summary.strip().partition(chr(10))[0]}")
        if name in NEEDS:
            lines.append(f"    needs {NEEDS[name]}")
        lines.append(f"    lr {recipe.lr:g}, {recipe.epochs} epochs, batches of {recipe.batch_size}")
    return "\n".join(lines)
