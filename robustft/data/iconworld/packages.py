"""The npm packages that IconWorld is made of: versions, hashes, licences, and how a file in one is read.

A folder holds the tarballs as `npm pack NAME@VERSION` leaves them. `download` fetches them, and only when it is called;
everything else works offline from such a folder.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


class Package(NamedTuple):
    """A version of a package on npm, and the SHA-256 of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The name that `npm pack` gives the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


class Source(NamedTuple):
    """A set of drawings: its package, who drew it, under which licence (SPDX), and where it comes from."""

    package: Package
    title: str
    author: str
    licence: str
    url: str


def _set(name: str, version: str, sha256: str) -> Package:
    return Package(f"@iconify-json/{name}", version, sha256)


SEEN = ("noto-v1", "openmoji", "emojione", "emojione-v1", "emojione-monotone", "fxemoji")
"""Studios of which pre-training sees every emoji. It sees none of the others."""
STUDIOS: dict[str, Source] = {
    "noto": Source(
        _set("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
        "Noto Emoji",
        "Google Inc",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    "twemoji": Source(
        _set("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
        "Twitter Emoji",
        "Twitter",
        "CC-BY-4.0",
        "https://github.com/jdecked/twemoji",
    ),
    "fluent-emoji": Source(
        _set("fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
        "Fluent Emoji",
        "Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "fluent-emoji-flat": Source(
        _set("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
        "Fluent Emoji Flat",
        "Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "fluent-emoji-high-contrast": Source(
        _set("fluent-emoji-high-contrast", "1.2.6", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"),
        "Fluent Emoji High Contrast",
        "Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "emojione": Source(
        _set("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
        "Emoji One (Colored)",
        "Emoji One",
        "CC-BY-4.0",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    "emojione-monotone": Source(
        _set("emojione-monotone", "1.2.1", "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e"),
        "Emoji One (Monotone)",
        "Emoji One",
        "CC-BY-4.0",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    "fxemoji": Source(
        _set("fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
        "Firefox OS Emoji",
        "Mozilla",
        "Apache-2.0",
        "https://github.com/mozilla/fxemoji",
    ),
    "noto-v1": Source(
        _set("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
        "Noto Emoji (v1)",
        "Google Inc",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    "streamline-emojis": Source(
        _set("streamline-emojis", "1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
        "Streamline Emojis",
        "Streamline",
        "CC-BY-4.0",
        "https://github.com/webalys-hq/streamline-vectors",
    ),
}
"""The studios whose emoji are bundled: their licences ask for a notice at most."""

UNBUNDLED: dict[str, Source] = {
    "openmoji": Source(
        _set("openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
        "OpenMoji",
        "OpenMoji",
        "CC-BY-SA-4.0",
        "https://github.com/hfg-gmuend/openmoji",
    ),
    "emojione-v1": Source(
        _set("emojione-v1", "1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
        "Emoji One (v1)",
        "Emoji One",
        "CC-BY-SA-4.0",
        "https://github.com/joypixels/emojione-legacy",
    ),
}
"""Studios of which pre-training sees drawings; none is bundled: their licence asks the same of what holds them."""

OTHERS: dict[str, Source] = {
    "tabler": Source(
        _set("tabler", "1.2.41", "3bf99af156d28d05568aff524a35ed1ba238df640a7835a5e02e1f8e439685f6"),
        "Tabler Icons",
        "Paweł Kuna",
        "MIT",
        "https://github.com/tabler/tabler-icons",
    ),
    "mdi": Source(
        _set("mdi", "1.2.3", "ddd817a7213f91de51147943915c0cda8c8b818a53c92b5c068cfa9883c6d7ac"),
        "Material Design Icons",
        "Pictogrammers",
        "Apache-2.0",
        "https://github.com/Templarian/MaterialDesign",
    ),
    "circle-flags": Source(
        _set("circle-flags", "1.2.11", "ee9a03f6a6fdd79cc6325bdcb7bb93b83d331e60b16e226188f154a64b6bb4a9"),
        "Circle Flags",
        "HatScripts",
        "MIT",
        "https://github.com/HatScripts/circle-flags",
    ),
}
"""Sets that show no emoji: interface symbols, letters, flags."""

BUNDLED_LICENCES = ("MIT", "Apache-2.0", "CC0-1.0", "CC-BY-4.0")
EMOJIBASE = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
"""Unicode's names, keywords and subgroups of all emoji; MIT, the names under Unicode's licence."""
ICONS = Package("@iconify/json", "2.2.535", "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91")
"""All free icon sets at once: the pre-training corpus alone reads it (104 MB)."""


def bundled_packages() -> list[Package]:
    """What the bundled file is made of."""
    return [source.package for source in (STUDIOS | OTHERS).values()] + [EMOJIBASE]


def corpus_packages() -> list[Package]:
    """What the pre-training corpus is made of, beside the bundled file's."""
    return [source.package for source in UNBUNDLED.values()] + [ICONS]


def download(folder: Path, packages: Iterable[Package]) -> None:
    """Fetches the tarballs that `folder` lacks, by npm. OSError when npm fails, ValueError for another content."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not (folder / package.file).exists():
            command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
            try:
                subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError) as error:
                raise OSError(f"{' '.join(command)} failed: {error}") from error
        check(folder, package)


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A command that works on a folder of packages: --packages and --download, which `download` is for."""
    command = argparse.ArgumentParser(prog=prog, description=description)
    command.add_argument("--packages", type=Path, required=True, help="folder of the packages' tarballs")
    command.add_argument("--download", action="store_true", help="fetch the tarballs that are missing there, by npm")
    return command


def check(folder: Path, package: Package) -> Path:
    """The tarball of a package. FileNotFoundError where it is not there, ValueError for another content."""
    path = folder / package.file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; `npm pack {package.name}@{package.version}` there, or --download, fetches it"
        )
    found = _digest(path, path.stat().st_mtime_ns)
    if found != package.sha256:
        raise ValueError(f"{path}: its SHA-256 is {found}, not {package.sha256} of {package.name} {package.version}")
    return path


@cache
def _digest(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read(folder: Path, package: Package, *members: str) -> list[Any]:
    """The JSON files `members` of a package, decoded. KeyError for one that it lacks."""
    found = dict(walk(folder, package, members))
    return [json.loads(found[member]) for member in members]


def walk(folder: Path, package: Package, members: Iterable[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the JSON files of a package, or of `members` alone, in the tarball's order."""
    wanted = None if members is None else set(members)
    content = io.BytesIO(check(folder, package).read_bytes())
    with tarfile.open(fileobj=content, mode="r:gz") as archive:
        for entry in archive:
            name = entry.name.partition("/")[2]
            if entry.isfile() and name.endswith(".json") and (wanted is None or name in wanted):
                file = archive.extractfile(entry)
                if file is not None:
                    yield name, file.read()
