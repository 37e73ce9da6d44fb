"""One door for data on disk: `open(source)` finds out what lies there and says what it understood.

    folder with train/ [val/ test/ shifts/<name>/ ood/<name>/]     class folders in each; ood/<name> may be flat
    folder of class folders                                       split by seed, near-duplicates on one side
    .csv .tsv .jsonl, folder with metadata.csv / .jsonl           `robustft.data.table`; WILDS' tables by their columns
    .json                                                         the prompt learners' split (`read_split`)
    shards/{000..099}.tar                                         `robustft.data.shards`
    folder that Hugging Face's save_to_disk wrote                 extra `hf`
    folder of ImageNet or one of its shifts                       V2, R, A, Sketch, ObjectNet

Files stay files: nothing is decoded but by `split_tree`, nothing is copied, nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustft.data.classes import ClassNames, few
from robustft.data.duplicates import SIDE, Look, look
from robustft.data.duplicates import families as copies
from robustft.data.families import imagenet_tree, is_imagenet_tree, is_imagenet_v2, is_objectnet, objectnet, wilds_table
from robustft.data.folder import class_tree, is_class_tree, subfolders, unlabelled
from robustft.data.images import DamagedImageError, OnError, check_on_error
from robustft.data.paths import Member, PathDataset, read_file
from robustft.data.seeds import stateless_generator
from robustft.data.shards import read_shards
from robustft.data.sources import in_order_of, reading_workers
from robustft.data.splits import few_shot, read_split
from robustft.data.table import Columns, read_table, write_table
from robustft.ops.kinds import checked

VALIDATION_NAMES = ("val", "valid", "validation")
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.1
SPLITS = {"train": "train", "test": "test", "id_test": "test", "id_val": "validation"}
SPLITS |= dict.fromkeys(VALIDATION_NAMES, "validation")
NUMBERED_SPLITS = {"0": "train", "1": "validation", "2": "test"}


@dataclass(frozen=True, eq=False)
class Data:
    """What was found: labelled images to train, validate and test on, shifts of them, and images of no class.

    `understood` says in sentences how the source was read; `protocols`, by set, which classes are measured where
    these are not all.
    """

    train: Any
    validation: Any
    test: Any
    classes: tuple[str, ...]
    shifts: dict[str, Any] = field(default_factory=dict)
    ood: dict[str, Any] = field(default_factory=dict)
    understood: tuple[str, ...] = ()
    protocols: dict[str, str] = field(default_factory=dict)
    root: Path | None = None

    def sets(self) -> dict[str, Any]:
        """All sets there are by name: train, validation, test, shifts/<name>, ood/<name>."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        named |= {f"shifts/{name}": data for name, data in self.shifts.items()}
        named |= {f"ood/{name}": data for name, data in self.ood.items()}
        return {name: data for name, data in named.items() if data is not None}

    def map(self, change: Callable[[Any], Any]) -> Data:
        """The same with every set changed."""

        def changed(data: Any) -> Any:
            return None if data is None else change(data)

        return replace(
            self,
            train=changed(self.train),
            validation=changed(self.validation),
            test=changed(self.test),
            shifts={name: change(data) for name, data in self.shifts.items()},
            ood={name: change(data) for name, data in self.ood.items()},
        )

    def describe(self) -> str:
        """What was understood, and how many images each set has."""
        counts = ", ".join(f"{name} {len(data):,}" for name, data in self.sets().items())
        return "\n".join([*self.understood, f"{len(self.classes)} classes: {few(self.classes)}", f"images: {counts}"])

    def split_table(self, content: Callable[[Path], str] | None = None) -> str:
        """split.csv: which image is in which set; itself a source. `content` of each file makes a further column."""
        sets = {name: data for name, data in self.sets().items() if isinstance(data, PathDataset)}
        return write_table(
            {name.replace("shifts/", "shift:").replace("ood/", "ood:"): d for name, d in sets.items()},
            self.root or Path("."),
            content,
        )


@checked
def open(
    source: str | os.PathLike[str] | Data,
    *,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    shifts: Mapping[str, str | os.PathLike[str]] | None = None,
    ood: Mapping[str, str | os.PathLike[str]] | None = None,
    class_names: Mapping[str, str] | Sequence[str] | None = None,
    columns: Columns = Columns(),
    images: str | os.PathLike[str] | None = None,
    shots: int | None = None,
    seed: int = 0,
    near_duplicates: bool = True,
    on_error: OnError = "raise",
) -> Data:
    """The data that lie at `source`; the kinds are those of this module's first lines, tried in that order.

    Args:
        source: a folder, a table, a split file, a pattern of shards; a `Data` is taken as it is.
        validation, test: such sources too, for parts that `source` lacks. Without any validation set it is a part of
            train, the same share of every class, by `seed`; a tree that is not split gives both so.
        shifts, ood: by name, further sets: of the same classes (or some of them), and of none of them.
        class_names: what the classes are called in captions: {name in the data: name}, or a list in their order.
            They become the classes.
        columns: of a table, where its names are not the usual ones; group columns.
        images: the folder that paths in a table or a split file are relative to.
        shots: keep so many images of each class for training.
        seed: of splits and shots.
        near_duplicates: when a tree is split, keep (near-)copies on one side, for which every image is read once.
        on_error: "skip" lets whatever reads the sets go on without images that cannot be read, and tell how many these
            were and which: a warning, and `skipped` of what it returns. A training step takes the next image instead.

    Raises FileNotFoundError for a source that is not there, ValueError, naming files, for one of no known kind and for
    parts that do not fit, ImportError naming the extra of a reader that is not installed.
    """
    check_on_error(on_error)
    data = source if isinstance(source, Data) else _open(source, columns, images, seed, near_duplicates, on_error)
    if validation is not None:
        data = replace(data, validation=_whole(validation, columns, images))
    if test is not None:
        data = replace(data, test=_whole(test, columns, images))
    data = _with_validation(data, seed)
    data = replace(
        data,
        shifts={**data.shifts, **{name: _whole(place, columns, images) for name, place in (shifts or {}).items()}},
        ood={**data.ood, **{name: _ood(place, columns, images) for name, place in (ood or {}).items()}},
    )
    if class_names is not None:
        names = class_names if isinstance(class_names, Mapping) else _by_place(data.classes, class_names)
        unknown = [name for name in data.classes if name not in names]
        if unknown:
            raise ValueError(f"class_names has no name for {few(unknown)}, of the {len(data.classes)} classes")
        ood_sets = data.ood
        data = data.map(lambda part: part if part.classes == () else part.renamed(_known(part, names)))
        renamed = ClassNames(data.classes).renamed(names[name] for name in data.classes)
        data = replace(data, classes=renamed, ood=ood_sets)
    if shots is not None:
        if data.train is None:
            raise ValueError(f"shots is {shots}, but {source} has no images to train on")
        data = replace(data, train=few_shot(data.train, shots, seed=seed))
    return data if on_error == "raise" else data.map(lambda part: replace(part, on_error=on_error))


def open_test(
    source: str | os.PathLike[str] | Data,
    *,
    split: str | None = None,
    shifts: Mapping[str, str | os.PathLike[str]] | None = None,
    ood: Mapping[str, str | os.PathLike[str]] | None = None,
    class_names: Mapping[str, str] | Sequence[str] | None = None,
    columns: Columns = Columns(),
    images: str | os.PathLike[str] | None = None,
) -> Data:
    """The data at `source` to measure on: its test set, or all of it where it is one set, as `test`.

    split: "test", "validation" or "train", to measure on that set. Others as for `open`. ValueError where the source
    lacks the set, or has several and no test set.
    """
    path = None if isinstance(source, Data) else Path(os.fspath(source)).expanduser()
    if path is not None and path.is_dir() and not (path / "train").is_dir() and is_class_tree(path):
        tree, _ = _tree(path)
        data = Data(
            None, None, tree, tree.classes, understood=(f"{path}: class folders, all to measure on",), root=path
        )
    else:
        data = source if isinstance(source, Data) else _open(source, columns, images, 0, False)
    parts = {"test": data.test, "validation": data.validation, "train": data.train}
    held = [name for name, part in parts.items() if part is not None]
    wanted = split or ("test" if "test" in held else held[0] if len(held) == 1 else None)
    if wanted is None or wanted not in held:
        raise ValueError(
            f"{source}: has no {wanted or 'test'} set; it holds {', '.join(held) or 'none'}: say which to measure on "
            "by split="
        )
    return open(
        replace(data, train=None, validation=None, test=parts[wanted]),
        shifts=shifts,
        ood=ood,
        class_names=_of_these(class_names, data.classes),
        columns=columns,
        images=images,
    )


def _of_these(names: Any, classes: Sequence[str]) -> Any:
    """A mapping's names where it knows any of the classes; data that have the new names already need none."""
    if isinstance(names, Mapping) and not set(names) & set(classes):
        return None
    return names


def _open(
    source: str | os.PathLike[str],
    columns: Columns,
    images: str | os.PathLike[str] | None,
    seed: int,
    near_duplicates: bool,
    on_error: OnError = "raise",
) -> Data:
    text = os.fspath(source)
    path = Path(text).expanduser()
    root = None if images is None else Path(images).expanduser()
    if text.endswith(".tar"):
        shards = read_shards(text)
        told = f"{text}: {len(shards)} images in shards"
        return Data(shards, None, None, shards.classes, understood=(told,))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        return _open_file(path, columns, root)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _open_hugging_face(path)
    for name in ("metadata.csv", "metadata.jsonl"):
        if (path / name).is_file():
            return _open_table(path / name, columns, root)
    if (path / "train").is_dir():
        return _open_parts(path, seed)
    if is_objectnet(path):
        tree, protocol = objectnet(path)
        return _test_only(path, tree, "ObjectNet", protocol)
    if subfolders(path) and (is_imagenet_tree(path) or is_imagenet_v2(path)):
        tree, protocol = imagenet_tree(path)
        return _test_only(path, tree, "ImageNet's classes", protocol)
    if is_class_tree(path):
        return split_tree(path, seed=seed, near_duplicates=near_duplicates, on_error=on_error)
    raise ValueError(
        f"{path}: no data set that is known. Looked for, in this order: {DATA_SET_KINDS}. The folder holds "
        f"{few(sorted(entry.name for entry in path.iterdir()))}"
    )


DATA_SET_KINDS = (
    "dataset_dict.json (Hugging Face), metadata.csv or metadata.jsonl, a folder train/, ObjectNet's images/ and "
    "mappings/, class folders of ImageNet, class folders with images"
)


def _open_file(path: Path, columns: Columns, root: Path | None) -> Data:
    match path.suffix.lower():
        case ".csv" | ".tsv" | ".jsonl":
            return _open_table(path, columns, root)
        case ".json":
            split = read_split(path, path.parent if root is None else root)
            validation = split.val if len(split.val) else None
            told = f"{path}: the prompt learners' split file"
            below = path.parent if root is None else root
            return Data(split.train, validation, split.test, split.train.classes, understood=(told,), root=below)
    raise ValueError(
        f"{path}: a file of no known kind; expected .csv, .tsv, .jsonl, a split in .json, or shards in .tar"
    )


def _open_table(path: Path, columns: Columns, root: Path | None) -> Data:
    if columns == Columns() and path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            header = tuple(name.strip() for name in file.readline().split(","))
        if found := wilds_table(header):
            name, kind = found
            below = path.parent / kind.images if (path.parent / kind.images).is_dir() else path.parent
            data = _open_table(path, kind.columns, root or below)
            return replace(data, understood=(f"{path}: the table of WILDS' {name}", *data.understood))
    table = read_table(path, columns, root)
    told, below = (table.understood,), root or path.parent
    if table.splits is None:
        return Data(table.images, None, None, table.images.classes, understood=told, root=below)
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(table.splits):
        rows.setdefault(name, []).append(row)
    with_id = "id_test" in rows or "id_val" in rows  # WILDS: val and test are shifted beside them
    sets: dict[str, Any] = {"train": None, "validation": None, "test": None}
    shifts, ood = {}, {}
    for name, indices in rows.items():
        part, place = table.images.subset(indices), NUMBERED_SPLITS.get(name, SPLITS.get(name))
        if name.startswith("shift:") or (with_id and name in (*VALIDATION_NAMES, "test")):
            shifts[name.removeprefix("shift:")] = part
        elif name.startswith("ood:"):
            ood[name.removeprefix("ood:")] = part
        elif place is None:
            raise ValueError(
                f"{path}: {len(indices)} rows have the split {name!r}; expected train, {', '.join(VALIDATION_NAMES)}, "
                "test, id_val, id_test, shift:<name> or ood:<name>"
            )
        else:
            sets[place] = part
    return Data(**sets, classes=table.images.classes, shifts=shifts, ood=ood, understood=told, root=below)


def _open_parts(path: Path, seed: int) -> Data:
    train, told = _tree(path / "train")
    named = [name for name in VALIDATION_NAMES if (path / name).is_dir()]
    if len(named) > 1:
        raise ValueError(f"{path}: holds {named[0]}/ and {named[1]}/; expected one validation set")
    validation = _tree(path / named[0])[0] if named else None
    test = _tree(path / "test")[0] if (path / "test").is_dir() else None
    shifts = {f.name: _tree(f)[0] for f in subfolders(path / "shifts")} if (path / "shifts").is_dir() else {}
    ood = {f.name: _anything(f) for f in subfolders(path / "ood")} if (path / "ood").is_dir() else {}
    understood = (f"{path}: a folder of sets, {told}",)
    return Data(train, validation, test, train.classes, shifts, ood, understood, root=path)


def _tree(path: Path) -> tuple[PathDataset, str]:
    if is_imagenet_tree(path) or is_imagenet_v2(path):
        tree, _ = imagenet_tree(path)
        return tree, "each with ImageNet's class folders"
    return class_tree(path), "each with class folders"


def _anything(path: Path) -> PathDataset:
    """Images of no class that matters: in class folders or not."""
    return unlabelled(path)


def _open_hugging_face(path: Path) -> Data:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{path}: written by Hugging Face's datasets, which is not installed: pip install 'robustft[hf]'"
        ) from error
    from robustft.data.hugging_face import HuggingFaceDataset

    try:
        loaded = datasets.load_from_disk(os.fspath(path))
    except Exception as error:  # of damaged files, it may raise anything
        raise ValueError(f"{path}: damaged, or not saved by Hugging Face's datasets: {error!r:.200}") from error
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if not parts:
        raise ValueError(f"{path}: holds no split; expected train, {', '.join(VALIDATION_NAMES)}, test")
    sets: dict[str, Any] = {"train": None, "validation": None, "test": None}
    for name, part in parts.items():
        kind = SPLITS.get(name)
        if kind is None:
            raise ValueError(f"{path}: holds a split {name!r}; expected train, {', '.join(VALIDATION_NAMES)}, test")
        sets[kind] = HuggingFaceDataset(part, where=f"{path}, split {name}")
    first = next(part for part in sets.values() if part is not None)
    return Data(**sets, classes=first.classes, understood=(f"{path}: saved by Hugging Face's datasets",), root=path)


def _test_only(path: Path, tree: PathDataset, what: str, protocol: str) -> Data:
    return Data(
        None, None, tree, tree.classes, understood=(f"{path}: {what}, to test on",), protocols={"test": protocol}
    )


def _whole(source: str | os.PathLike[str], columns: Columns, images: str | os.PathLike[str] | None) -> Any:
    """All images of a source as one set: a shift, or the test set from elsewhere."""
    path = Path(os.fspath(source)).expanduser()
    if path.is_dir() and not (path / "train").is_dir() and not any(path.glob("metadata.*")) and not is_objectnet(path):
        return _tree(path)[0]
    data = _open(source, columns, images, 0, False)
    found = [part for part in (data.train, data.validation, data.test) if part is not None]
    if len(found) > 1:
        raise ValueError(
            f"{source}: holds several sets ({', '.join(data.sets())}); expected one: name the folder of one"
        )
    return found[0]


def _ood(source: str | os.PathLike[str], columns: Columns, images: str | os.PathLike[str] | None) -> Any:
    path = Path(os.fspath(source)).expanduser()
    return unlabelled(path) if path.is_dir() else _whole(source, columns, images)


def _with_validation(data: Data, seed: int) -> Data:
    """Where there is none, a part of the training images, the same share of every class."""
    if data.validation is not None or data.train is None or not data.classes:
        return data
    kept, held_out = stratified(data.train.labels, VALIDATION_SHARE, seed)
    told = f"no validation set: {len(held_out)} of {len(data.train)} training images are held out by seed {seed}"
    return replace(
        data,
        train=data.train.subset(kept),
        validation=data.train.subset(held_out),
        understood=(*data.understood, told),
    )


def stratified(labels: Tensor, share: float, seed: int, family: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two sets of indices, ascending, the second a `share` of every class: a function of (labels, share, seed).

    Images of one `family` (N,), the place of its first image, stay together, in that image's class. A class of at least
    two families keeps one on either side; the only image, or family, of a class stays in the first set.
    """
    family = torch.arange(len(labels)) if family is None else family
    second = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        heads = family.unique()
        heads = heads[labels[heads] == label]
        if len(heads) < 2:
            continue
        wanted = max(1, round(share * int((labels == label).sum())))
        order = heads[torch.randperm(len(heads), generator=stateless_generator(seed, "split", label))]
        taken = 0
        for head in order[:-1].tolist():  # the last stays
            members = family == head
            size = int(members.sum())
            if taken == 0 or taken + size <= wanted:
                second |= members
                taken += size
            if taken >= wanted:
                break
    return (~second).nonzero().squeeze(1), second.nonzero().squeeze(1)


def split_tree(root: Path, *, seed: int = 0, near_duplicates: bool = True, on_error: OnError = "raise") -> Data:
    """A tree of class folders as train, validation and test; copies and near-copies of an image on one side.

    An image that cannot be read and is to be skipped has no copies."""

    def seen(file: Path | Member) -> Look:
        try:
            return look(read_file(file))
        except (DamagedImageError, OSError):
            if on_error == "raise":
                raise
            return Look(str(file), np.zeros(SIDE * SIDE, dtype=np.float32))

    tree = class_tree(root)
    family, told = None, ""
    if near_duplicates:
        files = [file for file, _ in tree.samples]
        family = copies(list(in_order_of(files, seen, reading_workers(tree, len(files)))))
        families = len(family.unique())
        if families < len(tree):
            told = f", {len(tree) - families} (near-)copies on the side of their first"
    rest, test = stratified(tree.labels, TEST_SHARE, seed, family)
    kept, held_out = stratified(
        tree.labels[rest],
        VALIDATION_SHARE / (1 - TEST_SHARE),
        seed + 1,
        None if family is None else _places(family[rest]),
    )
    understood = f"{root}: class folders, split by seed {seed} into train, validation and test{told}"
    return Data(
        tree.subset(rest[kept]),
        tree.subset(rest[held_out]),
        tree.subset(test),
        tree.classes,
        understood=(understood,),
        root=root,
    )


def _places(family: Tensor) -> Tensor:
    """Families by the place of their first image, of families by any number."""
    first: dict[int, int] = {}
    return torch.tensor([first.setdefault(number, place) for place, number in enumerate(family.tolist())])


def _by_place(classes: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    if len(names) != len(classes):
        raise ValueError(f"class_names holds {len(names)} names for {len(classes)} classes, {few(classes)}")
    return dict(zip(classes, names, strict=True))


def _known(part: Any, names: Mapping[str, str]) -> dict[str, str]:
    return {name: names.get(name, name) for name in part.classes}
