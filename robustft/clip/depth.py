"""How deep in its tower each entry of a model's state stands: the number of its block, for updates scaled by depth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from robustft.clip.encoding import unwrap
from robustft.ops.kinds import checked


class Depth(NamedTuple):
    """Block `number` of `blocks`, from 1: what stands before a tower's blocks counts as the first, what comes after as
    the last."""

    number: int
    blocks: int

    @property
    def share(self) -> float:
        """(number - 1) / (blocks - 1): 0 for the first block, 1 for the last; 1 for a tower of a single one."""
        return (self.number - 1) / (self.blocks - 1) if self.blocks > 1 else 1.0


STEM = re.compile(
    r"(^|\.)(conv\d|bn\d|stem|patch_embed|norm_pre|ln_pre|cls_token|reg_token|class_embedding|pos_embed|embeddings|"
    r"(positional|token)_embedding)(\.|$)"
)
"""Entries that a tower uses before its blocks; all others outside of blocks come after them."""


@checked
def depths(model: nn.Module) -> Mapping[str, Depth]:
    """The depth of every entry of `model.state_dict()`, in the image tower or in the rest, which is the text tower.

    Blocks are the parts of a ModuleList or a Sequential of two or more modules of one class, the innermost where these
    are nested: the blocks of a transformer, the bottlenecks of a ResNet, the blocks of a ConvNeXt's stages and, each a
    block of its own, what stands in a stage beside them. Entries of neither tower, the scale and the bias of the
    logits, count as the last.
    """
    model = unwrap(model)
    prefixes = _block_prefixes(model)
    blocks: dict[bool, dict[str, int]] = {True: {}, False: {}}  # numbers by prefix, of the image tower and of the rest
    numbers: dict[str, int | None] = {}
    for name in model.state_dict():
        of_tower = blocks[name.startswith("visual.")]
        own = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if own is not None:
            numbers[name] = of_tower.setdefault(own, len(of_tower) + 1)
        else:
            before = STEM.search(name) and "attnpool" not in name and "attn_pool" not in name
            numbers[name] = 1 if before else None
    found = {}
    for name, number in numbers.items():
        total = max(1, len(blocks[name.startswith("visual.")]))
        found[name] = Depth(number or total, total)
    return found


def _block_prefixes(model: nn.Module) -> tuple[str, ...]:
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            parts = list(module.named_children())
            weighted = all(next(part.parameters(), None) is not None for _, part in parts)
            if len(parts) > 1 and len({type(part) for _, part in parts}) == 1 and weighted:
                found += [f"{name}.{part}." for part, _ in parts]
    return tuple(found)
