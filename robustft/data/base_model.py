"""The tiny CLIP of GlyphWorld as a file: fp16 weights, and of the token embedding only the trained rows.

The tokenizer knows 49 408 tokens, GlyphWorld's captions use V of them. The file holds E[rows] (V, width) with
`token_rows` (V,), and loading rebuilds E (49408, width) with zeros elsewhere: a word that was never seen
carries no information, only its position does.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustft.files import write_tensors

if TYPE_CHECKING:
    from robustft.clip import Bundle

BUNDLED = Path(__file__).parent / "assets" / "glyphworld_vit.safetensors"
EMBEDDING = "token_embedding.weight"
CONFIG: dict[str, Any] = {  # as in open_clip_config.json
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 28, "layers": 4, "width": 96, "head_width": 32, "patch_size": 7},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {
        "size": [28, 28],
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "fill_color": 0,
    },
}


def build(vocabulary: int = 49408) -> Any:
    """An untrained model of CONFIG with `vocabulary` tokens, in fp32 on the CPU."""
    from robustft.clip import import_open_clip

    cfg = copy.deepcopy(CONFIG["model_cfg"])
    cfg["text_cfg"]["vocab_size"] = vocabulary
    return import_open_clip().CLIP(**cfg)


def save(path: str | Path, model: nn.Module, token_rows: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write a model whose embedding has one row for each of `token_rows` (V,), in fp16, atomically.

    Equal models with equal metadata give equal bytes.
    """
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    weights.pop("attn_mask", None)
    weights["token_rows"] = token_rows.to(torch.int32)
    write_tensors(Path(path), weights, {"robustft": json.dumps({"config": CONFIG, **metadata})})


@cache
def _tokenizer() -> Any:
    from robustft.clip import import_open_clip

    return import_open_clip().SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])


def load_clip(path: str | Path | None = None) -> Bundle:
    """The bundled CLIP, or one that `robustft.data.pretrain` wrote to `path`, in fp32 and evaluation mode.

    Raises FileNotFoundError when there is no such file, ValueError when it is truncated or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from robustft.clip import Bundle, import_open_clip

    path = BUNDLED if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; python -m robustft.data.pretrain makes one")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or no safetensors file: {error}") from error
    model = build()
    try:
        compact = weights[EMBEDDING]
        weights[EMBEDDING] = torch.zeros_like(model.token_embedding.weight, dtype=compact.dtype)
        weights[EMBEDDING][weights.pop("token_rows").long()] = compact
        incompatible = model.load_state_dict(weights, strict=False)
        if set(incompatible.missing_keys) - {"attn_mask"} or incompatible.unexpected_keys:
            raise RuntimeError(str(incompatible))
    except (RuntimeError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: not a checkpoint of robustft.data.pretrain: {error}") from error
    open_clip, config = import_open_clip(), copy.deepcopy(CONFIG)
    preprocess = open_clip.transform.PreprocessCfg(**config["preprocess_cfg"])
    open_clip.set_model_preprocess_cfg(model, config["preprocess_cfg"])  # where `sources.image_statistics` looks
    return Bundle(
        model.eval(),
        copy.copy(_tokenizer()),
        open_clip.transform.image_transform_v2(preprocess, is_train=True),
        open_clip.transform.image_transform_v2(preprocess, is_train=False),
        config,
    )
