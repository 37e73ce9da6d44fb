"""Images that are the same, or nearly: copies by their pixels, near ones by the correlation of small grey versions.

    a (N, 1024)   32 x 32 grey pixels, less their mean, of norm 1;   ||a_i - a_j||^2 = 2 (1 - correlation)

Resized, recompressed and slightly brightened copies correlate to more than .99; an image without contrast has none but
its exact copies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustft.functional import nearest_neighbors

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 32
CORRELATION = 0.995
CONTRAST = 2.0  # grey levels (of 255) of standard deviation, below which a correlation is one of noise
_NEIGHBORS = 8  # looked at for each image; chains of pairs join larger families


class Look(NamedTuple):
    """What an image is compared by: a hash of its pixels, and its descriptor, zero for one without contrast."""

    digest: str
    descriptor: np.ndarray


def look(image: Image) -> Look:
    """Of an RGB image."""
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    digest.update(image.tobytes())
    pixels = np.asarray(image.convert("L").resize((SIDE, SIDE)), dtype=np.float32).reshape(-1)
    centred = pixels - pixels.mean()
    norm = float(np.linalg.norm(centred))
    flat = norm < CONTRAST * SIDE
    return Look(digest.hexdigest(), np.zeros_like(centred) if flat else centred / norm)


def families(looks: Sequence[Look], correlation: float = CORRELATION) -> Tensor:
    """(N,) int64: equal numbers for images that are joined by (near-)copies; each number is its first image's place."""
    parent = list(range(len(looks)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs(looks, correlation):
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    return torch.tensor([root(i) for i in range(len(looks))], dtype=torch.int64)


def pairs(looks: Sequence[Look], correlation: float = CORRELATION) -> Iterable[tuple[int, int]]:
    """Pairs (i, j), i < j, of exact copies (each with the first) and of near ones (the nearest few of each)."""
    first: dict[str, int] = {}
    unique = []
    for i, one in enumerate(looks):
        if first.setdefault(one.digest, i) != i:
            yield first[one.digest], i
        elif one.descriptor.any():
            unique.append(i)
    if len(unique) < 2:
        return
    points = torch.from_numpy(np.stack([looks[i].descriptor for i in unique]))
    found = nearest_neighbors(points, points, min(_NEIGHBORS, len(unique)))
    near = found.distances <= 2 * (1 - correlation)
    for row, column in near.nonzero().tolist():
        i, j = unique[row], unique[int(found.indices[row, column])]
        if i < j:
            yield i, j
        elif j < i:  # one of the two may have nearer ones
            yield j, i
