"""Random numbers as a function of a seed and of what they are for, never of a generator's history."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def stateless_generator(seed: int, *key: Any) -> torch.Generator:
    """A CPU generator that depends on (seed, *key) alone: the same step draws the same numbers in every run.

    The key is hashed because torch's generator looks at the lower 32 bits of its seed only.
    """
    return torch.Generator().manual_seed(stateless_seed(seed, *key))


def stateless_seed(seed: int, *key: Any) -> int:
    """A 32-bit seed that depends on (seed, *key) alone."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *key)).encode(), digest_size=4).digest(), "little")
