"""What models make of images, kept in a folder while a large set is measured: a killed command goes on where it was.

    key = sha256(predictors, transform, images and labels of a chunk, parts)    ->    <cache>/outputs-<key>.safetensors

A set of files is predicted chunk by chunk, each of which is read once for all predictors and then written. Sets of
other kinds are predicted whole, and not kept. Of several processes the main one alone looks into the folder and
writes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from robustft import clip
from robustft.clip.outputs import Outputs
from robustft.data.paths import PathDataset
from robustft.data.sources import row_fingerprints
from robustft.files import load_fitted, save_fitted
from robustft.ops.processes import current
from robustft.predictors.base import Predictor, predict_each

CHUNK = 8192  # images
KIND = "Outputs"


def predict_kept(cache: Path, transform: str) -> Callable[..., tuple[Outputs, ...]]:
    """`predict_each` that looks into a folder first, of images under a transform that these words tell from others."""
    models: dict[int, str] = {}

    def told(predictor: Predictor) -> str:
        if id(predictor) not in models:
            models[id(predictor)] = f"{predictor.kind} {clip.fingerprint(predictor)} {predictor.classes}"
        return models[id(predictor)]

    def predict(
        predictors: Sequence[Predictor],
        data: Any,
        batch_size: int = 256,
        *,
        labelled: bool = True,
        workers: int | None = None,
        parts: Sequence[str] = Outputs.PARTS,
    ) -> tuple[Outputs, ...]:
        if not isinstance(data, PathDataset):
            return predict_each(predictors, data, batch_size, labelled=labelled, workers=workers, parts=parts)
        key = repr((list(map(told, predictors)), transform, data.classes, labelled, tuple(parts)))
        found: list[tuple[Outputs, ...]] = []
        for span in _spans(len(data)):
            chunk = data.subset(span)
            digest = hashlib.sha256(key.encode() + row_fingerprints(chunk).numpy().tobytes()).hexdigest()
            path = cache / f"outputs-{digest}.safetensors"
            made = current().of_main(partial(_read, path, len(predictors)))
            if made is None:
                made = predict_each(predictors, chunk, batch_size, labelled=labelled, workers=workers, parts=parts)
                if not made[0].skipped:  # they may be whole the next time
                    current().of_main(partial(_write, path, made))
            found.append(tuple(_moved(outputs, span.start) for outputs in made))
        return tuple(Outputs.cat(of_one) for of_one in zip(*found, strict=True))

    return predict


def _spans(count: int) -> Iterator[range]:
    """Chunks of a set: a short rest goes with the one before."""
    starts = list(range(0, max(1, count - CHUNK // 2), CHUNK))
    return (range(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True))


def _moved(outputs: Outputs, start: int) -> Outputs:
    return outputs.replace(skipped=[one._replace(row=one.row + start) for one in outputs.skipped])


def _write(path: Path, made: Sequence[Outputs]) -> None:
    tensors = {
        f"{place}.{name}": getattr(outputs, name)
        for place, outputs in enumerate(made)
        for name in Outputs.PARTS
        if outputs.has(name)
    }
    save_fitted(path, KIND, {"classes": [outputs.classes for outputs in made]}, tensors)


def _read(path: Path, count: int) -> tuple[Outputs, ...] | None:
    if not path.is_file():
        return None
    try:
        settings, tensors = load_fitted(path, KIND)
        parts: list[dict[str, Any]] = [{} for _ in range(count)]
        for name, value in tensors.items():
            place, _, part = name.partition(".")
            parts[int(place)][part] = value
        classes = settings["classes"]
        return tuple(Outputs(**held, classes=names) for held, names in zip(parts, classes, strict=True))
    except ValueError as error:
        warnings.warn(f"{error}; predicting again", RuntimeWarning, stacklevel=4)
        return None
