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

TRACER         (Asadollahzadeh et al., ICML 2026, arXiv 2605.29380): the teacher is the mean of the start theta_0 and
               all iterates theta_1 .. theta_T so far, weighted by the density of Beta(1/2, 1/2) over the run,

teacher_t = sum_k<=t w_k theta_k / W_t = teacher_t-1 + (w_t / W_t) (theta_t - teacher_t-1),   W_t = sum_k<=t w_k
w_k       = 1 / (pi sqrt(x (1 - x)))   at x = (k + 1/2) / (T + 1)
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.losses import CROSS_WEIGHT, DISTILLATION_WEIGHT, ORTHOGONALITY_WEIGHT, CaRotLoss
from robustft.methods.base import Step
from robustft.methods.flyp import CaptionMethod, CaptionOptions, Pairs
from robustft.methods.kept_texts import KeptTexts
from robustft.methods.options import check_weights
from robustft.ops import arguments
from robustft.predictors.base import Classifier

FEW_STEPS = 10  # in a run this short even a teacher that moves at every step hardly matters


class CaRot(CaptionMethod):
    """FLYP, an orthogonal visual projection, and self-distillation from a slow teacher.

    The defaults reproduce the released code, which differs from the paper: the orthogonality penalty is the
    norm itself (`squared=True` for the paper's square), there is the cross penalty, and the distillation adds
    both directions without the half. The distillation is skipped at step 0, where teacher and student are
    one; it is computed from log-softmax, where the released code's log(softmax) can overflow. Captions made from labels
    pass the teacher once between its updates, where that costs less (`kept_texts`, with its memory). The teacher
    averages parameters only: buffers (running statistics of a ResNet tower) stay the pre-trained ones, in
    evaluation mode. Of a model with adapters it averages these alone, and shares the frozen weights. The student is
    evaluated; `classifier(teacher=True)` for the other. An exponential average that moves at every step collapses onto
    the student, and at an interval of the whole run it stays near where it began: both are warned of.

    `teacher="beta"` is TRACER's: a mean of all iterates that weighs the run's start and end most, and so keeps its
    distance from the student while it moves at every step. It holds nothing more than the other. In float32 so small a
    part of the way, w_t / W_t, can be below a weight's precision: of weights near 1, such as the gains of norms, the
    mean of a long run is exact to some hundredths of how far they moved. TRACER adds further perspectives of the
    teacher to the distillation, as `losses.CaRotLoss` says; no published command tells their weights.

    Args:
        misalignment, variant: as for `FLYP`.
        cross_weight, orthogonality_weight, distillation_weight: of the terms; a term of weight 0 is neither
            computed nor reported. A tower that ends in no linear map has no penalty, of which a warning tells.
        feature_weight, cross_distillation_weight, interactive_weight: of TRACER's other terms.
        squared: square the orthogonality norm.
        teacher: "ema", CaRot's, or "beta", TRACER's. After the run's end the second stays where it is.
        ema_interval: steps between updates of the teacher; the first follows step 0. None: of "beta" 1; else 500 as
            published, or 0.02 of the run where that is less (500 are that part of the paper's 25,030), but at least 2.
            Between updates, iterates are left out of the mean of "beta".
        ema_interval_fraction: the same as a fraction of the run, instead.
        ema_start, ema_end, ema_warmup_fraction: the momentum's ramp, over a part of the run; of "ema".
        others: as for `CaptionMethod`. The run's length is needed: `total_steps`, or `begin_run` before the first step.

    Sources: Oh et al., CaRot (NeurIPS 2024, arXiv 2311.01723), and its released code; TRACER (arXiv 2605.29380), whose
    average, its points in the run included, is CLIPood's (Shu et al., ICML 2023, arXiv 2302.00864).
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
        feature_weight: float = 0.0,
        cross_distillation_weight: float = 0.0,
        interactive_weight: float = 0.0,
        squared: bool = False,
        teacher: Literal["ema", "beta"] = "ema",
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
            feature_weight=feature_weight,
            cross_distillation_weight=cross_distillation_weight,
            interactive_weight=interactive_weight,
            misalignment=misalignment,
        )
        if teacher not in ("ema", "beta"):
            raise ValueError(f'teacher must be "ema" or "beta", got {teacher!r}')
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
            feature_weight=feature_weight,
            cross_distillation_weight=cross_distillation_weight,
            interactive_weight=interactive_weight,
            squared=squared,
        )
        self.average = teacher
        self.misalignment, self.variant = misalignment, variant
        self.given_interval, self.ema_interval_fraction = ema_interval, ema_interval_fraction
        self.ema_start, self.ema_end = ema_start, ema_end
        self.ema_warmup_fraction = ema_warmup_fraction
        self.teacher = self.frozen_copy()
        self.teacher_texts = KeptTexts(self.prompts)
        self.penalised = self._projections()
        if self.total_steps is not None:
            self._warn_of_the_interval()

    @property
    def ema_interval(self) -> int:
        """Steps between updates of the teacher; ValueError where it is a part of a run of unknown length."""
        if self.ema_interval_fraction is not None:
            return max(1, round(self.ema_interval_fraction * self.run_length()))
        if self.given_interval is not None:
            return self.given_interval
        return 1 if self.average == "beta" else _default_interval(self.run_length())

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
        if self.loss.needs_teacher and self.steps_done > 0:
            with torch.no_grad():
                others["teacher_image_features"], others["teacher_text_features"] = self._teacher_features(pairs)
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
        step = self.steps_done
        if step % self.ema_interval == 0:
            for module in (*self.model.modules(), *self.teacher.modules()):
                if reshard := getattr(module, "reshard", None):  # FSDP's: a pass without a backward leaves them whole
                    reshard()
            pairs = zip(self.teacher.parameters(), self.model.parameters(), strict=True)
            own = [(kept, p.detach()) for kept, p in pairs if kept is not p]  # the others are frozen, and shared
            torch._foreach_lerp_([kept for kept, _ in own], [p for _, p in own], self.pace(step))
        super().after_step()

    def pace(self, step: int) -> float:
        """How far the teacher goes towards the student at the update after `step`, from 0 to 1."""
        if self.average == "ema":
            return 1.0 - self.momentum(step)
        shares = beta_shares(self.run_length(), self.ema_interval)
        update = 1 + step // self.ema_interval
        return float(shares[update]) if update < len(shares) else 0.0

    def momentum(self, step: int) -> float:
        """How much of itself an exponential average keeps at the update after `step`: a ramp, then ema_end."""
        ramp = self.ema_warmup_fraction * self.run_length()
        progress = 1.0 if step >= ramp else step / ramp
        return self.ema_start + (self.ema_end - self.ema_start) * progress

    def classifier(self, *, teacher: bool = False) -> Classifier:
        """The student's classifier, the one that the paper evaluates, or its teacher's."""
        return self.zero_shot_classifier(self.teacher if teacher else self.model)

    def _teacher_features(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Unit features of images and captions, (N, D) each; captions of labels are encoded once for an interval."""
        t: Tensor | None = None
        if pairs.captions is not None:
            t = self.teacher_texts.of(self.teacher, pairs.captions, self.ema_interval)
        if t is None or pairs.rows is None:
            return self.features(self.teacher, pairs)
        return clip.encode_images(self.teacher, pairs.images), F.embedding(pairs.rows, t)

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
        if not self.loss.needs_teacher or self.given_interval is self.ema_interval_fraction:
            return
        interval, steps = self.ema_interval, self.run_length()
        never = interval >= steps > 1
        always = self.average == "ema" and interval == 1 and steps > FEW_STEPS
        if never or always:
            warnings.warn(
                f"CaRot's teacher moves every {interval} steps and this run has {steps}: it will "
                + ("follow step 0 only" if never else "collapse onto the student")
                + f". Set ema_interval, say to {1 if self.average == 'beta' else _default_interval(steps)}.",
                stacklevel=4,
            )


def _default_interval(steps: int) -> int:
    """500 steps in a run of the paper's 25,030, and the same part of a shorter one."""
    return min(500, max(2, round(0.02 * steps)))


@functools.lru_cache(maxsize=8)
def beta_shares(steps: int, interval: int = 1) -> np.ndarray:
    """w_t / W_t of the iterates that are averaged, in their order: 0, and those after steps 0, interval, 2 interval, ..

    The first is 1. The points x = (t + 1/2) / (steps + 1) are the middles of as many cells as there are iterates, so
    that none is at a pole of the density.
    """
    iterates = np.concatenate([[0], np.arange(1, steps + 1, interval)])
    x = (iterates + 0.5) / (steps + 1)
    w = 1.0 / np.sqrt(x * (1.0 - x))  # the density's constant cancels
    shares = w / np.cumsum(w)
    shares.setflags(write=False)
    return shares
