"""The main job on bundled data: the pipeline with three methods, both ensembles of each, and every model kept.

    zero-shot ─┬─ FT, FLYP, CaRot             fine-tuned on handwritten digits, or on drawings of things
               ├─ WiSE-FT of each             weights mixed with the zero-shot ones
               └─ OSE of each                 probabilities mixed with the zero-shot ones
    every one on the ID test set, the shifts and the semantic-OOD sets

The recipes were chosen by `python -m benchmarks.glyphworld --select` on the ID validation split, and so is whatever is
chosen here. Everything written lies in one folder; a killed run resumes in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from robustft import clip
from robustft.clip import loading
from robustft.data.pretrain import BATCH, PAIRS, Progress, pretrain
from robustft.files import move
from robustft.pipeline import flags
from robustft.pipeline.job import FRONTIER_ALPHAS, Plan, Result, run
from robustft.pipeline.recipes import DEFAULT_WORLD, QUICK_EPOCHS, RECIPES
from robustft.pipeline.training import Materials
from robustft.pipeline.worlds import Benchmark, benchmark
from robustft.training.progress import SECONDS_BETWEEN_LINES
from robustft.training.run import configured
from robustft.training.schedule import check_arguments


@flags.checked
def quickstart(
    output: str | os.PathLike[str] = "runs/quickstart",
    *,
    world: str = DEFAULT_WORLD,
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
        world: which bundled benchmark: digits (GlyphWorld) or icons (IconWorld).
        seed: of the fine-tuning. The data and the bundled checkpoint do not depend on it.
        method_names: some of `RECIPES`.
        quick: fewer epochs and test images, less than half of the time.
        device, precision, limit_batches: as in `robustft.fit`.
        from_scratch: pre-train a model first instead of using the bundled one, of the digits alone: what the icons'
            model is pre-trained on is no part of the package.
        pretrain_pairs: how many image-caption pairs that sees; None for as many as the bundled one saw.
        resume: continue the run in `output`.
        dry_run: one batch through every method, nothing written, None returned.
        progress: bars or lines during training.
        log: receives one line of text at a time.

    Raises: ValueError for unknown methods and worlds, FileExistsError for a folder that holds a run, BlockingIOError
    for one that another process works in, OSError for one that cannot be written, NonFiniteError from training.
    """
    unknown = [name for name in method_names if name not in RECIPES]
    if unknown or not method_names:
        raise ValueError(f"methods are {list(method_names)}; expected some of {', '.join(RECIPES)}")
    check_arguments(precision=precision, limit_batches=limit_batches)
    if pretrain_pairs is not None and (not from_scratch or pretrain_pairs < BATCH):
        raise ValueError(f"pretrain_pairs needs from_scratch and at least one batch of {BATCH}, got {pretrain_pairs}")
    bundled = benchmark(world)
    if from_scratch and not bundled.pretrains:
        raise ValueError(f"from_scratch: {bundled.title}'s model is pre-trained by commands of its own, on its corpus")
    started = time.monotonic()
    recipes = {name: bundled.recipe(RECIPES[name]) for name in method_names}
    if quick:
        recipes = {name: replace(recipe, epochs=QUICK_EPOCHS) for name, recipe in recipes.items()}
    config = {
        "world": world,
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
    bundle = bundled.load_clip()
    loading.move(bundle.model, device)
    data = bundled.sets(200 if quick else None)
    plan = Plan(
        recipes,
        ensembles=("wise", "ose"),
        alphas=(0.0, 0.5, 1.0) if quick else FRONTIER_ALPHAS,
        loop={"limit_batches": limit_batches, "precision": precision},
        export_all=True,
        title="robustft quickstart",
        notes=(f"A toy: {bundled.toy}. It shows mechanisms, not the numbers of papers.",),
        highlight=("zero-shot", *recipes, *(f"WiSE {name}" for name in list(recipes)[-2:])),
    )

    def work(bundle: clip.Bundle, *, resume: bool, dry_run: bool) -> Result | None:
        log(
            f"{bundled.title}: {len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test "
            f"{bundled.shown}; {len(data.shifts)} shifts, {len(data.ood)} OOD sets"
        )
        materials = Materials.of(bundle, data, bundled.templates, seed=seed)
        job = partial(run, folder, plan, materials, config, progress=progress, log=log, started=started)
        return job(resume=resume, dry_run=dry_run)

    if dry_run:
        return work(bundle, resume=False, dry_run=True)
    with configured(folder, config, resume):
        if from_scratch:
            bundle = _pretrained(bundled, folder, seed, pretrain_pairs or PAIRS, log, progress)
            loading.move(bundle.model, device)
        return work(bundle, resume=resume, dry_run=False)


def _pretrained(
    bundled: Benchmark, folder: Path, seed: int, pairs: int, log: Callable[[str], None], progress: bool
) -> clip.Bundle:
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
    return bundled.load_clip(finished)
