"""What a data set may be, and what a batch of one is. All that reads images reads them here.

A data set is any of
    (images, labels)                     tensors (N, C, H, W), already normalised for the model, and (N,); also as
                                         {"image": ..., "label": ..., further columns of N rows}, or a TensorDataset
    object with .tensors(mean, std)      either of these, normalised by the statistics of the model
    map-style data set                   items (image, label), torchvision's convention, (image, text), or {"image":
                                         ..., "label" / "text": ...}; a transform makes an image a tensor

and may tell more: `.classes`, what its labels mean (`robustft.data.classes`), by which labels become those of a method
or a predictor; `.groups` (N,) go along as the column "group"; `.fingerprint`, a string or a function that gives one,
tells it from others. Where a method's image tower is frozen, unit features (N, D) may stand for the images.

Torch's `Subset` and `ConcatDataset` tell what the data sets in them tell (`robustft.data.wrappers`).

One whose `.on_error` is "skip" is read without the images that cannot be read: each counts in `Source.skipped`, and a
warning says how many and which. In order, the others keep their order and their own labels. In training, the next image
that can be read takes its place in the batch, so that batches stay whole and are a function of the files, whichever
process reads them. It is an error where no image can be read.

A batch is (images, labels), (images, texts) or {"image": ..., "label" and / or "text": ...}. A dictionary may carry
more, which the methods that know it take and the others leave: "group" (N,), "core" (N,) or (N, K).
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robustft.data import wrappers
from robustft.data.classes import Matching, matching_of
from robustft.data.images import DamagedImageError, Skipped
from robustft.data.pixels import Statistics, warning_of_raw_pixels
from robustft.data.seeds import stateless_seed
from robustft.data.wrappers import groups_of, told
from robustft.ops.kinds import array, checked, described, held
from robustft.ops.processes import ALONE, Processes

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Transform = Callable[[Any], Tensor]


class Source:
    """A data set of any kind, asked the same questions.

    Args:
        data: as above.
        model: whose image statistics a data set with `.tensors(mean, std)` is given.
        transform: makes an item's image a tensor; where given, it is preferred to `.tensors`.
        name: what errors call the data.
        classes: those that labels are to mean; matched by name where the data set tells the names of its own. Whose
            they are, messages call `of`.

    TypeError for what is no data set, ValueError for an empty one.
    """

    def __init__(
        self,
        data: Any,
        model: Any = None,
        transform: Transform | None = None,
        *,
        name: str = "dataset",
        classes: Sequence[str] | None = None,
        of: str = "the model",
    ) -> None:
        self.matching = None if classes is None else matching_of(data, classes, of=of)
        self.name, self.transform, self.statistics = name, transform, stated_by(model)
        self.groups = groups_of(data)
        if takes_statistics(data, transform):
            data = data.tensors(*image_statistics(model))
        if isinstance(data, (Tensor, str, bytes)):
            raise TypeError(f"{name} must be (images, labels) or a data set, got {described(data)}")
        self.columns = _columns(data, name)
        if self.columns is not None and held(f"{name}'s images", self.columns["image"]).ndim == 0:
            raise ValueError(f"{name}'s images are one number; expected (N, C, H, W)")
        if self.columns is not None and self.groups is not None:
            data = self.columns = {"group": self.groups, **self.columns}
        if self.columns is not None and self.matching is not None and isinstance(self.columns.get("label"), Tensor):
            self.columns = self.columns | {"label": self.matching.of(self.columns["label"])}
        self.data = data
        self.skips = wrappers.skips(data)
        self.skipped: dict[int, Skipped] = {}
        self.streams = isinstance(data, torch.utils.data.IterableDataset)
        if self.streams:
            return
        if self.columns is None and not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise TypeError(
                f"{name} must be (images, labels) tensors, have .tensors(mean, std), or be a map-style data set "
                f"of (image, label) items, got {type(data).__name__}"
            )
        if len(self) == 0:
            raise ValueError(f"{name} is empty")

    def __len__(self) -> int:
        return len(self.data if self.columns is None else self.columns["image"])

    def in_order(
        self, batch_size: int, workers: int | None = None, start: int = 0, turns: Processes = ALONE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (n, C, H, W), floating point, and labels (n,) int64, from the row `start` to the last; a warning where
        the images are plainly pixels, not normalised ones. Items are made by `workers` processes, None: as
        `reading_workers` says; the same whatever their number. With `turns`, those batches of which it is this
        process's turn."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        pair = None if self.columns is None else _image_tensors(self.columns, self.name)
        if pair is not None and self.transform is not None:
            raise ValueError("transform must be None for images that are tensors already: they are taken as they are")
        if self.streams:
            streamed = itertools.islice(self._stream(batch_size), turns.rank, None, turns.count)
            return warning_of_raw_pixels(streamed, self.statistics)
        starts = range(start + turns.rank * batch_size, len(self), turns.count * batch_size)
        found: Iterator[tuple[Tensor, Tensor]]
        if pair is not None:
            images, labels = pair
            found = ((images[i : i + batch_size], labels[i : i + batch_size].long()) for i in starts)
        else:
            found = self._read(batch_size, reading_workers(self.data, len(self) - start, workers), starts, turns)
        return warning_of_raw_pixels(found, self.statistics)

    def _stream(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of an iterable data set, holding one batch at a time."""
        pairs: list[tuple[Any, int]] = []
        number = -1
        for number, item in enumerate(self.data):
            pairs.append(image_and_label(item, f"{self.name}[{number}]"))
            if len(pairs) == batch_size:
                yield self._batch(pairs)
                pairs = []
        if pairs:
            yield self._batch(pairs)
        if number < 0:
            raise ValueError(f"{self.name} is empty")

    def _read(self, batch_size: int, workers: int, starts: range, turns: Processes) -> Iterator[tuple[Tensor, Tensor]]:
        part = batch_size if workers == 0 else min(batch_size, READ_TOGETHER)
        whole = [range(first, min(first + batch_size, len(self))) for first in starts]
        spans = [
            range(start, min(start + part, batch.stop))
            for batch in whole
            for start in range(batch.start, batch.stop, part)
        ]
        ends = {batch.stop for batch in whole}
        if workers == 0:
            for span in spans:
                items, skipped = self._items(span)
                self._note(skipped)
                if items is not None:
                    yield items
                elif turns.count > 1:
                    raise self._all_unreadable(span)
            self._tell_skipped()
            return
        loader = torch.utils.data.DataLoader(
            _Spans(self, spans),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # else it draws from the caller's
        )
        images: list[Tensor] = []
        labels: list[Tensor] = []
        for span, found in zip(spans, loader, strict=True):
            if isinstance(found, Exception):
                raise found
            items, skipped = found
            self._note(skipped)
            if items is not None:
                images.append(items[0])
                labels.append(items[1])
            if images and span.stop in ends:
                yield torch.cat(images), torch.cat(labels)
                images, labels = [], []
            elif turns.count > 1 and span.stop in ends:
                raise self._all_unreadable(span)
        self._tell_skipped()

    def _all_unreadable(self, span: range) -> ValueError:
        """A process whose turn passed without a word would shift the rows of all that come after."""
        return ValueError(
            f"{self.name}: none of the images {span.start} to {span.stop - 1} can be read: several processes need one "
            "in each batch; read them by one process"
        )

    def _note(self, skipped: Sequence[Skipped]) -> None:
        self.skipped |= {one.row: one for one in skipped}
        if len(self.skipped) == len(self):
            raise ValueError(f"{self.name}: none of its {len(self)} images can be read: {skipped[0].error}")

    def _tell_skipped(self) -> None:
        if self.skipped:
            shown = "; ".join(one.error for one in list(self.skipped.values())[:SHOWN_SKIPPED])
            more = "; ..." if len(self.skipped) > SHOWN_SKIPPED else ""
            warnings.warn(
                f"{self.name}: {len(self.skipped)} of {len(self)} images could not be read and were skipped: "
                f"{shown}{more}",
                stacklevel=1,  # at this line, not the caller's, so that it is said once
            )

    def _items(self, rows: Sequence[int]) -> tuple[tuple[Tensor, Tensor] | None, list[Skipped]]:
        """Images and labels of the items at `rows`, None where none can be read; and those that are skipped."""
        pairs, skipped = [], []
        for row in rows:
            try:
                pairs.append(image_and_label(self.data[row], f"{self.name}[{row}]"))
            except (DamagedImageError, OSError) as error:
                if not wrappers.skips_row(self.data, row):
                    raise
                skipped.append(Skipped(row, str(error)))
        return (self._batch(pairs) if pairs else None), skipped

    def _batch(self, pairs: Sequence[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
        images = [image if self.transform is None else self.transform(image) for image, _ in pairs]
        if not isinstance(images[0], Tensor) or not images[0].is_floating_point():
            got = images[0].dtype if isinstance(images[0], Tensor) else type(images[0]).__name__
            raise TypeError(f"images must be floating point tensors, got {got}: pass the model's transform")
        labels = torch.tensor([label for _, label in pairs])
        return torch.stack(images), labels if self.matching is None else self.matching.of(labels)

    def batches(
        self, chunks: Iterable[tuple[int, Tensor]], *, seed: int, workers: int = 0, pinned: bool = False
    ) -> Iterator[Any]:
        """The batch of each (epoch, indices), in the form in which the data set has its samples.

        Whatever an item draws from torch's, numpy's or Python's global generators is a function of (seed, epoch,
        index), in whichever of the `workers` processes it is made. They stay from epoch to epoch, two batches ahead
        each. pinned: in memory from which a GPU copies by itself.
        """
        if self.columns is not None:
            parts = self.columns
            chosen = ({key: part[chunk.to(part.device)] for key, part in parts.items()} for _, chunk in chunks)
            named = isinstance(self.data, Mapping)
            return warning_of_raw_pixels((b if named else tuple(b.values()) for b in chosen), self.statistics)
        loader = torch.utils.data.DataLoader(
            _Seeded(self.data, self.groups, self.matching, seed, self.skips),
            batch_sampler=([(epoch, index) for index in chunk.tolist()] for epoch, chunk in chunks),
            num_workers=workers,
            worker_init_fn=_ignore_interrupt,
            pin_memory=pinned,
            collate_fn=_with_skipped if self.skips else None,
        )
        return warning_of_raw_pixels(self._noted(loader) if self.skips else iter(loader), self.statistics)

    def _noted(self, loader: Iterable[tuple[Any, list[Skipped]]]) -> Iterator[Any]:
        before = len(self.skipped)
        try:
            for batch, skipped in loader:
                self._note(skipped)
                yield batch
        finally:  # also where training ends before the data do
            if len(self.skipped) > before:
                self._tell_skipped()

    def check_training(self, classes: int, features: bool = False) -> dict[str, Any]:
        """Checks tensors as `unpack` checks a batch of them; gives what a resumed run must find the same.

        ValueError for tensors without labels, labels out of [0, classes), images that are not finite and columns
        without a row for each image. Items are looked at when they are loaded.
        """
        if self.streams:
            raise TypeError(
                f"{self.name} must be (images, labels) tensors, have .tensors(mean, std), or be a map-style data set, "
                f"to be shuffled, got an iterable {type(self.data).__name__}"
            )
        if self.columns is None:
            matched = {}
            if self.matching is not None and self.matching.changes:
                matched = {"classes_of_labels": list(self.matching.classes_of_labels)}
            return {"samples": len(self)} | matched
        named = isinstance(self.data, Mapping)
        images, labels, _ = unpack(self.columns if named else tuple(self.columns.values()), features)
        if labels is None:
            raise ValueError("data of tensors must hold images and labels: labels (n,) of class indices")
        further = {key: column(self.columns, key, images) for key in self.columns if key != "image"}
        check_labels(labels, classes)
        finite = images.flatten(1).isfinite().all(1)
        if not finite.all():
            raise ValueError(f"images must be finite: image {int(finite.logical_not().nonzero()[0])} is not")
        described = {"samples": len(images), "image_shape": list(images.shape[1:]), "labels": _digest(labels.long())}
        digests = {key: _digest(part) for key, part in further.items() if part is not None and key != "label"}
        return described | ({"columns": digests} if digests else {})


SHOWN_SKIPPED = 3
"""Images that a warning of skipped ones names."""
READ_TOGETHER = 32
"""Images that a worker hands over at a time: larger parts fill the shared memory of a container."""
FILES_FOR_WORKERS = 256
"""Fewer are read before workers would have started."""


def reading_workers(data: Any, count: int, workers: int | None = None) -> int:
    """How many processes read `count` items of a data set in order.

    `workers` itself; where it is None, what the data set's own `workers` says; where that is None too, one a core, at
    most 8, for `FILES_FOR_WORKERS` items or more. A data set that has no attribute `workers` is read in this process:
    an open archive or a connection in it would be torn between several.
    """
    workers = told(data, "workers", 0) if workers is None else workers
    if workers is not None:
        check_workers(workers)
        return int(workers)
    if count < FILES_FOR_WORKERS or multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(cores, 8) if cores > 1 else 0


def image_and_label(item: Any, what: str) -> tuple[Any, int]:
    """Both of a data set's item; TypeError, naming the item as `what`, for any other thing."""
    try:
        image, label = (item["image"], item.get("label", -1)) if isinstance(item, Mapping) else (item[0], item[1])
        return image, int(label)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise TypeError(
            f'{what} is {described(item)}; expected (image, label), or {{"image": ..., "label": ...}}, with a label '
            "that is an integer"
        ) from error


@checked
def batches(
    dataset: Any,
    model: Any = None,
    transform: Transform | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    skipped: list[Skipped] | None = None,
    turns: Processes = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A whole data set in order as batches of images (n, C, H, W), floating point, and labels (n,) int64.

    `dataset` as `robustft.data.sources` says. `model` gives the image statistics for data sets with `.tensors(mean,
    std)`; `transform` turns an item's image into a tensor, and is preferred to the statistics where given. TypeError
    for what is no data set and for images that are no tensors after `transform`; ValueError when empty. `workers` as in
    `reading_workers`. A list `skipped` receives, at the end, the images that were skipped. `turns` as in
    `Source.in_order`.
    """
    source = Source(dataset, model, transform)
    found = source.in_order(batch_size, workers, turns=turns)
    return found if skipped is None else _with_those_skipped(found, source, skipped)


def _with_those_skipped(found: Iterator[Any], source: Source, skipped: list[Skipped]) -> Iterator[Any]:
    yield from found
    skipped += source.skipped.values()


def image_batches(data: Any, model: Any = None, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor | None]]:
    """As `batches`, and images (N, C, H, W) alone, whose labels are None."""
    if isinstance(data, Tensor):
        if held("images", data).ndim != 4 or batch_size < 1:
            raise ValueError(
                f"images is {described(data)}, in batches of {batch_size}; expected (N, C, H, W), at least 1"
            )
        return ((images, None) for images in data.split(batch_size))
    return iter(batches(data, model, batch_size=batch_size))


def takes_statistics(data: Any, transform: Transform | None = None) -> bool:
    """Whether a data set normalises its own images: a transform that is asked for is run instead."""
    return transform is None and callable(getattr(data, "tensors", None))  # a TensorDataset's `tensors` is a tuple


def image_statistics(model: Any) -> Statistics:
    """(mean, std) per channel that an open_clip model, or one inside a classifier, was built with.

    ValueError when the model does not say: images normalised in another way than in pre-training are no error that
    anything would notice.
    """
    if statistics := stated_by(model):
        return statistics
    raise ValueError(
        "the model carries no image statistics; open_clip's factories and robustft.clip.load set them "
        "(open_clip.set_model_preprocess_cfg does for a model of one's own), or pass (images, labels) tensors"
    )


def stated_by(model: Any) -> Statistics | None:
    """(mean, std) of an open_clip model, or of the first one inside a predictor; None where it does not say."""
    for owner in (model, getattr(model, "model", None)):
        for module in owner.modules() if isinstance(owner, nn.Module) else ():
            if statistics := stated_statistics(getattr(module, "visual", None)):
                return statistics
    return None


def stated_statistics(tower: Any) -> Statistics | None:
    """(mean, std) per channel that open_clip's factories leave on an image tower, None where there are none."""
    stated = getattr(tower, "preprocess_cfg", None) or {}
    mean, std = (stated.get(key, getattr(tower, f"image_{key}", None)) for key in ("mean", "std"))
    return None if mean is None or std is None else (tuple(map(float, mean)), tuple(map(float, std)))


def fingerprint(dataset: Any) -> str:
    """SHA-256, in hexadecimal, of what tells a data set from others, its transforms left aside.

    ValueError where nothing does: give the data set a `fingerprint` attribute.
    """
    digest = hashlib.sha256()
    own = getattr(dataset, "fingerprint", None)
    columns = _columns(dataset, "dataset")
    if own is not None:
        digest.update(str(own() if callable(own) else own).encode())
    elif columns is not None:
        for tensor in _image_tensors(columns, "dataset"):
            _hash_array(digest, tensor)
    elif isinstance(dataset, torch.utils.data.Subset):
        digest.update(f"{fingerprint(dataset.dataset)}{[int(index) for index in dataset.indices]}".encode())
    elif isinstance(dataset, torch.utils.data.ConcatDataset):
        digest.update(" ".join(fingerprint(part) for part in dataset.datasets).encode())
    elif hasattr(dataset, "samples"):
        for file, label in dataset.samples:
            status = os.stat(file)
            digest.update(f"{file}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    elif hasattr(dataset, "data") and hasattr(dataset, "targets"):
        for array in (dataset.data, dataset.targets):
            _hash_array(digest, torch.as_tensor(np.asarray(array)))
    else:
        raise ValueError(
            f"a {type(dataset).__name__} cannot be told from other data sets: give it a `fingerprint` "
            "attribute (a string that changes with its images), or encode without cache"
        )
    return digest.hexdigest()


ROW_BYTES = 16


def row_fingerprints(dataset: Any) -> Tensor:
    """(N, 16) bytes of what tells each image, with its label, from others, also in a subset of the data set.

    A file is told by path, size and time of change, an image of another set by the set's `fingerprint` and its place.
    """
    digests = (hashlib.blake2b(row.encode(), digest_size=ROW_BYTES).digest() for row in _row_keys(dataset))
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, ROW_BYTES).copy())


def _row_keys(dataset: Any) -> list[str]:
    if isinstance(dataset, torch.utils.data.Subset):
        inner = _row_keys(dataset.dataset)
        return [inner[index] for index in dataset.indices]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return [row for part in dataset.datasets for row in _row_keys(part)]
    if (samples := getattr(dataset, "samples", None)) is not None:
        return [_file_key(file, label) for file, label in samples]
    whole, columns = fingerprint(dataset), _columns(dataset, "dataset")
    return [f"{whole}\0{place}" for place in range(len(dataset if columns is None else columns["image"]))]


def _file_key(file: Any, label: int) -> str:
    archive, offset = getattr(file, "archive", file), getattr(file, "offset", 0)  # of a file inside an archive
    try:
        status = os.stat(archive)
    except OSError:
        return f"{file}\0missing"
    return f"{file}\0{offset}\0{label}\0{status.st_size}\0{status.st_mtime_ns}"


class Batch(NamedTuple):
    """Images (N, C, H, W), labels (N,) or None, texts (captions or their tokens (N, L)) or None."""

    images: Tensor
    labels: Tensor | None
    texts: Sequence[str] | Tensor | None


MOST_WORKERS = 512
"""Processes that may load data: many more than any machine keeps busy, and fewer than bring it down."""


def check_workers(workers: int) -> None:
    """ValueError unless so many processes can be started; TypeError for what is no number of them."""
    if isinstance(workers, bool) or not isinstance(workers, (int, np.integer)):
        raise TypeError(f"workers is {described(workers)}; expected an integer")
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    if workers > MOST_WORKERS:
        raise ValueError(f"workers is {workers}; expected at most {MOST_WORKERS} processes")


HOST = "_labels_on_host"


def check_labels(labels: Tensor, classes: int) -> None:
    """ValueError unless every label lies in [0, classes)."""
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        raise ValueError(f"labels must lie in [0, K) with K = {classes} classes, got {bad}")


def column(batch: Any, name: str, images: Tensor) -> Tensor | None:
    """A further tensor of a dictionary batch, one row for each image, on their device; None where there is none."""
    if not isinstance(batch, Mapping) or name not in batch:
        return None
    value = batch[name]
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(images):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f'batch["{name}"] must be a tensor with a row for each of the {len(images)} images, got {got}')
    return value.to(images.device)


def unpack(batch: Any, features: bool = False) -> Batch:
    """The parts of a batch, checked as far as they can be without a model; `features` (N, D) may stand for images."""
    if isinstance(batch, Mapping):
        if "image" not in batch or not ({"label", "text"} & batch.keys()):
            raise ValueError(f'batch must have "image" and "label" or "text", got the keys {sorted(batch)}')
        images, labels, texts = batch["image"], batch.get("label"), batch.get("text")
    elif isinstance(batch, Sequence) and len(batch) == 2:
        images, target = batch
        is_labels = isinstance(target, Tensor) and target.ndim < 2
        labels, texts = (target, None) if is_labels else (None, target)
    else:
        raise TypeError(
            f"batch must be (images, labels), (images, texts) or a dictionary, got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
        )
    if not isinstance(images, Tensor) or not (images.ndim == 4 or features and images.ndim == 2):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor (N, C, H, W){' or features (N, D)' * features}, got {got}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point (apply the model's transform first), got {images.dtype}")
    if len(images) == 0:
        raise ValueError("batch is empty")
    if labels is not None:
        dtype = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        if dtype not in INTEGERS:
            raise TypeError(f"labels must be an integer tensor (N,), got {dtype}")
        if labels.shape != (len(images),):
            raise ValueError(f"labels must have shape ({len(images)},), one for each image, got {tuple(labels.shape)}")
    if texts is not None:
        if isinstance(texts, str) or not isinstance(texts, (Tensor, Sequence)):
            raise TypeError(f"texts must be a list of captions or their tokens (N, L), got {type(texts).__name__}")
        if isinstance(texts, Tensor) and (texts.ndim != 2 or texts.dtype not in INTEGERS):
            raise TypeError(f"text tokens must be integers (N, L), got {texts.dtype} of shape {tuple(texts.shape)}")
        if len(texts) != len(images):
            raise ValueError(f"there must be one text for each of the {len(images)} images, got {len(texts)}")
    return Batch(images, labels, texts)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device; `on_host` finds where its labels came from."""
    match batch:
        case Tensor():
            moved = batch.to(device, non_blocking=True)
            if moved is not batch and batch.ndim <= 1 and not batch.is_floating_point() and batch.device.type == "cpu":
                setattr(moved, HOST, batch)
            return moved
        case tuple() | list() if batch and not isinstance(batch[0], str):
            return tuple(to_device(part, device) for part in batch)
        case dict():
            return {key: to_device(part, device) for key, part in batch.items()}
    return batch


def on_host(labels: Tensor) -> Tensor:
    """The same labels on the CPU, if `to_device` moved them and they were not written since; else as they are.

    To check them, or to draw by them, an accelerator need not be waited for.
    """
    host = getattr(labels, HOST, None)
    return labels if host is None or labels._version else host


def in_parts(batch: Any, parts: int) -> list[Any]:
    """A batch cut by rows into at most so many, of one length but the last."""
    rows = len(batch["image"] if isinstance(batch, Mapping) else batch[0])
    size = -(-rows // parts)
    spans = [slice(first, first + size) for first in range(0, rows, size)]
    if isinstance(batch, Mapping):
        return [{name: value[span] for name, value in batch.items()} for span in spans]
    return [tuple(value[span] for value in batch) for span in spans]


class _Seeded(torch.utils.data.Dataset[Any]):
    """A data set whose augmentation is a function of (seed, epoch, index), in whichever process it runs."""

    def __init__(self, data: Any, groups: Any, matching: Matching | None, seed: int, skips: bool) -> None:
        self.data, self.groups, self.matching, self.seed, self.skips = data, groups, matching, seed, skips

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        number = stateless_seed(self.seed, "sample", epoch, index)
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        return self._readable(index) if self.skips else self._item(index)

    def _readable(self, index: int) -> tuple[Any, list[Skipped]]:
        """The item, or the next one that can be read; and what was skipped until there."""
        skipped: list[Skipped] = []
        for place in (*range(index, len(self)), *range(index)):
            try:
                return self._item(place), skipped
            except (DamagedImageError, OSError) as error:
                if not wrappers.skips_row(self.data, place):
                    raise
                skipped.append(Skipped(place, str(error)))
        raise ValueError(f"none of the {len(self)} images can be read: {skipped[0].error}")

    def _item(self, index: int) -> Any:
        item = self.data[index]
        if isinstance(item, Mapping):
            known = {} if self.groups is None else {"group": self.groups[index]}
            return known | dict(item) | ({"label": self._class_of(item["label"])} if "label" in item else {})
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(f"data[{index}] is {described(item)}; expected (image, label), (image, text) or a mapping")
        image, target = item
        is_label = isinstance(target, (int, np.integer)) or isinstance(target, Tensor) and target.ndim == 0
        target = self._class_of(target) if is_label else target
        if self.groups is None:
            return image, target
        return {"image": image, "label" if is_label else "text": target, "group": self.groups[index]}

    def _class_of(self, label: Any) -> Any:
        return label if self.matching is None else int(self.matching.of(torch.tensor([int(label)])))


def _with_skipped(items: Sequence[tuple[Any, list[Skipped]]]) -> tuple[Any, list[Skipped]]:
    batch = torch.utils.data.default_collate([item for item, _ in items])
    return batch, [one for _, skipped in items for one in skipped]


def in_order_of(items: Sequence[Any], function: Callable[[Any], Any], workers: int) -> Iterator[Any]:
    """A function of each item, such as of each file, in their order, by so many processes; its errors are its own."""
    if workers == 0:
        yield from map(function, items)
        return
    loader = torch.utils.data.DataLoader(
        _Applied(items, function),
        batch_size=16,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),
    )
    for found in itertools.chain.from_iterable(loader):
        if isinstance(found, Exception):
            raise found
        yield found


class _Applied(torch.utils.data.Dataset[Any]):
    def __init__(self, items: Sequence[Any], function: Callable[[Any], Any]) -> None:
        self.items, self.function = items, function

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.function(self.items[index])
        except Exception as error:
            return error


class _Spans(torch.utils.data.Dataset[Any]):
    """Parts of a source, each read at once. What goes wrong is handed over as it is: a loader would wrap it."""

    def __init__(self, source: Source, spans: Sequence[range]) -> None:
        self.source, self.spans = source, spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor] | None, list[Skipped]] | Exception:
        try:
            return self.source._items(self.spans[index])
        except Exception as error:
            return error


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the loop still wants the batch in flight.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _columns(data: Any, name: str) -> dict[str, Any] | None:
    """{"image": ..., "label": ...} of a data set that is tensors; None of one that has items."""
    if isinstance(data, Mapping):
        if not isinstance(data.get("image"), Tensor):
            raise TypeError(f'{name} of tensors must hold "image", a tensor, got the keys {sorted(data)}')
        return dict(data)
    if isinstance(data, torch.utils.data.TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        return {"image": data[0], "label": data[1]}
    return None


def _image_tensors(columns: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    images, labels = held(f"{name}'s images", columns["image"]), array(f"{name}'s labels", columns.get("label", []))
    if not images.is_floating_point() or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name} must be images (N, C, H, W), floating point, and labels (N,), got "
            f"{tuple(images.shape)} {images.dtype} and {tuple(labels.shape)}"
        )
    return images, labels


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()[:16]


def _hash_array(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tuple(tensor.shape)}:{tensor.dtype}".encode())
    digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
