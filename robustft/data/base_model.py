"""The tiny CLIP of GlyphWorld: its configuration and its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from robustft.data import small_clip

if TYPE_CHECKING:
    from robustft.clip import Bundle

BUNDLED = Path(__file__).parent / "assets" / "glyphworld_vit.safetensors"
CONFIG: dict[str, Any] = {  # as in open_clip_config.json
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 28, "layers": 4, "width": 96, "head_width": 32, "patch_size": 7},
        "text_cfg": {"context_length": 20, "vocab_size": small_clip.TOKENS, "width": 64, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": small_clip.preprocessing(28),
}


def build(vocabulary: int = small_clip.TOKENS) -> Any:
    """An untrained model of CONFIG with `vocabulary` tokens, in fp32 on the CPU."""
    return small_clip.build(CONFIG, vocabulary)


def save(path: str | Path, model: nn.Module, token_rows: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write a model whose embedding has one row for each of `token_rows` (V,), in fp16, atomically.

    Equal models with equal metadata give equal bytes.
    """
    small_clip.save(Path(path), CONFIG, model.state_dict(), token_rows, metadata)


def load_clip(path: str | Path | None = None) -> Bundle:
    """The bundled CLIP, or one that `robustft.data.pretrain` wrote to `path`, in fp32 and evaluation mode.

    Raises FileNotFoundError when there is no such file, ValueError when it is truncated or of another model.
    """
    return small_clip.load(BUNDLED if path is None else Path(path), CONFIG, "robustft.data.pretrain")
