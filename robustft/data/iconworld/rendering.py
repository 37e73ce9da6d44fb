"""A drawing of an icon set as pixels: the inside of an SVG, centred in a square, rendered by resvg."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np


def svg(icons: Mapping[str, Any], name: str, size: int) -> str:
    """The drawing `name` of an icon set (the content of icons.json) as an SVG of `size` x `size` pixels.

    What is not square is centred in a square; what follows the colour of the text is black.
    """
    icon = icons["icons"][name]
    width, height, left, top = (
        icon.get(key, icons.get(key, default))
        for key, default in (("width", 16), ("height", 16), ("left", 0), ("top", 0))
    )
    side = max(width, height)
    left, top = left - (side - width) / 2, top - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side:g} {side:g}" width="{size}" height="{size}" color="black">'
        f"{icon['body']}</svg>"
    )


def rendered(text: str, size: int) -> np.ndarray:
    """An SVG as pixels (size, size, 4), uint8: RGB as on a transparent ground, and opacity.

    Raises ImportError that names the extra, ValueError for what resvg cannot draw.
    """
    from PIL import Image

    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("drawings are rendered by resvg: pip install 'robustft[iconworld]'") from error
    png = resvg_py.svg_to_bytes(svg_string=text, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGBA"))


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Pixels (..., 4) uint8 over white, (..., 3) uint8, rounded to the nearest."""
    colour, opacity = pixels[..., :3].astype(np.uint32), pixels[..., 3:].astype(np.uint32)
    return ((colour * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
