"""CaRot: calibrated robust fine-tuning (Oh et al., NeurIPS 2024, arXiv 2311.01723).

u, t  (N, D)   features of the student, which is trained;   s its scale
u', t', s'     those of its teacher, an occasional moving average of it
Wv, Wt         visual and text projections, stored (in, D): feature = hidden @ W; `clip.visual_projection` says which

contrastive    1/2 [CE(s u t^T) + CE(s t u^T)]
cross          || Wv Wt^T ||_F
orthogonality  || Wv^T Wv - I ||_F
distillation   -(1/N) sum_i [ softmax(s' u' t'^T)_i . log softmax(s u t^T)_i  +  the same from text to image ]

SigLIP         of a model with a bias b, sigmoids take the place of the softmaxes: FLYP's contrastive loss, and
               -(1/N) sum_ij [ p'_ij log p_ij + (1 - p'_ij) log(1 - p_ij) ],   p = sigmoid(s u t^T + b)

L = contrastive + 0.05 cross + 0.2 orthogonality + 1.5 distillation
teacher <- m teacher + (1 - m) student   every 500 steps;   m: 0.05 -> 0.9 over the first fifth of the run
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.losses import CROSS_WEIGHT, DISTILLATION_WEIGHT, ORTHOGONALITY_WEIGHT, CaRotLoss
from robustft.methods.base import Step
from robustft.methods.flyp import CaptionMethod, CaptionOptions
from robustft.methods.options import check_weights
from robustft.ops import arguments
from robustft.predictors.base import Classifier

FEW_STEPS = 10  # in a run this short even a teacher that moves at every step hardly matters


class CaRot(CaptionMethod):
    """FLYP, an orthogonal visual projection, and self-distillation from a slow teacher.

    The defaults reproduce the released code, which differs from the paper: the orthogonality penalty is the
    norm itself (`squared=True` for the paper's square), there is the cross penalty, and the distillation adds
    both directions without the half. The distillation is skipped at step 0, where teacher and student are
    one; it is computed from log-softmax, where the released code's log(softmax) can overflow. The teacher
    averages parameters only: buffers (running statistics of a ResNet tower) stay the pre-trained ones, in
    evaluation mode. Of a model with adapters it averages these alone, and shares the frozen weights. The student is
    evaluated; `classifier(teacher=True)` for the other. Averaging every step collapses the teacher onto the student,
    and at an interval of the whole run it stays near where it began: both are warned of.

    Args:
        misalignment, variant: as for `FLYP`.
        cross_weight, orthogonality_weight, distillation_weight: of the terms; a term of weight 0 is neither
            computed nor reported. A tower that ends in no linear map has no penalty, of which a warning tells.
        squared: square the orthogonality norm.
        ema_interval: steps between updates of the teacher; the first follows step 0. None: 500 as published, or 0.02
            of the run where that is less (500 are that part of the paper's 25,030), but at least 2.
        ema_interval_fraction: the same as a fraction of the run, instead.
        ema_start, ema_end, ema_warmup_fraction: the momentum's ramp, over a part of the run.
        others: as for `CaptionMethod`. The run's length is needed: `total_steps`, or `begin_run` before the first step.

    Source: Oh et al., CaRot (NeurIPS 2024, arXiv 2311.01723), and its released code.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        misalignment: float = 0.0,
        variant: str = "neg_log_ratio",
        cross_weight: float = CROSS_WEIGHT,
        orthogonality_weight: float = ORTHOGONALITY_WEIGHT,
        distillation_weight: float = DISTILLATION_WEIGHT,
        squared: bool = False,
        ema_interval: int | None = None,
        ema_interval_fraction: float | None = None,
        ema_start: float = 0.05,
        ema_end: float = 0.9,
        ema_warmup_fraction: float = 0.2,
        **options: Unpack[CaptionOptions],
    ) -> None:
        check_weights(
            cross_weight=cross_weight,
            orthogonality_weight=orthogonality_weight,
            distillation_weight=distillation_weight,
            misalignment=misalignment,
        )
        arguments.check_variant(variant)
        fractions = {
            "ema_interval_fraction": ema_interval_fraction or 0.0,
            "ema_start": ema_start,
            "ema_end": ema_end,
            "ema_warmup_fraction": ema_warmup_fraction,
        }
        for name, value in fractions.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if ema_interval is not None and ema_interval < 1:
            raise ValueError(f"ema_interval must be at least 1, got {ema_interval}")
        super().__init__(model, **options)
        self.loss = CaRotLoss(
            orthogonality_weight=orthogonality_weight,
            distillation_weight=distillation_weight,
            cross_weight=cross_weight,
            squared=squared,
        )
        self.misalignment, self.variant = misalignment, variant
        self.given_interval, self.ema_interval_fraction = ema_interval, ema_interval_fraction
        self.ema_start, self.ema_end = ema_start, ema_end
        self.ema_warmup_fraction = ema_warmup_fraction
        self.teacher = self.frozen_copy()
        self.penalised = self._projections()
        if self.total_steps is not None:
            self._warn_of_the_interval()

    @property
    def ema_interval(self) -> int:
        """Steps between updates of the teacher; ValueError where it is a part of a run of unknown length."""
        if self.ema_interval_fraction is not None:
            return max(1, round(self.ema_interval_fraction * self.run_length()))
        return _default_interval(self.run_length()) if self.given_interval is None else self.given_interval

    def begin_run(self, total_steps: int) -> None:
        super().begin_run(total_steps)
        if self.total_steps is None:
            self._warn_of_the_interval()

    def train(self, mode: bool = True) -> CaRot:
        """Training mode for the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def step(self, batch: Any) -> Step:
        self.run_length()  # an unknown one is an error before the first step, not after it
        pairs = self.pairs(batch)
        u, t = self.features(self.model, pairs)
        others: dict[str, Tensor | None] = {}
        if self.loss.distillation_weight and self.steps > 0:
            with torch.no_grad():
                others["teacher_image_features"], others["teacher_text_features"] = self.features(self.teacher, pairs)
                others["teacher_logit_scale"] = clip.logit_scale(self.teacher)
                if self.sigmoid:
                    others["teacher_logit_bias"] = clip.logit_bias(self.teacher)
        if self.sigmoid:
            others["logit_bias"] = clip.logit_bias(self.model)
        for name in self.penalised:
            others[name] = getattr(clip, name)(self.model)
        terms = self.loss.terms(u, t, clip.logit_scale(self.model), labels=pairs.labels, **others)
        if self.misalignment:
            terms["misalignment"] = self.penalty(u, t, pairs, self.variant)
        return Step.of(terms, self.loss.weights | {"misalignment": self.misalignment})

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the teacher when its turn has come, and count the step."""
        step = int(self.steps)
        if step % self.ema_interval == 0:
            for module in (*self.model.modules(), *self.teacher.modules()):
                if reshard := getattr(module, "reshard", None):  # FSDP's: a pass without a backward leaves them whole
                    reshard()
            pairs = zip(self.teacher.parameters(), self.model.parameters(), strict=True)
            own = [(kept, p.detach()) for kept, p in pairs if kept is not p]  # the others are frozen, and shared
            torch._foreach_lerp_([kept for kept, _ in own], [p for _, p in own], 1.0 - self.momentum(step))
        super().after_step()

    def momentum(self, step: int) -> float:
        """How much of itself the teacher keeps at the update after `step`: a ramp, then ema_end."""
        ramp = self.ema_warmup_fraction * self.run_length()
        progress = 1.0 if step >= ramp else step / ramp
        return self.ema_start + (self.ema_end - self.ema_start) * progress

    def classifier(self, *, teacher: bool = False) -> Classifier:
        """The student's classifier, the one that the paper evaluates, or its teacher's."""
        return self.zero_shot_classifier(self.teacher if teacher else self.model)

    def _projections(self) -> tuple[str, ...]:
        """The last linear maps that the penalties need; a warning where a tower has none, and so no penalty."""
        try:
            clip.visual_projection(self.model)
        except ValueError as error:
            if asked := [name for name in ("orthogonality_weight", "cross_weight") if getattr(self.loss, name)]:
                warnings.warn(f"CaRot goes without the terms of {' and '.join(asked)}: {error}", stacklevel=5)
            return ()
        try:
            clip.text_projection(self.model)
        except ValueError as error:
            if self.loss.cross_weight:
                warnings.warn(f"CaRot goes without the term of cross_weight: {error}", stacklevel=5)
            return ("visual_projection",)
        return ("visual_projection", "text_projection")

    def _warn_of_the_interval(self) -> None:
        """Where an interval was asked for with which the teacher teaches little in a run of this length."""
        if not self.loss.distillation_weight or self.given_interval is self.ema_interval_fraction:
            return
        interval, steps = self.ema_interval, self.run_length()
        never, always = interval >= steps > 1, interval == 1 and steps > FEW_STEPS
        if never or always:
            warnings.warn(
                f"CaRot's teacher moves every {interval} steps and this run has {steps}: it will "
                + ("follow step 0 only" if never else "collapse onto the student")
                + f". Set ema_interval, say to {_default_interval(steps)}.",
                stacklevel=4,
            )


def _default_interval(steps: int) -> int:
    """500 steps in a run of the paper's 25,030, and the same part of a shorter one."""
    return min(500, max(2, round(0.02 * steps)))
