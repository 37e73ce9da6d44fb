"""Which image a run has used for what, and so which images are no test of it.

split.csv    filepath, label, split, content: an image of the run in a line, found again by where it lies below any
             folder and by what it holds; itself a source of data
"""

from __future__ import annotations

import csv
import os
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustft.data.opening import Data
from robustft.data.opening import open as open_data
from robustft.data.paths import Member, PathDataset
from robustft.files import read_text, write_text
from robustft.pipeline.folder import MODEL_FOLDER
from robustft.training.run import CONFIG_FILE

SPLIT_FILE = "split.csv"
USED = ("train", "validation")  # sets that a run was trained and chosen on
HEAD = 1 << 16  # bytes of a file that tell it, together with how many it has
COLUMNS = ("filepath", "split", "content")


def keep_split(path: Path, data: Data) -> None:
    """Writes split.csv, which image is in which set; ValueError where a run is resumed on other images."""
    parts = [part for part in data.sets().values() if isinstance(part, PathDataset)]
    if any(isinstance(file, Member) for part in parts for file, _ in part.samples[:1]) or not parts:
        return
    text = data.split_table(content)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path}: the data are not those of the run that is resumed: images were added or taken away")
    write_text(path, text)


def content(file: Path) -> str:
    """What tells a file from others of its name: its size and a checksum of its beginning; "" where it is missing."""
    try:
        with file.open("rb") as opened:
            head = opened.read(HEAD)
            return f"{os.fstat(opened.fileno()).st_size}-{zlib.crc32(head):08x}"
    except OSError:
        return ""


def unseen(data: Data, source: str | os.PathLike[str] | Data, runs: Mapping[str, Path]) -> tuple[Data, list[str]]:
    """The data's test set and shifts without the images that one of the runs was trained or chosen on, and what to say.

    ValueError where no image is left, and for a run on the very data that it was trained on where these have no test
    set and the run no list of its images, as one that was trained on shards.
    """
    known: dict[str, set[str]] = {}
    for name, folder in runs.items():
        run = folder.parent if folder.name == MODEL_FOLDER else folder
        if (run / SPLIT_FILE).is_file():
            for path, held in _used(run / SPLIT_FILE):
                known.setdefault(path, set()).add(held)
        elif not isinstance(source, Data) and config_of_run(run).get("data") == os.path.abspath(source):
            if open_data(source, near_duplicates=False).test is not None:
                continue
            raise ValueError(
                f"{source}: {name} was trained on these data, and has no list of which images it used: name a set that "
                "was held out, or say which set to measure on by split="
            )
    told: list[str] = []
    named = " or ".join(runs)

    def left(part: Any, what: str) -> Any:
        if not known or not isinstance(part, PathDataset):
            return part
        kept = [row for row, (file, _) in enumerate(part.samples) if not _is_used(file, known)]
        if not kept:
            raise ValueError(
                f"{source}: {named} was trained or chosen on every image of the {what}: name other data, or measure on "
                "these all the same by split="
            )
        if len(kept) == len(part):
            return part
        told.append(
            f"{what}: {len(part) - len(kept):,} of {len(part):,} images are left out, because {named} was trained or "
            f"chosen on them ({SPLIT_FILE}); {len(kept):,} are measured"
        )
        return part.subset(kept)

    shifts = {name: left(part, f"shift {name}") for name, part in data.shifts.items()}
    return replace(data, test=left(data.test, "test set"), shifts=shifts), told


def config_of_run(run: Path) -> dict[str, Any]:
    """What config.yaml of a run's folder holds; {} where there is none, as in a model's folder."""
    import yaml

    path = run / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that is none
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _used(path: Path) -> list[tuple[str, str]]:
    """Path and content of the images that a run was trained and chosen on."""
    rows = list(csv.DictReader(read_text(path, "a table of a run's images").splitlines()))
    if missing := [name for name in COLUMNS if rows and rows[0].get(name) is None]:
        raise ValueError(f"{path}: damaged, or not written by robustft train: it has no column {missing[0]!r}")
    return [(row["filepath"], row["content"]) for row in rows if row["split"] in USED]


def _is_used(file: Path | Member, known: Mapping[str, set[str]]) -> bool:
    """Whether the file is a run's: a path of the run is the end of its path, and the content is the same."""
    if isinstance(file, Member):
        return False
    whole = os.path.abspath(file)
    parts = Path(whole).parts[1:]
    ends = (whole, *("/".join(parts[start:]) for start in range(len(parts))))
    held = [known[end] for end in ends if end in known]
    return bool(held) and content(file) in set().union(*held)
