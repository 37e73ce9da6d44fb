"""A CLIP of open_clip as a folder that Hugging Face's transformers reads: CLIPModel and CLIPProcessor.

    theta' = the weights under transformers' names, in_proj (3D, D) cut into q, k, v, projections transposed
    folder = config.json, model.safetensors, preprocessor_config.json, tokenizer.json and what goes with these

transformers has one such architecture: OpenAI's, a ViT and a causal text transformer with GELU or QuickGELU. Whether a
model is of it, is told by building that one from the numbers in the model's configuration, and comparing the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustft.clip.encoding import encode_images, encode_texts, unwrap
from robustft.clip.exporting import check_described
from robustft.clip.library import import_open_clip
from robustft.files import write_tensors
from robustft.ops.kinds import checked

# Numbers of open_clip's configuration that transformers' model has too. Whatever else one says makes another model.
_VISION = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")
_TEXT = ("context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio")
_RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # as PIL numbers them
_START, _END = "<|startoftext|>", "<|endoftext|>"
_PLACES = {
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
_WITHIN = {".attn.": ".self_attn.", ".ln_": ".layer_norm", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}
_TRANSPOSED = ("visual.proj", "text_projection")


def import_transformers() -> ModuleType:
    """The transformers module; ImportError naming the extra where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "transformers is not installed: pip install 'robustft[transformers]'", name="transformers"
        ) from error
    return transformers


@checked
def write_transformers(
    model: nn.Module, folder: Path, config: Mapping[str, Any], tokenizer: Any, classes: Sequence[str] = ()
) -> None:
    """Writes a model, its image transform and its tokenizer into a folder, for transformers' `from_pretrained`.

    config: a `Bundle`'s, describing this model. classes: names that `config.id2label` then has. ValueError for an
    architecture, a transform or a tokenizer that transformers' CLIP has not; ImportError without transformers.
    """
    model = unwrap(model)
    settings, transform = _settings(model, config), _preprocessing(config["preprocess_cfg"])
    words = _Words.of(tokenizer)
    transformers = import_transformers()
    if classes:
        settings["id2label"] = dict(enumerate(classes))
        settings["label2id"] = {name: label for label, name in enumerate(classes)}
    transformers.CLIPConfig(**settings, architectures=["CLIPModel"]).save_pretrained(folder)
    write_tensors(folder / "model.safetensors", _renamed(model.state_dict()), {"format": "pt"})
    transformers.CLIPProcessor(
        image_processor=transformers.CLIPImageProcessor(**transform),
        tokenizer=transformers.CLIPTokenizer(**words._asdict(), model_max_length=model.context_length),
    ).save_pretrained(folder)


@torch.no_grad()
@checked
def differences(
    model: nn.Module, folder: Path, images: Tensor, captions: Sequence[str], tokenizer: Any
) -> tuple[float, Tensor]:
    """The largest difference of unit features of images (N, C, H, W) and captions between a model and what transformers
    reads from a folder; and that one's image features (N, D). ValueError where the captions' tokens differ."""
    transformers = import_transformers()
    with _quiet(transformers):
        theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    tokens = tokenizer(list(captions))
    found = processor(text=list(captions), return_tensors="pt", padding=True, truncation=True)
    for caption, ours, other in zip(captions, tokens, found["input_ids"], strict=True):
        end = int(ours.argmax()) + 1
        if not torch.equal(ours[:end], other[:end]):
            raise ValueError(f"transformers reads {caption!r} as other tokens than the run's tokenizer")
    outputs = theirs(pixel_values=images, **found)
    pairs = (
        (encode_images(model, images), outputs.image_embeds),
        (encode_texts(model, tokens), outputs.text_embeds),
    )
    return max(float((ours - other).abs().max()) for ours, other in pairs), outputs.image_embeds


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without a bar for the weights that are loaded."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


def processed(folder: Path, images: Sequence[Any]) -> Tensor:
    """What the folder's processor makes of PIL images, (N, C, H, W)."""
    pixels: Tensor = import_transformers().CLIPProcessor.from_pretrained(folder)(
        images=list(images), return_tensors="pt"
    )["pixel_values"]
    return pixels


def _settings(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' configuration of a model; ValueError where it has none of the kind."""
    given = config["model_cfg"]
    vision, text = given.get("vision_cfg", {}), given.get("text_cfg", {})
    plain = {
        "embed_dim": given.get("embed_dim"),
        "quick_gelu": bool(given.get("quick_gelu", False)),
        "vision_cfg": {name: vision[name] for name in _VISION if name in vision},
        "text_cfg": {name: text[name] for name in _TEXT if name in text},
    }
    try:
        if type(model).__name__ != "CLIP" or type(getattr(model, "visual", None)).__name__ != "VisionTransformer":
            raise ValueError(
                f"it is a {type(model).__name__} whose image tower is a {type(getattr(model, 'visual', None)).__name__}"
            )
        check_described(model, {"model_cfg": plain, "preprocess_cfg": config["preprocess_cfg"]})
        (height, width), (patch, patch_width) = model.visual.image_size, model.visual.patch_size
        if height != width or patch != patch_width:
            raise ValueError(f"its images are {height} x {width}, in patches of {patch} x {patch_width}")
    except ValueError as error:
        raise ValueError(
            "transformers' CLIPModel computes what OpenAI's CLIP with a ViT does, and this model computes something "
            f"else: {error}. Export it to open_clip, torch-export or onnx"
        ) from error
    activation = "quick_gelu" if plain["quick_gelu"] else "gelu"
    size = plain["embed_dim"]

    def tower(blocks: Any) -> dict[str, Any]:
        first = blocks[0]
        return {
            "hidden_size": first.ln_1.normalized_shape[0],
            "intermediate_size": first.mlp.c_fc.out_features,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": first.attn.num_heads,
            "layer_norm_eps": first.ln_1.eps,
            "hidden_act": activation,
            "projection_dim": size,
        }

    words = model.vocab_size
    special = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    return {
        "projection_dim": size,
        "vision_config": {
            **tower(model.visual.transformer.resblocks),
            "image_size": height,
            "patch_size": patch,
        },
        "text_config": {
            **tower(model.transformer.resblocks),
            "vocab_size": words,
            "max_position_embeddings": model.context_length,
            **special,
        },
    }


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "attn_mask":
            continue
        place = next(place for place in _PLACES if name == place or (place.endswith(".") and name.startswith(place)))
        target = _PLACES[place] + name.removeprefix(place)
        for ours, theirs in _WITHIN.items():
            target = target.replace(ours, theirs)
        if ".in_proj_" in target:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                found[target.replace(".in_proj_", f".{part}_proj.")] = chunk.contiguous()
        else:
            found[target] = (value.T if name in _TRANSPOSED else value).contiguous()
    return found


def _preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The image processor's settings of open_clip's."""
    mode, size = config.get("resize_mode", "shortest"), config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    found = {
        "resample": _RESAMPLE.get(config.get("interpolation", "bicubic")),
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
        "do_center_crop": mode == "shortest",
        "crop_size": {"height": height, "width": width},
        "size": {"shortest_edge": height} if mode == "shortest" else {"height": height, "width": width},
    }
    if mode not in ("shortest", "squash") or found["resample"] is None:
        raise ValueError(
            f"transformers' CLIP processor does not resize images as this model's transform: {mode}, "
            f"{config.get('interpolation')}. Export it to open_clip, torch-export or onnx"
        )
    return found


class _Words(NamedTuple):
    """CLIP's own tokens and merges, from open_clip's tables."""

    vocab: dict[str, int]
    merges: list[tuple[str, ...]]

    @classmethod
    def of(cls, tokenizer: Any) -> _Words:
        if not isinstance(tokenizer, import_open_clip().SimpleTokenizer):
            raise ValueError(
                f"transformers' CLIP has OpenAI's tokenizer, and this model a {type(tokenizer).__name__}. Export it to "
                "open_clip, torch-export or onnx"
            )
        special = dict(zip(tokenizer.all_special_ids, (_START, _END), strict=False))
        vocab = {special.get(number, word): number for word, number in tokenizer.encoder.items()}
        return cls(vocab, [tuple(pair) for pair in tokenizer.bpe_ranks])
