"""What is wrong with a data set, found before hours are spent on it: every image is decoded once, by worker processes.

unreadable    cut short, empty, or no image
odd           16 bit, CMYK, palette, animated, turned by EXIF, one pixel wide, very large: read, but worth a look
names         classes that differ by case or space only, folder names that are no words
duplicates    exact and near copies, within a set and, which is worse, across sets
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from robustft.data.duplicates import Look, look, pairs
from robustft.data.opening import Data
from robustft.data.paths import UNLABELLED, Member, PathDataset, read_file
from robustft.data.sources import check_workers, in_order_of
from robustft.ops.kinds import checked

LARGE = 20_000_000  # pixels
ODD = {
    "16 bit": "read as 8 bit, its whole range",
    "CMYK": "read as RGB, without a colour profile",
    "palette": "read as RGB",
    "floating point": "not read: nothing says what is white",
    "one bit": "read as black and white",
    "animated": "its first frame is read",
    "turned by EXIF": "read upright",
    "one pixel wide": "read as it is",
    "large": "read as it is, slowly",
}
"""What may be odd about a file, and what is made of it."""
SHOWN = 10  # files of a kind in the table
_NO_WORD = re.compile(r"n\d{8}|(class|cls|label|category|c)?[ _-]*\d+", re.IGNORECASE)


def no_word(name: str) -> bool:
    """Whether a class's name is a code or a number, of which no caption can be made."""
    return _NO_WORD.fullmatch(name) is not None


class Finding(NamedTuple):
    """One thing about one file, or about two (a copy and what it copies)."""

    kind: str
    where: str
    what: str
    serious: bool


@dataclass(frozen=True)
class Report:
    """What `check` found: sizes of the sets, images of each class in each, groups, findings."""

    understood: tuple[str, ...]
    sizes: Mapping[str, int]
    classes: Mapping[str, Mapping[str, int]]
    groups: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def fine(self) -> bool:
        """Whether nothing serious was found: no unreadable file, no copy across sets, no class without images."""
        return not any(finding.serious for finding in self.findings)

    def table(self) -> str:
        """All of it as text."""
        lines = [*self.understood, ""]
        sets = list(self.sizes)
        names = list(dict.fromkeys(name for counts in self.classes.values() for name in counts))
        width = max((len(name) for name in (*names, "class")), default=5)
        lines.append("class".ljust(width) + "".join(name.rjust(max(12, len(name) + 2)) for name in sets))
        for name in names:
            cells = [str(self.classes.get(s, {}).get(name, "–")).rjust(max(12, len(s) + 2)) for s in sets]
            lines.append(name.ljust(width) + "".join(cells))
        lines.append("images".ljust(width) + "".join(f"{self.sizes[s]:,}".rjust(max(12, len(s) + 2)) for s in sets))
        for set_name, counts in self.groups.items():
            lines += ["", f"groups of {set_name}:", *(f"  {name}: {count}" for name, count in counts.items())]
        for kind, count in Counter(finding.kind for finding in self.findings).items():
            found = [finding for finding in self.findings if finding.kind == kind]
            lines += ["", f"{kind}: {count}", *(f"  {f.where}: {f.what}" for f in found[:SHOWN])]
            if count > SHOWN:
                lines.append(f"  and {count - SHOWN} more")
        lines += ["", "nothing serious found" if self.fine else "look at these before you train"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "understood": list(self.understood),
            "sizes": dict(self.sizes),
            "classes": {name: dict(counts) for name, counts in self.classes.items()},
            "groups": {name: dict(counts) for name, counts in self.groups.items()},
            "findings": [finding._asdict() for finding in self.findings],
            "fine": self.fine,
        }


class Seen(NamedTuple):
    """One file as a worker saw it: what is odd, why it cannot be read ("" if it can), its look."""

    odd: tuple[str, ...]
    error: str
    look: Look | None


@checked
def check(
    data: Data,
    *,
    workers: int = 0,
    duplicates: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Reads every image of every set and says what is odd. Nothing is changed.

    Args:
        data: what `robustft.data.open` gave.
        workers: processes that decode.
        duplicates: look for copies too; memory: 4 KB an image.
        progress: called with (images seen, all) now and then.
    """
    check_workers(workers)
    sets = {name: part for name, part in data.sets().items() if isinstance(part, PathDataset)}
    total, done = sum(map(len, sets.values())), 0
    findings: list[Finding] = [*_names(data)]
    looks: list[Look] = []
    places: list[tuple[str, str]] = []  # set and file of each look
    for name, part in sets.items():
        for (file, _), seen in zip(
            part.samples, in_order_of([file for file, _ in part.samples], see, workers), strict=True
        ):
            if seen.error:
                findings.append(Finding("unreadable", f"{name}: {file}", seen.error, True))
            findings += [Finding(odd, f"{name}: {file}", ODD[odd], False) for odd in seen.odd]
            if duplicates and seen.look is not None:
                looks.append(seen.look)
                places.append((name, str(file)))
            done += 1
            if progress is not None:
                progress(done, total)
    if duplicates:
        findings += _copies(looks, places)
    for name, part in sets.items():
        empty = [label for label, count in part.counts().items() if not count]
        findings += [Finding("class without images", name, repr(label), name == "train") for label in empty]
    return Report(
        data.understood,
        {name: len(part) for name, part in data.sets().items()},
        {name: part.counts() for name, part in sets.items()},
        {
            name: {g: int((part.groups == i).sum()) for i, g in enumerate(part.group_names)}
            for name, part in sets.items()
            if part.groups is not None
        },
        tuple(findings),
    )


def see(file: Any) -> Seen:
    """Decodes one file, a path or a `Member`, and says what is odd about it."""
    from PIL import Image

    odd: list[str] = []
    try:
        opened = io.BytesIO(file.read()) if isinstance(file, Member) else file
        with Image.open(opened) as image:
            width, height = image.size
            if image.mode.startswith("I"):
                odd.append("16 bit")
            if image.mode in ("CMYK", "P", "F", "1"):
                odd.append({"P": "palette", "F": "floating point", "1": "one bit"}.get(image.mode, image.mode))
            if getattr(image, "n_frames", 1) > 1:
                odd.append("animated")
            if image.getexif().get(0x0112, 1) != 1:
                odd.append("turned by EXIF")
            if min(width, height) == 1:
                odd.append("one pixel wide")
            if width * height >= LARGE:
                odd.append("large")
        decoded = read_file(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Seen(tuple(odd), f"{error}"[:200], None)
    return Seen(tuple(odd), "", look(decoded))


def _copies(looks: Sequence[Look], places: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    for i, j in pairs(looks):
        (set_i, file_i), (set_j, file_j) = places[i], places[j]
        exact = "exact" if looks[i].digest == looks[j].digest else "near"
        across = set_i != set_j
        kind = f"{exact} copy {'across sets' if across else 'within a set'}"
        yield Finding(kind, f"{set_j}: {file_j}", f"of {set_i}: {file_i}", across)


def _names(data: Data) -> Iterator[Finding]:
    folded: dict[str, str] = {}
    for name in data.classes:
        if no_word(name):
            cure = f"{name!r}: captions need a word; give class_names={{folder: name}}"
            yield Finding("class name that is no word", "classes", cure, False)
        same = folded.setdefault(re.sub(r"[\s_-]+", " ", name).strip().casefold(), name)
        if same != name:
            yield Finding("class names alike", "classes", f"{name!r} and {same!r}", True)
    known = set(data.classes)
    for set_name, part in data.sets().items():
        if set_name.startswith("ood/") or not getattr(part, "classes", ()):
            continue
        if other := [name for name in part.classes if name not in known]:
            yield Finding("class that training does not know", set_name, ", ".join(map(repr, other[:5])), True)
        files = isinstance(part, PathDataset) and part.texts is None
        if files and any(label == UNLABELLED for _, label in part.samples):
            yield Finding("image without a label", set_name, "some images have none", True)
