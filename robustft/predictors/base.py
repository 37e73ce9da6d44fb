"""What is asked for classes: a `Predictor`, and the plain one, a CLIP model with a head.

u = normalize(f(x))  (N, D)     image features
w                    (K, D)     class embeddings, one row a class
z = s u w^T + b      (N, K)     logits;  p = softmax(z)
c = u normalize(w)^T (N, K)     cosines
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.clip.outputs import Outputs, evaluating, similarities
from robustft.data.sources import batches
from robustft.ops.precision import at_least_float32


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
        """Outputs and labels (N,) of a whole set, on the CPU; data as for `robustft.data.sources`."""
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
        """Outputs of unit features (N, D) that exist already, such as `robustft.clip.encode` keeps."""
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
    from robustft.predictors.dual import DualClassifier  # which is made from this file's classes

    return DualClassifier(model, embeddings, core, classes, beta=beta, logit_scale=scale).to(device)
