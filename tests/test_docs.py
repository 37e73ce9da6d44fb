"""Every page of docs/ does what it shows: its runnable blocks run, in order, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))


def program(page: Path) -> str:
    blocks = re.findall(r"<!-- runnable -->\n```python\n(.*?)```", page.read_text(), re.DOTALL)
    return "\n".join(blocks)


@pytest.mark.parametrize("page", [page for page in PAGES if program(page)], ids=lambda page: page.stem)
def test_a_page_runs_as_shown(page, tmp_path, python):
    warned = "import warnings; warnings.filterwarnings('error', '', DeprecationWarning, 'robustft')\n"
    run = python.run("-c", warned + program(page), folder=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
