"""A pipeline as one graph for other programs, which need neither robustft nor open_clip.

    images (N, 3, H, W) -> probabilities (N, K), ood_score (N,)      in float32; N is any number

    u = normalize(f(x))          f the image tower, in float32 or float16
    p = softmax(s u w^T + b)     the head, in float32 always; the run's temperature is in s
    ood_score                    the detector's score, of u, cosines and logits

torch-export    model.pt2 for torch.export.load
onnx            model.onnx for onnxruntime and others                                       extra `onnx`
aot-inductor    model.pt2 for torch._inductor.aoti_load_package, compiled for this          a C++ compiler
                machine's processor, to be loaded by the same torch

What no output depends on, such as the text tower under a head of fixed embeddings, is left out. The graph is held
against the pipeline on other numbers of images than it was traced with.

float16 has 11 bits. Unit features are good to about 5e-4 then, logits to 0.05 at CLIP's scale of 100. A softmax of
cosines with a thousand classes moves by less than float16 resolves: hence the head in float32.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import TorchDispatchMode

from robustft.detection.by_name import SCORES
from robustft.machine import Bits, Graph, compiler_found
from robustft.predictors.base import ModelPredictor, Predictor

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from robustft.pipeline.serving import Pipeline

TOLERANCES: dict[Bits, float] = {"fp32": 1e-4, "fp16": 2e-2}
"""Of probabilities, and of scores by the size of the largest: of those of logits, if it is above 1."""
ONNX_BYTES = 2**31 - 2**20
"""Of weights, beyond which they lie in a file beside model.onnx: protobuf has no larger messages."""
TRACED = 2  # images: torch takes a batch of one for a constant
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


class Decisions(nn.Module):
    """images (N, 3, H, W) -> probabilities (N, K), scores (N,)."""

    def __init__(self, predictor: Predictor, score: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.predictor = predictor
        self.score = score

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.predictor.outputs(images)
        return outputs.logits.softmax(-1), self.score(outputs)


def write_graph(pipeline: Pipeline, folder: Path, form: Graph, bits: Bits, images: Tensor) -> float:
    """Writes a pipeline's graph into a folder, and returns by how much it differs from the pipeline, maybe NaN, to be
    held against `TOLERANCES`.

    images: (N, 3, H, W) on the CPU, real ones, on which it is traced and compared. Memory: a copy of the model, and
    what torch keeps while it traces. ImportError and RuntimeError name what has to be installed; ValueError for a
    model or score that cannot be written, with the operation that is in the way.
    """
    write = {"torch-export": _torch_export, "onnx": _onnx, "aot-inductor": _aot_inductor}[form]
    _check_installed(form)
    module = _decisions(pipeline, bits, images[:1])
    run = _named(form, lambda: write(_traced(module, _some(images, TRACED)), folder))
    with torch.inference_mode():
        apart = [_differences(pipeline, run, _some(images, count)) for count in (1, max(TRACED + 1, len(images)))]
    return float(torch.cat(apart).max())


def _check_installed(form: Graph) -> None:
    if form == "onnx":
        try:
            for library in ("onnx", "onnxruntime", "onnxscript"):  # torch.onnx needs the last, and says so late
                importlib.import_module(library)
        except ImportError as error:
            raise ImportError(
                f"onnx needs {error.name}, which is not installed: pip install 'robustft[onnx]'"
            ) from error
    if form == "aot-inductor" and not compiler_found():
        raise RuntimeError("aot-inductor needs a C++ compiler: install one (Debian: apt install g++)")


def _named(form: Graph, make: Callable[[], Run]) -> Run:
    """What `make` makes; ValueError that names the form, and the first cause, where the libraries cannot."""
    try:
        return make()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever torch, onnxscript and onnxruntime raise for an operation that they lack
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"{form} cannot have this model: {type(cause).__name__}: {str(cause):.400}") from error


def _some(images: Tensor, count: int) -> Tensor:
    """So many of the images, the first ones again where there are fewer."""
    return images[torch.arange(count) % len(images)]


def _decisions(pipeline: Pipeline, bits: Bits, image: Tensor) -> Decisions:
    """The graph's module, of weights of its own, those alone that an image (1, 3, H, W) needs."""
    name, options = pipeline.detector.score, pipeline.detector.options
    if not SCORES[name].of_outputs:
        raise ValueError(f"score {name!r} learns or reads patches and cannot be exported; train with another score")
    module = Decisions(copy.deepcopy(pipeline.predictor), SCORES[name](**options)).eval().requires_grad_(False)
    with _Read() as read:
        module(image)
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({key: None for key, value in held.items() if id(value) not in read.ids})
    if bits == "fp16":
        for part in module.modules():
            if isinstance(part, ModelPredictor):
                part.model.half()
    return module


class _Read(TorchDispatchMode):
    """Which tensors operations get, by their ids."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ids |= {id(leaf) for leaf in trees.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def _traced(module: Decisions, images: Tensor) -> ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},))
    own = {str(node.target) for node in program.graph.nodes if getattr(node.target, "namespace", "") == "robustft"}
    if own:
        raise ValueError(f"{', '.join(sorted(own))} is an operation of robustft's own, which other programs lack")
    return program


def _torch_export(program: ExportedProgram, folder: Path) -> Run:
    path = folder / "model.pt2"
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _onnx(program: ExportedProgram, folder: Path) -> Run:
    onnxruntime = importlib.import_module("onnxruntime")
    path = folder / "model.onnx"
    size = sum(value.nbytes for value in program.state_dict.values())
    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities", "ood_score"],
        external_data=size > ONNX_BYTES,
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    # At its last level onnxruntime 1.32 dies on a CPU of convolutions in float16 (its NchwcTransformer).
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        probabilities, scores = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(probabilities), torch.from_numpy(scores)

    return run


def _aot_inductor(program: ExportedProgram, folder: Path) -> Run:
    inductor = importlib.import_module("torch._inductor")
    path = inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    run: Run = inductor.aoti_load_package(path)
    return run


def _differences(pipeline: Pipeline, run: Run, images: Tensor) -> Tensor:
    """Those of probabilities and of scores, these by the size of the largest, as a vector."""
    outputs = pipeline.outputs(images)
    expected = pipeline.detector.scores(outputs).double()
    probabilities, scores = run(images)
    least = 1.0 if "logits" in pipeline.detector.reads else 1e-9
    apart = (scores.double() - expected) / expected.abs().amax().clamp_min(least)
    return torch.cat([(outputs.probabilities - probabilities.double()).flatten(), apart]).abs()
