"""The study: every method on a bundled benchmark, and for each paper whether its findings appear there.

    seeds 0, 1, 2  ->  a section's tables and curves, results/<section>-<seed>.json  ->  verdicts  ->  study.{html,md}

`robustft study` runs it. A section is one module here: what it measures in one seed's `World`, and the claims that the
tables may or may not show; `SECTION` where these are the same for every benchmark, `section` where they are made for
one. What a killed run has finished is kept, down to single trainings.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from robustft.files import write_file, write_json, write_text
from robustft.machine import processor
from robustft.pipeline import flags
from robustft.pipeline.recipes import SEEDS, STUDY_WORLD
from robustft.pipeline.study import base_to_new, calibration, carot, cmp, compositions, detection, drm, field, vrf
from robustft.pipeline.study.findings import Measured, Section
from robustft.pipeline.study.page import Answer, markdown, page, summary
from robustft.pipeline.study.world import World
from robustft.pipeline.worlds import Benchmark, benchmark
from robustft.training.run import configured

SECTIONS: dict[str, Section | Callable[[Benchmark], Section]] = {
    "carot": carot.section,
    "field": field.SECTION,
    "vrf": vrf.SECTION,
    "drm": drm.section,
    "cmp": cmp.section,
    "base_to_new": base_to_new.SECTION,
    "calibration": calibration.SECTION,
    "detection": detection.section,
    "compositions": compositions.section,
}
"""Of every benchmark, or made for one."""


def section_of(name: str, world: str) -> Section:
    """A section as it is put for a benchmark."""
    found = SECTIONS[name]
    return found if isinstance(found, Section) else found(benchmark(world))


def sections_of(world: str) -> tuple[str, ...]:
    """The names of the sections that a benchmark has; ValueError for an unknown one."""
    concepts = benchmark(world).concepts
    return tuple(name for name in SECTIONS if concepts or name != base_to_new.SECTION.name)


@flags.checked
def study(
    output: str | os.PathLike[str] = "runs/study",
    *,
    world: str = STUDY_WORLD,
    seeds: Sequence[int] = SEEDS,
    sections: Sequence[str] = (),
    quick: bool = False,
    resume: bool = False,
    workers: int | None = None,
    log: Callable[[str], None] = print,
) -> list[Answer]:
    """Runs the sections on the seeds and writes study.html, study.md, results.json and figures/ into `output`.

    Args:
        output: folder for everything; it must not hold another study, unless `resume`.
        world: which bundled benchmark: icons (IconWorld) or digits (GlyphWorld).
        seeds: of the fine-tuning.
        sections: some of `sections_of(world)`; none for all.
        quick: fewer epochs and test images, for a look.
        resume: go on with the study in `output`, under the same configuration.
        workers: processes, each with a section of a seed at a time and its share of the cores; by default one a core.
            With one, everything runs in this process.
        log: receives one line of text at a time; lines of other processes are printed.

    Raises: ValueError for unknown worlds or sections, or no seed, FileExistsError for a folder that holds something
    else, BlockingIOError for one that another process works in, OSError for one that cannot be written.
    """
    known = sections_of(world)
    sections = sections or known
    if any(name not in known for name in sections):
        raise ValueError(f"sections are {list(sections)}; expected some of {', '.join(known)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; expected distinct ones, at least one")
    folder = Path(output)
    config = {"world": world, "quick": quick, "seeds": list(seeds), "sections": list(sections)}
    with configured(folder, config, resume):
        return _measure_all(folder, world, seeds, sections, quick, workers, log)


def _measure_all(
    folder: Path,
    world: str,
    seeds: Sequence[int],
    sections: Sequence[str],
    quick: bool,
    workers: int | None,
    log: Callable[[str], None],
) -> list[Answer]:
    """The study in a folder that is held for it."""
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    tasks = [(name, seed) for name in sections for seed in seeds if not _path(folder, name, seed).exists()]
    workers = workers or max(1, min(len(tasks), cores))
    if workers == 1:
        worlds = {seed: World(folder / f"seed-{seed}", seed, world=world, quick=quick, log=log) for seed in seeds}
        for name, seed in tasks:
            _measure(folder, name, worlds[seed])
    else:
        threads = max(1, cores // workers)
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
            waiting = [pool.submit(_measure_apart, folder, world, name, seed, quick) for name, seed in tasks]
            for task in as_completed(waiting):
                if task.exception():
                    pool.shutdown(cancel_futures=True)
                task.result()
    for seed in seeds:
        shutil.rmtree(folder / f"seed-{seed}", ignore_errors=True)
    answers = [Answer(section_of(name, world), [_measured(folder, name, seed) for seed in seeds]) for name in sections]
    _write(folder, answers, _command(world, quick, seeds, sections), world)
    log(summary(answers))
    log(f"\nstudy: {folder / 'study.html'}   ({time.monotonic() - started:.0f} s)")
    return answers


def _measure(folder: Path, name: str, world: World) -> None:
    """Measures a section in a seed's world; it is on disk as soon as it is done."""
    started, section = time.monotonic(), section_of(name, world.benchmark.name)
    measured = section.measure(world)
    write_json(_path(folder, name, world.seed), measured._asdict(), allow_nan=False)
    world.log(f"seed {world.seed}: {section.title} ({time.monotonic() - started:.0f} s)")


def _measure_apart(folder: Path, world: str, name: str, seed: int, quick: bool) -> None:
    _measure(folder, name, World(folder / f"seed-{seed}", seed, world=world, quick=quick))


def _path(folder: Path, name: str, seed: int) -> Path:
    return folder / "results" / f"{name}-{seed}.json"


def _measured(folder: Path, name: str, seed: int) -> Measured:
    return Measured(**json.loads(_path(folder, name, seed).read_text()))


def _write(folder: Path, answers: Sequence[Answer], command: str, world: str) -> None:
    machine = f"torch {torch.__version__}, {processor()}, {len(os.sched_getaffinity(0))} cores"
    text, images = page(answers, command, machine, benchmark(world))
    for name, png in images.items():
        write_file(folder / "figures" / f"{name}.png", png)
    numbers = {
        "command": command,
        "machine": machine,
        "world": world,
        "sections": {
            answer.section.name: {
                "seeds": [m._asdict() for m in answer.seeds],
                "claims": [
                    {"claim": f.claim.text, "verdict": f.verdict, "margins": f.margins} for f in answer.findings
                ],
            }
            for answer in answers
        },
    }
    write_json(folder / "results.json", numbers)
    write_text(folder / "study.md", markdown(answers, command, machine, benchmark(world)))
    write_text(folder / "study.html", text)


def _command(world: str, quick: bool, seeds: Sequence[int], sections: Sequence[str]) -> str:
    parts = ["robustft study"]
    parts += [f"--world {world}"] if world != STUDY_WORLD else []
    parts += ["--quick"] if quick else []
    parts += [f"--seeds {' '.join(map(str, seeds))}"] if tuple(seeds) != SEEDS else []
    parts += [f"--sections {' '.join(sections)}"] if tuple(sections) != sections_of(world) else []
    return " ".join(parts)
