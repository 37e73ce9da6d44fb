"""CaRot: calibrated robust fine-tuning (Oh et al., NeurIPS 2024, arXiv 2311.01723).

u, t  (N, D)   features of the student, which is trained;   s its scale
u', t', s'     those of its teacher, an occasional moving average of it
Wv, Wt         visual and text projections, stored (in, D): feature = hidden @ W

contrastive    1/2 [CE(s u t^T) + CE(s t u^T)]
cross          || Wv Wt^T ||_F
orthogonality  || Wv^T Wv - I ||_F
distillation   -(1/N) sum_i [ softmax(s' u' t'^T)_i . log softmax(s u t^T)_i  +  the same from text to image ]

L = contrastive + 0.05 cross + 0.2 orthogonality + 1.5 distillation
teacher <- m teacher + (1 - m) student   every 500 steps;   m: 0.05 -> 0.9 over the first fifth of the run
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.functional import contrastive_distillation_loss, contrastive_loss, cross_penalty, orthogonality_penalty
from robustft.methods.base import Step
from robustft.methods.flyp import FLYP
from robustft.predictors.base import Classifier
from robustft.predictors.zero_shot import zero_shot_classifier

FEW_STEPS = 10  # in a run this short even a teacher that moves at every step hardly matters


class CaRot(FLYP):
    """FLYP, an orthogonal visual projection, and self-distillation from a slow teacher.

    The defaults reproduce the released code, which differs from the paper: the orthogonality penalty is the
    norm itself (`squared=True` for the paper's square), there is the cross penalty, and the distillation adds
    both directions without the half. The distillation is skipped at step 0, where teacher and student are
    one; it is computed from log-softmax, where the released code's log(softmax) can overflow. The teacher
    averages parameters only: buffers (running statistics of a ResNet tower) stay the pre-trained ones, in
    evaluation mode. The student is evaluated; `classifier(teacher=True)` for the other. A short run needs its
    interval as a fraction: averaging every step collapses the teacher onto the student, and one of 300 steps
    never reaches a second update at the default interval.

    Args:
        model, tokenizer, class_names, templates, seed, targets, misalignment, variant: as for `FLYP`.
        total_steps: length of the run, which the momentum's ramp is a part of.
        cross_weight, orthogonality_weight, distillation_weight: of the terms; a term of weight 0 is neither
            computed nor reported.
        squared: square the orthogonality norm.
        ema_interval: steps between updates of the teacher; the first follows step 0.
        ema_interval_fraction: the same as a fraction of total_steps, instead (500 of the paper's 25,030 steps
            are 0.02).
        ema_start, ema_end, ema_warmup_fraction: the momentum's ramp.

    Source: Oh et al., CaRot (NeurIPS 2024, arXiv 2311.01723), and its released code.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any,
        class_names: Sequence[str],
        templates: Sequence[Any],
        total_steps: int,
        seed: int = 0,
        targets: Literal["diagonal", "label"] = "diagonal",
        misalignment: float = 0.0,
        variant: str = "neg_log_ratio",
        cross_weight: float = 0.05,
        orthogonality_weight: float = 0.2,
        distillation_weight: float = 1.5,
        squared: bool = False,
        ema_interval: int = 500,
        ema_interval_fraction: float | None = None,
        ema_start: float = 0.05,
        ema_end: float = 0.9,
        ema_warmup_fraction: float = 0.2,
    ) -> None:
        weights = {
            "cross": cross_weight,
            "orthogonality": orthogonality_weight,
            "distillation": distillation_weight,
        }
        for name, value in weights.items():
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}_weight must be finite and not negative, got {value}")
        fractions = {
            "ema_interval_fraction": ema_interval_fraction or 0.0,
            "ema_start": ema_start,
            "ema_end": ema_end,
            "ema_warmup_fraction": ema_warmup_fraction,
        }
        for name, value in fractions.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if total_steps is None:
            raise ValueError("total_steps is needed: the teacher's momentum ramps over a part of the run")
        if ema_interval_fraction is not None:
            ema_interval = max(1, round(ema_interval_fraction * total_steps))
        if ema_interval < 1:
            raise ValueError(f"ema_interval must be at least 1, got {ema_interval}")
        never, always = ema_interval >= total_steps > 1, ema_interval == 1 and total_steps > FEW_STEPS
        if distillation_weight and (never or always):
            warnings.warn(
                f"CaRot's teacher moves every {ema_interval} steps and this run has {total_steps}: it will "
                + ("follow step 0 only" if never else "collapse onto the student")
                + f". Set ema_interval, say to {max(2, round(0.02 * total_steps))}.",
                stacklevel=2,
            )
        super().__init__(
            model,
            tokenizer=tokenizer,
            class_names=class_names,
            templates=templates,
            total_steps=total_steps,
            seed=seed,
            targets=targets,
            misalignment=misalignment,
            variant=variant,
        )
        self.weights = {"contrastive": 1.0} | weights
        self.squared = squared
        self.ema_interval = ema_interval
        self.ema_start, self.ema_end = ema_start, ema_end
        self.ema_warmup_fraction = ema_warmup_fraction
        self.config |= {f"{name}_weight": value for name, value in weights.items()} | {
            "squared": squared,
            "ema_interval": ema_interval,
            "ema_start": ema_start,
            "ema_end": ema_end,
            "ema_warmup_fraction": ema_warmup_fraction,
        }
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval()
        if cross_weight or orthogonality_weight:
            # A tower without one is an error now rather than at the first step.
            clip.visual_projection(self.model)
        if cross_weight:
            clip.text_projection(self.model)

    def train(self, mode: bool = True) -> CaRot:
        """Training mode for the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def step(self, batch: Any) -> Step:
        pairs = self.pairs(batch)
        u, t = self.features(self.model, pairs)
        s = clip.logit_scale(self.model)
        terms: dict[str, Tensor] = {}
        if self.weights["distillation"] and self.steps > 0:
            with torch.no_grad():
                teacher = (*self.features(self.teacher, pairs), clip.logit_scale(self.teacher))
            both = contrastive_distillation_loss(u, t, s, *teacher, labels=pairs.labels)
            terms |= {"contrastive": both.contrastive, "distillation": both.distillation}
        else:
            terms["contrastive"] = contrastive_loss(u, t, s, labels=pairs.labels)
        if self.weights["orthogonality"]:
            wv = clip.visual_projection(self.model)
            terms["orthogonality"] = orthogonality_penalty(wv, squared=self.squared)
        if self.weights["cross"]:
            terms["cross"] = cross_penalty(clip.visual_projection(self.model), clip.text_projection(self.model))
        loss = sum(self.weights[name] * value for name, value in terms.items())
        out = Step(loss, {name: value.detach() for name, value in terms.items()})
        return self.with_misalignment(out, u, t, pairs)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the teacher when its turn has come, and count the step."""
        step = int(self.steps)
        if step % self.ema_interval == 0:
            torch._foreach_lerp_(
                list(self.teacher.parameters()), list(self.model.parameters()), 1.0 - self.momentum(step)
            )
        super().after_step()

    def momentum(self, step: int) -> float:
        """How much of itself the teacher keeps at the update after `step`: a ramp, then ema_end."""
        ramp = self.ema_warmup_fraction * self.total_steps
        progress = 1.0 if step >= ramp else step / ramp
        return self.ema_start + (self.ema_end - self.ema_start) * progress

    def classifier(self, *, teacher: bool = False) -> Classifier:
        """The student's classifier, the one that the paper evaluates, or its teacher's."""
        return zero_shot_classifier(
            self.teacher if teacher else self.model,
            tokenizer=self.tokenizer,
            class_names=self.class_names,
            templates=self.templates,
        )
