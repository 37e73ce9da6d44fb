"""IconWorld: emoji by ten studios, a benchmark whose shifts are drawn by people, and a small CLIP that knows them.

`robustft.data.iconworld.world` says what it holds; `build`, `corpus` and `pretrain` are the commands that made it.
"""

from robustft.data.iconworld.model import load_clip
from robustft.data.iconworld.taxonomy import ADJECTIVES, DESCRIPTIONS, SUPERCLASSES, TEMPLATES
from robustft.data.iconworld.world import (
    CLASS_NAMES,
    FRAME_COLOURS,
    ID_STUDIOS,
    OOD,
    SHIFTS,
    TASKS,
    concepts,
    sets,
    spurious,
    unpack,
)

__all__ = [
    "ADJECTIVES",
    "CLASS_NAMES",
    "DESCRIPTIONS",
    "FRAME_COLOURS",
    "ID_STUDIOS",
    "OOD",
    "SHIFTS",
    "SUPERCLASSES",
    "TASKS",
    "TEMPLATES",
    "concepts",
    "load_clip",
    "sets",
    "spurious",
    "unpack",
]
