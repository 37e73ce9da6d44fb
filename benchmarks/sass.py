"""What a warp issues of a compiled kernel: instructions along its shortest ways, out of cuobjdump's disassembly.

`once` is the shortest way from the entry to the exit, loops left out. `loops` are the shortest ways once around each
loop, in the order of the code, loops within left out. Where a kernel branches, to spare a tile what it does not need
(`wide` tiles, the diagonal), the shortest way is that of most tiles; a loop that runs for all of a tile is not cut
short, since its way is its own. Of each way: instructions, and among them shuffles, exponentials and products by the
matrix unit.
"""

from __future__ import annotations

import heapq
import re
from typing import NamedTuple

MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "QGMMA", "DMMA")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([\w.]+)([^;]*);", re.MULTILINE)


class Way(NamedTuple):
    """Instructions of a warp."""

    instructions: int = 0
    shuffles: int = 0
    exponentials: int = 0
    products: int = 0

    def plus(self, other: Way) -> Way:
        return Way(*(a + b for a, b in zip(self, other, strict=True)))


class Instruction(NamedTuple):
    name: str
    always: bool
    """Whether no predicate stands before it."""
    target: int | None
    """Of a branch or a call, the place in the code."""

    @property
    def way(self) -> Way:
        kind = self.name.split(".")[0]
        return Way(1, kind == "SHFL", self.name == "MUFU.EX2", kind in MATRIX)


def read(disassembly: str) -> list[Instruction]:
    """One kernel's instructions. ValueError for a text that holds none, or a branch to nowhere."""
    lines = [(int(at, 16), predicate, name, rest) for at, predicate, name, rest in _LINE.findall(disassembly)]
    if not lines:
        raise ValueError("the disassembly holds no instruction")
    places = {at: place for place, (at, *_) in enumerate(lines)}
    found = []
    for _, predicate, name, rest in lines:
        target = None
        if name.split(".")[0] == "BRA" or name.startswith("CALL.REL"):
            address = re.search(r"0x([0-9a-f]+)", rest)
            if address is None or int(address[1], 16) not in places:
                raise ValueError(f"a branch leads to {rest.strip()}, which is no instruction here")
            # Some name a uniform predicate among the operands.
            predicate = predicate or ("!" if re.search(r"\bU?P\d", rest) else "")
            target = places[int(address[1], 16)]
        found.append(Instruction(name, not predicate, target))
    return found


def _shortest(
    code: list[Instruction], start: int, end: int | None, without: list[bool], early: bool = False
) -> Way | None:
    """From start to end, or to an exit, `early` also to one under a condition; None where no way leads there. A branch
    back may lead to a way, too, where blocks stand out of line; that a shortest way goes around no loop is in its
    nature. A call returns to the next instruction (what it called is not counted), or is a branch to where the kernel
    ends."""
    best = {start: Way()}
    waiting = [(Way(), start)]
    done: set[int] = set()
    while waiting:
        so_far, place = heapq.heappop(waiting)
        if place in done or place >= len(code):
            continue
        done.add(place)
        here = code[place]
        after = so_far if without[place] else so_far.plus(here.way)
        exits = here.name.startswith("EXIT") and (here.always or early)
        if place == end or (exits and end is None):
            return after
        if exits or (here.name.startswith("RET") and here.always):
            continue
        to = [] if here.target is None else [here.target]
        if not here.name.startswith("BRA") or not here.always:
            to.append(place + 1)
        for next_place in to:
            if next_place not in best or after < best[next_place]:
                best[next_place] = after
                heapq.heappush(waiting, (after, next_place))
    return None


def ways(disassembly: str) -> tuple[Way, list[Way]]:
    """`once` and `loops` of one kernel."""
    code = read(disassembly)
    loops = [
        (i.target, place)
        for place, i in enumerate(code)
        if i.target is not None and i.target < place and i.name.startswith("BRA")
    ]

    def within(outer: tuple[int, int]) -> list[bool]:
        inner = [loop for loop in loops if loop != outer and outer[0] <= loop[0] and loop[1] <= outer[1]]
        return [any(a <= place <= b for a, b in inner) for place in range(len(code))]

    around = [_shortest(code, *loop, within(loop)) for loop in loops]
    outside = within((-1, len(code)))
    # A kernel that ends with a loop may end within it.
    once = _shortest(code, 0, None, outside) or _shortest(code, 0, None, outside, early=True)
    if once is None:
        raise ValueError("no way leads from the kernel's entry to an exit")
    return once, [way for way in around if way is not None]
