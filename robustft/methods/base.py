"""What every method shares.

A CLIP classifier is a similarity with a fixed set of texts,

    u = normalize(f(x))  (N, D)     image features
    w                    (K, D)     class embeddings, one row a class
    z = s u w^T + b      (N, K)     logits;  p = softmax(z)
    c = u normalize(w)^T (N, K)     cosines, what OOD scores such as MCM are made of

and a method is a way to train f (and w): `step(batch)` gives a loss, `after_step()` follows the optimiser's
step, `classifier()` gives the `Predictor` learnt so far. Everything random in a step is a function of (seed,
step), so that a resumed run repeats it exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustft.data.sources import Batch, check_labels, unpack
from robustft.predictors.base import Predictor


class Step(NamedTuple):
    """One step: the weighted sum to differentiate, and its terms, un-weighted and detached, to log."""

    loss: Tensor
    terms: dict[str, Tensor]


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

    def begin_run(self, total_steps: int) -> None:
        """The run's length, told by `fit` before the first step; one given to the constructor goes before it."""
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")

    def step(self, batch: Any) -> Step:
        """The loss of one batch: (images, labels), (images, texts) or {"image", "label" and / or "text"}."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Call after every optimiser step: counts it, and moves whatever follows the weights."""
        self.steps += 1

    def classifier(self) -> Predictor:
        """The predictor learnt so far; it shares the method's model."""
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
