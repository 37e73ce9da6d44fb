"""The small CLIP of IconWorld: its configuration and its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustft.data import small_clip

if TYPE_CHECKING:
    from robustft.clip import Bundle

BUNDLED = Path(__file__).parents[1] / "assets" / "iconworld_vit.safetensors"
CONFIG: dict[str, Any] = {  # as in open_clip_config.json
    "model_cfg": {
        "embed_dim": 192,
        "vision_cfg": {"image_size": 40, "layers": 5, "width": 160, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": small_clip.TOKENS, "width": 96, "heads": 3, "layers": 3},
    },
    "preprocess_cfg": small_clip.preprocessing(40),
}


def load_clip(path: str | Path | None = None) -> Bundle:
    """The bundled CLIP, or one that `robustft.data.iconworld.pretrain` wrote to `path`, in fp32 and evaluation mode.

    Raises FileNotFoundError when there is no such file, ValueError when it is truncated or of another model.
    """
    return small_clip.load(BUNDLED if path is None else Path(path), CONFIG, "robustft.data.iconworld.pretrain")
