"""A folder that transformers' CLIPModel or SiglipModel saved, as a model of open_clip's; and the names of its weights.

    folder = config.json, model.safetensors, and preprocessor_config.json and the tokenizer's files where they are
    theta  = the weights under open_clip's names: q, k, v joined into in_proj (3D, D), CLIP's projections transposed

open_clip has CLIP's towers as its own, and SigLIP's image tower from timm, where some of the published sizes have
another GELU than transformers computes with. Such a tower, and one of another size, is timm's ViT under a name that
tells its numbers, vit_siglip_w768_..., which timm knows once robustft has loaded or built it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustft.clip.library import import_open_clip
from robustft.clip.messages import few
from robustft.files import read_json, read_tensors

THEIR_CONFIG = "config.json"
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # as PIL numbers them
TANH = "gelu_pytorch_tanh"
_ACTIVATIONS = ("quick_gelu", "gelu", TANH)
_DEFAULTS = {  # of their image processors
    "clip": {
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
        "do_center_crop": True,
    },
    "siglip": {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5), "do_center_crop": False},
}

# open_clip's names, of which one that ends in a dot is a beginning, and theirs.
_BLOCK = {".attn.": ".self_attn.", ".ln_": ".layer_norm", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}
_TIMM_BLOCK = {".attn.qkv.": ".attn.in_proj_", ".attn.proj.": ".attn.out_proj.", ".norm": ".ln_"}
_CLIP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "logit_scale": "logit_scale",
}
_SIGLIP = {
    "visual.trunk.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "visual.trunk.norm.": "vision_model.post_layernorm.",
    "visual.trunk.blocks.": "vision_model.encoder.layers.",
    "visual.trunk.attn_pool.latent": "vision_model.head.probe",
    "visual.trunk.attn_pool.q.": "vision_model.head.attention.in_proj_",
    "visual.trunk.attn_pool.kv.": "vision_model.head.attention.in_proj_",
    "visual.trunk.attn_pool.proj.": "vision_model.head.attention.out_proj.",
    "visual.trunk.attn_pool.norm.": "vision_model.head.layernorm.",
    "visual.trunk.attn_pool.mlp.": "vision_model.head.mlp.",
    "text.token_embedding.": "text_model.embeddings.token_embedding.",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final.": "text_model.final_layer_norm.",
    "text.text_projection.": "text_model.head.",
    "text.transformer.resblocks.": "text_model.encoder.layers.",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_POOL = "visual.trunk.attn_pool."


def is_transformers(folder: Path) -> bool:
    """Whether a folder is one that transformers saved."""
    return (folder / THEIR_CONFIG).is_file() and not (folder / "open_clip_config.json").is_file()


def is_siglip(state: Mapping[str, Any]) -> bool:
    """Whether a model's state is of SigLIP's towers as open_clip has them."""
    return f"{_POOL}latent" in state and "logit_bias" in state


def to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names; StopIteration for a model that is neither of the two."""
    siglip = is_siglip(state)
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.rpartition(".")[2] == "attn_mask":
            continue
        target = _target(name, siglip)
        if target in found:  # k and v of the pool, after q
            found[target] = torch.cat([found[target], value])
        elif ".self_attn.in_proj_" in target:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                found[target.replace(".in_proj_", f".{part}_proj.")] = chunk.contiguous()
        else:
            found[target] = (value.T if name in _TRANSPOSED else value).contiguous()
    if siglip:
        place = _SIGLIP["visual.trunk.pos_embed"]
        found |= {place: found[place][0], **{name: found[name].reshape(1) for name in ("logit_scale", "logit_bias")}}
    return found


def _target(name: str, siglip: bool) -> str:
    """transformers' name of a weight, with q, k and v in one."""
    places = _SIGLIP if siglip else _CLIP
    place = next(place for place in places if name == place or (place.endswith(".") and name.startswith(place)))
    rest = name.removeprefix(place)
    if ".blocks." in place:
        for timm, ours in _TIMM_BLOCK.items():
            rest = rest.replace(timm, ours)
    target = places[place] + rest
    if ".encoder." in target:
        for ours, theirs in _BLOCK.items():
            target = target.replace(ours, theirs)
    return target


def to_ours(theirs: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights as the state of a model whose state is `like`; ValueError for others than these."""
    siglip = is_siglip(like)
    left, found = dict(theirs), {}
    missing: list[str] = []
    width = like[f"{_POOL}latent"].shape[-1] if siglip else 0
    for name, value in like.items():
        if name.rpartition(".")[2] == "attn_mask":
            found[name] = value
            continue
        target = _target(name, siglip)
        parts = [target]
        if ".self_attn.in_proj_" in target:
            parts = [target.replace(".in_proj_", f".{part}_proj.") for part in "qkv"]
        given = [theirs.get(part) for part in parts]
        for part in parts:
            left.pop(part, None)
        if any(part is None for part in given):
            missing += [part for part in parts if part not in theirs]
            continue
        joined = torch.cat([part for part in given if part is not None]) if len(given) > 1 else theirs[target]
        if name.startswith((f"{_POOL}q.", f"{_POOL}kv.")):
            joined = joined[:width] if name.startswith(f"{_POOL}q.") else joined[width:]
        if name in _TRANSPOSED:
            joined = joined.T
        if joined.numel() != value.numel() or (joined.ndim == value.ndim and joined.shape != value.shape):
            raise ValueError(f"{target} is {tuple(joined.shape)}, expected {tuple(value.shape)}")
        found[name] = joined.reshape(value.shape)
    unknown = [name for name in left if not name.endswith("position_ids")]
    if missing or unknown:
        raise ValueError("; ".join(filter(None, (few(missing, "weights missing"), few(unknown, "weights unknown")))))
    return found


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a folder as the state of the model that `read_settings` describes.

    ValueError, naming the file, for weights that are damaged or of another model; FileNotFoundError without any.
    """
    path = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if not path.is_file() and not index.is_file():
        raise FileNotFoundError(f"{path}: no such file; transformers' save_pretrained writes it")
    try:
        files = [path]
        if not path.is_file():
            files = [folder / name for name in sorted(set(read_json(index, "a weight_map")["weight_map"].values()))]
        weights = {name: value for file in files for name, value in read_tensors(file).items()}
        return to_ours(weights, model.state_dict())
    except (MemoryError, FileNotFoundError):
        raise
    except Exception as error:  # whatever safetensors and torch raise for damaged files
        raise ValueError(f"{path}: damaged, or no weights of this model: {error!r:.300}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """open_clip's configuration {"model_cfg", "preprocess_cfg"} of a folder's model.

    ValueError, naming the file, for models that open_clip has not, and for images prepared as it does not.
    """
    path = folder / THEIR_CONFIG
    given = read_json(path, "a configuration of transformers")
    try:
        model_cfg = model_settings(given)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: damaged: {error!r:.200}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if (words := _vocabulary_in(folder)) is not None and words != vocabulary(import_open_clip().SimpleTokenizer()):
        model_cfg["text_cfg"]["hf_tokenizer_name"] = str(folder.resolve())
    return {"model_cfg": model_cfg, "preprocess_cfg": _preprocessing(folder, given)}


def vocabulary(tokenizer: Any) -> dict[str, int]:
    """The tokens of open_clip's `SimpleTokenizer`, as transformers calls them."""
    special = dict(zip(tokenizer.all_special_ids, ("<|startoftext|>", "<|endoftext|>"), strict=False))
    return {special.get(number, word): number for word, number in tokenizer.encoder.items()}


def _vocabulary_in(folder: Path) -> dict[str, int] | None:
    """The tokens of a folder's tokenizer, {} of one that has no such file for them, None where there is none."""
    for name, wanted in (("tokenizer.json", "an object with 'model'"), ("vocab.json", "tokens by number")):
        if (path := folder / name).is_file():
            found = read_json(path, wanted)
            found = (found.get("model") or {}).get("vocab") if name == "tokenizer.json" else found
            return found if isinstance(found, dict) else {}
    return {} if any(folder.glob("*.model")) or (folder / "tokenizer_config.json").is_file() else None


def model_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's `model_cfg` of transformers' configuration; ValueError for a model that open_clip has not."""
    kind = given.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ValueError(f"model_type is {kind!r}; expected clip or siglip, of a CLIPModel or SiglipModel")
    siglip = kind == "siglip"
    # What a file leaves out is its class's default.
    vision = _VISION_DEFAULTS[kind] | dict(given.get("vision_config") or {})
    text = _TEXT_DEFAULTS[kind] | dict(given.get("text_config") or {})
    for part, settings in (("vision_config", vision), ("text_config", text)):
        if settings["hidden_act"] not in _ACTIVATIONS:
            raise ValueError(f"{part}: hidden_act is {settings['hidden_act']!r}, expected {', '.join(_ACTIVATIONS)}")
    if vision.get("num_channels", 3) != 3:
        raise ValueError(f"vision_config: num_channels is {vision['num_channels']}, expected 3")
    texts: dict[str, Any] = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        **_ratio(text),
        **_norm(text),
        **_act(text),
    }
    if siglip:
        size = text.get("projection_size") or text["hidden_size"]
        if not vision.get("vision_use_head", True) or size != vision["hidden_size"]:
            raise ValueError("vision_config: expected a pooling head, and a width of projection_size")
        if "quick_gelu" in (vision["hidden_act"], text["hidden_act"]):
            raise ValueError("hidden_act is quick_gelu, expected a GELU for siglip")
        images = {
            "image_size": vision["image_size"],
            "timm_model_name": _tower(vision),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
        texts |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        return {
            "embed_dim": size,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": images,
            "text_cfg": texts,
        }
    quick = {settings["hidden_act"] == "quick_gelu" for settings in (vision, text)}
    if len(quick) > 1:
        raise ValueError("hidden_act is quick_gelu in one tower alone, and open_clip has it in both or none")
    if (end := text["eos_token_id"]) not in (2, text["vocab_size"] - 1):  # 2: an older mark of "the largest"
        texts |= {"pool_type": "eos", "eos_id": end}
    return {
        "embed_dim": given.get("projection_dim", 512),
        **({"quick_gelu": True} if quick == {True} else {}),
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_ratio(vision),
            **_norm(vision),
            **_act(vision),
        },
        "text_cfg": texts,
    }


_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
_VISION_DEFAULTS["siglip"] = _VISION_DEFAULTS["clip"] | {"patch_size": 16, "hidden_act": TANH, "layer_norm_eps": 1e-6}
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    },
}
_TEXT_DEFAULTS["siglip"] = _VISION_DEFAULTS["siglip"] | {"vocab_size": 32000, "max_position_embeddings": 64}


def _ratio(settings: Mapping[str, Any]) -> dict[str, float]:
    """The MLP's width as a multiple of the tower's, of which open_clip takes the integer below."""
    inner, width = settings["intermediate_size"], settings["hidden_size"]
    return {"mlp_ratio": inner / width if int(width * (inner / width)) == inner else (inner + 0.5) / width}


def _norm(settings: Mapping[str, Any]) -> dict[str, Any]:
    eps = settings["layer_norm_eps"]
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}


def _act(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"act_kwargs": {"approximate": "tanh"}} if settings["hidden_act"] == TANH else {}


def _preprocessing(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` of a folder's image processor, or of its class's own settings without one."""
    path = folder / "preprocessor_config.json"
    found: Any = {}
    if path.is_file():
        found = read_json(path, "an image processor's settings")
    elif (path := folder / "processor_config.json").is_file():
        found = read_json(path, "a processor's settings").get("image_processor") or {}
    found = _DEFAULTS[given["model_type"]] | {"resample": 3} | found
    default = _VISION_DEFAULTS[given["model_type"]]["image_size"]
    size = (given.get("vision_config") or {}).get("image_size", default)
    resized, cropped = found.get("size") or size, found.get("crop_size") or size
    names = {number: name for name, number in RESAMPLE.items()}
    crop = found["do_center_crop"]
    edge = resized.get("shortest_edge") if isinstance(resized, Mapping) else resized
    wanted = {"height": size, "width": size}
    shortest = crop and edge == size and cropped in (size, wanted)
    squash = not crop and resized in (size, wanted)
    if not (shortest or squash) or found["resample"] not in names or not found.get("do_rescale", True):
        raise ValueError(
            f"{path}: open_clip does not prepare images so for a model of {size} x {size}: size {resized}, crop_size "
            f"{cropped}, do_center_crop {crop}, resample {found['resample']}"
        )
    normal = found.get("do_normalize", True)
    return {
        "size": [size, size],
        "mode": "RGB",
        "mean": list(found["image_mean"]) if normal else [0.0] * 3,
        "std": list(found["image_std"]) if normal else [1.0] * 3,
        "interpolation": names[found["resample"]],
        "resize_mode": "shortest" if shortest else "squash",
        "fill_color": 0,
    }


# --- SigLIP's image tower ---------------------------------------------------------------------------------------------

_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
_NAME = re.compile(r"vit_siglip_w(\d+)_l(\d+)_h(\d+)_m(\d+)_p(\d+)_i(\d+)_(gelu|tanh)_e(\d+)")


def _tower(vision: Mapping[str, Any]) -> str:
    """timm's name of a tower: its own, where that computes the same, else one that tells the numbers."""
    import timm

    numbers = tuple(
        vision[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    )
    tanh = vision["hidden_act"] == TANH
    for size, published in _SIZES.items():
        name = f"vit_{size}_patch{vision['patch_size']}_siglip_{vision['image_size']}"
        if published == numbers and timm.is_model(name) and vision["layer_norm_eps"] == 1e-6:
            with torch.device("meta"):
                trunk: Any = timm.create_model(name, pretrained=False)
            if activation(trunk.blocks[0].mlp.act) == vision["hidden_act"]:
                return name
    width, layers, heads, inner = numbers
    places = f"p{vision['patch_size']}_i{vision['image_size']}_{'tanh' if tanh else 'gelu'}"
    name = f"vit_siglip_w{width}_l{layers}_h{heads}_m{inner}_{places}_e{round(vision['layer_norm_eps'] * 1e9)}"
    register(name)
    return name


def activation(module: nn.Module) -> str:
    """transformers' name of a GELU."""
    return TANH if type(module).__name__ == "GELUTanh" or getattr(module, "approximate", "none") == "tanh" else "gelu"


def register(name: str | None) -> None:
    """Tells timm the tower of a name that tells its numbers; any other name is left to timm."""
    if name is None or (found := _NAME.fullmatch(name)) is None:
        return
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if timm.is_model(name):
        return
    width, layers, heads, inner, patch, size, act, eps = found.groups()

    def tower(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        settings: dict[str, Any] = {
            "img_size": int(size),
            "patch_size": int(patch),
            "embed_dim": int(width),
            "depth": int(layers),
            "num_heads": int(heads),
            "mlp_ratio": (int(inner) + 0.5) / int(width),
            "class_token": False,
            "global_pool": "map",
            "act_layer": "gelu_tanh" if act == "tanh" else "gelu",
            "norm_layer": functools.partial(nn.LayerNorm, eps=int(eps) / 1e9),
        }
        made: nn.Module = VisionTransformer(**settings | options)
        return made

    tower.__name__ = name
    timm.models.register_model(tower)
