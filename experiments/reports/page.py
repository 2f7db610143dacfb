"""What a report consists of: a page of parts, parts of sections, sections of blocks. Plain values, no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GOOD, WARN, BAD, MUTED = "good", "warn", "bad", "muted"
"""Tones; each comes with a mark of its own, since colour alone tells nothing to some readers."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is read, and what it is sorted by."""

    text: str
    sort: float | str | None = None
    """None sorts last, whatever the direction."""
    tone: str = ""
    mark: tuple[float, float, float] | None = None
    """A mean with its interval, drawn beside the text against 0: (mean, low, high)."""
    link: str = ""
    """The key of a fold on this page that says more."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """Rows that can be sorted by every column and filtered."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    key: str = ""
    """Its name, by which charts follow its filter; unique on a page."""
    row_keys: Sequence[str] = ()
    """What each row stands for in the charts that follow."""
    note: str = ""
    filtered: bool = True
    """Whether it has a filter; the data below a chart have none."""


@dataclass(frozen=True)
class Chart:
    """A picture that the browser draws, what it shows in words, and its numbers."""

    title: str
    summary: str
    """What it shows: read aloud in its place, and printed below it."""
    figure: Mapping[str, Any]
    """Plotly's data and layout; texts that begin with @ are colours of the theme."""
    height: int = 340
    wide: bool = True
    """Whether it takes a row of its own, or shares it with others."""
    data: Table | None = None
    follows: str = ""
    """The table whose filter it follows."""


@dataclass(frozen=True)
class Pair:
    """An original beside its reconstruction, as data URIs of PNG."""

    original: str
    found: str
    caption: str
    detail: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pairs of images, those that leaked most first."""

    title: str
    pairs: Sequence[Pair]
    note: str = ""
    wide: bool = True


@dataclass(frozen=True)
class Picture:
    """A picture that was there already, as a data URI."""

    title: str
    summary: str
    uri: str


@dataclass(frozen=True)
class Tile:
    """A figure that is read first."""

    label: str
    value: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Tiles:
    """Figures side by side."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Note:
    """What a reader must not miss (``WARN``, ``BAD``), or how to read on; lines are shown as lines."""

    text: str
    tone: str = MUTED


@dataclass(frozen=True)
class Fold:
    """Blocks that are opened when they are wanted."""

    title: str
    blocks: Sequence[Block]
    detail: str = ""
    tone: str = ""
    key: str = ""
    """Its name, for links; unique on a page."""


Block = Table | Chart | Gallery | Picture | Tiles | Note | Fold


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; none without blocks is shown."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Part:
    """Everything about one directory."""

    kind: str
    """run, sweep, comparison, attack, matrix or papers."""
    title: str
    subtitle: str
    sections: Sequence[Section]
    missing: Sequence[str] = ()
    """What could not be shown, and why."""


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    parts: Sequence[Part]
    made: str
    """When, and with what."""
    facts: Mapping[str, str] = field(default_factory=dict)
