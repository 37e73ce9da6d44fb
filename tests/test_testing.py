"""What is shipped to check plug-ins: each rule refuses one that breaks it, and our scores and calibrators pass.

Our methods and predictors are checked in methods/test_every_method.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from robustft.calibration import calibrators
from robustft.detection import SCORES
from robustft.detection.by_name import Score
from robustft.detection.scores import max_cosine
from robustft.methods import FineTune, LinearProbe
from robustft.predictors.base import Classifier
from robustft.testing import check_calibrator, check_detector, check_method, check_predictor, tiny_world

WORLD = tiny_world()
HEAD = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))  # that of the images of check_detector


@pytest.mark.parametrize("name", SCORES)
def test_every_score_fulfils_what_plug_ins_must(name):
    negatives = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    options = {
        "neg_label": {"negative_embeddings": negatives},
        "ada_neg": {"negative_embeddings": negatives, "class_embeddings": HEAD},
    }
    check_detector(name, **options.get(name, {}))


@pytest.mark.parametrize("kind", calibrators.Calibrator.kinds.values())
def test_every_calibrator_fulfils_what_plug_ins_must(kind):
    if kind.__module__ == calibrators.__name__:
        check_calibrator(kind)


def test_a_score_of_ones_own_passes_as_a_function():
    check_detector(lambda cosines: max_cosine(cosines) ** 3)
    assert "robustft.testing" not in SCORES


SCORES_THAT_FAIL = {
    "one finite number": lambda cosines: cosines,
    "by itself": lambda cosines: cosines.amax(1) - cosines.amax(1).mean(),
    "is deterministic": lambda cosines: cosines.amax(1) + torch.rand(len(cosines)),
    "refuses what cannot be": lambda cosines: cosines.nan_to_num().amax(1),
}


@pytest.mark.parametrize("rule", SCORES_THAT_FAIL)
def test_a_broken_score_is_told_its_rule(rule):
    with pytest.raises(AssertionError, match=rule):
        check_detector(SCORES_THAT_FAIL[rule])


class Half(calibrators.TemperatureScaling):
    def probabilities(self, logits):
        return super().probabilities(logits) / 2


class Single(calibrators.TemperatureScaling):
    def probabilities(self, logits):
        return super().probabilities(logits).float()


class Forgetful(calibrators.TemperatureScaling):
    def fit(self, logits, labels):
        super().fit(logits, labels)
        self.temperature_ = self.temperature_ + float(torch.rand(()))
        return self


class NoSelf(calibrators.TemperatureScaling):
    def fit(self, logits, labels):
        super().fit(logits, labels)


class OfTheBatch(calibrators.TemperatureScaling):
    def probabilities(self, logits):
        p = super().probabilities(logits)
        return (p * p.mean(0)).softmax(1)


class Unchecked(calibrators.TemperatureScaling):
    def probabilities(self, logits):
        return (torch.as_tensor(logits).double() / self.temperature_).softmax(1)


class Numb(calibrators.TemperatureScaling):
    def probabilities(self, logits):
        return super().probabilities(torch.as_tensor(logits).nan_to_num(posinf=9.0))


class InPlace(calibrators.TemperatureScaling):
    def probabilities(self, logits):
        p = super().probabilities(logits)
        if isinstance(logits, torch.Tensor):
            logits += 1
        return p


class LosesItsOption(calibrators.TemperatureScaling):
    extra = 0.0

    def fit(self, logits, labels):
        super().fit(logits, labels)
        self.extra = 1.0
        return self

    def probabilities(self, logits):
        return super().probabilities(logits) if not self.extra else super().probabilities(logits).square().softmax(1)

    def save(self, path):
        del self.extra
        return super().save(path)


CALIBRATORS_THAT_FAIL = {
    "gives probabilities": Half,
    "float64": Single,
    "deterministic": Forgetful,
    "returns itself": NoSelf,
    "by itself": OfTheBatch,
    "refuses by ValueError": Unchecked,
    "makes no probabilities of NaN": Numb,
    "arguments as they are": InPlace,
    "comes back": LosesItsOption,
}


@pytest.mark.parametrize("rule", CALIBRATORS_THAT_FAIL)
def test_a_broken_calibrator_is_told_its_rule(rule):
    with pytest.raises(AssertionError, match=rule):
        check_calibrator(CALIBRATORS_THAT_FAIL[rule])


class Deaf(LinearProbe):
    """Options that the configuration does not tell apart."""

    def __init__(self, model, **shared):
        super().__init__(model, **shared)
        self.config["captions"] = ""


class Careless(LinearProbe):
    def step(self, batch):
        batch = {**batch, "label": batch["label"] % 3} if isinstance(batch, dict) else (batch[0], batch[1] % 3)
        return super().step(batch)


class Constant(LinearProbe):
    def step(self, batch):
        step = super().step(batch)
        return step._replace(loss=step.loss.detach())


class Worse(LinearProbe):
    def step(self, batch):
        step = super().step(batch)
        return step._replace(loss=-step.loss) if torch.is_grad_enabled() else step


class Uncounted(LinearProbe):
    def after_step(self):
        pass


class Memory(LinearProbe):
    """What a resume needs is not in its state."""

    past = 0

    def after_step(self):
        super().after_step()
        self.past += 1

    def step(self, batch):
        step = super().step(batch)
        return step._replace(loss=step.loss + 0.1 * self.past * self.head[0, 0]) if torch.is_grad_enabled() else step


class Spoiler(LinearProbe):
    def __init__(self, model, **shared):
        super().__init__(model, **shared)
        object.__setattr__(self, "given", model)

    def after_step(self):
        super().after_step()
        self.given.logit_scale.data += 1e-3


class Numbered(LinearProbe):
    numbers = itertools.count()

    def __init__(self, model, **shared):
        super().__init__(model, **shared)
        self.config["number"] = next(self.numbers)


class OfSets(LinearProbe):
    def __init__(self, model, **shared):
        super().__init__(model, **shared)
        self.config["classes"] = set(self.classes)


class Infinite(LinearProbe):
    def step(self, batch):
        step = super().step(batch)
        return step._replace(loss=step.loss * float("inf"))


class Flat(LinearProbe):
    def step(self, batch):
        step = super().step(batch)
        return step._replace(loss=step.loss * 0.0)


class Cusp(LinearProbe):
    """A finite loss with a gradient that is not."""

    def step(self, batch):
        step = super().step(batch)
        return step._replace(loss=step.loss + (0.0 * self.head).sqrt().sum())


class Moody(LinearProbe):
    """What it computes depends on how many there are, beside its seed."""

    made = 0

    def __init__(self, model, **shared):
        super().__init__(model, **shared)
        Moody.made += 1
        self.mood = 1.0 if Moody.made <= 4 else 1.1

    def step(self, batch):
        step = super().step(batch)
        return step._replace(loss=step.loss * self.mood)


class Halved(LinearProbe):
    """Its predictor is made of more than its state."""

    past = 0

    def after_step(self):
        super().after_step()
        self.past += 1

    def classifier(self):
        found = super().classifier()
        found.class_embeddings *= 1 + self.past
        return found


class Mute(LinearProbe):
    def __init__(self, model, **shared):
        try:
            super().__init__(model, **shared)
        except ValueError:
            raise ValueError("no") from None


class Raw(LinearProbe):
    def __init__(self, model, **shared):
        try:
            super().__init__(model, **shared)
        except ValueError:
            raise KeyError("total_steps") from None


class Coarse(LinearProbe):
    """Its loss has the precision of its features."""

    def step(self, batch):
        step = super().step(batch)
        return step._replace(loss=step.loss.to(torch.get_autocast_dtype("cpu")) if in_bf16(self) else step.loss)


class Cruder(LinearProbe):
    def step(self, batch):
        step = super().step(batch)
        return step._replace(loss=step.loss * (1.5 if in_bf16(self) else 1.0))


def in_bf16(method):
    return torch.is_autocast_enabled("cpu") or next(method.model.parameters()).dtype == torch.bfloat16


METHODS_THAT_FAIL = {
    "keeps its options": Numbered,
    "JSON's types": OfSets,
    "one finite number": Infinite,
    "has gradients": Flat,
    "has finite gradients": Cusp,
    "deterministic by its seed": Moody,
    "has a complete state": Halved,
    "names what is wrong": Mute,
    "refuses by ValueError": Raw,
    "tells options apart": Deaf,
    "refuses what cannot be": Careless,
    "differentiates its loss": Constant,
    "loss in float32": Coarse,
    "steps in bf16 as in float32": Cruder,
    "learns": Worse,
    "counts its steps": Uncounted,
    "resumes bit for bit": Memory,
    "leaves the model": Spoiler,
}


@pytest.mark.parametrize("rule", METHODS_THAT_FAIL)
def test_a_broken_method_is_told_its_rule(rule):
    with pytest.raises(AssertionError, match=rule):
        check_method(METHODS_THAT_FAIL[rule], tiny_world())


class LateSoftmax(Classifier):
    def restrict(self, classes):
        part = super().restrict(classes)
        part.__class__ = Shrunk
        return part


class Shrunk(Classifier):
    def probabilities(self, images):
        return 0.5 * super().probabilities(images)


class Modal(Classifier):
    def outputs(self, images):
        found = super().outputs(images)
        return found.replace(logits=found.logits * (2 if self.training else 1))


class OfBatch(Classifier):
    def outputs(self, images):
        found = super().outputs(images)
        return found.replace(logits=found.logits - found.logits.mean(0))


class Narrow(Classifier):
    def outputs(self, images):
        found = super().outputs(images)
        return found.replace(logits=found.logits[:, :2])


class Broken(Classifier):
    def outputs(self, images):
        found = super().outputs(images)
        return found.replace(logits=found.logits * float("nan"))


class InHalf(Classifier):
    def outputs(self, images):
        found = super().outputs(images)
        return found.map(torch.Tensor.bfloat16) if torch.is_autocast_enabled("cpu") else found


class Flattened(Classifier):
    def outputs(self, images):
        found = super().outputs(images)
        return found.replace(logits=0 * found.logits) if torch.is_autocast_enabled("cpu") else found


class Once(Classifier):
    """Saves into new directories only."""

    def save(self, directory, config, *, tokenizer=None):
        if directory.exists():
            raise AssertionError("it saves a second time")
        return super().save(directory, config, tokenizer=tokenizer)


class Stuck(Classifier):
    def outputs(self, images):
        self.eval()
        return super().outputs(images)


class Sorted(Classifier):
    def restrict(self, classes):
        return super().restrict(sorted(classes))


class Renamed(Classifier):
    """Takes other names, and the same columns."""

    def restrict(self, classes):
        part = super().restrict(range(len(classes)))
        part.classes = tuple(classes)
        return part


class OffByOne(Classifier):
    def restrict(self, classes):
        return super().restrict([c if isinstance(c, str) else (c + 1) % 3 for c in classes])


class Lenient(Classifier):
    def restrict(self, classes):
        return super().restrict([c for c in classes if c in self.classes or not isinstance(c, str)] or [0])


class Lossy(Classifier):
    def save(self, directory, config, *, tokenizer=None):
        other = Classifier(self.model, self.class_embeddings.flip(0), self.classes, logit_scale=self.logit_scale)
        other.kind = self.kind
        return other.save(directory, config, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (Narrow, r"logits \(N, K\)"),
        (Broken, "finite logits"),
        (Stuck, "leaves the mode"),
        (InHalf, "outputs in float32"),
        (Flattened, "near itself in bf16"),
        (Once, "a second time"),
        (Sorted, "in the order"),
        (Renamed, "restricts by name"),
        (OffByOne, "by index as by name"),
        (Lenient, "refuses what cannot be"),
        (Lossy, "comes back from its export"),
    ],
)
def test_a_predictor_that_breaks_a_rule_is_told_it(kind, rule):
    predictor = FineTune(WORLD.model, **WORLD.prompts).classifier()
    predictor.__class__ = kind
    with pytest.raises(AssertionError, match=rule):
        check_predictor(predictor, WORLD.data["image"], WORLD.config)


class Sly(Score):
    """Shows the threshold's images another face than it shows them later."""

    reads = ("cosines",)
    calls = 0

    def __call__(self, outputs):
        self.calls += 1
        return outputs.cosines.amax(1) - 10.0 * (self.calls > 1)


class Amnesiac(Score):
    reads = ("cosines",)
    learns = True
    learnt = 1.0

    def fit(self, train):
        self.learnt = 2.0

    def __call__(self, outputs):
        return outputs.cosines.amax(1) * self.learnt


class Blind(Score):
    """Does not see NaN."""

    reads = ("cosines",)

    def __call__(self, outputs):
        return outputs.cosines.nan_to_num().amax(1)


@pytest.mark.parametrize(
    ("kind", "rule"), [(Sly, "keeps the share"), (Amnesiac, "comes back bit for bit"), (Blind, "no error for a wrong")]
)
def test_a_score_that_breaks_a_rule_is_told_it(kind, rule):
    with pytest.raises(AssertionError, match=rule):
        check_detector(kind)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [(LateSoftmax, "restrict"), (Modal, "evaluation mode"), (OfBatch, "by itself"), (Shrunk, "sum to 1")],
)
def test_a_broken_predictor_is_told_its_rule(kind, rule):
    predictor = FineTune(WORLD.model, **WORLD.prompts).classifier()
    check_predictor(predictor, WORLD.data["image"])
    predictor.__class__ = kind
    with pytest.raises(AssertionError, match=rule):
        check_predictor(predictor, WORLD.data["image"])
