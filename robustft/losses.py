"""The losses as modules, with open_clip's call: `loss(image_features, text_features, logit_scale, output_dict=...)`.

    L = sum_k weight_k term_k

In dictionary form only terms that add up to the objective are returned, already weighted, under keys that end in
`_loss`: open_clip 3.x sums every value, 4.x those keys. `terms` returns them un-weighted, for who weighs and logs them,
as the methods do. A term of weight 0 is left out.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robustft.functional import (
    classification_loss,
    contrastive_distillation_loss,
    contrastive_loss,
    cross_penalty,
    dual_risk,
    orthogonality_penalty,
    sigmoid_contrastive_distillation_loss,
    sigmoid_contrastive_loss,
)
from robustft.ops.kinds import checked
from robustft.ops.precision import at_least_float32

_Side = tuple[Tensor, Tensor, Tensor | float, Tensor | float | None]  # features, scale and bias of a model

# CaRot's released command.
ORTHOGONALITY_WEIGHT, DISTILLATION_WEIGHT, CROSS_WEIGHT = 0.2, 1.5, 0.05


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum of all terms, by their weights, in the order of the terms; every objective is added up here."""
    return functools.reduce(operator.add, _weighted(terms, weights).values())


def _weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: value if weights[name] == 1.0 else weights[name] * value for name, value in terms.items()}


def _returned(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], output_dict: bool
) -> Tensor | dict[str, Tensor]:
    if not output_dict:
        return weighted_sum(terms, weights)
    return {f"{name}_loss": value for name, value in _weighted(terms, weights).items()}


def _all_ranks(world_size: int) -> torch.distributed.ProcessGroup:
    group = torch.distributed.group.WORLD
    if group is None:
        raise RuntimeError(
            f"world_size is {world_size}, but torch.distributed runs no processes: init_process_group first"
        )
    return group


def _checked_ranks(world_size: int, group: torch.distributed.ProcessGroup | None) -> int:
    if world_size < 1 or (world_size > 1 and group is not None):
        raise ValueError(f"world_size is {world_size}; expected at least 1, and 1 where a group is given")
    return world_size


def _to_be_averaged(loss: Tensor, world_size: int) -> Tensor:
    """The value as it is, the gradient as often as it will be divided."""
    return loss if world_size == 1 else loss + (world_size - 1) * (loss - loss.detach())


class _Terms(nn.Module):
    """A loss that adds up its `terms` by its `weights`: `forward` takes what `terms` takes."""

    @property
    def weights(self) -> dict[str, float]:
        """Of `terms`."""
        raise NotImplementedError

    def terms(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What `forward` adds up, un-weighted, by name."""
        raise NotImplementedError

    def forward(self, *args: Any, output_dict: bool = False, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        """The sum of `terms(...)`, or with `output_dict` each of them, weighted."""
        return _returned(self.terms(*args, **kwargs), self.weights, output_dict)


class _OverRanks(nn.Module):
    """A loss with open_clip's `world_size`, or with a `group`."""

    group: torch.distributed.ProcessGroup | None
    world_size: int

    def rank_group(self) -> torch.distributed.ProcessGroup | None:
        """The group over which the batch is spread, if it is."""
        return self.group if self.world_size == 1 else _all_ranks(self.world_size)


class ContrastiveLoss(_OverRanks):
    """CLIP's symmetric loss, streamed: drop-in for open_clip's `ClipLoss`. See `functional.contrastive_loss`.

    Takes ClipLoss's arguments too. With `world_size` above 1 the batch is the one of all ranks of the default process
    group, and gradients are those that DistributedDataParallel, which averages, turns into the exact ones of the
    global loss: what ClipLoss has with `gather_with_grad`. That is so whatever `local_loss` and `gather_with_grad`
    say, except that the loss returned is always the global one. `rank` and `cache_labels` change nothing. With `group`
    instead, gradients are as in `functional.contrastive_loss`, to be summed. A `logit_bias` shifts every logit alike,
    which a softmax does not see: it gets a gradient of 0. ValueError for `use_horovod`, and for both kinds of groups.
    """

    @checked
    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        label_smoothing: float = 0.0,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod is True; expected False: processes are those of torch.distributed")
        self.label_smoothing = label_smoothing
        self.group = group
        self.world_size = _checked_ranks(world_size, group)

    @checked
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        labels: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        loss = contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            labels=labels,
            label_smoothing=self.label_smoothing,
            weight=weight,
            group=self.rank_group(),
        )
        loss = _to_be_averaged(loss, self.world_size)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigmoidContrastiveLoss(_OverRanks):
    """SigLIP's loss, streamed: drop-in for open_clip's `SigLipLoss`. See `functional.sigmoid_contrastive_loss`.

    Takes SigLipLoss's arguments too. With `world_size` above 1 the batch is the one of all ranks of the default process
    group, and gradients are those that DistributedDataParallel, which averages, turns into the exact ones of the
    global loss, as SigLipLoss's are; the loss returned is always the global one. `rank`, `cache_labels` and
    `dist_impl` change nothing. With `group` instead, gradients are as in `functional.sigmoid_contrastive_loss`, to be
    summed. A `logit_bias` of None is 0. ValueError for a `dist_impl` that SigLipLoss does not have, and for both kinds
    of groups.
    """

    @checked
    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl is {dist_impl!r}; expected bidir, shift, reduce, gather or None")
        self.group = group
        self.world_size = _checked_ranks(world_size, group)

    @checked
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
        *,
        labels: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        loss = sigmoid_contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            0.0 if logit_bias is None else logit_bias,
            labels=labels,
            weight=weight,
            group=self.rank_group(),
        )
        loss = _to_be_averaged(loss, self.world_size)
        return {"contrastive_loss": loss} if output_dict else loss


class CaRotLoss(_Terms):
    """CaRot's objective on features: contrastive + orthogonality + self-distillation.

    Without the teacher's features the distillation is left out, as CaRot does at its first step; without
    `visual_projection` the orthogonality penalty is, and without `text_projection` too the cross term
    `||Wv Wt^T||_F`. Defaults are the released command's weights. With a `logit_bias`, and the teacher's, contrastive
    loss and distillation are SigLIP's, of sigmoids (`functional.sigmoid_contrastive_distillation_loss`).

    TRACER distils from further perspectives, those of CLIP-KD. Their weights are 0 unless given, for no published
    command says them. With u', t', s' of the teacher, which gets no gradient, and p' = softmax(s' u' t'^T):

        feature             (1/N) sum_i ||u_i - u'_i||^2 + ||t_i - t'_i||^2
        cross_distillation  -(1/N) sum_i p'_i . log softmax(s u t'^T)_i, and the same from text to image: the sum, as of
                            the distillation
        interactive         1/2 [CE(s u t'^T) + CE(s t u'^T)], the contrastive loss with the teacher for the other side

    The last two hold matrices (N, N), and are of one process: without `group`. Under a sigmoid they are its losses of
    the pairs (u, t') and (u', t), added up and halved as above.

    Sources: Oh et al. 2024 (arXiv 2311.01723); the perspectives, TRACER, Asadollahzadeh et al. 2026 (arXiv 2605.29380)
    and CLIP-KD, Yang et al. 2024 (arXiv 2307.12732), section 3, which takes means of both directions.
    """

    @checked
    def __init__(
        self,
        *,
        orthogonality_weight: float = ORTHOGONALITY_WEIGHT,
        distillation_weight: float = DISTILLATION_WEIGHT,
        cross_weight: float = CROSS_WEIGHT,
        feature_weight: float = 0.0,
        cross_distillation_weight: float = 0.0,
        interactive_weight: float = 0.0,
        squared: bool = False,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__()
        self.orthogonality_weight = orthogonality_weight
        self.distillation_weight = distillation_weight
        self.cross_weight = cross_weight
        self.feature_weight = feature_weight
        self.cross_distillation_weight = cross_distillation_weight
        self.interactive_weight = interactive_weight
        self.squared = squared
        self.group = group
        if group is not None and (feature_weight or cross_distillation_weight or interactive_weight):
            raise ValueError(
                f"feature_weight, cross_distillation_weight and interactive_weight are {feature_weight}, "
                f"{cross_distillation_weight} and {interactive_weight}; expected 0 with a group: these terms are of "
                "the rows of one process"
            )

    def rank_group(self) -> torch.distributed.ProcessGroup | None:
        """The group over which the batch is spread, if it is."""
        return self.group

    @property
    def weights(self) -> dict[str, float]:
        """Of `terms`."""
        return {
            "contrastive": 1.0,
            "distillation": self.distillation_weight,
            "orthogonality": self.orthogonality_weight,
            "cross": self.cross_weight,
            "feature": self.feature_weight,
            "cross_distillation": self.cross_distillation_weight,
            "interactive": self.interactive_weight,
        }

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the teacher."""
        weights = self.weights
        return any(weights[name] for name in ("distillation", "feature", "cross_distillation", "interactive"))

    @checked
    def terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        teacher_image_features: Tensor | None = None,
        teacher_text_features: Tensor | None = None,
        teacher_logit_scale: Tensor | float | None = None,
        visual_projection: Tensor | None = None,
        text_projection: Tensor | None = None,
        logit_bias: Tensor | float | None = None,
        teacher_logit_bias: Tensor | float | None = None,
        labels: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What `forward` adds up, un-weighted, by name."""
        student = (image_features, text_features, logit_scale)
        u, t, s = (teacher_image_features, teacher_text_features, teacher_logit_scale)
        teacher = None if u is None or t is None or s is None else (u.detach(), t.detach(), s)

        def of_projections() -> dict[str, Tensor]:
            if teacher is None and not (u is None and t is None and s is None):
                raise ValueError("teacher_image_features, teacher_text_features and teacher_logit_scale go together")
            if s is not None and (logit_bias is None) != (teacher_logit_bias is None):
                raise ValueError("logit_bias and teacher_logit_bias go together: both models have one, or neither")
            found = {}
            if visual_projection is not None:
                if self.orthogonality_weight:
                    found["orthogonality"] = orthogonality_penalty(visual_projection, squared=self.squared)
                if text_projection is not None and self.cross_weight:
                    found["cross"] = cross_penalty(visual_projection, text_projection)
            return found

        if self.group is None:
            penalties = of_projections()
        else:
            from robustft.ops import ranks

            ranks.check_group(self.group)
            penalties = ranks.checked(self.group, of_projections)  # before the others wait for the features
        if teacher is not None and self.distillation_weight:
            if logit_bias is None or teacher_logit_bias is None:
                both = contrastive_distillation_loss(*student, *teacher, labels=labels, weight=weight, group=self.group)
            else:
                both = sigmoid_contrastive_distillation_loss(
                    *student, logit_bias, *teacher, teacher_logit_bias, labels=labels, weight=weight, group=self.group
                )
            found = {"contrastive": both.contrastive, "distillation": both.distillation}
        elif logit_bias is None:
            found = {"contrastive": contrastive_loss(*student, labels=labels, weight=weight, group=self.group)}
        else:
            loss = sigmoid_contrastive_loss(*student, logit_bias, labels=labels, weight=weight, group=self.group)
            found = {"contrastive": loss}
        found |= penalties
        if teacher is not None:
            found |= self._perspectives((*student, logit_bias), (*teacher, teacher_logit_bias), labels, weight)
        return found

    def _perspectives(
        self, student: _Side, teacher: _Side, labels: Tensor | None, weight: Tensor | None
    ) -> dict[str, Tensor]:
        """TRACER's terms beside the distillation, those that have a weight."""
        (u, t, s, b), (u0, t0, s0, b0) = student, teacher
        crossed = (u, t0), (u0, t)
        found: dict[str, Tensor] = {}
        if u0.shape != u.shape and (self.feature_weight or self.cross_distillation_weight or self.interactive_weight):
            raise ValueError(
                f"teacher_image_features is {tuple(u0.shape)}; expected {tuple(u.shape)}, as image_features, for terms "
                "that compare features of both models"
            )
        if self.feature_weight:
            image, text = (at_least_float32(x) - at_least_float32(x0) for x, x0 in ((u, u0), (t, t0)))
            each = image.square().sum(1) + text.square().sum(1)
            found["feature"] = (each if weight is None else weight * each).mean()
        if self.cross_distillation_weight:
            if b is None or b0 is None:
                p = _logits(u0, t0, s0)
                image, text = _soft_rows(u, t0, s, p.softmax(1), weight), _soft_rows(t, u0, s, p.T.softmax(1), weight)
            else:
                sigmoid = sigmoid_contrastive_distillation_loss
                image, text = (sigmoid(*pair, s, b, u0, t0, s0, b0, weight=weight).distillation for pair in crossed)
            found["cross_distillation"] = image + text
        if self.interactive_weight:
            if b is None:
                targets = _targets(labels, u)
                image, text = _soft_rows(u, t0, s, targets, weight), _soft_rows(t, u0, s, targets, weight)
            else:
                image, text = (sigmoid_contrastive_loss(*pair, s, b, labels=labels, weight=weight) for pair in crossed)
            found["interactive"] = (image + text) / 2
        return found


def _logits(x: Tensor, y: Tensor, s: Tensor | float) -> Tensor:
    """s x y^T, (N, M), at least float32 under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return s * (at_least_float32(x) @ at_least_float32(y).T)


def _soft_rows(x: Tensor, y: Tensor, s: Tensor | float, q: Tensor, weight: Tensor | None) -> Tensor:
    """-(1/N) sum_i q_i . log softmax(s x y^T)_i; the gradient reaches x and s."""
    # The head of the first risk is not used.
    return dual_risk(x, y, y, torch.zeros(len(x), dtype=torch.int64, device=x.device), q, s, weight=weight).worst_case


def _targets(labels: Tensor | None, like: Tensor) -> Tensor:
    """The targets (N, N) of a contrastive loss: the diagonal, or evenly over the rows of the same label."""
    if labels is None:
        return torch.eye(len(like), dtype=at_least_float32(like).dtype, device=like.device)
    same = (labels[:, None] == labels).to(at_least_float32(like).dtype)
    return same / same.sum(1, keepdim=True)


class ClassificationLoss(_Terms):
    """Cross-entropy of a class head, and CMP's misalignment penalty, streamed. See `functional.classification_loss`.

    The head (K, D), such as class embeddings of prompts, takes the place of open_clip's text features. A penalty of
    weight 0 is left out of the dictionary.

    Source: CMP (arXiv 2501.17595), whose released command has weight 1.
    """

    @checked
    def __init__(
        self,
        *,
        misalignment_weight: float = 0.0,
        variant: str = "neg_log_ratio",
        top1: bool = False,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.misalignment_weight = misalignment_weight
        self.variant = variant
        self.top1 = top1
        self.label_smoothing = label_smoothing

    @property
    def weights(self) -> dict[str, float]:
        """Of `terms`."""
        return {"cross_entropy": 1.0, "misalignment": self.misalignment_weight}

    @checked
    def terms(
        self,
        image_features: Tensor,
        class_embeddings: Tensor,
        logit_scale: Tensor | float,
        *,
        labels: Tensor,
        bias: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> dict[str, Tensor]:
        """What `forward` adds up, un-weighted, by name; 0-d, or (N,) with reduction "none"."""
        terms = classification_loss(
            image_features,
            class_embeddings,
            labels,
            logit_scale,
            bias=bias,
            variant=self.variant,
            top1=self.top1,
            label_smoothing=self.label_smoothing,
            weight=weight,
            reduction=reduction,
        )._asdict()
        return terms if self.misalignment_weight else {"cross_entropy": terms["cross_entropy"]}


class DualRiskLoss(_Terms):
    """DRM's two risks on class heads: cross-entropy under default prompts, soft labels under concept descriptions.

    See `functional.dual_risk`. `methods.DRM` has FLYP's contrastive loss as its empirical risk: for that, add a
    `ContrastiveLoss` to the dictionary's "worst_case_loss".

    Source: DRM (arXiv 2411.19757); worst_case_weight is its lambda.
    """

    @checked
    def __init__(self, *, worst_case_weight: float = 1.0):
        super().__init__()
        self.worst_case_weight = worst_case_weight

    @property
    def weights(self) -> dict[str, float]:
        """Of the two risks."""
        return {"empirical": 1.0, "worst_case": self.worst_case_weight}

    @checked
    def terms(
        self,
        image_features: Tensor,
        class_embeddings: Tensor,
        logit_scale: Tensor | float,
        *,
        core_embeddings: Tensor,
        labels: Tensor,
        core_labels: Tensor,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What `forward` adds up, un-weighted, by name."""
        return dual_risk(
            image_features, class_embeddings, core_embeddings, labels, core_labels, logit_scale, weight=weight
        )._asdict()
