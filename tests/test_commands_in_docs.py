"""The commands that README and the pages show: all are understood, and those of the how-tos run in their order."""

from __future__ import annotations

import csv
import json
import re
import shlex
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from robustft import cli, clip
from robustft.data import glyphworld, stress
from robustft.evaluation import report
from robustft.pipeline import flags, recipes, train

ROOT = Path(__file__).parent.parent
SHOWN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [ROOT / "docs" / name for name in ("how_to.md", "coming_from.md")]


def commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [part.strip() for line in lines for part in re.split(r"&&|\|", line.partition(" #")[0])]
    return [shlex.split(part)[1:] for part in found if part.startswith("robustft ")]


@pytest.mark.parametrize("page", [page for page in SHOWN if commands(page)], ids=lambda page: page.stem)
def test_commands_are_understood(page):
    for command in commands(page):
        if command[0] == "bench":
            continue
        given = [word for word in command if word != "MODEL"]
        options = vars(cli.parser().parse_args(given))  # exits where it does not know a flag
        if options.pop("command") == "train" and options.get("methods"):
            assert all(":" in name or recipes.recipe_named(name) for name in flags.given(options)["methods"])


def saved(root: Path, part: str, count: int) -> list[tuple[Path, str, int]]:
    """Digits below class folders: file, class, label."""
    digits, found = glyphworld.digits(part), []
    for number in range(count):
        image, label = digits[number]
        name = digits.classes[label].replace(" ", "_")
        file = root / name / f"{part}{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        found.append((file, name, label))
    return found


def table(path: Path, header: str, rows: list[tuple[object, ...]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(), *rows])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """All that the commands name, of some digits."""
    monkeypatch.chdir(tmp_path)
    bundle = glyphworld.load_clip()
    clip.export(bundle.model, "clip", bundle.config, tokenizer=bundle.tokenizer)
    trained, tested = saved(Path("photos/train"), "train", 60), saved(Path("photos/test"), "test", 20)
    everything = [(*row, "train") for row in trained] + [(*row, "test") for row in tested]
    table(
        Path("images.csv"),
        "file species part",
        [(file.relative_to("photos"), name, part) for file, name, _, part in everything],
    )
    places = [(file, name, ("land", "water")[row % 2], part) for row, (file, name, _, part) in enumerate(everything)]
    table(Path("photos.csv"), "file_name label place split", places)
    titles = [(file, f"a {name} there", name) for file, name, _ in trained]
    table(Path("train.csv"), "filepath title label", titles)
    wild = [
        (Path("..", "..", file), label, row % 3, part if part == "train" else ("id_val", "id_test", "test")[row % 3])
        for row, (file, _, label, part) in enumerate(everything)
    ]
    Path("iwildcam/train").mkdir(parents=True)
    table(Path("iwildcam/metadata.csv"), "filename y location_remapped split", wild)
    parts = {"train": trained, "val": [], "test": tested}
    Path("split_zhou_photos.json").write_text(
        json.dumps(
            {
                part: [(str(file.relative_to("photos")), label, name) for file, name, label in rows]
                for part, rows in parts.items()
            }
        )
    )
    Path("shards").mkdir()
    for number in range(2):
        with tarfile.open(f"shards/00{number}.tar", "w") as shard:
            for row, (file, _, label) in enumerate(trained[number::2]):
                Path("label").write_text(str(label))
                shard.add(file, f"{row}.png")
                shard.add("label", f"{row}.cls")
    by_label = {label: name for _, name, label in trained}
    Path("names.txt").write_text("".join(f"{by_label[label]}\n" for label in sorted(by_label)))
    synsets = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k").label_names()
    for place, synset in enumerate(synsets):
        for root in ("imagenet/val", "imagenet-r")[: 2 if place < 20 else 1]:
            Path(root, synset).mkdir(parents=True)
            Image.new("RGB", (8, 8), (place % 256, 0, 0)).save(Path(root, synset, "0.png"))
    Path("letters").mkdir()
    letters = glyphworld.ood("letters")
    for number in range(10):
        letters[number][0].save(f"letters/{number}.png")
    return tmp_path


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_commands_run_as_shown(page, folder, monkeypatch, capsys):
    # Drawing, and all kinds of corruption, take longer than all the rest.
    monkeypatch.setattr(report, "render", lambda drawing: (b"\x89PNG", "<svg></svg>"))
    monkeypatch.setattr("robustft.pipeline.job.stress", lambda images: stress(images, names=["noise", "blur"]))
    short = replace(recipes.OWN["CoOp"], options={"context": 4})  # of a model that reads 20 tokens
    monkeypatch.setitem(recipes.OWN, "CoOp", short)
    whole = train.train
    monkeypatch.setattr(cli, "train_function", lambda *a, **how: whole(*a, **how | {"epochs": 1, "limit_batches": 1}))
    monkeypatch.setattr(
        flags,
        "options_of",
        lambda function, own=flags.options_of: own(whole if function is cli.train_function else function),
    )
    for command in commands(page):
        given = [word for word in command if word != "MODEL"]
        if "MODEL" in command:
            given += ["--model", "local-dir:clip"]
        assert cli.main(given) == 0, (command, capsys.readouterr().err)
