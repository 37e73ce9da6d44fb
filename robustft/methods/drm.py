"""DRM: dual risk minimisation (Li et al., NeurIPS 2024, arXiv 2411.19757).

u (N, D)       image features, trained
w, v (K, D)    class embeddings of default prompts and of concept descriptions, under the trained text tower
q              proxy of what core features alone say of the label, by the frozen zero-shot model (core_proxy.py)

R_df = FLYP's contrastive loss of u and captions template(class)      the empirical risk
R_cd = -(1/N) sum_ik q_ik log softmax(s u v^T)_ik                     the worst-case risk, by its proxy
L    = R_df + lambda R_cd

p(y | x) = beta softmax(s u w^T) + (1 - beta) softmax(s u v^T),   beta = 1/2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.clip.encoding import freeze_idle
from robustft.clip.outputs import evaluating
from robustft.clip.prompts import match_descriptions
from robustft.functional import dual_risk
from robustft.methods.base import Step
from robustft.methods.core_proxy import CoreProxy, Ranges, core_similarities
from robustft.methods.flyp import CaptionMethod, CaptionOptions
from robustft.methods.options import check_weights, described
from robustft.ops import arguments
from robustft.predictors.base import Classifier
from robustft.predictors.dual import DualClassifier, check_beta


class DRM(CaptionMethod):
    """FLYP, and a second risk on concept descriptions, which discounts what a label owes to the background.

    Image tower, text tower and scale are trained by both risks. The proxy q comes with the batch, under "core", as
    `core_labels` computed it once; or DRM computes it on the fly, by a frozen copy of the model that it keeps and one
    more forward pass of the images. For that call `prepare(data)` first, which finds the range of each class's
    similarities. `classifier()` mixes both heads.

    The cost over FLYP is the text tower: the descriptions of all K classes are encoded at every step. More than
    `text_chunk` captions are encoded chunk by chunk, and once more in the backward, so that the activations of one
    chunk are in memory; see also `present_only`.

    The paper's training code was never released: objective and inference are the paper's, of the proxy only the
    ingredients are known (`CoreProxy`).

    Args:
        descriptions: {class name, as captions have it: description or [descriptions]}, or K of them in label order. A
            mapping whose names are not the classes is refused (`prompts.match_descriptions`).
        worst_case_weight: lambda, to be chosen on held-out ID data; 0 trains as `FLYP` does.
        empirical_weight: of R_df; 0 trains on the descriptions alone, with `CoreProxy(one_hot=1)` by cross-entropy.
        proxy: `CoreProxy()` by default. None: every batch has "core", and no frozen model is kept.
        present_only: encode and offer in R_cd only the classes that are in the batch. Cheaper for many classes, and
            another risk: its softmax is over those classes, and what q puts on the others is dropped, not
            renormalised.
        text_chunk: how many captions' activations are held at once.
        beta: share of the default prompts in `classifier()`.
        label_smoothing, loss: as for `FLYP`, of R_df; R_cd is a softmax's over the classes.
        others: as for `CaptionMethod`.

    Source: Li et al., DRM (NeurIPS 2024, arXiv 2411.19757).
    """

    uncompared = ("text_chunk", "beta")
    zero_shot: Classifier
    ranges: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        descriptions: Mapping[str, str | Sequence[str]] | Sequence[str | Sequence[str]],
        label_smoothing: float = 0.0,
        worst_case_weight: float = 1.0,
        empirical_weight: float = 1.0,
        proxy: CoreProxy | None = CoreProxy(),
        present_only: bool = False,
        text_chunk: int = 256,
        beta: float = 0.5,
        **options: Unpack[CaptionOptions],
    ) -> None:
        arguments.check_smoothing(label_smoothing)
        check_weights(worst_case_weight=worst_case_weight, empirical_weight=empirical_weight)
        if not worst_case_weight + empirical_weight > 0.0:
            raise ValueError("worst_case_weight and empirical_weight are both 0: there is nothing to train on")
        if text_chunk < 1:
            raise ValueError(f"text_chunk must be at least 1, got {text_chunk}")
        check_beta(beta)
        super().__init__(model, **options)
        self.check_smoothing(label_smoothing)
        if not empirical_weight:  # the risk of the descriptions is a softmax's
            freeze_idle(self.model, bias=False)
        self.label_smoothing = label_smoothing
        self.descriptions = match_descriptions(descriptions, self.class_names)
        self.concepts = clip.group_captions(self.tokenizer, self.descriptions, names=self.class_names)
        self.weights = {"contrastive": empirical_weight, "worst_case": worst_case_weight}
        self.present_only, self.text_chunk, self.beta = present_only, text_chunk, beta
        self.proxy = proxy if worst_case_weight else None
        self.config["descriptions"] = described(self.descriptions, "descriptions")
        if self.proxy is not None:
            frozen = self.frozen_copy()
            with torch.no_grad():
                core = clip.grouped_embeddings(frozen, self.concepts, batch_size=text_chunk)
            self.zero_shot = Classifier(frozen, core, self.classes)
            self.register_buffer("ranges", core.new_full((2, 2, len(core)), torch.nan))

    def train(self, mode: bool = True) -> DRM:
        """Training mode for the model; the frozen one stays in evaluation mode."""
        super().train(mode)
        if self.proxy is not None:
            self.zero_shot.eval()
        return self

    def prepare(self, data: Any, *, cache: str | Path | None = None, batch_size: int = 256) -> DRM:
        """Find the range of similarities of each class, by one pass of the frozen model over the training images.

        data, cache, batch_size: as for `core_labels`. The ranges are part of `state_dict()`: a resumed run has them.
        Without a worst-case risk there is nothing to do.
        """
        if not self.weights["worst_case"]:
            return self
        if self.proxy is None:
            raise ValueError("DRM(proxy=None) has no proxy to prepare: its batches bring it")
        frozen = self.zero_shot
        cosines, labels = core_similarities(
            frozen.model, data, frozen.class_embeddings, frozen.classes, cache=cache, batch_size=batch_size
        )
        self.ranges.copy_(torch.stack(CoreProxy.ranges(cosines, labels)))
        return self

    def step(self, batch: Any) -> Step:
        s = clip.logit_scale(self.model)
        terms: dict[str, Tensor] = {}
        if self.weights["contrastive"]:
            pairs = self.pairs(batch)
            u, t = self.features(self.model, pairs)
            terms["contrastive"] = self.contrastive(u, t, pairs, self.label_smoothing)
        else:
            u = clip.encode_images(self.model, self.checked(batch).images)
        if self.weights["worst_case"]:
            images, labels = self.labelled(batch)
            terms["worst_case"] = self._worst_case(u, labels, s, self._core(batch, images, labels))
        return Step.of(terms, self.weights)

    def classifier(self, *, beta: float | None = None) -> DualClassifier:
        """Both heads of the fine-tuned model, mixed with beta; 1 is the default prompts', 0 the descriptions'."""
        with evaluating(self.model), torch.no_grad():
            core = clip.grouped_embeddings(self.model, self.concepts, batch_size=self.text_chunk)
        default = self.zero_shot_classifier().class_embeddings
        return DualClassifier(self.model, default, core, self.classes, beta=self.beta if beta is None else beta)

    def _core(self, batch: Any, images: Tensor, labels: Tensor) -> Tensor:
        """q of a batch: (N,), or (N, K)."""
        given, classes = self.column(batch, "core"), len(self.class_names)
        if given is not None:
            if given.shape[1:] not in ((), (classes,)):
                raise ValueError(f'batch["core"] must be (N,) or (N, {classes}), got {tuple(given.shape)}')
            return given
        if self.proxy is None:
            raise ValueError('DRM(proxy=None) needs the proxy in every batch, under "core"; core_labels computes it')
        if self.ranges.isnan().any():
            raise ValueError('call prepare(train_data) first, or give the proxy with the batch, under "core"')
        with torch.no_grad():
            return self.proxy(self.zero_shot.outputs(images).cosines, labels, Ranges(*self.ranges))

    def _worst_case(self, u: Tensor, labels: Tensor, s: Tensor, q: Tensor) -> Tensor:
        concepts = self.concepts
        if self.present_only:
            present, labels = labels.unique(return_inverse=True)
            concepts, q = concepts.of(present), q if q.ndim == 1 else q[:, present]
        v = clip.grouped_embeddings(
            self.model, concepts, batch_size=self.text_chunk, checkpoint=len(concepts.tokens) > self.text_chunk
        )
        # The risk of the first head is not used: next to the towers its product costs nothing.
        return dual_risk(u, v.detach(), v, labels, q, s).worst_case
