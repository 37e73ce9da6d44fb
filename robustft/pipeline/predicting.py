"""`predict` as a command: a line for each image, as it is read."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from robustft.data.folder import image_files
from robustft.pipeline import flags
from robustft.pipeline.serving import Pipeline, Prediction, Unreadable, load

Form = Literal["table", "csv", "json"]
COLUMNS = ("file", "label", "probability", "ood_score", "accepted")


@flags.checked
def predict_files(
    run: str,
    files: Sequence[str],
    *,
    form: Form = "table",
    top: int = 5,
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    out: TextIO | None = None,
    log: TextIO | None = None,
) -> int:
    """Writes to `out` what a run's model says of files, and to `log` what could not be read; how many could not.

    files: images, or folders of them. Memory: a few batches.
    """
    flags.check_word("form", form, Form)
    out, log = out or sys.stdout, log or sys.stderr
    pipeline = load(run, device=device, batch_size=batch_size)
    names = list(_listed(files))
    if not names:
        raise ValueError(f"{', '.join(files[:3])}: no image files")
    lines = {"table": _table, "csv": _csv, "json": _json}[form](pipeline, names, out)
    failed = 0
    for name, found in pipeline.stream(names, top=top, workers=workers):
        if isinstance(found, Unreadable):
            failed += 1
            print(found.error if name in found.error else f"{name}: {found.error}", file=log)
        lines(name, found)
    if failed:
        print(f"{failed} of {len(names)} files could not be read", file=log)
    return failed


def _listed(files: Sequence[str]) -> Iterator[str]:
    for name in files:
        path = Path(name)
        if path.is_dir():
            yield from (os.fspath(file) for file in image_files(path))
        else:
            yield name


def _table(pipeline: Pipeline, names: Sequence[str], out: TextIO) -> Any:
    wide = max(len("file"), *(len(name) for name in names))
    classes = max(len("label"), *(len(name) for name in pipeline.classes))
    print(f"{'file':{wide}}  {'label':{classes}}  probability  ood_score  accepted", file=out)

    def line(name: str, found: Prediction | Unreadable) -> None:
        if isinstance(found, Prediction):
            told = f"{found.label:{classes}}  {found.probability:11.3f}  {found.ood_score:9.4f}  "
            print(f"{name:{wide}}  {told}{'yes' if found.accepted else 'no'}", file=out)

    return line


def _csv(pipeline: Pipeline, names: Sequence[str], out: TextIO) -> Any:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)

    def line(name: str, found: Prediction | Unreadable) -> None:
        if isinstance(found, Prediction):
            writer.writerow((name, *found[:4]))

    return line


def _json(pipeline: Pipeline, names: Sequence[str], out: TextIO) -> Any:
    def line(name: str, found: Prediction | Unreadable) -> None:
        told: dict[str, Any] = {"file": name}
        if isinstance(found, Unreadable):
            told["error"] = found.error
        else:
            told |= dict(zip(COLUMNS[1:], found[:4], strict=True))
            told["top"] = [[label, share] for label, share in found.top]
            told["classes"] = list(found.classes)
        print(json.dumps(told), file=out, flush=True)

    return line
