"""The losses as modules, with open_clip's call: `loss(image_features, text_features, logit_scale, output_dict=...)`.

In dictionary form only terms that add up to the objective are returned, already weighted, under keys that end in
`_loss`: open_clip 3.x sums every value, 4.x those keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustft.functional import contrastive_distillation_loss, contrastive_loss, cross_penalty, orthogonality_penalty


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
        student = (image_features, text_features, logit_scale)
        options = {"labels": labels, "weight": weight, "group": self.group}
        if teacher[0] is None:
            losses = {"contrastive_loss": contrastive_loss(*student, **options)}
        else:
            terms = contrastive_distillation_loss(*student, *teacher, **options)
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
