"""A model of open_clip's as a folder that Hugging Face's transformers reads: CLIPModel or SiglipModel, and processor.

    theta' = the weights under transformers' names (`from_transformers`)
    folder = config.json, model.safetensors, and the files of the image processor and the tokenizer

transformers has two such architectures: OpenAI's, a ViT and a causal text transformer with GELU or QuickGELU, and
SigLIP's. Whether a model is of one of them, is told by building that one from the numbers in the model, and comparing
the two.
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
from robustft.clip.from_transformers import RESAMPLE, activation, is_siglip, model_settings, to_theirs, vocabulary
from robustft.clip.library import import_open_clip
from robustft.files import write_tensors
from robustft.ops.kinds import checked

# Numbers of open_clip's configuration that transformers' model has too. Whatever else one says makes another model.
_VISION = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")
_TEXT = ("context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio")


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
    state = model.state_dict()
    siglip = is_siglip(state)
    settings = _siglip_settings(model, config) if siglip else _settings(model, config)
    transform = _preprocessing(config["preprocess_cfg"])
    words = None if callable(getattr(tokenizer, "save_pretrained", None)) else _Words.of(tokenizer)
    transformers = import_transformers()
    if classes:
        settings["id2label"] = dict(enumerate(classes))
        settings["label2id"] = {name: label for label, name in enumerate(classes)}
    name = "Siglip" if siglip else "CLIP"
    described = getattr(transformers, f"{name}Config")(**settings, architectures=[f"{name}Model"])
    described.save_pretrained(folder)
    write_tensors(folder / "model.safetensors", to_theirs(state), {"format": "pt"})
    if siglip:
        transform = {key: value for key, value in transform.items() if key not in ("do_center_crop", "crop_size")}
    images = getattr(transformers, f"{name}ImageProcessor")(**transform)
    if words is None:
        images.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        length = model.context_length
        own = transformers.CLIPTokenizer(**words._asdict(), model_max_length=length)
        transformers.CLIPProcessor(image_processor=images, tokenizer=own).save_pretrained(folder)


@torch.no_grad()
@checked
def differences(
    model: nn.Module, folder: Path, images: Tensor, captions: Sequence[str], tokenizer: Any
) -> tuple[float, Tensor]:
    """The largest difference of unit features of images (N, C, H, W) and captions between a model and what transformers
    reads from a folder; and that one's image features (N, D). ValueError where the captions' tokens differ."""
    transformers = import_transformers()
    with _quiet(transformers):
        theirs = transformers.AutoModel.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(list(captions))
    siglip = theirs.config.model_type == "siglip"  # whose text tower reads all places, and pools at the last one
    padding = {"padding": "max_length", "max_length": tokens.shape[1]} if siglip else {"padding": True}
    found = words(list(captions), return_tensors="pt", truncation=True, **padding)
    for caption, ours, other in zip(captions, tokens, found["input_ids"], strict=True):
        end = len(ours) if siglip else int(ours.argmax()) + 1
        if not torch.equal(ours[:end], other[:end]):
            raise ValueError(f"transformers reads {caption!r} as other tokens than the run's tokenizer")
    outputs = theirs(pixel_values=images, input_ids=found["input_ids"])  # neither masks the padding
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
    pixels: Tensor = import_transformers().AutoImageProcessor.from_pretrained(folder)(
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


def _siglip_settings(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' configuration of a SigLIP model; ValueError where it has none of the kind."""
    trunk, text = model.visual.trunk, model.text
    first, block = trunk.blocks[0], text.transformer.resblocks[0]
    vision_config = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": first.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": first.attn.num_heads,
        "layer_norm_eps": trunk.norm.eps,
        "hidden_act": activation(first.mlp.act),
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
    }
    text_config = {
        "hidden_size": block.ln_1.normalized_shape[0],
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(text.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": block.ln_1.eps,
        "hidden_act": activation(block.mlp.gelu),
        "projection_size": text.text_projection.out_features,
        "vocab_size": text.token_embedding.num_embeddings,
        "max_position_embeddings": text.context_length,
    }
    settings: dict[str, Any] = {"vision_config": vision_config, "text_config": text_config}
    try:
        described = model_settings({"model_type": "siglip", **settings})
        check_described(model, {"model_cfg": described, "preprocess_cfg": config["preprocess_cfg"]})
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"transformers' SiglipModel computes something else than this model: {error}. Export it to open_clip, "
            "torch-export or onnx"
        ) from error
    ends = {name: None for name in ("bos_token_id", "eos_token_id")}  # which the model does not look at
    return settings | {"text_config": text_config | ends}


def _preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The image processor's settings of open_clip's."""
    mode, size = config.get("resize_mode", "shortest"), config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    found = {
        "resample": RESAMPLE.get(config.get("interpolation", "bicubic")),
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
        return cls(vocabulary(tokenizer), [tuple(pair) for pair in tokenizer.bpe_ranks])
