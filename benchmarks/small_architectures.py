"""Every architecture that open_clip lists, from its own configuration with few layers and narrow ones.

    config = shrunk("ViT-B-16-SigLIP2", folder)          # {"model_cfg": ..., "preprocess_cfg": ...}, as of a Bundle
    tokenizer = letters(config)                          # of single letters, laid out as the model's texts are
    structure(model)                                     # equal for architectures that differ in numbers alone

What the configuration says beyond sizes stays: kinds of blocks, pooling, projections, masks, biases, activations. A
tower of timm's becomes the same entry of timm's, called with few layers, under a name of its own, "small_..."; a text
tower of Hugging Face's becomes one of the same type, whose configuration lies in `folder`. Nothing needs the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustft.clip.computation import settings
from robustft.clip.library import import_open_clip
from robustft.files import write_json

WIDTH, VOCABULARY, CONTEXT = 16, 64, 20
HUGGING_FACE = {  # by what its name has in it: the type of the text tower, and its sizes
    "mt5": ("mt5", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}),
    "nllb": (
        "m2m_100",
        {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
        | {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_position_embeddings": 40},
    ),
    "xlm-roberta": ("xlm-roberta", {}),
    "roberta": ("roberta", {}),
}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT |= {"max_position_embeddings": 40}


def names() -> list[str]:
    """All that open_clip lists."""
    found: list[str] = import_open_clip().list_models()
    return found


def shrunk(name: str, folder: str | Path, *, vocabulary: int = VOCABULARY, context: int = CONTEXT) -> dict[str, Any]:
    """The configuration of an architecture, small. folder: where that of a text tower of Hugging Face's is put."""
    config: dict[str, Any] = import_open_clip().get_model_config(name)
    config["embed_dim"] = WIDTH
    config["vision_cfg"] |= _vision(config["vision_cfg"])
    text = config["text_cfg"]
    text |= {"width": WIDTH, "heads": 2, "layers": 2, "context_length": context, "vocab_size": vocabulary}
    if "hf_model_name" in text:
        text["hf_model_name"] = str(_hugging_face(text["hf_model_name"], Path(folder), vocabulary))
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": WIDTH, "heads": 2, "layers": 1, "context_length": context}
        config["multimodal_cfg"] |= {"vocab_size": vocabulary, "attn_pooler_heads": 2, "n_queries": 4}
    return {"model_cfg": config, "preprocess_cfg": {}}


def structure(model: nn.Module) -> str:
    """What a small model is made of, without its numbers: architectures of one are built alike."""
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    told = {place: value for place, value in settings(model).items() if isinstance(value, (bool, str))}
    parameters = [name for name, _ in model.named_parameters()]
    return hashlib.sha256(repr((modules, sorted(told.items()), parameters)).encode()).hexdigest()


def towers(model: Any) -> dict[str, str]:
    """What the two towers of a model are, in a word or two."""
    trunk = getattr(model.visual, "trunk", None)
    image = type(model.visual).__name__ if trunk is None else f"timm {type(trunk).__name__}"
    text = getattr(model, "text", None)
    kind = getattr(getattr(text, "config", None), "model_type", None)
    name = "TextTransformer" if text is None else type(text).__name__
    bias = ", with a bias" if model.logit_bias is not None else ""
    return {"image": image, "text": (f"Hugging Face {kind}" if kind else name) + bias}


def letters(config: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    """A tokenizer of single letters: one in front, the letters, one that ends the text, padding."""
    text = config["model_cfg"]["text_cfg"]
    opening, closing, padding = _layout(text)
    length, first = text["context_length"], 8

    def tokenize(texts: list[str]) -> Tensor:
        rows = [opening + [first + ord(letter) % 50 for letter in words][: length - 2] + closing for words in texts]
        return torch.tensor([row + [padding] * (length - len(row)) for row in rows])

    return tokenize


def _layout(text: Mapping[str, Any]) -> tuple[list[int], list[int], int]:
    """Tokens in front of a text, at its end, and after it."""
    if "hf_model_name" in text:
        return ([], [1], 0) if text["hf_model_name"].endswith("mt5") else ([0], [2], 1)
    match text.get("pool_type", "argmax"):
        case "eos":
            return [3], [text["eos_id"]], 0
        case "last":
            return [], [1], 1
        case _:
            return [60], [63], 0


def _vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a vision_cfg that make it small."""
    if "timm_model_name" in vision:
        return _timm(vision["timm_model_name"])
    if isinstance(vision["layers"], list):
        return {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 16}
    small = {"image_size": 8, "patch_size": 4, "width": WIDTH, "head_width": 8, "layers": 2}
    return small | {key: 2 for key in ("attn_pooler_heads",) if key in vision}


_SIZES: dict[str, tuple[int, dict[str, Any]]] = {  # by family: the side of images, and timm's arguments
    "vitamin": (32, {"embed_dim": 16, "depth": 2, "num_heads": 2}),
    "vit_base_mci": (32, {"embed_dim": 16, "depth": 2, "num_heads": 2}),
    "vit_pe": (8, {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "attn_pool_num_heads": 2}),
    "eva": (8, {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}),
    "vit": (8, {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}),
    "convnext": (32, {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 16)}),
    "swin": (32, {"embed_dim": 4, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}),
    "fastvit": (64, {}),
}


def _family(name: str) -> str:
    return next(family for family in _SIZES if name.removeprefix("small_").startswith(family))


def _timm(name: str) -> dict[str, Any]:
    """The entries of a vision_cfg whose tower is timm's entry of this name, small."""
    side, _ = _SIZES[_family(name)]
    return {"timm_model_name": _registered(name), "image_size": side}


@cache
def _registered(name: str) -> str:
    """The name under which timm now has a small form of its entry `name`."""
    from timm.models import model_entrypoint, register_model

    entry = _mobileclip_b if name.startswith("vit_base_mci") else model_entrypoint(name)
    made = _made(name)

    def small(pretrained: bool = False, **options: Any) -> Any:
        return entry(pretrained=False, **{**options, **made})

    small.__name__, small.__module__ = f"small_{name}", __name__
    register_model(small)
    return small.__name__


@cache
def _made(name: str) -> dict[str, Any]:
    """With what arguments timm's entry is called."""
    family = _family(name)
    side, options = _SIZES[family]
    match family:
        case "vitamin":
            from timm.models.vitamin import VitCfg, VitConvCfg

            convolutions = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
            stages = VitCfg(embed_dim=(8, 8, 16), depths=(1, 1, 1), stem_width=8, conv_cfg=convolutions)
            return options | {"img_size": side, "embed_cfg": stages}
        case "fastvit":
            five = name.endswith(("mci3", "mci4"))
            return {"layers": (1,) * (4 + five), "embed_dims": (8, 8, 8, 32, *[32] * five)}
        case "convnext":
            return options
        case "vit_pe":
            return options | {"img_size": side, "ref_feat_shape": (2, 2)}
        case _:
            return options | {"img_size": side}


def _mobileclip_b(pretrained: bool, **options: Any) -> Any:
    """timm's `vit_base_mci_224`, whose stem has the published width whatever it is called with."""
    from timm.models.vision_transformer_hybrid import ConvStem, _create_vision_transformer_hybrid

    stem = ConvStem(channels=(4, 4, 16), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=torch.nn.GELU)
    options = {"no_embed_class": True, **options}
    return _create_vision_transformer_hybrid(
        "vit_base_mci_224", backbone=stem, embed_args={"proj": False}, pretrained=pretrained, **options
    )


def _hugging_face(name: str, folder: Path, vocabulary: int) -> Path:
    """The folder with the configuration of a small text tower of the type of `name`."""
    kind, sizes = next(entry for word, entry in HUGGING_FACE.items() if word in name)
    place = folder / kind
    if not place.exists():
        place.mkdir(parents=True)
        write_json(place / "config.json", {"model_type": kind, **(sizes or BERT), "vocab_size": vocabulary})
    return place
