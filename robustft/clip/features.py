"""Encode once, keep, reuse: the features of a data set under one model, on disk under a key that says what
they are.

    key = sha256(model, data set, transforms, dtype)    ->    <cache>/<key>.safetensors holding u (N, D), labels (N,)

Zero-shot heads, ensembles, temperatures, OOD scores and linear probes all run from the same features. The key
holds whatever the features depend on, so a second checkpoint never meets the first one's features. A file is
written under another name and then renamed; one that turns out to be cut off is written anew.

A data set is any of
    (images, labels)                     tensors (N, C, H, W), already normalised for the model, and (N,); also as
                                         {"image": ..., "label": ...}, whatever else the dictionary holds
    object with .tensors(mean, std)      the same tensors, normalised by the given statistics
    map-style data set                   items (image, label), torchvision's convention, or {"image": ..., "label":
                                         ...}; `transform` makes an image a tensor
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustft.clip.encoding import encode_images
from robustft.clip.outputs import evaluating
from robustft.clip.weights import fingerprint as model_fingerprint
from robustft.files import write_file

# The parts of open_clip's evaluation transforms: deterministic, and told wholly by their attributes.
STANDARD_TRANSFORMS = frozenset(
    {f"torchvision.transforms.transforms.{name}" for name in ("CenterCrop", "Normalize", "Resize", "ToTensor")}
    | {f"open_clip.transform.{name}" for name in ("CenterCropOrPad", "MaybeConvertMode", "MaybeToTensor")}
    | {f"open_clip.transform.{name}" for name in ("ResizeKeepRatio", "_convert_to_rgb")}
)


@dataclass(frozen=True)
class Features:
    """Unit image features (N, D) in float32 with their labels (N,) int64 and, where a classifier was at hand,
    logits (N, K)."""

    image_features: Tensor
    labels: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
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

    The model is moved to `device` (default: where it is), runs in evaluation mode and gets its modes back.
    `dtype` float32 runs it as it is, bfloat16 or float16 under autocast. `cache` is a folder; a file found
    there is used instead of the model. It needs a data set that can be told from others: tensors,
    `.fingerprint`, `.samples` (files, told by path, size and time of change) or `.data` and `.targets`.

    `transform_key` names what the transforms do, and has to change with them. It is needed with `cache` when
    `transform`, or the data set's own `transform`, `target_transform` or `transforms`, is anything but None or
    torchvision's Compose of `STANDARD_TRANSFORMS`, which is what open_clip's evaluation transforms are: a function,
    a Lambda or a random crop cannot be told from others.

    A damaged file is replaced with a warning. ValueError for NaN or infinite features, an empty data set, and, when
    `cache` is given, a data set or transform that cannot be told from others. Memory: N (D + 2) floats.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    path = None
    if cache is not None:
        statistics = image_statistics(model) if _is_fast(dataset, transform) else None
        transforms = _transforms(dataset, transform, transform_key)
        parts = model_fingerprint(model), fingerprint(dataset), transforms, repr(statistics), str(dtype)
        path = Path(cache) / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.safetensors"
        if path.exists() and (stored := _read(path)) is not None:
            return stored

    device = torch.device(device) if device is not None else _device(model)
    model.to(device)
    features, labels = [], []
    with evaluating(model):
        for images, target in _progress(batches(dataset, model, transform, batch_size), progress, dataset, batch_size):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                encoded = encode_images(model, images.to(device))
            features.append(encoded.float().cpu())
            labels.append(target)
    result = Features(torch.cat(features), torch.cat(labels))
    bad = int((~result.image_features.isfinite()).any(1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(result)} image features hold NaN or infinity: check the weights "
            f"and, if the images are fine, encode with another dtype than {dtype}"
        )
    if path is not None:
        from safetensors.torch import save

        tensors = {"image_features": result.image_features, "labels": result.labels}
        write_file(path, save(tensors, metadata={"format": "pt"}))
    return result


def batches(
    dataset: Any,
    model: Any = None,
    transform: Callable[[Any], Tensor] | None = None,
    batch_size: int = 256,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A whole data set in order as batches of images (n, C, H, W), floating point, and labels (n,) int64.

    `model` gives the image statistics for data sets with `.tensors(mean, std)`; `transform` turns an item's
    image into a tensor, and is preferred to the statistics where given. TypeError for what is no data set and
    for images that are no tensors after `transform`; ValueError when empty.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    pair = _pair(dataset.tensors(*image_statistics(model)) if _is_fast(dataset, transform) else dataset)
    if pair is not None and transform is not None:
        raise ValueError("transform must be None for images that are tensors already: they are taken as they are")
    if pair is None and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            "dataset must be (images, labels) tensors, have .tensors(mean, std), or be a map-style data set "
            f"of (image, label) items, got {type(dataset).__name__}"
        )
    count = len(dataset) if pair is None else len(pair[0])
    if count == 0:
        raise ValueError("dataset is empty")
    return _batches(dataset, pair, transform, count, batch_size)


def image_statistics(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel that an open_clip model, or one inside a classifier, was built with.

    ValueError when the model does not say: images normalised in another way than in pre-training are no error that
    anything would notice.
    """
    for owner in (model, getattr(model, "model", None)):
        for module in owner.modules() if isinstance(owner, nn.Module) else ():
            visual = getattr(module, "visual", None)
            stated = getattr(visual, "preprocess_cfg", None) or {}
            mean = stated.get("mean", getattr(visual, "image_mean", None))
            std = stated.get("std", getattr(visual, "image_std", None))
            if mean is not None and std is not None:
                return tuple(map(float, mean)), tuple(map(float, std))
    raise ValueError(
        "the model carries no image statistics; open_clip's factories and robustft.clip.load set them "
        "(open_clip.set_model_preprocess_cfg does for a model of one's own), or pass (images, labels) tensors"
    )


def fingerprint(dataset: Any) -> str:
    """SHA-256, in hexadecimal, of what tells a data set from others, its transforms left aside.

    ValueError where nothing does: give the data set a `fingerprint` attribute.
    """
    digest = hashlib.sha256()
    own = getattr(dataset, "fingerprint", None)
    tensors = _pair(dataset)
    if own is not None:
        digest.update(str(own() if callable(own) else own).encode())
    elif tensors is not None:
        for tensor in tensors:
            _hash_array(digest, tensor.detach().cpu().contiguous())
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


def _batches(
    dataset: Any, pair: tuple[Tensor, Tensor] | None, transform: Any, count: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        if pair is not None:
            yield pair[0][start:stop], pair[1][start:stop].long()
            continue
        items = [_image_and_label(dataset[i]) for i in range(start, stop)]
        images = [item[0] if transform is None else transform(item[0]) for item in items]
        if not isinstance(images[0], Tensor) or not images[0].is_floating_point():
            got = images[0].dtype if isinstance(images[0], Tensor) else type(images[0]).__name__
            raise TypeError(f"images must be floating point tensors, got {got}: pass the model's transform")
        yield torch.stack(images), torch.tensor([int(item[1]) for item in items])


def _image_and_label(item: Any) -> tuple[Any, Any]:
    return (item["image"], item["label"]) if isinstance(item, Mapping) else (item[0], item[1])


def _pair(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """Images and labels of a pair of tensors, of a TensorDataset, or of a dictionary of tensors."""
    if isinstance(dataset, Mapping):
        dataset = dataset.get("image"), dataset.get("label")
    if isinstance(dataset, torch.utils.data.TensorDataset):
        dataset = dataset.tensors
    if not (isinstance(dataset, (tuple, list)) and len(dataset) == 2 and isinstance(dataset[0], Tensor)):
        return None
    images, labels = dataset[0], torch.as_tensor(dataset[1])
    if not images.is_floating_point() or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            "dataset must be images (N, C, H, W), floating point, and labels (N,), got "
            f"{tuple(images.shape)} {images.dtype} and {tuple(labels.shape)}"
        )
    return images, labels


def _is_fast(dataset: Any, transform: Any) -> bool:
    # A TensorDataset's `tensors` is a tuple; a transform that was asked for must be run.
    return transform is None and callable(getattr(dataset, "tensors", None))


def _transforms(dataset: Any, transform: Any, transform_key: str | None) -> str:
    """All transforms between a data set's files and the model, in words."""
    own = ("transform", "target_transform", "transforms")
    found = {"transform": transform, **{f"dataset.{name}": getattr(dataset, name, None) for name in own}}
    words = {name: _describe(value) for name, value in found.items()}
    unclear = [f"{name} ({type(found[name]).__name__})" for name, told in words.items() if told is None]
    if unclear and transform_key is None:
        raise ValueError(
            f"{' and '.join(unclear)} cannot be told from other transforms: pass transform_key, a string that changes "
            "with what it does, or encode without cache"
        )
    return repr((words, transform_key))


def _describe(transform: Any) -> str | None:
    """What a transform does, in words; None if its type and attributes do not tell."""
    named = transform if hasattr(transform, "__qualname__") else type(transform)
    name = f"{named.__module__}.{named.__qualname__}"
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
    return None if None in parts else f"{name}({', '.join(parts)})"


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(v is None or isinstance(v, (bool, int, float, str, Enum)) for v in values)


def _progress(iterator: Iterator[Any], wanted: bool, dataset: Any, batch_size: int) -> Any:
    if not wanted:
        return iterator
    from tqdm.auto import tqdm

    pair = _pair(dataset)
    total = -(-len(dataset if pair is None else pair[0]) // batch_size)
    return tqdm(iterator, total=total, desc="encode", unit="batch", disable=None)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _hash_array(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tuple(tensor.shape)}:{tensor.dtype}".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _read(path: Path) -> Features | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
        return Features(stored["image_features"], stored["labels"])
    except (SafetensorError, KeyError) as error:
        warnings.warn(f"{path} is damaged ({error}); encoding again", RuntimeWarning, stacklevel=3)
        return None
