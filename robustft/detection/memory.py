"""AdaNeg: NegLabel, whose texts are joined by the test images that it is surest of.

t_j (C, D)   unit embeddings of the K classes, then of M negative texts; C = K + M
v (N, D)     unit features of images, in the order in which they come
f_jl         list j: f_j0 = t_j, then at most L images

S_nl(v) = neg_label(v t_1 .. v t_K, v t_K+1 .. v t_C)           from the texts alone
v joins   the list of the likeliest class,    where S_nl(v) > g + (1 - g) gap
          the list of the likeliest negative, where S_nl(v) < g - g gap
h(v)    = entropy of softmax(v t / tau) over the K classes, or the M negatives; a list keeps its L images of least h
p_j(v)  = normalize(sum_l exp(-beta (1 - v f_jl)) f_jl)
s(v)    = neg_label(v p_1(v) .. v p_C(v)) + lambda S_nl(v)

No p_j is made, which would take N C D numbers. With c_l = v f_jl, a_l = exp(-beta (1 - c_l)) and G_j the products of
list j's entries with each other, v p_j(v) = sum_l a_l c_l / sqrt(a G_j a). Where list j holds no image, that is v t_j.
Every entry takes part in every score, so a search for the nearest ones would save nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from robustft.detection.scores import entropy, neg_label
from robustft.ops.arguments import array, check_count, checked, described

UNIT = 0.02
"""How far a norm may be from 1: half precision reaches 0.01."""
_ELEMENTS = 1 << 23  # of a block of images' cosines with all entries


class _Packed(NamedTuple):
    """The U lists that hold images, padded to W entries: numbers (U,), entries (U, W, D), which of them are any (U, W),
    and the products (U, W, W) within each."""

    lists: Tensor
    entries: Tensor
    filled: Tensor
    products: Tensor


class AdaNegMemory:
    """AdaNeg's memory of test images: `update` takes images in, `scores` reads it, `reset` empties it.

        memory = AdaNegMemory(classifier.class_embeddings, negatives)
        memory.update(features).scores(features)                # a batch enters before it is scored, as in the paper

    What it holds depends on the images that it has seen, in their order where entropies are equal (the earlier stays),
    and not on the batches in which they came. What `scores` gives depends on what it holds then.

    Args:
        class_embeddings: (K, D), unit rows. negative_embeddings: (M, D), unit rows, as for `neg_label`.
        length: L, images that a list holds beside its text.
        beta: sharpness of p_j(v). 0 weighs all entries alike: one p_j for all images, the paper's task-adaptive proxy.
        threshold, gap: g and gap: by default an image above 0.75 joins a class, one below 0.25 a negative.
        weight: lambda. temperature, groups, seed: of `neg_label`.

    Defaults are those of the released script for ImageNet. Memory: 4 D bytes (of float64 embeddings 8) for every text
    and every image held, and for L + 1 entries of every list that holds one; a call takes up to 500 MB beside it, in
    float64 twice that. No gradient. ValueError for rows that are not of unit norm or of another width. Source: AdaNeg
    (Zhang and Zhang 2024, arXiv 2410.20149), section 3. In the released code L counts the text too; that an empty place
    counts there as a zero vector changes no proxy, once that is normalised.
    """

    @checked
    def __init__(
        self,
        class_embeddings: Tensor,
        negative_embeddings: Tensor,
        length: int = 10,
        beta: float = 5.5,
        threshold: float = 0.5,
        gap: float = 0.5,
        weight: float = 0.1,
        temperature: float = 0.01,
        groups: int | None = 5,
        seed: int = 0,
    ) -> None:
        for name, share in (("threshold", threshold), ("gap", gap)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {share!r}")
        for name, number in (("beta", beta), ("weight", weight)):
            if not 0.0 <= number < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {number!r}")
        check_count("length", length)
        self._length, self._beta, self._weight = length, beta, weight
        self._low, self._high = threshold * (1.0 - gap), threshold + (1.0 - threshold) * gap
        self._temperature, self._groups, self._seed = temperature, groups, seed
        given = {"class_embeddings": class_embeddings, "negative_embeddings": negative_embeddings}
        for name, rows in given.items():
            if array(name, rows).ndim != 2 or 0 in rows.shape or not rows.is_floating_point():
                raise ValueError(f"{name} is {described(rows)}; expected floating (rows, D), not empty")
        self._dtype = torch.float64 if torch.float64 in (rows.dtype for rows in given.values()) else torch.float32
        width, device = class_embeddings.shape[1], class_embeddings.device
        texts = [_unit(name, rows.detach(), width, device).to(self._dtype) for name, rows in given.items()]
        self._texts, self._classes = torch.cat(texts), len(class_embeddings)
        self._neg_label(self._texts[:1] @ self._texts.T)  # refuses a temperature or groups that cannot be
        self.reset()

    def __len__(self) -> int:
        """Images that it holds."""
        return len(self._lists)

    def __repr__(self) -> str:
        classes, (texts, width) = self._classes, self._texts.shape
        return f"AdaNegMemory({len(self)} images, {classes} classes, {texts - classes} negatives, {width} dimensions)"

    def reset(self) -> None:
        """Empties it: the texts alone are left."""
        self._features = self._texts.new_zeros(0, self._texts.shape[1])
        self._entropies = self._texts.new_zeros(0, dtype=torch.float64)
        self._lists = torch.zeros(0, dtype=torch.long, device=self._texts.device)
        self._packed: _Packed | None = None

    @property
    def counts(self) -> Tensor:
        """Images in each list, (C,): those of the K classes, then those of the M negatives."""
        return torch.bincount(self._lists, minlength=len(self._texts))

    @torch.no_grad()
    def text_cosines(self, features: Tensor) -> Tensor:
        """Cosines (N, C) of features (N, D) with the texts."""
        return self._taken(features) @ self._texts.T

    @checked
    @torch.no_grad()
    def update(self, features: Tensor) -> AdaNegMemory:
        """Takes in those of the images (N, D), unit rows, that the texts are sure of. Returns self."""
        for v in self._taken(features).split(max(1, _ELEMENTS // len(self._texts))):
            cosines = v @ self._texts.T
            score = self._neg_label(cosines)
            known, joins = score > self._high, (score > self._high) | (score < self._low)
            classes, negatives = cosines[:, : self._classes], cosines[:, self._classes :]
            likeliest = torch.where(known, classes.argmax(1), self._classes + negatives.argmax(1))
            certain = torch.where(known, *(entropy(c.double(), self._temperature) for c in (classes, negatives)))
            self._keep(
                torch.cat([self._features, v[joins]]),
                torch.cat([self._entropies, -certain[joins]]),
                torch.cat([self._lists, likeliest[joins]]),
            )
        return self

    @checked
    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Scores (N,) of images (N, D), unit rows, in [0, 1 + lambda], float64; the memory stays as it is."""
        v = self._taken(features)
        if self._packed is None and len(self):
            self._packed = self._pack()
        entries = len(self._texts) if self._packed is None else max(len(self._texts), self._packed.filled.numel())
        return torch.cat([self._score(block) for block in v.split(max(1, _ELEMENTS // entries))])

    def state(self) -> dict[str, Tensor]:
        """What it holds, by name: features (n, D), entropies (n,) and lists (n,) of the images. `restore` takes it."""
        return {"features": self._features, "entropies": self._entropies, "lists": self._lists}

    @checked
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` of a memory of the same texts gave; ValueError for what cannot be that."""
        if missing := [name for name in self.state() if name not in state]:
            raise ValueError(f"state has no {missing[0]!r}; expected what AdaNegMemory.state gives")
        features = self._taken(state["features"], "state['features']").clone()
        entropies, lists = (state[name].to(features.device) for name in ("entropies", "lists"))
        if entropies.shape != lists.shape or lists.shape != features.shape[:1] or lists.dtype != torch.long:
            raise ValueError(
                f"state holds entropies {described(entropies)} and lists {described(lists)}; expected "
                f"({len(features)},) of both, one a feature, lists as int64"
            )
        if not bool(entropies.isfinite().all()):
            raise ValueError("state['entropies'] must be finite")
        if len(lists) and not 0 <= int(lists.min()) <= int(lists.max()) < len(self._texts):
            raise ValueError(f"state['lists'] must lie in [0, {len(self._texts)}), one number a text")
        if len(lists) and (most := int(lists.bincount().max())) > self._length:
            raise ValueError(f"state has a list of {most} images; expected at most length = {self._length}")
        self._keep(features, entropies.double(), lists)

    def _taken(self, features: Tensor, name: str = "features") -> Tensor:
        v = array(name, features).detach()
        if v.ndim != 2 or not v.is_floating_point():
            raise ValueError(f"{name} is {described(v)}; expected floating (N, {self._texts.shape[1]})")
        return _unit(name, v, self._texts.shape[1], self._texts.device).to(self._dtype)

    def _neg_label(self, cosines: Tensor) -> Tensor:
        classes, negatives = cosines[:, : self._classes], cosines[:, self._classes :]
        return neg_label(classes, negatives, self._temperature, self._groups, self._seed)

    def _keep(self, features: Tensor, entropies: Tensor, lists: Tensor) -> None:
        """Of images in the order of their coming, the L of least entropy in every list: what is left when each in turn
        takes a free place, or that of the image of highest entropy, the latest such, if its own is lower."""
        order = entropies.argsort(stable=True)
        order = order[lists[order].argsort(stable=True)]
        order = order[_places(lists[order]) < self._length]
        self._features, self._entropies, self._lists = features[order], entropies[order], lists[order]
        self._packed = None

    def _pack(self) -> _Packed:
        lists, row = self._lists.unique_consecutive(return_inverse=True)
        place = 1 + _places(self._lists)
        entries = self._texts.new_zeros(len(lists), 1 + int(place.max()), self._texts.shape[1])
        entries[:, 0], entries[row, place] = self._texts[lists], self._features
        filled = torch.zeros(entries.shape[:2], dtype=torch.bool, device=entries.device)
        filled[:, 0], filled[row, place] = True, True
        return _Packed(lists, entries, filled, entries @ entries.mT)

    def _score(self, v: Tensor) -> Tensor:
        cosines = v @ self._texts.T
        score = self._weight * self._neg_label(cosines)
        if self._packed is not None:
            lists, entries, filled, products = self._packed
            c = (v @ entries.flatten(0, 1).T).unflatten(1, filled.shape).transpose(0, 1)  # (U, N, W)
            exponents = (self._beta * c).masked_fill_(~filled[:, None], -math.inf)
            a = (exponents - exponents.amax(-1, keepdim=True)).exp_()  # a factor that all a_l share cancels
            length = ((a @ products) * a).sum(-1).clamp_min_(1e-24).sqrt_()
            cosines[:, lists] = ((a * c).sum(-1) / length).clamp_(-1.0, 1.0).T
        return score + self._neg_label(cosines)


def _places(lists: Tensor) -> Tensor:
    """Of ascending numbers of lists, the place of each among its own: [2, 2, 5] has [0, 1, 0]."""
    _, counts = lists.unique_consecutive(return_counts=True)
    return torch.arange(len(lists), device=lists.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def _unit(name: str, rows: Tensor, width: int, device: torch.device) -> Tensor:
    """Rows of unit norm, of this width, on this device, or an error."""
    if rows.shape[1] != width:
        raise ValueError(f"{name} are {rows.shape[1]} wide, expected {width}, as class_embeddings: use the same model")
    if rows.device != device:
        raise ValueError(f"{name} are on {rows.device}; expected {device}, as class_embeddings")
    far = (torch.linalg.vector_norm(rows.double(), dim=1) - 1.0).abs()
    if not bool((far <= UNIT).all()):
        worst = float(torch.linalg.vector_norm(rows[far.argmax()].double()))
        raise ValueError(f"{name} must have rows of unit norm, got one of norm {worst:.4g}")
    return rows
