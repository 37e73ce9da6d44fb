"""`robustft doctor`: what is installed and built, and each operator run against its reference on a tiny input.

A check is a name, whether it passed, what was found, and, when it did not pass, the command that mends it. Nothing is
imported before its own check, so that one broken library does not hide the others.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from robustft import machine
from robustft.machine import REINSTALL

TOLERANCE = 1e-4  # float32 outcomes of order 1 to 100

_MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}
"""Where the module of a requirement has another name."""
_OF_CLIP = ("torchvision", "open_clip_torch")
"""Requirements that are imported in a way of their own."""


class Check(NamedTuple):
    """One finding. `passed` is None for a fact that is neither right nor wrong."""

    name: str
    passed: bool | None
    found: str
    cure: str = ""


def run(log: Callable[[str], None] = print) -> int:
    """Prints every check and what to do about the failed ones; returns the exit code, 1 if any failed."""
    failed = []
    for check in checks():
        mark = {True: "ok  ", False: "FAIL", None: "    "}[check.passed]
        log(f"{mark} {check.name:<28} {check.found}")
        if check.passed is False:
            failed.append(check)
    log("")
    for check in failed:
        log(f"{check.name}: {check.cure}")
    log(f"{len(failed)} problems" if failed else "everything works")
    return 1 if failed else 0


def checks() -> Iterator[Check]:
    """All checks, lazily, in the order in which one depends on another."""
    yield Check("python", sys.version_info >= (3, 10), platform.python_version(), "install Python 3.10 or newer")
    try:
        floors = _floors()
    except importlib.metadata.PackageNotFoundError:
        yield Check("robustft", False, f"in {machine.PACKAGE}, not installed", machine.build_cure())
        return
    torch_check = _library("torch", floors.pop("torch", ()))
    yield torch_check
    if not torch_check.passed:
        return
    yield from _build()
    yield from _clip_libraries()
    for name, floor in floors.items():
        if name not in _OF_CLIP:
            yield _library(name, floor)
    yield _bundled_model()
    free = shutil.disk_usage(tempfile.gettempdir()).free
    yield Check("temporary space", free > 2**28, f"{free / 2**30:.1f} GB free", "free some space or set TMPDIR")


def _floors() -> dict[str, tuple[int, ...]]:
    """What robustft requires without extras, and each one's oldest version, () for any: as its metadata have it."""
    required = importlib.metadata.requires("robustft") or []
    found = (re.match(r"([\w.-]+)(?:>=([\d.]+))?$", requirement) for requirement in required)
    return {
        name: tuple(map(int, floor.split("."))) if floor else () for name, floor in (m.groups() for m in found if m)
    }


def _library(name: str, floor: tuple[int, ...]) -> Check:
    wanted = f">={'.'.join(map(str, floor))}" if floor else ""
    cure = f"pip install '{name}{wanted}'"
    try:
        importlib.import_module(_MODULES.get(name, name))
        version = importlib.metadata.version(name)  # some modules do not say theirs
    except Exception as error:  # whatever an import raises is this check's finding
        return Check(name, False, f"{type(error).__name__}: {error}", cure)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    return Check(name, numbers >= floor, f"{version}" + ("" if numbers >= floor else f" (needs {wanted})"), cure)


def _build() -> Iterator[Check]:
    import torch

    cure = machine.build_cure()
    try:
        from robustft.ops.dispatch import build_info
    except ImportError as error:  # in a source tree: only compiled code of other sources is there
        yield Check("compiled CPU operators", False, str(error), cure)
        return
    info = build_info()
    libraries = info["libraries"]
    if libraries["cpu"] == "loaded":
        built = f"{info.get('compiler', '?')}, {info.get('cpu_variants', '?')}; running {info.get('active_isa', '?')}"
        stale = "; built from other sources than those beside it" if machine.out_of_date() else ""
        yield Check("compiled CPU operators", not stale, built + stale, cure)
    else:
        yield Check("compiled CPU operators", False, str(libraries["cpu"]), cure)
    if machine.compiled_folder() != machine.PACKAGE:
        yield Check("compiled code", None, f"of the same sources, as installed in {machine.compiled_folder()}")
    if libraries["cuda"] == "loaded":
        found = f"{info.get('cuda_compiler', '?')} for {info.get('cuda_architectures', '?')}"
        yield Check("compiled CUDA operators", True, found)
    else:
        needed = torch.cuda.is_available()
        cuda_compiler = "" if shutil.which("nvcc") else "install a CUDA compiler (nvcc), then "
        cure = cuda_compiler + cure
        yield Check("compiled CUDA operators", False if needed else None, str(libraries["cuda"]), cure)
    yield Check("Triton kernels", None, str(info.get("triton")))
    yield _gpu()
    yield Check("threads", None, f"{torch.get_num_threads()} (set OMP_NUM_THREADS to change)")
    yield from _operators()


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("GPU", None, torch.cuda.get_device_name())
    driver = _driver()
    if torch.version.cuda is None or not 0 < driver < int(torch.version.cuda.split(".")[0]):
        return Check("GPU", None, "none")
    found = f"not usable: its driver is for CUDA {driver}, and this torch for CUDA {torch.version.cuda}"
    return Check("GPU", False, found, f"update the NVIDIA driver, or install a torch for CUDA {driver}")


def _driver() -> int:
    """The newest major version of CUDA that the NVIDIA driver serves; 0 where there is none."""
    import ctypes

    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else version.value // 1000


def _operators() -> Iterator[Check]:
    import torch

    from robustft import functional
    from robustft.ops import registry

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, examples in registry.PUBLIC.items():
            if name in registry.OPERATORS:  # the others are plain torch
                yield _operator(name, device, getattr(functional, name), examples)


def _operator(name: str, device: str, function: Callable, examples: Callable) -> Check:
    """A function's results and gradients beside those of its reference."""
    import torch

    import robustft
    from robustft.ops import registry
    from robustft.ops.dispatch import body_of

    line = f"{name} ({device})"

    def outcomes() -> list[torch.Tensor]:
        return registry.outcomes(function, examples(registry.Source(device, torch.float32)))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is missing is said below
            if body_of(name, torch.empty(0, device=device)) == "reference":
                return Check(line, None, "eager reference")
            actual = outcomes()
        with robustft.backend("reference"):
            expected = outcomes()
    except Exception as error:  # a kernel that does not run is this check's finding
        return Check(line, False, f"{type(error).__name__}: {error}", REINSTALL)
    pairs = zip(actual, expected, strict=True)
    # Tensor.max, unlike Python's, hands NaN on, and NaN passes no comparison.
    worst = torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max().item()
    return Check(line, worst <= TOLERANCE, f"largest difference from the reference {worst:.1e}", REINSTALL)


def _clip_libraries() -> Iterator[Check]:
    cure = "pip install --force-reinstall torchvision open_clip_torch   (torchvision must match this torch)"
    try:
        from robustft import clip

        open_clip = clip.import_open_clip()
        import torchvision

        yield Check("torchvision", True, torchvision.__version__)
        yield Check("open_clip", True, open_clip.__version__)
    except Exception as error:  # as above
        yield Check("open_clip", False, f"{type(error).__name__}: {error}", cure)


def _bundled_model() -> Check:
    try:
        from robustft.data import glyphworld

        bundle = glyphworld.load_clip()
        digits = len(glyphworld.digits("test"))
        parameters = sum(p.numel() for p in bundle.model.get_submodule("visual").parameters())
        return Check(
            "bundled model and data", True, f"{parameters / 1e6:.2f} M visual parameters, {digits} test digits"
        )
    except Exception as error:  # as above
        return Check("bundled model and data", False, f"{type(error).__name__}: {error}", REINSTALL)
