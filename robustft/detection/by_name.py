"""Scores by name: what each reads of an image, its options, and what it learns from ID images first.

`SCORES` is the list of them, `table` prints it, `register` adds one's own. The mathematics is in
`robustft.detection.scores`; `robustft.Detector` puts a threshold on a score.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.clip.outputs import Outputs
from robustft.detection import scores as ood_scores
from robustft.detection.memory import UNIT, AdaNegMemory
from robustft.neighbors import NeighborIndex
from robustft.ops.arguments import check_count
from robustft.ops.kinds import checked


class Memory(Protocol):
    """What a score keeps of the images of a stream."""

    def reset(self) -> None:
        """Forgets them."""


class Score:
    """How outputs are scored. `reads` names their parts, `options` are numbers; `learns` says that `fit` is needed, and
    `needs_options` that there is none without options.

    A subclass that learns keeps what it learnt in `state()`, tensors by name, and takes it back in `restore`. One whose
    scores depend on the images before gives an empty `memory()`, and scores a stream in `over`.
    """

    reads: tuple[str, ...] = ("features",)
    learns: bool = False
    needs_options: bool = False

    def __init__(self, **options: Any) -> None:
        self.options = options

    def fit(self, train: Outputs) -> None:
        """Learns from ID training images."""

    def __call__(self, outputs: Outputs) -> Tensor:
        """Scores (N,), higher = more in-distribution."""
        raise NotImplementedError

    def memory(self) -> Memory | None:
        """Of a score whose images depend on those before: what it keeps of them, empty."""
        return None

    def over(self, parts: Iterable[Outputs], memory: Memory | None = None) -> Iterator[Tensor]:
        """Scores of a stream, in its order, in pieces; `memory` None: it begins with an empty one."""
        return map(self, parts)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""


class Pointwise(Score):
    """A function of the parts it reads, in their order, with options by keyword."""

    def __init__(self, function: Callable[..., Tensor], reads: tuple[str, ...], **options: Any) -> None:
        _check_options(function, len(reads), options)
        super().__init__(**options)
        self.function = function
        self.reads = reads

    def __call__(self, outputs: Outputs) -> Tensor:
        return self.function(*(getattr(outputs, name) for name in self.reads), **self.options)


class NegLabel(Score):
    """Softmax mass on the classes against negative texts: `scores.neg_label`, of embeddings (M, D), unit rows, by the
    model's own text tower."""

    reads = ("features", "cosines")
    needs_options = True

    def __init__(self, negative_embeddings: Tensor | None = None, **options: Any) -> None:
        _check_options(ood_scores.neg_label, 2, options)
        super().__init__(**options)
        if negative_embeddings is not None:
            negative_embeddings = negative_embeddings.detach().cpu().contiguous().clone()
        self.negative_embeddings = negative_embeddings

    def __call__(self, outputs: Outputs) -> Tensor:
        if self.negative_embeddings is None:
            raise ValueError(
                "score 'neg_label' has no negative texts: pass negative_embeddings (M, D), for example "
                "clip.encode_texts of words chosen by detection.scores.select_negatives"
            )
        negatives = self.negative_embeddings.to(outputs.features)
        if negatives.ndim != 2 or negatives.shape[1] != outputs.features.shape[1]:
            raise ValueError(
                f"negative_embeddings must be (M, {outputs.features.shape[1]}) as the features, "
                f"got {tuple(negatives.shape)}"
            )
        return ood_scores.neg_label(outputs.cosines, outputs.features @ negatives.T, **self.options)

    def state(self) -> dict[str, Tensor]:
        return {} if self.negative_embeddings is None else {"negative_embeddings": self.negative_embeddings}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.negative_embeddings = state.get("negative_embeddings")


class AdaNeg(Score):
    """NegLabel with a memory of the images scored: a stream through `memory.AdaNegMemory`, with its options, of class
    embeddings (K, D), which are normalised here, and negative texts (M, D). `batch` images enter, then are scored."""

    reads = ("features", "cosines")
    needs_options = True

    def __init__(
        self,
        class_embeddings: Tensor | None = None,
        negative_embeddings: Tensor | None = None,
        batch: int = 256,
        **options: Any,
    ) -> None:
        _check_options(AdaNegMemory, 2, options)
        check_count("batch", batch)
        super().__init__(batch=batch, **options)
        given = {"class_embeddings": class_embeddings, "negative_embeddings": negative_embeddings}
        self._texts = {
            name: rows.detach().cpu().contiguous().clone() for name, rows in given.items() if rows is not None
        }

    def __call__(self, outputs: Outputs) -> Tensor:
        return torch.cat(list(self.over([outputs])))

    def memory(self) -> AdaNegMemory:
        for name, what in (
            ("class_embeddings", "(K, D), the classifier's own"),
            ("negative_embeddings", "(M, D), as for neg_label"),
        ):
            if name not in self._texts:
                raise ValueError(f"score 'ada_neg' has no {name}: pass {name} {what}")
        classes, negatives = F.normalize(self._texts["class_embeddings"], dim=-1), self._texts["negative_embeddings"]
        return AdaNegMemory(classes, negatives, **{name: v for name, v in self.options.items() if name != "batch"})

    def over(self, parts: Iterable[Outputs], memory: Memory | None = None) -> Iterator[Tensor]:
        memory = self.memory() if memory is None else memory
        assert isinstance(memory, AdaNegMemory)
        for features, cosines in _batches(parts, self.options["batch"]):
            self._check_classes(memory.text_cosines(features), cosines)
            yield memory.update(features).scores(features)

    def _check_classes(self, found: Tensor, cosines: Tensor) -> None:
        """That the class embeddings are those of the cosines: another model's would give plausible scores."""
        width = len(self._texts["class_embeddings"])
        if cosines.shape[1] != width:
            raise ValueError(
                f"class_embeddings are of {width} classes, the cosines of {cosines.shape[1]}: {_OWN_CLASSES}"
            )
        far = (found[:, :width] - cosines).abs()
        if len(far) and not bool(far.max() <= UNIT):
            raise ValueError(
                f"class_embeddings give cosines that differ by {float(far.max()):.3g} from those of the outputs: "
                f"{_OWN_CLASSES}"
            )

    def state(self) -> dict[str, Tensor]:
        return self._texts

    def restore(self, state: dict[str, Tensor]) -> None:
        self._texts = state


_OWN_CLASSES = "pass the class_embeddings of the classifier that is scored"


def _batches(parts: Iterable[Outputs], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and cosines in batches of this size, whatever came; the last is what is left."""
    features: list[Tensor] = []
    cosines: list[Tensor] = []
    for part in parts:
        features, cosines = [*features, part.features], [*cosines, part.cosines]
        if sum(map(len, features)) < size:
            continue
        u, c = torch.cat(features), torch.cat(cosines)
        whole = len(u) - len(u) % size
        yield from zip(u[:whole].split(size), c[:whole].split(size), strict=True)
        features, cosines = [u[whole:]], [c[whole:]]
    if features:
        yield torch.cat(features), torch.cat(cosines)


class Mahalanobis(Score):
    """Negative Mahalanobis distance to the nearest class mean: `scores.mahalanobis` to the class Gaussians of ID
    training features; `shrinkage` as in their fit."""

    learns = True

    def __init__(self, shrinkage: float | None = None) -> None:
        super().__init__(shrinkage=shrinkage)

    def fit(self, train: Outputs) -> None:
        if not train.has("labels"):
            raise ValueError("score 'mahalanobis' needs the labels of the training images")
        self.gaussians = ood_scores.fit_class_gaussians(train.features, train.labels, self.options["shrinkage"])

    def __call__(self, outputs: Outputs) -> Tensor:
        return ood_scores.mahalanobis(outputs.features, self.gaussians)

    def state(self) -> dict[str, Tensor]:
        shrinkage = torch.tensor(self.gaussians.shrinkage, dtype=torch.float64)
        return self.gaussians._asdict() | {"shrinkage": shrinkage}

    def restore(self, state: dict[str, Tensor]) -> None:
        means, whitening, shrinkage = (state[name] for name in ood_scores.ClassGaussians._fields)
        if means.ndim != 2 or whitening.shape != 2 * means.shape[1:]:
            raise ValueError(f"means (K, D) and whitening (D, D) are {tuple(means.shape)} and {tuple(whitening.shape)}")
        self.gaussians = ood_scores.ClassGaussians(means, whitening, float(shrinkage))


class KNN(Score):
    """Negative distance to the k-th nearest training feature: `scores.knn_distance`; `k` None is a thousandth of
    them, at least 1."""

    learns = True

    def __init__(self, k: int | None = None) -> None:
        super().__init__(k=k)

    def fit(self, train: Outputs) -> None:
        self.index = NeighborIndex(train.features.detach())

    def __call__(self, outputs: Outputs) -> Tensor:
        k = max(1, len(self.index) // 1000) if self.options["k"] is None else self.options["k"]
        return ood_scores.knn_distance(outputs.features, self.index, k)

    def state(self) -> dict[str, Tensor]:
        return {"points": self.index.points}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.index = NeighborIndex(state["points"])


def _check_options(function: Callable[..., object], fields: int, options: dict[str, Any]) -> None:
    known = list(inspect.signature(function).parameters)[fields:]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"{function.__name__} has no option {unknown[0]!r}; it has {known or 'none'}")


@dataclass(frozen=True)
class Entry:
    """A score in the list: called with its options it makes a `Score`.

    `summary` says in one line what it is, `options` what can be set, with defaults. `label` is what tables and pictures
    call it, `convention` what a footnote adds to that.
    """

    make: Callable[..., Score]
    reads: tuple[str, ...]
    summary: str
    options: tuple[str, ...] = ()
    learns: bool = False
    needs_options: bool = False
    label: str = ""
    convention: str = ""

    def __call__(self, **options: Any) -> Score:
        return self.make(**options)

    @property
    def of_outputs(self) -> bool:
        """Whether the outputs of any predictor are all it needs: nothing learnt, no patches, no option."""
        return not self.learns and not self.needs_options and "patch_cosines" not in self.reads

    @property
    def of_fit(self) -> bool:
        """Whether the outputs of training images are all it learns from, and those of others all it needs then."""
        return self.learns and not self.needs_options and "patch_cosines" not in self.reads


def _entry(make: Callable[..., Tensor] | type[Score], reads: tuple[str, ...] = (), **words: Any) -> Entry:
    """The entry of a subclass of `Score`, or of a function, which reads its arguments without a default."""
    if not isinstance(make, type):
        return _pointwise(make, reads, words)
    if not issubclass(make, Score):
        raise TypeError(f"a score must be a function, or a subclass of Score, got the class {make.__name__}")
    return Entry(make, make.reads, *_summary(make), make.learns, make.needs_options, **words)


def _pointwise(make: Callable[..., Tensor], reads: tuple[str, ...], words: dict[str, Any]) -> Entry:
    parameters = inspect.signature(make).parameters.values()
    reads = reads or tuple(p.name for p in parameters if p.default is p.empty)
    return Entry(partial(Pointwise, make, reads), reads, *_summary(make), **words)


def _summary(make: Callable[..., Any]) -> tuple[str, tuple[str, ...]]:
    """What a score is, and its options with their defaults."""
    summary = (inspect.getdoc(make) or "").split(":")[0].replace("\n", " ")
    parameters = inspect.signature(make).parameters.values()
    return summary, tuple(f"{p.name}={p.default}" for p in parameters if p.default is not p.empty)


SCORES: dict[str, Entry] = {
    "mcm": _entry(ood_scores.mcm, label="MCM", convention="tau = 1, on cosines"),
    "max_cosine": _entry(ood_scores.max_cosine, label="max cosine"),
    "msp": _entry(ood_scores.msp, label="MSP"),
    "energy": _entry(ood_scores.energy),
    "entropy": _entry(ood_scores.entropy),
    "variance": _entry(ood_scores.variance),
    "mahalanobis": _entry(Mahalanobis, label="Mahalanobis"),
    "knn": _entry(KNN, label="k-NN"),
    "l_mcm": _entry(ood_scores.local_mcm, label="L-MCM"),
    "gl_mcm": _entry(ood_scores.gl_mcm, label="GL-MCM"),
    "neg_label": _entry(NegLabel, label="NegLabel"),
    "ada_neg": _entry(AdaNeg, label="AdaNeg"),
}
"""Scores by name."""

_OWN = frozenset(SCORES)


@checked
def register(name: str, score: Callable[..., Tensor] | type[Score], reads: tuple[str, ...] = ()) -> None:
    """Makes `Detector(name, **options)` score by `score(*parts, **options) -> (N,)`, or by a subclass of `Score`.

    reads: the parts of `Outputs` that a function takes; by default the names of its arguments without a default.
    Higher has to mean more in-distribution. A detector that was saved needs its score registered before it is loaded.
    """
    entry = _entry(score, tuple(reads))
    if unknown := [part for part in entry.reads if part not in Outputs.PARTS]:
        raise ValueError(f"reads must name parts of Outputs, {Outputs.PARTS}, got {unknown}")
    if name in _OWN:
        raise ValueError(f"name must not be that of one of robustft's own scores, {sorted(_OWN)}, got {name!r}")
    SCORES[name] = entry


def label(name: str) -> str:
    """What tables and pictures call a score, registered or not."""
    return (SCORES[name].label if name in SCORES else "") or name.replace("_", " ")


def table() -> str:
    """Every score in a line: its name, what it reads, whether it learns, what it is, and its options."""
    rows = [
        (
            name,
            f"{', '.join(entry.reads)}{'; learns' if entry.learns else ''}",
            " ".join([entry.summary, *(f"[{option}]" for option in entry.options)]),
        )
        for name, entry in SCORES.items()
    ]
    name_width, reads_width = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{name:{name_width}}  {reads:{reads_width}}  {summary}".rstrip() for name, reads, summary in rows)
