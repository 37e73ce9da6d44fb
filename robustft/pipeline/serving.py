"""A run's model at work: images in, decisions out.

pipeline = robustft.load("runs/photos")
pipeline("a.jpg")                            a Prediction: label, probability, ood_score, accepted, top
pipeline(["a.jpg", "b.jpg"])                 a list of them
for file, found in pipeline.stream(files):   as many as there are, read by worker processes
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustft import clip
from robustft.calibration.conformal import ConformalSets
from robustft.clip.outputs import Outputs
from robustft.data.images import as_rgb, read_image
from robustft.data.sources import READ_TOGETHER, reading_workers
from robustft.detection.detector import Detector
from robustft.files import CONFORMAL_FILE, DETECTOR_FILE, read_json
from robustft.ops.kinds import checked, described, held
from robustft.pipeline.folder import MODEL_FOLDER, PIPELINE_FILE
from robustft.predictors.base import Predictor
from robustft.predictors.saving import ENSEMBLE_FILE, load_predictor


class Prediction(NamedTuple):
    """What a pipeline says about an image.

    label, probability: the likeliest class and its calibrated probability. ood_score: the detector's score, higher =
    more in-distribution. accepted: whether it reaches the threshold; an image that is not accepted should be looked
    at by somebody. top: (label, probability) of the likeliest classes. classes: the conformal set, which holds the
    true class as often as the run was asked for; () where the run has none.
    """

    label: str
    probability: float
    ood_score: float
    accepted: bool
    top: tuple[tuple[str, float], ...]
    classes: tuple[str, ...] = ()


class Unreadable(NamedTuple):
    """A file that is no image, and why."""

    error: str


class Pipeline:
    """A predictor, its transform and its detector; call it with images.

    Safe to be called from several threads, which take turns at the model.
    """

    @checked
    def __init__(
        self,
        predictor: Predictor,
        detector: Detector,
        transform: Callable[[Any], Tensor],
        *,
        conformal: ConformalSets | None = None,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.predictor = predictor.eval()
        self.detector = detector
        self.transform = transform
        self.conformal = conformal
        self.batch_size = batch_size
        self._turn = threading.Lock()

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels there are."""
        return self.predictor.classes

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in self.predictor.parameters()), torch.device("cpu"))

    @checked
    def __call__(self, images: Any, *, top: int = 5) -> Any:
        """A `Prediction` for an image, a list of them for several.

        images: a file, a PIL image, an array (H, W, 3) or (H, W) uint8, or a list of these; or a floating point tensor
        that the transform has made already, (C, H, W) or (N, C, H, W). top: how many classes to name. ValueError,
        naming the file, for one that is damaged; TypeError for what is no image.
        """
        _check_top(top)
        if isinstance(images, Tensor) and images.is_floating_point():
            several = images.ndim == 4
            if images.ndim not in (3, 4):
                raise ValueError(f"images must be a tensor (C, H, W) or (N, C, H, W), got {tuple(images.shape)}")
            parts = images.split(self.batch_size) if several else (images[None],)
            found = [prediction for part in parts for prediction in self._predict(part, top)]
            return found if several else found[0]
        if isinstance(images, (str, os.PathLike)) or not isinstance(images, Sequence):
            return self._predict(self._tensor(images)[None], top)[0]
        found = []
        for start in range(0, len(images), self.batch_size):
            chunk = [self._tensor(image) for image in images[start : start + self.batch_size]]
            if len(shapes := {tuple(image.shape) for image in chunk}) > 1:
                raise ValueError(f"images become tensors of several shapes, {sorted(shapes)}; expected one")
            found += self._predict(torch.stack(chunk), top)
        return found

    @checked
    def stream(
        self, files: Iterable[str | os.PathLike[str]], *, top: int = 5, workers: int | None = None
    ) -> Iterator[tuple[str, Prediction | Unreadable]]:
        """Each file with its `Prediction`, or with why it could not be read, in order; memory: a few batches.

        workers: processes that read, as in `robustft.data.sources.reading_workers`.
        """
        _check_top(top)
        names = list(files)
        if wrong := [file for file in names if not isinstance(file, (str, os.PathLike))]:
            raise TypeError(f"files holds {described(wrong[0])}; expected paths")
        return self._stream([os.fspath(file) for file in names], top, workers)

    def _stream(
        self, names: Sequence[str], top: int, workers: int | None
    ) -> Iterator[tuple[str, Prediction | Unreadable]]:
        count = reading_workers(_Files([], self.transform), len(names), workers)
        size = self.batch_size if count == 0 else min(self.batch_size, READ_TOGETHER)
        chunks = [names[start : start + size] for start in range(0, len(names), size)]
        loader = torch.utils.data.DataLoader(
            _Files(chunks, self.transform), batch_size=None, num_workers=count, generator=torch.Generator()
        )
        for chunk, read in zip(chunks, loader, strict=True):
            good = [image for image in read if isinstance(image, Tensor)]
            found = iter(self._predict(torch.stack(good), top) if good else [])
            for name, image in zip(chunk, read, strict=True):
                yield name, next(found) if isinstance(image, Tensor) else Unreadable(image)

    @checked
    def outputs(self, images: Tensor) -> Outputs:
        """`Outputs` of transformed images (N, C, H, W), on the CPU; logits are calibrated."""
        held("images", images)
        with self._turn, torch.inference_mode():
            found = self.predictor.outputs(images.to(self.device))
        return found.map(lambda part: part.float().cpu())

    def _predict(self, images: Tensor, top: int) -> list[Prediction]:
        if "patch_cosines" in self.detector.reads:
            with self._turn:
                scores = self.detector.scores(self.predictor, images)
            outputs = self.outputs(images)
        else:
            outputs = self.outputs(images)
            scores = self.detector.scores(outputs)
        probabilities, places = outputs.probabilities.topk(min(top, len(self.classes)), dim=1)
        held = [()] * len(images) if self.conformal is None else map(self._names, self.conformal.sets(outputs))
        rows = zip(probabilities.tolist(), places.tolist(), scores.tolist(), held, strict=True)
        return [
            Prediction(
                self.classes[where[0]],
                shares[0],
                score,
                score >= self.detector.threshold_,
                tuple((self.classes[place], share) for place, share in zip(where, shares, strict=True)),
                classes,
            )
            for shares, where, score, classes in rows
        ]

    def _names(self, members: Tensor) -> tuple[str, ...]:
        return tuple(self.classes[place] for place in members.nonzero()[:, 0].tolist())

    def _tensor(self, image: Any) -> Tensor:
        from PIL import Image

        if isinstance(image, (str, os.PathLike)):
            if not os.fspath(image):
                raise ValueError("images: an empty string is no path of an image")
            return self.transform(read_image(Path(image)))
        if isinstance(image, Tensor):
            if image.is_floating_point():
                return image
            image = image.permute(1, 2, 0).numpy() if image.ndim == 3 and image.shape[0] in (1, 3) else image.numpy()
        if isinstance(image, np.ndarray):
            channels = image.shape[2] if image.ndim == 3 else 1
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
                raise TypeError(f"images: arrays must be uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}")
            image = Image.fromarray(image.squeeze(2) if image.ndim == 3 and image.shape[2] == 1 else image)
        if not isinstance(image, Image.Image):
            raise TypeError(f"images: expected a file, an image, an array or a tensor, got {described(image)}")
        return self.transform(as_rgb(image, "images"))


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")


class _Files(torch.utils.data.Dataset[Any]):
    """Chunks of files as lists of tensors; of a file that cannot be read, why."""

    workers = None

    def __init__(self, chunks: Sequence[Sequence[str]], transform: Callable[[Any], Tensor]) -> None:
        self.chunks, self.transform = chunks, transform

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> list[Tensor | str]:
        return [self._read(name) for name in self.chunks[index]]

    def _read(self, name: str) -> Tensor | str:
        try:
            return self.transform(read_image(name))
        except (OSError, ValueError) as error:
            return str(error)


@checked
def load(
    run: str | os.PathLike[str],
    *,
    device: torch.device | str | Literal["auto"] = "cpu",
    transform: Callable[[Any], Tensor] | None = None,
    batch_size: int = 64,
) -> Pipeline:
    """The model of a run, or of a run's model/ folder, ready to be called with images.

    device: "auto" for the GPU if there is one. transform: of PIL images, in the place of the model's own. batch_size:
    images at a time. FileNotFoundError for a folder without a finished model, ValueError for a damaged one.
    """
    folder = model_folder(Path(run))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    predictor = load_predictor(folder, device=device)
    detector = Detector.load(folder)
    conformal = ConformalSets.load(folder) if (folder / CONFORMAL_FILE).is_file() else None
    transform = transform or clip.eval_transform(own_model(folder))
    return Pipeline(predictor, detector, transform, conformal=conformal, batch_size=batch_size)


def model_folder(run: Path) -> Path:
    """The folder with the model of a run; FileNotFoundError where there is none."""
    for folder in (run / MODEL_FOLDER, run):
        if (folder / PIPELINE_FILE).is_file() and (folder / DETECTOR_FILE).is_file():
            return folder
    what = "it holds a run that has not finished: resume it" if (run / "config.yaml").is_file() else "no such run"
    raise FileNotFoundError(f"{run}: {what}; expected {MODEL_FOLDER}/{PIPELINE_FILE}, which robustft train writes")


def about(run: Path) -> dict[str, Any]:
    """What the model of a run says of itself: name, classes, templates, temperature, threshold."""
    path = model_folder(run) / PIPELINE_FILE
    found = read_json(path, "an object that robustft train wrote")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got {found!r:.80}")
    return found


def own_model(run: Path) -> Path:
    """A folder of a run with open_clip's configuration: of an ensemble, that of a member, whose images are the same."""
    folder = model_folder(run)
    while (folder / ENSEMBLE_FILE).is_file():
        folder = next(inner for inner in sorted(folder.iterdir()) if inner.is_dir())
    return folder
