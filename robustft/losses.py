"""The losses as modules, with open_clip's call: `loss(image_features, text_features, logit_scale, output_dict=...)`.

In dictionary form only terms that add up to the objective are returned, already weighted, under keys that end in
`_loss`: open_clip 3.x sums every value, 4.x those keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustft.functional import (
    classification_loss,
    contrastive_distillation_loss,
    contrastive_loss,
    cross_penalty,
    dual_risk,
    orthogonality_penalty,
)


class ContrastiveLoss(nn.Module):
    """CLIP's symmetric loss, streamed: drop-in for open_clip's `ClipLoss`. See `functional.contrastive_loss`."""

    def __init__(self, *, label_smoothing: float = 0.0, group: torch.distributed.ProcessGroup | None = None):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        labels: Tensor | None = None,
        weight: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            labels=labels,
            label_smoothing=self.label_smoothing,
            weight=weight,
            group=self.group,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class CaRotLoss(nn.Module):
    """CaRot's objective on features: contrastive + orthogonality + self-distillation.

    Without the teacher's features the distillation is left out, as CaRot does at its first step; without
    `visual_projection` the orthogonality penalty is, and without `text_projection` too the cross term
    `||Wv Wt^T||_F`. Defaults are the released command's weights.

    Source: Oh et al. 2024 (arXiv 2311.01723).
    """

    def __init__(
        self,
        *,
        orthogonality_weight: float = 0.2,
        distillation_weight: float = 1.5,
        cross_weight: float = 0.05,
        squared: bool = False,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__()
        self.orthogonality_weight = orthogonality_weight
        self.distillation_weight = distillation_weight
        self.cross_weight = cross_weight
        self.squared = squared
        self.group = group

    def forward(
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
        labels: Tensor | None = None,
        weight: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        teacher = (teacher_image_features, teacher_text_features, teacher_logit_scale)
        if any(part is None for part in teacher) != all(part is None for part in teacher):
            raise ValueError("teacher_image_features, teacher_text_features and teacher_logit_scale go together")
        if teacher_image_features is None or teacher_text_features is None or teacher_logit_scale is None:
            loss = contrastive_loss(
                image_features, text_features, logit_scale, labels=labels, weight=weight, group=self.group
            )
            losses = {"contrastive_loss": loss}
        else:
            terms = contrastive_distillation_loss(
                image_features,
                text_features,
                logit_scale,
                teacher_image_features,
                teacher_text_features,
                teacher_logit_scale,
                labels=labels,
                weight=weight,
                group=self.group,
            )
            losses = {
                "contrastive_loss": terms.contrastive,
                "distillation_loss": self.distillation_weight * terms.distillation,
            }
        if visual_projection is not None:
            penalty = orthogonality_penalty(visual_projection, squared=self.squared)
            losses["orthogonality_loss"] = self.orthogonality_weight * penalty
            if text_projection is not None:
                losses["cross_loss"] = self.cross_weight * cross_penalty(visual_projection, text_projection)
        return losses if output_dict else torch.stack(list(losses.values())).sum()


class ClassificationLoss(nn.Module):
    """Cross-entropy of a class head, and CMP's misalignment penalty, streamed. See `functional.classification_loss`.

    The head (K, D), such as class embeddings of prompts, takes the place of open_clip's text features. A penalty of
    weight 0 is left out of the dictionary.

    Source: CMP (arXiv 2501.17595), whose released command has weight 1.
    """

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

    def forward(
        self,
        image_features: Tensor,
        class_embeddings: Tensor,
        logit_scale: Tensor | float,
        *,
        labels: Tensor,
        bias: Tensor | None = None,
        weight: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
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
        )
        losses = {"cross_entropy_loss": terms.cross_entropy}
        if self.misalignment_weight:
            losses["misalignment_loss"] = self.misalignment_weight * terms.misalignment
        return losses if output_dict else torch.stack(list(losses.values())).sum()


class DualRiskLoss(nn.Module):
    """DRM's two risks on class heads: cross-entropy under default prompts, soft labels under concept descriptions.

    See `functional.dual_risk`. `methods.DRM` has FLYP's contrastive loss as its empirical risk: for that, add a
    `ContrastiveLoss` to the dictionary's "worst_case_loss".

    Source: DRM (arXiv 2411.19757); worst_case_weight is its lambda.
    """

    def __init__(self, *, worst_case_weight: float = 1.0):
        super().__init__()
        self.worst_case_weight = worst_case_weight

    def forward(
        self,
        image_features: Tensor,
        class_embeddings: Tensor,
        logit_scale: Tensor | float,
        *,
        core_embeddings: Tensor,
        labels: Tensor,
        core_labels: Tensor,
        weight: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        terms = dual_risk(
            image_features, class_embeddings, core_embeddings, labels, core_labels, logit_scale, weight=weight
        )
        losses = {"empirical_loss": terms.empirical, "worst_case_loss": self.worst_case_weight * terms.worst_case}
        return losses if output_dict else torch.stack(list(losses.values())).sum()
