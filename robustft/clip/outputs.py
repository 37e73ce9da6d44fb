"""What a CLIP classifier makes of images, the similarities it is made from, and the mode it is made in.

u = normalize(f(x))  (N, D)     image features
w                    (K, D)     class embeddings, one row a class
z = s u w^T          (N, K)     logits
c = u normalize(w)^T (N, K)     cosines, what OOD scores such as MCM are made of
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustft.data.images import Skipped
from robustft.ops.arguments import FLOATS
from robustft.ops.kinds import checked, described


class Outputs:
    """What is known of N images under one model: unit features, cosines to the K classes, logits; and more.

    Any part may be missing, as the cosines of somebody else's logits are: whoever asks for it gets a ValueError that
    names it. `has` tells before. Iteration gives the parts that are there, in the order of `PARTS`.

    Args:
        features: (N, D), unit rows. cosines, logits: (N, K). patch_cosines: (N, P, K), of P patches. labels: (N,).
        classes: the K columns' names, where they are known.
        skipped: images of the set that could not be read, which have no row (`robustft.data.open`, on_error).
    """

    PARTS = ("features", "cosines", "logits", "patch_cosines", "labels")

    @checked
    def __init__(
        self,
        features: Tensor | None = None,
        cosines: Tensor | None = None,
        logits: Tensor | None = None,
        patch_cosines: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        classes: Sequence[str] | None = None,
        skipped: Sequence[Skipped] = (),
    ) -> None:
        self.classes = None if classes is None else tuple(classes)
        self.skipped = tuple(skipped)
        given = (features, cosines, logits, patch_cosines, labels)
        self._parts = {name: part for name, part in zip(self.PARTS, given, strict=True) if part is not None}

    @property
    def features(self) -> Tensor:
        """Unit image features (N, D)."""
        return self._part("features")

    @property
    def cosines(self) -> Tensor:
        """Cosines to the class embeddings (N, K)."""
        return self._part("cosines")

    @property
    def logits(self) -> Tensor:
        """Logits (N, K)."""
        return self._part("logits")

    @property
    def patch_cosines(self) -> Tensor:
        """Cosines of patches to the class embeddings (N, P, K)."""
        return self._part("patch_cosines")

    @property
    def labels(self) -> Tensor:
        """Labels (N,)."""
        return self._part("labels")

    @property
    def probabilities(self) -> Tensor:
        """softmax(logits) in float64 (N, K): in float32 a gap of 17 already reads as certainty."""
        return self.logits.double().softmax(-1)

    def has(self, name: str) -> bool:
        """Whether the part of this name is there."""
        return name in self._parts

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._parts.values())

    def __repr__(self) -> str:
        return f"Outputs({', '.join(f'{name}={tuple(part.shape)}' for name, part in self._parts.items())})"

    def replace(
        self,
        *,
        classes: Sequence[str] | None = None,
        skipped: Sequence[Skipped] | None = None,
        **parts: Tensor | None,
    ) -> Outputs:
        """The same with other parts, of which None takes one away, and other names of the columns or images that were
        skipped, if any are given."""
        return Outputs(
            **{**self._parts, **parts},
            classes=self.classes if classes is None else classes,
            skipped=self.skipped if skipped is None else skipped,
        )

    def only(self, *names: str) -> Outputs:
        """Those of these parts that are there."""
        return self._with({name: part for name, part in self._parts.items() if name in names})

    def map(self, function: Callable[[Tensor], Tensor]) -> Outputs:
        """A function of every part."""
        return self._with({name: function(part) for name, part in self._parts.items()})

    def of_rows(self, values: Tensor, name: str) -> Tensor:
        """Values (M,) of every image of a set, such as its groups, as those (N,) of the images that have a row here.

        ValueError, calling them `name`, where there are not as many as rows and skipped images.
        """
        images = len(next(iter(self)))
        if len(values) == images and not self.skipped:
            return values
        if len(values) != images + len(self.skipped):
            raise ValueError(f"{name} are of {len(values)} images, but the outputs of {images + len(self.skipped)}")
        kept = torch.ones(len(values), dtype=torch.bool)
        kept[[one.row for one in self.skipped]] = False
        return values[kept.to(values.device)]

    @staticmethod
    def cat(batches: Sequence[Outputs]) -> Outputs:
        """One after the other, on the parts of the first."""
        first = batches[0]
        parts = {name: torch.cat([batch._part(name) for batch in batches]) for name in first._parts}
        return Outputs(**parts, classes=first.classes, skipped=[one for batch in batches for one in batch.skipped])

    def _with(self, parts: dict[str, Tensor]) -> Outputs:
        return Outputs(**parts, classes=self.classes, skipped=self.skipped)

    def _part(self, name: str) -> Tensor:
        if name not in self._parts:
            raise ValueError(f"{name} are needed here, but these outputs hold {', '.join(self._parts) or 'nothing'}")
        return self._parts[name]


@checked
def similarities(features: Tensor, class_embeddings: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines u normalize(w)^T and logits s u w^T, (N, K) each, of unit features (N, D) and embeddings (K, D)."""
    _check_head(features, class_embeddings, logit_scale)
    w = class_embeddings.to(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        return features @ F.normalize(w, dim=-1).T, logit_scale.to(features.dtype) * (features @ w.T)


@checked
def outputs_of(
    features: Tensor,
    class_embeddings: Tensor,
    logit_scale: Tensor | float | None = None,
    *,
    patch_features: Tensor | None = None,
    labels: Tensor | None = None,
) -> Outputs:
    """Outputs of unit features (N, D), and patch features (N, P, D), that exist already, under a head (K, D).

    The head's rows are normalised for the cosines and taken as they are for the logits, which need `logit_scale`.
    """
    if features.dtype not in FLOATS:
        raise ValueError(f"features is {described(features)}; expected floating, two dimensions")
    scale = torch.as_tensor(1.0 if logit_scale is None else logit_scale, dtype=features.dtype, device=features.device)
    cosines, logits = similarities(features, class_embeddings, scale)
    patch_cosines = None
    if patch_features is not None:
        n, d = features.shape
        if patch_features.ndim != 3 or patch_features.shape[::2] != (n, d) or patch_features.dtype not in FLOATS:
            raise ValueError(f"patch_features is {described(patch_features)}; expected floating ({n}, P, {d})")
        patch_cosines = patch_features @ F.normalize(class_embeddings.to(patch_features.dtype), dim=-1).T
    return Outputs(features, cosines, None if logit_scale is None else logits, patch_cosines, labels)


def _check_head(features: Tensor, class_embeddings: Tensor, logit_scale: Tensor) -> None:
    for name, value in (("features", features), ("class_embeddings", class_embeddings)):
        if value.ndim != 2 or value.dtype not in FLOATS:
            raise ValueError(f"{name} is {described(value)}; expected floating, two dimensions")
        if value.device != logit_scale.device:
            raise ValueError(f"{name} is on {value.device}; expected {logit_scale.device}, as logit_scale")
    if features.shape[1] != class_embeddings.shape[1]:
        raise ValueError(
            f"features has {features.shape[1]} dimensions; expected {class_embeddings.shape[1]}, as class_embeddings"
        )
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale has shape {tuple(logit_scale.shape)}; expected one element")


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule gets its own mode back."""
    training = [m for module in modules for m in module.modules() if m.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
