"""FLYP: fine-tune like you pretrain (Goyal et al., CVPR 2023, arXiv 2212.00638).

    u (N, D)   image features
    t (N, D)   features of captions template(class), a template drawn for each image
    L = 1/2 [CE(s u t^T, targets) + CE(s t u^T, targets)]                  CLIP
    L = 1/N sum_ij softplus(-y_ij (s u t^T + b)_ij),   y = 2 targets - 1     SigLIP, of a model with a bias b

Both towers, the scale and the bias are trained with the loss they were pre-trained with; the head is built from the
fine-tuned text tower.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.clip.encoding import freeze_idle
from robustft.clip.prompts import PromptTable, tokenize
from robustft.data.seeds import stateless_generator
from robustft.data.sources import on_host
from robustft.functional import classification_loss, contrastive_loss, sigmoid_contrastive_loss
from robustft.machine import Loss
from robustft.methods.base import Method, Shared, Step
from robustft.methods.l2_sp import L2SP, check_l2_sp
from robustft.methods.options import check_weights
from robustft.ops import arguments
from robustft.predictors.base import Classifier


class Pairs(NamedTuple):
    """Images (N, C, H, W), tokens (U, L) and each image's row of these (N,), or None for 0 .. N - 1.

    `labels` (N,) are those that share targets, None for the diagonal's; `classes` (N,) those that are known. `captions`
    (U,) are the tokens' rows of the method's table of prompts, None for texts that came with the batch.
    """

    images: Tensor
    tokens: Tensor
    rows: Tensor | None
    labels: Tensor | None
    classes: Tensor | None
    captions: Tensor | None


class CaptionOptions(Shared, total=False):
    """The options of `CaptionMethod`, for the constructors that hand them on."""

    targets: Literal["diagonal", "label"]
    loss: Loss


class CaptionMethod(Method):
    """A method whose batches are images and captions `template(class)`, drawn per image on the fly.

    The released code of FLYP materialises every (image, template) pair as a row of a CSV file; drawing a template per
    image is the same distribution. Distinct captions are encoded once and gathered, so the text tower costs
    at most K x templates captions a step however large the batch is.

    Args:
        targets: "diagonal", each image's own caption is its one positive (as released), or "label", captions
            of the same class share the target. Under a sigmoid a caption of an image's own class that is no positive
            is a negative, so that probabilities of pairs come out too small by the number of such captions; the order
            of classes does not.
        loss: "softmax", CLIP's; "sigmoid", SigLIP's, for which the model needs a `logit_bias`; "auto", the one that the
            model was made for: "sigmoid" if it has a bias. Parameters that the loss does not need are frozen: the bias
            under a softmax, and what stands in neither tower, as CoCa's decoder.
        others: as for `Method`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        targets: Literal["diagonal", "label"] = "diagonal",
        loss: Loss = "auto",
        **shared: Unpack[Shared],
    ) -> None:
        if targets not in ("diagonal", "label"):
            raise ValueError(f'targets must be "diagonal" or "label", got {targets!r}')
        if loss not in ("auto", "softmax", "sigmoid"):
            raise ValueError(f'loss must be "auto", "softmax" or "sigmoid", got {loss!r}')
        has_bias = clip.logit_bias(model) is not None
        if loss == "sigmoid" and not has_bias:
            raise ValueError(
                'loss="sigmoid" needs a model with a logit_bias, as SigLIP\'s are; this one has none. Train it by '
                'loss="softmax", or give it one: "init_logit_bias": -10 in its model_cfg'
            )
        super().__init__(model, **shared)
        self.sigmoid = loss == "sigmoid" or (loss == "auto" and has_bias)
        self.config["loss"] = "sigmoid" if self.sigmoid else "softmax"
        freeze_idle(self.model, bias=self.sigmoid)
        self.targets = targets
        self.prompts = PromptTable(self.tokenizer, self.class_names, self.templates)

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
        rows: Tensor | None = None
        captions: Tensor | None = None
        if texts is None:
            assert labels is not None  # a batch has one of both
            drawn = self.prompts.draw(on_host(labels), stateless_generator(self.seed, "captions", self.steps_done))
            captions, rows = drawn.unique(return_inverse=True)
            tokens = self.prompts.captions[captions]
        else:
            tokens, rows = distinct(texts if isinstance(texts, Tensor) else tokenize(self.tokenizer, texts))
        multiple = 1 if self.steps.device.type == "cpu" else 8
        tokens = clip.trim_padding(self.model, tokens, multiple=multiple).to(self.steps.device, non_blocking=True)
        rows = None if rows is None else rows.to(self.steps.device, non_blocking=True)
        return Pairs(images, tokens, rows, labels if self.targets == "label" else None, labels, captions)

    @staticmethod
    def features(model: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Unit features of images and captions, (N, D) each."""
        t = clip.encode_texts(model, pairs.tokens)
        # F.embedding, because the gradient of t[index] adds up in no fixed order on several threads.
        return clip.encode_images(model, pairs.images), t if pairs.rows is None else F.embedding(pairs.rows, t)

    def contrastive(self, u: Tensor, t: Tensor, pairs: Pairs, label_smoothing: float = 0.0) -> Tensor:
        """The loss of features u, t (N, D); the gradient reaches them, the scale and, of a sigmoid, the bias."""
        s, b = clip.logit_scale(self.model), clip.logit_bias(self.model)
        if self.sigmoid and b is not None:
            return sigmoid_contrastive_loss(u, t, s, b, labels=pairs.labels)
        return contrastive_loss(u, t, s, labels=pairs.labels, label_smoothing=label_smoothing)

    def check_smoothing(self, label_smoothing: float) -> None:
        """ValueError for one that the loss does not have."""
        if label_smoothing and self.sigmoid:
            raise ValueError(
                f"label_smoothing is {label_smoothing}; expected 0: it mixes the targets of a softmax, and this model, "
                'which has a logit_bias, is trained by a sigmoid. loss="softmax" has it'
            )

    def zero_shot_classifier(self, model: nn.Module | None = None) -> Classifier:
        """As of any method; a bias that the loss did not train is not the classifier's."""
        found = super().zero_shot_classifier(model)
        if not self.sigmoid:
            found.logit_bias = None
        return found

    def penalty(self, u: Tensor, t: Tensor, pairs: Pairs, variant: str) -> Tensor:
        """CMP's misalignment penalty (arXiv 2501.17595) of features u, t (N, D) among the classes of the batch.

        A class's embedding is the unit mean of its captions' features there, so that captions of one class are not
        each other's errors, and no text is encoded for it.
        """
        if pairs.classes is None:
            raise ValueError("misalignment needs labels in the batch, which has texts only")
        present, classes = pairs.classes.unique(return_inverse=True)
        # A product, because index_add adds up in no fixed order on several threads.
        w = F.normalize(F.one_hot(classes, len(present)).to(t).T @ t, dim=-1)
        return classification_loss(u, w, classes, clip.logit_scale(self.model), variant=variant).misalignment


def distinct(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows (U, L) of tokens that differ, and the row (N,) of each text among them: None where all N differ, or where
    an accelerator would have to be waited for."""
    if not arguments.readable(tokens):
        return tokens, None
    found, rows = tokens.unique(dim=0, return_inverse=True)
    return (tokens, None) if len(found) == len(tokens) else (found, rows)


class FLYP(CaptionMethod):
    """Contrastive fine-tuning with captions `template(class)`, as the model was pre-trained.

    Args:
        label_smoothing: e mixes the targets as (1 - e) target + e / N; of a softmax alone.
        misalignment: lambda, the weight of CMP's penalty (arXiv 2501.17595) on the classes of the batch; its batches
            need labels. variant: of the penalty, as in `functional.classification_loss`.
        l2_sp: weight of half the squared distance of all trained parameters to their start (`l2_sp.L2SP`).
        others: as for `CaptionMethod`.

    Source: Goyal et al., FLYP (CVPR 2023, arXiv 2212.00638), and its released code.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        label_smoothing: float = 0.0,
        l2_sp: float = 0.0,
        misalignment: float = 0.0,
        variant: str = "neg_log_ratio",
        **options: Unpack[CaptionOptions],
    ) -> None:
        arguments.check_smoothing(label_smoothing)
        check_l2_sp(l2_sp)
        check_weights(misalignment=misalignment)
        arguments.check_variant(variant)
        super().__init__(model, **options)
        self.check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing
        self.l2_sp = L2SP(self, l2_sp) if l2_sp else None
        self.misalignment, self.variant = misalignment, variant

    def step(self, batch: Any) -> Step:
        pairs = self.pairs(batch)
        u, t = self.features(self.model, pairs)
        terms = {"contrastive": self.contrastive(u, t, pairs, self.label_smoothing)}
        if self.misalignment:
            terms["misalignment"] = self.penalty(u, t, pairs, self.variant)
        out = Step.of(terms, {"contrastive": 1.0, "misalignment": self.misalignment})
        return out if self.l2_sp is None else self.l2_sp.added(out, self)

    def classifier(self) -> Classifier:
        """The fine-tuned image tower, and the prompts' class embeddings under the fine-tuned text tower."""
        return self.zero_shot_classifier()
