"""Which of a model's parameters a method trains, beside its own: `tune`.

None          as the method does, of what is not frozen in the model
"full"        the same, said
"visual"      the image tower
"text"        the text tower
"projection"  the last linear map of each tower, into the space of features
"lora"        low-rank adapters that are put into the towers (`robustft.clip.LoRA`)
"prompts"     prompts, and nothing of the model: what prompt learners do, and others do not

A method of the image tower alone takes of these what is in it. What was frozen in the model stays frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from robustft import clip
from robustft.clip.encoding import image_tower
from robustft.data.seeds import stateless_seed
from robustft.machine import Tune
from robustft.ops.kinds import described

PROMPT_LEARNERS = "CoOp, KgCoOp, CoCoOp, MaPLe, ProDA and LoCoOp"


def check_tune(tune: Any, lora: Any, kind: Any) -> clip.LoRA | None:
    """The adapters that are asked for of a method of this kind; ValueError where `tune` and `lora` do not fit it, or
    each other."""
    name, towers = kind.__name__, kind.towers
    if tune is not None and tune not in get_args(Tune):
        raise ValueError(f"tune must be one of {', '.join(get_args(Tune))}, got {tune!r}")
    if lora is not None and tune != "lora":
        raise ValueError(f'lora describes the adapters of tune="lora", and tune is {tune!r}')
    if tune == "prompts" and not kind.learns_prompts:
        raise ValueError(f"tune is 'prompts', but {name} learns none: {PROMPT_LEARNERS} do")
    if tune not in (None, "prompts") and not towers:
        raise ValueError(f"tune is {tune!r}, but {name} trains nothing of the model: leave it away")
    if tune in clip.TOWERS and tune not in towers:
        raise ValueError(f"tune is {tune!r}, but {name} trains the {' and '.join(towers)} tower alone")
    if tune != "lora":
        return None
    if isinstance(lora, Mapping):
        try:
            return clip.LoRA(**lora)
        except TypeError as error:
            raise ValueError(f"lora: {error}") from error
    if lora is not None and not isinstance(lora, clip.LoRA):
        raise TypeError(f"lora is {described(lora)}; expected a robustft.clip.LoRA, or its arguments by name")
    return lora or clip.LoRA()


def set_trained(model: nn.Module, tune: Tune | None, lora: clip.LoRA | None, towers: Sequence[str], seed: int) -> None:
    """Freezes what `tune` does not name, or puts adapters into the model; seed: of these. In place."""
    if lora is not None:
        clip.adapt(model, lora, towers=towers, seed=stateless_seed(seed, "lora"))
    elif tune not in (None, "full", "prompts"):
        chosen = {id(p) for p in _named(model, tune, towers)}
        for p in model.parameters():
            p.requires_grad_(p.requires_grad and id(p) in chosen)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"tune is {tune!r}, which is frozen in the model: nothing is left to train")


def _named(model: Any, tune: str, towers: Sequence[str]) -> list[nn.Parameter]:
    if tune == "visual":
        return list(image_tower(model).parameters())
    if tune == "text":
        tower = clip.text_tower(model)
        if tower is not model:
            return list(tower.parameters())
        others = {id(p) for p in image_tower(model).parameters()}
        return [p for p in model.parameters() if id(p) not in others and p.ndim > 0]  # 0-d: the scale and its bias
    ends = {weight.data_ptr() for weight in _projections(model, towers)}
    return [p for p in model.parameters() if p.data_ptr() in ends]


def _projections(model: nn.Module, towers: Sequence[str]) -> list[Tensor]:
    """The last linear maps of these towers; ValueError, naming what was looked for, where none of them has one."""
    found: list[Tensor] = []
    errors: list[ValueError] = []
    for tower, of in {"visual": clip.visual_projection, "text": clip.text_projection}.items():
        if tower in towers:
            try:
                found.append(of(model))
            except ValueError as error:
                errors.append(error)
    if not found:
        raise errors[0]
    return found
