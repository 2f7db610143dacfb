"""A page as one HTML file that fetches nothing: style, script, charts' library and pictures are inside of it."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flowerbed.errors import ConfigError
from flowerbed.experiments.reports.page import Block, Cell, Chart, Fold, Page, Table

ASSETS = Path(__file__).with_name("assets")
MARK_WIDTH, MARK_HEIGHT = 96, 14
"""Pixels of the interval that is drawn in a cell."""
DIGITS = 6
"""Significant digits of the numbers in charts; a screen shows fewer."""


def library() -> str:
    """Return the charts' JavaScript; raises ``ConfigError`` if it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError("flowerbed report needs plotly: pip install 'flowerbed[report]'.") from error
    return str(get_plotlyjs())


@cache
def packed_library() -> str:
    """Return the JavaScript compressed, as text."""
    # Without a time stamp, so that equal reports are equal files.
    return base64.b64encode(gzip.compress(library().encode(), 9, mtime=0)).decode()


def html(page: Page) -> str:
    """Return the page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    numbers = itertools.count(1)
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "figure": figure_json,
        "hint": filter_hint,
        "mark": mark,
        "unique": lambda name: f"{name}-{next(numbers)}",
    }
    parts = [
        {
            "part": part,
            "anchor": f"part-{i}",
            "sections": [
                {"section": section, "anchor": f"part-{i}-{j}"}
                for j, section in enumerate(part.sections, 1)
                if section.blocks
            ],
        }
        for i, part in enumerate(page.parts, 1)
    ]
    drawn = any(isinstance(block, Chart) for block in blocks_of(page))
    return environment.get_template("page.html.j2").render(
        page=page,
        parts=parts,
        style=(ASSETS / "report.css").read_text(),
        script=(ASSETS / "report.js").read_text(),
        library=packed_library() if drawn else "",
    )


def blocks_of(page: Page) -> Iterator[Block]:
    """Yield every block of a page, also those in folds."""

    def inside(blocks: Any) -> Iterator[Block]:
        for block in blocks:
            yield block
            if isinstance(block, Fold):
                yield from inside(block.blocks)

    for part in page.parts:
        for section in part.sections:
            yield from inside(section.blocks)


def figure_json(chart: Chart) -> str:
    """Return a chart's data and layout as JSON that may stand in a script element."""
    text = json.dumps(_plain(chart.figure), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def filter_hint(table: Table) -> str:
    """Return an example of a filter of this table."""
    for place, column in enumerate(table.columns):
        known = sorted(
            v
            for row in table.rows
            if isinstance(v := row[place].sort, float) and math.isfinite(v) and v != int(v)
        )
        if column.numeric and known:
            middle = float(f"{known[len(known) // 2]:.2g}")
            example = f"{column.name}>{middle:g}"
            return f'words, or "{example}"' if " " in example else f"words, or {example}"
    return "words"


def mark(cell: Cell) -> Any:
    """Return a cell's mean and interval against 0 as a small picture, each in its own scale."""
    from markupsafe import Markup

    if cell.mark is None or not all(map(math.isfinite, cell.mark)):
        return ""
    mean, low, high = cell.mark
    reach = max(abs(low), abs(high), abs(mean)) or 1.0
    place: Callable[[float], str] = lambda v: f"{MARK_WIDTH / 2 * (1 + 0.92 * v / reach):.1f}"
    tone = "bad" if high < 0 else "good" if low >= 0 else "warn"
    return Markup(
        '<svg class="mark {}" width="{}" height="{}" role="img" aria-label="{}">'
        '<line class="zero" x1="{z}" x2="{z}" y1="0" y2="14"/><line class="range" x1="{}" x2="{}" y1="7" y2="7"/>'
        '<circle class="mean" cx="{}" cy="7" r="3.5"/></svg>'
    ).format(
        tone, MARK_WIDTH, MARK_HEIGHT, f"gap {mean:.3g}, from {low:.3g} to {high:.3g}, against 0",
        place(low), place(high), place(mean), z=MARK_WIDTH // 2,
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """Return a value with short numbers, and null for what JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
