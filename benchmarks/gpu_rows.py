"""The rows of `benchmarks.gpu_check`, one process each; what they print is JSON, a line at a time.

    python -m benchmarks.gpu_rows NAME        # every candidate once, its result checked; then rounds, a line each
    python -m benchmarks.gpu_rows once NAME   # without the rounds: compiles what they need; with ours alone if NAME
    python -m benchmarks.gpu_rows ours NAME   # ours alone, three times, for a profiler
    python -m benchmarks.gpu_rows list | rates | small | values NAME

In a round the candidates take turns; `record` makes the row of the lines so far: medians over rounds, the bar, and the
share of the roofline, the least time by the card's measured bf16 product and copy rates over ours. `small` runs every
kernel once on a small case, for compute-sanitizer; `values` holds a public function against its reference.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustft
from benchmarks.gpu_check import NO_DEVICE
from robustft import functional as rf
from robustft.ops import accelerator

DEVICE = "cuda"
SECONDS = 3.0
"""Of timed rounds of a row, about."""
SLOW = 1.0
"""Seconds from which a run is not repeated more than it must be."""


BF16 = torch.bfloat16
TOLERANCE = {torch.float32: 1e-4, BF16: 1e-2, torch.float16: 5e-3}
"""Of a result's relative error, by the dtype of what it is made of."""


class Bar(NamedTuple):
    """Must and moonshot in milliseconds, and how many times faster than eager and than any other peer."""

    milliseconds: float | None = None
    eager: float | None = None
    peers: float | None = None


class Work(NamedTuple):
    """The least that a row has to do: flops of bfloat16 and of float32 factors, and bytes read and written."""

    bf16: float = 0.0
    fp32: float = 0.0
    bytes: float = 0.0

    def milliseconds(self, rates: dict[str, Any]) -> float:
        """By the card's measured rates: the roofline."""
        seconds = (
            self.bf16 / rates["bf16_tflops"],
            self.fp32 / rates["fp32_tflops"],
            self.bytes / rates["copy_tb_per_second"],
        )
        return max(seconds) / 1e9


class Candidates(dict[str, Callable[[], Any]]):
    """What computes a row, by name, ours first; `check` raises an AssertionError for a result of ours that is wrong."""

    check: Callable[[Any], None] | None = None

    def checked(self, check: Callable[[Any], None]) -> Candidates:
        self.check = check
        return self


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def error(ours: Tensor, expected: Tensor) -> float:
    """Relative, by norms: NaN or infinite ones pass no comparison."""
    a, b = ours.detach().double(), expected.detach().double()
    return float((a - b).norm() / b.norm())


def like(expected: Callable[[], Any], tolerance: float) -> Callable[[Any], None]:
    """A check against a computation in float32 or better, each tensor by itself."""

    def check(result: Any) -> None:
        errors = [error(a, b) for a, b in zip(tensors(result), tensors(expected()), strict=True)]
        assert all(e <= tolerance for e in errors), f"relative errors {errors}, expected at most {tolerance}"

    return check


def sampled(x: Tensor, t: Tensor, s: Tensor, memory: str | int) -> Callable[[Any], None]:
    """A check of the losses of 64 pairs in float64, and of the mean loss's own, of a matrix too large to have."""

    def check(result: Any) -> None:
        at = torch.arange(0, len(x), max(1, len(x) // 64), device=x.device)[:64]
        scale, some_x, some_t = s.detach().double(), x.detach()[at].double(), t.detach()[at].double()
        rows = torch.stack([(scale * a @ t.detach().double().T).logsumexp(0) for a in some_x])
        cols = torch.stack([(scale * b @ x.detach().double().T).logsumexp(0) for b in some_t])
        expected = (rows + cols) / 2 - scale * (some_x * some_t).sum(1)
        with torch.no_grad():
            each = rf.contrastive_loss(x, t, s, memory=memory, reduction="none")
        found = error(each[at], expected), error(result[0], each.double().mean())
        assert all(e <= 1e-4 for e in found), f"relative errors of losses and of their mean {found}"
        assert all(g.isfinite().all() for g in result[1:]), "a gradient is not finite"

    return check


def unit(n: int, d: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, device=DEVICE), dim=1).to(dtype)


def pairs(n: int, d: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs with a cosine near .2, as planted in the CPU's rows."""
    x = unit(n, d, seed, torch.float32)
    t = F.normalize(x + 5 * unit(n, d, seed + 1, torch.float32), dim=1)
    return x.to(dtype).requires_grad_(), t.to(dtype).requires_grad_()


def backward(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: [value := loss(), *torch.autograd.grad(value, leaves)]


def eager_contrastive(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    z = s.to(x.dtype) * x @ t.T
    y = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(z.float(), y) + F.cross_entropy(z.T.float(), y)) / 2


def eager_distillation(x: Tensor, t: Tensor, s: Tensor, xt: Tensor, tt: Tensor, st: float) -> Tensor:
    z, zt = (s.to(x.dtype) * x @ t.T).float(), (st * xt @ tt.T).float()
    soft = sum(-(q.softmax(1) * p.log_softmax(1)).sum(1).mean() for p, q in ((z, zt), (z.T, zt.T)))
    return eager_contrastive(x, t, s) + 1.5 * soft


def contrastive_peers(x: Tensor, t: Tensor, s: Tensor) -> Candidates:
    """What can be installed beside torch, each called for both directions."""
    y = torch.arange(len(x), device=x.device)
    compiled = torch.compile(eager_contrastive, dynamic=False)
    found = Candidates({"torch.compile": backward(lambda: compiled(x, t, s), x, t, s)})

    def twice(one: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        scaled = s.to(x.dtype)
        return backward(lambda: (one(scaled * x, t) + one(scaled * t, x)) / 2, x, t, s)

    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch chunked"] = twice(lambda a, b: F.linear_cross_entropy(a, b, y, options=options))
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = twice(lambda a, b: liger(b, a, y))
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["Cut Cross-Entropy"] = twice(lambda a, b: linear_cross_entropy(a, b, y, filter_eps=None))
    except ImportError:
        pass
    try:
        from inf_cl import cal_flash_loss

        found["Inf-CL"] = backward(
            lambda: (cal_flash_loss(x, t, y, s) + cal_flash_loss(t, x, y, s)).mean() / 2, x, t, s
        )
    except ImportError:
        pass
    return found


def contrastive(n: int, d: int, dtype: torch.dtype, memory: str | int = "auto", peers: bool = True) -> Candidates:
    x, t = pairs(n, d, dtype)
    s = torch.tensor(50.0, device=DEVICE, requires_grad=True)
    found = Candidates({"robustft": backward(lambda: rf.contrastive_loss(x, t, s, memory=memory), x, t, s)})
    if not peers:
        return found.checked(sampled(x, t, s, memory))
    found.update({"eager": backward(lambda: eager_contrastive(x, t, s), x, t, s), **contrastive_peers(x, t, s)})
    wide = backward(lambda: eager_contrastive(x.float(), t.float(), s), x, t, s)
    return found.checked(like(wide, TOLERANCE[dtype]))


def eager_sigmoid(x: Tensor, t: Tensor, s: Tensor, b: Tensor) -> Tensor:
    z = (s.to(x.dtype) * x @ t.T).float() + b
    return F.softplus(z).sum() / len(x) - z.diagonal().mean()


def sigmoid(n: int, d: int, dtype: torch.dtype, peers: bool = True) -> Candidates:
    x, t = pairs(n, d, dtype)
    s, b = (torch.tensor(number, device=DEVICE, requires_grad=True) for number in (50.0, -10.0))
    found = Candidates({"robustft": backward(lambda: rf.sigmoid_contrastive_loss(x, t, s, b), x, t, s, b)})
    try:
        from siglip_kernel import fused_siglip_loss

        found["siglip-kernel"] = backward(lambda: fused_siglip_loss(x, t, s.log(), b), x, t, s, b)
    except ImportError:
        pass
    if not peers:
        return found.checked(sampled_rows(x, t, s, b))
    compiled = torch.compile(eager_sigmoid, dynamic=False)
    found["eager"] = backward(lambda: eager_sigmoid(x, t, s, b), x, t, s, b)
    found["torch.compile"] = backward(lambda: compiled(x, t, s, b), x, t, s, b)
    return found.checked(
        like(backward(lambda: eager_sigmoid(x.float(), t.float(), s, b), x, t, s, b), TOLERANCE[dtype])
    )


def sampled_rows(x: Tensor, t: Tensor, s: Tensor, b: Tensor) -> Callable[[Any], None]:
    """A check of the sigmoid losses of 64 images in float64, and of the mean loss's own."""

    def check(result: Any) -> None:
        at = torch.arange(0, len(x), max(1, len(x) // 64), device=x.device)[:64]
        rows = s.detach().double() * x.detach()[at].double() @ t.detach().double().T + b.detach().double()
        expected = F.softplus(rows, threshold=60).sum(1) - rows.gather(1, at[:, None])[:, 0]
        with torch.no_grad():
            each = rf.sigmoid_contrastive_loss(x, t, s, b, reduction="none")
        found = error(each[at], expected), error(result[0], each.double().mean())
        assert all(e <= 1e-4 for e in found), f"relative errors of losses and of their mean {found}"
        assert all(g.isfinite().all() for g in result[1:]), "a gradient is not finite"

    return check


def distillation(n: int, d: int, dtype: torch.dtype) -> Candidates:
    x, t = pairs(n, d, dtype)
    xt, tt = (f.detach() for f in pairs(n, d, dtype, seed=7))
    s = torch.tensor(50.0, device=DEVICE, requires_grad=True)

    def ours() -> Tensor:
        terms = rf.contrastive_distillation_loss(x, t, s, xt, tt, 40.0)
        return terms.contrastive + 1.5 * terms.distillation

    compiled = torch.compile(eager_distillation, dynamic=False)
    wide = (f.float() for f in (xt, tt))
    return Candidates(
        {
            "robustft": backward(ours, x, t, s),
            "eager": backward(lambda: eager_distillation(x, t, s, xt, tt, 40.0), x, t, s),
            "torch.compile": backward(lambda: compiled(x, t, s, xt, tt, 40.0), x, t, s),
        }
    ).checked(
        like(
            backward(lambda: eager_distillation(x.float(), t.float(), s, *wide, 40.0), x, t, s),
            TOLERANCE[dtype],
        )
    )


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run as a CUDA graph; a host synchronisation in it would fail here."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return lambda: (graph.replay(), result)[1]


def graphs(of: Candidates) -> Candidates:
    """Ours as a graph, beside eager and compiled code as they are and eager as a graph."""
    found = Candidates({"robustft": graphed(of["robustft"]), "eager, no graph": of["eager"]})
    found["eager"] = graphed(of["eager"])
    found.check = of.check
    return found


def penalties(z: Tensor, y: Tensor) -> Tensor:
    z_label = z.gather(1, y[:, None])
    above = z > z_label
    penalty = torch.where(above.any(1), z.masked_fill(~above, -torch.inf).logsumexp(1) - z_label[:, 0], 0)
    return penalty.nan_to_num(neginf=0).mean()


def eager_classes(x: Tensor, w: Tensor, y: Tensor, s: Tensor) -> Tensor:
    z = (s.to(x.dtype) * x @ w.T).float()
    return F.cross_entropy(z, y) + penalties(z, y)


def eager_dual_risk(x: Tensor, w: Tensor, v: Tensor, y: Tensor, core: Tensor, s: Tensor) -> Tensor:
    z, of_core = ((s.to(x.dtype) * x @ heads.T).float() for heads in (w, v))
    return F.cross_entropy(z, y) - (core * of_core.log_softmax(1)).sum(1).mean()


def eager_scores(x: Tensor, w: Tensor, s: float) -> tuple[Tensor, ...]:
    cosines = (x @ w.T).float()
    z, p = s * cosines, (s * cosines).softmax(1)
    top = cosines.max(1)
    entropy = -torch.special.entr(p).sum(1)
    return top.values, cosines.softmax(1).amax(1), p.amax(1), z.logsumexp(1) / s, entropy, top.indices


def labelled(n: int, k: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, embeddings of their classes, labels and a scale; about as often right as wrong."""
    w = unit(k, d, 1).requires_grad_()
    y = torch.randint(k, (n,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    x = F.normalize(w.detach().float()[y] + 7 * unit(n, d, 2, torch.float32), dim=1).bfloat16().requires_grad_()
    return x, w, y, torch.tensor(50.0, device=DEVICE, requires_grad=True)


def classes(n: int, k: int, d: int, memory: str | int = "auto") -> Candidates:
    x, w, y, s = labelled(n, k, d)
    compiled = torch.compile(eager_classes, dynamic=False)
    return Candidates(
        {
            "robustft": backward(lambda: sum(rf.classification_loss(x, w, y, s, memory=memory)), x, w, s),
            "eager": backward(lambda: eager_classes(x, w, y, s), x, w, s),
            "torch.compile": backward(lambda: compiled(x, w, y, s), x, w, s),
        }
    ).checked(like(backward(lambda: eager_classes(x.float(), w.float(), y, s), x, w, s), TOLERANCE[BF16]))


def dual_risk(n: int, k: int, d: int) -> Candidates:
    x, w, y, s = labelled(n, k, d)
    v = unit(k, d, 3).requires_grad_()
    core = (9 * unit(n, k, 4, torch.float32)).softmax(1)
    compiled = torch.compile(eager_dual_risk, dynamic=False)
    wide = backward(lambda: eager_dual_risk(x.float(), w.float(), v.float(), y, core, s), x, w, v, s)
    return Candidates(
        {
            "robustft": backward(lambda: sum(rf.dual_risk(x, w, v, y, core, s)), x, w, v, s),
            "eager": backward(lambda: eager_dual_risk(x, w, v, y, core, s), x, w, v, s),
            "torch.compile": backward(lambda: compiled(x, w, v, y, core, s), x, w, v, s),
        }
    ).checked(like(wide, TOLERANCE[BF16]))


def misalignment(n: int, k: int) -> Candidates:
    z = (50 * unit(n, k, 1, torch.float32)).requires_grad_()
    y = torch.randint(k, (n,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    compiled = torch.compile(penalties, dynamic=False)
    return Candidates(
        {
            "robustft": backward(lambda: rf.misalignment_penalty(z, y), z),
            "eager": backward(lambda: penalties(z, y), z),
            "torch.compile": backward(lambda: compiled(z, y), z),
        }
    ).checked(like(backward(lambda: penalties(z.double(), y), z), 1e-5))


def scores(n: int, k: int, d: int) -> Candidates:
    x, w = unit(n, d, 1), unit(k, d, 2)
    compiled = torch.compile(eager_scores, dynamic=False)
    return Candidates(
        {
            "robustft": lambda: rf.concept_scores(x, w, logit_scale=50.0),
            "eager": lambda: eager_scores(x, w, 50.0),
            "torch.compile": lambda: compiled(x, w, 50.0),
        }
    ).checked(like(lambda: eager_scores(x.float(), w.float(), 50.0), 1e-4))


def neighbors(q: int, n: int, d: int, k: int) -> Candidates:
    queries, points = unit(q, d, 1, torch.float32), unit(n, d, 2, torch.float32)
    index = robustft.NeighborIndex(points)

    def torch_topk() -> Tensor:
        half = points.square().sum(1) / 2
        found = []
        for block in queries.split(1024):
            score = block.bfloat16() @ points_half.T - half
            found.append(score.topk(k, 1).values[:, -1])
        return torch.cat(found)

    def check(result: Tensor) -> None:
        some = slice(0, q, max(1, q // 64))
        exact = [(points.double() - a).square().sum(1).kthvalue(k).values for a in queries[some].double()]
        found = error(result[some], torch.stack(exact))
        assert found <= 1e-6, f"relative error {found} of squared distances, expected at most 1e-6"

    points_half = points.bfloat16()
    return Candidates(
        {
            "robustft": lambda: index.kth_distance(queries, k),
            "robustft with packing": lambda: rf.kth_neighbor_distance(queries, points, k),
            "torch mm + topk (bf16, inexact)": torch_topk,
        }
    ).checked(check)


class Towers(nn.Module):
    """Two transformers of the shapes of CLIP's ViT-B/16: what a training step costs besides its loss."""

    def __init__(self) -> None:
        super().__init__()

        def tower(width: int, heads: int) -> nn.TransformerEncoder:
            layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)

        self.patches, self.image = nn.Conv2d(3, 768, 16, 16), tower(768, 12)
        self.words, self.text = nn.Embedding(49408, 512), tower(512, 8)
        self.image_projection, self.text_projection = nn.Linear(768, 512, False), nn.Linear(512, 512, False)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.image(self.patches(images).flatten(2).transpose(1, 2))[:, 0]
        read = self.text(self.words(tokens))[:, -1]
        return F.normalize(self.image_projection(seen), dim=1), F.normalize(self.text_projection(read), dim=1)


def step(batch: int) -> Candidates:
    """A CaRot step (student, EMA teacher's forward, fused loss) beside a FLYP step, both with robustft's losses."""
    student, teacher = Towers().to(DEVICE), Towers().to(DEVICE)
    images, tokens = torch.randn(batch, 3, 224, 224, device=DEVICE), torch.randint(49408, (batch, 77), device=DEVICE)
    s = torch.tensor(50.0, device=DEVICE, requires_grad=True)

    def run(carot: bool) -> Callable[[], Tensor]:
        def one() -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16):
                x, t = student(images, tokens)
                if carot:
                    with torch.no_grad():
                        xt, tt = teacher(images, tokens)
                    terms = rf.contrastive_distillation_loss(x, t, s, xt, tt, 40.0)
                    loss = terms.contrastive + 1.5 * terms.distillation
                    loss = loss + 0.2 * rf.orthogonality_penalty(student.image_projection.weight.T)
                else:
                    loss = rf.contrastive_loss(x, t, s)
            loss.backward()
            student.zero_grad(set_to_none=True)
            return loss.detach()

        return one

    def check(result: Tensor) -> None:  # unrelated pairs: log n of the contrastive loss, and 3 log n of the other
        assert 0.5 < float(result) / (4 * math.log(batch)) < 2, f"the loss is {float(result)}"

    return Candidates({"robustft": run(True), "FLYP step": run(False)}).checked(check)


def transformer(tokens: int, width: int) -> float:
    """Flops of the 12 layers for one sequence."""
    return 12.0 * tokens * (24 * width**2 + 4 * tokens * width)


STEP = 4 * 512 * (transformer(196, 768) + transformer(77, 512))
"""Flops of a CaRot step of 512 pairs: the students' forward and backward, three of a forward, and the teachers'."""


class Row(NamedTuple):
    """What computes it, what it has to reach, and the least that it has to do."""

    make: Callable[[], Candidates]
    bar: Bar
    work: Work


ROWS: dict[str, Row] = {
    "contrastive-bf16-32768": Row(
        lambda: contrastive(32768, 512, BF16), Bar(6.5, 4.0, 2.0), Work(6.0 * 32768**2 * 512)
    ),
    "distillation-bf16-32768": Row(lambda: distillation(32768, 512, BF16), Bar(9.0), Work(8.0 * 32768**2 * 512)),
    "graph-bf16-512": Row(
        lambda: graphs(contrastive(512, 512, BF16)),
        Bar(0.060),
        Work(6.0 * 512**2 * 512),
    ),
    "kth-neighbor-50k-1M": Row(
        lambda: neighbors(50_000, 1_000_000, 512, 300),
        Bar(300.0, None, 4.0),
        Work(2.0 * 5e4 * 1e6 * 512),
    ),
    "carot-step-512": Row(lambda: step(512), Bar(), Work(STEP)),
    "contrastive-bf16-1M": Row(lambda: contrastive(2**20, 512, BF16, 0, False), Bar(), Work(8.0 * 2.0**40 * 512)),
    "contrastive-panel-32768": Row(lambda: contrastive(32768, 512, BF16, 0, False), Bar(), Work(8.0 * 32768**2 * 512)),
    "contrastive-fp32-8192": Row(lambda: contrastive(8192, 512, torch.float32), Bar(), Work(fp32=6.0 * 8192**2 * 512)),
    "contrastive-bf16-2048": Row(lambda: contrastive(2048, 512, BF16), Bar(), Work(6.0 * 2048**2 * 512)),
    "contrastive-bf16-512": Row(lambda: contrastive(512, 512, BF16), Bar(), Work(6.0 * 512**2 * 512)),
    "sigmoid-bf16-65536": Row(lambda: sigmoid(65536, 768, BF16, False), Bar(48.8), Work(6.0 * 65536**2 * 768)),
    "sigmoid-bf16-8192": Row(lambda: sigmoid(8192, 768, BF16), Bar(), Work(6.0 * 8192**2 * 768)),
    "sigmoid-bf16-512": Row(lambda: sigmoid(512, 512, BF16), Bar(), Work(6.0 * 512**2 * 512)),
    "classes-bf16-4096": Row(lambda: classes(4096, 1000, 512), Bar(), Work(6.0 * 4096 * 1000 * 512)),
    "classes-bf16-512": Row(lambda: classes(512, 1000, 512), Bar(), Work(6.0 * 512 * 1000 * 512)),
    "classes-panel-65536": Row(lambda: classes(65536, 1000, 512, 0), Bar(), Work(8.0 * 65536 * 1000 * 512)),
    "dual-risk-bf16-4096": Row(lambda: dual_risk(4096, 1000, 512), Bar(), Work(12.0 * 4096 * 1000 * 512)),
    "misalignment-fp32-4096": Row(lambda: misalignment(4096, 1000), Bar(), Work(bytes=3.0 * 4 * 4096 * 1000)),
    "scores-bf16-65536": Row(lambda: scores(65536, 1000, 512), Bar(), Work(2.0 * 65536 * 1000 * 512)),
}


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of one run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def rates() -> dict[str, Any]:
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
    source, target = (torch.empty(2**30, device=DEVICE, dtype=torch.uint8) for _ in range(2))
    product = median([timed(lambda: a @ b, 5) for _ in range(7)])
    wide_a, wide_b = a[:4096, :4096].float(), b[:4096, :4096].float()
    wide = median([timed(lambda: wide_a @ wide_b, 5) for _ in range(7)])
    copy = median([timed(lambda: target.copy_(source), 5) for _ in range(7)])
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "architecture": accelerator.architecture(torch.device(DEVICE, 0)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bf16_tflops": round(2 * 8192**3 / product / 1e9, 1),
        "fp32_tflops": round(2 * 4096**3 / wide / 1e9, 1),
        "copy_tb_per_second": round(2 * 2**30 / copy / 1e9, 3),
    }


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def measure(name: str, rounds_wanted: bool = True) -> None:
    """Prints {"first": ...} of each candidate, {"error": ...} of those that cannot, and {"round": milliseconds}."""
    candidates = ROWS[name].make()
    once: dict[str, float] = {}
    for candidate, run in list(candidates.items()):
        try:
            for _ in range(2):  # the first compiles
                torch.cuda.reset_peak_memory_stats()
                before, start = torch.cuda.memory_allocated(), time.perf_counter()
                result = run()
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                if seconds > 10 * SLOW:
                    break
            extra = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
            say(first=candidate, seconds=round(seconds, 5), extra_mb=extra)
            once[candidate] = 1e3 * seconds
            if candidate == "robustft" and candidates.check is not None:
                candidates.check(result)
                say(checked=candidate)
            del result
        except Exception as problem:  # a peer that cannot is no reason to lose the row
            if candidate == "robustft":
                raise
            say(error=candidate, what=f"{type(problem).__name__}: {problem}".splitlines()[0][:160])
            del candidates[candidate]
    if not rounds_wanted:
        return
    torch.cuda.empty_cache()
    repeats = {c: max(1, min(50, int(20 / max(t, 1e-3)))) for c, t in once.items()}
    each = sum(once[c] * repeats[c] for c in once) / 1e3
    for _ in range(max(1 if each > SLOW else 5, min(21, int(SECONDS / each)))):
        say(round={candidate: timed(run, repeats[candidate]) for candidate, run in candidates.items()})


def record(name: str, output: str, rates: dict[str, Any]) -> dict[str, Any]:
    """The row of what `measure` has printed so far; without milliseconds if that was no round."""
    lines = []
    for line in output.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # a warning of some library
    lines = [line for line in lines if isinstance(line, dict)]
    rounds = [line["round"] for line in lines if "round" in line]
    row: dict[str, Any] = {"first": {line["first"]: line["extra_mb"] for line in lines if "first" in line}}
    row["checked"] = any("checked" in line for line in lines)
    if not rounds:
        return row
    times: dict[str, Any] = {c: round(median([r[c] for r in rounds]), 5) for c in rounds[0]}
    times |= {line["error"]: line["what"] for line in lines if "error" in line}
    row |= {"milliseconds": times, "rounds": len(rounds), "verdict": verdict(ROWS[name].bar, times)}
    if rates:
        row["share"] = round(ROWS[name].work.milliseconds(rates) / times["robustft"], 3)
    return row


def verdict(bar: Bar, times: dict[str, Any]) -> str:
    """Each demand, met or by how much not."""
    ours, said = times["robustft"], []
    if bar.milliseconds is not None:
        met = ours <= bar.milliseconds
        said.append(
            f"{bar.milliseconds:g} ms " + ("met" if met else f"not met, {ours / bar.milliseconds:.2f} times that")
        )
    for peer, t in times.items():
        wanted = bar.eager if peer == "eager" else bar.peers
        if peer.startswith("robustft") or wanted is None or not isinstance(t, float):
            continue
        said.append(f"{wanted:g}x {peer} " + ("met" if t / ours >= wanted else f"not met, {t / ours:.2f}x"))
    if "FLYP step" in times:
        ratio = ours / times["FLYP step"]
        said.append(f"1.45 of a FLYP step {'met' if ratio <= 1.45 else 'not met'}, {ratio:.2f}")
    return "; ".join(said)


def small() -> None:
    """Every kernel once, on sizes that are no multiple of anything."""
    for dtype in (torch.bfloat16, torch.float32):
        for candidates in (contrastive(333, 37, dtype, "auto", False), contrastive(333, 37, dtype, 0, False)):
            candidates["robustft"]()
        sigmoid(333, 37, dtype, False)["robustft"]()
        x, t = pairs(333, 37, dtype)
        sum(rf.contrastive_distillation_loss(x, t, 20.0, x.detach(), t.detach(), 10.0)).backward()
    for memory in ("auto", 0):
        classes(2333, 147, 40, memory)["robustft"]()
    for candidates in (dual_risk(333, 47, 40), misalignment(333, 47), scores(333, 47, 40)):
        candidates["robustft"]()
    queries, points = unit(77, 40, 1, torch.float32), unit(3001, 40, 2, torch.float32)
    rf.kth_neighbor_distance(queries, points, 30)
    losses = torch.rand(1000, device=DEVICE, requires_grad=True)
    groups = torch.arange(1000, device=DEVICE) % 7
    (rf.cvar(losses, 0.1) + rf.group_risk(losses, groups, 7).worst).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("done")


def values(name: str) -> None:
    """A public function's results and gradients in every dtype, against its reference on the CPU, which widens it."""
    from robustft.ops import registry

    def outcomes(source: registry.Source) -> list[Tensor]:
        found = registry.outcomes(getattr(rf, name), registry.PUBLIC[name](source))
        return [a.detach().cpu().double() for a in found]

    for dtype in accelerator.DTYPES:
        with robustft.backend("native"):
            ours = outcomes(registry.Source(DEVICE, dtype))
        with robustft.backend("reference"):
            exact = outcomes(registry.Source("cpu", dtype))
        errors = [float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(ours, exact, strict=True)]
        right = all(e <= TOLERANCE[dtype] for e in errors)  # NaN is not
        say(function=name, dtype=str(dtype), error=max(errors), right=right)


def _known(arguments: list[str]) -> bool:
    """Whether they ask for something to be computed."""
    match arguments:
        case ["rates" | "small"] | ["values", _]:
            return True
        case ["ours" | "once", name] | [name]:
            return name in ROWS
        case _:
            return False


def main(arguments: list[str]) -> None:
    match arguments:
        case ["list"]:
            print(*ROWS)
        case ["functions"]:
            from robustft.ops import registry

            print(*(name for name in registry.PUBLIC if name in registry.OPERATORS))
        case _ if _known(arguments) and not torch.cuda.is_available():
            raise SystemExit(NO_DEVICE)
        case ["rates"]:
            print(json.dumps(rates()))
        case ["small"]:
            small()
        case ["values", name]:
            values(name)
        case ["ours", name] if name in ROWS:
            run = ROWS[name].make()["robustft"]
            for _ in range(3):
                run()
            torch.cuda.synchronize()
        case ["once", name] if name in ROWS:
            measure(name, rounds_wanted=False)
        case [name] if name in ROWS:
            measure(name)
        case _:
            known = ", ".join(ROWS)
            raise SystemExit(
                f"arguments are {arguments}; expected list, functions, rates, small, values, once or {known}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
