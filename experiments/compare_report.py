"""A comparison as a person reads it: on the screen, as Markdown, CSV, JSON and one picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowerbed.experiments import paired
from flowerbed.experiments.comparison import Comparison, Metric, Row, Run
from flowerbed.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

INK, LINES, BAD = "#333333", "#dddddd", "#b33a3a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
"""Okabe and Ito's, which colour-blind readers tell apart; after these the line style changes."""
STYLES = ("-", "--", ":", "-.")
MANY_POINTS = 30

DOWN, UP, STEPS, FLOPS, SECONDS = "bytes down", "bytes up", "client steps", "FLOPs", "seconds"
COST = {DOWN: "bytes_down", UP: "bytes_up", STEPS: "client_steps", FLOPS: "flops", SECONDS: "seconds"}


def write(comparison: Comparison, root: Path) -> list[Path]:
    """Write comparison.md, .csv, .json and .png into ``root`` and return the files."""
    root.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.md": markdown(comparison),
        "comparison.csv": as_csv(comparison),
        "comparison.json": json.dumps(plain(comparison), indent=1) + "\n",
    }
    for name, text in texts.items():
        atomic_write(root / name, text.encode())
    picture = io.BytesIO()
    figure(comparison).savefig(picture, format="png")
    atomic_write(root / "comparison.png", picture.getvalue())
    return [root / name for name in (*texts, "comparison.png")]


def plain(comparison: Comparison) -> dict[str, Any]:
    """Return everything as plain values: settings, statistics by metric, and every run with its curve."""
    return {
        "selection": selection(comparison),
        "seeds": list(comparison.seeds),
        "reference": comparison.reference,
        "methods": {label: simulation.plain() for label, simulation in comparison.methods.items()},
        "metrics": {
            metric.name: {
                "lower_is_better": metric.lower_is_better,
                "rows": [asdict(row) for row in comparison.rows(metric)],
            }
            for metric in comparison.metrics
        },
        "runs": [_plain_run(run) for run in comparison.runs],
        "notes": notes(comparison),
    }


def as_csv(comparison: Comparison) -> str:
    """Return a line for each metric and method, numbers as they are (shares, not per cent)."""
    lines = []
    for metric in comparison.metrics:
        for row in comparison.rows(metric):
            runs = comparison.of(row.method)
            line: dict[str, Any] = {"metric": metric.name, "method": row.method, "seeds": len(runs)}
            line["finished"] = sum(run.ok for run in runs)
            line |= {"mean": None, "low": None, "high": None, **(asdict(row.mean) if row.mean else {})}
            line["mean_rank"] = row.rank
            gap = asdict(row.difference) if row.difference else {}
            line |= {f"difference_{k}": gap.get(k) for k in ("mean", "low", "high")}
            line |= {"p_t": row.p_t, "p_t_holm": row.p_t_holm, "p_sign_flip": row.p_flip}
            line["p_sign_flip_holm"] = row.p_flip_holm
            line |= {key: _mean_cost(runs, key) for key in COST.values()}
            line |= {f"seed_{run.seed}": run.values.get(metric.name, run.status) for run in runs}
            lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def markdown(comparison: Comparison) -> str:
    """Return the report as Markdown."""
    blocks = ["# Comparison", f"{selection(comparison)} Reference of the tests: {comparison.reference}."]
    for metric in comparison.metrics:
        rows = [_cells(comparison, metric, row) for row in comparison.rows(metric)]
        blocks.append(f"## {_title(metric)}")
        blocks.append(_markdown_table(_header(comparison), rows))
    blocks += ["## Cost of a run's training", _markdown_table(["method", *COST], _cost_rows(comparison))]
    blocks += ["![Figures by method and by round](comparison.png)", "## Notes"]
    blocks.append("\n".join(f"- {note}" for note in notes(comparison)))
    blocks.append("## Methods\n\n" + "\n".join(_settings(comparison)))
    return "\n\n".join(blocks) + "\n"


def tables(comparison: Comparison) -> list[Table]:
    """Return the tables for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    found = []
    for metric in comparison.metrics:
        rows = [_cells(comparison, metric, row) for row in comparison.rows(metric)]
        # Those of single seeds would not fit; the files have them.
        seeds = len(comparison.seeds)
        found.append((_title(metric), _header(comparison)[:-seeds], [row[:-seeds] for row in rows]))
    found.append(("cost of a run's training", ["method", *COST], _cost_rows(comparison)))
    made = []
    for title, header, rows in found:
        table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
        for position, name in enumerate(header):
            table.add_column(name, justify="left" if position == 0 else "right", no_wrap=position > 0)
        for method, *cells in rows:
            table.add_row(Text(method), *(Text(cell, "red" if "failed" in cell else "") for cell in cells))
        made.append(table)
    return made


def selection(comparison: Comparison) -> str:
    """Return the sentence that says which figure of a run counts."""
    return (
        f"The figure of a run is the mean of its last {comparison.last} evaluations (of all after the first round, "
        "if there are fewer), for every method; never the best one."
    )


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader must know to read the tables."""
    count = len(comparison.seeds)
    said = [
        f"Mean and difference: ± is the two-sided {100 * paired.LEVEL:.0f} % interval by Student's t over {count} "
        "seeds. "
        "The difference is to the reference, seed by seed."
        if count > 1
        else "One seed: there is no interval and no test, and a difference may be chance.",
        "Rank: 1 is best, averaged over the seeds; a failed run ranks last.",
    ]
    if count > 1:
        said.append(
            "p: paired t-test against the reference, corrected by Holm for the number of methods compared."
        )
        fewest = paired.FEWEST_FOR_SIGN_FLIP
        said.append(
            "Sign flip: the exact permutation test within seeds, corrected likewise."
            if fewest <= count <= paired.MOST_FOR_SIGN_FLIP
            else f"No sign-flip test: it is made for {fewest} to {paired.MOST_FOR_SIGN_FLIP} seeds."
        )
    for run in comparison.failed:
        where = f" after round {run.rounds}" if run.rounds else ""
        said.append(
            f"{run.method}, seed {run.seed} {run.status}{where}, so the method has no mean: {run.reason}"
        )
    early = [run for run in comparison.runs if run.status == "stopped"]
    said += [f"{run.method}, seed {run.seed} stopped at round {run.rounds}: {run.reason}" for run in early]
    generic = sorted({run.method for run in comparison.runs if run.generic})
    if generic:
        said.append(f"No personal model, so the figures are the generic one's: {', '.join(generic)}.")
    averaged = {run.evaluations for run in comparison.runs if run.ok}
    if averaged and averaged != {comparison.last}:
        said.append(f"Evaluations averaged: {', '.join(map(str, sorted(averaged)))} of {comparison.last}.")
    makers = sorted({run.made_with for run in comparison.runs if run.made_with})
    if len(makers) > 1:
        said.append(f"The runs were not made with one version: {'; '.join(makers)}.")
    counted = next((run.cost["flops_counted"] for run in comparison.runs), "")
    said.append(f"Cost is the mean over a method's finished runs; without evaluation. FLOPs: {counted}.")
    return said


def figure(comparison: Comparison) -> Figure:
    """Return a row a metric: the methods from best to worst with their runs, and the curves by round.

    There are no curves where no run was evaluated in more than one round.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods, metrics = len(comparison.methods), len(comparison.metrics)
    height = 1.3 + metrics * max(2.4, 0.9 + 0.34 * methods)
    curved = any(len(curve) > 1 for run in comparison.runs for curve in run.curves.values())
    widths = (1.0, 1.25) if curved else (1.0,)
    made = Figure(figsize=(10.5 if curved else 7.5, height), dpi=140, layout="constrained")
    FigureCanvasAgg(made)
    grid = made.subplots(metrics, len(widths), squeeze=False, width_ratios=widths)
    for row, metric in zip(grid, comparison.metrics, strict=True):
        _draw_dots(row[0], comparison, metric)
        if curved:
            _draw_curves(row[1], comparison, metric)
    count = len(comparison.seeds)
    text = f"{_short_settings(comparison)}, {count} seed{'s' if count > 1 else ''}"
    made.suptitle(text, x=0.01, ha="left", fontsize=11, color=INK)
    legend = "mean over seeds, 95 % interval, and each seed below"
    if curved:
        legend = f"left: {legend}; right: mean and range of the seeds"
    made.supxlabel(legend if count > 1 else "one seed", x=0.01, ha="left", fontsize=8, color=INK)
    return made


def _draw_dots(axis: Axes, comparison: Comparison, metric: Metric) -> None:
    """Draw the methods from the best to the worst mean; the failed ones last."""
    rows = comparison.rows(metric)
    sign = 1 if metric.lower_is_better else -1
    ordered = sorted(rows, key=lambda row: (row.mean is None, sign * row.mean.mean if row.mean else row.rank))
    scale = 100 if metric.percent else 1
    for place, row in enumerate(ordered):
        colour, _ = _look(comparison, row.method)
        known = [scale * value for value in row.values if value is not None]
        axis.plot(known, [place + 0.2] * len(known), "o", color=colour, alpha=0.6, markersize=3.5, mew=0)
        if row.mean is not None:
            if row.mean.low is not None and row.mean.high is not None:
                ends = (scale * row.mean.low, scale * row.mean.high)
                axis.plot(ends, (place, place), "-", color=colour, linewidth=2)
            axis.plot(scale * row.mean.mean, place, "o", color=colour, markersize=7)
        else:
            axis.annotate(
                _failures(comparison.of(row.method)),
                (0.98, place),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=8,
                color=BAD,
            )
        if row.method == comparison.reference and row.mean is not None:
            axis.axvline(scale * row.mean.mean, color=colour, linewidth=0.8, linestyle=":", zorder=0)
    axis.set_yticks(range(len(ordered)), [row.method for row in ordered])
    for label, row in zip(axis.get_yticklabels(), ordered, strict=True):
        label.set_color(_look(comparison, row.method)[0])
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    axis.set_title(_title(metric), loc="left", color=INK, fontsize=9)
    _style(axis, "x")


def _draw_curves(axis: Axes, comparison: Comparison, metric: Metric) -> None:
    """Draw each method's mean by round, with the range of its seeds as the band.

    A method with a failed run has no mean here either: its runs are drawn one by one, up to where they broke.
    """
    scale = 100 if metric.percent else 1
    for method in comparison.methods:
        colour, style = _look(comparison, method)
        runs = comparison.of(method)
        if not all(run.ok for run in runs):
            for number, run in enumerate(runs):
                points = [(r, scale * v) for r, v in run.curves.get(metric.name, ()) if math.isfinite(v)]
                if points:
                    label = f"{method} (each run)" if number == 0 else None
                    axis.plot(*zip(*points, strict=True), style, color=colour, linewidth=0.8, label=label)
                    if not run.ok:
                        axis.plot(*points[-1], "x", color=BAD, markersize=7, zorder=5)
            continue
        by_round = _by_round(runs, metric)
        means = [scale * math.fsum(values) / len(values) for values in by_round.values()]
        low, high = ([scale * pick(values) for values in by_round.values()] for pick in (min, max))
        marker = "o" if len(by_round) <= MANY_POINTS else ""
        axis.plot(
            list(by_round),
            means,
            style,
            color=colour,
            linewidth=1.6,
            marker=marker,
            markersize=3,
            label=method,
        )
        axis.fill_between(list(by_round), low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_xlabel("round", color=INK, fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    _style(axis, "both")
    if axis.lines:
        axis.legend(frameon=False, fontsize=8, loc="best", ncols=1 + len(axis.lines) // 7)


def _by_round(runs: Sequence[Run], metric: Metric) -> dict[int, list[float]]:
    """Return the figures of all runs at each round in which all of them were evaluated."""
    curves = [dict(run.curves[metric.name]) for run in runs]
    shared = [r for r in curves[0] if all(r in curve for curve in curves)]
    return {r: [curve[r] for curve in curves] for r in shared}


def _look(comparison: Comparison, method: str) -> tuple[str, str]:
    place = list(comparison.methods).index(method)
    return COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]


def _style(axis: Axes, grid: str) -> None:
    axis.tick_params(labelsize=8)
    axis.grid(True, axis=grid, color=LINES, linewidth=0.7)  # type: ignore[arg-type]
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#999999")


def _header(comparison: Comparison) -> list[str]:
    many = len(comparison.seeds) > 1
    header = ["method", "mean", "rank", f"minus {comparison.reference}"]
    header += ["p (Holm)"] if many else []
    header += ["sign flip (Holm)"] if _sign_flips(comparison) else []
    return [*header, *(f"seed {seed}" for seed in comparison.seeds)]


def _cells(comparison: Comparison, metric: Metric, row: Row) -> list[str]:
    cells = [row.method]
    cells.append(_interval(row.mean, metric) if row.mean else _failures(comparison.of(row.method)))
    cells.append(f"{row.rank:.2g}")
    cells.append(
        "reference" if row.method == comparison.reference else _interval(row.difference, metric, "+")
    )
    if len(comparison.seeds) > 1:
        cells.append(_p(row.p_t_holm))
    if _sign_flips(comparison):
        cells.append(_p(row.p_flip_holm))
    cells += [run.status if v is None else _number(v, metric)
              for run, v in zip(comparison.of(row.method), row.values, strict=True)]  # fmt: skip
    return cells


def _cost_rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for method in comparison.methods:
        means = [_mean_cost(comparison.of(method), key) for key in COST.values()]
        rows.append([method, *("-" if mean is None else _engineering(mean) for mean in means)])
    return rows


def _mean_cost(runs: Iterable[Run], key: str) -> float | None:
    known = [run.cost["train"].get(key) for run in runs if run.ok]
    if not known or None in known:
        return None
    return math.fsum(value for value in known if value is not None) / len(known)


def _plain_run(run: Run) -> dict[str, Any]:
    return {**asdict(run), "ok": run.ok}


def _failures(runs: Sequence[Run]) -> str:
    return f"{sum(not run.ok for run in runs)} of {len(runs)} failed"


def _sign_flips(comparison: Comparison) -> bool:
    return paired.FEWEST_FOR_SIGN_FLIP <= len(comparison.seeds) <= paired.MOST_FOR_SIGN_FLIP


def _title(metric: Metric) -> str:
    where = "on the clients' test data" if metric.name != metric.key else "on the test set"
    return f"{metric.key} {where}{', %' if metric.percent else ''}{' (lower is better)' * metric.lower_is_better}"


def _settings(comparison: Comparison) -> list[str]:
    """Return a line a method: its strategy's options, and where it differs from the reference otherwise."""
    base = _flat(comparison.methods[comparison.reference].plain())
    lines = []
    for label, simulation in comparison.methods.items():
        own = _flat(simulation.plain())
        differs = {k: v for k, v in own.items() if base.get(k) != v or k.startswith("strategy.")}
        shown = " ".join(f"{key.removesuffix('.name')}={value}" for key, value in differs.items())
        lines.append(f"- {label}: `{shown}`")
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _short_settings(comparison: Comparison) -> str:
    first = next(iter(comparison.methods.values()))
    federation = first.federation
    cohort = federation.cohort or federation.clients
    options = ", ".join(f"{k} {v}" for k, v in first.partition.options.items() if k == "alpha")
    split = f"{first.partition.name}{f' ({options})' if options else ''}"
    return f"{first.dataset.name}, {split}, {federation.clients} clients, {cohort} a round"


def _interval(interval: paired.Interval | None, metric: Metric, sign: str = "") -> str:
    if interval is None:
        return "-"
    text = _number(interval.mean, metric, sign)
    return text if interval.high is None else f"{text} ± {_number(interval.high - interval.mean, metric)}"


def _number(value: float, metric: Metric, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" if metric.percent else f"{value:{sign}.4g}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _engineering(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
