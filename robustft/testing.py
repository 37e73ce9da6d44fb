"""What plug-ins must fulfil: one call checks a method, a predictor, an out-of-distribution score or a calibrator.

    from robustft.testing import check_calibrator, check_detector, check_method, check_predictor

    check_method(MyMethod)                                  # a class, or functools.partial(MyMethod, option=...)
    check_predictor(predictor, images)
    check_detector(my_score)                                # a name, a function or a subclass of Score
    check_calibrator(MyCalibrator)

AssertionError says which rule is broken and how. Everything is tried on a CLIP of a few thousand weights, three classes
and twelve images, in seconds, on the CPU; nothing is kept on the disk.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustft.calibration import calibrators
from robustft.clip.outputs import Outputs, outputs_of
from robustft.detection import SCORES, Detector, register
from robustft.methods import Method, Step, load_predictor
from robustft.predictors.base import Predictor
from robustft.training.loop import fit

CLASSES = ("ant", "bee", "cow")


def letters(texts: list[str]) -> Tensor:
    """A tokenizer: 1 + a letter's number, closed by the largest token, where CLIP's text tower pools."""
    rows = [[1 + (ord(c) - 97) % 27 for c in text[:14]] + [29] for text in texts]
    return torch.tensor([row + [0] * (15 - len(row)) for row in rows])


@dataclass(frozen=True)
class World:
    """What plug-ins are tried on: a model, its configuration for exports, its prompts, and a labelled batch."""

    model: nn.Module
    config: Mapping[str, Any]
    data: Mapping[str, Tensor]
    prompts: Mapping[str, Any] = field(
        default_factory=lambda: {"tokenizer": letters, "class_names": CLASSES, "templates": ("a {}", "the {}")}
    )


def tiny_world(vision: Mapping[str, Any] | None = None) -> World:
    """A CLIP of random weights, the same each time, with a ViT of images of 8 x 8, or with another tower."""
    import open_clip

    vision = vision or {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 2}
    text = {"context_length": 15, "vocab_size": 30, "width": 8, "heads": 2, "layers": 2}
    shape = {"embed_dim": 8, "vision_cfg": dict(vision), "text_cfg": text}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**shape)
        images = torch.randn(12, 3, vision["image_size"], vision["image_size"])
    config = {"model_cfg": shape, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    data = {"image": images, "label": torch.arange(12) % 3, "group": torch.arange(12) // 6}
    return World(model, config, data)


def check_method(
    make: Callable[..., Method],
    world: World | None = None,
    *,
    lr: float = 1e-2,
    precision: str = "fp32",
    term: str | None = None,
    mixes: bool = False,
) -> None:
    """A method: `make(model, tokenizer=..., class_names=..., templates=..., total_steps=...)` gives one.

    Its options go in by functools.partial. lr: of the runs in which it has to learn. term: the name of the term that
    has to fall, where that is not the whole loss. mixes: of its classifier, as for `check_predictor`.

    Checked: the configuration tells options apart; wrong arguments and batches are refused by name; gradients reach
    what is trained; under autocast to bfloat16, and with a model of bfloat16, a step has a float32 loss near that of
    single precision and finite gradients; the given model stays as it is; the objective falls; equal seeds give equal
    bits; an interrupted run resumes bit for bit; `state_dict` is complete; the classifier is a predictor that
    `check_predictor` accepts.
    """
    world = world or tiny_world()
    data, before = world.data, _copied(world.model)
    recipe: dict[str, Any] = {"epochs": 2, "batch_size": 6, "lr": lr, "weight_decay": 0.0, "warmup": 0.0}
    recipe |= {"precision": precision, "progress": False}

    def made(model: nn.Module = world.model, **changed: Any) -> Method:
        return make(model, **{"total_steps": 4, **world.prompts, **changed})

    whole, stopped, resumed = made(), made(), made()
    _configuration(whole.config, stopped.config, made(templates=("one {}",)).config)
    _refuses("total_steps", lambda: made(total_steps=0))
    _refuses("class_names", lambda: made(class_names=world.prompts["class_names"][:1]))
    # The steps here are taken by the one whose state a checkpoint replaces: batch norms count them.
    _refuses("label", lambda: resumed.step((data["image"], data["label"] + 1000)))
    loss = _gradients(resumed.step(dict(data)), resumed)
    half = made(copy.deepcopy(world.model).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = resumed.step(dict(data))
    _in_bf16(under_autocast, resumed, loss)
    _in_bf16(half.step({**data, "image": data["image"].bfloat16()}), half, loss)
    _float32(half.classifier().outputs(data["image"].bfloat16()))

    start = _objective(whole, data, term)
    fit(whole, data, **recipe)
    changed = [name for name, value in world.model.state_dict().items() if not torch.equal(value, before[name])]
    _rule("leaves the model that it was given as it is", not changed, f"{changed[:3]} changed")
    end = _objective(whole, data, term)
    _rule("learns", end < start, f"the objective goes from {start:.6g} to {end:.6g} in 4 steps of lr {lr:g}")
    with tempfile.TemporaryDirectory() as folder:
        _interrupted(stopped, data, Path(folder) / "run", recipe)
        fit(resumed, data, output=Path(folder) / "run", resume=True, **recipe)
    _same_state("resumes bit for bit", whole, resumed)
    again = made()
    fit(again, data, **recipe)
    _same_state("is deterministic by its seed", whole, again)
    fresh = made()
    fresh.load_state_dict(whole.state_dict())
    expected, found = (m.classifier().logits(data["image"]) for m in (whole, fresh))
    _rule("has a complete state", torch.equal(expected, found), "a fresh one with its state_dict predicts differently")
    check_predictor(whole.classifier(), data["image"], world.config, mixes=mixes)


def check_predictor(
    predictor: Predictor, images: Tensor, config: Mapping[str, Any] | None = None, *, mixes: bool = False
) -> None:
    """A predictor of images (N, C, H, W).

    Checked: finite logits (N, K) of its `classes`; probabilities that sum to one; a sample's outputs do not depend on
    its batch or on the training mode, which is left as it was; under autocast to bfloat16 they are float32 and near
    those without; `restrict`, by names and by indices, before the softmax; unknown names are refused. With `config` (a
    `Bundle`'s): `save`, which replaces what it saved before, and `load_predictor` give it back. mixes: it mixes
    probabilities of several, so that restricted logits are not a part of all logits.
    """
    classes, was = predictor.classes, predictor.training
    predictor.eval()
    with torch.no_grad():
        outputs = predictor.outputs(images)
        logits, probabilities = outputs.logits, predictor.probabilities(images)
        shape = (len(images), len(classes))
        _rule("has logits (N, K) of its classes", logits.shape == shape, f"{tuple(logits.shape)}, expected {shape}")
        _rule("has finite logits", bool(logits.isfinite().all()), "NaN or infinity among them")
        sums = probabilities.sum(1)
        _rule("has probabilities", _near(sums, torch.ones_like(sums)), "rows do not sum to 1")
        _rule(
            "judges each image by itself", _near(predictor.logits(images[:2]), logits[:2], 1e-4), "a batch of 2 differs"
        )
        predictor.train()
        _rule(
            "predicts in evaluation mode", _near(predictor.logits(images), logits), "training mode changes its logits"
        )
        _rule("leaves the mode as it was", predictor.training, "outputs() left training mode")
        predictor.train(was)
        with torch.autocast("cpu", torch.bfloat16):
            half = predictor.outputs(images)
        _float32(half)
        near = _near(half.logits.softmax(1), logits.softmax(1), 0.1)
        _rule("stays near itself in bf16", near, "its probabilities under autocast are others")
        _restricts(predictor, images, logits, mixes)
        if config is not None:
            with tempfile.TemporaryDirectory() as folder:
                for _ in range(2):
                    saved = predictor.save(Path(folder) / "export", config)
                loaded = load_predictor(saved)
            same = type(loaded) is type(predictor) and loaded.classes == classes
            _rule("comes back from its export", same, f"as {type(loaded).__name__} of {loaded.classes}")
            for part, found, expected in zip(Outputs.PARTS, loaded.outputs(images), outputs, strict=False):
                _rule("comes back from its export", _near(found, expected), f"{part} differ")


def check_detector(score: str | Callable[..., Any], **options: Any) -> None:
    """An out-of-distribution score: a registered name, or a function or subclass of `Score` as `register` takes it.

    Checked: one finite number a sample; not a function of the batch or, of a score with a `memory`, of earlier calls;
    in-distribution images are kept at the share that was asked for; what it reads is asked for by name; NaN is refused;
    `save` and `load` keep it bit for bit.
    """
    name = score if isinstance(score, str) else "robustft.testing"
    with _registered(name, score):
        train, held_out, others = (_outputs(seed, labelled=seed == 0) for seed in range(3))

        def fitted() -> Detector:
            detector = Detector(name, tpr=0.9, **options)
            try:
                return detector.fit(train, validation=held_out) if SCORES[name].learns else detector.fit(held_out)
            except (ValueError, RuntimeError, TypeError) as error:
                raise AssertionError(f"it gives one finite number a sample: {error}") from error

        detector = fitted()
        scores = detector.scores(others)
        _rule("gives one finite number a sample", scores.shape == (40,) and bool(scores.isfinite().all()), f"{scores}")
        again = fitted().scores(others)
        _rule("is deterministic", torch.equal(scores, again), "a second fit scores differently")
        if detector._score.memory() is None:
            few = detector.scores(others.map(lambda part: part[:7]))
            _rule("scores each sample by itself", _near(few, scores[:7], 1e-4), "a batch of 7 differs")
        else:
            _rule("begins every call anew", torch.equal(detector.scores(others), scores), "a second call differs")
        kept = 1.0 - float(detector.detect(held_out).double().mean())
        _rule("keeps the share of in-distribution images", kept >= 0.9, f"{kept:.3f} for 0.9: are the scores constant?")
        for part in SCORES[name].reads:
            _refuses(part, partial(detector.scores, others.replace(**{part: None})))
        _refuses("NaN", lambda: detector.scores(others.map(lambda part: part * float("nan"))), "NaN|nan")
        with tempfile.TemporaryDirectory() as folder:
            loaded = Detector.load(detector.save(folder))
        same = torch.equal(loaded.scores(others), scores) and loaded.threshold_ == detector.threshold_
        _rule("comes back bit for bit", same, "a loaded detector scores differently")


def check_calibrator(make: Callable[[], calibrators.Calibrator]) -> None:
    """A calibrator: a class, or what makes one without arguments.

    Checked: `fit` returns self, is deterministic and leaves its arguments as they are; probabilities are float64 rows
    that sum to one, each a function of its own logits; numpy arrays count as tensors; NaN and infinity become NaN or an
    error; what is not fitted, or of other classes, is refused by name; `save` and `load` keep it bit for bit.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    logits = torch.randn(60, 3, generator=generator) + 1.5 * F.one_hot(labels, 3)
    kept = logits.clone()
    _refuses("fit", lambda: make().probabilities(logits))
    calibrator = make()
    _rule("returns itself from fit", calibrator.fit(logits, labels) is calibrator, "fit(logits, labels) is not self")
    p = calibrator.probabilities(logits)
    _rule("gives (N, K) float64", p.shape == logits.shape and p.dtype == torch.float64, f"{tuple(p.shape)} {p.dtype}")
    sums = p.sum(1)
    _rule("gives probabilities", bool((p >= 0).all()) and _near(sums, torch.ones_like(sums)), "not rows that sum to 1")
    _rule("leaves its arguments as they are", torch.equal(logits, kept), "the logits changed")
    few = calibrator.probabilities(logits[:5])
    _rule("judges each sample by itself", _near(few, p[:5], 1e-12), "a batch of 5 differs")
    again = make().fit(logits.numpy(), labels.numpy()).probabilities(logits.numpy())
    _rule("is deterministic and takes numpy arrays", torch.equal(again, p), "a second fit, of arrays, differs")
    for wrong in (float("nan"), float("inf")):
        changed = logits[:2].clone()
        changed[0, 1] = wrong
        with contextlib.suppress(ValueError):
            found = calibrator.probabilities(changed)
            _rule("makes no probabilities of NaN", bool(found[0].isnan().any()), f"{found[0].tolist()} for {wrong}")
            _rule("judges each sample by itself", _near(found[1:], p[1:2], 1e-12), "NaN in another row")
    _refuses("logits", lambda: calibrator.probabilities(logits[:, :2]))
    _refuses("logits", lambda: make().fit(logits * float("nan"), labels))
    _refuses("labels", lambda: make().fit(logits, labels + 3))
    _refuses("labels", lambda: make().fit(logits, labels[:-1]))
    with tempfile.TemporaryDirectory() as folder:
        loaded = calibrators.load(calibrator.save(folder))
    same = type(loaded) is type(calibrator) and torch.equal(loaded.probabilities(logits), p)
    _rule("comes back bit for bit", same, "a loaded calibrator gives other probabilities")


def _rule(rule: str, fulfilled: bool, found: str) -> None:
    if not fulfilled:
        raise AssertionError(f"it {rule}: {found}")


def _refuses(word: str, call: Callable[[], Any], words: str = "") -> None:
    try:
        call()
    except (ValueError, TypeError) as error:
        named = re.search(words or word, str(error)) is not None
        _rule("names what is wrong", named, f"{type(error).__name__} without the word {word!r}: {error}")
    except Exception as error:
        raise AssertionError(f"it refuses by ValueError or TypeError: {type(error).__name__} for {word}") from error
    else:
        raise AssertionError(f"it refuses what cannot be: no error for a wrong {word}")


def _near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return found.shape == expected.shape and torch.allclose(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _configuration(config: Mapping[str, Any], same: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    _rule("keeps its options", config == same, f"equal options give {config} and {same}")
    _rule("tells options apart", config != other, "other templates give the same configuration")
    try:
        json.dumps(dict(config))
    except TypeError as error:
        raise AssertionError(f"it has a configuration of JSON's types: {error}") from error


def _gradients(step: Step, method: Method) -> Tensor:
    """The loss, whose gradients are looked at and taken away."""
    _rule(
        "gives a loss that is one finite number", step.loss.shape == () and bool(step.loss.isfinite()), f"{step.loss}"
    )
    _rule("differentiates its loss", step.loss.requires_grad, "the loss has no gradient")
    step.loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    infinite = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    _rule("has finite gradients", not infinite, f"those of {infinite[:3]} are not")
    _rule("has gradients", any(bool(g.any()) for g in gradients.values()), "no trained parameter gets one")
    method.zero_grad(set_to_none=True)
    return step.loss.detach()


def _in_bf16(step: Step, method: Method, expected: Tensor) -> None:
    loss = _gradients(step, method)
    _rule("keeps its loss in float32", loss.dtype == torch.float32, f"it is {loss.dtype} in bf16")
    _rule("steps in bf16 as in float32", _near(loss, expected, 0.1), f"its loss is {loss:.4g} for {expected:.4g}")


def _float32(outputs: Outputs) -> None:
    narrow = sorted({str(part.dtype) for part in outputs if part.dtype != torch.float32})
    _rule("has outputs in float32", not narrow, f"some are {narrow} in bf16")


def _objective(method: Method, data: Mapping[str, Tensor], term: str | None) -> float:
    """Over all images as at step 0."""
    steps = method.steps.clone()
    method.steps.zero_()
    with torch.no_grad():
        out = method.eval().step(dict(data))
    method.steps.copy_(steps)
    method.train()
    return float(out.loss if term is None else out.terms[term])


class _PowerCut(Exception):
    pass


def _interrupted(method: Method, data: Mapping[str, Tensor], output: Path, recipe: Mapping[str, Any]) -> None:
    """A run that ends after its third step."""
    after_step = method.after_step

    def stop() -> None:
        after_step()
        if int(method.steps) == 3:
            raise _PowerCut

    object.__setattr__(method, "after_step", stop)
    with contextlib.suppress(_PowerCut):
        fit(method, data, output=output, **recipe)
    _rule("counts its steps", int(method.steps) == 3, f"{int(method.steps)} after 3 calls of after_step")


def _same_state(rule: str, method: Method, other: Method) -> None:
    found = other.state_dict()
    different = [name for name, value in method.state_dict().items() if not torch.equal(value, found[name])]
    _rule(rule, not different, f"{different[:3]} differ")


def _restricts(predictor: Predictor, images: Tensor, logits: Tensor, mixes: bool) -> None:
    order = list(range(len(predictor.classes)))[::-1]
    names = [predictor.classes[i] for i in order]
    every = predictor.restrict(names)
    _rule("restricts in the order that is asked for", list(every.classes) == names, f"{every.classes} for {names}")
    permuted = every.probabilities(images)
    _rule("restricts by name", _near(permuted, logits[:, order].softmax(1)), "another order changes probabilities")
    part = predictor.restrict(names[:2])
    by_index = predictor.restrict(order[:2])
    _rule("restricts by index as by name", _near(part.logits(images), by_index.logits(images)), "logits differ")
    sums = part.probabilities(images).sum(1)
    _rule("restricts before the softmax", _near(sums, torch.ones_like(sums)), "rows do not sum to 1")
    same = mixes or _near(part.probabilities(images), logits[:, order[:2]].softmax(1))
    _rule("restricts before the softmax", same, "not the softmax over the classes that are left")
    _refuses("classes", lambda: predictor.restrict(["no such class"]))


@contextlib.contextmanager
def _registered(name: str, score: str | Callable[..., Any]) -> Iterator[None]:
    """A score that has no name gets one while it is checked."""
    if isinstance(score, str):
        yield
        return
    register(name, score)
    try:
        yield
    finally:
        del SCORES[name]


def _outputs(seed: int, labelled: bool) -> Outputs:
    """Of 40 images of three classes, with patches."""
    generator = torch.Generator().manual_seed(seed)
    classes = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(9)), dim=1)
    labels = torch.arange(40) % 3
    features = F.normalize(classes[labels] + 0.3 * torch.randn(40, 8, generator=generator), dim=1)
    patches = F.normalize(features[:, None] + 0.3 * torch.randn(40, 4, 8, generator=generator), dim=2)
    outputs = outputs_of(features, classes, torch.tensor(10.0), patch_features=patches)
    return outputs.replace(labels=labels) if labelled else outputs
