"""A small CLIP as a file: fp16 weights, and of the token embedding only the rows of tokens that captions use.

The tokenizer knows 49 408 tokens, the captions of a small world use V of them. The file holds E[rows] (V, width) with
`token_rows` (V,), and loading rebuilds E (49408, width) with zeros elsewhere: a word that was never seen carries no
information, only its position does.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustft.files import write_tensors

if TYPE_CHECKING:
    from robustft.clip import Bundle

EMBEDDING = "token_embedding.weight"
TOKENS = 49408


def preprocessing(size: int) -> dict[str, Any]:
    """`preprocess_cfg` of square images that are drawn for the model and never cut."""
    return {
        "size": [size, size],
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "fill_color": 0,
    }


def build(config: Mapping[str, Any], vocabulary: int = TOKENS) -> Any:
    """An untrained model of a configuration, as in open_clip_config.json, with `vocabulary` tokens, in fp32 on the
    CPU."""
    from robustft.clip import import_open_clip

    cfg = copy.deepcopy(config["model_cfg"])
    cfg["text_cfg"]["vocab_size"] = vocabulary
    return import_open_clip().CLIP(**cfg)


def save(
    path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], token_rows: Tensor, about: Mapping[str, Any]
) -> None:
    """Write a model whose embedding has one row for each of `token_rows` (V,), in fp16, atomically.

    Equal weights with equal `about` give equal bytes.
    """
    kept = {name: value.detach().half().contiguous() for name, value in weights.items() if name != "attn_mask"}
    kept["token_rows"] = token_rows.to(torch.int32)
    write_tensors(path, kept, {"robustft": json.dumps({"config": config, **about})})


@cache
def _tokenizer(context_length: int) -> Any:
    from robustft.clip import import_open_clip

    return import_open_clip().SimpleTokenizer(context_length=context_length)


def load(path: Path, config: Mapping[str, Any], made_by: str) -> Bundle:
    """A model that `save` wrote, in fp32 and evaluation mode; errors name the command that makes one.

    Raises FileNotFoundError when there is no such file, ValueError when it is truncated or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from robustft.clip import Bundle, import_open_clip

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; python -m {made_by} makes one")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or no safetensors file: {error}") from error
    model = build(config)
    try:
        compact = weights[EMBEDDING]
        weights[EMBEDDING] = torch.zeros_like(model.token_embedding.weight, dtype=compact.dtype)
        weights[EMBEDDING][weights.pop("token_rows").long()] = compact
        incompatible = model.load_state_dict(weights, strict=False)
        if set(incompatible.missing_keys) - {"attn_mask"} or incompatible.unexpected_keys:
            raise RuntimeError(str(incompatible))
    except (RuntimeError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: not a checkpoint of {made_by}: {error}") from error
    open_clip, used = import_open_clip(), copy.deepcopy(dict(config))
    preprocess = open_clip.transform.PreprocessCfg(**used["preprocess_cfg"])
    open_clip.set_model_preprocess_cfg(model, used["preprocess_cfg"])  # where `sources.image_statistics` looks
    return Bundle(
        model.eval(),
        copy.copy(_tokenizer(used["model_cfg"]["text_cfg"]["context_length"])),
        open_clip.transform.image_transform_v2(preprocess, is_train=True),
        open_clip.transform.image_transform_v2(preprocess, is_train=False),
        used,
    )


def words(bundle: Bundle) -> tuple[str, ...]:
    """The words, of three letters or more, whose embeddings a model's file holds: those that it was pre-trained with.

    A word of several tokens is none of them.
    """
    model: Any = bundle.model
    tokenizer: Any = bundle.tokenizer
    known = model.token_embedding.weight.detach().abs().sum(1).nonzero()[:, 0].tolist()
    texts = [tokenizer.decoder[row] for row in known]
    whole = [text.removesuffix("</w>") for text in texts if text.endswith("</w>")]
    return tuple(word for word in whole if len(word) > 2 and word.isascii() and word.isalpha())


class Vocabulary:
    """Tokens (N, L) of captions as indices into `rows` (V,), the sorted ids of all tokens that `texts` use."""

    def __init__(self, texts: Sequence[str], config: Mapping[str, Any]) -> None:
        self.tokenizer = _tokenizer(config["model_cfg"]["text_cfg"]["context_length"])
        special = (0, self.tokenizer.sot_token_id, self.tokenizer.eot_token_id)
        used = {token for text in texts for token in self.tokenizer.encode(text)}
        self.rows = torch.tensor(sorted(used.union(special)))
        self._known: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        from robustft.clip.prompts import tokenize

        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if new:
            tokens = tokenize(self.tokenizer, new)
            indices = torch.searchsorted(self.rows, tokens).clamp_(max=len(self.rows) - 1)
            if not torch.equal(self.rows[indices], tokens):
                raise ValueError(f"a caption among {new} has a token outside this world's vocabulary")
            self._known.update(zip(new, indices, strict=True))
        return torch.stack([self._known[caption] for caption in captions])


def optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, with decay of matrices alone: neither of embeddings nor of gains and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """The state of a pre-training, for `read_state`."""
    import io

    from robustft.files import write_file

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_file(path, buffer.getvalue())


def read_state(path: Path) -> dict[str, Any] | None:
    """What `write_state` wrote, None where there is no such file; ValueError for a damaged one."""
    import pickle

    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: truncated, or no state of a pre-training: {error!r:.200}") from error
    return state
