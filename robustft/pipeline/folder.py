"""What a run leaves to be used: the chosen model as a folder that serves itself, and what it says of each test image.

model/  open_clip_config.json, open_clip_model.safetensors, classifier.safetensors     open_clip loads it
        (or a folder for each member of an ensemble, and ensemble.safetensors)
        detector.safetensors     the OOD score and its threshold
            conformal.safetensors    sets of classes at a coverage, if it was asked for
        pipeline.json            class names, temperature, what it was made from
        README.md                the model card: data, numbers, and what they mean
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from robustft import __version__
from robustft.calibration.conformal import ConformalSets
from robustft.clip.outputs import Outputs
from robustft.data.table import csv_text
from robustft.detection.detector import Detector
from robustft.evaluation.results import Evaluation, Suite
from robustft.files import new_folder, write_json, write_text
from robustft.pipeline.training import Materials
from robustft.predictors.base import Predictor

MODEL_FOLDER = "model"
PIPELINE_FILE = "pipeline.json"
PREDICTIONS_FILE = "predictions.csv"
SAMPLES = 12  # images of each set in the report
SAMPLE_SIZE = 96  # pixels of their sides


@dataclass(frozen=True)
class Model:
    """A predictor with its temperature inside, the detector that knows its threshold, and conformal sets, if any."""

    predictor: Predictor
    detector: Detector
    temperature: float
    conformal: ConformalSets | None = None

    def cooled(self, outputs: Outputs) -> Outputs:
        """Outputs of the predictor without its temperature, with it."""
        return outputs.replace(logits=outputs.logits / self.temperature)

    def settings(self) -> dict[str, Any]:
        """What was fitted on validation data, as JSON holds it."""
        sets = self.conformal
        kept = {} if sets is None else {"sets": sets.rule, "coverage": sets.coverage}
        return {
            **kept,
            "temperature": self.temperature,
            "score": self.detector.score,
            "tpr": self.detector.tpr,
            "threshold": self.detector.threshold_,
        }


def save_model(
    path: Path, model: Model, materials: Materials, evaluation: Evaluation, name: str, config: Mapping[str, Any]
) -> Path:
    """Writes the chosen model, whole or not at all; an earlier one is replaced."""
    bundle = materials.bundle
    about = {
        "robustft": __version__,
        "name": name,
        "classes": list(model.predictor.classes),
        "templates": list(materials.prompts["templates"]),
        **model.settings(),
    }
    with new_folder(path) as fresh:
        model.predictor.save(fresh, bundle.config, tokenizer=bundle.tokenizer)
        model.detector.save(fresh)
        if model.conformal is not None:
            model.conformal.save(fresh)
        write_json(fresh / PIPELINE_FILE, about, indent=2)
        write_text(fresh / "README.md", _card(path, about, evaluation, config))
    return path


def _card(path: Path, about: Mapping[str, Any], evaluation: Evaluation, config: Mapping[str, Any]) -> str:
    names = about["classes"]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    made = {key: config[key] for key in ("data", "model", "pretrained", "methods") if config.get(key)}
    made_from = "\n".join(f"* {key}: {_words(value)}" for key, value in made.items())
    return f"""---
library_name: open_clip
pipeline_tag: image-classification
tags: [CLIP, robust fine-tuning, calibration, out-of-distribution detection]
---
# {path.parent.name}

Tells {len(names)} classes apart: {shown}.

```python
import robustft

pipeline = robustft.load("path/to/this/folder")
print(pipeline("image.jpg"))  # label, probability, ood_score, accepted, top
```

## Made from

{made_from}
* chosen on validation data: {about["name"]}
* temperature {about["temperature"]:.3f}, fitted on validation data
* an image is accepted where its {evaluation.score_label} score reaches {about["threshold"]:.4f}, which keeps \
{about["tpr"]:.0%} of the validation images

## Numbers

{evaluation.markdown()}

The row "model" is what this folder holds, with its temperature. Trained and measured with robustft {about["robustft"]}.
"""


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple, Mapping)) else str(value)


def write_predictions(path: Path, sets: Suite[Any], suite: Suite[Outputs], model: Model) -> None:
    """predictions.csv: a row for each image of each set, of what `model` made of it; OOD sets have no label."""
    rows = []
    found = [("test", sets.id, suite.id)]
    found += [(f"shifts/{name}", sets.shifts[name], outputs) for name, outputs in suite.shifts.items()]
    found += [(f"ood/{name}", sets.ood[name], outputs) for name, outputs in suite.ood.items()]
    for name, data, outputs in found:
        scores = model.detector.scores(outputs)
        rows += [(name, *row) for row in _rows(data, outputs, scores, model, labelled=not name.startswith("ood/"))]
    header = ("set", "file", "label", "prediction", "probability", "ood_score", "accepted")
    write_text(path, csv_text(header, rows))


def _rows(
    data: Any, outputs: Outputs, scores: Tensor, model: Model, *, labelled: bool
) -> Iterator[tuple[str, str, str, float, float, bool]]:
    classes = outputs.classes or model.predictor.classes
    probabilities, places = outputs.probabilities.max(1)
    for index, file in enumerate(files_of(data, len(scores))):
        label = classes[int(outputs.labels[index])] if labelled else ""
        score = float(scores[index])
        place, probability = int(places[index]), float(probabilities[index])
        yield file, label, classes[place], probability, score, score >= model.detector.threshold_


def files_of(data: Any, count: int) -> Iterable[str]:
    """The files of a data set, or the numbers of its images where it is of none."""
    samples = getattr(data, "samples", None)
    return map(str, range(count)) if samples is None else (str(file) for file, _ in samples)


def samples_of(sets: Suite[Any]) -> dict[str, np.ndarray]:
    """The first images of each set as small pictures (n, H, W, 3) uint8, for the report; of sets that have images."""
    named = {"ID": sets.id, **sets.shifts, **sets.ood}
    return {name: pictures for name, data in named.items() if len(pictures := first_images(data))}


def first_images(data: Any, indices: Sequence[int] = range(SAMPLES)) -> np.ndarray:
    """Some images of a set (n, H, W, 3) uint8: as they are where it holds them, else read and fitted into a square."""
    if isinstance(images := getattr(data, "images", None), np.ndarray):
        return images[[index for index in indices if index < len(images)]]
    if not callable(getattr(data, "with_transform", None)):
        return np.zeros((0, 1, 1, 3), np.uint8)
    plain = data.with_transform(_thumbnail)
    items = [plain[index] for index in indices if index < len(plain)]
    return np.stack([item["image"] if isinstance(item, Mapping) else item[0] for item in items])


def _thumbnail(image: Any) -> np.ndarray:
    from PIL import ImageOps

    return np.asarray(ImageOps.pad(image, (SAMPLE_SIZE, SAMPLE_SIZE), color=(128, 128, 128)))
