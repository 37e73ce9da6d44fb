"""Encode once, keep, reuse: the features of a data set under one model, on disk under a key that says what
they are.

    key = sha256(model, data set, transforms, dtype)    ->    <cache>/<key>.safetensors holding u (N, D), labels (N,)

Zero-shot heads, ensembles, temperatures, OOD scores and linear probes all run from the same features. The key
holds whatever the features depend on, so a second checkpoint never meets the first one's features. A file is
written under another name and then renamed; one that turns out to be cut off is written anew.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustft.clip.encoding import encode_images
from robustft.clip.loading import move
from robustft.clip.outputs import evaluating
from robustft.clip.weights import fingerprint as model_fingerprint
from robustft.data.classes import ClassNames, class_names
from robustft.data.images import Skipped
from robustft.data.sources import Source, fingerprint, image_statistics, takes_statistics
from robustft.files import read_tensors, write_tensors
from robustft.ops.kinds import checked

# The parts of open_clip's evaluation transforms: deterministic, and told wholly by their attributes.
STANDARD_TRANSFORMS = frozenset(
    {f"torchvision.transforms.transforms.{name}" for name in ("CenterCrop", "Normalize", "Resize", "ToTensor")}
    | {f"open_clip.transform.{name}" for name in ("CenterCropOrPad", "MaybeConvertMode", "MaybeToTensor")}
    | {f"open_clip.transform.{name}" for name in ("ResizeKeepRatio", "_convert_to_rgb")}
)


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
    and `.targets`; or a `Subset` or `ConcatDataset` of such.

    `transform_key` names what the transforms do, and has to change with them. It is needed with `cache` when
    `transform`, or the data set's own `transform`, `target_transform` or `transforms`, is anything but None or
    torchvision's Compose of `STANDARD_TRANSFORMS`, which is what open_clip's evaluation transforms are: a function,
    a Lambda or a random crop cannot be told from others.

    Images that the data set wants skipped (`robustft.data.open`, on_error) have no row, and nothing is kept in the
    cache then: they may be whole the next time. A damaged file of the cache is replaced with a warning. ValueError
    for NaN or infinite features, an empty data set, and, when `cache` is given, a data set or transform that cannot
    be told from others. Memory: N (D + 2) floats.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    path = None
    if cache is not None:
        statistics = image_statistics(model) if takes_statistics(dataset, transform) else None
        transforms = _transforms(dataset, transform, transform_key)
        parts = model_fingerprint(model), fingerprint(dataset), transforms, repr(statistics), str(dtype)
        path = Path(cache) / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.safetensors"
        if path.exists() and (stored := _read(path)) is not None:
            return replace(stored, classes=class_names(dataset))

    device = torch.device(device) if device is not None else _device(model)
    move(model, device)
    features, labels = [], []
    source = Source(dataset, model, transform)
    batches = source.in_order(batch_size)
    with evaluating(model):
        for images, target in _shown(batches, -(-len(source) // batch_size)) if progress else batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                encoded = encode_images(model, images.to(device))
            features.append(encoded.float().cpu())
            labels.append(target)
    skipped = tuple(source.skipped.values())
    result = Features(torch.cat(features), torch.cat(labels), skipped=skipped, classes=class_names(dataset))
    bad = int((~result.image_features.isfinite()).any(1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(result)} image features hold NaN or infinity: check the weights "
            f"and, if the images are fine, encode with another dtype than {dtype}"
        )
    if path is not None and not result.skipped:
        tensors = {"image_features": result.image_features, "labels": result.labels}
        write_tensors(path, tensors, {"sha256": _checksum(result)})
    return result


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


def _shown(batches: Iterator[tuple[Tensor, Tensor]], total: int) -> Iterator[tuple[Tensor, Tensor]]:
    from tqdm.auto import tqdm

    return iter(tqdm(batches, total=total, desc="encode", unit="batch", disable=None))


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _checksum(features: Features) -> str:
    digest = hashlib.sha256(repr(tuple(features.image_features.shape)).encode())
    for part in (features.image_features, features.labels):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> Features | None:
    from safetensors import SafetensorError, safe_open

    try:
        stored = read_tensors(path)
        features, labels = stored["image_features"], stored["labels"]
        if (features.ndim, features.dtype) != (2, torch.float32) or not bool(features.isfinite().all()):
            raise ValueError(f"features are {tuple(features.shape)} {features.dtype}; expected finite float32 (N, D)")
        if (labels.shape, labels.dtype) != (features.shape[:1], torch.int64):
            raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}; expected int64 ({len(features)},)")
        found = Features(features, labels)
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("sha256") != _checksum(found):
                raise ValueError("its content has another checksum than it holds")
        return found
    except (SafetensorError, KeyError, ValueError) as error:
        warnings.warn(f"{path} is damaged ({error}); encoding again", RuntimeWarning, stacklevel=4)
        return None
