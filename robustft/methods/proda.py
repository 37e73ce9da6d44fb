"""ProDA: prompt distribution learning (Lu et al., CVPR 2022, arXiv 2205.03340).

    w_pc = normalize(g(prompt p of class c))            P of the prompts at a step, with the name at different places
    m_c  = mean_p w_pc,   d_pc = w_pc - m_c
    V_iy,c = sum_d u_id^2 1/(P + 1) sum_p (d_pcd - d_pyd)^2        variance of the logit differences z_c - z_y
    L    = objective(s u m^T + s^2 / 2 V, y) + 0.1 mean_{p != q} |cos(g(prompt p without a name), ...q)|

The first term bounds the expected cross-entropy over a Gaussian of class embeddings whose covariance is diagonal in
the features (of V the true class's own column is 0). The second keeps the prompts apart. The head is the mean of all.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from robustft import clip
from robustft.data.seeds import stateless_generator
from robustft.methods.base import Step
from robustft.methods.frozen import FrozenModel, FrozenOptions
from robustft.methods.options import check_weights
from robustft.methods.prompt_learning import (
    ContextTexts,
    Position,
    check_chunk_size,
    encode_contexts,
    initial_context,
    random_context,
)
from robustft.ops.arguments import check_count
from robustft.predictors.base import Classifier

MOST_PROMPTS = 100_000
POSITIONS: tuple[Position, ...] = ("front", "middle", "end")  # of the name


class ProDA(FrozenModel):
    """Learns many prompts and, from them, a distribution of the class embeddings.

    The released recipe is 32 prompts of 16 tokens, 4 of them a step, SGD at 1e-3, batches of 4, 100 epochs. As there,
    the name comes first in a quarter of the prompts, in the middle in another, last in the rest, and the covariance is
    divided by P + 1. The released code forms that covariance, (D, K, K), and (N, K, K) from it; here it is P products
    (N, D) by (D, K), and memory N D + N K. Every objective's terms see the logits with the variance in them.

    Args:
        templates: what follows the name in the first follows it here too.
        seed: of the initial prompts and of which ones a step takes; every prompt has its turn once in
            prompts / prompt_batch steps.
        context: tokens of each prompt, which start as N(0, 0.02).
        prompts, prompt_batch: how many there are, and how many of them a step takes; the first is a multiple of the
            second, which is at least 2.
        weight: of the term that keeps prompts apart.
        chunk_size: captions, of all prompts, encoded at a time, which are encoded a second time in the backward.
        others: as for `FrozenModel`.

    Source: Lu et al., ProDA (CVPR 2022, arXiv 2205.03340), and its released code.
    """

    takes_features = True
    uncompared = ("chunk_size",)
    tokens: Tensor
    positions: Tensor
    order: Tensor

    learns_prompts = True

    def __init__(
        self,
        model: nn.Module,
        *,
        context: int = 16,
        prompts: int = 32,
        prompt_batch: int = 4,
        weight: float = 0.1,
        chunk_size: int | None = None,
        **options: Unpack[FrozenOptions],
    ) -> None:
        if context < 1:
            raise ValueError(f"context must be a number of tokens, at least 1, got {context!r}")
        check_count("prompts", prompts, MOST_PROMPTS)
        if prompt_batch < 2 or prompts < prompt_batch or prompts % prompt_batch:
            raise ValueError(
                f"prompts must be a multiple of prompt_batch, which is at least 2, got {prompts} and {prompt_batch}"
            )
        check_weights(weight=weight)
        check_chunk_size(chunk_size)
        super().__init__(model, **options)
        texts = functools.partial(ContextTexts, self.tokenizer, self.class_names, self.templates[0], context)
        layouts = [texts(place) for place in POSITIONS]
        one = initial_context(self.model, self.tokenizer, 1, self.seed)
        shape = (prompts, context, one.shape[1])
        self.contexts = nn.Parameter(random_context(shape, self.seed, one.dtype, one.device))
        self.register_buffer("tokens", torch.stack([layout.tokens for layout in layouts]).to(one.device), False)
        self.register_buffer("positions", torch.stack([layout.positions for layout in layouts]).to(one.device), False)
        self.nameless = texts(nameless=True).to(one.device)
        quarter = prompts // 4
        order = torch.tensor([0] * quarter + [1] * quarter + [2] * (prompts - 2 * quarter), device=one.device)
        self.register_buffer("order", order, persistent=False)  # of each prompt, its place in POSITIONS
        self.prompt_batch, self.weight, self.chunk_size = prompt_batch, weight, chunk_size

    def chosen(self) -> Tensor:
        """The prompts (P,) of the current step: the next ones of a permutation, and of a new one after its end."""
        turn, place = divmod(self.steps_done, len(self.contexts) // self.prompt_batch)
        order = torch.randperm(len(self.contexts), generator=stateless_generator(self.seed, "prompts", turn))
        return order[place * self.prompt_batch :][: self.prompt_batch].to(self.contexts.device)

    def prompt_embeddings(self, prompts: Tensor) -> Tensor:
        """w (P, K, D), unit rows, of some prompts (P,); the gradient reaches the contexts."""
        tokens, positions = (table[self.order[prompts]].flatten(0, 1) for table in (self.tokens, self.positions))
        k = self.tokens.shape[1]
        contexts = self.contexts[prompts][:, None].expand(-1, k, -1, -1).flatten(0, 1)
        w = encode_contexts(self.model, tokens, positions, contexts, chunk_size=self.chunk_size)
        return w.unflatten(0, (-1, k))

    def step(self, batch: Any) -> Step:
        images, labels = self.labelled(batch)
        prompts = self.chosen()
        u, w = self.image_features(images), self.prompt_embeddings(prompts)
        s = clip.logit_scale(self.model)
        with torch.autocast(u.device.type, enabled=False):
            mean = w.mean(0)
            logits = s * (u @ mean.to(u.dtype).T) + s.square() / 2 * difference_variance(u, w - mean, labels)
        loss, terms = self.objective.of_logits(logits, labels, self.reference(u))
        nameless = self.nameless(self.model, self.contexts[prompts], torch.zeros_like(prompts))
        with torch.autocast(u.device.type, enabled=False):
            rows, columns = torch.triu_indices(len(prompts), len(prompts), 1, device=u.device)
            overlap = (nameless @ nameless.T)[rows, columns].abs().mean()
        return Step(loss + self.weight * overlap, {**terms, "overlap": overlap.detach()})

    @torch.no_grad()
    def classifier(self) -> Classifier:
        """The frozen image tower and the mean over all prompts, which is not normalised again, as in training."""
        prompts = torch.arange(len(self.contexts), device=self.contexts.device)
        sums = [self.prompt_embeddings(part).sum(0) for part in prompts.split(self.prompt_batch)]
        return Classifier(self.model, torch.stack(sums).sum(0) / len(prompts), self.classes)


def difference_variance(u: Tensor, deviations: Tensor, labels: Tensor) -> Tensor:
    """V (N, K): variance of the cosine to each class less that to the label's, of unit features u (N, D).

    deviations: (P, K, D) from the mean over prompts; their products are divided by P + 1.
    """
    p = len(deviations)
    d = deviations.transpose(0, 1).flatten(1).to(u.dtype)
    squares = u.square().repeat(1, p)
    # F.embedding, because the gradient of d[labels] adds up in no fixed order on several threads.
    own = F.embedding(labels, d)
    variances = squares @ d.square().T + (squares * own.square()).sum(1, keepdim=True)
    return (variances - 2 * (squares * own) @ d.T) / (p + 1)
