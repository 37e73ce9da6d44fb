"""A folder of class folders, or of images alone, as paths.

<root>/<class>/**/<image>      labels by the sorted names of the class folders; numbers sort as numbers
<root>/<image>                 images of no class
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from robustft.data.paths import UNLABELLED, PathDataset

# What Pillow decodes of what people keep their images in.
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".tga", ".ico")
)


def is_image(path: Path) -> bool:
    """By its name; hidden files, such as the `._x.jpg` that some systems leave, are none."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, links followed, in an order that depends on their names alone."""
    found = []
    for directory, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [path for name in sorted(files) if is_image(path := Path(directory, name))]
    return found


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted; as numbers where all are numbers, as in ImageNet-V2."""
    found = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if all(entry.name.isdecimal() for entry in found):
        return sorted(found, key=lambda entry: (int(entry.name), entry.name))
    return sorted(found, key=lambda entry: entry.name)


def class_tree(root: Path, classes: Sequence[str] | None = None) -> PathDataset:
    """The images of a folder of class folders; `classes` names those to expect, in the order of the labels.

    Raises ValueError, naming folders, for no class folder, one without images, one that `classes` does not name, and
    images beside the class folders, which belong to none.
    """
    folders = subfolders(root)
    if not folders:
        raise ValueError(f"{root}: holds no class folders")
    if loose := [entry.name for entry in sorted(root.iterdir()) if entry.is_file() and is_image(entry)]:
        raise ValueError(f"{root}: {loose[0]!r} and {len(loose) - 1} more images lie beside the class folders")
    names = [folder.name for folder in folders] if classes is None else list(classes)
    if unknown := [folder.name for folder in folders if folder.name not in names]:
        raise ValueError(f"{root}: {unknown[0]!r} is a folder of no class; the classes are {names[:5]}")
    samples = []
    for folder in folders:
        images = image_files(folder)
        if not images:
            raise ValueError(f"{folder}: holds no images; a class needs some (known endings: {_endings()})")
        label = names.index(folder.name)
        samples += [(path, label) for path in images]
    return PathDataset(tuple(samples), tuple(names))


def unlabelled(root: Path) -> PathDataset:
    """All images below a folder, of no class. ValueError where there is none."""
    images = image_files(root)
    if not images:
        raise ValueError(f"{root}: holds no images (known endings: {_endings()})")
    return PathDataset(tuple((path, UNLABELLED) for path in images), ())


def is_class_tree(root: Path) -> bool:
    """Whether there are folders with images in them, and no images beside them."""
    folders = subfolders(root)
    return bool(folders) and all(any(is_image(p) for p in folder.rglob("*")) for folder in folders)


def _endings() -> str:
    return " ".join(sorted(SUFFIXES))
