"""The pages of the site that are made and not kept.

benchmarks/results/*.json  ->  measured/*.md, *.html    the numbers
nav of mkdocs.yml          ->  api/<module>.md          the docstrings, which mkdocstrings puts in
the root                   ->  contributing.md, changelog.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from robustft.pipeline.recipes import WORLDS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls it: adds what is made to the files of docs/."""
    from mkdocs.structure.files import File

    if str(ROOT) not in sys.path:  # for `benchmarks`; mkdocs takes back what the module itself adds
        sys.path.append(str(ROOT))  # last, so that an installed robustft comes before its source
    made: dict[str, str | bytes] = {path: make() for path, make in PAGES.items()}
    made |= {path: api_page(path) for path in paths(config.nav) if path.startswith("api/")}
    made |= {f"measured/{plot.name}": plot.read_bytes() for plot in RESULTS.glob("*.png")}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls it: a line that links to a table of results becomes the table; the list of scores is put in."""
    from robustft.detection import table

    markdown = markdown.replace("<!-- output: robustft.detection.table() -->", f"```\n{table()}\n```")
    link = r"^\[[^]]*\]\(\.\./benchmarks/results/(\w+\.md)\)$"
    return re.sub(link, lambda found: (RESULTS / found[1]).read_text(), markdown, flags=re.MULTILINE)


def paths(nav: Any) -> list[str]:
    """All pages of a navigation, which is a page, a list, or titles with what stands under them."""
    match nav:
        case str():
            return [nav]
        case dict():
            return [path for part in nav.values() for path in paths(part)]
        case _:
            return [path for part in nav for path in paths(part)]


def api_page(path: str) -> str:
    return f"::: robustft.{Path(path).stem}\n"


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def study_results(world: str) -> Any:
    return results(f"study_{world}")


@cache
def answers(world: str) -> tuple[Any, str, str, Any]:
    """What a committed study measured, its command, its machine and its benchmark."""
    from robustft.pipeline.study import section_of
    from robustft.pipeline.study.findings import Measured
    from robustft.pipeline.study.page import Answer
    from robustft.pipeline.worlds import benchmark

    held = study_results(world)
    found = [
        Answer(section_of(name, world), [Measured(**seed) for seed in section["seeds"]])
        for name, section in held["sections"].items()
    ]
    return found, held["command"], held["machine"], benchmark(world)


def study_path(world: str) -> str:
    """Of the page of its tables, without its ending."""
    return f"measured/study-{world}"


def study_tables(world: str) -> str:
    from robustft.pipeline.study.page import markdown

    title, rest = markdown(*answers(world)).split("\n", 1)
    pictures = f"{Path(study_path(world)).name}-pictures.html"
    return f"{title} of {world}: every table\n\n[Findings](../study.md) · [the same with pictures]({pictures})\n{rest}"


def study_page(world: str) -> str:
    from robustft.pipeline.study.page import page

    return page(*answers(world))[0]


def speed() -> str:
    """A chapter a machine that `python -m benchmarks` has been run on."""
    from benchmarks import show

    chapters = []
    for path in sorted(RESULTS.glob("*-cores.json")):
        held = results(path.stem)
        plots = {plot.stem.removeprefix(f"{path.stem}-"): plot.name for plot in RESULTS.glob(f"{path.stem}-*.png")}
        chapters.append(show.markdown(held["machine"], held["records"], False, plots))
    return "\n".join([*chapters, (RESULTS / "gpu.md").read_text()])


def steps() -> str:
    from benchmarks import step

    held = results("step")
    lines = (
        "# Whole training steps",
        "",
        "From the images to the updated weights, beside the loop that released code has: open_clip's towers on all",
        "positions of each image's caption, the eager loss, AdamW as torch makes it by default, and for CaRot a second",
        "full pass of images and texts through the teacher. The same weights and batches, in turn; their losses agree.",
        "Seconds are robustft's, and so are the parts: its towers' forward, the backward of all, the optimizer.",
        "",
        step.table(held),
        f"`{held['command']}`",
        "",
        "## AdamW beside torch's",
        "",
        "The same method and batches, once with `robustft.training.AdamW` and once with torch's, fused.",
        "",
        step.adamw_table(results("adamw")),
        f"`{results('adamw')['command']}`",
    )
    return "\n".join(lines)


def memory() -> str:
    from benchmarks.memory import table

    lines = (
        "# Memory of the contrastive losses",
        "",
        "Peak memory beyond the inputs, forward and backward, float32, D = 512, on a CPU. `memory` is what a loss may",
        "keep between forward and backward, 512 MiB by default. [What that means](../losses.md#memory).",
        "",
        table(results("memory")),
        "Measured by `python -m benchmarks.memory`, each row in a process of its own.",
    )
    return "\n".join(lines)


def kernels() -> str:
    from benchmarks import cuda_resources, triton_resources

    cuda, triton = results("cuda_resources")["results"], results("triton_resources")
    lines = (
        "# GPU kernels, as their compilers see them",
        "",
        "Registers, spills and shared memory of every kernel, as compiled without a GPU. Instructions are those that a",
        "warp of a Triton kernel issues once around its longest loop, or once through, where it has none.",
        "",
        f"## CUDA C++, nvcc {cuda['nvcc']}",
        "",
        "`python -m benchmarks.cuda_resources`",
        "",
        cuda_resources.table([cuda_resources.Kernel(**kernel) for kernel in cuda["kernels"]]),
        f"## Triton {' and '.join(triton['triton'])}",
        "",
        "`python -m benchmarks.triton_resources`",
        "",
        triton_resources.table(triton),
    )
    return "\n".join(lines)


def emulated() -> str:
    from benchmarks import emulate

    held = results("emulated")
    lines = (
        "# CPU kernels under emulators",
        "",
        "What the kernels of each instruction set compute beside the portable ones, as the largest difference of each",
        "kernel in roundings of its type. Integers, NaN and infinities are equal. The aarch64 kernels ran under QEMU,",
        "the AVX-512 ones under Bochs: no such processor was at hand.",
        "",
        emulate.table(held["results"]),
        f"`{held['command']}`",
    )
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {
    "measured/speed.md": speed,
    "measured/steps.md": steps,
    "measured/memory.md": memory,
    "measured/kernels.md": kernels,
    "measured/emulated.md": emulated,
    **{f"{study_path(world)}.md": partial(study_tables, world) for world in WORLDS},
    **{f"{study_path(world)}-pictures.html": partial(study_page, world) for world in WORLDS},
    "contributing.md": (ROOT / "CONTRIBUTING.md").read_text,
    "changelog.md": (ROOT / "CHANGELOG.md").read_text,
}
"""Path and maker of each page, but those of the API."""
