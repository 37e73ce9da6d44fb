"""The build backend: setuptools', and the tools that compiling needs, asked for where they are needed only.

torch is never imported here: only its headers are needed, and those are looked for by path. Where there are none they
are taken out of torch's wheel. As a build requirement torch would be unpacked a second time, with the libraries of a
GPU: 5 GB, of which nothing is used. So it is one only where pip cannot get the wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent
HEADERS = ROOT / "build" / "torch"
"""Where headers that were taken out of a wheel lie."""


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + tools()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + tools()


def tools() -> list[str]:
    """What has to be installed to compile."""
    if os.environ.get("ROBUSTFT_NO_NATIVE") == "1":
        return []
    cmake = floor("CMakeLists.txt", r"cmake_minimum_required\(VERSION ([\d.]+)\)")
    torch = [] if torch_dir() or fetch_headers() else [f"torch>={torch_floor()}"]
    return [f"cmake>={cmake}", "ninja", "pybind11>=2.12", *torch]


def torch_floor() -> str:
    """The oldest torch, as the project's dependencies have it."""
    return floor("pyproject.toml", r'"torch>=([\d.]+)"')


def reads_metadata(version: str, arguments: list[str]) -> bool:
    """Whether setup.py lets setuptools of that version read pyproject.toml.

    pip installs what [build-system] asks for; `python setup.py` takes what is there. Older ones refuse the licence as
    it is written there, but compiling alone needs none of it. SystemExit for what does.
    """
    wanted = floor("pyproject.toml", r'"setuptools>=([\d.]+)"')
    if int(version.split(".")[0]) >= int(wanted):
        return True
    if "build_ext" in arguments:
        return False
    raise SystemExit(
        f"robustft: setuptools {version} cannot read pyproject.toml, which needs {wanted} or newer; `pip install .` "
        "brings its own, and `python setup.py build_ext --inplace` compiles with this one"
    )


def floor(file: str, pattern: str) -> str:
    found = re.search(pattern, (ROOT / file).read_text())
    if found is None:
        raise ValueError(f"{file} does not say {pattern}")
    return found[1]


def torch_dir() -> Path | None:
    """The torch package of the environment being installed into, or of the build environment; headers suffice.

    Headers of the same version that were taken out of its wheel before are as good. What was compiled with them needs
    not be compiled again, as it would with the same headers in another place.
    """
    named = os.environ.get("ROBUSTFT_TORCH_DIR")
    candidates = [Path(named)] if named else []
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        candidates.append(Path(list(spec.submodule_search_locations)[0]))
    candidates += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("purelib", "platlib")]
    candidates.append(HEADERS)
    for candidate in candidates:
        header = candidate / "include/torch/csrc/stable/library.h"
        if header.exists() and version_of(candidate) >= tuple(map(int, torch_floor().split("."))):
            return candidate if named else _unpacked(candidate)
    return None


def _unpacked(torch: Path) -> Path:
    """HEADERS if they are this torch's, else itself."""
    here, there = (folder / "version.py" for folder in (HEADERS, torch))
    return HEADERS if here.exists() and here.read_bytes() == there.read_bytes() else torch


def fetch_headers() -> Path | None:
    """torch's headers out of the wheel that pip would install; None where pip is not there or does not get it."""
    with tempfile.TemporaryDirectory() as folder:
        # -I: the pip that is installing, which is not to be seen in the environment that it builds in.
        pip = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        if subprocess.run([*pip, "--dest", folder, f"torch>={torch_floor()}"]).returncode != 0:
            return None
        (wheel,) = Path(folder).glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.match(r"torch/(include/|version\.py$)", name)]
            archive.extractall(folder, names)
        HEADERS.parent.mkdir(exist_ok=True)
        shutil.rmtree(HEADERS, ignore_errors=True)
        shutil.move(Path(folder) / "torch", HEADERS)
    return torch_dir()


def version_of(torch: Path) -> tuple[int, ...]:
    """The version of a torch package, of which nothing is imported."""
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    return tuple(map(int, found.groups())) if found else (0,)
