"""Which drawing of which studio shows which emoji: by code point where a set tells them, else by name.

Emoji are named by their code points in hexadecimal, without variation selectors: "1F985". Skin tones are no emoji of
their own here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from robustft.data.iconworld import packages
from robustft.data.iconworld.packages import STUDIOS, Source

SHORTCODES = ("cldr-native", "cldr", "emojibase-legacy", "emojibase", "github", "iamcal", "joypixels")
NAMING = ("noto", "twemoji", "fluent-emoji-flat")
"""Studios whose own names of code points help to understand the names of others."""
AMBIGUOUS = ("bow", "couple", "japan")
"""Names of drawings that show something else than the emoji that a shortcode so calls, in one of the sets."""


class Emoji(NamedTuple):
    """What Unicode says of an emoji: its name, its keywords, its subgroup ("animal-bird")."""

    code: str
    label: str
    tags: tuple[str, ...]
    subgroup: str


class Names(NamedTuple):
    """All emoji by code, and the code of each name that some set or shortcode gives them."""

    emoji: dict[str, Emoji]
    codes: dict[str, str]

    def drawn(self, icons: Mapping[str, Any], chars: Mapping[str, str]) -> dict[str, str]:
        """{code: name of the drawing} of a set, given its icons.json and chars.json.

        A set that tells code points is taken at its word. Names are the last resort: a set may call a digit "1", which
        is a shortcode of thumbs up without its sign.
        """
        found: dict[str, str] = {}
        for code, name in chars.items():
            if _code(code) in self.emoji and name in icons["icons"]:
                found.setdefault(_code(code), name)
        if chars:
            return found
        for name in icons["icons"]:
            known = self.codes.get(_key(name))
            if known is not None and name not in AMBIGUOUS and len(_key(name)) > 1:
                found.setdefault(known, name)
        return found


def read_names(folder: Path) -> Names:
    """The names of all emoji, from the packages in `folder`."""
    shortcodes = [f"en/shortcodes/{name}.json" for name in SHORTCODES]
    data, groups, *codes_by_set = packages.read(
        folder, packages.EMOJIBASE, "en/data.json", "meta/groups.json", *shortcodes
    )
    emoji = {}
    for entry in data:
        if "subgroup" in entry:
            code, subgroup = _code(entry["hexcode"]), groups["subgroups"][str(entry["subgroup"])]
            emoji[code] = Emoji(code, entry["label"], tuple(entry.get("tags", ())), subgroup)
    codes: dict[str, str] = {}
    for one in emoji.values():
        codes.setdefault(_key(one.label), one.code)
    for studio in NAMING:
        source = STUDIOS[studio]
        (chars,) = packages.read(folder, source.package, "chars.json")
        for code, name in chars.items():
            if _code(code) in emoji:
                codes.setdefault(_key(name), _code(code))
    for by_code in codes_by_set:
        for code, names in by_code.items():
            if _code(code) in emoji:
                for name in [names] if isinstance(names, str) else names:
                    codes.setdefault(_key(name), _code(code))
    return Names(emoji, codes)


def read_set(folder: Path, source: Source) -> tuple[dict[str, Any], dict[str, str]]:
    """A set's icons.json, and its chars.json."""
    icons, chars = packages.read(folder, source.package, "icons.json", "chars.json")
    return icons, chars


def _code(text: str) -> str:
    return "-".join(part for part in text.upper().split("-") if part != "FE0F")


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]+", "", name.lower())
