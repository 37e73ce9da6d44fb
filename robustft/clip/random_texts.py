"""Texts of random tokens, framed as a tokenizer frames its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustft.clip.encoding import ends_in_the_largest, token_embedding
from robustft.clip.prompts import Tokenizer, TokenLayout


class RandomTexts:
    """Draws texts of `length` tokens, each uniform over the vocabulary without the tokens that frame a text.

    The vocabulary is that of the model's table of token embeddings. Where the tower pools at the largest token, as
    CLIP's does, that token closes the text, and larger ones are not drawn.

    Raises ValueError for a length that does not fit the context, and for a text tower without such a table.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, length: int) -> None:
        layout = TokenLayout.of(tokenizer)
        row = tokenizer([""])[0].tolist()
        room = len(row) - layout.opening - layout.closing
        if not 1 <= length <= room:
            raise ValueError(
                f"length must be from 1 to {room}, the tokens of a text that fit the context, got {length}"
            )
        self.length = length
        self.start = row[: layout.opening]
        end = row[layout.opening : layout.opening + layout.closing]
        self.end = end + [layout.padding] * (room - length)
        frame = {*self.start, *end, layout.padding}
        words = token_embedding(model).num_embeddings
        if ends_in_the_largest(model):
            words = min(words, max(frame))
        self.words = torch.tensor([word for word in range(words) if word not in frame])

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Tokens (count, L), on the CPU."""
        drawn = self.words[torch.randint(len(self.words), (count, self.length), generator=generator)]
        start, end = (torch.tensor(part, dtype=torch.int64).expand(count, -1) for part in (self.start, self.end))
        return torch.cat([start, drawn, end], 1)
