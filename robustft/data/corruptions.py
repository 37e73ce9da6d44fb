"""Shifted data where a user has none: the test images, corrupted and restyled, in five severities.

    noise         normal noise on every pixel                 its deviation, of 1
    blur          Gaussian                                    its deviation, in 224ths of the short side
    pixelate      fewer pixels                                the share that is left of each side
    jpeg          JPEG                                        its quality
    bright, dark  pixels times                                a factor
    contrast      distance from the mean grey times           a factor
    grey          distance from the image without colour times
    hue           colours turned, one way or the other        a share of the circle
    posterize     fewer levels                                bits a channel
    solarize      pixels from a value on inverted             the value, of 255
    elastic       waves of displacement                       their size, in 224ths of the short side
    perspective   corners moved inwards                       by up to this share of half a side
    rotate        to the left or to the right                 degrees

The numbers of each severity are `PARAMETERS`. Lengths are relative, and an image larger than `size` is first brought to
it: a model sees some 224 pixels, of which noise on 20 million leaves nothing. What is drawn (directions, noise, waves,
corners) is a function of (seed, name, index), the same in every severity. What a turn leaves empty is black.

torchvision has these forms, takes PIL images, and is there with open_clip. imagecorruptions, which has ImageNet-C's,
would bring OpenCV, numba and scikit-image, so the numbers here do not compare with those on ImageNet-C.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from robustft.data import sources
from robustft.data.classes import class_names
from robustft.data.images import ImageDataset, as_rgb, normalized
from robustft.data.paths import PathDataset
from robustft.data.seeds import stateless_generator, stateless_seed
from robustft.data.wrappers import group_names_of, groups_of, told
from robustft.ops.kinds import checked, described

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 224
SEVERITIES = (1, 2, 3, 4, 5)

PARAMETERS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),
    "blur": (1, 2, 3, 4, 6),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg": (25, 18, 15, 10, 7),
    "bright": (1.3, 1.6, 2.0, 2.5, 3.0),
    "dark": (0.7, 0.5, 0.4, 0.3, 0.2),
    "contrast": (0.6, 0.4, 0.3, 0.2, 0.12),
    "grey": (0.6, 0.4, 0.2, 0.1, 0.0),
    "hue": (0.05, 0.1, 0.15, 0.25, 0.5),
    "posterize": (5, 4, 3, 2, 1),
    "solarize": (224, 192, 160, 128, 96),
    "elastic": (2, 4, 6, 9, 12),
    "perspective": (0.1, 0.2, 0.3, 0.45, 0.6),
    "rotate": (8, 15, 25, 40, 60),
}


@checked
def stress(
    dataset: Any,
    severities: Sequence[int] = (1, 3, 5),
    seed: int = 0,
    *,
    names: Sequence[str] | None = None,
    size: int = SIZE,
) -> dict[str, Stressed]:
    """Data sets of the same images, corrupted: "noise 1", "noise 3", "noise 5", "blur 1", ...; made as they are read.

    For `evaluate(..., id=test, shifts=stress(test))`. Labels, classes, groups and file names are those of `dataset`.

    Args:
        dataset: a `PathDataset` or an `ImageDataset`, whose own transform comes after the corruption, or any other
            map-style data set with PIL images, as (image, label) or {"image": ..., ...}.
        severities: among 1 to 5.
        seed: of what is drawn.
        names: of the corruptions; those of `PARAMETERS`, all by default.
        size: the short side, in pixels, to which larger images are first brought: what the model takes.

    ValueError for unknown names and severities; TypeError, when an item is read, for images that are no PIL images.
    """
    if unknown := [name for name in (() if names is None else names) if name not in PARAMETERS]:
        raise ValueError(f"names holds {unknown}; known are {list(PARAMETERS)}")
    if wrong := [severity for severity in severities if severity not in SEVERITIES]:
        raise ValueError(f"severities holds {wrong}, expected some of {list(SEVERITIES)}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or isinstance(dataset, (tuple, Mapping)):
        raise TypeError(f"dataset must be map-style, of PIL images, got {type(dataset).__name__}")
    kind = StressedImages if isinstance(dataset, ImageDataset) else Stressed
    return {
        f"{name} {severity}": kind(dataset, name, severity, seed, size)
        for name in (PARAMETERS if names is None else names)
        for severity in severities
    }


class Stressed:
    """A data set whose images are corrupted when they are read; an item is as the data set has it otherwise.

    `.classes`, `.labels`, `.groups`, `.group_names`, `.samples` (files) and `.on_error` are the data set's, None or
    empty where it tells none. `.fingerprint` is of the data set and of the corruption.
    """

    def __init__(self, dataset: Any, name: str, severity: int, seed: int, size: int) -> None:
        self.name, self.severity, self.seed, self.size = name, severity, seed, size
        self.transform: Callable[[Any], Any] | None = None
        self.plain = dataset
        if isinstance(dataset, (PathDataset, ImageDataset)):
            self.transform, self.plain = dataset.transform, dataset.with_transform(None)
        self.classes = class_names(dataset)
        self.labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
        self.groups, self.group_names = groups_of(dataset), group_names_of(dataset)
        self.on_error = told(dataset, "on_error", "raise")
        self.samples = getattr(dataset, "samples", ())

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        item = self.plain[index]
        image = self.corrupted(item["image"] if isinstance(item, Mapping) else item[0], index)
        image = image if self.transform is None else self.transform(image)
        return {**item, "image": image} if isinstance(item, Mapping) else (image, *item[1:])

    def with_transform(self, transform: Callable[[Any], Any] | None) -> Stressed:
        """The same images under another transform, which comes after the corruption."""
        other = type(self)(self.plain, self.name, self.severity, self.seed, self.size)
        other.transform = transform
        return other

    def corrupted(self, image: Any, index: int) -> Image:
        """A PIL image, 8-bit RGB, as the data set's image number `index` is corrupted."""
        import PIL.Image

        if not isinstance(image, PIL.Image.Image):
            raise TypeError(
                f"image {index} of the data set is a {type(image).__name__}, not a PIL image: stress the data set "
                "without its transform, and give that to the stressed one by with_transform"
            )
        return corrupt(image, self.name, self.severity, stateless_seed(self.seed, index), self.size)

    @property
    def workers(self) -> int | None:
        """How many processes read it in order: as the data set says, and AttributeError where it says nothing."""
        return self.plain.workers

    @property
    def fingerprint(self) -> str:
        """SHA-256 of data set and corruption, but not of the transform: a cache key."""
        parameter = PARAMETERS[self.name][self.severity - 1]
        what = (sources.fingerprint(self.plain), self.name, parameter, self.seed, self.size)
        return hashlib.sha256(repr(what).encode()).hexdigest()


class StressedImages(Stressed):
    """`Stressed` images in memory, which can also be had as tensors."""

    def tensors(self, mean: Sequence[float], std: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ImageDataset.tensors`, of the corrupted images."""
        images = np.stack([np.asarray(self.corrupted(self.plain[index][0], index)) for index in range(len(self))])
        return normalized(images, mean, std), self.plain.labels


@checked
def corrupt(image: Image, name: str, severity: int, seed: int, size: int = SIZE) -> Image:
    """One PIL image under a corruption of `PARAMETERS`; what is drawn is a function of (seed, name)."""
    import PIL.Image

    from robustft.clip.library import import_open_clip

    import_open_clip()  # by which torchvision can be imported
    from torchvision.transforms.v2 import InterpolationMode, functional

    if not isinstance(image, PIL.Image.Image):
        raise TypeError(f"image is {described(image)}; expected a PIL image")
    if name not in PARAMETERS:
        raise ValueError(f"name must be one of {list(PARAMETERS)}, got {name!r}")
    if severity not in SEVERITIES or size < 1:
        raise ValueError(f"severity is {severity}, size is {size}; expected one of {list(SEVERITIES)}, at least 1")
    filters, bilinear = PIL.Image.Resampling, InterpolationMode.BILINEAR
    image = as_rgb(image, "image")
    short = min(image.size)
    if short > size:
        wanted = [round(side * size / short) for side in image.size]
        image, short = image.resize((wanted[0], wanted[1]), resample=filters.BICUBIC), size
    (width, height), unit = image.size, short / SIZE
    value = PARAMETERS[name][severity - 1]
    generator = stateless_generator(seed, name)
    sign = 1 if float(torch.rand((), generator=generator)) < 0.5 else -1
    match name:
        case "noise":
            noise = torch.randn(height, width, 3, generator=generator).numpy()
            changed = np.asarray(image, np.float32) + 255 * value * noise
            return PIL.Image.fromarray(changed.round().clip(0, 255).astype(np.uint8))
        case "blur":
            radius = min(max(1, round(3 * value * unit)), short - 1)  # it mirrors the image at its borders
            kernel, sigma = [2 * radius + 1] * 2, [value * unit] * 2
            return functional.gaussian_blur(image, kernel, sigma) if radius else image
        case "pixelate":
            fewer = (max(1, round(width * value)), max(1, round(height * value)))
            return image.resize(fewer, resample=filters.BOX).resize((width, height), resample=filters.NEAREST)
        case "jpeg":
            file = io.BytesIO()
            image.save(file, "JPEG", quality=int(value))
            return PIL.Image.open(file).convert("RGB")
        case "bright" | "dark":
            return functional.adjust_brightness(image, value)
        case "contrast":
            return functional.adjust_contrast(image, value)
        case "grey":
            return functional.adjust_saturation(image, value)
        case "hue":
            return functional.adjust_hue(image, sign * value)
        case "posterize":
            return functional.posterize(image, int(value))
        case "solarize":
            return functional.solarize(image, int(value))
        case "elastic":
            # Moves of a coarse grid in pixels, smooth between its points; torchvision takes them in halves of a side.
            coarse = torch.randn(1, 2, 5, 5, generator=generator) * value * unit
            moves = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
            moves = moves.permute(0, 2, 3, 1) * 2 / torch.tensor([width, height])
            return functional.elastic(image, moves, interpolation=bilinear)
        case "perspective":
            x, y = (torch.rand(2, 4, generator=generator) * value / 2).tolist()
            right, bottom = width - 1, height - 1
            corners = [[0, 0], [right, 0], [right, bottom], [0, bottom]]
            moved = [
                [round(abs(corner[0] - a * right)), round(abs(corner[1] - b * bottom))]
                for corner, a, b in zip(corners, x, y, strict=True)
            ]
            return functional.perspective(image, corners, moved, interpolation=bilinear) if short > 1 else image
        case _:
            return functional.rotate(image, sign * value, interpolation=bilinear)
