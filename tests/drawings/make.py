"""Writes drawings.zip: the same things, drawn by two studios, as somebody would have them in a folder.

    npm i @iconify-json/noto @iconify-json/fluent-emoji-flat emojibase-data      in some folder
    pip install resvg-py pillow
    python tests/drawings/make.py FOLDER

    <kind>/<name>.png              by Google (Noto Emoji, Apache License 2.0): to train and test on
    shifts/fluent/<kind>/<name>.png    by Microsoft (Fluent Emoji, MIT License): the same classes under a shift

Kinds are Unicode's subgroups. The drawings are rendered at 32 pixels on white and are not changed otherwise.
"""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

KINDS = ("animal-mammal", "food-prepared", "transport-ground", "clothing")
EACH = 34
SIDE = 32
STUDIOS = {"noto": "", "fluent-emoji-flat": "shifts/fluent/"}


def picture(icons: dict[str, Any], name: str) -> bytes:
    """A drawing as a PNG of few colours."""
    import resvg_py
    from PIL import Image

    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {space} viewBox="0 0 {width} {height}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))
    page = Image.new("RGBA", drawn.size, "white")
    page.alpha_composite(drawn.convert("RGBA"))
    out = io.BytesIO()
    page.convert("RGB").quantize(32).save(out, "PNG", optimize=True)
    return out.getvalue()


def main(folder: Path) -> None:
    modules = folder / "node_modules"
    sets = {name: json.loads((modules / "@iconify-json" / name / "icons.json").read_text()) for name in STUDIOS}
    names = json.loads((modules / "@iconify-json" / "noto" / "chars.json").read_text())
    groups = json.loads((modules / "emojibase-data" / "meta" / "groups.json").read_text())["subgroups"]
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for emoji in json.loads((modules / "emojibase-data" / "en" / "data.json").read_text()):
        kind = groups.get(str(emoji.get("subgroup")))
        name = names.get(re.sub("-fe0f", "", emoji["hexcode"].lower()))
        if kind in kinds and name and all(name in found["icons"] for found in sets.values()):
            kinds[kind].append(name)
    path = Path(__file__).parent / "drawings.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for studio, place in STUDIOS.items():
            for kind, found in kinds.items():
                for name in sorted(found)[:EACH]:
                    entry = zipfile.ZipInfo(f"{place or 'noto/'}{kind.replace('-', '_')}/{name}.png")
                    archive.writestr(entry, picture(sets[studio], name))
    print(path, path.stat().st_size, {kind: len(found) for kind, found in kinds.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
