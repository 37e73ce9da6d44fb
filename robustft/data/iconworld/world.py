"""IconWorld: emoji drawn by ten studios, a benchmark of robust fine-tuning whose shifts are drawn by people.

    kinds       46 classes of things (mammal, vehicle, tool, ...), split by concept: no tested thing was trained on.
                In distribution (ID): two studios. Shifts: the test concepts by each other studio, from photograph-like
                3D to black lines. Groups: studio x kind
    ood         held-out kinds by the ID studios (near); interface symbols, letters, flags (far)
    concepts    400 classes (eagle, tractor, ...): few-shot with studios as shots, an unseen studio to test on
    spurious    the kinds in coloured frames: the colour tells the class, until a test set where it misleads

Images are 40 x 40 RGB. All lies in one bundled file; `unpack` makes a folder of it that `robustft train` takes as it
takes anybody's own data. Who drew what stands in the notice beside the file.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from robustft.data.iconworld.packages import STUDIOS
from robustft.data.iconworld.taxonomy import KINDS, place
from robustft.data.images import ImageDataset
from robustft.data.opening import Data
from robustft.data.table import csv_text
from robustft.files import new_folder, write_text

ASSETS = Path(__file__).parents[1] / "assets"
DRAWINGS = "iconworld_drawings.xz"
NOTICE = "iconworld_notice.md"
SIZE = 40
COLOURS = 32

ID_STUDIOS = ("noto", "twemoji")
SHIFTS = (
    "fluent-emoji",
    "fluent-emoji-flat",
    "fluent-emoji-high-contrast",
    "emojione",
    "emojione-monotone",
    "fxemoji",
    "noto-v1",
    "streamline-emojis",
)
CONCEPT_SHOTS = ("twemoji", "fluent-emoji-flat", "fluent-emoji", "noto-v1")
"""Studios whose drawings are the shots of `concepts`, in the order in which they are added."""
CONCEPT_VALIDATION, CONCEPT_TEST = "emojione", "noto"
CONCEPT_SHIFTS = ("fluent-emoji-high-contrast", "emojione-monotone")
CONCEPT_STUDIOS = (*CONCEPT_SHOTS, CONCEPT_VALIDATION, CONCEPT_TEST, *CONCEPT_SHIFTS)
FAR = {"symbols": "tabler", "letters": "mdi", "flags": "circle-flags"}
"""The far OOD sets, and whose drawings they show."""
NEAR = "held-out kinds"
OOD = (NEAR, *FAR)
TASKS = ("kinds", "concepts")
CLASS_NAMES = tuple(sorted(KINDS))
FRAME = 4  # pixels
FRAME_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 170),
}
ASTRAY = 0.05  # share of training images whose frame has another colour than their class's


class Drawing(NamedTuple):
    """One bundled drawing: its studio or set, what it shows, the kind of that ("" where none is told)."""

    studio: str
    concept: str
    kind: str


class Drawings(NamedTuple):
    """All bundled drawings: what each is, palettes (N, 32, 3) and pixels (N, 40, 40) into them; for each concept the
    part of `kinds` it is in ("" where its kind is held out), and the classes of `concepts`."""

    rows: tuple[Drawing, ...]
    palettes: np.ndarray
    pixels: np.ndarray
    splits: dict[str, str]
    concepts: tuple[str, ...]

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """Drawings as (N, 40, 40, 3) uint8."""
        index = np.asarray(rows, np.int64)
        return self.palettes[index[:, None, None], self.pixels[index]]

    def rows_of(self, studio: str) -> dict[str, int]:
        """{concept: row} of a studio."""
        return {drawing.concept: row for row, drawing in enumerate(self.rows) if drawing.studio == studio}


@cache
def drawings(path: Path = ASSETS / DRAWINGS) -> Drawings:
    """What the bundled file holds. Raises FileNotFoundError, and ValueError for a file that is damaged or another's."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; python -m robustft.data.iconworld.build makes it")
    try:
        content = lzma.decompress(path.read_bytes())
        end = 8 + int.from_bytes(content[:8], "little")
        told = json.loads(content[8:end])
        concepts = {code: Drawing("", concept, kind) for code, (concept, kind, _) in told["concepts"].items()}
        rows = tuple(
            concepts[code]._replace(studio=studio) if code else Drawing(studio, name, "")
            for studio, name, code in told["drawings"]
        )
        palettes = np.frombuffer(content, np.uint8, len(rows) * COLOURS * 3, end)
        pixels = np.frombuffer(content, np.uint8, len(rows) * SIZE * SIZE, end + palettes.size)
        if end + palettes.size + pixels.size != len(content):
            raise ValueError("its length does not fit its table")
    except (lzma.LZMAError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, or no file of robustft.data.iconworld.build: {error!r:.200}") from error
    return Drawings(
        rows,
        palettes.reshape(-1, COLOURS, 3),
        pixels.reshape(-1, SIZE, SIZE),
        {concept: split for concept, _, split in told["concepts"].values()},
        tuple(concepts[code].concept for code in told["classes"]),
    )


class Row(NamedTuple):
    """An image of a task: its place in `Drawings`, its class ("" for none), the name of its set."""

    drawing: int
    label: str
    split: str


def rows(task: str = "kinds") -> list[Row]:
    """All images of a task, in sets named train, val, test, shift:<studio>, ood:<name>. ValueError for another task."""
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    return _concept_rows() if task == "concepts" else _kind_rows()


def _kind_rows() -> list[Row]:
    bundled, found = drawings(), []
    for row, drawing in enumerate(bundled.rows):
        split = bundled.splits.get(drawing.concept, "")
        if drawing.studio in FAR.values():
            found += [Row(row, "", f"ood:{name}") for name, source in FAR.items() if source == drawing.studio]
        elif drawing.studio in ID_STUDIOS:
            name = {"validation": "val", "": f"ood:{NEAR}"}.get(split, split)
            found.append(Row(row, drawing.kind if split else "", name))
        elif split == "test":
            found.append(Row(row, drawing.kind, f"shift:{drawing.studio}"))
    return found


def _concept_rows() -> list[Row]:
    bundled = drawings()
    sets = dict.fromkeys(CONCEPT_SHOTS, "train")
    sets |= {CONCEPT_VALIDATION: "val", CONCEPT_TEST: "test"}
    sets |= {studio: f"shift:{studio}" for studio in CONCEPT_SHIFTS}
    by_studio = {studio: bundled.rows_of(studio) for studio in sets}
    return [Row(by_studio[s][concept], concept, name) for s, name in sets.items() for concept in bundled.concepts]


def sets(limit: int | None = None) -> Data:
    """Kinds with their shifts and OOD sets as one `Data`; `limit` keeps that many images of each test set.

    Where a set shows several studios, its groups are studio x class, numbered studio * classes + class.
    """
    return _data("kinds", CLASS_NAMES, limit, ID_STUDIOS)


def concepts(*, shots: int | None = None, limit: int | None = None) -> Data:
    """Concepts as one `Data`, trained on the drawings of the first `shots` of `CONCEPT_SHOTS`.

    Validated on one other studio, tested on another; shifts are two studios without colours. ValueError for shots
    outside 1 to 4.
    """
    if shots is not None and not 1 <= shots <= len(CONCEPT_SHOTS):
        raise ValueError(f"shots must be 1 to {len(CONCEPT_SHOTS)}, a studio each, got {shots}")
    return _data("concepts", drawings().concepts, limit, CONCEPT_SHOTS[:shots])


def _data(task: str, classes: tuple[str, ...], limit: int | None, trained: Sequence[str]) -> Data:
    bundled = drawings()
    by_set: dict[str, list[Row]] = {}
    for row in rows(task):
        if row.split != "train" or bundled.rows[row.drawing].studio in trained:
            by_set.setdefault(row.split, []).append(row)

    def dataset(name: str) -> ImageDataset:
        found = by_set[name]
        if limit is not None and name not in ("train", "val"):
            found = sorted(found, key=lambda row: place("limit", str(row.drawing)))[:limit]
        return _images(bundled, found, classes)

    def named(start: str) -> dict[str, ImageDataset]:
        return {name.removeprefix(start): dataset(name) for name in by_set if name.startswith(start)}

    return Data(
        train=dataset("train"),
        validation=dataset("val"),
        test=dataset("test"),
        classes=classes,
        shifts=named("shift:"),
        ood=named("ood:"),
        understood=(f"IconWorld, the bundled benchmark: {task}",),
    )


def _images(bundled: Drawings, found: Sequence[Row], classes: tuple[str, ...]) -> ImageDataset:
    """The images of a set; those of no class are labelled by what they show."""
    names = [row.label or bundled.rows[row.drawing].kind or bundled.rows[row.drawing].studio for row in found]
    if not found[0].label:
        classes = tuple(sorted(set(names)))
    labels = torch.tensor([classes.index(name) for name in names])
    groups = None
    if len({bundled.rows[row.drawing].studio for row in found}) > 1:
        studios = list(STUDIOS)
        numbers = torch.tensor([studios.index(bundled.rows[row.drawing].studio) for row in found])
        groups = numbers * len(classes) + labels
    return ImageDataset(bundled.images([row.drawing for row in found]), labels, classes, groups=groups)


def spurious(split: str, *, conflicting: bool = False, seed: int = 0) -> ImageDataset:
    """The kinds of `split` ("train", "validation", "test") in frames of `FRAME_COLOURS`, whose number `groups` tells.

    In "train" and "validation" the frame of class c has colour c mod 5, of 95 % of the images, and one of the others
    for the rest; in "test" all of them or, with `conflicting`, none. Raises ValueError for `conflicting` elsewhere.
    """
    parts = {"train": "train", "validation": "val", "test": "test"}
    if split not in parts:
        raise ValueError(f"split: expected one of {', '.join(parts)}, got {split!r}")
    if conflicting and split != "test":
        raise ValueError(f'conflicting: only the "test" split has a conflicting variant, got split {split!r}')
    plain = _images(drawings(), [row for row in rows() if row.split == parts[split]], CLASS_NAMES)
    rng = np.random.default_rng((seed, list(parts).index(split)))
    plain = plain.subset(rng.permutation(len(plain)))  # any stretch of them shows all classes
    other = torch.from_numpy(rng.integers(1, len(FRAME_COLOURS), len(plain)))
    astray = torch.full((len(plain),), conflicting)
    if split != "test":
        astray[torch.from_numpy(rng.permutation(len(plain))[: round(ASTRAY * len(plain))])] = True
    groups = (plain.labels + astray * other) % len(FRAME_COLOURS)
    colours = np.array(list(FRAME_COLOURS.values()), np.uint8)[groups.numpy()]
    images = np.broadcast_to(colours[:, None, None], plain.images.shape).copy()
    inside = slice(FRAME, SIZE - FRAME)
    images[:, inside, inside] = np.stack([_reduced(image) for image in plain.images])
    return ImageDataset(images, plain.labels, CLASS_NAMES, groups=groups)


def _reduced(image: np.ndarray) -> np.ndarray:
    """An image as small as the inside of a frame."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((SIZE - 2 * FRAME,) * 2, Image.Resampling.BILINEAR))


def unpack(folder: str | Path, task: str = "kinds") -> Path:
    """Writes a task as a folder of images with a table, which `robustft train` and `robustft.data.open` take.

    FOLDER/metadata.csv has a row for each image: file_name, label ("" for no class), split (train, val, test,
    shift:<studio>, ood:<name>), studio, concept, kind. Images are FOLDER/images/<studio>/<concept>.png; the notice of
    who drew them lies beside the table. Raises FileExistsError where the folder is there, ValueError for another task.
    """
    from PIL import Image

    target, bundled, lines = Path(folder), drawings(), []
    found = rows(task)
    if target.exists():
        raise FileExistsError(f"{target}: exists; unpack into a new folder")
    with new_folder(target) as fresh:
        for row in found:
            drawing = bundled.rows[row.drawing]
            name = f"images/{drawing.studio}/{drawing.concept.replace(' ', '_')}.png"
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(bundled.pixels[row.drawing])
            image.putpalette(bundled.palettes[row.drawing].tobytes())
            image.save(path)
            lines.append((name, row.label, row.split, drawing.studio, drawing.concept, drawing.kind))
        write_text(
            fresh / "metadata.csv", csv_text(("file_name", "label", "split", "studio", "concept", "kind"), lines)
        )
        write_text(fresh / NOTICE, (ASSETS / NOTICE).read_text(encoding="utf-8"))
    return target
