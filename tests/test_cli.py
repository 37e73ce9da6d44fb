"""The command line answers at once what needs no computing, and says what it cannot do."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import robustft
from robustft import cli
from robustft.machine import PRECISIONS
from robustft.pipeline.recipes import RECIPES

ROOT = Path(__file__).parent.parent
QUICK = (["--help"], ["--version"], ["quickstart", "--help"], ["study", "--help"], ["bench", "--help"])
ANSWERS = """
import sys
from robustft.cli import main

for arguments in {QUICK}:
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0
    print("--", *arguments)
print(sorted(set(sys.modules) & {"torch", "numpy", "open_clip", "PIL"}))
""".replace("{QUICK}", repr(QUICK))


@pytest.fixture(scope="module")
def answers() -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]), "COLUMNS": "200"}
    command = [sys.executable, "-c", ANSWERS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_version_load_neither_torch_nor_numpy(answers):
    assert answers.splitlines()[-1] == "[]"


def test_help_names_every_command_recipe_and_precision(answers):
    for word in ("quickstart", "study", "bench", "doctor", "info", *RECIPES, *PRECISIONS, "PATTERN"):
        assert word in answers
    assert f"robustft {robustft.__version__}\n" in answers


@pytest.mark.parametrize("command", ["quickstart", "study"])
def test_defaults_of_a_command_are_those_of_its_function(command):
    from robustft.pipeline.quickstart import quickstart
    from robustft.pipeline.study import study

    options = vars(cli.parser().parse_args([command]))
    options["method_names"] = options.pop("methods", None)
    parameters = inspect.signature({"quickstart": quickstart, "study": study}[command]).parameters
    defaults = {name: p.default for name, p in parameters.items() if name in options}
    assert len(defaults) >= 5 and defaults == {name: options[name] for name in defaults}


def test_the_precisions_offered_are_those_that_fit_takes():
    assert get_args(get_type_hints(robustft.fit)["precision"]) == PRECISIONS


def test_a_library_that_is_missing_is_said_without_a_traceback(monkeypatch, capsys):
    from robustft.pipeline import quickstart

    def missing(**_):
        raise ImportError("matplotlib is not installed: pip install matplotlib")

    monkeypatch.setattr(quickstart, "quickstart", missing)
    assert cli.main(["quickstart"]) == 1
    assert "robustft quickstart: matplotlib is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["quickstart", "--precision", "fp8"], ["bench", "--nonsense"]])
def test_wrong_usage_ends_with_2(arguments, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2 and "usage: robustft" in capsys.readouterr().err
