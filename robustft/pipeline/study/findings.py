"""What a study finds: the numbers of each seed, and what they say of a paper's claim.

For one seed a section measures tables, {table: {row: {column: number}}}, and curves, {plot: {curve: (xs, ys)}}. A
number over the seeds is its mean ± standard deviation. A claim has a margin in each seed, positive where the seed
agrees with the paper:

    appears              every seed agrees, and the mean margin exceeds its standard deviation
    leans that way       every seed agrees
    does not appear      seeds disagree, or there is no margin at all
    the opposite ...     as above, with the sign turned

Of three seeds without any effect one set in four agrees by chance, so a verdict is a reading and no test; the margins
stand beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Table = dict[str, dict[str, float]]
Curve = tuple[list[float], list[float]]


class Measured(NamedTuple):
    """What a section finds in one seed; plain numbers, so that JSON holds it."""

    tables: dict[str, Table]
    curves: dict[str, dict[str, Curve]]


@dataclass(frozen=True)
class Claim:
    """A paper's claim, and by how much one seed's tables agree with it, in `unit`."""

    text: str
    margin: Callable[[Mapping[str, Table]], float]
    unit: str = "points"


@dataclass(frozen=True)
class Plot:
    """How the curves of one name in `Measured.curves` are drawn."""

    name: str
    title: str
    x: str
    y: str
    caption: str
    logarithmic: bool = False


@dataclass(frozen=True)
class Section:
    """One question of the study: what it measures in a seed's world, and what that could show."""

    name: str
    title: str
    question: str
    measure: Callable[..., Measured]
    claims: Sequence[Claim]
    plots: Sequence[Plot] = ()
    notes: Mapping[str, str] = field(default_factory=dict)  # of tables, by name


class Finding(NamedTuple):
    """A claim's margins over the seeds, and the verdict."""

    claim: Claim
    margins: tuple[float, ...]
    verdict: str


def find(claim: Claim, seeds: Sequence[Measured]) -> Finding:
    margins = tuple(claim.margin(measured.tables) for measured in seeds)
    return Finding(claim, margins, verdict(margins))


def verdict(margins: Sequence[float]) -> str:
    """What the margins of all seeds say together; see the table above."""
    mean = statistics.fmean(margins)
    clear = len(margins) > 1 and abs(mean) > statistics.stdev(margins)
    if all(m > 0 for m in margins):
        return "appears" if clear else "leans that way"
    if all(m < 0 for m in margins):
        return "the opposite appears" if clear else "leans the other way"
    return "does not appear"


def higher(table: str, column: str, ours: str, than: str) -> Callable[[Mapping[str, Table]], float]:
    """The margin by which one row's number exceeds another's."""
    return lambda tables: tables[table][ours][column] - tables[table][than][column]


def lower(table: str, column: str, ours: str, than: str) -> Callable[[Mapping[str, Table]], float]:
    return higher(table, column, than, ours)


def falls(table: str, row: str, first: str, last: str) -> Callable[[Mapping[str, Table]], float]:
    """The margin by which a row's number falls from one column to another."""
    return lambda tables: tables[table][row][first] - tables[table][row][last]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """ "mean ± standard deviation" as text; one value alone, and a dash for none."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def joined(seeds: Sequence[Measured], table: str) -> tuple[tuple[str, ...], ...]:
    """A table's cells over the seeds as text, header first; a cell is of the seeds that have it."""
    tables = [measured.tables[table] for measured in seeds]
    rows = list(dict.fromkeys(name for rows in tables for name in rows))
    columns = list(dict.fromkeys(column for rows in tables for row in rows.values() for column in row))

    def cell(name: str, column: str) -> str:
        return spread([rows[name][column] for rows in tables if column in rows.get(name, {})])

    return (("", *columns), *((name, *(cell(name, column) for column in columns)) for name in rows))
