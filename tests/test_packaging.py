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
from types import SimpleNamespace

import pytest

import robustft
from robustft import machine

ROOT = Path(__file__).parent.parent
LIBRARIES = sorted(machine.compiled_folder().glob("*.so"))


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
    script = f"import build_backend as b; print(b.build_{kind}({str(into)!r}))"
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
    builders = {"CMakeLists.txt", "setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"}
    assert sources | modules | builders <= held
    assert not [name for name in held if name.endswith(".so")]


def test_a_wheel_holds_no_library_of_an_earlier_build(tree, tmp_path):
    first = build(tree, "wheel", tmp_path)
    (folder,) = (tree / "build").glob("lib*")  # where an earlier build with compiled code leaves its libraries
    (folder / "robustft" / "_ops_cpu.so").write_bytes(b"stale")
    again = build(tree, "wheel", tmp_path)
    for wheel in (first, again):
        with zipfile.ZipFile(wheel) as archive:
            held = archive.namelist()
            (metadata,) = (archive.read(name).decode() for name in held if name.endswith(".dist-info/METADATA"))
        assert not [name for name in held if name.endswith(".so")]
        assert f"\nVersion: {robustft.__version__}\n" in metadata
        assets = ["glyphworld_vit.safetensors", "iconworld_drawings.xz"]
        assets += ["iconworld_notice.md", "iconworld_apache_2.0.txt"]
        assert {"robustft/py.typed", *(f"robustft/data/assets/{name}" for name in assets)} <= set(held)
        modules = {str(p.relative_to(ROOT)) for p in (ROOT / "robustft").rglob("*.py")}
        assert modules | {"robustft/benchmarks/__main__.py", "robustft/benchmarks/conftest.py"} <= set(held)
        assert not [name for name in held if "benchmarks/results" in name]


@pytest.fixture
def backend(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delenv("ROBUSTFT_NO_NATIVE", raising=False)
    monkeypatch.delenv("ROBUSTFT_TORCH_DIR", raising=False)
    import build_backend

    monkeypatch.setattr(build_backend, "HEADERS", tmp_path / "build" / "torch")
    return build_backend


def test_the_backend_asks_for_compiling_tools_only(backend, monkeypatch):
    tools = backend.tools()
    assert {re.split("[>=]", tool)[0] for tool in tools} == {"cmake", "ninja", "pybind11"}
    assert tools[0].removeprefix("cmake>=") in (ROOT / "CMakeLists.txt").read_text()
    monkeypatch.setenv("ROBUSTFT_NO_NATIVE", "1")
    assert backend.tools() == []


@pytest.mark.parametrize(
    ("version", "command", "says"),
    [("65.5.0", "build_ext", ""), ("84.2.1", "build_ext", "project.license"), ("65.5.0", "bdist_wheel", "needs 77")],
)
def test_setuptools_too_old_for_the_metadata_compile_all_the_same(version, command, says, tree, tmp_path, python):
    """A licence that no setuptools take stands for one that older ones do not."""
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(tree / name, tmp_path)
    (tmp_path / "robustft").mkdir()
    (tmp_path / "robustft" / "__init__.py").touch()
    shutil.copy(tree / "robustft" / "machine.py", tmp_path / "robustft")
    project = tmp_path / "pyproject.toml"
    project.write_text(project.read_text().replace('license = "MIT"', "license = 1"))
    into = ["--build-lib", "lib"] if command == "build_ext" else ["--dist-dir", "lib"]
    code = (
        f"import runpy, sys, setuptools; setuptools.__version__ = {version!r};"
        f"sys.argv = {['setup.py', command, *into]}; runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {**os.environ, "ROBUSTFT_NO_NATIVE": "1"}
    run = python.run("-c", code, environment=environment, folder=tmp_path)
    assert (run.returncode == 0) == (not says), run.stdout + run.stderr
    assert (says or "installing without compiled code") in run.stdout + run.stderr


@pytest.mark.parametrize("failing", [False, True])
def test_where_there_is_no_torch_its_headers_come_out_of_a_wheel_or_torch_is_required(backend, monkeypatch, failing):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sysconfig, "get_paths", lambda: {"purelib": "/nowhere", "platlib": "/nowhere"})
    version = f"{backend.torch_floor()}.0"

    def pip(command):
        assert command[-1] == f"torch>={backend.torch_floor()}" and command[4] == "download"
        if not failing:
            with zipfile.ZipFile(Path(command[-2]) / f"torch-{version}-cp310-cp310-linux.whl", "w") as wheel:
                for name in ("include/torch/csrc/stable/library.h", "lib/libtorch_cpu.so", "version.py.orig"):
                    wheel.writestr(f"torch/{name}", "")
                wheel.writestr("torch/version.py", f"__version__ = '{version}+cu130'")
        return SimpleNamespace(returncode=int(failing))

    monkeypatch.setattr(backend.subprocess, "run", pip)
    assert backend.tools()[3:] == ([f"torch>={backend.torch_floor()}"] if failing else [])
    assert backend.torch_dir() == (None if failing else backend.HEADERS)
    if not failing:
        assert sorted(path.name for path in backend.HEADERS.iterdir()) == ["include", "version.py"]


def test_headers_of_the_installed_torch_are_those_that_lie_here(backend, monkeypatch):
    installed = backend.torch_dir()
    assert installed is not None and installed != backend.HEADERS
    for version, expected in (("0", installed), (None, backend.HEADERS)):
        backend.HEADERS.mkdir(parents=True, exist_ok=True)
        said = (installed / "version.py").read_text() if version is None else f"__version__ = '{version}'"
        (backend.HEADERS / "version.py").write_text(said)
        assert backend.torch_dir() == expected
    monkeypatch.setenv("ROBUSTFT_TORCH_DIR", str(installed))
    assert backend.torch_dir() == installed


# In the source tree after `pip install .`: Python finds the tree's modules first, which nothing has compiled.


@pytest.fixture
def unbuilt(tree, tmp_path) -> Path:
    """A source tree without compiled code, of the sources that the installed robustft was built from."""
    if not LIBRARIES:
        pytest.skip("robustft is installed without compiled code")
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("*.so", "*.egg-info", "build", "tests", "results"))
    if machine.built_from(machine.compiled_folder()) != machine.sources_digest(copy):
        pytest.skip("the installed robustft was built from other sources")
    return copy


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder in which robustft is installed with its compiled code."""
    folder = tmp_path / "site"
    (folder / "robustft").mkdir(parents=True)
    for library in LIBRARIES:
        os.symlink(library, folder / "robustft" / library.name)
    metadata = folder / f"robustft-{robustft.__version__}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: robustft\nVersion: {robustft.__version__}\n")
    return folder


@pytest.fixture
def run_in(unbuilt, site, python):
    """Python in the source tree, where `site` is the only place that has a robustft installed."""
    own = Path(robustft.__file__).parent.parent
    others = [p for p in sys.path if p and Path(p).resolve() != own and not p.endswith(".zip")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *others]), "PYTHONNOUSERSITE": "1"}
    return lambda *arguments: python.run(*arguments, folder=unbuilt, environment=environment)


LOADED = "import robustft; print(robustft.__file__, robustft.build_info()['libraries']['cpu'])"


def test_a_source_tree_runs_on_the_installed_compiled_code_of_the_same_sources(unbuilt, run_in):
    done = run_in("-c", LOADED)
    assert done.stdout.split() == [str(unbuilt / "robustft" / "__init__.py"), "loaded"], done.stderr
    assert "reference" not in done.stderr


def test_a_source_tree_of_other_sources_stops_with_the_cure(unbuilt, run_in):
    with (unbuilt / "csrc" / "ops.cpp").open("a") as file:
        file.write("// changed\n")
    for arguments in (["-c", LOADED], ["-m", "robustft", "info"], ["-m", "benchmarks", "--quick"]):
        done = run_in(*arguments)
        assert done.returncode == 1 and f"pip install -e {unbuilt}" in done.stderr, done.stderr
    told = run_in("-m", "robustft", "doctor")
    assert told.returncode == 1 and f"pip install -e {unbuilt}" in told.stdout, told.stdout + told.stderr
    assert "install a C++ compiler" not in told.stdout or not machine.compiler_found()


def test_the_benchmarks_never_time_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import __main__ as benchmarks
    from robustft.ops import dispatch

    monkeypatch.setitem(dispatch.LIBRARIES, "cpu", "not built")
    with pytest.raises(OSError, match="not built.*eager reference is no candidate.*pip install"):
        benchmarks.check_compiled()
    monkeypatch.setitem(dispatch.LIBRARIES, "cpu", "loaded")
    monkeypatch.setattr(benchmarks, "out_of_date", lambda: True)
    with pytest.raises(OSError, match="of other sources.*pip install"):
        benchmarks.check_compiled()


def test_the_libraries_name_no_place_of_the_machine_that_built_them():
    if not LIBRARIES:
        pytest.skip("robustft is installed without compiled code")
    absolute = re.compile(rb"(?<![\w.-])(?:/[\w.+-]+)+\.(?:cpp|cuh?|h)\b")
    for library in LIBRARIES:
        assert sorted(set(absolute.findall(library.read_bytes()))) == [], library.name


def test_the_memory_table_is_that_of_the_stored_results(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import machine, memory

    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(memory, "measure_all", lambda: [{"implementation": "robustft", "n": 4096, "bytes": 12_345_678}])
    for arguments in ([], ["--table"]):
        monkeypatch.setattr(sys, "argv", ["memory", *arguments])
        memory.main()
        assert "| 4,096 | 12 MB |" + " not measured |" * 5 in capsys.readouterr().out.splitlines()
