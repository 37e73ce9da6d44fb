"""GlyphWorld: a benchmark of robust fine-tuning that fits in a package and in a coffee break.

Pre-training world: ten digits and twenty-six capitals, in a font or drawn by a pen, in seven colours on five
kinds of background, with captions that name the character and sometimes its colour and background, or else
describe its strokes and loops. Fine-tuning world: scikit-learn's handwritten digits, real, never seen in
pre-training, and always white on black.

    digits      in distribution (ID): 1797 real digits, split 1000 / 297 / 500, each class in proportion
    shift       the 500 test digits inverted, recoloured, on a texture, rotated, noisy; and digits in a font
    ood         no digit at all: letters in the style of the digits (near), textures alone (far)
    spurious    real digits on coloured grounds: the colour tells the class, until a test set where it misleads

Images are 28 x 28 RGB. All is a function of its arguments and a seed: equal calls give equal bytes.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from robustft.data.base_model import load_clip
from robustft.data.glyphs import CHARACTERS, SIZE, enlarge, font_mask, pen_mask, scan
from robustft.data.images import ImageDataset
from robustft.data.opening import Data

__all__ = [
    "BACKGROUNDS",
    "CLASS_NAMES",
    "COLOURS",
    "CONCEPTS",
    "OOD",
    "SHIFTS",
    "SPURIOUS_COLOURS",
    "TEMPLATES",
    "caption_pairs",
    "digits",
    "load_clip",
    "ood",
    "sets",
    "shift",
    "spurious",
]

_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASS_NAMES = tuple(f"the digit {word}" for word in _DIGIT_WORDS)
LETTER_NAMES = tuple(f"the letter {letter.lower()}" for letter in CHARACTERS[10:])
NAMES = CLASS_NAMES + LETTER_NAMES
TEMPLATES = ("{}", "a picture of {}", "an image of {}", "a photo of {}", "a blurry picture of {}")
CONCEPTS: dict[str, tuple[str, ...]] = dict(
    zip(
        CLASS_NAMES,
        (
            ("one closed round loop", "a single empty oval"),
            ("a single upright stroke", "one straight vertical line"),
            ("an open curve ending in a flat base", "a hook above a flat base"),
            ("two open bumps facing left", "two stacked curves open to the left"),
            ("crossing strokes with an open top", "a corner crossed by an upright stroke"),
            ("a flat top above an open belly", "a flat top and a bump facing left"),
            ("a loop below a rising tail", "one low loop and a long curve"),
            ("a flat top and a slanted stroke", "one sharp corner and a long slanted leg"),
            ("two stacked loops", "two closed loops touching in the middle"),
            ("a loop above a falling tail", "one high loop and a long leg"),
        ),
        strict=True,
    )
)
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (12, 12, 12),
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 170),
}
BACKGROUNDS = ("plain", "striped", "checkered", "speckled", "shaded")
SHIFTS = ("inverted", "recoloured", "textured", "rotated", "noisy", "font")
OOD = ("letters", "textures")
SPURIOUS_COLOURS = ("red", "green", "blue", "purple", "black")  # of the ground; class c goes with c // 2
SPLITS = {"train": slice(0, 1000), "validation": slice(1000, 1297), "test": slice(1297, 1797)}

_PALETTE = np.array(list(COLOURS.values()), np.float64)
_COLOUR_NAMES = tuple(COLOURS)
_WHITE, _BLACK = _COLOUR_NAMES.index("white"), _COLOUR_NAMES.index("black")
# Pairs (glyph, background) far enough apart in RGB to be legible.
_PAIRS = np.argwhere(np.linalg.norm(_PALETTE[:, None] - _PALETTE, axis=-1) > 130)


class Pairs(NamedTuple):
    """Images (N, 28, 28, 3) uint8, their captions, and which of the 36 `NAMES` each shows (N,)."""

    images: np.ndarray
    captions: list[str]
    labels: np.ndarray


def sets(limit: int | None = None) -> Data:
    """All of the benchmark as one `Data`; `limit` keeps that many images of each test set."""
    rows = range(limit) if limit is not None else None

    def shown(dataset: ImageDataset) -> ImageDataset:
        return dataset if rows is None else dataset.subset(rows[: len(dataset)])

    return Data(
        train=digits("train"),
        validation=digits("validation"),
        test=shown(digits("test")),
        classes=CLASS_NAMES,
        shifts={name: shown(shift(name)) for name in SHIFTS},
        ood={name: shown(ood(name)) for name in OOD},
        understood=("GlyphWorld, the bundled benchmark",),
    )


def rotate(mask: np.ndarray, degrees: float) -> np.ndarray:
    """A mask (H, W) turned about its middle, bilinearly."""
    turned = Image.fromarray(mask.astype(np.float32)).rotate(degrees, Image.Resampling.BILINEAR)
    return np.asarray(turned, np.float64)


def patterns(kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Background patterns in [0, 1], (N, 28, 28), for indices `kinds` (N,) into BACKGROUNDS."""
    n = len(kinds)
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    angle, width = rng.uniform(0, 2 * np.pi, (n, 1, 1)), rng.uniform(2.2, 4.5, (n, 1, 1))
    offset = rng.integers(0, 8, (2, n, 1, 1))
    noise = rng.random((n, SIZE, SIZE))
    if not kinds.any():
        return np.zeros((n, SIZE, SIZE))
    along = x * np.cos(angle) + y * np.sin(angle)
    cell = np.maximum(2, np.floor(width + 0.5))
    ramp = along - along.min((1, 2), keepdims=True)
    choices = (
        np.zeros((n, SIZE, SIZE)),
        (along / width % 2 < 1).astype(np.float64),
        ((x + offset[0]) // cell + (y + offset[1]) // cell) % 2,
        noise,
        ramp / ramp.max((1, 2), keepdims=True),
    )
    return np.choose(kinds[:, None, None], choices)


def paint(
    masks: np.ndarray,
    glyph: np.ndarray,
    ground: np.ndarray,
    kinds: np.ndarray,
    noise: np.ndarray | float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Images (N, 28, 28, 3) uint8 of masks (N, 28, 28) in colours `glyph` on patterned `ground`, both (N, 3).

    `noise` (N,) or one number is the standard deviation, in grey levels, of Gaussian noise added to all.
    """
    alternate = ground + np.where(ground.mean(1, keepdims=True) > 128, -75, 75)
    pattern, mask = patterns(kinds, rng)[..., None], masks[..., None]
    back = ground[:, None, None] * (1 - pattern) + np.clip(alternate, 0, 255)[:, None, None] * pattern
    image = back * (1 - mask) + glyph[:, None, None] * mask
    if np.any(noise):
        image = image + rng.normal(0, 1, image.shape) * np.broadcast_to(noise, len(masks))[:, None, None, None]
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _mask(character: str, simple: bool, rng: np.random.Generator) -> np.ndarray:
    source = rng.random()
    if source < 0.4:
        mask = font_mask(character, rng)
    elif source < 0.55:
        mask = scan(font_mask(character, rng, grid=32))
    elif source < 0.75 and not simple:
        mask = pen_mask(character, rng)
    else:
        mask = scan(pen_mask(character, rng, grid=32, fit=True))
    if not simple and rng.random() < 0.3:
        mask = rotate(mask, rng.uniform(-40, 40))
    return mask


def _caption(label: int, glyph: str, ground: str, kind: str, rng: np.random.Generator) -> str:
    name, which = NAMES[label], rng.random()
    if which < 0.35:
        text = name
    elif which < 0.55:
        text = f"{name} in {glyph}"
    elif which < 0.65:
        text = f"{name} on a {kind} background"
    elif which < 0.8:
        text = f"{name} in {glyph} on a {kind} {ground} background"
    elif name in CONCEPTS:
        phrase = CONCEPTS[name][rng.integers(len(CONCEPTS[name]))]
        text = phrase if rng.random() < 0.6 else f"{name}, {phrase}"
    else:
        text = name
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(text)


def caption_pairs(n: int, seed: int | tuple[int, ...], *, simple: float = 0.3) -> Pairs:
    """`n` pre-training pairs; a share `simple` of them upright, in the middle, and white on plain black."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(n) < 0.5, rng.integers(0, 10, n), rng.integers(10, 36, n))
    easy = rng.random(n) < simple
    masks = np.stack([_mask(CHARACTERS[label], e, rng) for label, e in zip(labels, easy, strict=True)])
    pairs = _PAIRS[rng.integers(len(_PAIRS), size=n)]
    kinds = np.where(rng.random(n) < 0.4, 0, rng.integers(1, len(BACKGROUNDS), n))
    noise = np.where(rng.random(n) < 0.25, rng.uniform(5, 65, n), 4.0)
    pairs[easy], kinds[easy], noise[easy] = (0, 1), 0, 2.0
    glyph, ground = (_PALETTE[pairs[:, i]] + rng.uniform(-12, 12, (n, 3)) for i in range(2))
    captions = [
        _caption(label, _COLOUR_NAMES[g], _COLOUR_NAMES[b], BACKGROUNDS[kind], rng)
        for label, (g, b), kind in zip(labels, pairs, kinds, strict=True)
    ]
    return Pairs(paint(masks, glyph, ground, kinds, noise, rng), captions, labels)


def digits(split: str, *, seed: int = 0) -> ImageDataset:
    """Real handwritten digits, white on black: "train" (1000), "validation" (297) or "test" (500).

    The three are disjoint and hold each class in proportion; `seed` draws the split. They are scikit-learn's
    `load_digits` (8 x 8 pixels, from the UCI repository), enlarged to 28 x 28.
    """
    masks, labels = _real(split, seed)
    return _dataset(masks, labels, glyph=_WHITE, ground=_BLACK)


def shift(name: str, *, seed: int = 0) -> ImageDataset:
    """One of SHIFTS: the images of `digits("test", seed=seed)` changed in one way, or 500 digits in a font.

    inverted: black on white. recoloured: two other colours. textured: two colours and a pattern. rotated: by
    35 to 55 degrees either way. noisy: Gaussian noise of standard deviation 140 grey levels. font: Pillow's
    built-in font, white on black.
    """
    _check("name", name, SHIFTS)
    rng = np.random.default_rng((seed, 1, SHIFTS.index(name)))
    if name == "font":
        labels = np.arange(500) % 10
        masks = np.stack([font_mask(str(label), rng) for label in labels])
        return _dataset(masks, labels, glyph=_WHITE, ground=_BLACK)
    masks, labels = _real("test", seed)
    pairs = _PAIRS[rng.integers(len(_PAIRS), size=len(masks))]
    kinds = rng.integers(1, len(BACKGROUNDS), len(masks))
    match name:
        case "inverted":
            return _dataset(masks, labels, glyph=_BLACK, ground=_WHITE)
        case "recoloured":
            return _dataset(masks, labels, glyph=pairs[:, 0], ground=pairs[:, 1])
        case "textured":
            return _dataset(masks, labels, glyph=pairs[:, 0], ground=pairs[:, 1], kinds=kinds, rng=rng)
        case "rotated":
            angles = rng.choice([-1, 1], len(masks)) * rng.uniform(35, 55, len(masks))
            turned = np.stack([rotate(mask, angle) for mask, angle in zip(masks, angles, strict=True)])
            return _dataset(turned, labels, glyph=_WHITE, ground=_BLACK)
        case _:
            return _dataset(masks, labels, glyph=_WHITE, ground=_BLACK, noise=140.0, rng=rng)


def ood(name: str, *, seed: int = 0) -> ImageDataset:
    """500 images of no digit: "letters" in the style of the digits (near) or "textures" (far).

    I and O are left out of the letters: nothing tells them from 1 and 0. Labels index the set's own classes.
    """
    _check("name", name, OOD)
    rng = np.random.default_rng((seed, 2, OOD.index(name)))
    if name == "textures":
        kinds = 1 + np.arange(500) % (len(BACKGROUNDS) - 1)
        ground = rng.integers(len(COLOURS), size=500)
        blank = np.zeros((500, SIZE, SIZE))
        return _dataset(blank, kinds - 1, glyph=_WHITE, ground=ground, kinds=kinds, rng=rng, classes=BACKGROUNDS[1:])
    letters = [letter for letter in CHARACTERS[10:] if letter not in "IO"]
    labels = np.arange(500) % len(letters)
    # As bold as the real digits, so that weight does not give a letter away.
    drawn = [pen_mask(letters[label], rng, grid=32, fit=True, radius=(0.05, 0.11)) for label in labels]
    masks = scan(np.stack(drawn))
    classes = tuple(f"the letter {letter.lower()}" for letter in letters)
    return _dataset(masks, labels, glyph=_WHITE, ground=_BLACK, classes=classes)


def spurious(split: str, *, conflicting: bool = False, seed: int = 0) -> ImageDataset:
    """The digits of `split` in white on grounds whose colour, `groups` into SPURIOUS_COLOURS, goes with the class.

    In "train" and "validation" the ground of class c is colour c // 2 for 97 % of the images and one of the
    others for the rest; in "test" for all of them or, with `conflicting`, for none. Raises ValueError for
    `conflicting` elsewhere.
    """
    masks, labels = _real(split, seed)
    if conflicting and split != "test":
        raise ValueError(f'conflicting: only the "test" split has a conflicting variant, got split {split!r}')
    rng = np.random.default_rng((seed, 3, list(SPLITS).index(split)))
    other = rng.integers(1, len(SPURIOUS_COLOURS), len(labels))
    astray = np.zeros(len(labels), bool)
    if split == "test":
        astray[:] = conflicting
    else:
        astray[rng.permutation(len(labels))[: round(0.03 * len(labels))]] = True
    groups = (labels // 2 + astray * other) % len(SPURIOUS_COLOURS)
    ground = np.array([_COLOUR_NAMES.index(colour) for colour in SPURIOUS_COLOURS])[groups]
    return _dataset(masks, labels, glyph=_WHITE, ground=ground, groups=torch.from_numpy(groups))


def _check(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {value!r}")


@cache
def _scanned() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's `load_digits(return_X_y=True)`, without the seconds that importing scikit-learn takes."""
    found = importlib.util.find_spec("sklearn")
    for folder in () if found is None else found.submodule_search_locations or ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            table = np.loadtxt(path, delimiter=",")
            return table[:, :-1], table[:, -1].astype(int)
    from sklearn.datasets import load_digits

    cells, labels = load_digits(return_X_y=True)
    return cells, labels


def _real(split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks (N, 28, 28) and labels (N,) of one split of the real digits."""
    _check("split", split, tuple(SPLITS))
    cells, labels = _scanned()
    order = np.random.default_rng((seed, 0)).permutation(len(labels))
    # An image's place is its rank among its class's images: any stretch of the places has all classes in proportion.
    place = np.empty(len(labels))
    for label in range(10):
        own = order[labels[order] == label]
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    rows = np.argsort(place, kind="stable")[SPLITS[split]]
    return enlarge(cells[rows].reshape(-1, 8, 8) / 16), labels[rows].astype(np.int64)


def _dataset(
    masks: np.ndarray,
    labels: np.ndarray,
    *,
    glyph: int | np.ndarray,
    ground: int | np.ndarray,
    kinds: np.ndarray | int = 0,
    noise: float = 0.0,
    rng: np.random.Generator | None = None,
    classes: tuple[str, ...] = CLASS_NAMES,
    groups: torch.Tensor | None = None,
) -> ImageDataset:
    n = len(masks)
    figures, grounds = (_PALETTE[np.broadcast_to(index, n)] for index in (glyph, ground))
    masks = np.round(masks, 6)  # a grey level half-way between two must round alike under every BLAS
    images = paint(masks, figures, grounds, np.broadcast_to(kinds, n), noise, rng or np.random.default_rng(0))
    return ImageDataset(images, torch.from_numpy(labels.astype(np.int64)), classes, groups=groups)
