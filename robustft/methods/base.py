"""What every method shares.

A CLIP classifier is a similarity with a fixed set of texts,

    u = normalize(f(x))  (N, D)     image features
    w                    (K, D)     class embeddings, one row a class
    z = s u w^T + b      (N, K)     logits;  p = softmax(z)
    c = u normalize(w)^T (N, K)     cosines, what OOD scores such as MCM are made of

and a method is a way to train f (and w): `step(batch)` gives a loss, `after_step()` follows the optimiser's
step, `classifier()` gives the `Classifier` learnt so far. Everything random in a step is a function of (seed,
step), so that a resumed run repeats it exactly.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustft import clip
from robustft.features import batches
from robustft.methods.batch import Batch, check_labels, unpack
from robustft.precision import at_least_float32


class Step(NamedTuple):
    """One step: the weighted sum to differentiate, and its terms, un-weighted and detached, to log."""

    loss: Tensor
    terms: dict[str, Tensor]


class Outputs(NamedTuple):
    """Unit image features (N, D), cosines to the class embeddings (N, K), logits (N, K); at least float32."""

    features: Tensor
    cosines: Tensor
    logits: Tensor


def stateless_generator(seed: int, *key: Any) -> torch.Generator:
    """A CPU generator that depends on (seed, *key) alone: the same step draws the same numbers in every run.

    The key is hashed because torch's generator looks at the lower 32 bits of its seed only.
    """
    return torch.Generator().manual_seed(stateless_seed(seed, *key))


def stateless_seed(seed: int, *key: Any) -> int:
    """A 32-bit seed that depends on (seed, *key) alone."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *key)).encode(), digest_size=4).digest(), "little")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule gets its own mode back."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


class Predictor(nn.Module):
    """Images (N, C, H, W) to `Outputs` over `classes`; `predictor(images)` is its logits."""

    classes: tuple[str, ...]

    def outputs(self, images: Tensor) -> Outputs:
        """Features, cosines and logits of transformed images, in evaluation mode; gradients as usual."""
        raise NotImplementedError

    def restrict(self, classes: Sequence[int] | Sequence[str]) -> Predictor:
        """The predictor over some classes, indices or names in their order; restricts before the softmax."""
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.outputs(images).logits

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (N, K), at least float32."""
        return self.logits(images).softmax(-1)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)

    @torch.no_grad()
    def predict(self, data: Any, batch_size: int = 256) -> tuple[Outputs, Tensor]:
        """Outputs and labels (N,) of a whole set, on the CPU; data as for `robustft.features.batches`."""
        device = next(self.parameters()).device
        parts = [
            (*(part.cpu() for part in self.outputs(images.to(device))), labels.cpu())
            for images, labels in batches(data, self, batch_size=batch_size)
        ]
        *outputs, labels = map(torch.cat, zip(*parts, strict=True))
        return Outputs(*outputs), labels

    def _indices(self, classes: Sequence[int] | Sequence[str]) -> list[int]:
        unclear = [c for c in classes if isinstance(c, str) and self.classes.count(c) != 1]
        if unclear:
            raise ValueError(f"classes {unclear[:5]} are not one each of the classifier's {len(self.classes)} names")
        indices = [self.classes.index(c) if isinstance(c, str) else int(c) for c in classes]
        if not indices or len(set(indices)) < len(indices) or not set(indices) <= set(range(len(self.classes))):
            raise ValueError(f"classes must be distinct indices in [0, {len(self.classes)}), got {indices[:10]}")
        return indices


class Classifier(Predictor):
    """A CLIP model with a head: logits s u w^T + b.

    `model` is shared, not copied: after more training, ask the method for a new classifier.
    `class_embeddings` (K, D) need not have unit norm (a fine-tuned head does not); `logit_scale` is
    multiplied out. Embeddings, scale and bias are buffers, at least float32.
    """

    def __init__(
        self,
        model: nn.Module,
        class_embeddings: Tensor,
        classes: Sequence[str],
        *,
        logit_scale: Tensor | float | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        if class_embeddings.ndim != 2 or len(class_embeddings) != len(classes):
            raise ValueError(
                f"class_embeddings must be (K, D) with one row for each of the {len(classes)} classes, "
                f"got shape {tuple(class_embeddings.shape)}"
            )
        if bias is not None and bias.shape != (len(classes),):
            raise ValueError(f"bias must have shape ({len(classes)},), got {tuple(bias.shape)}")
        scale = clip.logit_scale(model) if logit_scale is None else logit_scale
        self.model = model
        self.classes = tuple(classes)
        self.register_buffer("class_embeddings", at_least_float32(class_embeddings.detach()).clone())
        self.register_buffer(
            "logit_scale", at_least_float32(torch.as_tensor(scale).detach()).clone().to(class_embeddings.device)
        )
        self.register_buffer("bias", None if bias is None else at_least_float32(bias.detach()).clone())

    def outputs(self, images: Tensor) -> Outputs:
        with evaluating(self.model):
            return self.head_outputs(clip.encode_images(self.model, images))

    def head_outputs(self, features: Tensor) -> Outputs:
        """Outputs of unit features (N, D) that exist already, such as `robustft.features.encode` keeps."""
        cosines, logits = similarities(features, self.class_embeddings, self.logit_scale)
        return Outputs(features, cosines, logits if self.bias is None else logits + self.bias)

    def restrict(self, classes: Sequence[int] | Sequence[str]) -> Classifier:
        keep = self._indices(classes)
        return Classifier(
            self.model,
            self.class_embeddings[keep],
            [self.classes[i] for i in keep],
            logit_scale=self.logit_scale,
            bias=None if self.bias is None else self.bias[keep],
        )

    def save(self, directory: str | os.PathLike[str], config: Mapping[str, Any], *, tokenizer: Any = None) -> Path:
        """Writes the model as `clip.export` does, a directory that open_clip loads, with the head in it.

        The head, class names, scale and bias go to classifier.safetensors; `load_classifier` gives the classifier
        back. `config`, `tokenizer`, replacing and errors: as in `clip.export`.
        """
        return save_classifier(self, directory, config, tokenizer)


def similarities(features: Tensor, class_embeddings: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines u normalize(w)^T and logits s u w^T, (N, K) each, of unit features (N, D) and embeddings (K, D)."""
    w = class_embeddings.to(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        return features @ F.normalize(w, dim=-1).T, logit_scale.to(features.dtype) * (features @ w.T)


def save_classifier(
    classifier: Predictor, directory: str | os.PathLike[str], config: Mapping[str, Any], tokenizer: Any
) -> Path:
    """Writes a predictor's `model` as `clip.export` does, with its buffers and class names in it."""
    from safetensors.torch import save

    head = {name: value.cpu().contiguous() for name, value in classifier.named_buffers(recurse=False)}
    content = save(head, metadata={"classes": json.dumps(classifier.classes)})
    return clip.export(classifier.model, directory, config, tokenizer=tokenizer, classifier=content)


def load_classifier(
    directory: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Predictor:
    """The `Classifier` or `DualClassifier` that its `save` wrote; `device` and `dtype` of its model as in `clip.load`.

    The tokenizer, transforms and configuration come from `clip.load("local-dir:<directory>")`. FileNotFoundError for
    a directory without a head, ValueError for a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(directory) / clip.CLASSIFIER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a directory that Classifier.save wrote holds one")
    try:
        with safe_open(path, "pt") as file:
            head = {name: file.get_tensor(name) for name in file.keys()}
            classes = json.loads(file.metadata()["classes"])
        embeddings, scale, bias = head["class_embeddings"], head["logit_scale"], head.get("bias")
        core = head.get("core_embeddings")
        beta = None if core is None else head["beta"].item()
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or no head of a classifier: {error!r:.200}") from error
    model = clip.load(f"local-dir:{directory}", device=device, dtype=dtype).model
    if core is None:
        return Classifier(model, embeddings, classes, logit_scale=scale, bias=bias).to(device)
    from robustft.methods.dual_classifier import DualClassifier  # which is made from this file's classes

    return DualClassifier(model, embeddings, core, classes, beta=beta, logit_scale=scale).to(device)


class Method(nn.Module):
    """A way to fine-tune a CLIP model: `step`, the optimiser, `after_step`; at any time, `classifier`.

    The method trains a copy, `method.model`; the model it was given stays the zero-shot one. `parameters()`
    that are not trained do not require a gradient, and `state_dict()` holds all that a resume needs: student,
    head, teacher and the number of steps done.

    Args:
        model: an open_clip model; parameters frozen in it stay frozen.
        tokenizer: its tokenizer.
        class_names: K names, at least two, in the order of the labels.
        templates: prompts with a place for the name, "a photo of a {}".
        total_steps: length of the run, for methods with a schedule.
        seed: of everything random in `step`.
    """

    takes_features = False  # whether a batch may hold unit features (N, D) in the images' place: with a frozen tower

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any,
        class_names: Sequence[str],
        templates: Sequence[Any],
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if len(class_names) < 2:
            raise ValueError(
                f"class_names must name at least two classes, got {list(class_names)}: the probability of a single one "
                "is always 1 and teaches nothing. Add a class for what it is not, or leave the model as it is and tell "
                'the class from everything else by Detector("max_cosine")'
            )
        self.model = copy.deepcopy(model)
        self.tokenizer = tokenizer
        self.class_names = tuple(class_names)
        self.templates = templates
        self.total_steps = total_steps
        self.seed = seed
        self.config: dict[str, Any] = {
            "method": type(self).__name__,
            "class_names": list(self.class_names),
            "total_steps": total_steps,
            "seed": seed,
        }
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def step(self, batch: Any) -> Step:
        """The loss of one batch: (images, labels), (images, texts) or {"image", "label" and / or "text"}."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Call after every optimiser step: counts it, and moves whatever follows the weights."""
        self.steps += 1

    def classifier(self) -> Classifier:
        """The classifier learnt so far; it shares the method's model."""
        raise NotImplementedError

    def checked(self, batch: Any) -> Batch:
        """The batch's parts, or an error that says what is wrong with them."""
        images, labels, texts = unpack(batch, self.takes_features)
        weight = next(self.model.parameters())
        if images.device != weight.device:
            raise ValueError(f"images are on {images.device}, the model is on {weight.device}")
        if labels is not None:
            labels = labels.to(weight.device, torch.int64)
            check_labels(labels, len(self.class_names))
        return Batch(images, labels, texts)
