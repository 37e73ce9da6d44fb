"""README and every page of docs/ do what they show: their runnable blocks run, in order, as one program. The site's own
pages are made from what is committed, and every link leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

# A page on few images, for few epochs, in names that it does not see. Else the exhaustive tests run pages as shown;
FEW = """
import robustft
from robustft.data import glyphworld

def some(make):
    return lambda name, **how: make(name, **how).subset(range({each}))

glyphworld.SPLITS = {{
    "train": slice(0, {train}), "validation": slice(1000, 1000 + {validation}), "test": slice(1297, 1297 + {each})
}}
glyphworld.ood = some(glyphworld.ood)
glyphworld.shift = some(glyphworld.shift)

fit = robustft.fit
robustft.fit = lambda *given, epochs, **how: fit(*given, epochs=min({epochs}, (epochs + 1) // 2), **how)
"""
# the plain run takes a few pages, fewer images yet, one epoch or nine steps, and empty pictures.
SMALL = """
from matplotlib.figure import Figure
from robustft.evaluation import curves, pictures

for module, name in (
    *((pictures, name) for name in ("frontier", "reliability", "scores", "samples")),
    *((curves, name) for name in ("training", "risk")),
):
    setattr(module, name, lambda *_, **how: Figure(figsize=(1, 1)))
"""
ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def program(page: Path, whole: bool = False) -> str:
    """What a page shows, in the whole with what takes long, as imports of other frameworks do."""
    marker = "<!-- runnable(?:, slow)? -->" if whole else "<!-- runnable -->"
    blocks = re.findall(marker + r"\n```python\n(.*?)```", page.read_text(), re.DOTALL)
    return "\n".join(blocks)


def site() -> ModuleType:
    """What makes the site's own pages."""
    spec = spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    hooks = module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def site_pages() -> dict[str, Callable[[], str]]:
    """Path and maker of the pages that the site's build makes."""
    pages: dict[str, Callable[[], str]] = site().PAGES
    return pages


SHOWN = {page.stem: page for page in (*PAGES, *FRONT) if program(page)}
FIRST = ("README", "own_data", "ood_detection")  # what a newcomer opens


@pytest.mark.parametrize(
    ("page", "small"),
    [
        *(pytest.param(SHOWN[name], True, id=f"{name}-small") for name in FIRST),
        *(pytest.param(page, False, id=f"{name}-whole", marks=pytest.mark.exhaustive) for name, page in SHOWN.items()),
    ],
)
def test_a_page_runs_as_shown(small, page, tmp_path, python):
    code = "import warnings; warnings.filterwarnings('error', '', DeprecationWarning, 'robustft')\n"
    if small:
        shown = re.sub(r"\brange\(\d{3}\)", "range(9)", program(page))
        shown = re.sub(r"\brange\(\d{3} if .* else \d+\)", "range(30)", shown)
        code += f"exec({FEW.format(train=140, validation=60, each=30, epochs=1) + SMALL!r}, {{}})\n{shown}"
    elif page.stem == "README":  # with every image
        code += program(page, whole=True)
    else:
        code += f"exec({FEW.format(train=200, validation=100, each=60, epochs=4)!r}, {{}})\n{program(page, whole=True)}"
    run = python.run("-c", code, folder=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    if page.stem == "README":
        assert re.search(r"accuracy 0\.\d+, ECE 0\.\d+ \(noise floor 0\.\d+\)", run.stdout)


@pytest.mark.parametrize("page", [*PAGES, *FRONT], ids=lambda page: page.stem)
def test_links_within_the_repository_lead_somewhere(page):
    made = {ROOT / "docs" / path for path in site_pages()}
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists() or page.parent / target in made, target


def test_every_page_stands_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.name for page in PAGES] + [path for path in site_pages() if path.endswith(".md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


@pytest.mark.parametrize("path", site_pages())
def test_a_made_page_holds_what_was_measured(path):
    row = {
        "measured/speed.md": "| N=512 float32 highest | 2 | robustft |",
        "measured/steps.md": "| FLYP ViT-B-32 batch 8, distinct captions | 1.80x | 1.35x |",
        "measured/memory.md": "| 2,048 | 26 MB | 10 MB | 94 MB |",
        "measured/kernels.md": "| `cvar_backward_kernel<double>` | sm_80 | 38 | 0 | 256 |",
        "measured/emulated.md": "| collect f32 | 0.0 | 0.0 | 0.0 |",
        "measured/study-digits.md": "| CaRot is more accurate under shift than FLYP | appears | 8.5 \u00b1 4.6 ",
        "measured/study-digits-pictures.html": "<td>8.5 \u00b1 4.6 points</td>",
        "measured/study-icons.md": "| CaRot is more accurate under shift than LP-FT | appears | 13.3 \u00b1 0.3 ",
        "measured/study-icons-pictures.html": "<td>13.3 \u00b1 0.3 points</td>",
    }
    assert row.get(path, "\n# ") in "\n" + site_pages()[path]()


def test_readme_fits_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
