"""How long each of the GPU's rows should take: products, bytes and instructions over what a card does of each a second.

    python -m benchmarks.gpu_model     # writes results/gpu_model.json; needs no GPU

The launches are the operators' own, recorded on tensors without data (ops/triton/launch.py), with the library's
products among them. A kernel takes, on the processor that has the most programs, the sum of

    products        flops over the rate of the matrix unit
    instructions    those along a warp's ways (sass.py), one a cycle and scheduler; a shuffle and a half exponential a
                    cycle and processor besides
    bytes           what programs read of L2, and what all of them read and write of memory
    waiting         for memory, of the kernel that has too few programs to hide it

for none of our kernels hides one behind another for long: the H200 that measured those of gpu_bodies.json took what the
sums say, not what the largest summand does (`against_measured`). Left out is shared memory, of which products of
float32 at "highest" by own kernels ask most: those took up to 2.6 times what is said. A product by the library takes
its flops and its result's bytes. What the host takes to launch is beside that: the longer of both is the time. Where
the two bodies of the contrastive losses are compared, it decides below some thousand pairs, and `library_from` is what
configs.py has.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks import machine, triton_resources
from benchmarks.triton_resources import new
from robustft.ops.triton import configs, contrastive, products, sigmoid
from robustft.ops.triton.launch import Launch, recorded

MEASURED = json.loads((machine.RESULTS / "nvidia-h200.json").read_text())["rates"]


class Card(NamedTuple):
    """What a GPU sustains. TFLOP/s of 16-bit, TF32 and float32 products, TB/s of memory."""

    name: str
    processors: int
    gigahertz: float
    half: float
    tf32: float
    single: float
    memory: float
    source: str

    def tflops(self, dtype: torch.dtype, precision: str) -> float:
        """Of a product of the library's, of factors as the caller has them."""
        if dtype != torch.float32:
            return self.half
        return {"highest": self.single, "high": self.tf32 / 3, "medium": self.tf32}[precision]


def sustained(name: str, processors: int, gigahertz: float, half: float, tf32: float, single: float, memory: float):
    """Of a data sheet's dense peaks as much as the H200 showed of its own: 989, 67 and 4.8."""
    of_half = MEASURED["bf16_tflops"] / 989
    shares = of_half, of_half, MEASURED["fp32_tflops"] / 67, MEASURED["copy_tb_per_second"] / 4.8
    rates = (round(peak * share, 3) for peak, share in zip((half, tf32, single, memory), shares, strict=True))
    source = f"NVIDIA's data sheet: {half:g}, {tf32:g} and {single:g} TFLOP/s, {memory:g} TB/s; of each the share "
    return Card(name, processors, gigahertz, *rates, source + "that the H200 of nvidia-h200.json reaches of its own")


CARDS = {
    "sm_80": sustained("A100 80 GB SXM", 108, 1.41, 312, 156, 19.5, 2.039),
    "sm_90": sustained("H200 SXM", 132, 1.755, 989, 494.5, 67, 4.8),
    "sm_100": sustained("B200 SXM", 148, 1.85, 2250, 1100, 80, 8.0),
}
L2 = 31.0
"""Bytes a cycle and processor reads of L2. Estimated, not measured."""
LAUNCH = 0.002
"""Milliseconds from a kernel's launch to its first instruction, and from its last to the next one's, in a stream."""
WAIT = 0.002
"""Milliseconds of a turn of combine_kernel's loops, from gpu_bodies.json: its few programs wait for what they load."""
HOST_LAUNCH, HOST_PRODUCT, HOST_OTHER, HOST_CALL = 0.03, 0.065, 0.065, 0.96
"""Milliseconds of the host: a kernel of ours, which has not been measured since launches are looked up no longer; a
product and another operator of torch, from the bodies' difference in gpu_bodies.json; and the public function with
autograd around it, from a row of 512 pairs in nvidia-h200.json less its operators'."""
OTHERS, OF_HALVES = 9, 12
"""Small operators of torch: the norms and the least pair of a contrastive loss whose products are the library's, and
the unit of float16 and what is multiplied and divided by it."""


class Work(NamedTuple):
    """Of a launch: flops by arithmetic, bytes, a warp's ways in all programs together, and the turns of one program's
    loop that wait for memory: programs run at once."""

    flops: float = 0.0
    arithmetic: str = "half"
    l2: float = 0.0
    memory: float = 0.0
    instructions: float = 0.0
    shuffles: float = 0.0
    exponentials: float = 0.0
    turns: int = 0


def size(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.element_size()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Made(NamedTuple):
    """What Triton made of a launch (triton_resources.json): `once`, the loops that multiply, and the others."""

    once: list[int]
    multiplying: list[list[int]]
    others: list[list[int]]
    warps: int


class Resources:
    """The committed table, by architecture and launch."""

    def __init__(self) -> None:
        held = json.loads(triton_resources.RESULTS.read_text())
        self.cases: dict[str, dict[str, str]] = held["cases"]
        # The H200 has the oldest; for sm_100 only the newer ones compile.
        self.made: dict[str, dict[str, Any]] = {}
        for version in reversed(held["triton"].values()):
            self.made |= version

    def of(self, architecture: str, launch: Launch) -> Made:
        """By fingerprint, else those of the same kernel with the same sides on the same architecture."""
        found = self.made.get(triton_resources.origin(architecture, launch))
        if found is None:
            sides = {k: launch.arguments[k] for k in ("BM", "BN", "BD", "BK", "CHUNKS") if k in launch.arguments}
            alike = (
                self.made[of]
                for case, kernels in self.cases.items()
                for name, of in kernels.items()
                if case.startswith(f"{architecture},") and name == launch.kernel.__name__ and of in self.made
            )
            wanted = {**sides, "num_warps": launch.options["num_warps"]}
            found = min(alike, key=lambda made: sum(made.get(k) != value for k, value in wanted.items()))
        loops = found["loops"]
        multiplying = [way for way in loops if way[3]]
        return Made(found["once"], multiplying, [way for way in loops if not way[3]], found["num_warps"])


def longest(ways: list[list[int]]) -> list[int]:
    return max(ways, default=[0, 0, 0, 0])


def times(*counted: tuple[float, list[int]]) -> tuple[float, float, float]:
    """Instructions, shuffles and exponentials of ways, each so many times."""
    instructions, shuffles, exponentials = (sum(count * way[kind] for count, way in counted) for kind in range(3))
    return instructions, shuffles, exponentials


def work(launch: Launch, made: Made) -> Work:
    """Of all programs of a launch; a warp's ways times warps."""
    a, programs, name = launch.arguments, launch.programs, launch.kernel.__name__
    arithmetic, heads = str(a.get("PRECISION")), 2 if a.get("TEACHER") else a.get("HEADS", 1)
    if a.get("X") is None or a["X"].dtype == torch.bfloat16 or (size(a["X"]) == 2 and "gradient" not in name):
        arithmetic = "half"  # "ieee" is said of those, too
    if name in ("statistics_kernel", "keep_kernel", "class_statistics_kernel", "label_kernel"):
        x, d, in_tile = a["X"], a["d"], 2 if a.get("TEACHER") else 1
        entries = float(programs * a["BM"] * a["BN"] * in_tile)
        kept = entries * size(a.get("KEPT")) if a.get("KEEP", name == "keep_kernel") else 0
        parts = 12 * entries * (1 / a["BM"] + 1 / a["BN"]) if name == "statistics_kernel" else 12 * entries / a["BN"]
        loops = made.multiplying or made.others[:in_tile]  # IEEE float32 is not for the matrix unit
        ways = times((1, made.once), *((cdiv(d, a["BK"]), way) for way in loops))
        read = entries * d * (1 / a["BM"] + 1 / a["BN"]) * size(x)
        return Work(2 * entries * d, arithmetic, read, kept + parts, *(programs * made.warps * w for w in ways))
    if name in ("gradient_kernel", "class_gradient_kernel"):
        n, m, d, splits, matrices = a["rows"], a.get("m", a.get("k")), a["d"], a.get("SPLITS", 1), a.get("HEADS", 1)
        parts = matrices * cdiv(d, a["BD"])
        down, across = cdiv(n, a["BM"]) * cdiv(m, a["BK"]), cdiv(m, a["BM"]) * splits * cdiv(cdiv(n, splits), a["BK"])
        steps = parts * (down + across)
        loops = made.multiplying or made.others[:2]
        way = [sum(w[kind] for w in loops) / max(1, len(loops)) for kind in range(3)]
        read = steps * a["BK"] * (a["BM"] * size(a["KEPT"]) * heads / matrices + a["BD"] * size(a["X"]))
        memory = 2.0 * n * m * size(a["KEPT"]) * heads
        return Work(4.0 * n * m * d * matrices, arithmetic, read, memory, *(steps * made.warps * w for w in way))
    if name == "class_scores_kernel":
        tiles, steps = programs * cdiv(a["k"], a["BN"]), cdiv(a["d"], a["BK"])
        ways = times((1, longest(made.others)), (steps, longest(made.multiplying)))
        read = tiles * a["d"] * (a["BM"] + a["BN"]) * size(a["X"])
        flops = 2.0 * tiles * a["BM"] * a["BN"] * a["d"]
        return Work(flops, arithmetic, read, 20.0 * a["n"], *(tiles * made.warps * w for w in ways))
    if name == "strips_kernel":
        entries = a["piece_rows"] * a["piece_cols"]
        in_chunk = heads * a["BM"] * a["BN"] // (32 * made.warps)
        # The narrow strip's loop stands before those of a wide one, of which a teacher's take as many exponentials.
        narrow = next((way for way in made.others if way[2] >= in_chunk), longest(made.others))
        ways = times((1, made.once), (a["CHUNKS"], narrow))
        kinds, targets = 3 * heads, (a["TARGETS"] != 0) + a["TOTALS"]
        parts = 4 * (kinds + targets) * (1 / a["BM"] + 1 / (a["BN"] * a["CHUNKS"]))
        read = heads + (targets > 0)  # what is summed by labels, or in all, is read once more
        memory = entries * (4 * read + parts + (heads * size(a["KEPT"]) if a["KEEP"] else 0))
        return Work(memory=memory, **_issued(programs * made.warps, ways))
    if name == "weights_kernel":
        entries = a["rows"] * a["cols"]
        memory = entries * (heads * (4 if a["GIVEN"] else size(a["KEPT"])) + size(a["WEIGHTS"]))
        ways = times((1, made.once), (a["CHUNKS"], longest(made.others)))
        return Work(memory=memory, **_issued(programs * made.warps, ways))
    if name == "sigmoid_kernel":
        entries = a["rows"] * a["cols"]
        memory = entries * (heads * 4 + size(a["G"]))
        ways = times((cdiv(a["cols"], a["BN"]), longest(made.others)))
        return Work(memory=memory, **_issued(programs * made.warps, ways))
    if name == "finish_kernel":
        return Work(memory=float((a["n"] + a["m"]) * a["d"] * (4 + 2 * size(a["DX"]))))
    if name == "combine_kernel":
        kinds = 6 if a["TEACHER"] else 3
        turns = sum(cdiv(a[tiles], a["BT"]) for tiles in ("col_tiles", "row_tiles"))
        return Work(memory=4.0 * kinds * (a["col_tiles"] * a["rows"] + a["row_tiles"] * a["m"]), turns=turns)
    return Work(memory=float(sum(t.numel() * size(t) for t in _tensors(launch))))


def _issued(times_each: float, ways: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("instructions", "shuffles", "exponentials"), (times_each * w for w in ways), strict=True))


def _tensors(launch: Launch) -> Iterator[torch.Tensor]:
    seen = set()
    for of in launch.arguments.values():
        if isinstance(of, torch.Tensor) and id(of) not in seen:
            seen.add(id(of))
            yield of


def kernel_milliseconds(card: Card, launch: Launch, of: Work) -> float:
    """The summands above. Programs are spread evenly, but none is split between processors."""
    uneven = cdiv(launch.programs, card.processors) * card.processors / launch.programs
    rates = {"half": card.half, "tf32": card.tf32, "tf32x3": card.tf32 / 3, "ieee": card.single}
    cycles = of.instructions / 4 + of.shuffles + 2 * of.exponentials + of.l2 / L2
    on_processors = cycles / card.processors / card.gigahertz / 1e6 + of.flops / rates[of.arithmetic] / 1e9
    return on_processors * uneven + of.memory / card.memory / 1e9 + WAIT * of.turns + LAUNCH


class Product(NamedTuple):
    """Of the library: (rows, depth) times (depth, cols), in float32, added to what is there or not."""

    rows: int
    cols: int
    depth: int
    dtype: torch.dtype
    precision: str
    add: bool

    def milliseconds(self, card: Card) -> float:
        flops = 2.0 * self.rows * self.cols * self.depth / card.tflops(self.dtype, self.precision) / 1e9
        return flops + 4.0 * self.rows * self.cols * (2 if self.add else 1) / card.memory / 1e9 + LAUNCH


class Predicted(NamedTuple):
    """Milliseconds: by kernel, the library's products as one of them; and of the host."""

    kernels: dict[str, float]
    host: float

    @property
    def device(self) -> float:
        return sum(self.kernels.values())

    @property
    def total(self) -> float:
        return max(self.device, self.host)

    def plus(self, other: Predicted, times: float = 1.0) -> Predicted:
        names = dict.fromkeys([*self.kernels, *other.kernels])
        kernels = {k: self.kernels.get(k, 0.0) + times * other.kernels.get(k, 0.0) for k in names}
        return Predicted(kernels, self.host + times * other.host)


def predict(architecture: str, run: Callable[[], object], held: Resources, precision: str = "highest") -> Predicted:
    """Of what `run` launches of the operators in robustft/ops/triton, on tensors without data."""
    made: list[Product] = []

    def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, precision: str, add: bool = False) -> None:
        made.append(Product(a.shape[0], b.shape[1], a.shape[1], a.dtype, precision, add))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with recorded(architecture) as launches, patch.object(products, "multiply", multiply):
            run()
    finally:
        torch.set_float32_matmul_precision(before)
    card, kernels, known = CARDS[architecture], dict[str, float](), dict[Any, float]()
    place = ("row0", "col0", "row_tile", "col_tile")  # of a piece, which is like the others
    for launch in launches:
        name = launch.kernel.__name__
        numbers = tuple(v for k, v in launch.arguments.items() if type(v) is int and k not in place)
        alike = name, launch.programs, numbers
        if alike not in known:
            known[alike] = kernel_milliseconds(card, launch, work(launch, held.of(architecture, launch)))
        kernels[name] = kernels.get(name, 0.0) + known[alike]
    if made:
        kernels["library's products"] = sum(product.milliseconds(card) for product in made)
    others = ("strips_kernel" in kernels) * OTHERS + any(product.dtype == torch.float16 for product in made) * OF_HALVES
    return Predicted(kernels, HOST_LAUNCH * len(launches) + HOST_PRODUCT * len(made) + HOST_OTHER * others)


def of_pairs(n: int, d: int, dtype: torch.dtype, teacher: bool = False, keep: bool = True) -> Callable[[], None]:
    """The operators of a contrastive loss, forward and backward."""

    def run() -> None:
        x, t, s, g = new(n, d, dtype=dtype), new(n, d, dtype=dtype), new(()), new(n)
        if teacher:
            out = contrastive.contrastive_distillation_loss(x, t, s, x, t, s, None, keep)
            contrastive.contrastive_distillation_loss_backward(g, g, x, t, s, x, t, s, None, *out[2:])
        else:
            out = contrastive.contrastive_loss(x, t, s, None, 0.0, keep)
            contrastive.contrastive_loss_backward(g, x, t, s, None, 0.0, *out[1:])

    return run


def of_sigmoids(n: int, d: int) -> Callable[[], None]:
    """The one sweep of a total of the sigmoid losses."""

    def run() -> None:
        x, s, y = new(n, d, dtype=torch.bfloat16), new(()), new(n, dtype=torch.int64)
        sigmoid.sigmoid_sweep(x, x, s, s, y, y, *(None,) * 4, new(1, n), None, False, "highest")

    return run


def by(library: bool):
    """Whether the products are the library's, whatever the size."""
    return patch.object(configs, "by_library", lambda *_: library)


def bodies(held: Resources, architecture: str, *of, **how) -> tuple[Predicted, Predicted]:
    """Of a contrastive loss by own kernels, and by the library."""
    found = []
    precision = how.pop("precision", "highest")
    for library in (False, True):
        with by(library):
            found.append(predict(architecture, of_pairs(*of, **how), held, precision))
    return found[0], found[1]


SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
DTYPES = {torch.bfloat16: ("highest",), torch.float16: ("highest",), torch.float32: ("highest", "high", "medium")}


def library_from(compared: dict[str, dict[str, list[float]]]) -> int:
    """The least size from which on the library takes less time whatever the precision, and with a teacher."""
    wins = [n for n in SIZES if all(by_size[str(n)][1] < by_size[str(n)][0] for by_size in compared.values())]
    losing = [n for n in SIZES if n not in wins]
    return min((n for n in wins if not losing or n > max(losing)), default=2 * SIZES[-1])


def compared(held: Resources, architecture: str, dtype: torch.dtype) -> dict[str, dict[str, list[float]]]:
    """By case and size: milliseconds by own kernels and by the library, D = 512, exponentials kept."""
    found: dict[str, dict[str, list[float]]] = {}
    for precision in DTYPES[dtype]:
        for teacher in (False, True):
            name = ", ".join([*([precision] if dtype == torch.float32 else []), "teacher" if teacher else "student"])
            found[name] = {
                str(n): [
                    round(body.total, 3)
                    for body in bodies(held, architecture, n, 512, dtype, teacher=teacher, precision=precision)
                ]
                for n in SIZES
            }
    return found


def rows(held: Resources, architecture: str) -> dict[str, Predicted]:
    """By row of gpu_rows.py, those of our Triton kernels; a loss is as the table of configs.py has it computed."""
    bf16, f32, card = torch.bfloat16, torch.float32, CARDS[architecture]

    def pairs_of(n: int, dtype: torch.dtype = bf16, **how) -> Predicted:
        return predict(architecture, of_pairs(n, 512, dtype, **how), held)

    def classes(operator: str, heads: int, n: int, keep: bool = True) -> Predicted:
        case = triton_resources.Case(architecture, "bfloat16", "highest", heads, False, operator=operator)
        return predict(architecture, lambda: triton_resources.of_classes(case, keep, n), held)

    panel = pairs_of(32768, keep=False)
    penalty = triton_resources.Case(architecture, "float32", "highest", 1, False, operator="misalignment_penalty")
    operators = {
        "contrastive-bf16-32768": pairs_of(32768),
        "distillation-bf16-32768": pairs_of(32768, teacher=True),
        "graph-bf16-512": pairs_of(512)._replace(host=-HOST_CALL),
        # The work of 32768 pairs 1024 times; recorded itself it is 65,536 launches.
        "contrastive-bf16-1M": Predicted({}, 0.0).plus(panel, 1024.0),
        "contrastive-panel-32768": panel,
        "contrastive-fp32-8192": pairs_of(8192, f32),
        "contrastive-bf16-2048": pairs_of(2048),
        "contrastive-bf16-512": pairs_of(512),
        "sigmoid-bf16-65536": predict(architecture, of_sigmoids(65536, 768), held),
        "sigmoid-bf16-8192": predict(architecture, of_sigmoids(8192, 768), held),
        "sigmoid-bf16-512": predict(architecture, of_sigmoids(512, 512), held),
        "classes-bf16-4096": classes("classification_loss", 1, 4096),
        "classes-bf16-512": classes("classification_loss", 1, 512),
        "classes-panel-65536": classes("classification_loss", 1, 65536, False),
        "dual-risk-bf16-4096": classes("dual_risk", 2, 4096),
        "misalignment-fp32-4096": predict(
            architecture, lambda: triton_resources.of_classes(penalty, True, 4096), held
        ),
        "scores-bf16-65536": classes("concept_scores", 1, 65536),
        # CUDA C++ (csrc/cuda/neighbor_filter.h): mma.sync has 62 % of the rate of Hopper's own instructions.
        "kth-neighbor-50k-1M": Predicted({"neighbor_scores_kernel": 2 * 5e4 * 1e6 * 512 / 0.62 / card.half / 1e9}, 0.0),
    }  # fmt: skip
    return {name: of._replace(host=of.host + HOST_CALL) for name, of in operators.items()}


NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


REPLACED = ("strips_kernel", "weights_kernel")
"""Kernels that gpu_bodies.json measured as they were, and that have been written anew since."""


def against_measured(held: Resources) -> list[dict[str, Any]]:
    """Kernels of gpu_bodies.json, of the table's own pieces, that took 0.1 ms or more: measured and predicted."""
    found = []
    for case in json.loads((machine.RESULTS / "gpu_bodies.json").read_text())["cases"]:
        words = case["case"].split(", ")
        if any(word.startswith("S in pieces") for word in words) and "8192 x 8192" not in words[-2]:
            continue  # of pieces that are no longer the table's
        dtype, *precision = words[1].split()
        how = {"teacher": "teacher" in words, "keep": "recomputed" not in words}
        of = of_pairs(int(words[0].removeprefix("N = ")), 512, NAMES[dtype], **how)
        with by("by the library" in words):
            kernels = predict("sm_90", of, held, *precision).kernels
        found += [
            {"case": case["case"], "kernel": name, "measured": took, "predicted": round(kernels[name], 3)}
            for name, took in case["kernels"].items()
            if took >= 0.1 and name in kernels and name not in REPLACED
        ]
    return found


def factor(row: dict[str, Any]) -> float:
    """How far a prediction is from what was measured, whichever is more."""
    return max(row["measured"] / row["predicted"], row["predicted"] / row["measured"])


def model() -> dict[str, Any]:
    held = Resources()
    measured = against_measured(held)
    predicted = {
        architecture: {
            name: {
                "milliseconds": round(of.total, 3),
                "device": round(of.device, 3),
                "kernels": {kernel: round(took, 4) for kernel, took in of.kernels.items()},
            }
            for name, of in rows(held, architecture).items()
        }
        for architecture in CARDS
    }
    found = {
        architecture: {
            str(dtype).removeprefix("torch."): compared(held, architecture, dtype) for dtype in DTYPES
        }
        for architecture in CARDS
    }  # fmt: skip
    return {
        "command": "python -m benchmarks.gpu_model",
        "sources": triton_resources.sources(),
        "cards": {architecture: card._asdict() for architecture, card in CARDS.items()},
        "off by a factor of, in the middle": round(statistics.median(map(factor, measured)), 2),
        "against measured": measured,
        "rows": predicted,
        "bodies": found,
    }  # fmt: skip


RESULTS = machine.RESULTS / "gpu_model.json"


def committed(path: Path = RESULTS) -> dict[str, Any]:
    return json.loads(path.read_text())


def main() -> None:
    from robustft.files import write_json

    found = model()
    write_json(RESULTS, found)
    for row in sorted(found["against measured"], key=factor, reverse=True):
        took = f"{row['measured']:.3f} ms, predicted {row['predicted']:.3f}"
        print(f"{factor(row):.2f}x: {took}, {row['kernel']}, {row['case']}")
    for architecture, of in found["bodies"].items():
        print(architecture, {dtype: library_from(cases) for dtype, cases in of.items()})


if __name__ == "__main__":
    main()
