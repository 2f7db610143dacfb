"""The parts of a report that are about several runs: a sweep, a folder of runs, a comparison of methods."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowerbed.experiments import paired
from flowerbed.experiments.comparison import ON_CLIENTS, Metric
from flowerbed.experiments.report import GOOD as ENDED_WELL
from flowerbed.experiments.report import JOBS
from flowerbed.experiments.reports import charts
from flowerbed.experiments.reports.charts import Axis, Dot, Series
from flowerbed.experiments.reports.collect import (
    COMPARISON,
    SWEEP,
    RunFiles,
    read_json,
    read_run,
    runs_below,
)
from flowerbed.experiments.reports.page import (
    BAD,
    GOOD,
    MUTED,
    WARN,
    Block,
    Cell,
    Column,
    Fold,
    Note,
    Part,
    Section,
    Table,
    Tile,
    Tiles,
)
from flowerbed.experiments.reports.run import describe
from flowerbed.experiments.reports.wording import (
    cell,
    counted,
    finite,
    flat,
    heading,
    interval,
    is_share,
    number,
    seconds,
    size,
)
from flowerbed.server.callbacks import CLIENTS, SERVER

PREFERRED = ("accuracy", f"{ON_CLIENTS}accuracy-mean", f"{ON_CLIENTS}accuracy", "loss")
"""Metrics by which settings are ranked: the first that the runs have."""
COLUMNS = (*PREFERRED, f"{ON_CLIENTS}accuracy-worst", "ece")
"""Metrics that have a column in the tables."""
NEUTRAL = ("run.", "tracking.", "data.dir", "data.cache", "data.download")
"""Settings that make no difference between runs."""
MOST_RUNS = 2000
MOST_DRAWN = 200
"""Settings that are drawn; of more the best ones."""
MOST_DOTS = 40
OWN_COLOUR = 6
"""Settings that have a colour of their own; more are shaded by their rank."""
LEADERS = 3


@dataclass(frozen=True)
class Member:
    """A run of a sweep."""

    name: str
    settings: Mapping[str, Any]
    """All of them, by dotted keys."""
    seed: Any
    status: str
    reason: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    """The figures that count."""
    curves: Mapping[str, tuple[Sequence[float], Sequence[float | None]]] = field(default_factory=dict)
    seconds: float | None = None
    bytes: float | None = None
    about: str = ""

    @property
    def ok(self) -> bool:
        """Whether its figures count."""
        return self.status in ENDED_WELL


@dataclass(frozen=True)
class Setting:
    """The runs that differ in nothing but their seed."""

    key: str
    label: str
    differing: Mapping[str, Any]
    members: Sequence[Member]

    def values(self, metric: str) -> list[float | None]:
        """Return the figure of each seed; None for a run that did not end well."""
        return [m.values.get(metric) if m.ok else None for m in self.members]

    def mean(self, metric: str) -> paired.Interval | None:
        """Return the mean with its interval; None unless every seed has one."""
        return paired.t_interval(self.values(metric))


def sweep_part(directory: Path) -> Part:
    """Return everything that can be shown of a sweep or a folder of runs."""
    missing: list[str] = []
    folders = runs_below(directory)
    if len(folders) > MOST_RUNS:
        missing.append(f"The first {number(MOST_RUNS)} of {number(len(folders))} runs are shown.")
    runs = [read_run(folder) for folder in folders[:MOST_RUNS]]
    members = [member(run, str(run.directory.relative_to(directory))) for run in runs]
    members += _never_started(directory, {m.name for m in members}, missing)
    if (directory / "runs").is_dir() and not (directory / JOBS).exists():
        missing.append(
            "Neither comparison.json nor matrix.json is there: it is still going on, or was interrupted; what is there "
            "of its runs is shown as a sweep."
        )
    return runs_part(members, f"Sweep {directory.resolve().name}", str(directory), runs, missing)


def runs_part(
    members: Sequence[Member], title: str, subtitle: str, runs: Sequence[RunFiles], missing: Sequence[str]
) -> Part:
    """Return the part about several runs, however they came together."""
    said = [
        *missing,
        *(f"{run.directory.name}: {text}" for run in runs for text in run.missing if _matters(text)),
    ]
    if len(said) > 20:
        said = [
            *said[:20],
            f"… and {len(said) - 20} further remarks; a report of a single run has all of its own.",
        ]
    metric = next((name for name in PREFERRED if any(name in m.values for m in members)), None)
    settings = grouped(members)
    about = f"{counted(len(members), 'run')} of {counted(len(settings), 'setting')}"
    common = describe(runs[0]) if runs else ""
    sections = [
        Section("Outcome", _outcome(members, settings, metric)),
        Section("Settings", _tables(members, settings, metric)),
        Section("Curves", _curves(settings, metric)),
        Section("What made the difference", _differences(settings, metric)),
    ]
    return Part(SWEEP, title, f"{subtitle} · {about} · first: {common}", sections, said)


def _matters(text: str) -> bool:
    return not text.startswith(("partition.npz", "The clients' own test data", "Single clients' figures"))


def member(run: RunFiles, name: str) -> Member:
    """Return a run as one of several."""
    curves: dict[str, tuple[Sequence[float], Sequence[float | None]]] = {}
    for phase, prefix in ((SERVER, ""), (CLIENTS, ON_CLIENTS)):
        records = run.of(phase)
        for metric in PREFERRED:
            own = metric.removeprefix(ON_CLIENTS)
            found = [(float(r.round), finite(r.metrics[own])) for r in records if own in r.metrics]
            if metric == prefix + own and found:
                curves[metric] = ([at for at, _ in found], [v for _, v in found])
    summary = run.summary
    traffic = sum(r.bytes_down + r.bytes_up for r in run.records)
    wall = finite(summary.get("wall_seconds")) or math.fsum(r.seconds for r in run.records)
    status = run.status
    values = run.selected()
    if status in ENDED_WELL and not values and run.records:
        status = "diverged"
    return Member(
        name,
        flat(run.config),
        run.config.get("seed"),
        status,
        str(summary.get("reason") or ""),
        values,
        curves,
        wall,
        float(traffic),
        describe(run),
    )


def _never_started(directory: Path, found: set[str], missing: list[str]) -> list[Member]:
    """Return the jobs of a sweep that left no run."""
    path = directory / JOBS
    members = []
    for place, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else (), 1):
        try:
            job = json.loads(line)
            name, overrides = Path(str(job["directory"])).name, [str(text) for text in job["overrides"]]
        except (ValueError, TypeError, KeyError):
            missing.append(f"{JOBS} has a line {place} that cannot be read; left out.")
            continue
        if name not in found:
            settings = {
                key.lstrip("+~"): value for key, _, value in (text.partition("=") for text in overrides)
            }
            reason = str(job.get("reason") or "it left no directory")
            members.append(
                Member(name, settings, settings.get("seed"), str(job.get("status", "failed")), reason)
            )
            missing.append(f"Job {name} left no run: {reason.strip().splitlines()[0]}")
    return members


def grouped(members: Sequence[Member]) -> list[Setting]:
    """Return the members by what they differ in besides the seed, in the order in which they came."""
    keys = [k for k in dict.fromkeys(k for m in members for k in m.settings) if _counts(k)]
    # What a run does not have (an option of another strategy, or no configuration at all) is no difference in itself.
    differing = [k for k in keys if len({_text(m.settings[k]) for m in members if k in m.settings}) > 1]
    groups: dict[tuple[str, ...], list[Member]] = {}
    for m in members:
        groups.setdefault(tuple(_text(m.settings.get(k)) for k in differing), []).append(m)
    settings = []
    for place, found in enumerate(groups.values()):
        own = {k: found[0].settings[k] for k in differing if k in found[0].settings}
        settings.append(Setting(f"s{place}", _label(own), own, found))
    return settings


def _counts(key: str) -> bool:
    return key != "seed" and not key.startswith(NEUTRAL)


def _label(differing: Mapping[str, Any]) -> str:
    shown = [f"{_short(k, differing)}={_text(value)}" for k, value in differing.items()]
    return ", ".join(shown) or "the only setting"


def _short(key: str, others: Iterable[str]) -> str:
    """Return the last part of a key where no other one ends alike: lr for local.lr."""
    bare = key.removesuffix(".name")
    last = bare.rpartition(".")[2]
    return last if sum(k.removesuffix(".name").rpartition(".")[2] == last for k in others) == 1 else bare


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def ranked(settings: Sequence[Setting], metric: str) -> list[tuple[Setting, paired.Interval]]:
    """Return the settings that have a mean, from the best one."""
    known = [(s, mean) for s in settings if (mean := s.mean(metric)) is not None]
    sign = 1 if Metric(metric).lower_is_better else -1
    return sorted(known, key=lambda pair: sign * pair[1].mean)


def _outcome(members: Sequence[Member], settings: Sequence[Setting], metric: str | None) -> list[Block]:
    ended = sum(m.ok for m in members)
    tiles = [
        Tile(
            "runs",
            number(len(members)),
            f"{number(ended)} ended well",
            GOOD if ended == len(members) else WARN,
        ),
        Tile("settings", number(len(settings)), "that differ in more than the seed"),
    ]
    spent = [m.seconds for m in members if m.seconds is not None]
    tiles.append(Tile("time", seconds(math.fsum(spent)), "of all runs, one after the other"))
    blocks: list[Block] = [Tiles(tiles)]
    if metric is None:
        return [*blocks, Note("No run has a figure to compare: nothing was evaluated.", WARN)]
    order = ranked(settings, metric)
    if not order:
        return [
            *blocks,
            Note("No setting has a mean: in each of them a run failed or was not evaluated.", BAD),
        ]
    best, mean = order[0]
    rule = "least" if Metric(metric).lower_is_better else "largest"
    tiles.insert(
        0,
        Tile(f"best by rule: {metric}", number(mean.mean, is_share(metric)), best.label, GOOD),
    )
    overlapping = [s.label for s, other in order[1:] if _overlap(mean, other)]
    text = (
        "The rule: a run's figure is the mean of its last evaluations, never the best one; a setting's is the mean "
        f"over its seeds, and the {rule} wins. {best.label}: "
        f"{interval(mean.mean, mean.low, mean.high, is_share(metric))} over {counted(len(best.members), 'seed')}."
    )
    if mean.low is None:
        text += " With one seed there is no interval, and a difference may be chance."
    elif overlapping:
        more = f" and {len(overlapping) - 3} more" if len(overlapping) > 3 else ""
        text += f" Its interval overlaps with that of {'; '.join(overlapping[:3])}{more}."
    if len(order) > 1:
        text += " Chosen among several on the figure it is judged by, it is a little flattered."
    return [*blocks, Note(text)]


def _overlap(a: paired.Interval, b: paired.Interval) -> bool:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low <= b.high and b.low <= a.high


def _tables(members: Sequence[Member], settings: Sequence[Setting], metric: str | None) -> list[Block]:
    metrics = _shown(COLUMNS, members)
    keys = list(dict.fromkeys(k for s in settings for k in s.differing))
    order = {s.key: place for place, (s, _) in enumerate(ranked(settings, metric))} if metric else {}
    by_rank = sorted(settings, key=lambda s: order.get(s.key, len(settings)))
    rows = []
    for s in by_rank:
        place = order.get(s.key)
        ended = sum(m.ok for m in s.members)
        row = [Cell("–" if place is None else str(place + 1), place)]
        row += [_choice(s, k) for k in keys]
        row.append(Cell(f"{ended} of {len(s.members)}", ended, "" if ended == len(s.members) else BAD))
        for name in metrics:
            mean = s.mean(name)
            text = interval(mean.mean, mean.low, mean.high, is_share(name)) if mean else "–"
            row.append(Cell(text, mean.mean if mean else None))
        spent = [m.seconds for m in s.members if m.seconds is not None]
        row.append(
            Cell(
                seconds(sum(spent) / len(spent)) if spent else "–", sum(spent) / len(spent) if spent else None
            )
        )
        rows.append(row)
    columns = [Column("rank", True), *(Column(k, _numeric(settings, k)) for k in keys), Column("ended", True)]
    columns += [*(Column(name, True) for name in metrics), Column("seconds", True)]
    note = (
        "Means over seeds with their two-sided 95 % interval by Student's t; a setting with a failed run has none. "
        "The charts below show what the filter leaves."
    )
    table = Table("Settings", columns, rows, "settings", [s.key for s in by_rank], note)
    return [table, Fold("Every run", [_runs_table(settings, metrics, keys)], counted(len(members), "run"))]


def _shown(names: Sequence[str], members: Sequence[Member]) -> list[str]:
    """Return the metrics that some run has; that of all clients' samples only where there is no mean over clients."""
    known = [name for name in dict.fromkeys(names) if any(name in m.values for m in members)]
    pooled, mean = f"{ON_CLIENTS}accuracy", f"{ON_CLIENTS}accuracy-mean"
    return [name for name in known if name != pooled or mean not in known]


def _runs_table(settings: Sequence[Setting], metrics: Sequence[str], keys: Sequence[str]) -> Table:
    rows = []
    for s in settings:
        for m in s.members:
            status = (
                m.status if m.ok or not m.reason else f"{m.status}: {m.reason.strip().splitlines()[0][:160]}"
            )
            rows.append(
                [
                    Cell(m.name, m.name),
                    *(_choice(s, k) for k in keys),
                    cell(m.seed),
                    Cell(status, m.status, "" if m.ok else BAD),
                    *(cell(m.values.get(name), is_share(name)) for name in metrics),
                    Cell(seconds(m.seconds), m.seconds),
                    Cell("–" if m.bytes is None else size(m.bytes), m.bytes),
                ]
            )
    columns = [
        Column("run"),
        *(Column(k, _numeric(settings, k)) for k in keys),
        Column("seed", True),
        Column("status"),
    ]
    columns += [*(Column(name, True) for name in metrics), Column("seconds", True), Column("payload", True)]
    return Table("Runs", columns, rows)


def _choice(s: Setting, key: str) -> Cell:
    return Cell("–", None) if key not in s.differing else cell(_plain(s.differing[key]))


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else _text(value)


def _numeric(settings: Sequence[Setting], key: str) -> bool:
    return all(finite(s.differing[key]) is not None for s in settings if key in s.differing)


def _curves(settings: Sequence[Setting], metric: str | None) -> list[Block]:
    blocks: list[Block] = []
    for name in _shown(PREFERRED, [m for s in settings for m in s.members]):
        found = [s for s in settings if any(name in m.curves for m in s.members)]
        if not found:
            continue
        order = [s for s, _ in ranked(found, name)]
        order += [s for s in found if s not in order]
        dropped = len(order) - MOST_DRAWN
        shown = order[:MOST_DRAWN]
        # A setting keeps its colour whatever it is ranked by.
        slots = {s.key: place for place, s in enumerate(settings)}
        many = len(settings) > OWN_COLOUR
        series = [
            _mean_curve(s, name, place, len(shown), slots[s.key], many) for place, s in enumerate(shown)
        ]
        summary = f"Mean over seeds of {counted(len(shown), 'setting')}; the band is the range of the seeds."
        if many:
            summary += (
                f" The best {LEADERS} by rule have colours; the others are the darker the better they end up "
                "(in dark colours: the lighter)."
            )
        if dropped > 0:
            summary += f" The {number(dropped)} worst are not drawn."
        chart = charts.lines(
            name.removeprefix(ON_CLIENTS).capitalize()
            + (" (clients)" if name.startswith(ON_CLIENTS) else ""),
            # The best ones are drawn last, on top.
            series[::-1],
            summary,
            y=name,
            percent=is_share(name),
            follows="settings",
            height=400 if name == metric else 320,
            wide=name == metric,
        )
        blocks += [] if chart is None else [chart]
    return blocks


def _mean_curve(s: Setting, name: str, place: int, count: int, slot: int, many: bool) -> Series:
    curves = [dict(zip(*m.curves[name], strict=True)) for m in s.members if name in m.curves]
    rounds = sorted(set.intersection(*(set(c) for c in curves)))
    columns = [[v for c in curves if (v := finite(c[at])) is not None] for at in rounds]
    means = [math.fsum(v) / len(v) if len(v) == len(curves) else None for v in columns]
    banded = len(curves) > 1 and (not many or place < LEADERS)
    low, high = ([pick(v) if v else None for v in columns] if banded else [] for pick in (min, max))
    faint = many and place >= LEADERS
    shade = min(4, int(5 * (1 - place / max(count, 1))))
    return Series(
        s.label,
        rounds,
        means,
        place if many else slot,
        low,
        high,
        "the range of the seeds" if banded else "",
        faint=faint,
        dash="solid" if faint else "",
        colour=f"@ramp{shade}" if faint else "",
        row=s.key,
        points=not many,
    )


def _differences(settings: Sequence[Setting], metric: str | None) -> list[Block]:
    if metric is None or not settings:
        return []
    order = ranked(settings, metric)
    slots = {s.key: place for place, s in enumerate(settings)}
    rows = [
        Dot(s.label, mean.mean, mean.low, mean.high, s.values(metric), slots[s.key], row=s.key)
        for s, mean in order[:MOST_DOTS]
    ]
    broken = [s for s in settings if s.mean(metric) is None]
    rows += [
        Dot(s.label, None, values=[v for v in s.values(metric) if v is not None], slot=slots[s.key],
            said=f"{sum(not m.ok for m in s.members)} of {len(s.members)} failed", row=s.key)
        for s in broken[: max(0, MOST_DOTS - len(rows))]
    ]  # fmt: skip
    cut = len(order) + len(broken) - len(rows)
    blocks: list[Block | None] = []
    keys = list(dict.fromkeys(k for s, _ in order for k in s.differing))
    if len(order) > 1 and len(keys) > 1:
        blocks.append(_parallel(order, keys, metric))
    if len(keys) == 1 and len(order) > 2 and _numeric([s for s, _ in order], keys[0]):
        blocks.append(_by_value(order, keys[0], metric))
    blocks.append(
        charts.dots(
            f"{heading(metric)} by setting",
            rows,
            "From the best to the worst mean over seeds, with the 95 % interval; small points are single seeds."
            + (f" {number(cut)} further settings are in the table." if cut > 0 else ""),
            x=metric,
            percent=is_share(metric),
            follows="settings",
        )
    )
    return [block for block in blocks if block is not None]


def _by_value(order: Sequence[tuple[Setting, paired.Interval]], key: str, metric: str) -> Block | None:
    points = sorted((float(s.differing[key]), mean) for s, mean in order)
    xs = [x for x, _ in points]
    logarithmic = min(xs) > 0 and max(xs) / min(xs) >= 8
    chart = charts.lines(
        f"{heading(metric)} by {key}",
        [Series(metric, xs, [m.mean for _, m in points], 0,
                [m.low for _, m in points], [m.high for _, m in points], "95 % interval")],
        f"Mean over seeds at each value of {key}; the band is the 95 % interval.",
        x=key,
        y=metric,
        percent=is_share(metric),
        legend=False,
    )  # fmt: skip
    if chart is not None and logarithmic:
        layout = dict(chart.figure["layout"])
        layout["xaxis"] = {
            **layout["xaxis"],
            "type": "log",
            "tickvals": xs,
            "ticktext": [number(x) for x in xs],
        }
        layout["hovermode"] = "closest"
        figure = {**chart.figure, "layout": layout}
        return charts.replaced(chart, figure)
    return chart


def _parallel(order: Sequence[tuple[Setting, paired.Interval]], keys: Sequence[str], metric: str) -> Block:
    """Return parallel coordinates of what differs, and of the figure."""
    shown = order[:MOST_DRAWN]
    settings = [s for s, _ in shown]
    axes = [_axis(k, [s.differing.get(k, "–") for s in settings]) for k in keys]
    figures = [mean.mean for _, mean in shown]
    axes.append(_axis(metric, figures, is_share(metric)))
    sign = -1 if Metric(metric).lower_is_better else 1
    places = np.argsort(np.argsort([sign * v for v in figures]))
    shades = (places / max(len(places) - 1, 1)).tolist()
    names = [f"{s.label}: {number(mean.mean, is_share(metric))}" for s, mean in shown]
    dropped = len(order) - len(shown)
    return charts.parallel(
        "Settings and what came of them",
        axes,
        names,
        shades,
        [s.key for s in settings],
        f"A line is a setting; its crossings are its values and its {metric}. The thick one is the best by rule, "
        f"{settings[0].label} with {number(figures[0], is_share(metric))}."
        + (f" The {number(dropped)} worst are not drawn." if dropped else "")
        + " The numbers are in the table of settings.",
        follows="settings",
        best=0,
    )


def _axis(name: str, values: Sequence[Any], percent: bool = False) -> Axis:
    known = [finite(v) for v in values]
    distinct = sorted({v for v in known if v is not None})
    if len(distinct) > 1 and all(v is not None for v in known):
        if len(distinct) <= 6 and not percent:
            # Few values are spread evenly, as on a scale of choices.
            place = {v: i / (len(distinct) - 1) for i, v in enumerate(distinct)}
            return Axis(
                name, [place[v] for v in known if v is not None], {place[v]: number(v) for v in distinct}
            )
        low, high = distinct[0], distinct[-1]
        ticks = {i / 4: number(low + i / 4 * (high - low), percent) for i in range(5)}
        return Axis(name, [(v - low) / (high - low) for v in known if v is not None], ticks)
    texts = [_text(v) for v in values]
    choices = sorted(set(texts))
    if len(choices) == 1:
        return Axis(name, [0.5] * len(texts), {0.5: choices[0]})
    where = {text: i / (len(choices) - 1) for i, text in enumerate(choices)}
    step = -(-len(choices) // 12)
    return Axis(name, [where[t] for t in texts], {where[t]: t for t in choices[::step]})


# ---- comparisons ----------------------------------------------------------------------------------------------------


def comparison_part(directory: Path) -> Part:
    """Return a comparison as ``flowerbed compare`` judged it, with its curves and costs."""
    missing: list[str] = []
    found = read_json(directory / "comparison.json", missing)
    if not isinstance(found, Mapping) or not isinstance(found.get("metrics"), Mapping):
        missing.append("comparison.json is not whole; its runs are shown as a sweep instead.")
        part = sweep_part(directory)
        return Part(part.kind, part.title, part.subtitle, part.sections, [*missing, *part.missing])
    runs = [r for r in found.get("runs", ()) if isinstance(r, Mapping)]
    methods, reference = list(found.get("methods", {})), str(found.get("reference", ""))
    slots = {m: place for place, m in enumerate(methods)}
    sections = [Section("Outcome", _compared(found, runs))]
    for name, judged in found["metrics"].items():
        rows = [r for r in judged.get("rows", ()) if isinstance(r, Mapping)]
        blocks: list[Block | None] = [
            _method_table(name, rows, runs, reference),
            _method_dots(name, rows, slots, reference, runs),
            _method_curves(name, methods, runs, slots),
        ]
        sections.append(Section(heading(name), [b for b in blocks if b is not None]))
    sections.append(Section("Cost", _method_costs(methods, runs)))
    notes = [str(text) for text in (found.get("selection", ""), *found.get("notes", ())) if text]
    sections.append(Section("How to read it", [Note("\n".join(notes))] if notes else []))
    sections.append(Section("Methods", _method_settings(found, methods, reference)))
    for r in runs:
        if not r.get("ok", True):
            missing.append(f"{r.get('method')}, seed {r.get('seed')} {r.get('status')}: {r.get('reason')}")
    subtitle = f"{directory} · {counted(len(methods), 'method')}, seeds {', '.join(map(str, found.get('seeds', ())))}"
    return Part(COMPARISON, f"Comparison {directory.resolve().name}", subtitle, sections, missing)


def _compared(found: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[Block]:
    tiles = []
    for name, judged in found["metrics"].items():
        rows = [r for r in judged.get("rows", ()) if r.get("mean")]
        sign = 1 if judged.get("lower_is_better") else -1
        for best in sorted(rows, key=lambda r: sign * r["mean"]["mean"])[:1]:
            mean = best["mean"]
            text = interval(mean["mean"], mean["low"], mean["high"], is_share(name))
            tiles.append(
                Tile(
                    f"best by rule: {name}",
                    number(mean["mean"], is_share(name)),
                    f"{best['method']}, {text}",
                    GOOD,
                )
            )
    ended = sum(bool(r.get("ok", True)) for r in runs)
    tiles.append(Tile("runs", number(len(runs)), f"{ended} ended well", GOOD if ended == len(runs) else BAD))
    return [Tiles(tiles)]


def _method_table(
    name: str, rows: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], reference: str
) -> Table:
    seeds = sorted({r.get("seed") for r in runs}, key=str)
    flips = any(r.get("p_flip_holm") is not None for r in rows)
    body = []
    for r in rows:
        mean, gap = r.get("mean") or {}, r.get("difference") or {}
        share = is_share(name)
        failed = sum(not one.get("ok", True) for one in runs if one.get("method") == r["method"])
        line = [
            Cell(str(r["method"]), str(r["method"])),
            Cell(interval(mean.get("mean"), mean.get("low"), mean.get("high"), share) if mean else f"{failed} failed",
                 mean.get("mean"), "" if mean else BAD),
            cell(r.get("rank")),
            Cell("reference" if r["method"] == reference else
                 interval(gap.get("mean"), gap.get("low"), gap.get("high"), share), gap.get("mean"),
                 mark=_marked(gap)),
            _p(r.get("p_t_holm")),
        ]  # fmt: skip
        line += [_p(r.get("p_flip_holm"))] if flips else []
        line += [cell(v, share) for v in r.get("values", ())]
        body.append(line)
    heads = [Column("method"), Column("mean", True), Column("rank", True), Column(f"minus {reference}", True)]
    heads += [Column("p (Holm)", True), *([Column("sign flip (Holm)", True)] if flips else [])]
    heads += [Column(f"seed {seed}", True) for seed in seeds]
    key = "methods-" + "".join(c if c.isalnum() else "-" for c in name)
    return Table(f"{heading(name)} by method", heads, body, key, [str(r["method"]) for r in rows])


def _marked(gap: Mapping[str, Any]) -> tuple[float, float, float] | None:
    ends = tuple(finite(gap.get(key)) for key in ("mean", "low", "high"))
    return None if None in ends else ends  # type: ignore[return-value]


def _p(value: Any) -> Cell:
    known = finite(value)
    if known is None:
        return Cell("–", None)
    return Cell("< 0.001" if known < 0.001 else f"{known:.3f}", known, GOOD if known < 0.05 else "")


def _method_dots(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    slots: Mapping[str, int],
    reference: str,
    runs: Sequence[Mapping[str, Any]],
) -> Block | None:
    sign = 1 if Metric(name).lower_is_better else -1
    ordered = sorted(
        rows, key=lambda r: (not r.get("mean"), sign * r["mean"]["mean"] if r.get("mean") else 0)
    )
    shown = []
    for r in ordered:
        mean = r.get("mean") or {}
        failed = sum(not one.get("ok", True) for one in runs if one.get("method") == r["method"])
        shown.append(
            Dot(str(r["method"]), mean.get("mean"), mean.get("low"), mean.get("high"),
                [v for v in r.get("values", ()) if v is not None], slots.get(str(r["method"]), 0),
                f"{failed} failed" if failed else "", str(r["method"]))
        )  # fmt: skip
    base = next((r["mean"]["mean"] for r in rows if r["method"] == reference and r.get("mean")), None)
    return charts.dots(
        f"{heading(name)}: methods from best to worst",
        shown,
        "Mean over seeds with the 95 % interval; small points are single seeds.",
        x=name,
        percent=is_share(name),
        rules={} if base is None else {reference: base},
        follows="methods-" + "".join(c if c.isalnum() else "-" for c in name),
    )


def _method_curves(
    name: str, methods: Sequence[str], runs: Sequence[Mapping[str, Any]], slots: Mapping[str, int]
) -> Block | None:
    series = []
    for method in methods:
        own = [r for r in runs if r.get("method") == method]
        curves = [dict(map(tuple, c)) for r in own if (c := (r.get("curves") or {}).get(name))]
        if not curves:
            continue
        if not all(r.get("ok", True) for r in own):
            # A method with a failed run has no mean here either: its runs are drawn one by one.
            for r in own:
                points = [(float(a), finite(b)) for a, b in (r.get("curves") or {}).get(name, ())]
                label = f"{method}, seed {r.get('seed')}"
                series.append(
                    Series(label, [a for a, _ in points], [b for _, b in points], slots[method], row=method)
                )
            continue
        rounds = sorted(set.intersection(*(set(c) for c in curves)))
        columns = [[v for c in curves if (v := finite(c[at])) is not None] for at in rounds]
        means = [math.fsum(v) / len(v) if len(v) == len(curves) else None for v in columns]
        low, high = ([pick(v) if v else None for v in columns] for pick in (min, max))
        series.append(
            Series(
                method,
                [float(at) for at in rounds],
                means,
                slots[method],
                low,
                high,
                "the range of the seeds",
                row=method,
            )
        )
    return charts.lines(
        f"{heading(name)} by round",
        series,
        "Mean over seeds; the band is the range of the seeds. A method with a failed run is drawn run by run.",
        y=name,
        percent=is_share(name),
        height=400,
        follows="methods-" + "".join(c if c.isalnum() else "-" for c in name),
    )


def _method_costs(methods: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> list[Block]:
    keys = {"bytes down": "bytes_down", "bytes up": "bytes_up", "client steps": "client_steps", "FLOPs": "flops",
            "seconds": "seconds"}  # fmt: skip
    rows = []
    for method in methods:
        own = [
            (r.get("cost") or {}).get("train") or {}
            for r in runs
            if r.get("method") == method and r.get("ok", True)
        ]
        row = [Cell(method, method)]
        for label, key in keys.items():
            values = [finite(c.get(key)) for c in own]
            known = [v for v in values if v is not None]
            mean = math.fsum(known) / len(known) if known and len(known) == len(values) else None
            text = "–" if mean is None else size(mean) if "bytes" in label else f"{mean:.3g}"
            row.append(Cell(seconds(mean) if label == "seconds" else text, mean))
        rows.append(row)
    if not rows:
        return []
    heads = [Column("method"), *(Column(label, True) for label in keys)]
    return [Table("Cost of a run's training", heads, rows, filtered=False)]


def _method_settings(found: Mapping[str, Any], methods: Sequence[str], reference: str) -> list[Block]:
    settings = {m: flat(found["methods"][m]) for m in methods if isinstance(found["methods"].get(m), Mapping)}
    keys = [
        k for k in dict.fromkeys(k for own in settings.values() for k in own) if not k.startswith(NEUTRAL)
    ]
    differing = [k for k in keys if k != "seed" and len({_text(own.get(k)) for own in settings.values()}) > 1]
    if not differing:
        return []
    rows = [
        [
            Cell(k, k),
            *(
                Cell(_text(own.get(k)) if k in own else "–", _text(own.get(k, "")))
                for own in settings.values()
            ),
        ]
        for k in differing
    ]
    heads = [Column("key"), *(Column(m) for m in settings)]
    tone = MUTED
    return [Note(f"Settings in which the methods differ; {reference} is the reference of the tests.", tone),
            Table("Where the methods differ", heads, rows)]  # fmt: skip
