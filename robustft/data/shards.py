"""webdataset's shards: tar archives whose members of one key are one sample, `000.jpg` with `000.cls` or `000.txt`.

The archives are indexed once, by where each image begins; an image is then read from its place, in any order, so that
an epoch, a subset and a resume are what they are for files. Only local, uncompressed archives.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

from robustft.data.classes import few
from robustft.data.folder import SUFFIXES
from robustft.data.paths import UNLABELLED, Member, PathDataset
from robustft.files import read_text
from robustft.ops.kinds import checked

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_CLASSES = 1 << 20  # where only labels tell how many there are, each gets a name
LABELS, TEXTS = (".cls", ".index"), (".txt", ".text")


@checked
def expand(pattern: str) -> list[Path]:
    """The archives that `shards/{000..099}.tar` names; several patterns are joined by `::`.

    FileNotFoundError, naming them, where some are missing: an epoch over the others is another epoch.
    """
    if not pattern:
        raise ValueError("pattern is empty; expected a path of shards")
    paths = []
    for part in pattern.split("::"):
        found = _BRACES.search(part)
        if found is None:
            paths.append(Path(part))
            continue
        low, high = found.groups()
        if int(high) < int(low):
            raise ValueError(f"{part}: counts from {low} down to {high}")
        paths += [
            Path(part[: found.start()] + str(number).zfill(len(low)) + part[found.end() :])
            for number in range(int(low), int(high) + 1)
        ]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} shards are missing: {few(missing)}")
    return paths


@checked
def read_shards(pattern: str) -> PathDataset:
    """The images of shards, with the labels (`.cls`) or captions (`.txt`), or both, beside them.

    `.json` may hold "label" or "caption". Class names are numbers, unless a `classnames.txt` lies beside the shards.
    ValueError, naming archive and sample, for what is damaged, compressed or lacks its label.
    """
    samples: list[tuple[Member, int]] = []
    texts: list[str] = []
    shards = expand(pattern)
    for shard in shards:
        for key, parts in _samples(shard).items():
            image = next((parts[suffix] for suffix in parts if suffix in SUFFIXES), None)
            if image is None:
                raise ValueError(f"{shard}: sample {key!r} has no image, only {', '.join(parts)}")
            label, text = _target(shard, key, parts)
            samples.append((image, label))
            texts.append(text)
    if not samples:
        raise ValueError(f"{pattern}: the shards hold no samples")
    labels = {label for _, label in samples}
    if UNLABELLED in labels and len(labels) > 1:
        key = next(image.name for image, label in samples if label == UNLABELLED)
        raise ValueError(f"{pattern}: {key!r} has no label, others have")
    if "" in texts and any(texts):
        raise ValueError(f"{pattern}: {samples[texts.index('')][0].name!r} has no caption, others have")
    return PathDataset(
        tuple(samples), _classes(shards[0].parent, max(labels) + 1), texts=tuple(texts) if any(texts) else None
    )


def _classes(folder: Path, count: int) -> tuple[str, ...]:
    for names in (folder / "classnames.txt", folder.parent / "classnames.txt"):
        if names.is_file():
            classes = tuple(
                line.strip() for line in read_text(names, "a class name a line").splitlines() if line.strip()
            )
            if len(classes) < count:
                raise ValueError(f"{names}: names {len(classes)} classes, the shards hold label {count - 1}")
            return classes
    return tuple(map(str, range(count)))


def _samples(shard: Path) -> dict[str, dict[str, Member]]:
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                if info.isfile():
                    folder, _, name = info.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if stem:
                        members = samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})
                        members[f".{suffix.lower()}"] = Member(shard, info.name, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: damaged, or no uncompressed tar archive: {error}") from error
    return samples


def _decoded(shard: Path, key: str, part: Member) -> str:
    try:
        return part.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{shard}: the caption of {key!r} is not UTF-8: {error}") from error


def _target(shard: Path, key: str, parts: dict[str, Member]) -> tuple[int, str]:
    told: dict[str, Any] = {}
    if ".json" in parts:
        try:
            told = json.loads(parts[".json"].read())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{shard}: {key}.json is not JSON: {error}") from error
        if not isinstance(told, dict):
            raise ValueError(f"{shard}: {key}.json is no object")
    label_part = next((parts[suffix] for suffix in LABELS if suffix in parts), None)
    text_part = next((parts[suffix] for suffix in TEXTS if suffix in parts), None)
    label: Any = told.get("label", UNLABELLED) if label_part is None else label_part.read().strip()
    text = told.get("caption", told.get("text", "")) if text_part is None else _decoded(shard, key, text_part)
    try:
        number = int(label)
        if isinstance(label, float) and number != label:
            raise ValueError
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{shard}: the label of {key!r} is {label!r:.60}; expected a whole number") from error
    if number >= MOST_CLASSES:
        raise ValueError(f"{shard}: the label of {key!r} is {number}; expected less than {MOST_CLASSES}")
    if number < UNLABELLED or (number == UNLABELLED and not text):
        raise ValueError(f"{shard}: sample {key!r} has neither a label (.cls) nor a caption (.txt)")
    return number, str(text).strip()
