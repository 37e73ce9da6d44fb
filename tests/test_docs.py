"""Every page of docs/ does what it shows: its runnable blocks run, in order, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from targets import exhaustive

# Every page in the plain run too, on some of the images and for one epoch; in names that the page does not see.
SMALL = """
import robustft
from robustft.data import glyphworld

def some(make):
    def made(name, **how):
        return make(name, **how).subset(range(400 if name == "train" else 60))

    return made

for name in ("digits", "shift", "ood", "spurious"):
    setattr(glyphworld, name, some(getattr(glyphworld, name)))
fit = robustft.fit
robustft.fit = lambda method, data, **how: fit(method, data, **how | {"epochs": 1})
"""
PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))


def program(page: Path) -> str:
    blocks = re.findall(r"<!-- runnable -->\n```python\n(.*?)```", page.read_text(), re.DOTALL)
    return "\n".join(blocks)


@pytest.mark.parametrize("page", [page for page in PAGES if program(page)], ids=lambda page: page.stem)
@pytest.mark.parametrize("first", [f"exec({SMALL!r}, {{}})\n", *exhaustive("")], ids=["small", "whole"])
def test_a_page_runs_as_shown(first, page, tmp_path, python):
    warned = "import warnings; warnings.filterwarnings('error', '', DeprecationWarning, 'robustft')\n"
    run = python.run("-c", warned + first + program(page), folder=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
