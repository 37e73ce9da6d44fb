"""A recipe's method: made of a model, its prompts and the data, and trained.

Some methods want more than images and labels, and are given it here: descriptions (DRM), groups (worst-case risks), a
linear probe that was trained first (LP-FT), the training features (Tip-Adapter-F). A method whose image tower is
frozen is trained on features, of one pass over the images.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robustft import clip, methods
from robustft.data.opening import Data
from robustft.data.wrappers import group_names_of, groups_of
from robustft.methods.objective import Objective
from robustft.ops.processes import current
from robustft.pipeline.recipes import OWN, Recipe
from robustft.predictors.base import Classifier
from robustft.training.loop import History, fit
from robustft.training.run import holds_run


@dataclass(frozen=True)
class Materials:
    """What the methods of a run are made of.

    data: with the model's transforms, or of tensors. plain: its training set without augmentation, for features.
    prompts: the tokenizer, class names and templates. descriptions: of the classes, for DRM. cache: folder that keeps
    zero-shot heads and features, if any.
    """

    bundle: clip.Bundle
    data: Data
    prompts: Mapping[str, Any]
    plain: Any = None
    descriptions: Sequence[Sequence[str]] | None = None
    seed: int = 0
    cache: Path | None = None

    @classmethod
    def of(
        cls,
        bundle: clip.Bundle,
        data: Data,
        templates: Sequence[str],
        *,
        descriptions: Sequence[Sequence[str]] | None = None,
        seed: int = 0,
    ) -> Materials:
        """Of a model and data as they were opened: files get the model's transforms."""
        prompts = {"tokenizer": bundle.tokenizer, "class_names": data.classes, "templates": tuple(templates)}
        ready = data.map(lambda part: transformed(part, bundle.eval_transform))
        plain = ready.train
        ready = replace(ready, train=None if data.train is None else transformed(data.train, bundle.train_transform))
        return cls(bundle, ready, prompts, plain, descriptions, seed)

    def zero_shot(self) -> Classifier:
        """The zero-shot classifier."""
        return methods.zero_shot_classifier(
            self.bundle.model, **self.prompts, cache=self.cache, progress=current().main
        )


def transformed(data: Any, transform: Any) -> Any:
    """Files with a transform; sets of tensors, and those that normalise their own images, as they are."""
    if callable(getattr(data, "tensors", None)) or not hasattr(data, "with_transform"):
        return data
    return data.with_transform(transform)


def method_class(recipe: Recipe) -> Any:
    """The recipe's class: one of robustft.methods, or your own, which is imported; ValueError where it is none."""
    module, colon, name = recipe.method.rpartition(":")
    if not colon:
        return getattr(methods, recipe.method)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"method {recipe.method!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, methods.Method)):
        raise ValueError(f"method {recipe.method!r} is {found!r:.80}, expected a subclass of robustft.methods.Method")
    return found


def make_method(recipe: Recipe, materials: Materials, **arguments: Any) -> methods.Method:
    """The recipe's method on a copy of the model; `arguments` go to it beside the recipe's options."""
    options = built_options(recipe.options, materials.data.train)
    if recipe.method == "DRM" and "descriptions" not in arguments:
        if materials.descriptions is None:
            raise ValueError("DRM needs descriptions of the classes, and there are none")
        arguments["descriptions"] = materials.descriptions
    method: methods.Method = method_class(recipe)(
        materials.bundle.model, **materials.prompts, seed=materials.seed, **options, **arguments
    )
    return method


def fit_recipe(recipe: Recipe, method: methods.Method, data: Any, seed: int, **options: Any) -> History:
    """Trains a method by its recipe; `options` go to `robustft.fit`."""
    return fit(
        method,
        data,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup,
        seed=seed,
        **options,
    )


def train_recipe(
    recipe: Recipe,
    materials: Materials,
    output: Path | None,
    *,
    resume: bool = False,
    validation: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[methods.Method, History]:
    """Makes the recipe's method and trains it on the materials' data, in `output` if there is one.

    validation: arguments of `fit` that go with the validation set; None for a training without it.
    """
    arguments: dict[str, Any] = {}
    if recipe.method == "LPFT":
        probe, _ = train_recipe(
            OWN["LinearProbe"],
            materials,
            None if output is None else output / "probe",
            resume=resume,
            **{name: value for name, value in options.items() if name != "on_record"},
        )
        arguments["probe"] = probe.classifier()
    features = None
    if method_class(recipe).takes_features:
        features = encoded(materials, materials.plain)
    if recipe.method == "TipAdapterF":
        arguments["train"] = features
    method = make_method(recipe, materials, **arguments)
    if isinstance(method, methods.DRM) and method.proxy is not None:
        method.prepare(materials.plain)
    data = materials.data.train if features is None else (features.image_features, features.labels)
    if features is not None:
        options = {name: value for name, value in options.items() if name not in FOR_IMAGES}
    held_out = materials.data.validation
    if validation is not None and held_out is not None:
        if features is not None:
            known = encoded(materials, held_out)
            held_out = known.image_features, known.labels
        options |= {**validation, "validation": held_out}
    resume = resume and output is not None and current().of_main(lambda: holds_run(output))
    return method, fit_recipe(recipe, method, data, materials.seed, output=output, resume=resume, **options)


FOR_IMAGES = ("workers", "grad_checkpointing", "accumulate")
"""Options of `fit` that say how images are read and encoded: features are there already."""


def encoded(materials: Materials, data: Any) -> clip.Features:
    """Unit features and labels of a set's images, without augmentation."""
    return clip.encode(materials.bundle.model, data, cache=materials.cache)


def built_options(options: Mapping[str, Any], train: Any) -> dict[str, Any]:
    """A recipe's options, of which JSON holds an objective, a risk and a proxy as dictionaries; groups are counted in
    the training set."""
    built = dict(options)
    if isinstance(built.get("objective"), Mapping):
        built["objective"] = Objective(**built["objective"])
    if isinstance(built.get("proxy"), Mapping):
        built["proxy"] = methods.CoreProxy(**built["proxy"])
    if isinstance(built.get("risk"), Mapping):
        settings = dict(built["risk"])
        kind: Any = getattr(methods, settings.pop("risk"))
        if kind is not methods.CVaR and "num_groups" not in settings:
            settings["num_groups"] = number_of_groups(train)
        built["risk"] = kind(**settings)
    return built


def number_of_groups(train: Any) -> int:
    """Groups of a training set; ValueError where it tells none."""
    groups = groups_of(train)
    if groups is None:
        raise ValueError("this method needs groups, and the training data tell none: name their columns (--groups)")
    return len(group_names_of(train)) or int(torch.as_tensor(groups).max()) + 1
