"""CLIP models of any open_clip architecture: load, encode, build heads from prompts, interpolate, export.

    u = normalise(f(x))                                          image features (N, D)
    l = normalise(value path of f's last attention)              patch features (N, P, D), `robustft.patches`
    v = normalise(g(t))                                          text features (M, D)
    w_c = normalise(mean_t normalise(g(template_t(name_c))))     class embeddings (K, D)
    z = s u w^T,  s = exp(model.logit_scale)                     zero-shot logits (N, K)
    theta = (1 - a) theta_zs + a theta_ft                        WiSE-FT weights

A model is used through `encode_image`, `encode_text` and `logit_scale` alone, never through `forward`, whose
output differs between open_clip's versions and settings. A `Bundle` carries the configuration its model was
built from, so that every model can be exported as a directory that open_clip itself loads: nothing (the
activation, the context length, the image statistics) is left to be guessed from a name.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import json
import logging
import os
import pickle
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from robustft import patches
from robustft.files import CALIBRATOR_FILE, DETECTOR_FILE
from robustft.prompts import Template, Tokenizer, captions, check_captions

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
CARD_FILE = "README.md"
CLASSIFIER_FILE = "classifier.safetensors"  # the head of a `methods.Classifier`; open_clip does not look at it
COMPANIONS = {CLASSIFIER_FILE, DETECTOR_FILE, CALIBRATOR_FILE}  # beside the weights, and replaced with them


class LocalFeatures(NamedTuple):
    """Image features (N, D) and the features of their patches (N, P, D)."""

    image_features: Tensor
    patch_features: Tensor


class Bundle(NamedTuple):
    model: nn.Module
    tokenizer: Tokenizer
    train_transform: Callable[[Any], Tensor]
    eval_transform: Callable[[Any], Tensor]
    config: dict[str, Any]  # {"model_cfg": ..., "preprocess_cfg": ...}, as in open_clip_config.json


# Loading


def load(
    name: str,
    pretrained: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
) -> Bundle:
    """An open_clip model in evaluation mode, with its tokenizer, transforms and configuration.

    name: an architecture ("ViT-B-32"), "hf-hub:org/repo" or "local-dir:/path".
    pretrained: one of an architecture's pretrained tags, or, for any name, a checkpoint file: safetensors, or
    a state dict (or open_clip training checkpoint) saved by torch. None means random weights for an
    architecture, and the weights stored there for the other names.

    A tag trained with QuickGELU builds QuickGELU whatever the name says, and `config` says what was built; a
    file does not tell, so fine-tunes of OpenAI's weights need the "-quickgelu" name. The network is used only
    for `hf-hub:` names, tags, and architectures whose text tower or tokenizer lives on the hub.

    Raises ValueError for an unknown name or tag and for a checkpoint that is truncated, pickled, or of
    another architecture; FileNotFoundError for a missing file; ImportError when open_clip is not installed.
    """
    open_clip = import_open_clip()
    config, checkpoint = _resolve(open_clip, name, pretrained, None if cache_dir is None else str(cache_dir))
    with tempfile.TemporaryDirectory() as folder, _without_random_weights_warning():
        # Building from the written configuration is the way an export is loaded, hence the same model.
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        model, train_transform, eval_transform = open_clip.create_model_and_transforms(
            f"local-dir:{folder}", load_weights=False, pretrained_text=False
        )
    config["preprocess_cfg"] = json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model)))
    if checkpoint is not None:
        _load_weights(open_clip, model, checkpoint)
    tokenizer_name = name if ":" in name else name.replace("/", "-")
    tokenizer = open_clip.get_tokenizer(tokenizer_name, cache_dir=cache_dir)
    model = model.to(device=device, dtype=dtype).eval()
    return Bundle(model, tokenizer, train_transform, eval_transform, config)


def import_open_clip() -> ModuleType:
    """The open_clip module; every import of it in this package goes through here.

    PyPI's torchvision cannot load its compiled operators under a CPU-only torch, and then fails to import
    because it describes two of them, `nms` and `qnms`, all the same. Declaring the two lets it import;
    open_clip uses neither. Raises ImportError, naming what to install, when open_clip is not installed.
    """
    try:
        import open_clip
    except RuntimeError as error:
        if torch.version.cuda is not None or "operator torchvision::nms does not exist" not in str(error):
            raise
        _declare_torchvision_operators()
        import open_clip
    except ModuleNotFoundError as error:
        if error.name != "open_clip":
            raise
        raise ImportError("open_clip is not installed: pip install open_clip_torch") from error
    return open_clip


@functools.cache  # the declarations live as long as the Library object
def _declare_torchvision_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _resolve(
    open_clip: ModuleType, name: str, pretrained: str | Path | None, cache_dir: str | None
) -> tuple[dict[str, Any], Path | None]:
    """The configuration of a named model and the file with its weights (None: random)."""
    from open_clip.pretrained import download_pretrained_from_hf
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    scheme, _, place = name.partition(":")
    if scheme == "local-dir":
        config = _read_config(Path(place) / CONFIG_FILE)
        return config, _existing(pretrained) if pretrained else _weights_in(Path(place))
    if scheme == "hf-hub":
        download = functools.partial(download_pretrained_from_hf, place, cache_dir=cache_dir)
        config = _read_config(Path(download(filename=CONFIG_FILE)))
        return config, _existing(pretrained) if pretrained else Path(download())

    architecture = name.replace("/", "-")
    known = {known.lower(): known for known in open_clip.list_models()}
    if architecture not in known.values():
        close = difflib.get_close_matches(architecture.lower(), known, n=3)
        hint = f"did you mean {' or '.join(known[match] for match in close)}?" if close else "see list_models()"
        if Path(name).is_dir():
            hint = f"for a directory write 'local-dir:{name}'"
        raise ValueError(f"name: open_clip has no architecture {name!r}; {hint}")
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": {}}
    if not pretrained:
        return config, None
    tag = open_clip.get_pretrained_cfg(architecture, str(pretrained))
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        return config, _existing(pretrained, f"no tag of {architecture}, which has {tags}")
    if tag.get("quick_gelu"):
        config["model_cfg"]["quick_gelu"] = True
    config["preprocess_cfg"] = merge_preprocess_dict(PreprocessCfg(), tag)
    return config, Path(open_clip.download_pretrained(tag, cache_dir=cache_dir))


def _existing(path: str | Path, otherwise: str = "") -> Path:
    path = Path(path)
    if path.is_file():
        return path
    message = f"pretrained: {str(path)!r} is no file" + (f" and {otherwise}" if otherwise else "")
    # A bare word was meant as a tag, anything with a suffix or a folder as a file.
    raise (FileNotFoundError if path.suffix or len(path.parts) > 1 or not otherwise else ValueError)(message)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an open_clip model directory holds {CONFIG_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ValueError(f"{path}: expected an object with 'model_cfg'")
    return {"model_cfg": config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg", {})}


def _weights_in(folder: Path) -> Path:
    def rank(path: Path) -> tuple[bool, bool, str]:
        return path.suffix != ".safetensors", "open_clip" not in path.name, path.name

    suffixes = {".safetensors", ".bin", ".pt", ".pth"}
    found = [path for path in folder.iterdir() if path.suffix in suffixes and path.name not in COMPANIONS]
    if not found:
        raise FileNotFoundError(f"{folder}: no weights; expected {WEIGHTS_FILE}")
    return min(found, key=rank)


def _load_weights(open_clip: ModuleType, model: nn.Module, path: Path) -> None:
    """Loads every weight of `model` from `path`, or raises ValueError; open_clip converts older layouts."""
    try:
        # strict=False returns the keys that do not match, which make a shorter message than its own.
        incompatible = open_clip.load_checkpoint(model, str(path), strict=False, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in text:
            raise ValueError(
                f"{path}: not a plain state dict. Pickled modules and TorchScript archives can run code when "
                "opened and are refused. If you trust the file, convert it once: torch.save(torch.load(path, "
                "weights_only=False).state_dict(), 'weights.pt'), with torch.jit.load(path) for an archive"
            ) from error
        if "size mismatch" in text:
            lines = [line.strip() for line in text.splitlines() if "size mismatch" in line]
            raise ValueError(f"{path}: does not fit the model: {_few(lines, 'mismatched shapes')}") from error
        raise ValueError(f"{path}: truncated, or no checkpoint of this model: {error!r:.300}") from error
    if incompatible and (incompatible.missing_keys or incompatible.unexpected_keys):
        keys = (
            _few(incompatible.missing_keys, "keys missing from the file"),
            _few(incompatible.unexpected_keys, "keys unknown to the model"),
        )
        raise ValueError(f"{path}: does not fit the model: {'; '.join(filter(None, keys))}")


@contextlib.contextmanager
def _without_random_weights_warning() -> Iterator[None]:
    """Hides open_clip's warnings that a model has no weights yet: they come after it is built."""

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not message.startswith(("No pretrained weights loaded", "Local config loaded, but no CLIP"))

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


# Encoding


def logit_scale(model: nn.Module) -> Tensor:
    """s = exp(model.logit_scale), a 0-d tensor in at least float32; the gradient reaches the parameter."""
    scale = getattr(model, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        raise ValueError(f"model: expected a logit_scale of one element, got {scale!r:.80}")
    return _at_least_float32(scale).exp().reshape(())


def encode_images(model: nn.Module, images: Tensor, *, normalize: bool = True) -> Tensor:
    """Image features (N, D) of transformed images (N, 3, H, W); the gradient reaches tower and images.

    images: floating point, on the model's device; cast to the tower's dtype. normalize: unit rows, computed
    and returned in at least float32, also under autocast; otherwise the features as the tower gives them.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images: expected (N, 3, H, W) floating point, as the transforms give, got "
            f"{tuple(images.shape)} {images.dtype}"
        )
    parameter = next(getattr(model, "visual", model).parameters(), images)
    features = _pooled(model.encode_image(images.to(parameter.dtype)))
    return F.normalize(_at_least_float32(features), dim=-1) if normalize else features


def encode_patches(model: nn.Module, images: Tensor, *, normalize: bool = True) -> Tensor:
    """Patch features (N, P, D) of transformed images, comparable with text features; gradients as in `encode_images`.

    P patches row by row: (H / patch)^2 for a ViT, (H / 32)^2 for a ModifiedResNet. They are the value path of the last
    attention, as in GL-MCM and LoCoOp (`robustft.patches` has the formulas). The model stays as it is. images,
    normalize: as in `encode_images`. Costs one pass and the last block once more: `encode_images_and_patches` gives
    the image features of that pass too. ValueError for towers without such patches (timm, Hugging Face, CoCa).
    """
    return encode_images_and_patches(model, images, normalize=normalize).patch_features


def encode_images_and_patches(model: nn.Module, images: Tensor, *, normalize: bool = True) -> LocalFeatures:
    """`encode_images` and `encode_patches` in one pass. Memory: N P D floats for the patches."""
    visual = unwrap(model).visual
    with patches.last_inputs(visual) as inputs:
        image_features = encode_images(model, images, normalize=normalize)
    patch_features = patches.local_features(visual, inputs[0])
    if normalize:
        patch_features = F.normalize(_at_least_float32(patch_features), dim=-1)
    return LocalFeatures(image_features, patch_features)


def encode_texts(model: nn.Module, tokens: Tensor, *, normalize: bool = True) -> Tensor:
    """Text features (M, D) of tokenised captions (M, L), with `normalize` as in `encode_images`."""
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens: expected (M, L) integers, got {tuple(tokens.shape)} {tokens.dtype}")
    features = _pooled(model.encode_text(tokens))
    return F.normalize(_at_least_float32(features), dim=-1) if normalize else features


def token_embedding(model: nn.Module) -> nn.Embedding:
    """The table (vocabulary, width) of token embeddings, of open_clip's own text tower.

    Found in `CLIP` and in `CustomTextCLIP`. ValueError for other towers, such as Hugging Face ones.
    """
    table = getattr(text_tower(model), "token_embedding", None)
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"model: texts are embedded by open_clip's own text tower, which this {type(model).__name__} lacks "
            "(no token_embedding in it or in its .text): prompts cannot be learnt for it"
        )
    return table


def encode_embedded_texts(model: nn.Module, embeddings: Tensor, tokens: Tensor, *, normalize: bool = True) -> Tensor:
    """Text features (M, D) of embeddings (M, L, width) that stand in for those of the tokens (M, L).

    Positions, masks, layers, pooling and projection are the tower's own: embeddings looked up in `token_embedding`
    give `encode_texts`. The tokens say where a text ends and what is padding. The gradient reaches the embeddings,
    which may be wider than the tower's weights; `normalize` as in `encode_texts`. Under a causal mask nothing
    after the place of pooling is looked at, and it is not computed: short prompts in a long context cost little.
    ValueError for shapes that do not fit and for towers without `token_embedding`.
    """
    table = token_embedding(model)
    if embeddings.shape != (*tokens.shape, table.embedding_dim) or tokens.ndim != 2:
        raise ValueError(
            f"embeddings: expected (M, L, {table.embedding_dim}) for tokens (M, L), got {tuple(embeddings.shape)} "
            f"for {tuple(tokens.shape)}"
        )
    tower = text_tower(model)
    length = _pooled_length(tower, tokens)

    def cut(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
        mask = keywords["attn_mask"][..., :length, :length].contiguous()
        return (arguments[0][:, :length].contiguous(), *arguments[1:]), {**keywords, "attn_mask": mask}

    with contextlib.ExitStack() as hooks:
        replaced = table.register_forward_hook(lambda _module, _tokens, found: embeddings.to(found.dtype))
        hooks.callback(replaced.remove)
        if length is not None:
            hooks.callback(tower.transformer.register_forward_pre_hook(cut, with_kwargs=True).remove)
        return encode_texts(model, tokens, normalize=normalize)


def text_tower(model: nn.Module) -> nn.Module:
    """What holds the text transformer: `CustomTextCLIP` has a tower of its own, `CLIP` is one."""
    model = unwrap(model)
    return getattr(model, "text", model)


def _pooled_length(tower: nn.Module, tokens: Tensor) -> int | None:
    """How many leading tokens the pooled features of a batch depend on, None if that is not known to be less than all.

    CLIP pools at the largest token, and a causal mask lets nothing after it matter.
    """
    pooling = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    causal = getattr(tower, "attn_mask", None) is not None and getattr(tower, "cls_emb", None) is None
    return int(tokens.argmax(-1).max()) + 1 if causal and pooling == "argmax" else None


def class_embeddings(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[Template],
    *,
    batch_size: int = 256,
) -> Tensor:
    """The zero-shot head (K, D): unit mean over templates of unit text features (CLIP, section 3.1.4).

    templates: strings with `{}` or `{c}`, or callables of the class name. Classes of the same name get
    identical rows. The gradient reaches the text tower unless disabled. Memory: K T D floats, and the
    activations of `batch_size` captions (of all K T when gradients are on). Raises ValueError for empty lists
    and blank names.
    """
    return caption_embeddings(model, tokenizer, captions(class_names, templates), batch_size=batch_size)


def caption_embeddings(
    model: nn.Module,
    tokenizer: Tokenizer,
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
    checkpoint: bool = False,
) -> Tensor:
    """A head (K, D) from ready captions, such as concept descriptions: one or more of them a class.

    checkpoint: as in `encode_captions`. Otherwise as `class_embeddings`.
    """
    return grouped_embeddings(model, group_captions(tokenizer, captions), batch_size=batch_size, checkpoint=checkpoint)


class CaptionGroups(NamedTuple):
    """Tokens (P, L) of the captions of G distinct groups, one after the other; sizes of the groups; group of each
    class (K,)."""

    tokens: Tensor
    sizes: tuple[int, ...]
    rows: Tensor

    def of(self, classes: Tensor) -> CaptionGroups:
        """The captions of some classes (C,), in that order."""
        groups, rows = self.rows[classes.to(self.rows.device)].unique(return_inverse=True)
        parts = self.tokens.split(self.sizes)
        return CaptionGroups(
            torch.cat([parts[g] for g in groups.tolist()]), tuple(self.sizes[g] for g in groups.tolist()), rows
        )


def group_captions(tokenizer: Tokenizer, captions: Sequence[Sequence[str]]) -> CaptionGroups:
    """The captions of K classes, tokenised: classes of the same captions share a group."""
    check_captions(captions)
    distinct = {texts: row for row, texts in enumerate(dict.fromkeys(map(tuple, captions)))}
    return CaptionGroups(
        tokenizer([text for group in distinct for text in group]),
        tuple(map(len, distinct)),
        torch.tensor([distinct[tuple(group)] for group in captions]),
    )


def grouped_embeddings(
    model: nn.Module, groups: CaptionGroups, *, batch_size: int = 256, checkpoint: bool = False
) -> Tensor:
    """`caption_embeddings` of captions that are tokenised already, to be encoded again at every step of a training."""
    features = encode_captions(model, groups.tokens, batch_size=batch_size, checkpoint=checkpoint)
    means = torch.stack([group.mean(dim=0) for group in features.split(groups.sizes)])
    # F.embedding, because the gradient of means[rows] adds up in no fixed order on several threads.
    return F.embedding(groups.rows.to(means.device), F.normalize(means, dim=-1))


def encode_captions(model: nn.Module, tokens: Tensor, *, batch_size: int = 256, checkpoint: bool = False) -> Tensor:
    """Unit text features (P, D) of tokenised captions (P, L) on any device, `batch_size` of them at a time.

    checkpoint: in a training, keep no activations of the tower and encode each batch once more in the backward, under
    the same random numbers: the same gradients for half as much time again, and the activations of one batch instead
    of all P captions. Has no effect without gradients.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    device = next(model.parameters()).device
    chunks = [chunk.to(device) for chunk in tokens.split(batch_size)]
    if not (checkpoint and torch.is_grad_enabled()):
        return torch.cat([encode_texts(model, chunk) for chunk in chunks])
    again = functools.partial(recomputed, encode_texts, model, use_reentrant=False)
    return torch.cat([again(chunk) for chunk in chunks])


def visual_projection(model: nn.Module) -> Tensor:
    """W (width, D) with image feature = h @ W (+ bias): the parameter or a view of it; gradients reach it.

    Found for open_clip's ViT (`visual.proj`), ModifiedResNet (`visual.attnpool.c_proj`) and timm towers with
    a linear head (`visual.head.proj`). Raises ValueError for towers without a final linear map.
    """
    return _projection(model, "visual", "visual.proj", "visual.attnpool.c_proj", "visual.head.proj")


def text_projection(model: nn.Module) -> Tensor:
    """W (width, D) with text feature = h @ W (+ bias): the parameter or a view of it; gradients reach it.

    Found for open_clip's own text tower, in `CLIP` and `CustomTextCLIP`, and for Hugging Face towers with a
    linear projection. Raises ValueError for towers without a final linear map.
    """
    return _projection(model, "text", "text_projection", "text.text_projection", "text.proj")


def _projection(model: nn.Module, tower: str, *paths: str) -> Tensor:
    for path in paths:
        match functools.reduce(lambda owner, part: getattr(owner, part, None), path.split("."), model):
            case nn.Linear() as linear:
                return linear.weight.T
            case Tensor() as weight:
                return weight
    raise ValueError(
        f"model: the {tower} tower of this {type(model).__name__} does not end in a linear projection "
        f"(looked for {', '.join(paths)})"
    )


def _pooled(features: Any) -> Tensor:
    # Towers built with output_tokens return (pooled, tokens).
    return features[0] if isinstance(features, tuple) else features


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while isinstance(inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None), nn.Module):
        model = inner
    return model


# Interpolating, exporting, naming


def interpolate(zero_shot: nn.Module, fine_tuned: nn.Module, alpha: float) -> nn.Module:
    """WiSE-FT (arXiv 2109.01903, section 3): a model with weights (1 - alpha) zero_shot + alpha fine_tuned.

    It is a copy of `fine_tuned` (device, mode, requires_grad) with the state of `interpolate_state`.
    """
    fine_tuned = unwrap(fine_tuned)
    state = interpolate_state(unwrap(zero_shot).state_dict(), fine_tuned.state_dict(), alpha)
    model = copy.deepcopy(fine_tuned)
    model.load_state_dict(state)
    return model


def interpolate_state(
    zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 - alpha) zero_shot + alpha fine_tuned, entry by entry, as new tensors on fine_tuned's devices.

    Floating-point entries, buffers too, are interpolated in at least float32; integer ones are fine_tuned's.
    Entries equal in both stay as they are, and alpha 0 and 1 give the two states back, bit for bit. No
    gradient. Raises ValueError when alpha is outside [0, 1], or keys, shapes or dtypes differ, naming them.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    _check_match(zero_shot, fine_tuned, "zero_shot", "fine_tuned")

    def mix(zs: Tensor, ft: Tensor) -> Tensor:
        if alpha in (0, 1) or not ft.is_floating_point():
            return (zs.to(ft.device) if alpha == 0 else ft).detach().clone()
        wide = torch.promote_types(ft.dtype, torch.float32)
        # lerp, unlike the two products, returns x for lerp(x, x, alpha): frozen weights stay as they are.
        return torch.lerp(zs.detach().to(ft.device, wide), ft.detach().to(wide), float(alpha)).to(ft.dtype)

    return {key: mix(zero_shot[key], ft) for key, ft in fine_tuned.items()}


def average_states(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the states of models of one architecture, as new tensors on the first's devices.

    Floating-point entries, buffers too, are averaged in at least float32; integer ones are the first's. Entries equal
    in all stay as they are, bit for bit. No gradient. One state is held at a time beside the mean. Raises ValueError
    when there is none, or keys, shapes or dtypes differ, naming them.
    """
    states = iter(states)
    first = next(states, None)
    if first is None:
        raise ValueError("states: expected at least one")
    first = dict(first)
    wide = {key: torch.promote_types(x.dtype, torch.float32) for key, x in first.items() if x.is_floating_point()}
    means = {key: first[key].detach().to(dtype, copy=True) for key, dtype in wide.items()}
    for n, state in enumerate(states, start=2):
        _check_match(first, state, "the first state", f"state {n}")
        for key, mean in means.items():
            mean.lerp_(state[key].detach().to(mean), 1.0 / n)  # of equals lerp is exact
    return {key: means[key].to(x.dtype) if key in means else x.detach().clone() for key, x in first.items()}


def _check_match(a: Mapping[str, Tensor], b: Mapping[str, Tensor], a_name: str, b_name: str) -> None:
    """Raises ValueError naming the keys, shapes and dtypes in which two states differ."""
    differences = (
        _few([key for key in a if key not in b], f"keys only in {a_name}"),
        _few([key for key in b if key not in a], f"keys only in {b_name}"),
        _few(
            [
                f"{key} {tuple(a[key].shape)} {a[key].dtype} and {tuple(x.shape)} {x.dtype}"
                for key, x in b.items()
                if key in a and (a[key].shape, a[key].dtype) != (x.shape, x.dtype)
            ],
            "different shapes or dtypes",
        ),
    )
    if any(differences):
        raise ValueError(f"{a_name} and {b_name} do not match: {'; '.join(filter(None, differences))}")


def export(
    model: nn.Module,
    directory: str | Path,
    config: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
    classifier: bytes | None = None,
) -> Path:
    """Writes a directory that `open_clip.create_model_and_transforms("local-dir:...")` loads bit for bit.

    config: a `Bundle`'s, describing this model. tokenizer: needed only where it is a Hugging Face one (the
    configuration names it), whose files are then written too. card: text of README.md; None writes a short
    one. classifier: content of classifier.safetensors, as `methods.Classifier.save` gives it; None writes none.

    The directory is built beside its place and then renamed, so that it is whole or not there. An earlier
    export is replaced, with its classifier, detector and calibrator. Raises FileExistsError when `directory` holds
    anything else, ValueError when `config` is incomplete. Memory: one copy of the weights on the CPU.
    """
    from safetensors.torch import save_file

    if not all(isinstance(config.get(key), Mapping) for key in ("model_cfg", "preprocess_cfg")):
        raise ValueError(f"config: expected the mappings 'model_cfg' and 'preprocess_cfg', got {config!r:.80}")
    model = unwrap(model)
    directory = Path(directory).resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        fresh.mkdir()
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (fresh / CARD_FILE).write_text(_card(directory.name, model) if card is None else card, encoding="utf-8")
        if classifier is not None:
            (fresh / CLASSIFIER_FILE).write_bytes(classifier)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(fresh)
        _check_replaceable(directory, {path.name for path in fresh.iterdir()} | {WEIGHTS_FILE} | COMPANIONS)
        # Copies, because safetensors refuses tensors that share memory.
        state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
        save_file(state, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        _replace_directory(directory, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


def _check_replaceable(directory: Path, names: set[str]) -> None:
    """Raises FileExistsError unless `directory` is absent, empty, or an export of no files but `names`."""
    if not directory.exists():
        return
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else {directory.name}
    if held and (held - names or not {CONFIG_FILE, WEIGHTS_FILE} <= held):
        raise FileExistsError(
            f"{directory}: holds something other than an earlier export: "
            f"{_few(sorted(held), 'files')}; choose another directory or empty it"
        )


def _replace_directory(directory: Path, fresh: Path) -> None:
    if not directory.exists():
        os.rename(fresh, directory)
        return
    old = fresh.with_name(f"{fresh.name}.old")
    os.rename(directory, old)
    try:
        os.rename(fresh, directory)
    except OSError:
        os.rename(old, directory)
        raise
    shutil.rmtree(old)


def _card(name: str, model: nn.Module) -> str:
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---
# {name}

A CLIP model of {sum(parameter.numel() for parameter in model.parameters()):,} parameters, exported by
robustft.

```python
import open_clip

model, train_transform, eval_transform = open_clip.create_model_and_transforms("local-dir:path/to/{name}")
tokenizer = open_clip.get_tokenizer("local-dir:path/to/{name}")
```
"""


def fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a model's state (names, shapes, dtypes, bytes), module types and settings.

    Equal for copies of a model, whatever their device and mode. Types and settings (public attributes that are plain
    numbers, strings or sequences of them: the number of heads, a stride, an epsilon) tell apart models of equal weights
    that compute different features. Memory: one tensor at a time on the CPU.
    """
    model = unwrap(model)
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        settings = [(key, value) for key, value in sorted(vars(module).items()) if _is_setting(key, value)]
        digest.update(f"{name}:{type(module).__name__}:{settings}\n".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_setting(name: str, value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    plain = all(isinstance(v, (bool, int, float, str)) for v in values)
    # The images' statistics, which open_clip leaves on the tower, tell how to prepare images, not what is computed.
    return plain and name not in {"training", "image_mean", "image_std"} and not name.startswith("_")


def _few(names: Sequence[str], what: str, limit: int = 3) -> str:
    if not names:
        return ""
    return f"{len(names)} {what} ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})"
