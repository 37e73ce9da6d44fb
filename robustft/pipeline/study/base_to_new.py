"""Base to new: prompts learnt on half of many classes name the other half; DAC and ZS-Norm on what that does to trust.

base   the first half of the classes: a shot a studio, up to four; tested on a studio never trained on
new    the second half, which only its names are known of
H      2 / (1 / base + 1 / new), of accuracies
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import harmonic_mean
from typing import Any, NamedTuple

from torch import Tensor

from robustft.calibration.distance_aware import distance_aware_logits, distance_aware_scales
from robustft.calibration.losses import rescale_to_range
from robustft.calibration.measures import calibration_report, fit_temperature
from robustft.methods import Method, Predictor, zero_shot_classifier
from robustft.pipeline.recipes import Recipe
from robustft.pipeline.study.findings import Claim, Measured, Section, falls, higher
from robustft.pipeline.study.recipes import PROMPTS
from robustft.pipeline.study.world import Tensors, World, accuracy
from robustft.pipeline.training import Materials, make_method

ACCURACY, BASE, NEW = "accuracy on base and new classes", "ECE on base classes", "ECE on new classes"
ZERO_SHOT, NORMED = "zero-shot", "CoOp + ZS-Norm"
NONE, TEMPERATURE, DAC, BOTH, RANGE = "as it is", "temperature", "DAC", "temperature and DAC", "zero-shot range (SaLS)"
NEAREST = 5
"""Base classes that DAC looks at, as its paper does."""
ONE_SHOT = ("CoCoOp",)
"""Learners whose every step reads all classes for each image, and which are shown one studio."""
Map = Callable[[Tensor, Tensor], Tensor]


class Classes(NamedTuple):
    """Half of the classes: their names, and images of theirs to train, validate and test on, labelled from 0."""

    names: tuple[str, ...]
    train: Tensors
    validation: Tensors
    test: Tensors


def halves(world: World, shots: int | None = None) -> tuple[Classes, Classes]:
    """Base and new classes."""
    data = world.benchmark.module.concepts(shots=shots, limit=world.limit)
    middle = len(data.classes) // 2
    sets = [world.tensors(part) for part in (data.train, data.validation, data.test)]

    def half(first: int, last: int) -> Classes:
        inside = [(labels >= first) & (labels < last) for _, labels in sets]
        return Classes(
            data.classes[first:last],
            *((x[keep], y[keep] - first) for (x, y), keep in zip(sets, inside, strict=True)),
        )

    return half(0, middle), half(middle, len(data.classes))


def measure(world: World) -> Measured:
    base, new = halves(world)
    tables: dict[str, dict[str, dict[str, float]]] = {ACCURACY: {}, BASE: {}, NEW: {}}
    prompts = [materials_of(world, part) for part in (base, new)]
    zero_shot = [zero_shot_classifier(world.bundle.model, **part.prompts) for part in prompts]
    learners: dict[str, list[Predictor]] = {ZERO_SHOT: [*zero_shot]}
    for name, recipe in PROMPTS.items():
        part = halves(world, shots=1)[0] if name in ONE_SHOT else base
        learners[name] = [*on_both(world, name, recipe, part, prompts)]
    for name, pair in learners.items():
        on_base, on_new = (
            world.outputs(predictor, part.test) for predictor, part in zip(pair, (base, new), strict=True)
        )
        found = [accuracy(on_base), accuracy(on_new)]
        tables[ACCURACY][name] = {"base": found[0], "new": found[1], "H": harmonic_mean(found)}
        held_out = world.outputs(pair[0], base.validation)
        temperature = fit_temperature(held_out.logits, held_out.labels)
        for table, predictor, outputs, before, part in (
            (BASE, pair[0], on_base, zero_shot[0], base),
            (NEW, pair[1], on_new, zero_shot[1], new),
        ):
            scales = dac_scales(predictor, pair[0], before, zero_shot[0])
            z0 = world.outputs(before, part.test).logits
            tables[table][name] = {
                column: 100 * calibration_report(mended(outputs.logits, z0).softmax(1), outputs.labels).ece
                for column, mended in maps(temperature, scales).items()
            }
    return Measured(tables, {})


def maps(temperature: float, scales: Tensor | None) -> Mapping[str, Map]:
    """What is done to logits, beside the zero-shot model's of the same images. None changes a prediction."""
    found: dict[str, Map] = {
        NONE: lambda z, _: z.double(),
        TEMPERATURE: lambda z, _: z.double() / temperature,
        RANGE: lambda z, z0: rescale_to_range(z.double(), z0.double()),
    }
    if scales is not None:
        found[DAC] = lambda z, _: distance_aware_logits(z, scales)
        found[BOTH] = lambda z, _: distance_aware_logits(z / temperature, scales)
    return found


def dac_scales(predictor: Any, on_base: Any, before: Any, before_on_base: Any) -> Tensor | None:
    """DAC's scale of each class, or None for a learner without class embeddings: CoCoOp has some for each image."""
    if not hasattr(predictor, "class_embeddings"):
        return None
    trained = on_base.class_embeddings
    k = min(NEAREST, len(trained))
    of_names = before.class_embeddings, before_on_base.class_embeddings
    return distance_aware_scales(predictor.class_embeddings, trained, *of_names, k=k)


def materials_of(world: World, part: Classes) -> Materials:
    """What makes methods of these classes."""
    return replace(world.materials, prompts={**world.prompts, "class_names": part.names})


def on_both(
    world: World, name: str, recipe: Recipe, part: Classes, materials: list[Materials]
) -> tuple[Predictor, Predictor]:
    """A prompt learner trained on base classes, as a predictor of these and of the new ones: a prompt is for any."""
    images, labels = part.train
    if method_of(world, recipe, materials[0]).takes_features:
        images = world.features(world.bundle.model, part.train)
    trained = world.train(recipe, (images, labels), what=f"base classes, {len(labels)}", materials=materials[0])
    moved = method_of(world, recipe, materials[1])
    moved.load_state_dict(trained.state_dict())
    return trained.classifier(), moved.classifier()


def method_of(world: World, recipe: Recipe, materials: Materials) -> Method:
    return make_method(world.benchmark.recipe(recipe), materials)


LEARNT = tuple(PROMPTS)
SECTION = Section(
    name="base_to_new",
    title="Base to new: learnt prompts on classes never trained on",
    question="Does a prompt that was learnt on half of the classes serve the other half, or cost what the model knew "
    "of it; and is its confidence mended there by what is known of the base classes?",
    measure=measure,
    claims=(
        *(
            Claim(f"{name} is more accurate on base classes than zero-shot", higher(ACCURACY, "base", name, ZERO_SHOT))
            for name in LEARNT
        ),
        *(
            Claim(f"{name} is less accurate on new classes than zero-shot", higher(ACCURACY, "new", ZERO_SHOT, name))
            for name in LEARNT
        ),
        *(
            Claim(f"{name} has a higher harmonic mean than CoOp", higher(ACCURACY, "H", name, "CoOp"))
            for name in LEARNT
            if name != "CoOp"
        ),
        *(
            Claim(f"{mended} lowers {name}'s ECE on new classes", falls(NEW, name, NONE, column))
            for name in LEARNT
            for mended, column in (("A temperature of base classes", TEMPERATURE), ("DAC", DAC))
            if (name, column) != ("CoCoOp", DAC)
        ),
        Claim("ZS-Norm lowers CoOp's ECE on base classes", higher(BASE, NONE, "CoOp", NORMED)),
        Claim("ZS-Norm lowers CoOp's ECE on new classes", higher(NEW, NONE, "CoOp", NORMED)),
        Claim("The zero-shot range lowers CoOp's ECE on new classes", falls(NEW, "CoOp", NONE, RANGE)),
    ),
    notes={
        ACCURACY: "Among the classes of their own half. CoCoOp saw one shot, as each of its steps reads all classes "
        "for every image; the others saw four. ZS-Norm trains with logits in the range of the zero-shot model's.",
        NEW: "The temperature is that of lowest NLL on base classes, by a studio that is neither trained nor tested "
        "on. DAC looks at class names alone; CoCoOp has class embeddings for each image and no scale of DAC's.",
    },
)
