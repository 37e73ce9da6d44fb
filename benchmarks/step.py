"""Whole training steps beside the plain loop that released code runs: towers, loss, backward, update, teacher.

    python -m benchmarks.step [--only PATTERN] [--steps N]      # results/step.json
    python -m benchmarks.step --compile [--only PATTERN]        # robustft with compiled towers beside itself without
    python -m benchmarks.step --adamw [--only PATTERN]          # with its AdamW beside torch's: results/adamw.json

The plain loop has the same weights and batches: open_clip's towers on all positions of each image's caption, the eager
loss, AdamW as torch makes it by default, and for CaRot a second full pass of images and texts through the teacher and a
loop over parameters for its average. robustft has its own methods and `robustft.training.AdamW`. Both train from the
same start, step by step in turn, so that whatever else the machine does meets both; their losses have to agree all
along. One thread.

    captions    "distinct": a text of its own for each image, as tokens; a number: of so many classes, one template
    ratio       median over steps of (the plain loop's time / robustft's); with --compile, (without / with); with
                --adamw, (torch's `AdamW(fused=True)` / robustft's)
    shares      of robustft's step: image tower, text tower and teacher forward, backward, update
    compiling   seconds that the first steps took longer than the others, and how many graphs were compiled
    bytes       of gradients and moments after the last step, robustft's and torch's
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustft import clip, methods
from robustft.losses import CROSS_WEIGHT, DISTILLATION_WEIGHT, ORTHOGONALITY_WEIGHT
from robustft.training import AdamW, CompiledTowers, whole_tables
from robustft.training.adamw import values_of

from . import machine
from .__main__ import check_compiled
from .small_architectures import letters

AGREE = 2e-3
"""Relative difference of the losses: two loops whose sums have another order, after several steps of training."""
LR, TOTAL_STEPS = 1e-5, 1000
WEIGHT_DECAY = 0.01  # what torch has by default


class Case(NamedTuple):
    """A method on a model and a batch. `classes` is None for a caption of each image's own."""

    method: str
    model: str
    batch: int
    classes: int | None

    def __str__(self) -> str:
        captions = "distinct captions" if self.classes is None else f"{self.classes} classes"
        return f"{self.method} {self.model} batch {self.batch}, {captions}"


CASES = (
    *(Case(method, "ViT-B-32", 8, None) for method in ("FLYP", "CaRot")),
    *(Case(method, "ViT-B-32", 16, 4) for method in ("FLYP", "CaRot", "DRM", "FineTune")),
    *(Case(method, "ViT-B-32", 32, 10) for method in ("FLYP", "CaRot")),
    *(Case(method, "bundled", batch, 10) for batch in (16, 128) for method in ("FLYP", "CaRot", "DRM", "FineTune")),
)
BAR = {
    Case("FLYP", "ViT-B-32", 8, None): 1.35,
    Case("CaRot", "ViT-B-32", 8, None): 1.5,
    Case("FLYP", "ViT-B-32", 16, 4): 2.0,
    Case("CaRot", "ViT-B-32", 16, 4): 2.2,
    Case("FLYP", "bundled", 16, 10): 2.0,
    Case("CaRot", "bundled", 16, 10): 2.0,
}
OF_OPTIMIZERS = (
    Case("FLYP", "bundled", 16, 10),
    Case("FLYP", "bundled", 128, 10),
    Case("FLYP", "ViT-B-32", 8, None),
    Case("FLYP", "ViT-B-16-SigLIP2", 4, 4),
)
"""The table of embeddings is four fifths of the bundled model, a sixth of ViT-B-32 and half of SigLIP 2's."""
TEMPLATE = "a photo of a {}."


class Batch(NamedTuple):
    """Images, a label each, all positions of each one's caption, and the proxy of its label that DRM takes."""

    images: Tensor
    labels: Tensor
    tokens: Tensor
    core: Tensor


def bundle_of(name: str) -> tuple[nn.Module, Any, tuple[str, ...]]:
    """A model, its tokenizer and ten class names that it knows."""
    if name == "bundled":
        from robustft.data import glyphworld

        bundle = glyphworld.load_clip()
        return bundle.model, bundle.tokenizer, glyphworld.CLASS_NAMES
    import open_clip

    torch.manual_seed(0)
    names = ("cat", "dog", "horse", "ship", "car", "plane", "frog", "deer", "bird", "truck")
    config = open_clip.get_model_config(name)
    if "hf_tokenizer_name" in config["text_cfg"]:  # which would have to be fetched: letters are as good for times
        return open_clip.create_model(name), letters({"model_cfg": config}), names
    return open_clip.create_model(name), open_clip.get_tokenizer(name), names


def template_of(case: Case) -> str:
    if case.model != "bundled":
        return TEMPLATE
    from robustft.data import glyphworld

    return glyphworld.TEMPLATES[0]


def batches(case: Case, tokenizer: Any, names: tuple[str, ...], side: int, steps: int) -> list[Batch]:
    chance = torch.Generator().manual_seed(1)
    found = []
    for step in range(steps):
        images = torch.randn(case.batch, 3, side, side, generator=chance)
        labels = torch.randint(case.classes or len(names), (case.batch,), generator=chance)
        texts = [template_of(case).format(names[label]) for label in labels.tolist()]
        if case.classes is None:
            texts = [f"a photo of a {names[i % 10]}, number {case.batch * step + i}" for i in range(case.batch)]
        core = torch.rand(case.batch, generator=chance)
        found.append(Batch(images, labels, tokenizer(texts), core))
    return found


class Plain:
    """The loops as released code has them."""

    def __init__(self, case: Case, model: nn.Module, tokenizer: Any, names: tuple[str, ...]) -> None:
        self.name, self.model = case.method, copy.deepcopy(model).train()
        self.interval, self.steps = max(2, round(0.02 * TOTAL_STEPS)), 0
        parameters = list(self.model.parameters())
        if case.method == "CaRot":
            self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval()
        if case.method == "DRM":
            self.concepts = tokenizer(descriptions(names))
        if case.method == "FineTune":
            with torch.no_grad():
                head = clip.class_embeddings(self.model.eval(), tokenizer, names, [template_of(case)])
            self.head = nn.Parameter(clip.logit_scale(self.model).detach() * head)
            parameters = [*self.model.visual.parameters(), self.head]
            self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=LR, weight_decay=WEIGHT_DECAY)

    def encode(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        images, texts = model.encode_image(batch.images), model.encode_text(batch.tokens)
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)

    def loss(self, batch: Batch) -> Tensor:
        model: Any = self.model
        if self.name == "FineTune":
            return F.cross_entropy(F.normalize(model.encode_image(batch.images), dim=-1) @ self.head.T, batch.labels)
        u, t = self.encode(model, batch)
        z = model.logit_scale.exp() * u @ t.T
        y = torch.arange(len(z))
        loss = (F.cross_entropy(z, y) + F.cross_entropy(z.T, y)) / 2
        if self.name == "DRM":
            v = F.normalize(model.encode_text(self.concepts), dim=-1)
            log_p = (model.logit_scale.exp() * u @ v.T).log_softmax(-1)
            loss = loss - (batch.core * log_p[torch.arange(len(log_p)), batch.labels]).mean()
        if self.name == "CaRot":
            visual, text = model.visual.proj, model.text_projection
            gram = visual.T @ visual
            loss = loss + CROSS_WEIGHT * (visual @ text.T).norm()
            loss = loss + ORTHOGONALITY_WEIGHT * (gram - torch.eye(len(gram))).norm()
            if self.steps:
                with torch.no_grad():
                    ut, tt = self.encode(self.teacher, batch)
                    zt = self.teacher.logit_scale.exp() * ut @ tt.T
                rows = -(zt.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
                cols = -(zt.T.softmax(-1) * z.T.log_softmax(-1)).sum(-1).mean()
                loss = loss + DISTILLATION_WEIGHT * (rows + cols)
        return loss

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        if self.name == "CaRot" and self.steps % self.interval == 0:
            momentum = min(0.9, 0.05 + 0.85 * self.steps / (0.2 * TOTAL_STEPS))
            with torch.no_grad():
                for of_teacher, of_student in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                    of_teacher.data = momentum * of_teacher.data + (1 - momentum) * of_student.data
        self.steps += 1
        return loss.item()


def descriptions(names: tuple[str, ...]) -> list[str]:
    return [f"the shape of a {name}" for name in names]


class Ours:
    """robustft's method, and the loop of its docs."""

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        tokenizer: Any,
        names: tuple[str, ...],
        compiled: bool = False,
        torchs: bool = False,
    ) -> None:
        options: dict[str, Any] = {"tokenizer": tokenizer, "class_names": names, "templates": (template_of(case),)}
        if case.method == "CaRot":
            options["total_steps"] = TOTAL_STEPS
        if case.method == "DRM":
            options |= {"descriptions": descriptions(names), "proxy": None}
        self.distinct = case.classes is None
        self.method = getattr(methods, case.method)(model, **options).train()
        self.towers: Any = CompiledTowers(self.method) if compiled else nullcontext()
        self.optimizer: torch.optim.Optimizer = AdamW(self.method, LR, weight_decay=WEIGHT_DECAY)
        if torchs:
            whole_tables(self.method)
            self.optimizer = torch.optim.AdamW(self.optimizer.param_groups, fused=True)

    def step(self, batch: Batch) -> float:
        given: Any = (batch.images, batch.tokens if self.distinct else batch.labels)
        if isinstance(self.method, methods.DRM):
            given = {"image": batch.images, "label": batch.labels, "core": batch.core}
        self.optimizer.zero_grad()
        with self.towers:
            loss = self.method.step(given).loss
            loss.backward()
        self.optimizer.step()
        self.method.after_step()
        return loss.item()

    def bytes(self) -> int:
        """Of gradients and moments."""
        values = [values_of(p.grad) for p in self.method.parameters() if p.grad is not None]
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in values + moments)


@contextmanager
def watched(seconds: dict[str, float], ours: Ours) -> Iterator[None]:
    """Adds to `seconds` what each part of the steps in this block takes."""

    def timed(part: Callable[[tuple], str] | str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                name = part if isinstance(part, str) else part(args)
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

        return run

    def tower(name: str) -> Callable[[tuple], str]:
        teacher = getattr(ours.method, "teacher", None)
        return lambda args: "teacher" if args[0] is teacher else name

    with ExitStack() as patched:
        for function, part in (("encode_images", "image tower"), ("encode_texts", "text tower")):
            patched.enter_context(mock.patch.object(clip, function, timed(tower(part), getattr(clip, function))))
        backward = timed("backward", Tensor.backward)
        patched.enter_context(mock.patch.object(Tensor, "backward", backward))
        patched.enter_context(mock.patch.object(ours.optimizer, "step", timed("update", ours.optimizer.step)))
        yield


def measure(case: Case, steps: int, compiled: bool = False, optimizers: bool = False) -> dict[str, Any]:
    model, tokenizer, names = bundle_of(case.model)
    visual: Any = model.visual
    side = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    given = batches(case, tokenizer, names, side, steps + 2)
    start = (case, model, tokenizer, names)
    ours = Ours(*start, compiled=compiled)
    plain = Ours(*start, torchs=True) if optimizers else Ours(*start) if compiled else Plain(*start)
    del model, start
    times: dict[str, list[float]] = {"robustft": [], "plain": []}
    curves: dict[str, list[float]] = {"robustft": [], "plain": []}
    parts: dict[str, float] = {}
    first, graphs = 0.0, _graphs() if compiled else 0
    for number, batch in enumerate(given):
        timed = number >= 2  # CaRot's first step has no teacher yet
        for name, loop in (("robustft", ours), ("plain", plain)):
            with watched(parts, ours) if timed and loop is ours else nullcontext():
                started = time.perf_counter()
                curves[name].append(loop.step(batch))
                if timed:
                    times[name].append(time.perf_counter() - started)
                elif loop is ours:
                    first += time.perf_counter() - started
    apart = max(abs(a - b) / abs(b) for a, b in zip(curves["robustft"], curves["plain"], strict=True))
    if not apart <= AGREE:
        raise AssertionError(f"{case}: the losses differ by {apart:.2g} of their value: {curves}")
    ratio = statistics.median(b / a for a, b in zip(times["robustft"], times["plain"], strict=True))
    total = sum(times["robustft"])
    seconds = statistics.median(times["robustft"])
    further: dict[str, Any] = {}
    if compiled:
        further["compiling"] = {"seconds": round(first - 2 * seconds, 1), "graphs": _graphs() - graphs}
    if isinstance(plain, Ours) and optimizers:
        further["bytes"] = {"robustft": ours.bytes(), "torch": plain.bytes()}
    return {
        "ratio": round(ratio, 2),
        "seconds": round(seconds, 4),
        **further,
        "losses_differ": float(f"{apart:.1e}"),
        "shares": {name: round(spent / total, 3) for name, spent in parts.items()},
    }


def adamw_table(measured: dict[str, Any]) -> str:
    """results/adamw.json as a Markdown table, and the machine."""
    lines = [
        "| step | torch's time | seconds | gradients and moments | torch's |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in measured["results"].items():
        ours, torchs = (f"{row['bytes'][whose] / 1e6:,.0f} MB" for whose in ("robustft", "torch"))
        lines.append(f"| {name} | {row['ratio']:.2f}x | {row['seconds']:.3f} | {ours} | {torchs} |")
    return "\n".join([*lines, "", machine.line(measured["machine"]), ""])


def _graphs() -> int:
    """How many graphs torch.compile has made so far. Its part of torch takes seconds to load."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def table(measured: dict[str, Any]) -> str:
    """results/step.json as a Markdown table, and the machine."""
    parts = ("image tower", "text tower", "teacher", "backward", "update")
    lines = [
        f"| step | the plain loop's time | bar | seconds | {' | '.join(parts)} |",
        "|---|" + "---:|" * (3 + len(parts)),
    ]
    for name, row in measured["results"].items():
        bar = f"{row['must']:.2f}x" if "must" in row else ""
        shares = " | ".join(f"{100 * row['shares'][part]:.0f} %" if part in row["shares"] else "" for part in parts)
        lines.append(f"| {name} | {row['ratio']:.2f}x | {bar} | {row['seconds']:.3f} | {shares} |")
    return "\n".join([*lines, "", machine.line(measured["machine"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the rows that this pattern matches")
    parser.add_argument("--steps", type=int, default=9)
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--compile", action="store_true", help="measure what compiled towers gain over others")
    beside.add_argument("--adamw", action="store_true", help="measure what robustft's AdamW gains over torch's")
    chosen = parser.parse_args()
    check_compiled()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    alone = not (chosen.compile or chosen.adamw)
    for case in OF_OPTIMIZERS if chosen.adamw else CASES:
        if re.search(chosen.only, str(case)):
            found[str(case)] = row = measure(case, chosen.steps, chosen.compile, chosen.adamw)
            if case in BAR and alone:
                row["must"] = BAR[case]
            print(f"{case}: {row}", flush=True)
    for model, batch, classes in dict.fromkeys(case[1:] for case in CASES):
        of = [found.get(str(Case(name, model, batch, classes))) for name in ("FLYP", "CaRot")]
        if None not in of:
            flyp, carot = (row["seconds"] for row in of if row)
            print(f"CaRot over FLYP, {model} batch {batch}: {carot / flyp:.2f} (at most 1.4)")
    if not (chosen.only or chosen.compile):
        command = "python -m benchmarks.step" + " --adamw" * chosen.adamw
        print(machine.write("adamw" if chosen.adamw else "step", command, found))


if __name__ == "__main__":
    main()
