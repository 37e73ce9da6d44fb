"""Texts with a learnt context: what every prompt learner shares.

    caption of class c     [opening] [v_1 .. v_n] [name_c] [rest] [closing] [padding]        L tokens
    w_c = normalize(g(...))  (D,)                                                            v_i (width,), learnt

The context stands before the name ("end": the name is at the end), half of it before and half after ("middle"), or
after it ("front"), as in CoOp. The rest is what follows the name in a hand-written template: "a photo of a {}." leaves
the full stop, which is there in the released code. The tokenizer is any that open_clip has: how many tokens it opens
and closes a text with is found by asking it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustft import clip
from robustft.clip.prompts import Template, Tokenizer, TokenLayout, format_template, tokenize, tokenize_classes
from robustft.data.seeds import stateless_generator
from robustft.ops.kinds import described

Position = Literal["end", "middle", "front"]


class ContextTexts(nn.Module):
    """K captions with places for n context tokens, to be encoded with whatever context.

    `tokens` (K, L) holds any word in the places, `positions` (K, n) says where these are. With `nameless` there is one
    caption, of what follows the name alone. Raises ValueError, naming the class, for a name that leaves fewer than n
    tokens.
    """

    tokens: Tensor
    positions: Tensor

    def __init__(
        self,
        tokenizer: Tokenizer,
        class_names: Sequence[str],
        template: Template,
        length: int,
        position: Position = "end",
        *,
        nameless: bool = False,
    ) -> None:
        super().__init__()
        layout = TokenLayout.of(tokenizer)
        texts = _names_and_rests(class_names, template)
        if nameless:
            name, whole = texts[0]
            texts, class_names = [("", whole[len(name) :])], ("the caption without a name",)
        tokens, row = tokenize_classes(tokenizer, [[whole] for _, whole in texts], names=class_names)
        names = tokenize(tokenizer, [name for name, _ in texts], names=class_names).tolist()
        wholes = tokens[[row[whole] for _, whole in texts]].tolist()
        rows = [
            _with_places(layout, whole, len(layout.content(name)), length, position, class_name)
            for name, whole, class_name in zip(names, wholes, class_names, strict=True)
        ]
        tokens, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("positions", positions, persistent=False)

    def forward(
        self, model: nn.Module, context: Tensor, classes: Tensor | None = None, *, chunk_size: int | None = None
    ) -> Tensor:
        """Unit text features (M, D) of captions `classes` (M,), by default all K, with context (n, width) or
        (M, n, width). With `chunk_size` so many are encoded at a time, and again in the backward."""
        return encode_contexts(model, self.tokens, self.positions, context, classes, chunk_size=chunk_size)


def encode_contexts(
    model: nn.Module,
    tokens: Tensor,
    positions: Tensor,
    context: Tensor,
    classes: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """As `ContextTexts.forward`, of tokens (K, L) and positions (K, n)."""
    if classes is not None:
        tokens, positions = tokens[classes], positions[classes]
    context = context.expand(len(tokens), -1, -1)
    if chunk_size is None or chunk_size >= len(tokens):
        return _encode(model, tokens, positions, context)
    parts = zip(*(part.split(chunk_size) for part in (tokens, positions, context)), strict=True)
    return torch.cat([checkpoint(_encode, model, *part, use_reentrant=False) for part in parts])


def _encode(model: nn.Module, tokens: Tensor, positions: Tensor, context: Tensor) -> Tensor:
    words = clip.token_embedding(model)(tokens).to(context.dtype)
    places = positions[..., None].expand(-1, -1, words.shape[-1])
    return clip.encode_embedded_texts(model, words.scatter(1, places, context), tokens)


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def context_length(tokenizer: Tokenizer, context: int | str) -> int:
    """Tokens of a context, of some words or a number of them; ValueError where there is not at least one."""
    if isinstance(context, bool) or not isinstance(context, (int, str)):
        raise TypeError(f"context is {described(context)}; expected some words or a number of tokens")
    length = context if isinstance(context, int) else len(_words(tokenizer, context))
    if length < 1:
        raise ValueError(f"context: expected some words or at least one token, got {context!r}")
    return length


def _words(tokenizer: Tokenizer, context: str) -> list[int]:
    return TokenLayout.of(tokenizer).content(tokenize(tokenizer, [context], names=["context"])[0].tolist())


def initial_context(model: nn.Module, tokenizer: Tokenizer, context: int | str, seed: int) -> Tensor:
    """(n, width), at least float32: the embeddings of some words, or N(0, 0.02) for a number of tokens."""
    table = clip.token_embedding(model)
    dtype = torch.promote_types(table.weight.dtype, torch.float32)
    if isinstance(context, str):
        words = torch.tensor(_words(tokenizer, context), device=table.weight.device)
        with torch.no_grad():
            return table(words).to(dtype)
    return random_context((context, table.embedding_dim), seed, dtype, table.weight.device)


def random_context(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """N(0, 0.02), a function of the seed."""
    drawn = torch.randn(shape, generator=stateless_generator(seed, "context"), dtype=torch.float64)
    return (0.02 * drawn).to(device, dtype)


def _names_and_rests(class_names: Sequence[str], template: Template) -> list[tuple[str, str]]:
    texts = []
    for name in class_names:
        caption = format_template(template, name)
        _, found, rest = caption.rpartition(name)
        if not found:
            raise ValueError(f"templates: the first one turns {name!r} into {caption!r}, which does not hold the name")
        texts.append((name, name + rest))
    return texts


def _with_places(
    layout: TokenLayout, row: list[int], name_length: int, length: int, position: Position, class_name: str
) -> tuple[list[int], list[int]]:
    """A row of tokens with `length` of them inserted, and where they are."""
    if position not in ("end", "middle", "front"):
        raise ValueError(f'position must be "end", "middle" or "front", got {position!r}')
    spare = layout.spare(row)
    if length > spare:
        raise ValueError(
            f"class_names: {class_name!r} takes {len(row) - spare} of the {len(row)} tokens and leaves {spare}, too "
            f"few for a context of {length}: shorten the name, or learn a context of at most {spare} tokens"
        )
    before = {"end": length, "middle": length // 2, "front": 0}[position]
    start, after = layout.opening, layout.opening + before + name_length
    places = [*range(start, start + before), *range(after, after + length - before)]
    for place in places:
        row = [*row[:place], layout.word, *row[place:]]  # any word will do: its embedding is replaced
    return row[: len(row) - length], places
