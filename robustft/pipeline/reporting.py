"""`report`: runs that were made at different times, on different sets, side by side on one page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from robustft.pipeline import flags


@flags.checked
def report_runs(
    runs: Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str],
    log: Callable[[str], None] = print,
) -> Path:
    """Writes one report of several runs from what their folders hold: no model is loaded, nothing is measured again.

    Args:
        output: folder to write.
        log: receives one line of text at a time.

    Models of one name get their run's where they differ; a set that a model did not see has a dash. ValueError for
    runs that were measured by other scores or bins, FileNotFoundError for those that have not finished.
    """
    from robustft.evaluation.report import write_report
    from robustft.evaluation.results import Evaluation, read_evaluation
    from robustft.pipeline.evaluating import run_names

    named = run_names(runs)
    for run in named.values():
        if not (run / "metrics.json").is_file():
            raise FileNotFoundError(f"{run}: holds no metrics.json; a run that has finished, or a report, does")
    evaluation = Evaluation.merge({name: read_evaluation(run / "metrics.json") for name, run in named.items()})
    training = {f"{name}: {method}": found for name, run in named.items() for method, found in _records(run).items()}
    path = write_report(
        Path(output),
        evaluation=evaluation,
        config={"runs": [os.fspath(run) for run in named.values()]},
        title=f"robustft: {', '.join(named)}",
        training=training or None,
    )
    log(evaluation.table())
    log(f"\nreport: {path}")
    return path


def _records(run: Path) -> dict[str, list[Any]]:
    """The records of a run's methods, from its metrics.jsonl, if it has one."""
    path = run / "metrics.jsonl"
    found: dict[str, list[Any]] = {}
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                found.setdefault(str(record.pop("method")), []).append(record)
            except (ValueError, LookupError, AttributeError) as error:
                raise ValueError(f"{path}: line {number} is no record: {error!r:.100}") from error
    return found
