"""What is shipped: the source archive can be built, a wheel holds its own libraries only, and none names its origin."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import robustft

ROOT = Path(__file__).parent.parent
LIBRARIES = sorted(Path(robustft.__file__).parent.glob("*.so"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the source tree in which earlier builds have left libraries."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "runs")
    )
    (copy / "robustft" / "_ops_cpu.so").write_bytes(b"stale")
    return copy


def build(tree: Path, kind: str, into: Path) -> Path:
    """The archive that the build backend makes; without compiled code, which would take minutes."""
    script = f"from setuptools import build_meta as b; print(b.build_{kind}({str(into)!r}))"
    environment = os.environ | {"ROBUSTFT_NO_NATIVE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return into / done.stdout.splitlines()[-1]


def test_the_source_archive_holds_all_that_a_build_reads_and_no_library(tree, tmp_path):
    with tarfile.open(build(tree, "sdist", tmp_path)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".cu"}}
    modules = {str(p.relative_to(ROOT)) for d in ("robustft", "benchmarks") for p in (ROOT / d).rglob("*.py")}
    assert sources and modules
    assert sources | modules | {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held
    assert not [name for name in held if name.endswith(".so")]


def test_a_wheel_holds_no_library_of_an_earlier_build(tree, tmp_path):
    first = build(tree, "wheel", tmp_path)
    (folder,) = (tree / "build").glob("lib*")  # where an earlier build with compiled code leaves its libraries
    (folder / "robustft" / "_ops_cpu.so").write_bytes(b"stale")
    again = build(tree, "wheel", tmp_path)
    for wheel in (first, again):
        with zipfile.ZipFile(wheel) as archive:
            held = archive.namelist()
        assert not [name for name in held if name.endswith(".so")]
        assert "robustft/data/assets/glyphworld_vit.safetensors" in held
        assert {"robustft/benchmarks/__main__.py", "robustft/benchmarks/conftest.py"} <= set(held)
        assert not [name for name in held if "results" in name]


def test_the_libraries_name_no_place_of_the_machine_that_built_them():
    if not LIBRARIES:
        pytest.skip("robustft is installed without compiled code")
    absolute = re.compile(rb"(?<![\w.-])(?:/[\w.+-]+)+\.(?:cpp|cuh?|h)\b")
    for library in LIBRARIES:
        assert sorted(set(absolute.findall(library.read_bytes()))) == [], library.name


def test_the_memory_table_is_written_between_its_comments(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import machine, memory

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- memory -->\nold\n<!-- end of memory -->\nafter\n")
    monkeypatch.setattr(memory, "README", readme)
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(memory, "measure_all", lambda: [{"implementation": "robustft", "n": 4096, "bytes": 12_345_678}])
    for arguments in ([], ["--table"]):
        monkeypatch.setattr(sys, "argv", ["memory", *arguments])
        memory.main()
        lines = readme.read_text().splitlines()
        assert lines[:2] == ["before", "<!-- memory -->"] and lines[-2:] == ["<!-- end of memory -->", "after"]
        row = "| 4,096 | 12 MB |" + " not measured |" * 5
        assert row in lines and "old" not in lines
    readme.write_text("no place for it")
    with pytest.raises(ValueError, match="0 places"):
        memory.main()
