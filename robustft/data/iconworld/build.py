"""Builds the bundled file of drawings from pinned packages, byte for byte, and the notice of who drew them.

    python -m robustft.data.iconworld.build --packages FOLDER [--download] [--output assets/]

Nothing is downloaded without --download. Of the studios, drawings are taken that some set of IconWorld shows:

    kinds       every concept of a class that both ID studios draw, by both; of test concepts every studio's drawing
    held out    concepts of held-out kinds, by both ID studios
    concepts    `CONCEPTS` concepts that all studios of that task draw
    far         interface symbols, letters, flags

The file is XZ of: the length of a JSON text in 8 bytes, that text, palettes (N, 32, 3), pixels (N, 40, 40), uint8.
"""

from __future__ import annotations

import json
import lzma
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robustft.data.iconworld import packages
from robustft.data.iconworld.corpus import plain
from robustft.data.iconworld.emoji import Emoji, Names, read_names, read_set
from robustft.data.iconworld.packages import BUNDLED_LICENCES, EMOJIBASE, OTHERS, STUDIOS, Source
from robustft.data.iconworld.rendering import on_white, rendered, svg
from robustft.data.iconworld.taxonomy import HELD_OUT, KINDS, SUBGROUPS, place
from robustft.data.iconworld.world import ASSETS, COLOURS, CONCEPT_STUDIOS, DRAWINGS, FAR, ID_STUDIOS, NOTICE, SIZE
from robustft.files import write_file, write_text

CONCEPTS = 400
SHARES = {"test": 0.35, "validation": 0.1}  # of a kind's concepts; the rest is for training
FAR_DRAWINGS = 200  # of each far OOD set
COLOUR = "pink|orange|yellow|green|blue|light blue|purple|brown|black|grey|white"
REPEATED = re.compile(f"o’clock$|-thirty$|^({COLOUR}) (heart|book)$")
"""Drawings that are another one but for the hour or the colour: on both sides of a split they would be copies."""
SYMBOL = re.compile("(align|arrows?|border|box|brackets|caret|chevron|columns?|corner|layers|layout|list|row|text)-")
LETTER = re.compile("alpha-[a-z](-box|-circle)?(-outline)?$")
FLAG = re.compile("[a-z]{2}$")


class Drawing(NamedTuple):
    """A drawing to be bundled: its set, the name in that set, the emoji's code ("" where it shows none)."""

    source: str
    name: str
    code: str


def concepts_of(names: Names, drawn: Mapping[str, Mapping[str, str]]) -> list[Emoji]:
    """All emoji that both ID studios draw and that have a class or a held-out kind, in the order of their codes."""
    groups = {group for kinds in (KINDS, HELD_OUT) for subgroups in kinds.values() for group in subgroups}
    found = [
        emoji
        for code, emoji in sorted(names.emoji.items())
        if "200D" not in code and emoji.subgroup in groups and all(code in drawn[studio] for studio in ID_STUDIOS)
    ]
    return [emoji for emoji in found if not REPEATED.search(emoji.label)]


def splits_of(concepts: Sequence[Emoji]) -> dict[str, str]:
    """{code: train, validation or test} of the concepts of classes, each class in proportion."""
    by_kind = defaultdict(list)
    for emoji in concepts:
        if SUBGROUPS[emoji.subgroup] in KINDS:
            by_kind[SUBGROUPS[emoji.subgroup]].append((place("split", emoji.code), emoji.code))
    splits = {}
    for ranked in by_kind.values():
        test, validation = (max(1, round(len(ranked) * share)) for share in SHARES.values())
        for rank, (_, code) in enumerate(sorted(ranked)):
            splits[code] = "test" if rank < test else "validation" if rank < test + validation else "train"
    return splits


def chosen(folder: Path) -> tuple[list[Drawing], dict[str, Any]]:
    """What is bundled, and what the file tells of it: concepts with code, kind and split, and those of `CONCEPTS`."""
    names = read_names(folder)
    drawn = {studio: names.drawn(*read_set(folder, source)) for studio, source in STUDIOS.items()}
    concepts = concepts_of(names, drawn)
    splits = splits_of(concepts)
    common = [e.code for e in concepts if all(e.code in drawn[studio] for studio in CONCEPT_STUDIOS)]
    classes = sorted(sorted(common, key=lambda code: place("concepts", code))[:CONCEPTS])
    drawings = []
    for studio in STUDIOS:
        for emoji in concepts:
            wanted = studio in ID_STUDIOS or splits.get(emoji.code) == "test"
            wanted |= studio in CONCEPT_STUDIOS and emoji.code in classes
            if wanted and emoji.code in drawn[studio]:
                drawings.append(Drawing(studio, drawn[studio][emoji.code], emoji.code))
    for source, pattern in zip(FAR.values(), (SYMBOL, LETTER, FLAG), strict=True):
        icons, _ = packages.read(folder, OTHERS[source].package, "icons.json", "info.json")
        found = [name for name, icon in icons["icons"].items() if pattern.match(name) and not icon.get("hidden")]
        found = sorted(sorted(found, key=lambda name: place(source, name))[:FAR_DRAWINGS])
        drawings += [Drawing(source, name, "") for name in found]
    told = {
        emoji.code: [plain(emoji.label), SUBGROUPS[emoji.subgroup], splits.get(emoji.code, "")] for emoji in concepts
    }
    return drawings, {"concepts": told, "classes": classes}


def quantized(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A palette (32, 3) and indices (S, S) into it that stand for an RGB image (S, S, 3)."""
    from PIL import Image

    reduced = Image.fromarray(image).quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette = np.zeros(3 * COLOURS, np.uint8)
    values = (reduced.getpalette() or [])[: 3 * COLOURS]
    palette[: len(values)] = values
    return palette.reshape(COLOURS, 3), np.asarray(reduced, np.uint8)


def pixels_of(folder: Path, drawings: Sequence[Drawing]) -> tuple[np.ndarray, np.ndarray]:
    """Palettes (N, 32, 3) and indices (N, 40, 40) of drawings."""
    palettes, pixels = [], []
    opened: dict[str, Any] = {}
    for drawing in drawings:
        if drawing.source not in opened:
            (icons,) = packages.read(folder, (STUDIOS | OTHERS)[drawing.source].package, "icons.json")
            opened = {drawing.source: icons}  # one at a time: that of the 3D studio has 100 MB
        text = svg(opened[drawing.source], drawing.name, SIZE)
        palette, indices = quantized(on_white(rendered(text, SIZE)))
        palettes.append(palette)
        pixels.append(indices)
    return np.stack(palettes), np.stack(pixels)


def packed(drawings: Sequence[Drawing], about: Mapping[str, Any], palettes: np.ndarray, pixels: np.ndarray) -> bytes:
    """The bundled file's bytes."""
    text = json.dumps({**about, "drawings": drawings}, separators=(",", ":")).encode()
    content = b"".join((len(text).to_bytes(8, "little"), text, palettes.tobytes(), pixels.tobytes()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(content, lzma.FORMAT_XZ, lzma.CHECK_SHA256, filters=filters)


def build(folder: Path, output: Path = ASSETS) -> Path:
    """Writes the bundled file and the notice into `output` from the packages in `folder`; returns the file's path."""
    for source in (STUDIOS | OTHERS).values():
        (about,) = packages.read(folder, source.package, "info.json")
        if about["license"]["spdx"] != source.licence or source.licence not in BUNDLED_LICENCES:
            raise ValueError(
                f"{source.package.name} {source.package.version}: its licence is {about['license']['spdx']}; "
                f"expected {source.licence}, one of {', '.join(BUNDLED_LICENCES)}"
            )
    drawings, about = chosen(folder)
    write_file(output / DRAWINGS, packed(drawings, about, *pixels_of(folder, drawings)))
    write_text(output / NOTICE, notice())
    return output / DRAWINGS


def notice() -> str:
    """Who drew what is bundled, under which licence, and what was changed."""

    def row(source: Source) -> str:
        package = source.package
        return (
            f"| {source.title} | {source.author} | {source.licence} | {source.url} | {package.name} {package.version} |"
        )

    return NOTICE_TEXT.format(
        rows="\n".join(map(row, (STUDIOS | OTHERS).values())),
        names=f"{EMOJIBASE.name} {EMOJIBASE.version}",
        mit="; ".join(
            dict.fromkeys(source.author for source in (STUDIOS | OTHERS).values() if source.licence == "MIT")
        ),
        size=SIZE,
        colours=COLOURS,
    )


NOTICE_TEXT = """\
# Drawings bundled with robustft

`iconworld_drawings.xz` holds drawings by these studios. They were changed: rendered at {size} x {size} pixels over
white, with at most {colours} colours each. Nobody named here endorses this package.

| drawings | author | licence | from | package |
|---|---|---|---|---|
{rows}

Names, keywords and groups of emoji are Unicode's, by way of {names} (MIT, Copyright (c) Miles Johnson; data under the
Unicode License V3, Copyright (c) Unicode, Inc.).

* Apache-2.0: the licence's text lies beside this file, `iconworld_apache_2.0.txt`.
* CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/
* MIT: Copyright (c) {mit}

> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
> documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
> rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
> persons to whom the Software is furnished to do so, subject to the following conditions:
>
> The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
> Software.
>
> THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
> WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
> COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
> OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = packages.parser(
        "python -m robustft.data.iconworld.build",
        "Build IconWorld's bundled drawings and their notice from npm packages.",
    )
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder to write into (%(default)s)")
    options = parser.parse_args(arguments)
    if options.download:
        packages.download(options.packages, packages.bundled_packages())
    path = build(options.packages, options.output)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
