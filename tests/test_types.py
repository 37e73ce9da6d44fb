"""What type checkers and editors see of robustft, that they find no error, and which file may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import robustft

ROOT = Path(__file__).parent.parent
PACKAGE = Path(robustft.__file__).parent
FLOORLESS = {"robustft", "robustft.__main__", "robustft.data"}  # they only hand on what others hold

REVEALED = """
import robustft
from robustft import functional as rf

reveal_type(robustft.CaRot)
reveal_type(robustft.WiSEFT)
reveal_type(robustft.Detector)
reveal_type(robustft.fit)
reveal_type(robustft.calibration_report)
reveal_type(robustft.ContrastiveLoss)
reveal_type(robustft.functional.contrastive_loss)
reveal_type(rf.classification_loss)
reveal_type(robustft.build_info)
reveal_type(robustft.clip.load)
reveal_type(robustft.__version__)
"""


def test_type_checkers_are_told_the_lazy_names_and_no_others():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "without `as` it is not exported"
            told[alias.name] = node.module
    assert told == robustft._LAZY | dict.fromkeys(robustft._MODULES, "robustft")
    assert sorted(told) == sorted(robustft.__all__)


def test_every_name_of_the_package_is_its_rooms_own():
    for name, room in robustft._LAZY.items():
        assert getattr(robustft, name) is getattr(import_module(room), name)
    for name in robustft._MODULES:
        assert getattr(robustft, name) is import_module(f"robustft.{name}")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        robustft.nonsense  # noqa: B018  (looking is the test)


@pytest.mark.long
@pytest.mark.exhaustive
def test_the_package_has_no_error_of_types_and_names_of_the_readme_have_them(tmp_path):
    """In one run, of which the types of torch take the most."""
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(REVEALED)
    command = [sys.executable, "-m", "mypy", f"--cache-dir={tmp_path / 'cache'}", "robustft", str(tmp_path / "use.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    revealed = [line.split("Revealed type is ")[1] for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == REVEALED.count("reveal_type"), done.stdout + done.stderr
    for line in revealed:
        assert line != '"Any"' and "*Any" not in line and "-> Any" not in line, line


def test_a_file_imports_only_from_floors_below_its_own(monkeypatch, capsys):
    importlinter = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(PACKAGE.parent)
    status = importlinter.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == importlinter.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_every_file_stands_on_a_floor():
    configuration = pytest.importorskip("importlinter.api").read_configuration(str(ROOT / "pyproject.toml"))
    (floors,) = (c["layers"] for c in configuration["contracts_options"] if c["type"] == "layers")
    placed = {module for floor in floors for module in floor.replace("|", " ").replace(":", " ").split()}
    source = ROOT / "robustft"  # an installed package also has the benchmarks, which stand beside the house
    for path in source.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        above = {".".join(module.split(".")[:n]) for n in range(2, module.count(".") + 2)}
        assert above & placed or module in FLOORLESS, f"{module} stands on no floor of pyproject.toml"
