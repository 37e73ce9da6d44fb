"""FLYP: fine-tune like you pretrain (Goyal et al., CVPR 2023, arXiv 2212.00638).

    u (N, D)   image features
    t (N, D)   features of captions template(class), a template drawn for each image
    L = 1/2 [CE(s u t^T, targets) + CE(s t u^T, targets)]

Both towers and the scale are trained with the loss they were pre-trained with; the head is built from the
fine-tuned text tower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from robustft import clip
from robustft.clip.prompts import PromptTable, tokenize
from robustft.data.seeds import stateless_generator
from robustft.functional import classification_loss, contrastive_loss
from robustft.methods.base import Method, Step
from robustft.methods.l2_sp import L2SP, check_l2_sp
from robustft.ops import arguments
from robustft.predictors.base import Classifier
from robustft.predictors.zero_shot import zero_shot_classifier


class Pairs(NamedTuple):
    """Images (N, C, H, W), tokens (U, L) and each image's row of these (N,), or None for 0 .. N - 1.

    `labels` (N,) are those that share targets, None for the diagonal's; `classes` (N,) those that are known.
    """

    images: Tensor
    tokens: Tensor
    index: Tensor | None
    labels: Tensor | None
    classes: Tensor | None


class FLYP(Method):
    """Contrastive fine-tuning with captions `template(class)`, drawn per image on the fly.

    The released code materialises every (image, template) pair as a row of a CSV file; drawing a template per
    image is the same distribution. Distinct captions are encoded once and gathered, so the text tower costs
    at most K x templates captions a step however large the batch is.

    Args:
        model, tokenizer, class_names, templates, total_steps, seed: as for `Method`.
        targets: "diagonal", each image's own caption is its one positive (as released), or "label", captions
            of the same class share the target.
        label_smoothing: e mixes the targets as (1 - e) target + e / N.
        misalignment: lambda, the weight of CMP's penalty (arXiv 2501.17595) on the classes of the batch; its batches
            need labels. variant: of the penalty, as in `functional.classification_loss`.
        l2_sp: weight of half the squared distance of all trained parameters to their start (`l2_sp.L2SP`).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any,
        class_names: Sequence[str],
        templates: Sequence[Any],
        total_steps: int | None = None,
        seed: int = 0,
        targets: Literal["diagonal", "label"] = "diagonal",
        label_smoothing: float = 0.0,
        l2_sp: float = 0.0,
        misalignment: float = 0.0,
        variant: str = "neg_log_ratio",
    ) -> None:
        if targets not in ("diagonal", "label"):
            raise ValueError(f'targets must be "diagonal" or "label", got {targets!r}')
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        check_l2_sp(l2_sp)
        if not 0.0 <= misalignment < float("inf"):
            raise ValueError(f"misalignment must be finite and not negative, got {misalignment}")
        arguments.check_variant(variant)
        super().__init__(
            model,
            tokenizer=tokenizer,
            class_names=class_names,
            templates=templates,
            total_steps=total_steps,
            seed=seed,
        )
        self.targets = targets
        self.label_smoothing = label_smoothing
        self.prompts = PromptTable(tokenizer, class_names, templates)
        self.l2_sp = L2SP(self, l2_sp) if l2_sp else None
        self.misalignment, self.variant = misalignment, variant
        self.config |= {
            "targets": targets,
            "label_smoothing": label_smoothing,
            "l2_sp": l2_sp,
            **({"misalignment": misalignment, "variant": variant} if misalignment else {}),
            "prompts": _digest(self.prompts),
        }

    def step(self, batch: Any) -> Step:
        pairs = self.pairs(batch)
        u, t = self.features(self.model, pairs)
        loss = contrastive_loss(
            u, t, clip.logit_scale(self.model), labels=pairs.labels, label_smoothing=self.label_smoothing
        )
        out = self.with_misalignment(Step(loss, {"contrastive": loss.detach()}), u, t, pairs)
        return out if self.l2_sp is None else self.l2_sp.added(out, self)

    def with_misalignment(self, out: Step, u: Tensor, t: Tensor, pairs: Pairs) -> Step:
        """A step with CMP's penalty, if it has a weight, of the classes in the batch.

        A class's embedding is the unit mean of its captions' features there, so that captions of one class are not
        each other's errors, and no text is encoded for it.
        """
        if not self.misalignment:
            return out
        if pairs.classes is None:
            raise ValueError("misalignment needs labels in the batch, which has texts only")
        present, classes = pairs.classes.unique(return_inverse=True)
        # A product, because index_add adds up in no fixed order on several threads.
        w = F.normalize(F.one_hot(classes, len(present)).to(t).T @ t, dim=-1)
        penalty = classification_loss(u, w, classes, clip.logit_scale(self.model), variant=self.variant).misalignment
        return Step(out.loss + self.misalignment * penalty, out.terms | {"misalignment": penalty.detach()})

    def classifier(self) -> Classifier:
        """The fine-tuned image tower, and the prompts' class embeddings under the fine-tuned text tower."""
        return zero_shot_classifier(
            self.model, tokenizer=self.tokenizer, class_names=self.class_names, templates=self.templates
        )

    def pairs(self, batch: Any) -> Pairs:
        """The batch as image-caption pairs: its own captions if it has some, else captions of its labels."""
        images, labels, texts = self.checked(batch)
        if self.targets == "label" and labels is None:
            raise ValueError('targets="label" needs labels in the batch, which has texts only')
        length = self.prompts.captions.shape[1]
        if isinstance(texts, Tensor) and texts.shape[1] != length:
            raise ValueError(
                f"text tokens must be (N, {length}), as the tokenizer makes them, got {tuple(texts.shape)}; "
                "labels would be (N,)"
            )
        if texts is None:
            tokens, index = self.prompts.sample(labels, stateless_generator(self.seed, "captions", int(self.steps)))
            index = index.to(images.device)
        else:
            tokens, index = texts if isinstance(texts, Tensor) else tokenize(self.tokenizer, texts), None
        return Pairs(images, tokens.to(images.device), index, labels if self.targets == "label" else None, labels)

    @staticmethod
    def features(model: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Unit features of images and captions, (N, D) each."""
        t = clip.encode_texts(model, pairs.tokens)
        # F.embedding, because the gradient of t[index] adds up in no fixed order on several threads.
        return clip.encode_images(model, pairs.images), t if pairs.index is None else F.embedding(pairs.index, t)


def _digest(prompts: PromptTable) -> str:
    digest = hashlib.sha256()
    for table in (prompts.captions, prompts.rows):
        digest.update(table.cpu().long().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
