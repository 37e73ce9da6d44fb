"""Encode once, keep, reuse: the features of a data set under one model, on disk under a key that says what
they are.

    key = sha256(model, data set, transforms, dtype)    ->    u (N, D), labels (N,) in the files of `robustft.clip.kept`

Zero-shot heads, ensembles, temperatures, OOD scores and linear probes all run from the same features. The key
holds whatever the features depend on, so a second checkpoint never meets the first one's features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustft.clip.encoding import encode_images
from robustft.clip.kept import Kept, Known
from robustft.clip.loading import move
from robustft.clip.outputs import evaluating
from robustft.clip.weights import fingerprint as model_fingerprint
from robustft.data.classes import ClassNames, class_names
from robustft.data.images import Skipped
from robustft.data.sources import Source, fingerprint, image_statistics, row_fingerprints, takes_statistics
from robustft.ops.kinds import checked
from robustft.ops.processes import current

# The parts of open_clip's evaluation transforms: deterministic, and told wholly by their attributes.
STANDARD_TRANSFORMS = frozenset(
    {f"torchvision.transforms.transforms.{name}" for name in ("CenterCrop", "Normalize", "Resize", "ToTensor")}
    | {f"open_clip.transform.{name}" for name in ("CenterCropOrPad", "MaybeConvertMode", "MaybeToTensor")}
    | {f"open_clip.transform.{name}" for name in ("ResizeKeepRatio", "_convert_to_rgb")}
)

SECONDS_BETWEEN_PARTS = 60.0
"""What a kill can lose of an extraction with a cache."""


@dataclass(frozen=True)
class Features:
    """Unit image features (N, D) in float32 with their labels (N,) int64 and, where a classifier was at hand,
    logits (N, K); the images of the set that could not be read, which have no row; and the names of the classes that
    labels mean, where the set tells them (`robustft.data.classes`)."""

    image_features: Tensor
    labels: Tensor
    logits: Tensor | None = None
    skipped: tuple[Skipped, ...] = ()
    classes: ClassNames | None = None

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
@checked
def encode(
    model: nn.Module,
    dataset: Any,
    *,
    transform: Callable[[Any], Tensor] | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    cache: str | Path | None = None,
    transform_key: str | None = None,
    progress: bool = False,
) -> Features:
    """Unit image features of a data set, on the CPU in float32, in the data set's order; no gradient.

    `dataset` is any of what `robustft.data.sources` names. The model is moved to `device` (default: where it is),
    runs in evaluation mode and gets its modes back. `dtype` float32 runs it as it is, bfloat16 or float16 under
    autocast. `cache` is a folder; a file found there is used instead of the model. It needs a data set that can be
    told from others: tensors, `.fingerprint`, `.samples` (files, told by path, size and time of change) or `.data`
    and `.targets`; or a `Subset` or `ConcatDataset` of such. Images that the cache knows from another set, one that
    holds this one or that this one has grown from, are not encoded again. What is done is written every minute, so that
    a killed process goes on where it was.

    `transform_key` names what the transforms do, and has to change with them. It is needed with `cache` when
    `transform`, or the data set's own `transform`, `target_transform` or `transforms`, is anything but None or
    torchvision's Compose of `STANDARD_TRANSFORMS`, which is what open_clip's evaluation transforms are: a function,
    a Lambda or a random crop cannot be told from others.

    Images that the data set wants skipped (`robustft.data.open`, on_error) have no row, and nothing is kept in the
    cache then: they may be whole the next time. A damaged file of the cache is replaced with a warning. ValueError
    for NaN or infinite features, an empty data set, and, when `cache` is given, a data set or transform that cannot
    be told from others. Memory: N (D + 2) floats. Processes that do it together (`robustft.ops.processes.together`)
    encode some of the batches each, and have the features of all; the main one alone writes to the cache.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    kept, turns = None, current()
    if cache is not None:
        if isinstance(dataset, torch.utils.data.IterableDataset):
            raise ValueError(
                f"cache goes with a data set whose images can be told one from the other, and an iterable "
                f"{type(dataset).__name__} has no places: encode it without cache"
            )
        statistics = image_statistics(model) if takes_statistics(dataset, transform) else None
        transforms = _transforms(dataset, transform, transform_key)
        of = model_fingerprint(model), transforms, repr(statistics), str(dtype)
        kept = Kept.under(Path(cache), of, fingerprint(dataset), row_fingerprints(dataset))
        if (stored := turns.of_main(kept.whole)) is not None:
            return Features(*stored, classes=class_names(dataset))
        if (gathered := turns.of_main(kept.gathered)) is not None:
            known, have = gathered
            if bool(have.all()):
                return Features(*known, classes=class_names(dataset))
            if statistics is None:
                again = partial(
                    encode,
                    model,
                    transform=transform,
                    batch_size=batch_size,
                    device=device,
                    dtype=dtype,
                    cache=cache,
                    transform_key=transform_key,
                    progress=progress,
                )
                return _completed(dataset, known, have, again)

    device = torch.device(device) if device is not None else _device(model)
    move(model, device)
    source = Source(dataset, model, transform)
    done: list[Known] = [] if kept is None else turns.of_main(partial(list, kept.parts()))
    start = fresh = sum(len(part.labels) for part in done)
    batches = source.in_order(batch_size, start=start, turns=turns)
    written = time.monotonic()
    new: list[Known] = []
    unkept = False  # an image was skipped

    def made() -> Iterator[tuple[Known, bool]]:
        for images, target in batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                encoded = encode_images(model, images.to(device))
            yield Known(encoded.float().cpu(), target), bool(source.skipped)

    with evaluating(model):
        if progress and turns.main:
            batches = _shown(batches, None if source.streams else -(-(len(source) - start) // batch_size))
        for known_now, skips in turns.in_turns(made()):
            new.append(known_now)
            start += len(known_now.labels)
            unkept |= skips
            if kept is not None and turns.main and not unkept and time.monotonic() - written >= SECONDS_BETWEEN_PARTS:
                kept.keep_part(fresh, _joined(new))
                done, new, fresh, written = [*done, *new], [], start, time.monotonic()
    whole = _joined([*done, *new])
    result = Features(*whole, skipped=tuple(turns.merged(source.skipped.values())), classes=class_names(dataset))
    bad = int((~result.image_features.isfinite()).any(1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(result)} image features hold NaN or infinity: check the weights "
            f"and, if the images are fine, encode with another dtype than {dtype}"
        )
    if kept is not None and turns.main and not result.skipped:
        kept.finish(whole)
    return result


def _joined(parts: Sequence[Known]) -> Known:
    return Known(torch.cat([part.image_features for part in parts]), torch.cat([part.labels for part in parts]))


def _completed(dataset: Any, known: Known, have: Tensor, encode_rest: Callable[[Any], Features]) -> Features:
    """The features of a set of which some are known; the others are encoded as a subset, and kept as one."""
    places = (~have).nonzero()[:, 0]
    rest = dataset.subset(places) if hasattr(dataset, "subset") else torch.utils.data.Subset(dataset, places.tolist())
    found = encode_rest(rest)
    lost = {int(places[one.row]): one for one in found.skipped}
    read = torch.tensor([place for place in places.tolist() if place not in lost], dtype=torch.int64)
    known.image_features[read], known.labels[read] = found.image_features, found.labels
    rows = torch.tensor([row for row in range(len(have)) if row not in lost])
    skipped = tuple(one._replace(row=row) for row, one in lost.items())
    features, labels = known.image_features[rows], known.labels[rows]
    return Features(features, labels, skipped=skipped, classes=class_names(dataset))


def _transforms(dataset: Any, transform: Any, transform_key: str | None) -> str:
    """All transforms between a data set's files and the model, in words."""
    found = {"transform": transform, **_own_transforms(dataset)}
    words = {name: _describe(value) for name, value in found.items()}
    unclear = [f"{name} ({type(found[name]).__name__})" for name, told in words.items() if told is None]
    if unclear and transform_key is None:
        raise ValueError(
            f"{' and '.join(unclear)} cannot be told from other transforms: pass transform_key, a string that changes "
            "with what it does, or encode without cache"
        )
    while isinstance(dataset, torch.utils.data.Subset) and not hasattr(dataset, "transform"):
        dataset = dataset.dataset  # in the words of the whole set, whose features serve it
    words = {name: _describe(value) for name, value in {"transform": transform, **_own_transforms(dataset)}.items()}
    return repr((words, transform_key))


def _own_transforms(dataset: Any, place: str = "dataset") -> dict[str, Any]:
    """Those of a data set, by where they stand, and of those inside a `Subset` or a `ConcatDataset`."""
    found = {
        f"{place}.{name}": getattr(dataset, name, None) for name in ("transform", "target_transform", "transforms")
    }
    if isinstance(dataset, torch.utils.data.Subset):
        found |= _own_transforms(dataset.dataset, f"{place}.dataset")
    elif isinstance(dataset, torch.utils.data.ConcatDataset):
        for i, part in enumerate(dataset.datasets):
            found |= _own_transforms(part, f"{place}.datasets[{i}]")
    return found


def _describe(transform: Any) -> str | None:
    """What a transform does, in words; None if its type and attributes do not tell."""
    named = transform if hasattr(transform, "__qualname__") else type(transform)
    name = f"{named.__module__}.{named.__qualname__}"
    parts: list[str | None]
    match name:
        case "builtins.NoneType":
            return "None"
        case "torchvision.transforms.transforms.Compose":
            parts = [_describe(part) for part in transform.transforms]
        case "torchvision.datasets.vision.StandardTransform":
            parts = [_describe(part) for part in (transform.transform, transform.target_transform)]
        case _ if name in STANDARD_TRANSFORMS:
            settings = sorted((key, value) for key, value in vars(transform).items() if not key.startswith("_"))
            parts = [f"{key}={value}" if _is_plain(value) else None for key, value in settings]
        case _:
            return None
    told = [part for part in parts if part is not None]
    return f"{name}({', '.join(told)})" if len(told) == len(parts) else None


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(v is None or isinstance(v, (bool, int, float, str, Enum)) for v in values)


def _shown(batches: Iterator[tuple[Tensor, Tensor]], total: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    from tqdm.auto import tqdm

    return iter(tqdm(batches, total=total, desc="encode", unit="batch", disable=None))


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
