"""A table of images: a .csv or .tsv file with a row for each, in the columns that people name so.

image      filepath, file_name, filename, image, image_path, img_filename, path; below the table's folder
caption    title, caption, text
label      label, class, class_name, category, y: a name, or a number
split      split, partition: train, val, test, shift:<name>, ood:<name>
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from robustft.data.classes import few
from robustft.data.paths import UNLABELLED, PathDataset
from robustft.files import read_text
from robustft.ops.kinds import checked

IMAGE = ("filepath", "file_name", "filename", "image", "image_path", "img_filename", "path")
CAPTION = ("title", "caption", "text")
LABEL = ("label", "class", "class_name", "category", "y")
SPLIT = ("split", "partition")


class Columns(NamedTuple):
    """Names of a table's columns; None for what is to be found by the usual names, "" for none."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    split: str | None = None
    groups: tuple[str, ...] = ()
    separator: str | None = None


class Table(NamedTuple):
    """All rows of a table as one data set, the split of each, and what was understood."""

    images: PathDataset
    splits: tuple[str, ...] | None
    understood: str


@checked
def read_table(path: Path, columns: Columns = Columns(), root: Path | None = None) -> Table:
    """The images of a table; paths in it are relative to `root`, the table's own folder by default.

    Labels that are whole numbers are the labels themselves, named by their number; other labels are names, sorted.
    Several group columns make one group of each combination. Raises ValueError, naming file, line and column.
    """
    header, rows = _rows(path, columns.separator)
    image = _column(path, header, columns.image, IMAGE, "image", required=True)
    caption = _column(path, header, columns.caption, CAPTION, "caption")
    label = _column(path, header, columns.label, LABEL, "label")
    split = _column(path, header, columns.split, SPLIT, "split")
    for name in columns.groups:
        _column(path, header, name, (), "group")
    if not caption and not label:
        raise ValueError(
            f"{path}: neither a label ({', '.join(LABEL)}) nor a caption ({', '.join(CAPTION)}) among its columns "
            f"{few(header)}; name it by its column"
        )
    root = path.parent if root is None else root
    values = [row[label] for row in rows] if label else []
    classes, labels = _labels(path, values) if label else ((), [UNLABELLED] * len(rows))
    groups, group_names = _groups(rows, columns.groups)
    images = PathDataset(
        tuple((root / row[image], number) for row, number in zip(rows, labels, strict=True)),
        classes,
        texts=tuple(row[caption] for row in rows) if caption else None,
        groups=groups,
        group_names=group_names,
    )
    told = {"image": image, "caption": caption, "label": label, "split": split, "group": " x ".join(columns.groups)}
    understood = f"{path}: a table of {len(rows)} images; " + ", ".join(f"{k} in {v!r}" for k, v in told.items() if v)
    return Table(images, tuple(row[split] for row in rows) if split else None, understood)


def write_table(images: Mapping[str, PathDataset], root: Path, content: Callable[[Path], str] | None = None) -> str:
    """A table with a split column, of data sets by the name of their split; paths relative to `root` where below it,
    else absolute. `content` of each file is a further column."""
    lines = []
    for split, dataset in images.items():
        for file, label in dataset.samples:
            path = Path(str(file))
            name = path.relative_to(root) if path.is_relative_to(root) else Path(os.path.abspath(path))
            row = (name.as_posix(), dataset.classes[label] if label != UNLABELLED else "", split)
            lines.append(row if content is None else (*row, content(path)))
    return csv_text(("filepath", "label", "split", *(() if content is None else ("content",))), lines)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as the text of a .csv file."""
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def _rows(path: Path, separator: str | None) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    text = read_text(path, "a table")
    if path.suffix.lower() == ".jsonl":
        return _json_rows(path, text)
    first = text.split("\n", 1)[0]
    if separator is None:  # open_clip writes tabs into files named .csv
        separator = "\t" if "\t" in first else ","
    try:
        lines = list(csv.reader(text.splitlines(), delimiter=separator, strict=True))
    except (csv.Error, TypeError) as error:
        raise ValueError(f"{path}: no table separated by {separator!r}: {error}") from error
    if len(lines) < 2:
        raise ValueError(f"{path}: {'empty' if not lines else 'a header without rows'}; expected a row for each image")
    header = tuple(name.strip() for name in lines[0])
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path}: several columns are named {repeated[0]!r}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        if len(line) != len(header):
            raise ValueError(f"{path}: line {number} has {len(line)} fields, the header {len(header)}")
        rows.append(dict(zip(header, line, strict=True)))
    return header, rows


def _json_rows(path: Path, text: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is {line[:60]!r}; expected an object")
        rows.append({str(key): str(value) for key, value in row.items()})
    if not rows:
        raise ValueError(f"{path}: empty; expected a line for each image")
    header = tuple(rows[0])
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in header if name not in row]:
            raise ValueError(f"{path}: line {number} has no {missing[0]!r}, as the first line has")
    return header, rows


def _column(
    path: Path, header: Sequence[str], named: str | None, usual: Sequence[str], what: str, required: bool = False
) -> str:
    if named:
        if named not in header:
            raise ValueError(f"{path}: no column {named!r} for the {what}; the columns are {few(header)}")
        return named
    found = [] if named == "" else [name for name in usual if name in header]
    if not found and required:
        raise ValueError(f"{path}: no column for the {what} ({', '.join(usual)}) among {few(header)}: name it")
    return found[0] if found else ""


def _labels(path: Path, values: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    if all(value.strip().isdecimal() for value in values):
        numbers = [int(value) for value in values]
        missing = sorted(set(range(min(max(numbers) + 1, len(values) + 1))) - set(numbers))
        if missing:
            raise ValueError(
                f"{path}: labels reach {max(numbers)}, but none is {missing[0]}: with names instead of numbers, or "
                "class names by label, classes may be missing"
            )
        return tuple(map(str, range(max(numbers) + 1))), numbers
    names = sorted({value for value in values if value})
    place = {name: index for index, name in enumerate(names)}
    return tuple(names), [place.get(value, UNLABELLED) for value in values]


def _groups(rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    if not names:
        return None, ()
    values = [" x ".join(row[name] for name in names) for row in rows]
    known = sorted(set(values))
    place = {value: index for index, value in enumerate(known)}
    return torch.tensor([place[value] for value in values]), tuple(known)
