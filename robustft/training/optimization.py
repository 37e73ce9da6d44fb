"""One update of a method's weights: AdamW, clipping of the whole gradient, and in fp16 a loss scale.

start, backward (of one batch, or of each part of one), norm, apply
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robustft.clip.encoding import unwrap
from robustft.clip.spread import Spread
from robustft.methods.base import Method, Step
from robustft.training.adamw import AdamW, values_of, whole_tables
from robustft.training.schedule import DTYPES, Settings

ONE_PASS = Spread()
SKIPS_BEFORE_ERROR = 20  # fp16 halves its loss scale at each: 65536 has come down to 1/16 by then


class Optimization:
    """The optimiser of a method's trainable parameters, `AdamW`.

    `logit_scale` is the model's parameter ln s where it is trained, held at or below `settings.max_logit_scale`, or at
    its first value where that is higher: otherwise it grows as long as that lowers the loss, and confidence with it.
    `skipped` counts the last steps, one after another, that fp16 has not taken because their gradient overflowed.

    `waits` is whether loss and norm are looked at before the update. On an accelerator that would let it run dry at
    every step: there the update itself leaves the weights alone where they are not finite, and who trains is told when
    the numbers have come.
    """

    def __init__(self, method: Method, settings: Settings, how: Spread = ONE_PASS) -> None:
        self.method, self.settings, self.how = method, settings, how
        self.device = method.steps.device
        self.adamw = AdamW(method, settings.lr, weight_decay=settings.weight_decay)
        if how.processes.count > 1:
            whole_tables(method)  # averaging needs it; an AdamW from before the processes met may have set them
        self.parameters = [p for p in method.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.skipped = 0
        self.waits = self.device.type != "cuda"
        scale = getattr(unwrap(method.model), "logit_scale", None)
        self.logit_scale = scale if isinstance(scale, nn.Parameter) and scale.requires_grad else None
        self._highest = math.inf
        if self.logit_scale is not None and settings.max_logit_scale is not None:
            self._highest = max(math.log(settings.max_logit_scale), self.logit_scale.item())

    def start(self) -> None:
        """No gradient yet."""
        self.adamw.zero_grad()

    def backward(self, batch: Any) -> Step:
        """The method's loss of a batch, whose gradient is added; of a batch in parts, these one after the other.

        Of several processes, each has then the gradient of the whole batch.
        """
        method, how, precision = self.method, self.how, self.settings.precision
        autocast = functools.partial(torch.autocast, self.device.type, DTYPES[precision])

        def backward(loss: Tensor) -> None:
            with autocast(enabled=False):
                self.scaler.scale(loss).backward()

        with autocast(enabled=precision != "fp32"):
            if how.parts > 1 and method.additive:
                out = method.summed(batch, how, method.step, backward)
            else:
                out = method(batch, parts=how.parts, group=how.group)
        if out.loss.requires_grad:
            backward(out.loss)
        how.processes.average(self.parameters)
        return out

    def norm(self) -> Tensor:
        """Norm () of the whole gradient, with the loss scale taken out; once an update, before `apply`."""
        self.scaler.unscale_(self.adamw)
        for p in self.parameters:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.coalesce()
        return torch.nn.utils.get_total_norm(self._gradients())

    def _gradients(self) -> list[Tensor]:
        return [values_of(p.grad) for p in self.parameters if p.grad is not None]

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether the update would leave the weights finite; call once an update.

        An infinite gradient is how fp16 learns that its loss scale is too high: it is accepted and not applied.
        """
        finite = math.isfinite(norm)
        self.skipped = self.skipped + 1 if self.scaler.is_enabled() and not finite else 0
        return math.isfinite(loss) and (finite or 0 < self.skipped < SKIPS_BEFORE_ERROR)

    def apply(self, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Clips the gradient of this norm, moves the weights at this rate and tells the method.

        Weights and moments stay as they are where the loss or the norm is not finite; nothing is waited for.
        """
        for group in self.adamw.param_groups:
            group["lr"] = rate
        if self.settings.clip is not None and (gradients := self._gradients()):
            # As torch's clip_grads_with_norm_, which would leave sparse gradients to be coalesced again.
            torch._foreach_mul_(gradients, (self.settings.clip / (norm + 1e-6)).clamp(max=1.0))
        if self.waits or self.scaler.is_enabled():  # seen before, or by the loss scale
            self.scaler.step(self.adamw)
            self.scaler.update()
        else:
            self._step_where_finite(loss, norm)
        if self.logit_scale is not None and self._highest < math.inf:
            with torch.no_grad():
                self.logit_scale.clamp_(max=self._highest)
        self.method.after_step()

    def _step_where_finite(self, loss: Tensor, norm: Tensor) -> None:
        """By the way that a fused AdamW has for loss scales, which it looks at on the device."""
        adamw: Any = self.adamw
        adamw.found_inf = 1.0 - (loss.detach().isfinite() & norm.isfinite()).float()
        try:
            adamw.step()
        finally:
            del adamw.found_inf

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The moments of each parameter by "<index>.<name>", and the loss scale's state."""
        moments = self.adamw.state_dict()["state"]
        named = {f"{index}.{name}": value for index, values in moments.items() for name, value in values.items()}
        return named, self.scaler.state_dict()

    def restore(self, tensors: Mapping[str, Tensor], scaler: Mapping[str, Any]) -> None:
        """What `state` gave; ValueError unless the tensors are of these parameters."""
        parameters = [p for group in self.adamw.param_groups for p in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, _, key = name.partition(".")
            if not index.isdecimal() or int(index) >= len(parameters):
                raise ValueError(f"optimizer.{name} is of none of the {len(parameters)} parameters")
            shape = () if key == "step" else parameters[int(index)].shape
            if value.shape != shape or not value.isfinite().all():
                raise ValueError(
                    f"optimizer.{name} must be finite and of shape {tuple(shape)}, got {tuple(value.shape)}"
                )
            moments.setdefault(int(index), {})[key] = value
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": moments, "param_groups": groups})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(scaler))
