"""Heads from captions: w_c = normalise(mean_t normalise(g(caption_t of class c))), (K, D)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from robustft.clip.encoding import encode_texts, trim_padding
from robustft.clip.prompts import Template, Tokenizer, captions, check_captions, split_names, tokenize_classes
from robustft.clip.spread import spread
from robustft.ops.kinds import checked, described


@checked
def class_embeddings(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_names: Sequence[str] | Mapping[str, str],
    templates: Sequence[Template],
    *,
    batch_size: int = 256,
    truncate: bool = False,
) -> Tensor:
    """The zero-shot head (K, D): unit mean over templates of unit text features (CLIP, section 3.1.4).

    class_names: in label order, or {folder: name} in label order. templates: strings with `{}` or `{c}`, or callables
    of the class name. Classes of the same name get identical rows. The gradient reaches the text tower unless disabled.
    Memory: K T D floats, and the activations of `batch_size` captions (of all K T when gradients are on). Raises
    ValueError for empty lists and blank names, for captions longer than the context unless `truncate` lets them be cut,
    and for classes whose different captions become the same tokens.
    """
    _, names = split_names(class_names)
    groups = group_captions(tokenizer, captions(names, templates), names=names, truncate=truncate)
    return grouped_embeddings(model, groups, batch_size=batch_size)


@checked
def caption_embeddings(
    model: nn.Module,
    tokenizer: Tokenizer,
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
    checkpoint: bool = False,
    names: Sequence[str] | None = None,
    truncate: bool = False,
) -> Tensor:
    """A head (K, D) from ready captions, such as concept descriptions: one or more of them a class.

    checkpoint: as in `encode_captions`. names: of the classes, for errors. Otherwise as `class_embeddings`.
    """
    groups = group_captions(tokenizer, captions, names=names, truncate=truncate)
    return grouped_embeddings(model, groups, batch_size=batch_size, checkpoint=checkpoint)


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


@checked
def group_captions(
    tokenizer: Tokenizer,
    captions: Sequence[Sequence[str]],
    *,
    names: Sequence[str] | None = None,
    truncate: bool = False,
) -> CaptionGroups:
    """The captions of K classes, tokenised: classes of the same captions share a group.

    names, truncate and errors: as for `prompts.tokenize_classes`.
    """
    check_captions(captions)
    tokens, row = tokenize_classes(tokenizer, captions, names=names, truncate=truncate)
    distinct = {texts: number for number, texts in enumerate(dict.fromkeys(map(tuple, captions)))}
    return CaptionGroups(
        tokens[[row[text] for group in distinct for text in group]],
        tuple(map(len, distinct)),
        torch.tensor([distinct[tuple(group)] for group in captions]),
    )


@checked
def grouped_embeddings(
    model: nn.Module,
    groups: CaptionGroups,
    *,
    batch_size: int = 256,
    checkpoint: bool = False,
    progress: bool = False,
) -> Tensor:
    """`caption_embeddings` of captions that are tokenised already, to be encoded again at every step of a training.

    progress: a bar on a terminal, where there are several batches."""
    features = encode_captions(model, groups.tokens, batch_size=batch_size, checkpoint=checkpoint, progress=progress)
    means = torch.stack([group.mean(dim=0) for group in features.split(groups.sizes)])
    # F.embedding, because the gradient of means[rows] adds up in no fixed order on several threads.
    return F.embedding(groups.rows.to(means.device), F.normalize(means, dim=-1))


@checked
def encode_captions(
    model: nn.Module, tokens: Tensor, *, batch_size: int = 256, checkpoint: bool = False, progress: bool = False
) -> Tensor:
    """Unit text features (P, D) of tokenised captions (P, L) on any device, `batch_size` of them at a time.

    checkpoint: in a training, keep no activations of the tower and encode each batch once more in the backward, under
    the same random numbers: the same gradients for half as much time again, and the activations of one batch instead
    of all P captions. Has no effect without gradients.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if tokens.ndim != 2 or tokens.is_meta:
        raise ValueError(f"tokens: expected (P, L) integers, got {described(tokens)} on {tokens.device}")
    device = next(model.parameters()).device
    chunks: Iterable[Tensor] = [trim_padding(model, chunk).to(device) for chunk in tokens.split(batch_size)]
    if progress and len(tokens) > batch_size:
        from tqdm.auto import tqdm

        chunks = tqdm(chunks, desc="captions", unit="batch", disable=None)
    with spread(None):  # these are batches already
        if not (checkpoint and torch.is_grad_enabled()):
            return torch.cat([encode_texts(model, chunk) for chunk in chunks])
        again = functools.partial(recomputed, encode_texts, model, use_reentrant=False)
        return torch.cat([again(chunk) for chunk in chunks])
