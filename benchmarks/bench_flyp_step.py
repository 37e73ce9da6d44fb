"""A whole training step of FLYP on the bundled model: both towers, loss, backward, AdamW.

"robustft" and "eager" are the same step of the same method, the latter under `robustft.backend("reference")`; each has
a model and an optimiser of its own. Of such a small model the loss is a larger part than of a real one.
"""

from __future__ import annotations

import torch
from torch import Tensor

import robustft
from robustft.clip import image_statistics
from robustft.data import glyphworld
from robustft.pipeline import quickstart

from .work import Candidate, Row, Run, Work

SIZES = (128, 512)


def inputs(row: Row) -> tuple[Tensor, Tensor]:
    images, labels = glyphworld.digits("train").tensors(*image_statistics(glyphworld.load_clip().model))
    wanted = torch.arange(row.n) % len(images)
    return images[wanted], labels[wanted]


def training(name: str, backend: str) -> Run:
    """Training steps, one a call, under a backend; gives the loss. The first call prepares."""
    prepared = []

    def step(images: Tensor, labels: Tensor) -> Tensor:
        method, optimizer = prepared[0]
        loss = method.step((images, labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
        return loss.detach()

    def run(images: Tensor, labels: Tensor) -> tuple[Tensor]:
        with robustft.backend(backend):
            if not prepared:
                prepared.append(prepare(name))
                step(images, labels)  # CaRot's first step has no teacher yet
            return (step(images, labels),)

    return run


def prepare(name: str) -> tuple[robustft.methods.Method, torch.optim.Optimizer]:
    recipe, bundle = quickstart.RECIPES[name], glyphworld.load_clip()
    method = getattr(robustft.methods, recipe.method)(
        bundle.model,
        tokenizer=bundle.tokenizer,
        class_names=glyphworld.CLASS_NAMES,
        templates=glyphworld.TEMPLATES,
        total_steps=1000,
        **recipe.options,
    )
    return method, torch.optim.AdamW((p for p in method.parameters() if p.requires_grad), lr=1e-5)


def steps_of(name: str, work: str) -> Work:
    def candidates(row: Row) -> list[Candidate]:
        return [
            Candidate("robustft", training(name, "auto"), tolerance=0.01, prepares=True),
            Candidate("eager", training(name, "reference"), tolerance=0.01, prepares=True),
        ]

    return Work(
        work,
        rows=tuple(Row(work, n, 0) for n in SIZES),
        quick=(Row(work, SIZES[0], 0),),
        inputs=inputs,
        candidates=candidates,
        reference=lambda *batch: training(name, "reference")(*batch),
        flops=lambda row: 0,
        formula="none",
    )


WORK = steps_of("FLYP", "flyp_step")


def test_flyp_step(race, row):
    race(WORK, row)
