"""Every method of robustft on every architecture of open_clip: works, or refuses and says why.

    python -m benchmarks.architectures                   # tries all, small; writes results/architectures.json
    python -m benchmarks.architectures --methods CARFT   # tries some, and keeps what the file says of the others
    python -m benchmarks.architectures --table           # writes that file as a page, docs/architectures.md

Architectures of one structure (`small_architectures.structure`) differ in numbers alone: the methods are tried on the
first of each. To work is to be made, to take steps whose gradients reach all that is trained, to give a classifier
that comes back from its export, to be mixed with the zero-shot one (WiSE-FT), and to be asked for OOD scores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import small_architectures
from robustft import clip, methods
from robustft.clip.loading import build
from robustft.detection import Detector
from robustft.files import write_json, write_text
from robustft.methods import Method, load_predictor
from robustft.predictors.base import Classifier, Predictor

RESULTS = Path(__file__).parent / "results" / "architectures.json"
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
WORKS = "works"
REFUSED = "A number is that of the reason below, for which the method refuses the model when it is made."
OPTIONS: dict[str, dict[str, Any]] = {
    "CaRot": {"ema_interval": 2},
    **{name: {"context": 3} for name in ("CoOp", "KgCoOp", "CoCoOp", "MaPLe")},
    "DRM": {"descriptions": {"ant": "six legs", "bee": ["striped", "flies"], "cow": "horns"}},
    "LipsumFT": {"texts": 5, "length": 4},
    "LoCoOp": {"context": 3, "top_k": 2},
    "ProDA": {"context": 3, "prompts": 4, "prompt_batch": 2},
    "StarFT": {"spurious": ("{} at sea", "{} in snow")},
    "WorstCaseFineTune": {"risk": methods.CVaR(0.5)},
}


class Small(NamedTuple):
    """A small architecture, with six images of three classes."""

    model: nn.Module
    config: dict[str, Any]
    data: dict[str, Tensor]
    prompts: dict[str, Any]


def small(name: str, folder: Path) -> Small:
    """An architecture of open_clip's, small, with random weights that are the same each time."""
    config = small_architectures.shrunk(name, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, config = build(config)
        side = config["preprocess_cfg"]["size"]
        images = torch.randn(6, 3, *(side if isinstance(side, list) else (side, side)))
    names, templates = ("ant", "bee", "cow"), ("a {}", "the {}")
    prompts = {"tokenizer": small_architectures.letters(config), "class_names": names, "templates": templates}
    return Small(model, config, {"image": images, "label": torch.arange(6) % 3}, prompts)


def made(name: str, world: Small) -> Method:
    """A method; ValueError, in which it says why, where it refuses the model."""
    options, data = dict(OPTIONS.get(name, {})), (world.data["image"], world.data["label"])
    match name:
        case "LPFT":
            options["probe"] = methods.LinearProbe(world.model, **world.prompts).classifier()
        case "TipAdapterF":
            options["train"] = data
    method: Any = getattr(methods, name)(world.model, total_steps=4, **options, **world.prompts)
    return method.prepare(data) if name == "DRM" else method


def stepped(method: Method, data: Mapping[str, Tensor], steps: int = 1) -> None:
    """A method after some steps; AssertionError for a loss or a gradient that is not what it should be."""
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = method.step(dict(data)).loss
        loss.backward()
        idle = [name for name, p in trained.items() if p.grad is None]
        assert loss.isfinite() and not idle, f"loss {loss}, no gradient for {idle[:5]}"
        optimizer.step()
        method.after_step()


@torch.no_grad()
def comes_back(predictor: Predictor, world: Small, folder: Path) -> None:
    """AssertionError unless a predictor is itself again after its export."""
    loaded = load_predictor(predictor.save(folder / "export", world.config))
    expected, found = (p.probabilities(world.data["image"]) for p in (predictor, loaded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def scored(predictor: Predictor, images: Tensor, name: str) -> None:
    """AssertionError unless a detector of this score tells of every image."""
    scores = Detector(name, tpr=0.5).fit(predictor, images).scores(predictor, images)
    assert scores.shape == (len(images),) and bool(scores.isfinite().all()), scores


@torch.no_grad()
def mixed(predictor: Classifier, world: Small) -> None:
    """AssertionError unless a classifier and the zero-shot one are mixed by their weights."""
    zero_shot = methods.zero_shot_classifier(world.model, **world.prompts)
    ends = [c.logits(world.data["image"]) for c in (zero_shot, predictor)]
    between = methods.WiSEFT(zero_shot, predictor)
    for alpha, expected in enumerate(ends):
        torch.testing.assert_close(between.at(float(alpha)).logits(world.data["image"]), expected, rtol=1e-4, atol=1e-4)
    assert bool(between.at(0.5).logits(world.data["image"]).isfinite().all())


def outcomes(world: Small, names: list[str], folder: Path) -> dict[str, str]:
    """Of each method: that it works, or why it refuses the model."""
    found, kinds = {}, set()
    for name in names:
        try:
            method = made(name, world)
        except ValueError as error:
            found[name] = str(error)
            continue
        stepped(method, world.data, steps=2 if name == "CaRot" else 1)  # its teacher teaches from the second on
        predictor = method.classifier()
        if type(predictor) not in kinds:
            kinds.add(type(predictor))
            comes_back(predictor, world, folder / name)
            scored(predictor, world.data["image"], "mcm")
            if isinstance(predictor, Classifier):
                mixed(predictor, world)
                if WORKS == found.get("LoCoOp", WORKS):  # the first, which needs patches as well
                    scored(predictor, world.data["image"], "gl_mcm")
        found[name] = WORKS
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Without CaRot's warnings of what is known here, such as a penalty that a tower has no map for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CaRot")
        yield


def survey() -> list[dict[str, Any]]:
    """Each structure: its architectures, its towers, and the outcome of each method."""
    groups: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place, quiet():
        folder = Path(place)
        for name in small_architectures.names():
            world = small(name, folder)
            key = small_architectures.structure(world.model)
            if key not in groups:
                towers = small_architectures.towers(world.model)
                found = outcomes(world, sorted(methods.every_method(), key="LoCoOp".__ne__), folder / name)
                groups[key] = {"architectures": [], **towers, "methods": dict(sorted(found.items()))}
            groups[key]["architectures"].append(name)
    return list(groups.values())


def with_methods(held: Mapping[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The structures of a survey, of which some methods are tried again, or for the first time."""
    with tempfile.TemporaryDirectory() as place, quiet():
        folder = Path(place)
        groups = []
        for group in held["structures"]:
            name = group["architectures"][0]
            tried = sorted({*names, "LoCoOp"}, key="LoCoOp".__ne__)  # which says whether there are patches to score
            found = group["methods"] | outcomes(small(name, folder), tried, folder / name)
            groups.append({**group, "methods": {name: found[name] for name in methods.every_method()}})
    return groups


def page(held: Mapping[str, Any]) -> str:
    """docs/architectures.md: a row for each structure, a column for each method, and the reasons of refusals."""
    groups = held["structures"]
    names = list(groups[0]["methods"])
    reasons = list(dict.fromkeys(r for group in groups for r in group["methods"].values() if r != WORKS))
    count = sum(len(group["architectures"]) for group in groups)
    lines = [
        "# Architectures and methods",
        "",
        f"All {count} architectures of open_clip {held['open_clip']}, small: each built from its own configuration,",
        "with few layers and narrow ones. Those of a row are built alike.",
        "A + works: steps, export, WiSE-FT and OOD scores.",
        REFUSED,
        "",
        "Measured by `python -m benchmarks.architectures`. [What this means](models.md).",
        "",
        f"| architectures | image tower | text tower | {' | '.join(names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for group in groups:
        cells = ["+" if r == WORKS else f"({reasons.index(r) + 1})" for r in group["methods"].values()]
        listed = ", ".join(f"`{name}`" for name in group["architectures"])
        lines.append(f"| {listed} | {group['image']} | {group['text']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", action="store_true", help="write the page of the last survey")
    parser.add_argument("--methods", nargs="+", choices=[*methods.every_method()], help="those to try; all by default")
    asked = parser.parse_args()
    if asked.table:
        write_text(PAGE, page(json.loads(RESULTS.read_text())))
        return
    version = clip.import_open_clip().__version__
    if not asked.methods:
        write_json(RESULTS, {"open_clip": version, "structures": survey()})
        return
    held = json.loads(RESULTS.read_text())
    if held["open_clip"] != version:
        parser.error(f"--methods adds to a survey of open_clip {held['open_clip']}, and this is {version}: try all")
    write_json(RESULTS, {**held, "structures": with_methods(held, asked.methods)})


if __name__ == "__main__":
    main()
