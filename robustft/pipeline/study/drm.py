"""DRM (arXiv 2411.19757): a background that goes with the class in training, and against it in one of two tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from robustft.calibration.measures import calibration_report
from robustft.evaluation.groups import worst_group_accuracy
from robustft.methods import Classifier, CoreProxy, DualClassifier, Method, Predictor, WiSEFT, core_labels
from robustft.pipeline.recipes import Recipe
from robustft.pipeline.study.findings import Claim, Measured, Plot, Section, Table, higher, lower
from robustft.pipeline.study.recipes import SINGLE, SPURIOUS
from robustft.pipeline.study.world import Tensors, World, accuracy, of_kind
from robustft.pipeline.worlds import Benchmark
from robustft.predictors.logits import accuracy_and_nll, preference

QUICK_LAMBDAS = (0.5, 2.0)
BETAS = tuple(i / 10 for i in range(11))
PROXIES = {
    "affinity": [CoreProxy(one_hot=m, spread=spread) for m in (0.0, 0.5) for spread in (False, True)],
    "soft": [CoreProxy("soft", one_hot=m) for m in (0.0, 0.5)],
}
"""What is known of the paper's two proxies leaves these open; ID validation chooses."""
WORST_CASE = ("group DRO", "worst group", "CVaR")
Choice = TypeVar("Choice")
SETTINGS = "the proxy's settings"


def methods_under(bundled: Benchmark) -> str:
    """The name of the table of methods."""
    return f"aligned and conflicting {bundled.misleading}s"


def measure(world: World) -> Measured:
    sets, lambdas = Spurious(world), world.benchmark.lambdas
    predictors: dict[str, Predictor] = {"zero-shot": world.zero_shot}
    for name in ("FT", "FLYP"):
        predictors[name] = sets.trained(SPURIOUS[name])
    flyp = of_kind(Classifier, sets.method(SPURIOUS["FLYP"]))
    predictors["WiSE FLYP"] = WiSEFT(world.zero_shot, flyp).fit(sets.validation).classifier()
    predictors |= {name: sets.trained(SPURIOUS[name]) for name in WORST_CASE}
    predictors[SINGLE] = sets.drm(SPURIOUS[SINGLE], CoreProxy(one_hot=1.0))
    sweeps: dict[str, Any] = {}
    settings: dict[str, dict[str, float]] = {}
    best: dict[str, DualClassifier] = {}
    for kind, candidates in PROXIES.items():
        tried = {proxy: sets.weighted(proxy, 1.0) for proxy in candidates}
        settings |= {described(proxy): sets.columns(predictor) for proxy, predictor in tried.items()}
        proxy = sets.best(tried)
        found = {weight: sets.weighted(proxy, weight) for weight in (QUICK_LAMBDAS if world.quick else lambdas)}
        predictors[f"DRM, {kind}"] = best[kind] = found[sets.best(found)]
        sweeps[kind] = list(found), [sets.conflicting(p) for p in found.values()]
        sweeps[f"{kind}, validation"] = list(found), [sets.accuracy(p, sets.validation) for p in found.values()]
    dual = best["affinity"]
    predictors["DRM, default head"], predictors["DRM, concept head"] = dual.default, dual.core
    predictors["WiSE DRM"] = WiSEFT(world.zero_shot, dual.default).fit(sets.validation).classifier()
    mixtures = [dual.at(beta) for beta in BETAS]
    betas = {
        "conflicting": (list(BETAS), [sets.conflicting(p) for p in mixtures]),
        "aligned": (list(BETAS), [sets.accuracy(p, sets.aligned) for p in mixtures]),
    }
    table = {name: sets.columns(predictor) for name, predictor in predictors.items()}
    return Measured({methods_under(world.benchmark): table, SETTINGS: settings}, {"lambda": sweeps, "beta": betas})


def ahead(setting: str, methods: str) -> Callable[[Mapping[str, Table]], float]:
    """The margin by which DRM with a proxy's setting, at lambda 1, is ahead of FLYP in the table of methods."""
    return lambda tables: tables[SETTINGS][setting]["conflicting"] - tables[methods]["FLYP"]["conflicting"]


def described(proxy: CoreProxy) -> str:
    rest = "" if proxy.kind == "soft" else ", rest spread" if proxy.spread else ", rest dropped"
    return f"{proxy.kind}{rest}, {proxy.one_hot:.0%} on the label"


class Spurious:
    """Images whose ground's or frame's colour goes with the class: nearly always in training, always or never in the
    tests."""

    def __init__(self, world: World) -> None:
        self.world = world
        bundled = world.benchmark
        train = bundled.spurious("train")
        self.train = world.tensors(train)
        assert train.groups is not None  # the ground of each image
        self.against = (train.groups != bundled.usual(train.labels)).long()  # is the ground another class's?
        self.validation = world.tensors(bundled.spurious("validation"))
        self.aligned = world.tensors(bundled.spurious("test"), world.limit)
        self.opposed = world.tensors(bundled.spurious("test", conflicting=True), world.limit)
        self.proxies: dict[CoreProxy, Tensor] = {}

    def batch(self, **columns: Tensor) -> dict[str, Tensor]:
        return {"image": self.train[0], "label": self.train[1], **columns}

    def method(self, recipe: Recipe) -> Method:
        """FT or FLYP; a worst-case risk of two groups: grounds that go with the class, and grounds that do not."""
        grouped = recipe.method == "WorstCaseFineTune"
        data = self.batch(group=self.against) if grouped else self.train
        return self.world.train(recipe, data, what="spurious", misled=True)

    def trained(self, recipe: Recipe) -> Predictor:
        return self.method(recipe).classifier()

    def drm(self, recipe: Recipe, proxy: CoreProxy) -> DualClassifier:
        if proxy not in self.proxies:
            self.proxies[proxy] = core_labels(
                self.world.bundle.model,
                self.train,
                tokenizer=self.world.bundle.tokenizer,
                class_names=self.world.benchmark.class_names,
                descriptions=self.world.benchmark.descriptions,
                proxy=proxy,
                cache=self.world.features_of(self.world.bundle.model),
            )
        data = self.batch(core=self.proxies[proxy])
        arguments: dict[str, Any] = {"descriptions": self.world.benchmark.descriptions, "proxy": None}
        method = self.world.train(recipe, data, what=f"spurious, {described(proxy)}", misled=True, **arguments)
        return of_kind(DualClassifier, method)

    def weighted(self, proxy: CoreProxy, weight: float) -> DualClassifier:
        """DRM of a proxy, and of lambda."""
        return self.drm(replace(SPURIOUS["DRM"], options={"worst_case_weight": weight}), proxy)

    def best(self, found: Mapping[Choice, DualClassifier]) -> Choice:
        """The choice of the highest ID validation accuracy; of equals the one of the lowest NLL."""

        def order(choice: Choice) -> tuple[float, float]:
            p = self.world.outputs(found[choice], self.validation)
            return preference(*accuracy_and_nll(p.logits, p.labels))

        return min(found, key=order)

    def conflicting(self, predictor: Predictor) -> float:
        return self.accuracy(predictor, self.opposed)

    def accuracy(self, predictor: Predictor, data: Tensors) -> float:
        return accuracy(self.world.outputs(predictor, data))

    def columns(self, predictor: Predictor) -> dict[str, float]:
        aligned, opposed = (self.world.outputs(predictor, part) for part in (self.aligned, self.opposed))
        return {
            "validation": self.accuracy(predictor, self.validation),
            "aligned": accuracy(aligned),
            "conflicting": accuracy(opposed),
            "worst class": 100 * worst_group_accuracy(opposed.logits.argmax(1), opposed.labels, opposed.labels),
            "ECE conflicting": 100 * calibration_report(opposed.probabilities, opposed.labels).ece,
        }


def section(bundled: Benchmark) -> Section:
    """The section on a benchmark's misleading colours."""
    methods, grounds = methods_under(bundled), f"{bundled.misleading}s"
    return Section(
        name="drm",
        title="DRM: a second risk on what the classes are, not where they stand",
        question=f"Where a {bundled.misleading} goes with the class in training, does a risk on concept descriptions "
        "keep accuracy when it goes against the class? Are both risks needed, and both heads?",
        measure=measure,
        claims=(
            *(
                Claim(
                    f"DRM, as ID validation chooses it, is more accurate than {name} on conflicting {grounds}",
                    higher(methods, "conflicting", "DRM, affinity", name),
                )
                for name in ("FLYP", "FT", SINGLE)
            ),
            *(
                Claim(
                    f"DRM, {described(proxy)}, lambda 1, is more accurate than FLYP there",
                    ahead(described(proxy), methods),
                )
                for candidates in PROXIES.values()
                for proxy in candidates
            ),
            Claim("DRM loses nothing on aligned ones to FLYP", higher(methods, "aligned", "DRM, affinity", "FLYP")),
            Claim(
                f"The mixture of both heads beats the default head on conflicting {grounds}",
                higher(methods, "conflicting", "DRM, affinity", "DRM, default head"),
            ),
            Claim(
                f"The affinity proxy beats the soft one on conflicting {grounds}",
                higher(methods, "conflicting", "DRM, affinity", "DRM, soft"),
            ),
            Claim(
                f"DRM's ECE on conflicting {grounds} is lower than FLYP's",
                lower(methods, "ECE conflicting", "DRM, affinity", "FLYP"),
            ),
            *(
                Claim(
                    f"{name} is more accurate than FT on conflicting {grounds}",
                    higher(methods, "conflicting", name, "FT"),
                )
                for name in WORST_CASE
            ),
            Claim(
                "Mixed with zero-shot (WiSE), DRM is still ahead of FLYP",
                higher(methods, "conflicting", "WiSE DRM", "WiSE FLYP"),
            ),
        ),
        plots=(
            Plot(
                "lambda",
                "The weight of the second risk",
                "lambda",
                "accuracy (%)",
                f"On conflicting {grounds}, and on the ID validation data by which lambda is chosen.",
                logarithmic=True,
            ),
            Plot(
                "beta",
                "The mixture of the heads",
                "beta",
                "accuracy (%)",
                "0: concept head alone; 1: default head alone.",
            ),
        ),
        notes={
            methods: f"{bundled.misleads} and for all "
            "aligned test images, and never for a conflicting one. worst class: the lowest accuracy of a class on "
            "conflicting ones. The proxy's settings and lambda are chosen on validation data, which can hardly tell: "
            f"its {grounds} lie as well. Group DRO and the worst group know which training images have another class's "
            f"{bundled.misleading}.",
            SETTINGS: "At lambda 1. What the class's affinity leaves of the mass is spread over the other classes, or "
            "dropped. The default, half on the label and the rest spread, was set on GlyphWorld (docs/drm.md).",
        },
    )
