"""Images: read from files, or held in memory with their labels in torchvision's convention: `dataset[i]` is
(transformed image, label)."""

from __future__ import annotations

import hashlib
import io
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustft.ops.kinds import array, check_fields, described, held

if TYPE_CHECKING:
    import PIL.Image


OnError = Literal["raise", "skip"]
"""What happens at an image that cannot be read: the error, or the set goes on without it."""


class DamagedImageError(ValueError):
    """An image's file, named, is damaged, no image, or of pixels whose range nothing tells."""


class Skipped(NamedTuple):
    """An image that could not be read: its row in the data set, and the error, which names the file."""

    row: int
    error: str


def check_on_error(on_error: str) -> None:
    """ValueError for what is no `OnError`."""
    if not isinstance(on_error, str) or on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")


def read_image(path: str | Path, content: bytes | None = None) -> PIL.Image.Image:
    """The image of a file as 8-bit RGB, upright: every image file of this package is decoded here.

    Images are turned as their EXIF orientation says. Of 16-bit greyscale the whole range becomes 0..255; PIL's own
    conversion cuts it at 255, which is white. Otherwise PIL's conversion, as in torchvision and open_clip: transparency
    is dropped. Raises DamagedImageError, a ValueError that names the file, for one that is damaged or no image, and for
    pixels whose range nothing tells (floating point, more than 16 bits); OSError where the file cannot be opened.
    `content` is the file's, where it lies in an archive and `path` only names it.
    """
    from PIL import Image

    try:
        with Image.open(path if content is None else io.BytesIO(content)) as file:
            image = upright(file)
    except Exception as error:  # of a damaged file, a decoder may raise anything
        if isinstance(error, OSError) and error.errno is not None:  # missing, or not to be read: damage has no number
            raise
        raise DamagedImageError(f"{path}: damaged, or no image: {error!r:.200}") from error
    return as_rgb(image, str(path))


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """A copy of the image, decoded, turned as its EXIF orientation says."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def as_rgb(image: PIL.Image.Image, what: str) -> PIL.Image.Image:
    """An image that somebody decoded as `read_image` gives it: upright, 8-bit RGB; its errors call the image `what`."""
    from PIL import Image

    image = upright(image)
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise DamagedImageError(
                f"{what}: pixels from {pixels.min()} to {pixels.max()}, of which nothing says what is white; expected "
                "at most 16 bits: save it with 8"
            )
        image = Image.fromarray(((pixels * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
    if image.mode == "F":
        raise DamagedImageError(
            f"{what}: floating point pixels, of which nothing says what is white: save it with 8 bits"
        )
    if image.mode == "P":  # by way of its transparency, without which PIL warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def normalized(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (N, H, W, 3) uint8 as float32 (N, 3, H, W), bit for bit torchvision's ToTensor and Normalize."""
    for name, values in (("mean", mean), ("std", std)):
        numbers = array(name, values)
        possible = not numbers.is_complex() and numbers.isfinite().all() and (name == "mean" or numbers.gt(0).all())
        if numbers.shape != (3,) or not possible:
            raise ValueError(f"{name} is {described(values)}; expected three finite numbers, those of std positive")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(torch.float32).div_(255)
    centre, scale = (torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in (mean, std))
    return pixels.sub_(centre).div_(scale)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """RGB images (N, H, W, 3) uint8 with labels (N,) int64 into `classes`.

    `groups` (N,) int64 names an attribute that is no class, such as the colour of the background. Without a
    `transform` items are PIL images. Raises ValueError for other shapes or types.
    """

    images: np.ndarray
    labels: Tensor
    classes: tuple[str, ...]
    transform: Callable[[Any], Any] | None = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.images, np.ndarray):
            raise TypeError(f"images is {described(self.images)}; expected an array uint8 (N, H, W, 3)")
        check_fields(self)
        held("labels", self.labels)
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise ValueError(f"images: expected uint8 (N, H, W, 3), got {self.images.dtype} {self.images.shape}")
        for name, values in (("labels", self.labels), ("groups", self.groups)):
            if values is not None and (values.dtype != torch.int64 or values.shape != (len(self.images),)):
                raise ValueError(
                    f"{name}: expected int64 ({len(self.images)},), got {values.dtype} {tuple(values.shape)}"
                )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(
                f"labels: expected values in [0, {len(self.classes)}), got "
                f"[{int(self.labels.min())}, {int(self.labels.max())}]"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        image = Image.fromarray(self.images[operator.index(index)])
        return image if self.transform is None else self.transform(image), int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """The items of one batch, as torch's DataLoader asks for them."""
        return [self[index] for index in indices]

    def tensors(self, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
        """All images at once, float32 (N, 3, H, W) normalised, and the labels; equals ToTensor and Normalize."""
        return normalized(self.images, mean, std), self.labels

    def with_transform(self, transform: Callable[[Any], Any] | None) -> ImageDataset:
        """The same images under another transform."""
        return replace(self, transform=transform)

    def subset(self, indices: Sequence[int] | Tensor | np.ndarray) -> ImageDataset:
        """The images at `indices`, in that order; ValueError for what are no places of images."""
        rows = array("indices", indices)
        if not rows.numel():
            rows = rows.long()
        if rows.ndim != 1 or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            raise ValueError(f"indices is {described(indices)}; expected integers (n,)")
        rows = rows.long().cpu()
        if len(rows) and not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ValueError(
                f"indices hold {int(rows.min())}..{int(rows.max())}; expected places of {len(self)} images"
            )
        groups = None if self.groups is None else self.groups[rows]
        return replace(self, images=self.images[rows.numpy()], labels=self.labels[rows], groups=groups)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images, labels, groups and class names, but not of the transform: a cache key."""
        digest = hashlib.sha256(repr((self.images.shape, self.classes, self.groups is None)).encode())
        for part in (
            self.images,
            self.labels.numpy(),
            *([] if self.groups is None else [self.groups.numpy()]),
        ):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()
