"""Builds robustft's compiled code by CMake; what that needs is in build_backend.py.

Environment: ROBUSTFT_NO_NATIVE=1 installs without compiled code, ROBUSTFT_NO_CUDA=1 without the CUDA library,
ROBUSTFT_TORCH_DIR names the torch package whose headers to use, ROBUSTFT_CMAKE_ARGS adds options, MAX_JOBS limits
parallel compilation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

from build_backend import reads_metadata, torch_dir, torch_floor, version_of
from robustft.machine import compiler_found, sources_digest

HERE = Path(__file__).resolve().parent


def say(message: str) -> None:
    print(f"robustft: {message}", file=sys.stderr, flush=True)


def jobs() -> str:
    """As many compilers as cores, but no more than one for 2 GB of memory."""
    if limit := os.environ.get("MAX_JOBS"):
        return limit
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return str(max(1, min(os.cpu_count() or 1, memory // 2**31)))


class CMakeBuild(build_ext):
    """Runs CMake. Without a compiler the package installs all the same and runs on its eager reference; a compiler
    that fails is an error, because a silently slow package would be worse."""

    def run(self) -> None:
        prefix = HERE if self.inplace else Path(self.build_lib).resolve()
        build = self.compile()
        # What an earlier build with other options left there would be packed, or loaded, as this one's.
        for stale in (prefix / "robustft").glob("*.so"):
            stale.unlink()
        if build is not None:
            subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(prefix)])

    def compile(self) -> Path | None:
        """The folder of the finished build, None if there is to be no compiled code."""
        if os.environ.get("ROBUSTFT_NO_NATIVE") == "1":
            say("ROBUSTFT_NO_NATIVE=1: installing without compiled code; robustft will use its eager reference")
            return None
        torch = torch_dir()
        if torch is None:
            raise SystemExit(
                f"robustft: no torch >= {torch_floor()} headers found; install torch or set ROBUSTFT_TORCH_DIR"
            )
        if not compiler_found():
            say("no C++ compiler found: installing without compiled code; robustft will use its eager reference")
            return None
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        import pybind11

        options = {
            "ROBUSTFT_TORCH_DIR": torch,
            "ROBUSTFT_TORCH_VERSION": ".".join(map(str, version_of(torch))),
            "ROBUSTFT_SOURCES": sources_digest(HERE),
            "ROBUSTFT_PYTHON_INCLUDE": sysconfig.get_paths()["include"],
            "ROBUSTFT_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "ROBUSTFT_PYBIND11_INCLUDE": pybind11.get_include(),
            "ROBUSTFT_CUDA": "OFF" if os.environ.get("ROBUSTFT_NO_CUDA") == "1" else "ON",
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        defines = [f"-D{key}={value}" for key, value in options.items()]
        extra = os.environ.get("ROBUSTFT_CMAKE_ARGS", "").split()
        # --fresh: an earlier build's cache names tools of a build environment that is gone.
        subprocess.check_call(["cmake", "--fresh", "-S", str(HERE), "-B", str(build), *generator, *defines, *extra])
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", jobs()])
        return build

    def get_outputs(self) -> list[str]:
        return []

    def get_source_files(self) -> list[str]:
        return []


class Compiled(Distribution):
    """What is compiled by setuptools that are too old to read pyproject.toml."""

    def parse_config_files(self, filenames=None, ignore_option_errors=False) -> None:
        pass


setup(
    distclass=Distribution if reads_metadata(setuptools.__version__, sys.argv[1:]) else Compiled,
    packages=[*find_packages(include=["robustft", "robustft.*"]), "robustft.benchmarks"],
    package_dir={"robustft.benchmarks": "benchmarks"},
    ext_modules=[Extension("robustft._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
