"""One seed's world: a bundled benchmark's sets, the zero-shot model, and what has been trained on them.

Runs are kept in `folder`, each under a name that says what it depends on, so that a killed study goes on where it was
and sections that ask for the same run share it, in one process or several: the first trains it, the others wait. So are
the features of every image tower: predictors of one tower, and their mixtures, are heads on them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from robustft import clip, methods
from robustft.clip.outputs import Outputs, evaluating
from robustft.data import few_shot
from robustft.data.opening import Data
from robustft.data.sources import image_statistics
from robustft.evaluation import measure
from robustft.evaluation.results import Suite
from robustft.files import locked, read_tensors, write_tensors
from robustft.pipeline.job import suite_of
from robustft.pipeline.recipes import QUICK_EPOCHS, RECIPES, Recipe
from robustft.pipeline.study.recipes import DRM, HOSTS, LP_FT, PROBE
from robustft.pipeline.training import Materials, fit_recipe, make_method
from robustft.pipeline.worlds import benchmark
from robustft.predictors.base import joined_outputs

Tensors = tuple[Tensor, Tensor]
RUNS = 1000  # between the seeds of two runs in one world
P = TypeVar("P", bound=methods.Predictor)


class World:
    """A bundled benchmark for one fine-tuning seed.

    `quick` trains fewer epochs and looks at 200 images of each test set. Whatever is trained or predicted is computed
    once.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        world: str,
        quick: bool = False,
        log: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.seed, self.quick, self.log = folder, seed, quick, log
        self.benchmark = benchmark(world)
        self.bundle = self.benchmark.load_clip()
        self.limit = 200 if quick else None
        self._methods: dict[str, methods.Method] = {}
        self._folders: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()
        self._features: WeakKeyDictionary[nn.Module, dict[int, Tensors]] = WeakKeyDictionary()
        self._suites: dict[int, tuple[methods.Predictor, Suite[Outputs]]] = {}

    @cached_property
    def sets(self) -> Data:
        return self.benchmark.sets(self.limit)

    @cached_property
    def data(self) -> Data:
        """The sets as tensors for the model, each made once."""
        return self.sets.map(self.tensors)

    @cached_property
    def tests(self) -> Suite[Tensors]:
        return suite_of(self.data)

    @cached_property
    def materials(self) -> Materials:
        return Materials.of(self.bundle, self.sets, self.benchmark.templates, seed=self.seed)

    @property
    def prompts(self) -> dict[str, Any]:
        """What every method is given: the tokenizer, class names and templates."""
        return dict(self.materials.prompts)

    @cached_property
    def zero_shot(self) -> methods.Classifier:
        return self.materials.zero_shot()

    def tensors(self, dataset: Any, limit: int | None = None) -> Tensors:
        images, labels = dataset.tensors(*image_statistics(self.bundle.model))
        return images[:limit], labels[:limit]

    def train(
        self,
        recipe: Recipe,
        data: Any = None,
        *,
        what: str = "all",
        run: int = 0,
        few_shot: bool = False,
        misled: bool = False,
        materials: Materials | None = None,
        **arguments: Any,
    ) -> methods.Method:
        """The recipe's method trained on `data` (its training images, or what `what` names).

        A further `run` of the same has another seed; `few_shot` tells the recipe of few images a class, `misled` of
        colours that mislead. `materials` (the world's own by default) and `arguments` make the method; `what` must name
        all of theirs that matter.
        """
        data = self.data.train if data is None else data
        recipe = self.benchmark.recipe(recipe, few_shot=few_shot, misled=misled)
        if self.quick:
            recipe = replace(recipe, epochs=max(1, recipe.epochs * QUICK_EPOCHS // RECIPES["FT"].epochs))
        seed = self.seed + RUNS * run
        text = json.dumps([asdict(recipe), what, seed, self.quick], sort_keys=True, default=str)
        key = f"{recipe.method}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if key not in self._methods:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # ablations ask for teachers that the method warns about
                method = make_method(recipe, materials or self.materials, **arguments)
            trained = self.folder / "runs" / f"{key}.safetensors"
            with warnings.catch_warnings(), locked(self.folder / "locks" / key, wait=True):
                warnings.filterwarnings("ignore", "CaRot's teacher")  # it is told the run's length here
                if trained.exists():
                    method.load_state_dict(read_tensors(trained))
                else:
                    history = fit_recipe(recipe, method, data, seed, progress=False)
                    write_tensors(trained, method.state_dict())
                    what = f"{what}, {history.steps} steps, {history.seconds:.1f} s"
            self.log(f"  seed {self.seed}: {recipe.method}, {what}")
            self._methods[key] = method
        return self._methods[key]

    def predictor(self, name: str) -> methods.Predictor:
        """DRM, or a classifier by name."""
        return self.drm(DRM) if name == "DRM" else self.classifier(name)

    def classifier(self, name: str) -> methods.Classifier:
        """The quickstart's FT, FLYP or CaRot; LP, or LP-FT from it."""
        match name:
            case "LP":
                return self.linear_probe(PROBE)
            case "LP-FT":
                return self.lp_ft(LP_FT)
        return of_kind(methods.Classifier, self.train(RECIPES[name]))

    def linear_probe(self, recipe: Recipe) -> methods.Classifier:
        encoded = self.training(self.zero_shot)
        return of_kind(methods.Classifier, self.train(recipe, (encoded.features, encoded.labels), what="features"))

    def lp_ft(self, recipe: Recipe) -> methods.Classifier:
        """Fine-tuning from the probe of the frozen features."""
        return of_kind(methods.Classifier, self.train(recipe, probe=self.classifier("LP")))

    def drm(self, recipe: Recipe) -> methods.DualClassifier:
        """DRM with the default proxy."""
        images, labels = self.data.train
        core = methods.core_labels(
            self.bundle.model,
            self.data.train,
            tokenizer=self.bundle.tokenizer,
            class_names=self.benchmark.class_names,
            descriptions=self.benchmark.descriptions,
            proxy=methods.CoreProxy(),
            cache=self.features_of(self.bundle.model),
        )
        data = {"image": images, "label": labels, "core": core}
        method = self.train(recipe, data, what="core", descriptions=self.benchmark.descriptions, proxy=None)
        return of_kind(methods.DualClassifier, method)

    def shots(self, count: int) -> Tensors:
        """`count` training images of each class, or all that there are."""
        return few_shot(self.data.train, count, seed=self.seed, at_most=True)

    def few_shot(self, recipe: Recipe, count: int) -> methods.Method:
        """The recipe's method trained on `count` images of each class; a frozen image tower encodes them once."""
        train = self.shots(count)
        arguments: dict[str, Any] = {}
        match recipe.method:
            case "TipAdapterF":
                arguments["train"] = train
            case "LPFT":
                arguments["probe"] = self.few_shot(HOSTS["linear probe"], count).classifier()
        if getattr(methods, recipe.method).takes_features:
            encoded = self.training(self.zero_shot)
            train = few_shot((encoded.features, encoded.labels), count, seed=self.seed, at_most=True)
        return self.train(recipe, train, what=f"{count}-shot", few_shot=True, **arguments)

    def features_of(self, model: nn.Module) -> Path:
        """The folder that keeps an image tower's features."""
        if model not in self._folders:
            self._folders[model] = self.folder / "features" / clip.fingerprint(model)[:16]
        return self._folders[model]

    def features(self, encoder: nn.Module, data: Tensors) -> Tensor:
        """Unit features of a set by an image tower: held while the tower is, and kept in its folder."""
        held = self._features.setdefault(encoder, {})
        if id(data[0]) not in held:  # beside the images: an id is only unique while its owner lives
            found = clip.encode(encoder, data, cache=self.features_of(encoder))
            held[id(data[0])] = data[0], found.image_features
        return held[id(data[0])][1]

    def outputs(self, predictor: methods.Predictor, data: Tensors, *, labelled: bool = True) -> Outputs:
        """What a predictor makes of a set: a mixture out of its members' outputs, a head out of its tower's features,
        which are computed once."""

        def single(member: methods.Predictor) -> Outputs:
            encoder = member.encoder
            if encoder is None:
                return member.predict(data, labelled=labelled)
            with torch.no_grad(), evaluating(encoder):
                return member.head_outputs(self.features(encoder, data))

        (found,) = joined_outputs((predictor,), single)
        return found.replace(labels=data[1] if labelled else None, classes=predictor.classes)

    def suite(self, predictor: methods.Predictor) -> Suite[Outputs]:
        """A predictor's outputs on all test sets."""
        if id(predictor) not in self._suites:  # kept beside its result: an id is only unique while its owner lives
            tests = self.tests
            known = self.outputs(predictor, tests.id)
            shifts = {name: self.outputs(predictor, part) for name, part in tests.shifts.items()}
            ood = {name: self.outputs(predictor, part, labelled=False) for name, part in tests.ood.items()}
            self._suites[id(predictor)] = predictor, Suite(known, shifts, ood)
        return self._suites[id(predictor)][1]

    def validation(self, predictor: methods.Predictor) -> Outputs:
        return self.outputs(predictor, self.data.validation)

    def training(self, predictor: methods.Predictor) -> Outputs:
        return self.outputs(predictor, self.data.train)

    def pair(self, fine_tuned: methods.Predictor, *sets: Tensors) -> methods.VRFFeatures:
        """What VRF learns from: the zero-shot model and a fine-tuned one on some sets, one after the other."""
        zero_shot, other = (
            Outputs.cat([self.outputs(predictor, part) for part in sets]) for predictor in (self.zero_shot, fine_tuned)
        )
        return methods.VRFFeatures(zero_shot.only("logits"), other.only("features", "logits", "labels"))


def of_kind(kind: type[P], method: methods.Method) -> P:
    """What a method has learnt, which has to be a predictor of this kind."""
    predictor = method.classifier()
    if not isinstance(predictor, kind):
        raise TypeError(f"{type(method).__name__} gives a {type(predictor).__name__}, not a {kind.__name__}")
    return predictor


def columns(suites: Mapping[str, Suite[Outputs]]) -> dict[str, dict[str, float]]:
    """The usual columns of a table, in %: a row a model."""
    return {
        name: {
            "acc ID": 100 * m.id_accuracy,
            "acc OOD": 100 * m.ood_accuracy,
            "ECE ID": 100 * m.id.calibration.ece,
            "ECE OOD": 100 * m.ood_ece,
            "AUROC": 100 * m.auroc,
        }
        for name, m in measure.evaluate_predictions(suites).models.items()
    }


def tables(world: World, groups: Mapping[str, Mapping[str, methods.Predictor]]) -> dict[str, Any]:
    """The usual columns of a table for each group of models, by their names."""
    return {title: columns({name: world.suite(p) for name, p in group.items()}) for title, group in groups.items()}


def accuracy(outputs: Outputs) -> float:
    """In %."""
    return 100 * measure.accuracy(outputs)
