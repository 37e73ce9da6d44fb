"""FT: end-to-end fine-tuning from a zero-shot-initialised head (WiSE-FT, arXiv 2109.01903, section 3), and LP-FT.

z = u W^T + b,   W (K, D) starts as s w, scale times zero-shot class embeddings, b is absent;   L = objective(z, labels)

LP-FT (Kumar et al., ICLR 2022, arXiv 2202.10054) starts from a linear probe's W and b instead: a head that fits the
features already does not distort them on its way there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from robustft import clip
from robustft.methods.base import Step
from robustft.methods.l2_sp import L2SP, check_l2_sp
from robustft.methods.linear_head import LinearHead
from robustft.methods.objective import Objective
from robustft.predictors.base import Classifier


class FineTune(LinearHead):
    """Fine-tuning of the image tower and a linear head that starts as the zero-shot one.

    There is no bias. The text tower and the model's scale are not trained. The released FT baseline clips gradients
    that still carry the fp16 loss scale and so hardly trains; robustft.training.loop unscales first.

    Args:
        model, tokenizer, class_names, templates, total_steps, seed: as for `Method`; nothing here is random.
        label_smoothing: e mixes the targets as (1 - e) one-hot + e / K.
        objective: of the logits; cross-entropy by default. One that compares with the zero-shot model ("logit_range",
            `rescale`) keeps a frozen copy of the model, which encodes every batch too, without a gradient; it is that
            of `model` and `templates` whatever the start, and no part of `state_dict()`.
        l2_sp: weight of half the squared distance of all trained parameters to their start (`l2_sp.L2SP`).
        start: a classifier over the same classes on the model's features, whose head and bias to start from; None for
            the zero-shot one.

    Source: Wortsman et al., WiSE-FT (arXiv 2109.01903), section 3; as a baseline, the code of CaRot and VRF.
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
        label_smoothing: float = 0.0,
        objective: Objective = Objective(),
        l2_sp: float = 0.0,
        start: Classifier | None = None,
    ) -> None:
        check_l2_sp(l2_sp)
        super().__init__(
            model,
            tokenizer=tokenizer,
            class_names=class_names,
            templates=templates,
            total_steps=total_steps,
            seed=seed,
            label_smoothing=label_smoothing,
            objective=objective,
        )
        self.start_head(start or self.zero_shot_classifier(), trained=self.model.visual.parameters())
        self.l2_sp = L2SP(self, l2_sp) if l2_sp else None
        self.config |= {"l2_sp": l2_sp, "start": start and _digest(start)}

    def step(self, batch: Any) -> Step:
        images, labels, _ = self.checked(batch)
        out = self.head_step(clip.encode_images(self.model, images), labels, self.reference(images))
        return out if self.l2_sp is None else self.l2_sp.added(out, self)


class LPFT(FineTune):
    """Fine-tuning of the image tower and a linear head that starts as a trained linear probe, bias included.

    LP-FT is two runs, because the probe wants a learning rate some ten thousand times higher and a schedule of its
    own (0.1 and 1e-5 in VRF's tables):

        probe = LinearProbe(model, **prompts)
        fit(probe, data, lr=0.1, output="run/lp", ...)
        method = LPFT(model, probe=probe.classifier(), **prompts)
        fit(method, data, lr=1e-5, output="run/lpft", ...)

    A run that was killed goes on with `resume=True` in the part where it was; a resumed probe is the same bit for
    bit, and `fit` refuses to resume from another one.

    Args:
        probe: the trained probe's classifier.
        others: as for `FineTune`.

    Source: Kumar et al., LP-FT (ICLR 2022, arXiv 2202.10054).
    """

    def __init__(self, model: nn.Module, *, probe: Classifier, **options: Any) -> None:
        super().__init__(model, start=probe, **options)


def _digest(classifier: Classifier) -> str:
    head = classifier.logit_scale * classifier.class_embeddings
    return hashlib.sha256(head.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
