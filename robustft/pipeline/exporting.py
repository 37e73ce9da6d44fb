"""`export`: the model of a run for other programs, held against ours on real images before it is said to be done.

open_clip       a folder that open_clip loads, with the head in classifier.safetensors: one model, no ensemble
transformers    a folder that transformers' AutoModel (CLIP, SigLIP) loads, with the head      extra `transformers`
torch-export    images -> probabilities, ood_score: `robustft.pipeline.deploying`, any ensemble
onnx            the same                                                                      extra `onnx`
aot-inductor    the same, compiled

Beside the last three lies model.json: what the graph was made of, and is to be used with.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from robustft.machine import Bits, Graph
from robustft.pipeline import flags

if TYPE_CHECKING:
    from torch import Tensor

    from robustft.pipeline.serving import Pipeline

Form = Literal["open_clip", "transformers", Graph]
CHECKED = 8  # images
ABOUT_FILE = "model.json"
TOLERANCE = 1e-4  # of features and probabilities
PIXEL_LEVELS = 2  # of 255, by which another library's resizing may differ


class Checks(NamedTuple):
    """What an export is held against the run on: transformed images (N, C, H, W), what they are, and their files."""

    images: Tensor
    told: str
    files: list[str]


@flags.checked
def export_run(
    run: str | os.PathLike[str],
    *,
    to: Form,
    output: str | os.PathLike[str],
    precision: Bits = "fp32",
    log: Callable[[str], None] = print,
) -> Path:
    """Writes the model of a run in another form and returns its path.

    Args:
        to: open_clip, transformers, torch-export, onnx or aot-inductor.
        output: folder to write.
        precision: of the towers in the last three; fp16 differs by up to 0.02 from the run, fp32 by 0.0001.
        log: receives one line of text at a time.

    The images are those of the run's predictions.csv, as far as they still lie there; else noise. ValueError for an
    ensemble as one open_clip model, for an operation that a form does not have, and where the export computes something
    else than the run, in which case nothing is left; ImportError naming the extra of a form that is not installed.
    """
    from robustft.files import new_folder
    from robustft.pipeline.serving import load

    flags.check_word("to", to, Form)
    flags.check_word("precision", precision, Bits)
    if precision != "fp32" and to in ("open_clip", "transformers"):
        raise ValueError(
            f"precision is {precision!r}, but {to} keeps the weights as they are, for others to load in any precision"
        )
    pipeline = load(run)
    checks = _checks(Path(run), pipeline)
    _merge_adapters(pipeline.predictor)
    folder = Path(output)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; choose another folder")
    with new_folder(folder) as fresh:
        tolerance = TOLERANCE
        match to:
            case "open_clip":
                difference = _open_clip(pipeline, fresh, checks, Path(run))
            case "transformers":
                difference = _transformers(pipeline, fresh, checks, Path(run))
            case graph:
                difference, tolerance = _graph(pipeline, fresh, checks, Path(run), graph, precision)
        if not difference <= tolerance:
            raise ValueError(
                f"the export differs from the run by {difference:.2g} on {checks.told}, expected at most "
                f"{tolerance:g}: nothing was written"
            )
    log(f"{folder}: {to}, within {difference:.2g} of the run on {checks.told}")
    return folder


def _merge_adapters(predictor: Any) -> None:
    """Gives the predictor, and all that it is made of, models without adapters."""
    from robustft import clip
    from robustft.predictors.base import ModelPredictor

    found: dict[int, Any] = {}
    for part in list(predictor.modules()):
        if isinstance(part, ModelPredictor):
            key = id(part.model)
            found[key] = found[key] if key in found else clip.merged(part.model)
            part.model = found[key]


def _checks(run: Path, pipeline: Pipeline) -> Checks:
    import torch

    from robustft.data.images import read_image
    from robustft.pipeline.folder import PREDICTIONS_FILE

    files: list[str] = []
    table = run / PREDICTIONS_FILE
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as file:
            files = [row["file"] for row in csv.DictReader(file) if os.path.isfile(row["file"])]
    if files:
        chosen = files[:: max(1, len(files) // CHECKED)][:CHECKED]
        images = torch.stack([pipeline.transform(read_image(name)) for name in chosen])
        return Checks(images, f"{len(chosen)} images of the run", chosen)
    from PIL import Image

    size = pipeline.transform(Image.new("RGB", (512, 512))).shape
    noise = torch.randn(CHECKED, *size, generator=torch.Generator().manual_seed(0))
    return Checks(noise, "noise, for want of the run's files", [])


def _graph(
    pipeline: Pipeline, folder: Path, checks: Checks, run: Path, form: Graph, precision: Bits
) -> tuple[float, float]:
    """Writes a graph with what is needed beside it; by how much it differs, and may."""
    from robustft import clip
    from robustft.files import read_json, write_json
    from robustft.pipeline.deploying import TOLERANCES, write_graph
    from robustft.pipeline.serving import own_model

    difference = write_graph(pipeline, folder, form, precision, checks.images)
    config = read_json(own_model(run) / clip.CONFIG_FILE, "an object with 'model_cfg'")
    about = {
        "form": form,
        "precision": precision,
        "images": [None, *checks.images.shape[1:]],
        "preprocess": config["preprocess_cfg"],
        "classes": list(pipeline.classes),
        "ood_score": pipeline.detector.score,
        "threshold": pipeline.detector.threshold_,
    }
    write_json(folder / ABOUT_FILE, about, indent=2)
    return difference, TOLERANCES[precision]


def _open_clip(pipeline: Pipeline, folder: Path, checks: Checks, run: Path) -> float:
    import shutil

    import torch

    from robustft import clip
    from robustft.clip.adapter_files import FILES as ADAPTER_FILES
    from robustft.clip.adapter_files import holds_adapters
    from robustft.files import read_json
    from robustft.pipeline.serving import model_folder
    from robustft.predictors.base import ModelPredictor

    if not isinstance(pipeline.predictor, ModelPredictor):
        raise ValueError(
            f"the run's model is a {type(pipeline.predictor).__name__} of several models, which is no single open_clip "
            "model: export it to torch-export, onnx or aot-inductor, or train with the ensemble wise or none"
        )
    source = model_folder(run)
    adapted = holds_adapters(source)
    if adapted:
        pipeline.predictor.save(folder, read_json(source / clip.CONFIG_FILE, "an object with 'model_cfg'"))
    for file in source.iterdir():
        if not adapted or file.name not in ADAPTER_FILES | {clip.WEIGHTS_FILE, clip.CLASSIFIER_FILE}:
            shutil.copy2(file, folder / file.name)
    theirs, _, transform = clip.import_open_clip().create_model_and_transforms(f"local-dir:{folder}")
    if repr(transform) != repr(pipeline.transform):
        raise ValueError(f"open_clip transforms images by {transform}, the run by {pipeline.transform}")
    with torch.inference_mode():
        ours = clip.encode_images(pipeline.predictor.model, checks.images)
        return float((clip.encode_images(theirs.eval(), checks.images) - ours).abs().max())


def _transformers(pipeline: Pipeline, folder: Path, checks: Checks, run: Path) -> float:
    import torch

    from robustft import clip
    from robustft.clip import prompts
    from robustft.clip.as_transformers import differences, write_transformers
    from robustft.files import read_json, write_tensors, write_text
    from robustft.pipeline.serving import about, model_folder
    from robustft.predictors.base import Classifier

    predictor = pipeline.predictor
    if not isinstance(predictor, Classifier):
        raise ValueError(
            f"the run's model is a {type(predictor).__name__}, not one model with one head, as transformers could hold "
            "it: export it to torch-export, onnx or aot-inductor"
        )
    source = model_folder(run)
    config = read_json(source / clip.CONFIG_FILE, "an object with 'model_cfg'")
    tokenizer = clip.import_open_clip().get_tokenizer(f"local-dir:{source}")
    write_transformers(predictor.model, folder, config, tokenizer, pipeline.classes)
    head = {"class_embeddings": predictor.class_embeddings, "logit_scale": predictor.logit_scale}
    head |= {} if predictor.bias is None else {"bias": predictor.bias}
    write_tensors(folder / clip.CLASSIFIER_FILE, head)
    whole = _check_processor(pipeline, folder, checks, config["preprocess_cfg"])
    write_text(folder / "README.md", _card(predictor.bias is not None, whole))
    texts = prompts.captions(pipeline.classes[:CHECKED], about(run)["templates"][:1])
    captions = [caption for of_class in texts for caption in of_class]
    difference, features = differences(predictor.model, folder, checks.images, captions, tokenizer)
    with torch.inference_mode():
        ours = pipeline.outputs(checks.images).probabilities
        theirs = predictor.head_outputs(features).probabilities
    return max(difference, float((ours - theirs).abs().max()))


def _check_processor(pipeline: Pipeline, folder: Path, checks: Checks, transform: Mapping[str, Any]) -> float | None:
    """By how much probabilities of the run's files differ if transformers prepares the images, None without files.

    transformers halves an odd margin downwards where torchvision rounds, and so may crop one pixel aside. Hence
    ValueError only where images without an odd margin come out otherwise.
    """
    import torch

    from robustft.clip.as_transformers import processed
    from robustft.data.images import read_image

    if not checks.files:
        return None
    files = [read_image(name) for name in checks.files]
    side = checks.images.shape[-1]
    even = [image.resize((2 * side, 2 * (side + 2 * (side // 4)))) for image in files]
    ours = torch.stack([pipeline.transform(image) for image in even])
    if (apart := float((processed(folder, even) - ours).abs().max())) > PIXEL_LEVELS / 255 / min(transform["std"]):
        raise ValueError(f"transformers' processor makes other images than the run's transform, by {apart:.2g}")
    shares = [pipeline.outputs(images).probabilities for images in (checks.images, processed(folder, files))]
    return float((shares[0] - shares[1]).abs().max())


def _card(bias: bool, whole: float | None) -> str:
    told = "" if whole is None else f", within {whole:.2g} of the run's probabilities on images of its test set"
    return f"""---
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
A CLIP model fine-tuned and exported by robustft, and its head.

```python
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

folder = "path/to/this/folder"
model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
head = load_file(f"{{folder}}/classifier.safetensors")

inputs = processor(images=Image.open("image.jpg"), return_tensors="pt")
features = torch.nn.functional.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)
logits = head["logit_scale"] * features @ head["class_embeddings"].T{' + head["bias"]' if bias else ""}
print(model.config.id2label[int(logits.argmax())], float(logits.softmax(-1).max()))
```

The head's logits are calibrated: the temperature of the run is in `logit_scale`. Captions of the classes, encoded by
the text tower, give a zero-shot head, which the training may have left behind. The processor resizes images as the
run does, and crops some of them one pixel aside{told}.
"""
