"""Temperature scaling: p = softmax(z / T), T of one model on held-out ID data (Guo et al., arXiv 1706.04599).

The last step after any method. The order of the classes stays, and so do features and cosines, of which OOD scores are
made; only confidence changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from robustft.clip.outputs import Outputs
from robustft.ensembles.composite import Composite
from robustft.ensembles.output_ensemble import TEMPERATURE_RULES, TemperatureRule
from robustft.ops.kinds import checked
from robustft.predictors.base import Classifier, Predictor


class Tempering:
    """A predictor whose confidence is to fit its accuracy. Learnt by `fit`: `temperature_`.

    Args:
        predictor: any, an ensemble too.
        rule: "nll", the T of lowest NLL, or "confidence", at which mean confidence equals accuracy; the former has no
            minimum where the predictor makes no error.

    Source: Guo et al. 2017 (arXiv 1706.04599), section 4.2; the rule "confidence" is VRF's (arXiv 2411.06966).
    """

    @checked
    def __init__(self, predictor: Predictor, rule: TemperatureRule = "nll") -> None:
        if rule not in TEMPERATURE_RULES:
            raise ValueError(f"rule must be {' or '.join(map(repr, TEMPERATURE_RULES))}, got {rule!r}")
        self.predictor = predictor
        self.rule = rule

    def fit(self, validation: Any) -> Tempering:
        """Choose temperature_ on held-out ID data, (images, labels) or a dataset."""
        self.temperature_ = self.temperature_of(self.predictor.predict(validation))
        return self

    def temperature_of(self, outputs: Outputs) -> float:
        """The temperature for what the predictor made of held-out ID data."""
        return TEMPERATURE_RULES[self.rule](outputs.logits, outputs.labels)

    @checked
    def at(self, temperature: float) -> Predictor:
        """The predictor with logits divided by a temperature: of a `Classifier` another one, which can be saved."""
        check_temperature(temperature)
        p = self.predictor
        if isinstance(p, Classifier):
            bias = None if p.bias is None else p.bias / temperature
            return Classifier(
                p.model, p.class_embeddings, p.classes, logit_scale=p.logit_scale / temperature, bias=bias
            )
        return Tempered(p, temperature)

    def classifier(self) -> Predictor:
        """The predictor at the fitted temperature_."""
        if not hasattr(self, "temperature_"):
            raise ValueError("Tempering has no temperature yet: call fit(validation), or at(temperature)")
        return self.at(self.temperature_)


class Tempered(Composite):
    """Any predictor with its logits divided by a temperature."""

    members = ("predictor",)
    settings = ("temperature",)
    predictor: Predictor

    @checked
    def __init__(self, predictor: Predictor, temperature: float) -> None:
        super().__init__()
        check_temperature(temperature)
        self.predictor = predictor
        self.temperature = temperature
        self.classes = predictor.classes

    @property
    def joined(self) -> tuple[Predictor, ...]:
        return (self.predictor,)

    def combined(self, outputs: Sequence[Outputs]) -> Outputs:
        return outputs[0].replace(logits=outputs[0].logits / self.temperature)

    def outputs(self, images: Tensor) -> Outputs:
        return self.combined([self.predictor.outputs(images)])

    def restrict(self, classes: Sequence[int] | Sequence[str]) -> Tempered:
        return Tempered(self.predictor.restrict(classes), self.temperature)


def check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
