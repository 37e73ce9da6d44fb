"""FT: end-to-end fine-tuning from a zero-shot-initialised head (WiSE-FT, arXiv 2109.01903, section 3), and LP-FT.

z = u W^T + b,   W (K, D) starts as s w, scale times zero-shot class embeddings, b is absent;   L = objective(z, labels)

LP-FT (Kumar et al., ICLR 2022, arXiv 2202.10054) starts from a linear probe's W and b instead: a head that fits the
features already does not distort them on its way there.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import Unpack

from robustft.methods.base import Step
from robustft.methods.l2_sp import L2SP, check_l2_sp
from robustft.methods.linear_head import HeadOptions, LinearHead
from robustft.methods.options import digest
from robustft.predictors.base import Classifier


class FineTune(LinearHead):
    """Fine-tuning of the image tower and a linear head that starts as the zero-shot one.

    There is no bias. The text tower and the model's scale are not trained. The released FT baseline clips gradients
    that still carry the fp16 loss scale and so hardly trains; robustft.training.loop unscales first.

    Args:
        objective: of the logits; cross-entropy by default. One that compares with the zero-shot model ("logit_range",
            `rescale`) keeps a frozen copy of the model, which encodes every batch too, without a gradient; it is that
            of `model` and `templates` whatever the start, and no part of `state_dict()`.
        l2_sp: weight of half the squared distance of all trained parameters to their start (`l2_sp.L2SP`).
        start: a classifier over the same classes on the model's features, whose head and bias to start from; None for
            the zero-shot one.
        others: as for `LinearHead`; nothing here is random.

    Source: Wortsman et al., WiSE-FT (arXiv 2109.01903), section 3; as a baseline, the code of CaRot and VRF.
    """

    towers = ("visual",)

    def __init__(
        self,
        model: nn.Module,
        *,
        l2_sp: float = 0.0,
        start: Classifier | None = None,
        **options: Unpack[HeadOptions],
    ) -> None:
        check_l2_sp(l2_sp)
        super().__init__(model, **options)
        self.start_head(start or self.zero_shot_classifier(), trained=self.model.visual.parameters())
        self.l2_sp = L2SP(self, l2_sp) if l2_sp else None
        self.config["start"] = start and digest(start.logit_scale * start.class_embeddings)

    def step(self, batch: Any) -> Step:
        out = super().step(batch)
        return out if self.l2_sp is None else self.l2_sp.added(out, self)


class StartedOptions(HeadOptions, total=False):
    """The options of `FineTune` but its start, for the constructors that hand them on."""

    l2_sp: float


class FineTuneOptions(StartedOptions, total=False):
    """All options of `FineTune`, likewise."""

    start: Classifier | None


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

    uncompared = ("probe",)  # it is the start

    def __init__(self, model: nn.Module, *, probe: Classifier, **options: Unpack[StartedOptions]) -> None:
        super().__init__(model, start=probe, **options)
