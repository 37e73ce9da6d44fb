"""What robustft computes with: its compiled code, the processor, what a training may choose. Loads nothing heavy.

Compiled code lies beside this file. In a source tree that was not built in place it is looked for in the installed
robustft, and used if it was built from the very sources of the tree: both sides carry a digest of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
Decay = Literal["cosine", "linear", "constant"]
Loss = Literal["auto", "softmax", "sigmoid"]
DECAYS: tuple[str, ...] = get_args(Decay)
"""What the learning rate does after its warm-up."""
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""How torch.compile compiles towers (`robustft.training.compiling`)."""
Tune = Literal["full", "visual", "text", "projection", "lora", "prompts"]
"""Which parameters of a model are trained (`robustft.methods.tuning`)."""
Towers = Literal["visual", "text", "both"]
"""Which towers have adapters."""
Graph = Literal["torch-export", "onnx", "aot-inductor"]
"""What a model is exported to as one graph (`robustft.pipeline.deploying`)."""
Bits = Literal["fp32", "fp16"]
"""Of the towers in it."""
WEIGHT_DECAY = 0.1
"""Of matrices and embeddings, unless a training is told otherwise."""
PROCESS_TIMEOUT = 50.0
"""Seconds after which a process of several that does not answer ends the others, unless they are told otherwise."""

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
EXTENSION = "_C"
REINSTALL = "pip install --force-reinstall --no-deps .   (in robustft's source tree)"


def sources_digest(root: Path) -> str | None:
    """A digest of what the compiled code is made of in the source tree `root`; None if that is no source tree."""
    if not (root / "csrc").is_dir() or not (root / "CMakeLists.txt").is_file():
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in (root / "csrc").rglob("*") if p.suffix in {".cpp", ".cu", ".h"}):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    digest.update((root / "CMakeLists.txt").read_bytes())
    return digest.hexdigest()


@cache
def compiled_folder() -> Path:
    """The folder of the compiled libraries; robustft's own, where there may be none, unless an installed one fits.

    Raises: ImportError in a source tree without compiled code, if only an installed robustft of other sources has some.
    """
    if _extension_file(PACKAGE) or (own := sources_digest(ROOT)) is None or not (installed := _installed_folder()):
        return PACKAGE
    if built_from(installed) == own:
        return installed
    raise ImportError(
        f"robustft is imported from its source tree {ROOT}, which is not built, and the compiled code of the robustft "
        f"installed in {installed} is of other sources. {build_cure()}; or run from another folder to use the "
        "installed one",
        name="robustft",
    )


@cache
def extension(folder: Path) -> ModuleType:
    """The extension module of a folder of compiled code: what was built, and what this processor has.

    Raises: ImportError if there is none for this Python, or it does not load.
    """
    path = _extension_file(folder)
    if path is None:
        raise ImportError(f"{folder} holds no compiled robustft for this Python", name=f"robustft.{EXTENSION}")
    spec = importlib.util.spec_from_file_location(f"robustft.{EXTENSION}", path)
    assert spec is not None and spec.loader is not None  # the suffix is one of an extension module
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_from(folder: Path) -> str | None:
    """The digest of the sources that a folder's compiled code is of; None if that does not load or does not tell."""
    try:
        return extension(folder).build_info().get("sources")
    except ImportError:
        return None


def out_of_date() -> bool:
    """Whether the source tree in which robustft was built has changed since."""
    own = sources_digest(ROOT)
    return own is not None and _extension_file(PACKAGE) is not None and built_from(PACKAGE) != own


def build_cure() -> str:
    """The command that compiles the code of this robustft, after a compiler's where there is none."""
    compiler = "" if compiler_found() else "install a C++ compiler (Debian: apt install g++), then "
    return compiler + (REINSTALL if sources_digest(ROOT) is None else f"pip install -e {ROOT}")


def compiler_found() -> bool:
    """Whether there is a C++ compiler: the one that CXX names, or one of a usual name."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name)


def processor() -> str:
    """The processor's name, as the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _extension_file(folder: Path) -> Path | None:
    files = (folder / f"{EXTENSION}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next(filter(Path.is_file, files), None)


def _installed_folder() -> Path | None:
    """The package folder of an installed robustft with compiled code, other than the one that runs."""
    for distribution in importlib.metadata.distributions(name="robustft"):
        folder = Path(str(distribution.locate_file("robustft"))).resolve()
        if folder != PACKAGE and _extension_file(folder):
            return folder
    return None
