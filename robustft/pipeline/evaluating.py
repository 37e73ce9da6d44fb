"""`evaluate`: runs, and a zero-shot model beside them, on data of one's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from robustft.machine import PROCESS_TIMEOUT
from robustft.pipeline import flags
from robustft.pipeline.arguments import ImageSets, spelled_out
from robustft.pipeline.several import by_all

if TYPE_CHECKING:
    from robustft.data.opening import Data
    from robustft.evaluation.results import Evaluation
    from robustft.predictors.base import Predictor


@spelled_out
@flags.checked
@by_all
def evaluate_runs(
    data: str | os.PathLike[str] | Data,
    runs: Sequence[str | os.PathLike[str]] = (),
    *,
    model: str | None = None,
    pretrained: str | os.PathLike[str] | None = None,
    templates: str | Sequence[str] = "photo",
    split: str | None = None,
    output: str | os.PathLike[str] | None = None,
    score: str = "mcm",
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    process_timeout: float = PROCESS_TIMEOUT,
    progress: bool = True,
    log: Callable[[str], None] = print,
    **where: Unpack[ImageSets],
) -> Evaluation:
    """Measures the models of runs on data: accuracy, calibration, and detection where there are OOD sets.

    Args:
        data: as for train. Its test set is measured, or all of it where it is one set, without the images that a run
            was trained or chosen on.
        runs: folders that robustft train wrote.
        model: a zero-shot model beside them, as for train.
        pretrained: its weights.
        templates: its captions: photo, simple (7), imagenet (80), or a file with one a line.
        split: which set of the data to measure, whole: test, validation or train.
        output: folder for a report with tables and pictures.
        score: OOD score of the tables.
        batch_size: images at a time.
        device: cpu, cuda, cuda:1, ...; auto takes the GPU if there is one.
        workers: processes that read images; by default one a core.
        cache: folder for what the models make of image files: a command that was killed goes on there, and images that
            are known are not read again. It also keeps zero-shot heads.
        process_timeout: seconds after which a process of several (torchrun) that does not answer ends the others.
        progress: say which set is being read.
        log: receives one line of text at a time.

    Classes are called what `class_names` says, by default what the first run was told. Images are read once for all
    models that see them in the same way. ValueError for sets whose classes a model does not know, and without any
    model; FileNotFoundError for runs that have not finished.
    """
    from robustft.data.opening import open_test
    from robustft.detection.by_name import SCORES
    from robustft.evaluation.measure import check_score, evaluate_predictions, groups_in, predict_sets
    from robustft.evaluation.report import write_report
    from robustft.ops.processes import current
    from robustft.pipeline.folder import samples_of
    from robustft.pipeline.job import suite_of
    from robustft.pipeline.kept import predict_kept
    from robustft.pipeline.opening import places
    from robustft.pipeline.seen import unseen
    from robustft.pipeline.training import transformed
    from robustft.predictors.base import predict_each

    flags.check_source(data)
    check_score(score)
    kept = tuple(dict.fromkeys(("logits", "labels", *SCORES[score].reads)))
    if not len(runs) and model is None:
        raise ValueError("there is nothing to measure: name runs, or a zero-shot model (--model, --pretrained)")
    named = {"class_names": _names_of(runs)} if where["class_names"] is None else {}
    found = open_test(data, split=split, **places(where) | named)
    log(found.describe())
    if split is None:
        found, left_out = unseen(found, data, run_names(runs))
        found = replace(found, understood=(*found.understood, *left_out))
        for line in left_out:
            log(line)
    if workers is not None:
        from robustft.pipeline.opening import read_by

        found = found.map(lambda part: read_by(part, workers))
    tell = (lambda done, total, what: log(f"{done}/{total}: {what}")) if progress else None
    suites: dict[str, Any] = {}
    for transform, predictors in _models(runs, model, pretrained, templates, found, device, cache, progress, log):
        shown = suite_of(found.map(partial(transformed, transform=transform)))
        predict = predict_each if cache is None else predict_kept(Path(cache), repr(transform))
        suites |= predict_sets(predictors, shown, batch_size=batch_size, parts=kept, progress=tell, predict=predict)
    details: dict[str, Any] = {} if output is None else {"details": True, "groups": suite_of(found).map(groups_in)}
    evaluation = evaluate_predictions(suites, score=score, **details)
    log("")
    log(evaluation.table())
    if output is not None:
        about = {"data": os.fspath(data) if isinstance(data, (str, os.PathLike)) else "data in memory"}
        write = partial(
            write_report,
            Path(output),
            evaluation=evaluation,
            samples=samples_of(suite_of(found)),
            config={**about, "runs": [os.fspath(run) for run in runs], "model": model, "pretrained": pretrained},
            title=f"robustft: {Path(output).name}",
            notes=found.understood,
        )
        log(f"\nreport: {current().of_main(write)}")
    return evaluation


def _models(
    runs: Sequence[str | os.PathLike[str]],
    model: str | None,
    pretrained: Any,
    templates: str | Sequence[str],
    data: Data,
    device: str,
    cache: Any,
    progress: bool,
    log: Callable[[str], None],
) -> list[tuple[Any, dict[str, Predictor]]]:
    """The predictors by name, together where their images are made in the same way, and how."""
    from robustft import clip
    from robustft.pipeline.job import to_device
    from robustft.pipeline.opening import check_pretrained, read_templates, spoken_names
    from robustft.pipeline.serving import load
    from robustft.predictors.zero_shot import zero_shot_classifier

    groups: dict[str, tuple[Any, dict[str, Predictor]]] = {}

    def add(name: str, transform: Any, predictor: Predictor) -> None:
        _, group = groups.setdefault(repr(transform), (transform, {}))
        group[name] = predictor

    if model is not None:
        check_pretrained(model, pretrained)
        bundle = clip.load(model, pretrained)
        to_device(bundle, device)
        zero_shot = zero_shot_classifier(
            bundle.model,
            tokenizer=bundle.tokenizer,
            class_names=spoken_names(data.classes, log),
            templates=read_templates(templates),
            cache=cache,
            progress=progress,
        )
        add("zero-shot", bundle.eval_transform, zero_shot)
    for name, run in run_names(runs).items():
        pipeline = load(run, device=device)
        add(name, pipeline.transform, pipeline.predictor)
    return list(groups.values())


def run_names(runs: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """Runs by the shortest ends of their paths that tell them apart."""
    paths = [Path(run).resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError("runs: one is named twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(path.parts[-depth:]): path for path in paths}


def _names_of(runs: Sequence[str | os.PathLike[str]]) -> Any:
    """The class names that the first run was told, which its data may need again."""
    from robustft.pipeline.opening import read_names
    from robustft.pipeline.seen import config_of_run

    for run in runs:
        if config := config_of_run(Path(run)):
            names = read_names(config.get("class_names"))
            return names if isinstance(names, Mapping) else None
    return None
