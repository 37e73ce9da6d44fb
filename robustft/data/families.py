"""Layouts of the data sets that this field measures on: ImageNet and its shifts, and WILDS' tables.

What ImageNet's classes are called stands in timm (synsets) and open_clip (names), which come with open_clip.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from robustft.data.folder import class_tree, image_files, subfolders
from robustft.data.paths import PathDataset
from robustft.data.table import Columns
from robustft.files import read_json, read_text


class Wilds(NamedTuple):
    """A WILDS table: the columns it is known by, the ones to read, and where its images lie below it."""

    known_by: frozenset[str]
    columns: Columns
    images: str


WILDS = {
    "iWildCam": Wilds(
        frozenset(("filename", "y", "location_remapped", "split")),
        Columns(image="filename", label="y", split="split", groups=("location_remapped",)),
        "train",
    ),
    "Waterbirds": Wilds(
        frozenset(("img_filename", "y", "place", "split")),
        Columns(image="img_filename", label="y", split="split", groups=("y", "place")),
        "",
    ),
    "CelebA": Wilds(
        frozenset(("image_id", "Blond_Hair", "Male", "split")),
        Columns(image="image_id", label="Blond_Hair", split="split", groups=("Blond_Hair", "Male")),
        "img_align_celeba",
    ),
}
"""By name: tables with a path for each image. (FMoW's and Camelyon17's have none; their own loaders make the paths.)"""


def wilds_table(header: tuple[str, ...]) -> tuple[str, Wilds] | None:
    """The WILDS data set that a table of these columns is of; None for another table."""
    return next(((name, kind) for name, kind in WILDS.items() if kind.known_by <= set(header)), None)


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """The 1,000 synsets of ImageNet-1k in the order of its labels."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 names that CLIP's zero-shot heads are made of, in the same order."""
    import open_clip

    return tuple(open_clip.IMAGENET_CLASSNAMES)


def is_imagenet_tree(root: Path) -> bool:
    """Whether the class folders are synsets of ImageNet-1k: all of them, or a subset (R, A, Sketch)."""
    names = {folder.name for folder in subfolders(root)}
    return len(names) > 1 and names <= set(imagenet_synsets())


def is_imagenet_v2(root: Path) -> bool:
    """Whether the class folders are the numbers 0 to 999, as in ImageNet-V2."""
    return {folder.name for folder in subfolders(root)} == set(map(str, range(1000)))


def imagenet_tree(root: Path) -> tuple[PathDataset, str]:
    """A folder of ImageNet's, or of a shift of it, under synsets as class names; and the protocol in words.

    A subset, as ImageNet-R's and -A's 200, keeps its own classes: a predictor of 1,000 is restricted to them by name,
    before the softmax.
    """
    if is_imagenet_v2(root):
        tree = class_tree(root)
        return tree.renamed([imagenet_synsets()[int(name)] for name in tree.classes]), "1000 classes, by number"
    present = {folder.name for folder in subfolders(root)}
    classes = [name for name in imagenet_synsets() if name in present]
    return class_tree(root, classes), f"{len(classes)} of ImageNet's 1000 classes; logits restricted before the softmax"


def is_objectnet(root: Path) -> bool:
    """Whether this is ObjectNet's release: `images/` by its own class names, and `mappings/` to ImageNet's."""
    return (root / "images").is_dir() and (root / "mappings" / "folder_to_objectnet_label.json").is_file()


def objectnet(root: Path) -> tuple[PathDataset, str]:
    """The classes of ObjectNet that ImageNet has, each under the first of its synsets; and the protocol in words."""
    labels = _json(root / "mappings" / "folder_to_objectnet_label.json")
    to_imagenet = _json(root / "mappings" / "objectnet_to_imagenet_1k.json")
    numbers = {description: number for number, description in enumerate(_descriptions(root))}
    samples, classes = [], []
    for folder in subfolders(root / "images"):
        described = str(to_imagenet.get(str(labels.get(folder.name, "")), ""))
        first = next((numbers[name] for name in (p.strip() for p in described.split(";")) if name in numbers), None)
        if first is not None:
            synset = imagenet_synsets()[first]
            if synset not in classes:
                classes.append(synset)
            samples += [(path, classes.index(synset)) for path in image_files(folder)]
    if not samples:
        raise ValueError(f"{root}: none of its folders is of a class that its mappings give to ImageNet")
    protocol = (
        f"{len(classes)} classes that ImageNet has, each as the first of its synsets; logits restricted before it"
    )
    return PathDataset(tuple(samples), tuple(classes)), protocol


def _descriptions(root: Path) -> list[str]:
    """ImageNet's descriptions in the order of its labels, as ObjectNet's mappings spell them."""
    path = root / "mappings" / "pytorch_to_imagenet_2012_id.json"
    lines = root / "mappings" / "imagenet_to_label_2012_v2"
    if not path.is_file() or not lines.is_file():
        raise ValueError(f"{root}: mappings/ lacks {path.name} or {lines.name}")
    by_id = [line.strip() for line in read_text(lines, "a class name a line").splitlines()]
    order: dict[str, object] = dict(_json(path))
    places = [order.get(str(number)) for number in range(len(by_id))]
    found = []
    for number, place in enumerate(places):
        if type(place) is not int or not 0 <= place < len(by_id):
            raise ValueError(
                f"{path}: the place of label {number} is {place!r:.60}; expected a line of the {len(by_id)} in {lines}"
            )
        found.append(by_id[place])
    return found


def _json(path: Path) -> dict[str, str]:
    value = read_json(path, "an object")
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a {type(value).__name__}; expected an object")
    return value
