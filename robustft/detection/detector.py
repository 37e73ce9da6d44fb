"""A detector: a score, what it has learnt of ID data, and the threshold below which an image is out-of-distribution.

    flag x  if  s(x) < t,      t the highest threshold that keeps a share `tpr` of held-out ID images

Which score, is a name in `by_name.SCORES`; the mathematics of all of them is in `robustft.detection.scores`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustft import clip
from robustft.clip import patches
from robustft.clip.outputs import Outputs, evaluating, outputs_of
from robustft.data.classes import matching_of
from robustft.data.sources import image_batches
from robustft.detection.by_name import SCORES, Memory
from robustft.detection.metrics import threshold
from robustft.files import DETECTOR_FILE, load_fitted, place, refusing, save_fitted
from robustft.ops.kinds import checked

WIDEST = 2**24  # features and classes of no model are more


class Detector:
    """Flags images that are out-of-distribution, at a threshold that keeps a share `tpr` of ID images.

        detector = Detector("mcm").fit(classifier, validation)      # held-out ID images, a data set
        detector.detect(classifier, images)                         # (N,) bool, True: out-of-distribution
        detector.save("exported")                                   # beside a classifier; Detector.load gives it back

    Where a predictor is asked for, one can give what has been computed instead of (predictor, images): `Outputs`,
    Features, whatever has the parts that the score reads.

    Args:
        score: a name in `robustft.detection.SCORES`, which `detection.table()` prints with what each reads.
        tpr: share of the ID images that are kept.
        options: of the score: temperature, local_weight, groups, k, shrinkage ...

    A score that remembers images (AdaNeg) begins every call of `fit`, `scores` and `detect` with an empty memory, and
    takes the images of the call in their order: equal calls give equal scores. `stream` keeps one memory over calls.

    Learnt by `fit`: `threshold_`. It belongs to one model and one set of classes: MCM is not comparable across K.
    ValueError for an unknown score, fields of another width than in `fit`, scores that are NaN, and a
    softmax over one class.
    """

    @checked
    def __init__(self, score: str = "mcm", *, tpr: float = 0.95, **options: Any) -> None:
        if score not in SCORES:
            raise ValueError(f"score must be one of {sorted(SCORES)}, got {score!r}")
        if not 0.0 < tpr <= 1.0:
            raise ValueError(f"tpr must lie in (0, 1], got {tpr!r}")
        self.score = score
        self.tpr = tpr
        self._score = SCORES[score](**options)
        self._widths: dict[str, int] = {}
        self.memory: Memory | None = None
        """What the calls of a `stream` have left; None: every call begins anew."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The parts of `Outputs` that the score is made of."""
        return self._score.reads

    @property
    def options(self) -> dict[str, Any]:
        """The options that the score was given."""
        return dict(self._score.options)

    @checked
    def fit(self, source: Any, data: Any = None, *, validation: Any = None, batch_size: int = 256) -> Detector:
        """Learns what the score learns from ID data, then the threshold from held-out ID data. Returns self.

        source, data: a predictor and images, or what was computed already. validation: the same kind, for the
        threshold, whose labels are not looked at; it may be left out for scores that learn nothing, while those that
        learn find the images they have learnt from too familiar. Labels that a score learns from are matched to the
        predictor's classes by name, where `data` tells names. Memory: all features for scores that learn, else the
        scores.
        """
        if self._score.learns and validation is None:
            raise ValueError(
                f"score {self.score!r} learns from the training images, so these cannot set its threshold: pass "
                "validation, ID images that were held out"
            )
        self._widths = {}
        self.__dict__.pop("threshold_", None)  # of an earlier fit, should this one fail
        if self._score.learns:
            self._score.fit(Outputs.cat(list(self._read_all(source, data, batch_size, fitting=True, labelled=True))))
        if validation is not None:
            source, data = (validation, None) if data is None else (source, validation)
        scores = self._scores(source, data, batch_size, fitting=True)
        classes = [width for name, width in self._widths.items() if name != "features"]
        if 1 in classes and bool((scores == scores[0]).all()):
            raise ValueError(
                f"score {self.score!r} is {float(scores[0]):g} for every image: over one class every softmax is the "
                "same, and no threshold tells images apart. Use max_cosine or another score without a softmax over "
                "the classes, or add classes"
            )
        self.threshold_ = threshold(scores, self.tpr)
        return self

    @checked
    def scores(self, source: Any, data: Any = None, *, batch_size: int = 256) -> Tensor:
        """Scores (N,) on the CPU, higher = more in-distribution; no gradient.

        data: for a predictor, images (N, C, H, W), or any of what `robustft.data.sources` names; labels are not looked
        at.
        """
        if self._score.learns and not hasattr(self, "threshold_"):
            raise ValueError(f"score {self.score!r} has not learnt anything yet: call fit(training, validation=...)")
        return self._scores(source, data, batch_size)

    @checked
    def detect(self, source: Any, data: Any = None, *, batch_size: int = 256) -> Tensor:
        """(N,) bool, True for images that are out-of-distribution: score below `threshold_`."""
        self._check_fitted()
        return self.scores(source, data, batch_size=batch_size).double() < self.threshold_

    def stream(self) -> Detector:
        """A copy of this detector, for serving, whose `memory` lasts from call to call: `memory.reset()` empties it.

        The score of an image then depends on the calls before. One thread at a time may call it. `fit` neither reads
        nor changes the memory; `save` leaves it out. ValueError for a score that remembers nothing.
        """
        memory = self._score.memory()
        if memory is None:
            raise ValueError(f"score {self.score!r} remembers no images: every image has a score of its own")
        kept = copy.copy(self)
        kept._widths, kept.memory = dict(self._widths), memory
        return kept

    @checked
    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all, and returns its path.

        path: a directory, such as `Classifier.save` wrote, where it becomes detector.safetensors, or a file.
        """
        self._check_fitted()
        path = place(path, DETECTOR_FILE)
        settings = {
            "score": self.score,
            "tpr": self.tpr,
            "options": self._score.options,
            "threshold": self.threshold_,
            "widths": self._widths,
        }
        save_fitted(path, "Detector", settings, self._score.state())
        return path

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Detector:
        """The detector that `save` wrote; its scores are the same bit for bit. ValueError for a damaged file."""
        path = place(path, DETECTOR_FILE)
        settings, tensors = load_fitted(path, "Detector")
        with refusing(path, "Detector"):
            detector = cls(settings["score"], tpr=settings["tpr"], **settings["options"])
            if bad := [name for name, value in tensors.items() if not bool(value.isfinite().all())]:
                raise ValueError(f"{bad[0]} must be finite, but holds NaN or infinity")
            detector._score.restore(tensors)
            detector._widths = {str(name): int(width) for name, width in settings["widths"].items()}
            for name, width in detector._widths.items():
                if not 1 <= width <= WIDEST:
                    raise ValueError(f"the width of {name} is {width}, expected one in [1, {WIDEST}]")
            detector.threshold_ = float(settings["threshold"])
            if not math.isfinite(detector.threshold_):
                raise ValueError(f"threshold must be finite, got {detector.threshold_}")
        return detector

    def _check_fitted(self) -> None:
        if not hasattr(self, "threshold_"):
            raise ValueError(f"Detector({self.score!r}) has no threshold yet: call fit with ID data")

    def _scores(self, source: Any, data: Any, batch_size: int, fitting: bool = False) -> Tensor:
        parts = self._read_all(source, data, batch_size, fitting)
        scores = torch.cat(list(self._score.over(parts, None if fitting else self.memory)))
        bad = int(scores.isnan().sum())
        if bad:
            raise ValueError(f"{bad} of {len(scores)} scores are NaN: check the features and logits given")
        return scores

    def _read_all(
        self, source: Any, data: Any, batch_size: int, fitting: bool = False, labelled: bool = False
    ) -> Iterator[Outputs]:
        """What the score reads, and labels, on the CPU: batch by batch, or all at once where it is ready.

        `labelled`: labels are looked at, so that they are matched to the predictor's classes."""
        widths = self._widths if fitting else dict(self._widths)
        if not callable(getattr(source, "outputs", None)):
            if data is not None:
                raise TypeError(f"data goes with a predictor, which has outputs(images); got a {type(source).__name__}")
            yield self._read(_ready(source), source, widths)
            return
        if data is None:
            raise ValueError(f"data is missing: a {type(source).__name__} scores images, so pass it and them")
        device = next((p.device for p in source.parameters()), None) if isinstance(source, nn.Module) else None
        classes = getattr(source, "classes", None) if labelled else None
        matching = None if classes is None else matching_of(data, classes, of="the predictor")
        for images, labels in image_batches(data, source, batch_size):
            if matching is not None and labels is not None:
                labels = matching.of(labels)
            with torch.no_grad():
                observed = self._observe(source, images.to(device=device)).replace(labels=labels)
            yield self._read(observed, source, widths)

    def _read(self, outputs: Outputs, source: Any, widths: dict[str, int]) -> Outputs:
        """The parts that the score reads, checked, and the labels."""
        for name in self._score.reads:
            if not outputs.has(name):
                raise ValueError(
                    f"score {self.score!r} reads {name}, which this {type(source).__name__} lacks: pass a classifier "
                    "and images, or what clip.outputs_of(features, class_embeddings, ...) gives"
                )
            width = getattr(outputs, name).shape[-1]
            if widths.setdefault(name, width) != width:
                raise ValueError(
                    f"{name} are {width} wide, but the detector was fitted at {widths[name]}: it serves one model "
                    "and one set of classes, so fit another"
                )
        return outputs.only(*self._score.reads, "labels").map(lambda part: part.detach().cpu())

    def _observe(self, predictor: Any, images: Tensor) -> Outputs:
        if "patch_cosines" not in self._score.reads:
            return _ready(predictor.outputs(images))
        model, head = getattr(predictor, "model", None), getattr(predictor, "class_embeddings", None)
        if not isinstance(model, nn.Module) or not isinstance(head, Tensor):
            raise ValueError(
                f"score {self.score!r} reads patches, which a {type(predictor).__name__} has not: use a Classifier, "
                "one model with one head"
            )
        visual = clip.unwrap(model).get_submodule("visual")
        with evaluating(model), patches.last_inputs(visual) as inputs:
            outputs = predictor.outputs(images)
            local = F.normalize(patches.local_features(visual, inputs[0]).to(outputs.features.dtype), dim=-1)
        return outputs.replace(patch_cosines=outputs_of(outputs.features, head, patch_features=local).patch_cosines)


def _ready(source: Any) -> Outputs:
    """Parts by name, whatever holds them; a Features calls them image_features."""
    if isinstance(source, Outputs):
        return source
    found: dict[str, Any] = {name: getattr(source, name, None) for name in Outputs.PARTS}
    if found["features"] is None:
        found["features"] = getattr(source, "image_features", None)
    if all(value is None for value in found.values()):
        raise TypeError(f"expected a predictor, or an object with some of {Outputs.PARTS}, got {type(source).__name__}")
    return Outputs(**found)
