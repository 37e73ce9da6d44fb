"""A detector: a score, what it has learnt of ID data, and the threshold below which an image is out-of-distribution.

    flag x  if  s(x) < t,      t the highest threshold that keeps a share `tpr` of held-out ID images

Which score, is a name in `by_name.SCORES`; the mathematics of all of them is in `robustft.detection.scores`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustft import clip
from robustft.clip import patches
from robustft.clip.outputs import evaluating
from robustft.data.sources import image_batches
from robustft.detection.by_name import SCORES, Evidence
from robustft.detection.metrics import threshold
from robustft.files import DETECTOR_FILE, load_fitted, place, save_fitted


class Detector:
    """Flags images that are out-of-distribution, at a threshold that keeps a share `tpr` of ID images.

        detector = Detector("mcm").fit(classifier, validation)      # held-out ID images, a data set
        detector.detect(classifier, images)                         # (N,) bool, True: out-of-distribution
        detector.save("exported")                                   # beside a classifier; Detector.load gives it back

    Where a predictor is asked for, one can give what has been computed instead of (predictor, images): the Outputs of a
    predictor, evaluate's Predictions, Features, or an `Evidence`; whatever has the fields that the score reads.

    Args:
        score: a name in `SCORES`: "mcm", "max_cosine", "variance" of cosines; "msp", "energy", "entropy" of logits;
            "l_mcm", "gl_mcm" of patches as well; "neg_label" against `negative_embeddings`; "mahalanobis" and "knn",
            which learn ID features.
        tpr: share of the ID images that are kept.
        options: of the score: temperature, local_weight, groups, k, shrinkage ...

    Learnt by `fit`: `threshold_`. It belongs to one model and one set of classes: MCM is not comparable across K.
    ValueError for an unknown score, fields of another width than in `fit`, scores that are NaN, and a
    softmax over one class.
    """

    def __init__(self, score: str = "mcm", *, tpr: float = 0.95, **options: Any) -> None:
        if score not in SCORES:
            raise ValueError(f"score must be one of {sorted(SCORES)}, got {score!r}")
        if not 0.0 < tpr <= 1.0:
            raise ValueError(f"tpr must lie in (0, 1], got {tpr!r}")
        self.score = score
        self.tpr = tpr
        self._score = SCORES[score](**options)
        self._widths: dict[str, int] = {}

    def fit(self, source: Any, data: Any = None, *, validation: Any = None, batch_size: int = 256) -> Detector:
        """Learns what the score learns from ID data, then the threshold from held-out ID data. Returns self.

        source, data: a predictor and images, or what was computed already. validation: the same kind, for the
        threshold; it may be left out for scores that learn nothing, while those that learn find the images they have
        learnt from too familiar. Memory: all features for scores that learn, else the scores.
        """
        if self._score.learns and validation is None:
            raise ValueError(
                f"score {self.score!r} learns from the training images, so these cannot set its threshold: pass "
                "validation, ID images that were held out"
            )
        self._widths = {}
        self.__dict__.pop("threshold_", None)  # of an earlier fit, should this one fail
        if self._score.learns:
            parts = zip(*self._evidence(source, data, batch_size, fitting=True), strict=True)
            self._score.fit(Evidence(*(None if part[0] is None else torch.cat(part) for part in parts)))
        if validation is not None:
            source, data = (validation, None) if data is None else (source, validation)
        scores = self._scores(source, data, batch_size, fitting=True)
        classes = [width for name, width in self._widths.items() if name != "features"]
        if 1 in classes and bool((scores == scores[0]).all()):
            raise ValueError(
                f"score {self.score!r} is {float(scores[0]):g} for every image: over one class every softmax is the "
                "same, and no threshold tells images apart. Use a score without a softmax over the classes "
                "(max_cosine, energy, neg_label, mahalanobis, knn), or add classes"
            )
        self.threshold_ = threshold(scores, self.tpr)
        return self

    def scores(self, source: Any, data: Any = None, *, batch_size: int = 256) -> Tensor:
        """Scores (N,) on the CPU, higher = more in-distribution; no gradient.

        data: for a predictor, images (N, C, H, W), or any of what `robustft.data.sources` names; labels are not looked
        at.
        """
        if self._score.learns and not hasattr(self, "threshold_"):
            raise ValueError(f"score {self.score!r} has not learnt anything yet: call fit(training, validation=...)")
        return self._scores(source, data, batch_size)

    def detect(self, source: Any, data: Any = None, *, batch_size: int = 256) -> Tensor:
        """(N,) bool, True for images that are out-of-distribution: score below `threshold_`."""
        self._check_fitted()
        return self.scores(source, data, batch_size=batch_size).double() < self.threshold_

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
    def load(cls, path: str | Path) -> Detector:
        """The detector that `save` wrote; its scores are the same bit for bit. ValueError for a damaged file."""
        settings, tensors = load_fitted(place(path, DETECTOR_FILE), "Detector")
        detector = cls(settings["score"], tpr=settings["tpr"], **settings["options"])
        detector._score.restore(tensors)
        detector._widths = settings["widths"]
        detector.threshold_ = settings["threshold"]
        return detector

    def _check_fitted(self) -> None:
        if not hasattr(self, "threshold_"):
            raise ValueError(f"Detector({self.score!r}) has no threshold yet: call fit with ID data")

    def _scores(self, source: Any, data: Any, batch_size: int, fitting: bool = False) -> Tensor:
        scores = torch.cat([self._score(part) for part in self._evidence(source, data, batch_size, fitting)])
        bad = int(scores.isnan().sum())
        if bad:
            raise ValueError(f"{bad} of {len(scores)} scores are NaN: check the features and logits given")
        return scores

    def _evidence(self, source: Any, data: Any, batch_size: int, fitting: bool = False) -> Iterator[Evidence]:
        """What the score reads, and labels, on the CPU: batch by batch, or all at once where it is ready."""
        widths = self._widths if fitting else dict(self._widths)
        if not callable(getattr(source, "outputs", None)):
            if data is not None:
                raise TypeError(f"data goes with a predictor, which has outputs(images); got a {type(source).__name__}")
            yield self._read(_ready(source), source, widths)
            return
        if data is None:
            raise ValueError(f"data is missing: a {type(source).__name__} scores images, so pass it and them")
        device = next((p.device for p in source.parameters()), None) if isinstance(source, nn.Module) else None
        for images, labels in image_batches(data, source, batch_size):
            with torch.no_grad():
                observed = self._observe(source, images.to(device=device))._replace(labels=labels)
            yield self._read(observed, source, widths)

    def _read(self, evidence: Evidence, source: Any, widths: dict[str, int]) -> Evidence:
        """The fields that the score reads, checked, and the labels."""
        values: dict[str, Tensor] = {}
        for name in self._score.reads:
            value = getattr(evidence, name)
            if value is None:
                raise ValueError(
                    f"score {self.score!r} reads {name}, which this {type(source).__name__} lacks: pass a classifier "
                    "and images, or what scoring.evidence(features, class_embeddings, ...) gives"
                )
            width = widths.setdefault(name, value.shape[-1])
            if width != value.shape[-1]:
                raise ValueError(
                    f"{name} are {value.shape[-1]} wide, but the detector was fitted at {width}: it serves one model "
                    "and one set of classes, so fit another"
                )
            values[name] = value.detach().cpu()
        return Evidence(**values, labels=evidence.labels)

    def _observe(self, predictor: Any, images: Tensor) -> Evidence:
        if "patch_cosines" not in self._score.reads:
            outputs = predictor.outputs(images)
            return Evidence(outputs.features, outputs.cosines, outputs.logits)
        model, head = getattr(predictor, "model", None), getattr(predictor, "class_embeddings", None)
        if not isinstance(model, nn.Module) or not isinstance(head, Tensor):
            raise ValueError(
                f"score {self.score!r} reads patches, which a {type(predictor).__name__} has not: use a Classifier, "
                "one model with one head"
            )
        visual = clip.unwrap(model).visual
        with evaluating(model), patches.last_inputs(visual) as inputs:
            outputs = predictor.outputs(images)
            local = F.normalize(patches.local_features(visual, inputs[0]).to(outputs.features.dtype), dim=-1)
        patch_cosines = local @ F.normalize(head.to(local.dtype), dim=-1).T
        return Evidence(outputs.features, outputs.cosines, outputs.logits, patch_cosines)


def _ready(source: Any) -> Evidence:
    """Fields by name, whatever holds them; a Features calls them image_features."""
    found = {name: getattr(source, name, None) for name in Evidence._fields}
    if found["features"] is None:
        found["features"] = getattr(source, "image_features", None)
    if all(value is None for value in found.values()):
        raise TypeError(
            f"expected a predictor, or an object with some of {Evidence._fields}, got {type(source).__name__}"
        )
    return Evidence(**found)
