"""`export`: the model of a run for other programs, held against ours on real images before it is said to be done.

open_clip       a folder that open_clip loads, with the head in classifier.safetensors: one model, no ensemble
torch-export    model.pt2 for torch.export.load: images -> probabilities, ood_score
onnx            model.onnx for onnxruntime and others: the same                            extra `onnx`
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from robustft.pipeline import flags

if TYPE_CHECKING:
    from torch import Tensor

    from robustft.pipeline.serving import Pipeline

Form = Literal["open_clip", "torch-export", "onnx"]
CHECKED = 8  # images
TOLERANCE = 1e-4  # of probabilities and scores


@flags.checked
def export_run(
    run: str | os.PathLike[str],
    *,
    to: Form,
    output: str | os.PathLike[str],
    log: Callable[[str], None] = print,
) -> Path:
    """Writes the model of a run in another form and returns its path.

    Args:
        to: open_clip, torch-export or onnx.
        output: folder to write.
        log: receives one line of text at a time.

    The images are those of the run's predictions.csv, as far as they still lie there; else noise. ValueError for an
    ensemble as one open_clip model, and where the export computes something else than the run, in which case nothing is
    left; ImportError naming the extra of a form that is not installed.
    """
    from robustft.files import new_folder
    from robustft.pipeline.serving import load

    flags.check_word("to", to, Form)
    pipeline = load(run)
    images, told = _images(Path(run), pipeline)
    folder = Path(output)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; choose another folder")
    write = {"open_clip": _open_clip, "torch-export": _torch_export, "onnx": _onnx}[to]
    with new_folder(folder) as fresh:
        difference = write(pipeline, fresh, images, Path(run))
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the export differs from the run by {difference:.2g} on {told}, expected at most {TOLERANCE:g}: "
                "nothing was written"
            )
    log(f"{folder}: {to}, within {difference:.2g} of the run on {told}")
    return folder


def _images(run: Path, pipeline: Pipeline) -> tuple[Tensor, str]:
    """Transformed images to check with, and what they are."""
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
        return images, f"{len(chosen)} images of the run"
    from PIL import Image

    size = pipeline.transform(Image.new("RGB", (512, 512))).shape
    return torch.randn(CHECKED, *size, generator=torch.Generator().manual_seed(0)), "noise, for want of the run's files"


def _decisions(pipeline: Pipeline) -> Any:
    """images (N, C, H, W) -> probabilities (N, K), OOD scores (N,) as one module; ValueError where there is none."""
    import torch

    from robustft.detection.by_name import SCORES

    name = pipeline.detector.score
    if not SCORES[name].of_outputs:
        raise ValueError(f"score {name!r} learns or reads patches and cannot be exported; train with another score")
    score, options = SCORES[name], pipeline.detector.options

    class Decisions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = pipeline.predictor
            self.score = score(**options)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            outputs = self.predictor.outputs(images)
            return outputs.logits.softmax(-1), self.score(outputs)

    return Decisions().eval()


def _differences(pipeline: Pipeline, images: Tensor, probabilities: Tensor, scores: Tensor) -> float:
    outputs = pipeline.outputs(images)
    shares = (outputs.probabilities - probabilities.double()).abs().max()
    return max(float(shares), float((pipeline.detector.scores(outputs).double() - scores.double()).abs().max()))


def _open_clip(pipeline: Pipeline, folder: Path, images: Tensor, run: Path) -> float:
    import shutil

    import torch

    from robustft import clip
    from robustft.pipeline.serving import model_folder
    from robustft.predictors.base import ModelPredictor

    if not isinstance(pipeline.predictor, ModelPredictor):
        raise ValueError(
            f"the run's model is a {type(pipeline.predictor).__name__} of several models, which is no single open_clip "
            "model: export it to torch-export or onnx, or train with the ensemble wise or none"
        )
    for file in model_folder(run).iterdir():
        shutil.copy2(file, folder / file.name)
    theirs, _, transform = clip.import_open_clip().create_model_and_transforms(f"local-dir:{folder}")
    if repr(transform) != repr(pipeline.transform):
        raise ValueError(f"open_clip transforms images by {transform}, the run by {pipeline.transform}")
    with torch.inference_mode():
        ours = clip.encode_images(pipeline.predictor.model, images)
        return float((clip.encode_images(theirs.eval(), images) - ours).abs().max())


def _torch_export(pipeline: Pipeline, folder: Path, images: Tensor, run: Path) -> float:
    import torch

    module = _decisions(pipeline)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(module, (images[:2],), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "model.pt2")
    loaded = torch.export.load(folder / "model.pt2").module()
    with torch.inference_mode():
        return _differences(pipeline, images, *loaded(images))


def _onnx(pipeline: Pipeline, folder: Path, images: Tensor, run: Path) -> float:
    from importlib import import_module

    import torch

    try:
        onnxruntime = import_module("onnxruntime")
        import_module("onnxscript")  # torch.onnx needs it, and says so late
    except ImportError as error:
        raise ImportError(f"onnx needs {error.name}, which is not installed: pip install 'robustft[onnx]'") from error
    path = folder / "model.onnx"
    torch.onnx.export(
        _decisions(pipeline),
        (images[:2],),
        path,
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities", "ood_score"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    probabilities, scores = session.run(None, {"images": images.numpy()})
    return _differences(pipeline, images, torch.from_numpy(probabilities), torch.from_numpy(scores))
