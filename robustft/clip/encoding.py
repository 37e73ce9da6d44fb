"""Encoding images, patches, texts and embedded texts, and the parts of a model that this takes.

u = normalise(f(x))     image features (N, D)         v = normalise(g(t))     text features (M, D)
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustft.clip import batching, patches, spread
from robustft.clip.class_token import for_class_token
from robustft.clip.views import view_of, with_part, with_replaced
from robustft.ops.arguments import check_range
from robustft.ops.kinds import checked, has_numbers
from robustft.ops.precision import at_least_float32


class LocalFeatures(NamedTuple):
    """Image features (N, D) and the features of their patches (N, P, D)."""

    image_features: Tensor
    patch_features: Tensor


@checked
def logit_scale(model: nn.Module) -> Tensor:
    """s = exp(model.logit_scale), a 0-d tensor in at least float32; the gradient reaches the parameter."""
    scale = getattr(unwrap(model), "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        raise ValueError(f"model: expected a logit_scale of one element, got {scale!r:.80}")
    return at_least_float32(whole(scale)).exp().reshape(())


@checked
def logit_bias(model: nn.Module) -> Tensor | None:
    """b of a model that is trained by a sigmoid (SigLIP), a 0-d tensor in at least float32; None for one without.

    The gradient reaches the parameter. P(image i shows text j) = sigmoid(s u_i t_j + b); a softmax does not see b.
    """
    bias = getattr(unwrap(model), "logit_bias", None)
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or bias.numel() != 1:
        raise ValueError(f"model: expected a logit_bias of one element, got {bias!r:.80}")
    return at_least_float32(whole(bias)).reshape(())


@checked
def freeze_idle(model: nn.Module, *, bias: bool) -> None:
    """Stops gradients of the parameters on which neither features nor scale depend, and so no contrastive loss.

    They are what is in neither tower, such as CoCa's decoder of captions, and, with `bias` False, the `logit_bias`:
    torch.distributed's DistributedDataParallel fails for parameters that want a gradient and get none.
    """
    whole = unwrap(model)
    parts = [image_tower(model).parameters(), text_tower(model).parameters(), [whole.logit_scale]]
    used = {id(p) for part in parts for p in part}
    shift = getattr(whole, "logit_bias", None)
    for p in whole.parameters():
        if not bias if p is shift else id(p) not in used:
            p.requires_grad_(False)


@checked
def encode_images(model: nn.Module, images: Tensor, *, normalize: bool = True) -> Tensor:
    """Image features (N, D) of transformed images (N, 3, H, W); the gradient reaches tower and images.

    images: floating point, on the model's device; cast to the tower's dtype. normalize: unit rows, computed
    and returned in at least float32, also under autocast; otherwise the features as the tower gives them.
    A ViT's last block is computed for the class token alone where only that is pooled (`robustft.clip.class_token`).
    Within `robustft.clip.spread.spread`, by parts, which may wait on the CPU for their turn, and of all processes.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images: expected (N, 3, H, W) floating point, as the transforms give, got "
            f"{tuple(images.shape)} {images.dtype}"
        )
    tower = getattr(unwrap(model), "visual", unwrap(model))
    parameter = _first_parameter(tower, images)
    if images.device != parameter.device and spread.current() is None:
        raise ValueError(f"images are on {images.device}; expected {parameter.device}, as the model")

    seeing = partial(_encoded, for_class_token(unwrap(model)), "encode_image", "images")

    def encoded(part: Tensor) -> tuple[Tensor]:
        part = part.to(parameter.device, parameter.dtype, non_blocking=True)
        return (batching.by_parts(seeing, part, tower),)

    (features,) = spread.of_images(encoded, images)
    return F.normalize(at_least_float32(features), dim=-1) if normalize else features


@checked
def encode_patches(model: nn.Module, images: Tensor, *, normalize: bool = True) -> Tensor:
    """Patch features (N, P, D) of transformed images, comparable with text features; gradients as in `encode_images`.

    P patches row by row: (H / patch)^2 for a ViT, (H / 32)^2 for a convolutional tower. They are what the tower gives
    if its last mixing of patches, an attention or a pooling, sees each alone, as in GL-MCM and LoCoOp
    (`robustft.clip.patches` has the formulas). The model stays as it is. images, normalize: as in `encode_images`.
    Costs one pass and what follows that mixing once more: `encode_images_and_patches` gives the image features of that
    pass too. ValueError for towers without such patches, which `robustft.clip.patches` lists.
    """
    return encode_images_and_patches(model, images, normalize=normalize).patch_features


@checked
def encode_images_and_patches(model: nn.Module, images: Tensor, *, normalize: bool = True) -> LocalFeatures:
    """`encode_images` and `encode_patches` in one pass. Memory: N P D floats for the patches."""
    visual = image_tower(model)
    device = _first_parameter(visual, images).device

    def encoded(part: Tensor) -> LocalFeatures:
        part = part.to(device, non_blocking=True) if spreading else part
        with patches.last_inputs(visual) as inputs:
            image_features = encode_images(model, part, normalize=normalize)
        patch_features = patches.local_features(visual, inputs[0])
        if normalize:
            patch_features = F.normalize(at_least_float32(patch_features), dim=-1)
        return LocalFeatures(image_features, patch_features)

    spreading = spread.current() is not None
    return LocalFeatures(*spread.of_images(encoded, images))


@checked
def encode_texts(model: nn.Module, tokens: Tensor, *, normalize: bool = True) -> Tensor:
    """Text features (M, D) of tokenised captions (M, L), with `normalize` as in `encode_images`.

    Where nothing after the place of pooling matters, padding is not computed: the tower runs to the longest caption of
    the batch (`trim_padding`). On an accelerator that waits for the tokens, unless they were trimmed before they got
    there. Under `torch.compile` and in a CUDA graph the tower runs whole, or as far as trimmed tokens go.
    """
    _check_tokens(model, tokens)
    tower = text_tower(model)
    context = getattr(tower, "context_length", None) or tokens.shape[1]
    if tokens.shape[1] > context:
        raise ValueError(
            f"tokens: (M, {tokens.shape[1]}) are longer than the model's context of {context}: use the tokenizer that "
            "was loaded with it"
        )
    if tokens.shape[1] == context:
        tokens = trim_padding(model, tokens)
    if tokens.shape[1] < context and _pools_early(tower):
        model = _with_text_tower(model, _shortened(tower, tokens.shape[1]))
    (features,) = spread.of_texts(lambda part: (_encoded(model, "encode_text", "tokens", part),), tokens)
    return F.normalize(at_least_float32(features), dim=-1) if normalize else features


@checked
def trim_padding(model: nn.Module, tokens: Tensor, *, multiple: int = 1) -> Tensor:
    """Tokens (M, L) without the columns at their end that no feature depends on: a view (M, L') that `encode_texts`
    takes like the whole.

    L' is where the longest text is pooled, rounded up to a `multiple`: 8 lets compiled code and an accelerator's caches
    meet few shapes. All columns stay where the tower has no causal mask, or pools elsewhere than at the end of the text
    (SigLIP, Hugging Face, CoCa), and where tokens cannot be looked at: meta tensors, `torch.compile`, CUDA graphs. Trim
    on the CPU, before the tokens go to an accelerator, which would have to be waited for.
    """
    if multiple < 1:
        raise ValueError(f"multiple: expected at least 1, got {multiple}")
    _check_token_numbers(tokens)
    tower = text_tower(model)
    if not (_pools_early(tower) and tokens.numel() and _may_be_looked_at(tokens)) or hasattr(unwrap(model), "reshard"):
        return tokens  # also of a model that FSDP has divided, of whose parameters no view is good
    length = int(_pooled_at(tower, tokens).max()) + 1
    return tokens[:, : -(-length // multiple) * multiple]


@checked
def token_embedding(model: nn.Module) -> nn.Embedding:
    """The table (vocabulary, width) of token embeddings, of open_clip's own text tower or a Hugging Face one.

    Called with tokens it gives what the tower's first layer gets, which some Hugging Face towers scale. ValueError for
    other towers.
    """
    tower = text_tower(model)
    table = getattr(tower, "token_embedding", None)
    if table is None and callable(ask := getattr(getattr(tower, "transformer", None), "get_input_embeddings", None)):
        table = ask()
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"model: the text tower of this {type(unwrap(model)).__name__}, a {type(tower).__name__}, has no table of "
            "token embeddings, which open_clip's own and Hugging Face's have: prompts cannot be learnt for it. Take a "
            "method that trains something else: FLYP, CaRot, FineTune, LinearProbe, CLIPAdapter"
        )
    return table


@checked
def encode_embedded_texts(model: nn.Module, embeddings: Tensor, tokens: Tensor, *, normalize: bool = True) -> Tensor:
    """Text features (M, D) of embeddings (M, L, width) that stand in for those of the tokens (M, L).

    Positions, masks, layers, pooling and projection are the tower's own: embeddings looked up in `token_embedding`
    give `encode_texts`. The tokens say where a text ends and what is padding. The gradient reaches the embeddings,
    which may be wider than the tower's weights; `normalize` as in `encode_texts`. Under a causal mask nothing
    after the place of pooling is looked at, and it is not computed: short prompts in a long context cost little.
    ValueError for shapes that do not fit and for towers without `token_embedding`.
    """
    table = token_embedding(model)
    _check_tokens(model, tokens)
    if embeddings.shape != (*tokens.shape, table.embedding_dim) or tokens.ndim != 2:
        raise ValueError(
            f"embeddings: expected (M, L, {table.embedding_dim}) for tokens (M, L), got {tuple(embeddings.shape)} "
            f"for {tuple(tokens.shape)}"
        )
    tower, tokens = text_tower(model), trim_padding(model, tokens)
    given = _Given(embeddings[:, : tokens.shape[1]].to(table.weight.dtype))
    with spread.spread(None):  # the embeddings are of all tokens
        return encode_texts(_with_text_tower(model, with_replaced(tower, table, given)), tokens, normalize=normalize)


def image_tower(model: nn.Module) -> Any:
    """The module that encodes images; TypeError for a model without one."""
    visual = getattr(unwrap(model), "visual", None)
    if visual is None:
        raise TypeError(f"model is a {type(unwrap(model)).__name__}; expected an open_clip model, which has visual")
    return visual


def text_tower(model: nn.Module) -> Any:
    """What holds the text transformer: `CustomTextCLIP` has a tower of its own, `CLIP` is one. A module."""
    model = unwrap(model)
    return getattr(model, "text", model)


def _pools_early(tower: nn.Module) -> bool:
    """Whether features are pooled at the end of each text, under a causal mask that lets nothing after it matter."""
    causal = getattr(tower, "attn_mask", None) is not None and getattr(tower, "cls_emb", None) is None
    if not causal or getattr(tower, "use_pad_mask", False) or _pooling(tower) not in ("argmax", "eos"):
        return False
    # One that is sharded, or called in a way of its own, is left whole.
    own, sharded = (
        {"encode_text", "forward"} & tower.__dict__.keys(),
        hasattr(tower.positional_embedding, "device_mesh"),
    )
    return not own and not sharded


def _pooling(tower: nn.Module) -> str | None:
    return getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))


def ends_in_the_largest(model: nn.Module) -> bool:
    """Whether the text tower takes a text's feature from its largest token, as CLIP's does."""
    return _pooling(text_tower(model)) == "argmax"


def _may_be_looked_at(tokens: Tensor) -> bool:
    if torch.compiler.is_compiling() or not has_numbers(tokens):
        return False
    return not (tokens.is_cuda and torch.cuda.is_current_stream_capturing())


def _pooled_at(tower: nn.Module, tokens: Tensor) -> Tensor:
    """The position (M,) that a text's feature is taken from: CLIP's end of text is its largest token."""
    if _pooling(tower) == "eos":
        tokens = tokens.eq(getattr(tower, "text_eos_id", getattr(tower, "eos_id", -1))).int()
    return tokens.argmax(-1)


class _Given(nn.Module):
    """In place of a table: the embeddings of the tokens that it will be asked for."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embeddings


def _shortened(tower: Any, length: int) -> Any:
    """The tower for texts of that many tokens: its table of positions and its mask are cut."""
    positions, mask = tower.positional_embedding[:length], tower.attn_mask[:length, :length]
    return view_of(
        tower,
        _parameters={**tower._parameters, "positional_embedding": positions},
        _buffers={**tower._buffers, "attn_mask": mask},
    )


def _with_text_tower(model: nn.Module, tower: Any) -> Any:
    """The model with another tower in place of its `text_tower`."""
    model = unwrap(model)
    return with_part(model, text=tower) if "text" in model._modules else tower


def whole(parameter: Tensor) -> Tensor:
    """A parameter, of which FSDP has left each process a part, as a whole; each takes its part of the gradient."""
    gather = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


def _first_parameter(module: nn.Module, otherwise: Tensor) -> Tensor:
    return next(module.parameters(), otherwise)


def _check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """ValueError unless they are (M, L) numbers of tokens, on the model's device and in its vocabulary."""
    _check_token_numbers(tokens)
    tower = text_tower(model)
    device = _first_parameter(tower, tokens).device
    if tokens.device != device:
        raise ValueError(f"tokens are on {tokens.device}; expected {device}, as the model")
    table = getattr(tower, "token_embedding", None)
    if isinstance(table, nn.Embedding) and tokens.numel():
        check_range("tokens", tokens, table.num_embeddings, ", the model's vocabulary")


def _check_token_numbers(tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens: expected (M, L) integers, int64 or int32, got {tuple(tokens.shape)} {tokens.dtype}")


def _encoded(model: nn.Module, encode: str, name: str, given: Tensor) -> Tensor:
    """What a tower makes of images or tokens; ValueError, naming them, for those that do not fit it."""
    tower = getattr(unwrap(model), encode, None)
    if tower is None:
        raise TypeError(f"model is a {type(unwrap(model)).__name__}; expected an open_clip model, which has {encode}")
    if torch.compiler.is_compiling():
        return _pooled(tower(given))
    try:
        return _pooled(tower(given))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{name} {tuple(given.shape)} {given.dtype} do not go through the model's {encode}: {error}"
        ) from error


def _pooled(features: Any) -> Tensor:
    # Towers built with output_tokens return (pooled, tokens).
    return features[0] if isinstance(features, tuple) else features


def unwrap(model: nn.Module) -> Any:
    """The model inside the wrappers of torch.compile, DataParallel, DistributedDataParallel and peft, in any order: a
    module with open_clip's attributes."""
    while isinstance(inner := _inside(model), nn.Module):
        model = inner
    return model


def _inside(model: nn.Module) -> Any:
    if hasattr(model, "peft_config") and callable(get := getattr(model, "get_base_model", None)):
        return get()
    return getattr(model, "_orig_mod", None) or getattr(model, "module", None)
