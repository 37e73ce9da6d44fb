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
from robustft.files import cut_to_lines, growing
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
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    out: TextIO | None = None,
    log: TextIO | None = None,
) -> int:
    """Writes what a run's model says of files, and to `log` what could not be read; how many could not.

    files: images, or folders of them. output: a file for the lines, in the place of `out`, which grows as they are
    made; it must not be there, unless `resume` goes on behind its last whole line. Memory: a few batches.
    """
    flags.check_word("form", form, Form)
    out, log = out or sys.stdout, log or sys.stderr
    if resume and (output is None or form == "table"):
        raise ValueError("resume needs an output file with CSV or JSON, whose lines tell what is done")
    names = list(_listed(files))
    if not names:
        raise ValueError(f"{', '.join(files[:3])}: no image files")
    done = _done(Path(output), form) if output is not None and resume else None
    if done:
        print(f"{output}: {len(done)} files are done", file=log)
        names = [name for name in names if name not in done]
    if output is not None and not resume and Path(output).exists():
        raise FileExistsError(f"{output} is there already: resume goes on in it, or choose another file")
    pipeline = load(run, device=device, batch_size=batch_size)
    if output is None:
        return _predict(pipeline, names, form, top, workers, out, log, header=True)
    with growing(Path(output)) as file:
        return _predict(pipeline, names, form, top, workers, file, log, header=done is None)


def _predict(
    pipeline: Pipeline,
    names: Sequence[str],
    form: Form,
    top: int,
    workers: int | None,
    out: TextIO,
    log: TextIO,
    header: bool,
) -> int:
    lines = {"table": _table, "csv": _csv, "json": _json}[form](pipeline, names, out, header)
    failed = 0
    for name, found in pipeline.stream(names, top=top, workers=workers):
        if isinstance(found, Unreadable):
            failed += 1
            print(found.error if name in found.error else f"{name}: {found.error}", file=log)
        lines(name, found)
    if failed:
        print(f"{failed} of {len(names)} files could not be read", file=log)
    return failed


def _done(path: Path, form: Form) -> set[str] | None:
    """The files that whole lines of an earlier output tell, behind which it is cut; None where it has no line."""
    if not path.is_file():
        return None
    whole = cut_to_lines(path, "predictions")
    try:
        if form == "json":
            return {str(json.loads(line)["file"]) for line in whole}
        rows = list(csv.reader(whole))
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: no {form} that predict wrote: {error!r:.100}") from error
    if rows and tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{path}: no csv that predict wrote: its first line is {','.join(rows[0])[:100]!r}")
    return {row[0] for row in rows[1:]} if rows else None


def _listed(files: Sequence[str]) -> Iterator[str]:
    for name in files:
        path = Path(name)
        if path.is_dir():
            yield from (os.fspath(file) for file in image_files(path))
        else:
            yield name


def _table(pipeline: Pipeline, names: Sequence[str], out: TextIO, header: bool) -> Any:
    wide = max(len("file"), *map(len, names))
    classes = max(len("label"), *(len(name) for name in pipeline.classes))
    if header:
        print(f"{'file':{wide}}  {'label':{classes}}  probability  ood_score  accepted", file=out)

    def line(name: str, found: Prediction | Unreadable) -> None:
        if isinstance(found, Prediction):
            told = f"{found.label:{classes}}  {found.probability:11.3f}  {found.ood_score:9.4f}  "
            print(f"{name:{wide}}  {told}{'yes' if found.accepted else 'no'}", file=out)

    return line


def _csv(pipeline: Pipeline, names: Sequence[str], out: TextIO, header: bool) -> Any:
    writer = csv.writer(out, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)

    def line(name: str, found: Prediction | Unreadable) -> None:
        if isinstance(found, Prediction):
            writer.writerow((name, *found[:4]))

    return line


def _json(pipeline: Pipeline, names: Sequence[str], out: TextIO, header: bool) -> Any:
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
