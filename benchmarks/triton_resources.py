"""What every shipped Triton configuration takes of a GPU that need not be there: registers, spills, shared memory,
instructions.

    python -m benchmarks.triton_resources          # compiles what changed, writes results/triton_resources.json
    python -m benchmarks.triton_resources --table  # prints that file as a table

The file holds what each version of Triton made of a kernel, the oldest that is supported and the newest, each written
where that version is installed: a run adds its own and keeps the others' that are of the same kernels.

The launches are those of the operators in robustft/ops/triton themselves, recorded on meta tensors instead of run, and
compiled for their architecture with the specialisations that such tensors get: 16-byte aligned pointers, sizes that 16
divides. The contrastive losses twice, for the diagonal's targets and for labels with smoothing, the costliest; the
classes' loss with label smoothing and bias, and the two heads' with soft labels, which are the costliest there. The
sigmoid losses' sweep with gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks import sass
from robustft.files import write_json
from robustft.ops.triton import configs

RESULTS = Path(__file__).parent / "results" / "triton_resources.json"
KERNELS = Path(configs.__file__).parent
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes a block may have. sm_80's entries serve sm_86, sm_89 and sm_120 too, where it is 99 KB and not 163."""
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


class Case(NamedTuple):
    """What a user may ask for; the launches follow from it."""

    architecture: str
    dtype: str
    precision: str
    heads: int
    small: bool
    labels: bool = False
    operator: str = "contrastive"
    library: bool = False

    @property
    def name(self) -> str:
        size = "small" if self.small else "by the library" if self.library else "large"
        kind = self.dtype if self.dtype != "float32" else f"float32 {self.precision}"
        if self.operator != "contrastive":
            return f"{self.architecture}, {kind}, {self.operator}, {size}"
        return f"{self.architecture}, {kind}, {'teacher' if self.heads == 2 else 'student'}, {size}" + (
            ", labels" if self.labels else ""
        )


def cases() -> Iterator[Case]:
    """At least one for every row of the table; float16, whose forward is bfloat16's, has float32 planes behind it."""
    for architecture in ARCHITECTURES:
        for heads in (1, 2):
            for labels in (False, True):
                yield Case(architecture, "bfloat16", "highest", heads, False, labels)
                for precision in ("highest", "high", "medium"):
                    yield Case(architecture, "float32", precision, heads, True, labels)
            yield Case(architecture, "bfloat16", "highest", heads, True)
            yield Case(architecture, "float16", "highest", heads, True)
            for dtype in ("bfloat16", "float16", "float32"):
                yield from (
                    Case(architecture, dtype, "highest", heads, False, labels, library=True) for labels in (False, True)
                )
        for operator, heads in (("classification_loss", 1), ("dual_risk", 2), ("concept_scores", 1)):
            for small in (False, True):
                yield Case(architecture, "bfloat16", "highest", heads, small, operator=operator)
            if operator != "concept_scores":
                yield Case(architecture, "float16", "highest", heads, True, operator=operator)
            for precision in ("highest", "high", "medium"):
                yield Case(architecture, "float32", precision, heads, True, operator=operator)
        for dtype in ("bfloat16", "float16", "float32"):
            if dtype != "float16":
                yield Case(architecture, dtype, "highest", 1, False, operator="misalignment_penalty")
            yield Case(architecture, dtype, "highest", 1, False, operator="sigmoid_contrastive_loss")
            yield Case(architecture, dtype, "highest", 2, False, operator="sigmoid_contrastive_distillation_loss")


def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def contrastive(case: Case, keep: bool) -> None:
    from robustft.ops.triton import contrastive

    n, d, dtype = 1024 if case.small else 32768 if case.library else 4096, 512, getattr(torch, case.dtype)
    x, t, s, g = new(n, d, dtype=dtype), new(n, d, dtype=dtype), new(()), new(n)
    labels = new(n, dtype=torch.int64) if case.labels else None
    if case.heads == 2:
        out = contrastive.contrastive_distillation_loss(x, t, s, x, t, s, labels, keep)
        contrastive.contrastive_distillation_loss_backward(g, g, x, t, s, x, t, s, labels, *out[2:])
    else:
        smoothing = 0.1 if case.labels else 0.0
        out = contrastive.contrastive_loss(x, t, s, labels, smoothing, keep)
        contrastive.contrastive_loss_backward(g, x, t, s, labels, smoothing, *out[1:])


def of_sigmoids(case: Case, gradient: bool) -> None:
    from robustft.ops.triton import sigmoid

    n, d, dtype = 8192, 768, getattr(torch, case.dtype)
    x, t, s, labels = new(n, d, dtype=dtype), new(n, d, dtype=dtype), new(()), new(n, dtype=torch.int64)
    teacher = (x, t, s, s) if case.heads == 2 else (None,) * 4
    weight = new(case.heads, n) if gradient else None
    sigmoid.sigmoid_sweep(x, t, s, s, labels, labels, *teacher, weight, None, False, case.precision)


def of_classes(case: Case, keep: bool, rows: int | None = None) -> None:
    from robustft.ops.triton import classes, misalignment, scores

    n, k, d, dtype = rows or (512 if case.small else 16384), 1000, 512, getattr(torch, case.dtype)
    x, w, s, g, labels = new(n, d, dtype=dtype), new(k, d, dtype=dtype), new(()), new(n), new(n, dtype=torch.int64)
    match case.operator:
        case "classification_loss":
            how = (new(k), labels)
            out = classes.classification_loss(x, w, s, *how, "neg_log_ratio", False, 0.1, keep)
            classes.classification_loss_backward(g, g, x, w, s, *how, False, 0.1, *out[2:])
        case "dual_risk":
            inputs = (x, new(2 * k, d, dtype=dtype), s, labels, new(n, k))
            classes.dual_risk_backward(g, g, *inputs, *classes.dual_risk(*inputs, keep)[2:])
        case "concept_scores":
            scores.class_scores(x, w, 1.0, s, case.precision)
        case _:
            z = new(n, k, dtype=dtype)
            kept = misalignment.misalignment_penalty(z, labels, "neg_log_ratio", False)[2]
            misalignment.misalignment_penalty_backward(g, z, labels, False, kept)


def launches(case: Case) -> dict[str, object]:
    """The first launch of every kernel, forward and backward, with and without kept exponentials."""
    from robustft.ops.triton.launch import recorded

    run = contrastive if case.operator == "contrastive" else of_classes
    run = of_sigmoids if case.operator.startswith("sigmoid") else run
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.precision)
    try:
        with recorded(case.architecture) as found, patch.object(configs, "by_library", lambda *_: case.library):
            for keep in (True, False):
                run(case, keep)
    finally:
        torch.set_float32_matmul_precision(before)
    first: dict[str, object] = {}
    for launch in found:
        first.setdefault(launch.kernel.__name__, launch)
    return first


class Given(NamedTuple):
    """What Triton's compiler is given of a launch's arguments, by name; the last by position."""

    signature: dict[str, str]
    constants: dict[str, object]
    attributes: dict[tuple[int], list[list[object]]]


def given(launch) -> Given:
    found = Given({}, {}, {})
    for k, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            found.signature[parameter.name], found.constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            found.signature[parameter.name] = TYPES[value.dtype]
            found.attributes[(k,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            found.signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                found.attributes[(k,)] = [["tt.divisibility", 16]]
        else:
            found.signature[parameter.name] = "fp32"
    return found


def resources(architecture: str, launch) -> dict[str, Any]:
    """Registers, bytes of stack (spills), bytes of shared memory, counts of some instructions, and ways (sass.py)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", ARCHITECTURES[architecture], 32)
    signature, constants, attributes = given(launch)
    code = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        compiled = triton.compile(code, target=target, options=launch.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, disassembly = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    counts = {op: len(re.findall(rf"\b{op}\b", disassembly)) for op in (*TENSOR_CORES.values(), "LDGSTS", "STL")}
    once, loops = sass.ways(disassembly)
    shared = compiled.metadata.shared
    return {"registers": registers, "stack": stack, "shared": shared, **counts, "once": once, "loops": loops}


def origin(architecture: str, launch) -> str:
    """A fingerprint of all that the compiler is given, whatever its version: the kernel, the functions and constants
    that it names, and the launch's types, constants and options."""
    texts, seen = [architecture], set()

    def collect(function) -> None:
        if id(function) in seen:
            return
        seen.add(id(function))
        texts.append(function.src)
        for name in sorted(function.fn.__code__.co_names):
            of = function.fn.__globals__.get(name)
            if hasattr(of, "src"):
                collect(of)
            elif of is not None and not callable(of) and not inspect.ismodule(of):
                texts.append(f"{name} = {getattr(of, 'value', of)!r}")

    collect(launch.kernel)
    signature, constants, attributes = given(launch)
    constants = {name: getattr(value, "value", value) for name, value in constants.items()}
    texts.append(repr((signature, constants, attributes, dict(launch.options))))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def measure(case: Case, known: Iterable[str] = ()) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The fingerprint of each of its kernels, and, of those that are not known, configuration and resources."""
    names, found = {}, {}
    for name, launch in launches(case).items():
        names[name] = of = origin(case.architecture, launch)
        if of not in known:
            sides = {k: launch.arguments[k] for k in ("BM", "BN", "BD", "BK", "CHUNKS") if k in launch.arguments}
            found[of] = {"kernel": name, **sides, **launch.options, **resources(case.architecture, launch)}
    return names, found


def sources() -> str:
    """A fingerprint of the kernels and of the table: what was measured of others is out of date."""
    files = sorted(KERNELS.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def able(architecture: str) -> bool:
    """Whether this Triton compiles the kernels for it."""
    from robustft.ops import accelerator

    return architecture != "sm_100" or accelerator.TENSOR_MEMORY


def table(results: dict[str, Any]) -> str:
    """A kernel of a case and of a version of Triton a line; instructions are those of the longest loop, else `once`."""
    lines = [
        "| case | kernel | tile | warps, stages | Triton | registers | stack | shared KB | instructions |",
        "|---|---|---|---|---|--:|--:|--:|--:|",
    ]
    for case, kernels in results["cases"].items():
        for name, of in kernels.items():
            for version, made in results["triton"].items():
                if (r := made.get(of)) is None:
                    continue
                tile = "x".join(str(r[k]) for k in ("BM", "BN", "BD", "BK") if k in r)
                most = max((way[0] for way in r["loops"]), default=r["once"][0])
                lines.append(
                    f"| {case} | {name} | {tile} | {r['num_warps']}, {r['num_stages']} | {version} | {r['registers']} "
                    f"| {r['stack']} | {r['shared'] / 1024:.0f} | {most} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed results")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes that compile")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    import triton

    before: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}, "triton": {}}
    made = before["triton"].setdefault(triton.__version__, {})
    head = {"command": "python -m benchmarks.triton_resources", "sources": sources()}
    cases_of: dict[str, dict[str, str]] = {}
    wanted = list(cases())
    # Cases share kernels: what one has compiled, the next of the same process need not.
    with ProcessPoolExecutor(options.jobs) as pool:
        for case, (names, found) in zip(wanted, pool.map(_measured, wanted, [set(made)] * len(wanted)), strict=True):
            cases_of[case.name] = names
            made |= found
            print(f"{case.name}: {len(found)} of {len(names)} compiled", file=sys.stderr, flush=True)
            if found:  # a run that is cut off goes on there
                write_json(RESULTS, {**head, **before, "sources": "unfinished"})
    used = {of for names in cases_of.values() for of in names.values()}
    kept = {
        version: {of: held[of] for of in sorted(used & set(held))}
        for version, held in sorted(before["triton"].items(), key=lambda item: numbers(item[0]))
    }
    write_json(RESULTS, {**head, "cases": cases_of, "triton": kept})


_of_this_process: set[str] = set()


def _measured(case: Case, known: set[str]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    if not able(case.architecture):
        return {name: origin(case.architecture, launch) for name, launch in launches(case).items()}, {}
    names, found = measure(case, known | _of_this_process)
    _of_this_process.update(found)
    return names, found


def numbers(version: str) -> tuple[int, ...]:
    """Of a version, to order by."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


if __name__ == "__main__":
    main()
