"""Ten digits and twenty-six capital letters as masks: a font's outlines and a pen's strokes.

A glyph is a mask m in [0, 1]^(S x S). Two sources draw it.

* font: the outline of Pillow's built-in font, resampled through an affine map and a shaken mesh.
* pen:  a skeleton of control points c (P, 2), one of several ways to write the character, shaken and sampled
        as p = B c with the fixed matrix B of a Catmull-Rom spline (or of a polyline), warped, and drawn by a
        round pen of radius r:  m(x) = clip(r + 1/2 - min_i |x - p_i|, 0, 1).

`scan` then imitates a coarse scanner: means over an 8 x 8 grid in 17 grey levels, enlarged again bilinearly.
scikit-learn's handwritten digits were scanned like that, and `enlarge` gives them the size used here.
All randomness comes from the `numpy.random.Generator` passed in.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 28  # side of every image, in pixels
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Ways to write each character on a grid ten units high: strokes between "|", "~" smooth, "-" straight.
SKELETONS: dict[str, tuple[str, ...]] = {
    "0": (
        "~ 4,0 1,2 0,5 1,8 4,10 7,8 8,5 7,2 4,0",
        "~ 3,0 1,2 0,5 1,8 3,10 5,8 6,5 5,2 3,0",
    ),
    "1": ("- 4,0 4,10", "- 2,2 4,0 4,10", "- 5,0 3,10"),
    "2": (
        "~ 1,2 2,0 5,0 7,2 6,5 3,8 0,10 | - 0,10 8,10",
        "~ 0,2 4,0 7,2 5,6 0,10 | - 0,10 7,10",
    ),
    "3": (
        "~ 1,1 4,0 7,2 6,4 3,5 | ~ 3,5 7,6 8,8 5,10 0,9",
        "- 0,0 7,0 3,4 | ~ 3,4 7,5 8,8 5,10 0,9",
    ),
    "4": ("- 6,10 6,0 0,7 8,7", "- 1,0 0,6 8,6 | - 6,2 6,10"),
    "5": (
        "- 7,0 1,0 1,4 | ~ 1,4 5,4 8,6 7,9 4,10 0,9",
        "- 8,0 2,0 0,5 | ~ 0,5 5,4 7,7 4,10 0,10",
    ),
    "6": (
        "~ 6,0 2,3 0,7 2,10 5,10 7,8 5,6 2,6 0,7",
        "~ 7,1 4,0 1,3 0,7 3,10 6,9 7,7 5,5 2,6 0,8",
    ),
    "7": ("- 0,0 7,0 3,10", "~ 0,1 4,0 7,1 | ~ 7,1 4,5 3,10"),
    "8": (
        "~ 4,0 1,2 4,5 7,2 4,0 | ~ 4,5 0,8 4,10 8,8 4,5",
        "~ 7,1 4,0 1,2 3,4 6,6 7,8 4,10 1,9 1,7 4,5 7,2 7,1",
    ),
    "9": (
        "~ 7,2 4,0 1,2 2,5 5,5 7,2 | - 7,1 6,10",
        "~ 7,2 4,0 1,3 4,5 7,2 | ~ 7,2 7,6 3,10",
    ),
    "A": ("- 0,10 4,0 8,10 | - 2,6 6,6", "~ 0,10 2,2 4,0 6,2 8,10 | - 1,6 7,6"),
    "B": (
        "- 1,0 1,10 | ~ 1,0 6,1 6,4 1,5 | ~ 1,5 7,6 7,9 1,10",
        "- 1,10 1,0 | ~ 1,0 5,0 6,2 5,4 1,5 | ~ 1,5 6,5 8,8 5,10 1,10",
    ),
    "C": ("~ 7,2 4,0 1,2 0,5 1,8 4,10 7,8", "~ 7,1 3,0 0,5 3,10 7,9"),
    "D": ("- 1,0 1,10 | ~ 1,0 5,1 7,5 5,9 1,10", "- 0,0 0,10 | ~ 0,0 6,1 8,5 6,9 0,10"),
    "E": ("- 7,0 1,0 1,10 7,10 | - 1,5 6,5", "~ 7,1 3,0 1,2 4,5 1,7 3,10 7,9"),
    "F": ("- 7,0 1,0 1,10 | - 1,5 6,5", "- 1,0 1,10 | - 0,0 7,0 | - 1,4 5,4"),
    "G": ("~ 7,2 4,0 1,2 0,5 1,8 4,10 7,8 | - 4,6 7,6 7,10", "~ 7,1 3,0 0,5 3,10 6,9 7,6 | - 4,6 8,6"),
    "H": ("- 1,0 1,10 | - 7,0 7,10 | - 1,5 7,5",),
    "I": ("- 4,0 4,10 | - 2,0 6,0 | - 2,10 6,10",),
    "J": ("~ 6,0 6,7 4,10 1,8", "- 2,0 8,0 | ~ 6,0 6,7 4,10 1,8"),
    "K": ("- 1,0 1,10 | - 7,0 1,5 7,10", "- 1,0 1,10 | - 7,0 1,6 | - 3,5 7,10"),
    "L": ("- 1,0 1,10 7,10",),
    "M": ("- 0,10 0,0 4,6 8,0 8,10", "- 0,10 2,0 5,8 8,0 10,10"),
    "N": ("- 1,10 1,0 7,10 7,0",),
    "O": ("~ 5,0 1,1 0,5 1,9 5,10 9,9 10,5 9,1 5,0",),
    "P": ("- 1,0 1,10 | ~ 1,0 6,1 6,4 1,5", "- 1,0 1,10 | ~ 1,0 5,0 7,3 5,6 1,6"),
    "Q": ("~ 4,0 1,1 0,5 1,9 4,10 7,9 8,5 7,1 4,0 | - 5,7 9,10",),
    "R": ("- 1,0 1,10 | ~ 1,0 6,1 6,4 1,5 | - 3,5 7,10",),
    "S": ("~ 7,2 4,0 1,2 4,5 7,8 4,10 0,8", "~ 7,1 3,0 1,3 6,6 6,9 3,10 0,9"),
    "T": ("- 0,0 8,0 | - 4,0 4,10",),
    "U": ("~ 1,0 1,7 4,10 7,7 7,0",),
    "V": ("- 0,0 4,10 8,0",),
    "W": ("- 0,0 2,10 5,4 8,10 10,0", "~ 0,0 2,10 5,5 7,10 10,0"),
    "X": ("- 0,0 8,10 | - 8,0 0,10",),
    "Y": ("- 0,0 4,5 8,0 | - 4,5 4,10", "- 0,0 4,5 | - 8,0 2,10"),
    "Z": ("- 0,0 8,0 0,10 8,10", "- 0,0 7,0 0,10 8,10 | - 2,5 6,5"),
}


def _spline(points: np.ndarray) -> np.ndarray:
    """Catmull-Rom matrix (S, P): samples about half a unit apart on the curve through `points` (P, 2)."""
    p, rows = len(points), []
    for i in range(p - 1):
        before, after = max(i - 1, 0), min(i + 2, p - 1)
        steps = max(2, int(np.ceil(np.linalg.norm(points[i + 1] - points[i]) / 0.5)))
        for t in np.arange(steps + (i == p - 2)) / steps:
            row = np.zeros(p)
            for j, w in zip(
                (before, i, i + 1, after),
                (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3),
                strict=True,
            ):
                row[j] += w / 2
            rows.append(row)
    return np.array(rows)


@cache
def _skeleton(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Control points c (P, 2), equal ones merged so that joints stay joined, and the matrix B (S, P)."""
    control: list[tuple[float, float]] = []
    blocks: list[tuple[list[int], np.ndarray]] = []
    for stroke in text.split("|"):
        kind, *words = stroke.split()
        points = [(float(x), float(y)) for x, y in (word.split(",") for word in words)]
        control += [point for point in dict.fromkeys(points) if point not in control]
        pieces = [points] if kind == "~" else [points[i : i + 2] for i in range(len(points) - 1)]
        blocks += [([control.index(q) for q in piece], _spline(np.array(piece))) for piece in pieces]
    matrix = np.zeros((sum(len(block) for _, block in blocks), len(control)))
    row = 0
    for columns, block in blocks:
        for j, column in enumerate(columns):
            matrix[row : row + len(block), column] += block[:, j]
        row += len(block)
    return np.array(control), matrix


def _waves(points: np.ndarray, amplitude: float, period: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth random displacement field, the sum of two plane waves, at `points` (..., 2)."""
    moved = np.zeros(points.shape)
    for _ in range(2):
        angle, turn, phase = rng.uniform(0, 2 * np.pi, 3)
        k = 2 * np.pi / (period * rng.uniform(0.7, 1.6))
        wave = np.sin(k * (points[..., 0] * np.cos(angle) + points[..., 1] * np.sin(angle)) + phase)
        moved = moved + amplitude * wave[..., None] * np.array([np.cos(turn), np.sin(turn)])
    return moved


def _rotation(degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def pen_mask(
    character: str,
    rng: np.random.Generator,
    *,
    grid: int = SIZE,
    tilt: float = 8.0,
    shake: float = 0.35,
    radius: tuple[float, float] = (0.035, 0.1),
    fit: bool = False,
) -> np.ndarray:
    """A handwritten-looking `character` as a float64 mask (grid, grid) in [0, 1].

    `tilt` is the standard deviation of the rotation in degrees, `shake` that of the control points in tenths
    of the height, `radius` the range of the pen's radius as a fraction of the grid. With `fit` the glyph
    touches the top and the bottom of the grid, as scanned characters do; otherwise its size and place vary.
    """
    skeletons = SKELETONS[character]
    control, matrix = _skeleton(skeletons[rng.integers(len(skeletons))])
    points = matrix @ (control + rng.normal(0, shake, control.shape))
    points = points + _waves(points, rng.uniform(0, 0.5), 10.0, rng)
    slant = np.array([[rng.uniform(0.7, 1.15), -rng.normal(0.08, 0.16)], [0, 1]])
    points = points @ (_rotation(rng.normal(0, tilt)) @ slant).T
    low, high = points.min(0), points.max(0)
    points, extent = points - (low + high) / 2, high - low
    r = rng.uniform(*radius) * grid
    if fit:
        room = np.array([rng.uniform(0.7, 1.0), 1.0]) * grid - 2 * r
        scale = np.minimum(room[1] / extent[1], room[0] / max(extent[0], 1e-6))
        squeeze = np.array([scale * rng.uniform(0.85, 1.0), room[1] / extent[1]])
        points = points * squeeze + grid / 2
    else:
        scale = min((rng.uniform(0.6, 0.95) * grid - 2 * r) / max(extent.max(), 1e-6), 0.11 * grid)
        slack = np.maximum((grid - scale * extent) / 2 - r, 0)
        points = points * scale + grid / 2 + rng.uniform(-0.7, 0.7, 2) * slack
    axis = np.arange(grid) + 0.5
    squared = (
        ((axis - points[:, :1]) ** 2).astype(np.float32),
        ((axis - points[:, 1:]) ** 2).astype(np.float32),
    )
    distance = np.sqrt((squared[1][:, :, None] + squared[0][:, None, :]).min(0))
    return np.clip(r + 0.5 - distance, 0, 1).astype(np.float64)


@cache
def _outline(character: str, stroke: int) -> Image.Image:
    """`character` in Pillow's built-in font, 64 px, in the middle of a (96, 96) image, `stroke` px bolder."""
    image = Image.new("L", (96, 96), 0)
    font = ImageFont.load_default(size=64)
    ImageDraw.Draw(image).text((48, 48), character, fill=255, font=font, anchor="mm", stroke_width=stroke)
    return image


def font_mask(
    character: str, rng: np.random.Generator, *, tilt: float = 8.0, warp: float = 3.0, grid: int = SIZE
) -> np.ndarray:
    """`character` in Pillow's built-in font as a mask (grid, grid) of varied weight, size, slant, place, shape.

    `tilt` is the standard deviation of the rotation in degrees; `warp` the largest standard deviation, in
    pixels of 64 to the em, by which the corners of a 2 x 2 mesh laid over the glyph are shaken.
    """
    outline = _outline(character, int(rng.integers(0, 4)))
    zoom = rng.uniform(0.8, 1.3) * 60 / grid * np.array([rng.uniform(0.9, 1.35), 1.0])
    shear = np.array([[1, rng.normal(0, 0.15)], [0, 1]])
    lattice = np.stack(np.meshgrid(*[np.array([-0.5, 0, 0.5]) * grid] * 2), -1)
    source = (lattice - rng.uniform(-0.06, 0.06, 2) * grid) @ (_rotation(rng.normal(0, tilt)) @ shear).T * zoom
    source = source + rng.normal(0, rng.uniform(0, warp), source.shape) + 48
    # Two samples a pixel each way, then their mean: the outline is about twice as fine as the grid.
    mesh = [
        (
            (j * grid, i * grid, (j + 1) * grid, (i + 1) * grid),
            tuple(np.concatenate([source[i, j], source[i + 1, j], source[i + 1, j + 1], source[i, j + 1]]).tolist()),
        )
        for i in range(2)
        for j in range(2)
    ]
    fine = outline.transform((2 * grid, 2 * grid), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    return np.asarray(fine.reduce(2), np.float64) / 255


@cache
def _enlarge() -> np.ndarray:
    """(28, 8): bilinear interpolation from 8 to 24 samples with a margin of two zeros at each end."""
    centre = np.clip((np.arange(24) + 0.5) / 3 - 0.5, 0, 7)
    weights = np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(8)))
    return np.pad(weights, ((2, 2), (0, 0)))


def enlarge(cells: np.ndarray) -> np.ndarray:
    """Scanned cells (..., 8, 8) in [0, 1] to masks (..., 28, 28)."""
    return _enlarge() @ cells @ _enlarge().T


def scan(masks: np.ndarray) -> np.ndarray:
    """What a scanner of 8 x 8 cells in 17 grey levels leaves of masks (..., 32, 32): masks (..., 28, 28)."""
    cells = masks.reshape(*masks.shape[:-2], 8, 4, 8, 4).mean((-3, -1))
    return enlarge(np.round(cells * 16) / 16)
