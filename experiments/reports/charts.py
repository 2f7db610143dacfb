"""Charts as plain values for Plotly. Colours are names of the theme (``@ink``, ``@0``, ``@0/20`` with 20 % opacity).

The browser fills them in, so that one chart serves light, dark and paper. ``@0`` to ``@6`` are categories: Okabe and
Ito's colours, which colour-blind readers tell apart; lines differ in dashes and points in shape as well. ``@sequence``
and ``@diverging`` are scales whose lightness alone carries the order.

What is too much to see is thinned or binned, and the chart says so in its summary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from flowerbed.experiments.reports.page import Cell, Chart, Column, Table
from flowerbed.experiments.reports.wording import counted, finite, number

COLOURS = 7
"""Categories that have a colour of their own."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
MOST_POINTS = 600
"""Points of a curve; of a longer one each stretch keeps its first, least, largest and last point."""
MOST_CELLS = 120
"""Rows and columns of a heat map; more are binned by their mean."""
MOST_DATA_ROWS = 120
"""Rows of the table below a chart."""
NUMBERED = 240
"""Most cells of a heat map that carry their number."""
LONG_LABEL = 26
Numbers = Sequence[float | None]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A curve, with a band around it if there is one."""

    name: str
    x: Sequence[float]
    y: Numbers
    slot: int = 0
    """Its category: colour, dash and symbol."""
    low: Numbers = ()
    high: Numbers = ()
    band: str = ""
    """What the band is."""
    dash: str = ""
    """Instead of that of its slot."""
    faint: bool = False
    colour: str = ""
    """Instead of that of its slot."""
    row: str = ""
    """The row of a table that it follows."""
    points: bool = True


def look(slot: int) -> tuple[str, str, str]:
    """Return the colour, dash and symbol of a category."""
    return f"@{slot % COLOURS}", DASHES[slot % len(DASHES)], SYMBOLS[slot % len(SYMBOLS)]


def lines(
    title: str,
    series: Sequence[Series],
    summary: str,
    *,
    x: str = "round",
    y: str = "",
    percent: bool = False,
    from_zero: bool = False,
    log_y: bool = False,
    steps: bool = False,
    height: int = 340,
    wide: bool = True,
    follows: str = "",
    legend: bool = True,
    rules: Mapping[str, float] | None = None,
) -> Chart | None:
    """Return curves over ``x``; None if no curve has a point. ``rules`` are horizontal lines by their names."""
    drawn = [s for s in series if any(finite(v) is not None for v in s.y)]
    if not drawn:
        return None
    traces: list[dict[str, Any]] = []
    thinned = 0
    for s in drawn:
        kept = thinned_places(s.y)
        thinned = max(thinned, len(s.y) if len(kept) < len(s.y) else 0)
        colour, dash, symbol = look(s.slot)
        colour = s.colour or colour
        xs = [s.x[i] for i in kept]
        if len(s.low) and len(s.high):
            traces += _band(s, kept, xs, colour)
        few = len(kept) <= 40 and s.points
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if few else "lines",
                "name": s.name,
                "legendgroup": s.name,
                "showlegend": legend and not s.faint,
                "x": xs,
                "y": [finite(s.y[i]) for i in kept],
                "line": {
                    "color": colour,
                    "width": 1.2 if s.faint else 2.2,
                    "dash": s.dash or dash,
                    "shape": "hv" if steps else "linear",
                },
                "marker": {"size": 5, "symbol": symbol, "color": colour},
                "opacity": 0.55 if s.faint else 1,
                "connectgaps": False,
                "hovertemplate": f"%{{y:{'.2%' if percent else '.4~g'}}}<extra>{escaped(short(s.name))}</extra>",
                "meta": {"row": s.row},
            }
        )
    layout = base_layout(x, y, percent=percent)
    layout["hovermode"] = "x unified" if len(drawn) <= 8 else "closest"
    if from_zero:
        layout["yaxis"]["rangemode"] = "tozero"
    if log_y:
        layout["yaxis"] |= {"type": "log", "dtick": 1}
    draw_rules(layout, rules or {}, percent)
    if thinned:
        summary += (
            f" Curves of {number(thinned)} points are drawn with {MOST_POINTS} that keep every extreme."
        )
    return Chart(
        title,
        summary,
        {"data": traces, "layout": layout},
        height,
        wide,
        curves_table(title, drawn, x, percent),
        follows,
    )


def _band(s: Series, kept: Sequence[int], xs: Sequence[float], colour: str) -> list[dict[str, Any]]:
    """Return the two edges of a band, without what is not finite: a filled area would close over a gap."""
    whole = [
        (at, low, high)
        for at, i in zip(xs, kept, strict=True)
        if (low := finite(s.low[i])) is not None and (high := finite(s.high[i])) is not None
    ]
    common = {
        "type": "scatter",
        "mode": "lines",
        "legendgroup": s.name,
        "showlegend": False,
        "x": [at for at, _, _ in whole],
        "line": {"width": 0, "color": f"{colour}/0"},
        "hoverinfo": "skip",
        "meta": {"row": s.row},
    }
    return [
        {**common, "y": [low for _, low, _ in whole]},
        {**common, "y": [high for _, _, high in whole], "fill": "tonexty", "fillcolor": f"{colour}/18"},
    ]


def thinned_places(values: Numbers, most: int = MOST_POINTS) -> list[int]:
    """Return the places to draw: all of a short curve; of a long one each stretch's first, least, largest and last."""
    count = len(values)
    if count <= most:
        return list(range(count))
    kept: set[int] = {0, count - 1}
    edges = np.linspace(0, count, most // 4 + 1).astype(int).tolist()
    for start, end in pairwise(edges):
        stretch = [(v, i) for i in range(start, end) if (v := finite(values[i])) is not None]
        # A place without a number is kept, so that the curve is broken there.
        empty = next((i for i in range(start, end) if finite(values[i]) is None), None)
        kept |= {stretch[0][1], min(stretch)[1], max(stretch)[1], stretch[-1][1]} if stretch else set()
        kept |= set() if empty is None else {empty}
    return sorted(kept)


def curves_table(title: str, series: Sequence[Series], x: str, percent: bool) -> Table:
    """Return the numbers of curves: a row for each x, a column for each curve; evenly thinned if they are many."""
    places = sorted({at for s in series for at in s.x})
    step = -(-len(places) // MOST_DATA_ROWS)
    shown = [at for i, at in enumerate(places) if i % step == 0 or i == len(places) - 1]
    many = len(series) > 12
    listed = series[:12]
    by_x = [dict(zip(s.x, range(len(s.x)), strict=True)) for s in listed]
    rows = []
    for at in shown:
        row = [Cell(number(at), at)]
        for s, found in zip(listed, by_x, strict=True):
            i = found.get(at)
            value = None if i is None else finite(s.y[i])
            text = number(value, percent)
            if i is not None and value is not None and len(s.low) and finite(s.low[i]) is not None:
                text += f" ({number(s.low[i], percent)} to {number(s.high[i], percent)})"
            row.append(Cell(text, value))
        rows.append(row)
    bands = "; ".join(f"{s.name}: in brackets {s.band}" for s in listed if s.band)
    notes = [f"{bands}."] if bands else []
    notes += [f"Every {step}th row of {number(len(places))}."] if step > 1 else []
    notes += [f"The first 12 of {len(series)} curves."] if many else []
    columns = [Column(x, True), *(Column(s.name, True) for s in listed)]
    return Table(f"{title}: the numbers", columns, rows, note=" ".join(notes), filtered=False)


def heat(
    title: str,
    z: Matrix,
    columns: Sequence[str],
    rows: Sequence[str],
    summary: str,
    *,
    x: str,
    y: str,
    value: str,
    percent: bool = False,
    low: float | None = None,
    high: float | None = None,
    diverging: bool = False,
    digits: str = "",
    wide: bool = True,
    row_height: int = 22,
    all_data: bool = False,
) -> Chart | None:
    """Return a heat map of ``z`` (rows, columns), NaN where there is nothing; None if there is nothing at all.

    More than ``MOST_CELLS`` rows or columns are put together in bins of equal size by their mean.
    """
    if not z.size or not np.isfinite(z).any():
        return None
    notes = []
    shape = z.shape
    z, rows, row_bin = binned(z, rows)
    turned, columns, column_bin = binned(z.T, columns)
    z = turned.T
    if row_bin > 1:
        notes.append(f"{number(shape[0])} rows are shown as means of {row_bin} each.")
    if column_bin > 1:
        notes.append(f"{number(shape[1])} columns are shown as means of {column_bin} each.")
    cells = [[finite(float(v)) for v in line] for line in z]
    form = digits or (".1%" if percent else ".3~g")
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": cells,
        "x": list(range(len(columns))),
        "y": list(range(len(rows))),
        "customdata": [[[r, c] for c in columns] for r in rows],
        "colorscale": "@diverging" if diverging else "@sequence",
        "zmin": low,
        "zmax": high,
        "zmid": 0 if diverging and low is None else None,
        "hoverongaps": False,
        "xgap": 1 if len(columns) <= 60 else 0,
        "ygap": 1 if len(rows) <= 60 else 0,
        "hovertemplate": f"{escaped(y)} %{{customdata[0]}}<br>{escaped(x)} %{{customdata[1]}}<br>"
        f"{escaped(value)} %{{z:{form}}}<extra></extra>",
        "colorbar": {
            "title": {"text": value, "side": "right"},
            "thickness": 10,
            "outlinewidth": 0,
            "tickformat": ".0%" if percent else "",
        },
    }
    if z.size <= NUMBERED:
        inside = form.replace(".1%", ".0%")
        trace |= {"texttemplate": f"%{{z:{inside}}}", "textfont": {"size": 11}}
    layout = base_layout(x, y)
    layout["xaxis"] |= category_ticks(columns) | {"showgrid": False, "side": "bottom"}
    layout["yaxis"] |= category_ticks(rows, most=40) | {"showgrid": False, "autorange": "reversed"}
    layout["hovermode"] = "closest"
    summary = " ".join([summary, *notes])
    height = int(np.clip(110 + row_height * len(rows), 220, 640))
    few = z.size <= 2400 or all_data
    data = matrix_table(title, z, columns, rows, y, percent) if few else None
    return Chart(title, summary, {"data": [trace], "layout": layout}, height, wide, data)


def binned(z: Matrix, labels: Sequence[str], most: int = MOST_CELLS) -> tuple[Matrix, list[str], int]:
    """Return the rows in at most ``most`` bins by their mean (NaN left out), their labels, and the size of a bin."""
    step = -(-len(z) // most)
    if step <= 1:
        return z, list(labels), 1
    starts = range(0, len(z), step)
    means = np.stack([_mean(z[at : at + step]) for at in starts])
    names = [f"{labels[at]}–{labels[min(at + step, len(z)) - 1]}" for at in starts]
    return means, names, step


def _mean(rows: Matrix) -> Matrix:
    """Return the mean of each column over what is finite; NaN where nothing is."""
    known = np.isfinite(rows)
    count = known.sum(axis=0)
    sums = np.where(known, rows, 0.0).sum(axis=0)
    found: Matrix = np.where(count > 0, sums / np.maximum(count, 1), np.nan)
    return found


def matrix_table(
    title: str, z: Matrix, columns: Sequence[str], rows: Sequence[str], corner: str, percent: bool
) -> Table:
    """Return the numbers of a heat map."""
    step = -(-len(rows) // MOST_DATA_ROWS)
    body = [
        [Cell(label, label), *(Cell(number(finite(v), percent), finite(v)) for v in line.tolist())]
        for label, line in list(zip(rows, z, strict=True))[::step]
    ]
    note = f"Every {step}th row of {number(len(rows))}." if step > 1 else ""
    heads = [Column(corner), *(Column(str(c), True) for c in columns)]
    return Table(f"{title}: the numbers", heads, body, note=note, filtered=False)


@dataclass(frozen=True)
class Dot:
    """A row of a dot plot."""

    label: str
    mean: float | None
    low: float | None = None
    high: float | None = None
    values: Numbers = ()
    """Single ones, drawn small below."""
    slot: int = 0
    said: str = ""
    """Why there is no mean."""
    row: str = ""


def dots(
    title: str,
    rows: Sequence[Dot],
    summary: str,
    *,
    x: str,
    percent: bool = False,
    rules: Mapping[str, float] | None = None,
    one_colour: bool = False,
    wide: bool = True,
    follows: str = "",
) -> Chart | None:
    """Return a row for each label: mean, interval, single values. ``rules`` are vertical lines by their names."""
    if not rows or all(r.mean is None and not r.values for r in rows):
        return None
    traces: list[dict[str, Any]] = []
    form = ".2%" if percent else ".4~g"
    for place, r in enumerate(rows):
        colour, _, symbol = look(0 if one_colour or len(rows) > COLOURS else r.slot)
        known = [v for v in r.values if finite(v) is not None]
        name = escaped(short(r.label, 60))
        if known:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": known,
                    "y": [place + 0.26] * len(known),
                    "marker": {"size": 5, "color": colour, "opacity": 0.55},
                    "hovertemplate": f"%{{x:{form}}}<extra>{name}</extra>",
                    "showlegend": False,
                    "meta": {"row": r.row},
                }
            )
        if r.mean is not None:
            trace: dict[str, Any] = {
                "type": "scatter",
                "mode": "markers",
                "x": [r.mean],
                "y": [place],
                "marker": {"size": 10, "color": colour, "symbol": symbol if not one_colour else "circle"},
                "hovertemplate": f"%{{x:{form}}}<extra>{name}</extra>",
                "showlegend": False,
                "meta": {"row": r.row},
            }
            if r.low is not None and r.high is not None:
                trace["error_x"] = {
                    "type": "data",
                    "symmetric": False,
                    "array": [r.high - r.mean],
                    "arrayminus": [r.mean - r.low],
                    "color": colour,
                    "thickness": 2,
                    "width": 5,
                }
            traces.append(trace)
    layout = base_layout(x, "", percent_x=percent)
    layout["yaxis"] |= category_ticks([r.label for r in rows], most=60, longest=44) | {
        "range": [len(rows) - 0.4, -0.6],
        "gridcolor": "@grid",
        "zeroline": False,
    }
    layout["hovermode"] = "closest"
    layout["annotations"] = [
        {"x": 1, "xref": "paper", "y": place, "text": escaped(r.said), "showarrow": False, "xanchor": "right",
         "font": {"color": "@bad"}}
        for place, r in enumerate(rows)
        if r.mean is None and r.said
    ]  # fmt: skip
    draw_rules(layout, rules or {}, percent, upright=True)
    data = [
        [
            Cell(r.label, r.label),
            Cell(number(r.mean, percent) if r.mean is not None else r.said or "–", r.mean),
            Cell(number(r.low, percent), r.low),
            Cell(number(r.high, percent), r.high),
            Cell(", ".join(number(v, percent) for v in r.values), None),
        ]
        for r in rows[:MOST_DATA_ROWS]
    ]
    heads = [Column(""), Column(x, True), Column("low", True), Column("high", True), Column("single values")]
    table = Table(f"{title}: the numbers", heads, data, filtered=False)
    height = int(np.clip(110 + 34 * len(rows), 190, 1200))
    return Chart(title, summary, {"data": traces, "layout": layout}, height, wide, table, follows)


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Family:
    """Points that belong together; joined if they are strengths of one thing."""

    name: str
    points: Sequence[Point]
    slot: int = 0
    joined: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def scatter(
    title: str,
    families: Sequence[Family],
    summary: str,
    *,
    x: str,
    y: str,
    percent_x: bool = False,
    rules: Mapping[str, float] | None = None,
    wide: bool = False,
    height: int = 380,
) -> Chart | None:
    """Return points with upright intervals; those of a family that is joined by a line in the order of x."""
    if not any(f.points for f in families):
        return None
    traces: list[dict[str, Any]] = []
    rows = []
    for f in families:
        colour, _, symbol = look(f.slot)
        points = sorted(f.points, key=lambda p: p.x)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers+text" if f.joined and len(points) > 1 else "markers+text",
                "name": f.name,
                "legendgroup": f.name,
                "showlegend": len(families) > 1,
                "x": [p.x for p in points],
                "y": [p.y for p in points],
                "text": [f"  {escaped(short(p.label, 20))}" for p in points],
                "textposition": "middle right",
                "textfont": {"size": 11, "color": "@ink"},
                "cliponaxis": False,
                "marker": {"size": 10, "color": colour, "symbol": symbol},
                "line": {"color": colour, "width": 1.5, "dash": "dot"},
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [(p.high - p.y) if p.high is not None else 0 for p in points],
                    "arrayminus": [(p.y - p.low) if p.low is not None else 0 for p in points],
                    "color": colour,
                    "thickness": 1.5,
                    "width": 4,
                },
                "hovertemplate": f"%{{text}}<br>{escaped(x)} %{{x:{'.2%' if percent_x else '.4~g'}}}<br>"
                f"{escaped(y)} %{{y:.4~g}}<extra></extra>",
            }
        )
        for p in points:
            texts = [number(p.x, percent_x), number(p.y), number(p.low), number(p.high)]
            cells = zip(texts, (p.x, p.y, p.low, p.high), strict=True)
            rows.append([Cell(p.label, p.label), *(Cell(text, value) for text, value in cells)])
    layout = base_layout(x, y, percent_x=percent_x)
    layout["hovermode"] = "closest"
    xs = [p.x for f in families for p in f.points]
    reach = max(xs) - min(xs) or abs(max(xs)) or 1.0
    # The names stand to the right of their points.
    layout["xaxis"]["range"] = [min(xs) - 0.08 * reach, max(xs) + 0.3 * reach]
    draw_rules(layout, rules or {}, False, named=False)
    drawn = ", ".join(f"{name} {number(value)}" for name, value in (rules or {}).items())
    summary += f" Dashed: {drawn}." if drawn else ""
    heads = [Column(""), Column(x, True), Column(y, True), Column("low", True), Column("high", True)]
    data = Table(f"{title}: the numbers", heads, rows[:MOST_DATA_ROWS], filtered=False)
    return Chart(title, summary, {"data": traces, "layout": layout}, height, wide, data)


def bars(
    title: str,
    x_values: Sequence[Any],
    stacks: Mapping[str, Numbers],
    summary: str,
    *,
    x: str,
    y: str,
    wide: bool = True,
    height: int = 300,
    slots: Mapping[str, int] | None = None,
    colours: Mapping[str, str] | None = None,
    diagonal: bool = False,
    percent: bool = False,
) -> Chart | None:
    """Return stacked bars, a colour for each name."""
    stacks = {name: values for name, values in stacks.items() if any(finite(v) for v in values)}
    if not stacks:
        return None
    traces: list[dict[str, Any]] = []
    for place, (name, values) in enumerate(stacks.items()):
        slot = (slots or {}).get(name, place)
        traces.append(
            {
                "type": "bar",
                "name": name,
                "legendgroup": name,
                "showlegend": len(stacks) > 1,
                "x": list(x_values),
                "y": [finite(v) for v in values],
                "marker": {"color": (colours or {}).get(name, look(slot)[0]), "line": {"width": 0}},
                "hovertemplate": f"%{{y:{'.2%' if percent else '.4~g'}}}<extra>{escaped(short(name))}</extra>",
            }
        )
    layout = base_layout(x, y, percent=percent, percent_x=diagonal)
    layout |= {"barmode": "stack", "bargap": 0.12 if len(x_values) <= 80 else 0, "hovermode": "x unified"}
    layout["yaxis"]["rangemode"] = "tozero"
    if diagonal:
        layout["shapes"] = [
            {"type": "line", "x0": 0, "y0": 0, "x1": 1, "y1": 1,
             "line": {"color": "@muted", "width": 1.5, "dash": "dash"}}
        ]  # fmt: skip
        layout["xaxis"]["range"] = layout["yaxis"]["range"] = [0, 1]
    step = -(-len(x_values) // MOST_DATA_ROWS)
    rows = [
        [
            Cell(number(at, diagonal), finite(at) if finite(at) is not None else str(at)),
            *(Cell(number(finite(v[i]), percent), finite(v[i])) for v in stacks.values()),
        ]
        for i, at in enumerate(x_values)
        if i % step == 0
    ]
    columns = [Column(x, True), *(Column(name, True) for name in stacks)]
    note = f"Every {step}th row of {number(len(x_values))}." if step > 1 else ""
    data = Table(f"{title}: the numbers", columns, rows, note=note, filtered=False)
    return Chart(title, summary, {"data": traces, "layout": layout}, height, wide, data)


@dataclass(frozen=True)
class Axis:
    """An axis of parallel coordinates."""

    name: str
    places: Numbers
    """Where each line crosses it, 0 to 1; None where it does not."""
    ticks: Mapping[float, str]


def parallel(
    title: str,
    axes: Sequence[Axis],
    names: Sequence[str],
    shades: Sequence[float],
    rows: Sequence[str],
    summary: str,
    *,
    follows: str = "",
    best: int | None = None,
) -> Chart:
    """Return parallel coordinates: a line for each name, coloured by its shade (0 to 1), the best one thick."""
    traces: list[dict[str, Any]] = []
    order = sorted(range(len(names)), key=lambda i: (i == best, shades[i]))
    for i in order:
        colour = f"@ramp{min(4, int(shades[i] * 5))}"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": list(range(len(axes))),
                "y": [a.places[i] for a in axes],
                "line": {"color": "@1" if i == best else colour, "width": 4 if i == best else 1.8,
                         "shape": "spline", "smoothing": 0.5},
                "marker": {"size": 6 if i == best else 4, "color": "@1" if i == best else colour},
                "opacity": 1 if i == best else 0.75,
                "hovertemplate": f"{escaped(short(names[i], 80))}<extra></extra>",
                "showlegend": False,
                "meta": {"row": rows[i]},
            }
        )  # fmt: skip
    layout = base_layout("", "")
    layout["xaxis"] |= {
        "tickvals": list(range(len(axes))),
        "ticktext": [escaped(short(a.name, 22)) for a in axes],
        "side": "top",
        "range": [-0.25, len(axes) - 0.75],
        "showgrid": False,
        "fixedrange": True,
    }
    layout["yaxis"] |= {"visible": False, "range": [-0.08, 1.08], "fixedrange": True}
    layout["hovermode"] = "closest"
    layout["shapes"] = [
        {"type": "line", "x0": k, "x1": k, "y0": 0, "y1": 1, "line": {"color": "@muted", "width": 1}}
        for k in range(len(axes))
    ]
    layout["annotations"] = [
        {"x": k, "y": place, "text": escaped(short(text, 16)), "showarrow": False, "xanchor": "right",
         "bgcolor": "@surface/85", "xshift": -6, "font": {"size": 11, "color": "@muted"}}
        for k, axis in enumerate(axes)
        for place, text in axis.ticks.items()
    ]  # fmt: skip
    return Chart(title, summary, {"data": traces, "layout": layout}, 380, True, None, follows)


def base_layout(x: str, y: str, *, percent: bool = False, percent_x: bool = False) -> dict[str, Any]:
    """Return the layout that all charts share."""

    def axis(title: str, shares: bool) -> dict[str, Any]:
        found: dict[str, Any] = {
            "title": {"text": escaped(title), "standoff": 8},
            "gridcolor": "@grid",
            "linecolor": "@grid",
            "zeroline": False,
            "automargin": True,
            "ticks": "",
        }
        return found | ({"tickformat": ".3~%"} if shares else {})

    return {
        "autosize": True,
        "margin": {"l": 8, "r": 12, "t": 10, "b": 8},
        "paper_bgcolor": "@none",
        "plot_bgcolor": "@none",
        "font": {"color": "@ink", "size": 12, "family": "system-ui, sans-serif"},
        "hoverlabel": {"bgcolor": "@surface", "bordercolor": "@grid", "font": {"color": "@ink"}},
        "showlegend": False,
        "xaxis": axis(x, percent_x),
        "yaxis": axis(y, percent),
    }


def draw_rules(
    layout: dict[str, Any],
    rules: Mapping[str, float],
    percent: bool,
    upright: bool = False,
    named: bool = True,
) -> None:
    """Draw a dashed line for each of ``rules``, with its name unless that would stand among points."""
    known = {name: value for name, value in rules.items() if finite(value) is not None}
    along, across = ("x", "y") if upright else ("y", "x")
    layout.setdefault("shapes", [])
    layout.setdefault("annotations", [])
    for place, (name, value) in enumerate(known.items()):
        line = {"color": "@muted", "width": 1.5, "dash": DASHES[1 + place % 3]}
        layout["shapes"] = [
            *layout["shapes"],
            {"type": "line", f"{across}ref": "paper", f"{across}0": 0, f"{across}1": 1,
             f"{along}0": value, f"{along}1": value, "line": line, "layer": "below"},
        ]  # fmt: skip
        if not named:
            continue
        text = f"{name} {number(value, percent)}"
        where = (
            {"x": value, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "center"}
            if upright
            else {"x": 0, "xref": "paper", "y": value, "yanchor": "top", "xanchor": "left"}
        )
        layout["annotations"] = [
            *layout["annotations"],
            {"text": escaped(text), "showarrow": False, "font": {"size": 11, "color": "@muted"}, **where},
        ]
    if upright and known:
        layout["margin"] = {**layout["margin"], "t": 26}


def category_ticks(labels: Sequence[str], most: int = 24, longest: int = LONG_LABEL) -> dict[str, Any]:
    """Return an axis' ticks for categories, not more than can be read."""
    step = -(-len(labels) // most)
    # Round steps are easier to count on.
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000) if s >= step), step)
    places = list(range(0, len(labels), step))
    return {"tickvals": places, "ticktext": [escaped(short(str(labels[i]), longest)) for i in places]}


def short(text: str, most: int = LONG_LABEL) -> str:
    """Return a label that is not longer than can be read beside a chart."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def escaped(text: str) -> str:
    """Return a text without what Plotly takes for its markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def extent(values: Sequence[float]) -> str:
    """Return the least and the largest of some numbers in words."""
    known = [v for v in values if math.isfinite(v)]
    return f"{number(min(known))} to {number(max(known))}" if known else counted(0, "value")


def replaced(chart: Chart, figure: Mapping[str, Any]) -> Chart:
    """Return a chart with another figure."""
    return replace(chart, figure=figure)
