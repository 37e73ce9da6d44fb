"""Registers, spills and shared memory of every CUDA kernel, as nvcc tells them: no GPU is needed.

    python -m benchmarks.cuda_resources         # writes results/cuda_resources.json and .md

Compiled with warnings as errors. Dynamic shared memory is the launch's; csrc/cuda/neighbor_filter.h asserts it. The
instructions counted are tensor-core products (HMMA), copies to shared memory that nothing waits for (LDGSTS) and
matrix loads (LDSM), where cuobjdump is found.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks import machine
from robustft.files import write_text

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
"""Bytes of shared memory a block may have."""
DYNAMIC_SHARED = {"neighbor_scores_kernel": 96 << 10}
INSTRUCTIONS = ("HMMA", "LDGSTS", "LDSM")


class Kernel(NamedTuple):
    file: str
    name: str
    architecture: str
    registers: int
    stack: int
    spilled: int  # bytes, stores and loads
    shared: int  # bytes, static and dynamic
    instructions: dict[str, int]


def torch_include() -> Path:
    spec = find_spec("torch")
    return Path(spec.origin).parent / "include"


def compile_source(source: Path, architectures: Sequence[str]) -> list[Kernel]:
    """What ptxas says of each kernel of a file. RuntimeError with nvcc's output for an error or a warning."""
    command = ["nvcc", "-std=c++17", "-O3", "-c", "-Werror", "all-warnings", "-Xptxas", "-v", "-Xcompiler=-fPIC"]
    for architecture in architectures:
        command += ["-gencode", f"arch={architecture.replace('sm', 'compute')},code={architecture}"]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(torch_include())]
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "kernels.o"
        run = subprocess.run([*command, str(source), "-o", str(compiled)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{source.name}: {run.stderr[-4000:]}")
        instructions = count_instructions(compiled)
    kernels = []
    for entry in re.split(r"(?=ptxas info\s*: Compiling entry function)", run.stderr)[1:]:
        mangled, architecture = re.search(r"function '(\w+)' for '(\w+)'", entry).groups()
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", entry).groups())
        static = re.search(r"(\d+) bytes smem", entry)
        name = readable(mangled)
        kernels.append(
            Kernel(
                source.name,
                name,
                architecture,
                int(re.search(r"Used (\d+) registers", entry)[1]),
                stack,
                stores + loads,
                int(static[1] if static else 0) + DYNAMIC_SHARED.get(name.split("<")[0], 0),
                instructions.get((mangled, architecture), {}),
            )
        )
    return sorted(kernels, key=lambda kernel: (kernel.name, int(kernel.architecture[3:])))


def readable(mangled: str) -> str:
    """name_kernel<arguments>."""
    whole = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    return re.search(r"(\w+_kernel(?:<\w+>)?)\(", whole)[1]


def kernels_of(library: Path, counted: str = "") -> list[Kernel]:
    """The kernels in a library, as cuobjdump tells them, with the instructions of those whose names hold `counted`."""
    found = list(functions_of(library, "-res-usage"))
    names = ",".join({name for _, name, _ in found if counted and counted in name})
    instructions = count_instructions(library, "-fun", names) if names else {}
    kernels = []
    for architecture, mangled, told in found:
        name, used = readable(mangled), {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", told)}
        kernels.append(
            Kernel(
                library.name,
                name,
                architecture,
                used["REG"],
                used["STACK"],
                used["LOCAL"],
                used["SHARED"] + DYNAMIC_SHARED.get(name.split("<")[0], 0),
                instructions.get((mangled, architecture), {}),
            )
        )
    return kernels


def cuobjdump() -> str | None:
    """CUDA's, or the one that Triton brings."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else Path()
    return shutil.which("cuobjdump") or (str(bundled) if bundled.is_file() else None)


def functions_of(compiled: Path, *asked: str) -> Iterator[tuple[str, str, str]]:
    """Architecture, mangled name and what cuobjdump tells of each function; nothing where there is no cuobjdump."""
    tool = cuobjdump()
    told = "" if tool is None else subprocess.run([tool, *asked, str(compiled)], capture_output=True, text=True).stdout
    for part in re.split(r"(?=\n\s*arch = )", told):
        architecture = re.search(r"arch = (\w+)", part)
        for function in re.split(r"(?=Function )", part)[1:]:
            yield architecture[1], re.match(r"Function :? ?(\w+)", function)[1], function


def count_instructions(compiled: Path, *asked: str) -> dict[tuple[str, str], dict[str, int]]:
    """By mangled name and architecture; nothing where there is no cuobjdump."""
    counts = {}
    for architecture, name, function in functions_of(compiled, "-sass", *asked):
        found = {op: len(re.findall(rf"\b{op}\b", function)) for op in INSTRUCTIONS}
        counts[name, architecture] = {op: count for op, count in found.items() if count}
    return counts


def table(kernels: list[Kernel]) -> str:
    lines = [
        "| kernel | architecture | registers | spilled bytes | shared bytes | instructions |",
        "|---|---|--:|--:|--:|---|",
    ]
    for k in kernels:
        found = ", ".join(f"{count} {op}" for op, count in k.instructions.items())
        lines.append(f"| `{k.name}` | {k.architecture} | {k.registers} | {k.spilled} | {k.shared} | {found} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.cuda_resources", description=__doc__).parse_args(arguments)
    if shutil.which("nvcc") is None:
        print("no nvcc on PATH", file=sys.stderr)
        return 1
    kernels = [kernel for source in SOURCES for kernel in compile_source(source, ARCHITECTURES)]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    results = {"nvcc": re.search(r"V([\d.]+)", version)[1], "kernels": [kernel._asdict() for kernel in kernels]}
    path = machine.write("cuda_resources", "python -m benchmarks.cuda_resources", results)
    write_text(path.with_suffix(".md"), table(kernels))
    print(table(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
