"""The part of a report that is about one run."""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.metrics import evaluations
from flowerbed.experiments.report import GOOD as ENDED_WELL
from flowerbed.experiments.reports import charts
from flowerbed.experiments.reports.charts import Series
from flowerbed.experiments.reports.collect import RUN, UNFINISHED, RunFiles
from flowerbed.experiments.reports.page import (
    BAD,
    GOOD,
    MUTED,
    WARN,
    Block,
    Cell,
    Chart,
    Column,
    Fold,
    Note,
    Part,
    Picture,
    Section,
    Table,
    Tile,
    Tiles,
)
from flowerbed.experiments.reports.wording import (
    cell,
    counted,
    finite,
    flat,
    is_share,
    number,
    seconds,
    size,
)
from flowerbed.server.by_client import BY_CLIENT, CLIENTS_ASKED, LEVELS, QUANTILES
from flowerbed.server.callbacks import CLIENTS, SERVER, Record

MOST_SMALL = 24
"""Metrics that get a small chart of their own."""
MOST_FAILURES = 1000
"""Rows of the table of failures."""
MOST_CLIENT_ROWS = 120
"""More clients than this are shown as bands of quantiles, not one by one."""
MOST_PICTURE_BYTES = 2_000_000
DRAWN_ANEW = ("accuracy.png", "partition.png")
"""Pictures whose content the report draws itself."""
LEADING = ("accuracy", "loss")
SPREAD = re.compile(r"-(mean|worst|worst-10pct|std|jain)$")
COLOURLESS = {"asked": 0, "answered": 1, "failed": 2}


def run_part(run: RunFiles, title: str = "") -> Part:
    """Return everything that can be shown of a run."""
    missing = list(run.missing)
    sections = [
        Section("Outcome", [_tiles(run), *_reason(run)]),
        Section("Curves", _curves(run)),
        Section("Classes", _classes(run)),
        Section("Clients", _clients(run, missing)),
        Section("Who holds what", _partition(run)),
        Section("Failures", _failures(run)),
        Section("Time and communication", _costs(run)),
        Section("Pictures", _pictures(run.directory, missing)),
        Section("Settings", _settings(run)),
    ]
    subtitle = f"{run.directory} · {describe(run)}"
    return Part(RUN, title or f"Run {run.directory.resolve().name}", subtitle, sections, missing)


def describe(run: RunFiles) -> str:
    """Return what was run in a line: method, data, split, clients, rounds."""
    config = run.config

    def name(section: str) -> str:
        found = config.get(section)
        return str(found.get("name", "?")) if isinstance(found, dict) else "?"

    if not config:
        return "settings not known"
    federation = config.get("federation") or {}
    clients, cohort = federation.get("clients"), federation.get("cohort") or federation.get("clients")
    return (
        f"{name('strategy')} on {name('dataset')}, {name('partition')} split, {name('model')}, "
        f"{cohort} of {clients} clients a round, seed {config.get('seed')}"
    )


def _tiles(run: RunFiles) -> Tiles:
    selected, summary = run.selected(), run.summary
    tone = GOOD if run.status in ENDED_WELL else WARN if run.status == UNFINISHED else BAD
    asked_for = (run.config.get("federation") or {}).get("rounds")
    of = f"of {asked_for}" if asked_for and asked_for != run.rounds else ""
    tiles = [Tile("status", run.status, "", tone), Tile("rounds", number(run.rounds), of)]
    server = [r.metrics for r in evaluations(run.records, SERVER)]
    for name in LEADING:
        if server and finite(server[-1].get(name)) is not None:
            mean = number(selected.get(name), is_share(name))
            detail = f"last round; {mean} mean of the last {min(run.last, len(server))}, which counts"
            tiles.append(Tile(name, number(server[-1][name], is_share(name)), detail))
    if "clients:accuracy-mean" in selected:
        last = evaluations(run.records, CLIENTS)[-1].metrics
        worst = number(finite(last.get("accuracy-worst")), True)
        value = number(finite(last.get("accuracy-mean")), True)
        tiles.append(Tile("clients' accuracy", value, f"mean over clients; the worst has {worst}"))
    failed = sum(r.failed for r in run.records)
    asked = sum(r.asked for r in run.records)
    tiles.append(
        Tile("client failures", number(failed), f"of {counted(asked, 'request')}", BAD if failed else GOOD)
    )
    down, up = sum(r.bytes_down for r in run.records), sum(r.bytes_up for r in run.records)
    tiles.append(Tile("payload", size(down + up), f"{size(down)} to clients, {size(up)} back"))
    wall = finite(summary.get("wall_seconds")) or sum(r.seconds for r in run.records)
    memory = finite(summary.get("peak_memory_mib"))
    detail = f"peak memory {number(memory)} MiB" if memory is not None else "sum of the rounds"
    tiles.append(Tile("time", seconds(wall), detail))
    return Tiles(tiles)


def _reason(run: RunFiles) -> list[Block]:
    reason = str(run.summary.get("reason") or "")
    if not reason:
        return []
    tone = MUTED if run.status in ENDED_WELL else BAD
    return [Note(f"{run.status.capitalize()}: {reason.strip().splitlines()[0]}", tone)]


def broken_at(
    records: Sequence[Record], name: str, absent: Sequence[int]
) -> tuple[list[float], list[float | None]]:
    """Return a metric by round, with a place without a number at every round that should be there and is not."""
    found: dict[float, float | None] = {float(r): None for r in absent}
    for r in records:
        if name in r.metrics:
            found[float(r.round)] = finite(r.metrics[name])
    rounds = sorted(found)
    return rounds, [found[at] for at in rounds]


def absent_rounds(run: RunFiles) -> list[int]:
    """Return the rounds without a training record, between those that have one."""
    rounds = {r.round for r in run.training}
    return [r for r in range(min(rounds, default=0), max(rounds, default=0)) if r not in rounds]


def _curves(run: RunFiles) -> list[Block]:
    absent = absent_rounds(run)
    server, clients = run.of(SERVER), run.of(CLIENTS)
    blocks: list[Block | None] = []
    for name in LEADING:
        series = []
        if server:
            series.append(Series("server's test set", *broken_at(server, name, absent), slot=0, dash="solid"))
        if clients:
            mean = f"{name}-mean" if any(f"{name}-mean" in r.metrics for r in clients) else name
            x, y = broken_at(clients, mean, absent)
            low, high, band = _spread(clients, name, x)
            label = "clients' own test data" + (", mean" if mean != name else "")
            series.append(Series(label, x, y, 1, low, high, band, dash="solid"))
            if any(f"{name}-worst" in r.metrics for r in clients):
                series.append(
                    Series("worst client", *broken_at(clients, f"{name}-worst", absent), slot=3, dash="dash")
                )
        for slot, phase in enumerate(dict.fromkeys(r.phase for r in run.training)):
            label = "local training" if phase == "train" else f"local training, {phase}"
            series.append(
                Series(label, *broken_at(run.of(phase), name, absent), slot=(6, 5, 2)[slot % 3], dash="dot")
            )
        blocks.append(
            charts.lines(
                name.capitalize(),
                series,
                _told(name, series),
                y=name,
                percent=is_share(name),
                from_zero=name == "loss",
                height=360 if name == "accuracy" else 320,
                wide=name == "accuracy",
            )
        )
    blocks += _calibration(run)
    small = _small(run, absent)
    if small:
        blocks.append(Fold("Every other metric by round", small, counted(len(small), "chart")))
    return [block for block in blocks if block is not None]


def _spread(
    clients: Sequence[Record], name: str, x: Sequence[float]
) -> tuple[list[float | None], list[float | None], str]:
    """Return the band over clients: 10th to 90th percentile, or mean -+ std where those were not kept."""
    by_round = {float(r.round): r.metrics for r in clients}
    if any(name + QUANTILES in m for m in by_round.values()):
        ends = LEVELS.index(0.1), LEVELS.index(0.9)
        rows = [by_round.get(at, {}).get(name + QUANTILES) for at in x]
        whole = [r if isinstance(r, list) and len(r) == len(LEVELS) else None for r in rows]
        low, high = ([None if r is None else finite(r[end]) for r in whole] for end in ends)
        return low, high, "the 10th to the 90th percentile of clients"
    if any(f"{name}-std" in m for m in by_round.values()):
        pairs = [(finite(by_round.get(at, {}).get(f"{name}-mean")), finite(by_round.get(at, {}).get(f"{name}-std")))
                 for at in x]  # fmt: skip
        low = [None if m is None or s is None else m - s for m, s in pairs]
        high = [None if m is None or s is None else m + s for m, s in pairs]
        return low, high, "mean ∓ standard deviation over clients"
    return [], [], ""


def _told(name: str, series: Sequence[Series]) -> str:
    said = []
    for s in series:
        known = [(at, v) for at, v in zip(s.x, s.y, strict=True) if v is not None]
        if known:
            first, last = known[0], known[-1]
            said.append(
                f"{s.name} from {number(first[1], is_share(name))} (round {number(first[0])}) to "
                f"{number(last[1], is_share(name))} (round {number(last[0])})"
            )
    bands = "; ".join(s.band for s in series if s.band)
    if [s.name for s in series] == [name]:
        return f"{said[0].removeprefix(name).strip().capitalize()}." if said else ""
    return f"{name.capitalize()} by round: {'; '.join(said)}." + (f" Band: {bands}." if bands else "")


def _small(run: RunFiles, absent: Sequence[int]) -> list[Block]:
    """Return a small chart for each metric that is in none of the others."""
    found: dict[tuple[str, str], None] = {}
    for r in run.records:
        for name, value in r.metrics.items():
            shown = name in LEADING or name == "num-examples" or SPREAD.sub("", name) in LEADING
            if not isinstance(value, list) and not shown:
                found[r.phase, name] = None
    blocks: list[Block] = []
    for phase, name in list(found)[:MOST_SMALL]:
        where = {SERVER: "server", CLIENTS: "clients"}.get(phase, phase)
        series = Series(
            name, *broken_at(run.of(phase), name, absent), slot={SERVER: 0, CLIENTS: 1}.get(phase, 6)
        )
        chart = charts.lines(
            f"{name} ({where})",
            [series],
            _told(name, [series]),
            percent=is_share(name),
            height=210,
            wide=False,
            legend=False,
        )
        if chart is not None:
            blocks.append(chart)
    if len(found) > MOST_SMALL:
        blocks.append(Note(f"The first {MOST_SMALL} of {len(found)} metrics; all are in metrics.jsonl."))
    return blocks


def _calibration(run: RunFiles) -> list[Block | None]:
    """Return how sure the model is and how right, at the last evaluation by the server."""
    last = next((r for r in reversed(run.of(SERVER)) if "total-per-bin" in r.metrics), None)
    if last is None:
        return []
    lists = [last.metrics.get(f"{kind}-per-bin") for kind in ("correct", "total", "confidence")]
    if not all(isinstance(values, list) and values for values in lists):
        return []
    correct, total, _ = (list(values) for values in lists if values is not None)
    bins = len(total)
    middles = [(i + 0.5) / bins for i in range(bins)]
    right = [c / n if n else None for c, n in zip(correct, total, strict=True)]
    ece = finite(last.metrics.get("ece"))
    return [
        charts.bars(
            "Calibration",
            middles,
            {"accuracy of the samples in the bin": right},
            f"How often the model is right, by how sure it is, at round {last.round}; on the dashed line it is as "
            f"right as it is sure. Expected calibration error {number(ece, True)}.",
            x="confidence",
            y="accuracy",
            wide=False,
            height=320,
            diagonal=True,
            percent=True,
        )
    ]


def _classes(run: RunFiles) -> list[Block]:
    blocks: list[Block] = []
    for phase, where in ((SERVER, "server's test set"), (CLIENTS, "clients' test data")):
        records = run.of(phase)
        prefixes = dict.fromkeys(
            name.removesuffix("correct-per-class")
            for r in records
            for name in r.metrics
            if name.endswith("correct-per-class")
        )
        for prefix in prefixes:
            chart = _class_chart(run, records, prefix, where)
            # The clients hold the server's test set between them where they share one model.
            if chart is not None and not (phase == CLIENTS and prefix == "" and blocks):
                blocks.append(chart)
    return blocks


def _class_chart(run: RunFiles, records: Sequence[Record], prefix: str, where: str) -> Chart | None:
    kept = [r for r in records if _matching(r, prefix)]
    if not kept:
        return None
    classes = len(kept[-1].metrics[f"{prefix}total-per-class"])
    kept = [r for r in kept if len(r.metrics[f"{prefix}total-per-class"]) == classes]
    z = np.full((classes, len(kept)), np.nan)
    for column, r in enumerate(kept):
        correct = np.asarray(r.metrics[f"{prefix}correct-per-class"], dtype=np.float64)
        total = np.asarray(r.metrics[f"{prefix}total-per-class"], dtype=np.float64)
        z[:, column] = np.where(total > 0, correct / np.maximum(total, 1), np.nan)
    names = _class_names(run, classes)
    last = z[:, -1]
    said = ""
    if np.isfinite(last).any():
        worst, best = int(np.nanargmin(last)), int(np.nanargmax(last))
        said = (
            f" At the end {names[best]} is known best ({number(float(last[best]), True)}), {names[worst]} worst "
            f"({number(float(last[worst]), True)})."
        )
    whose = f", {prefix.rstrip('-')} model" if prefix else ""
    title = f"Accuracy by class{whose} ({where})"
    return charts.heat(
        title,
        z,
        [str(r.round) for r in kept],
        names,
        f"Share of each class' test samples that are recognised, by round.{said}",
        x="round",
        y="class",
        value="accuracy",
        percent=True,
        low=0,
        high=1,
    )


def _matching(record: Record, prefix: str) -> bool:
    lists = [record.metrics.get(f"{prefix}{kind}-per-class") for kind in ("correct", "total")]
    return all(isinstance(v, list) and v for v in lists) and len(lists[0] or ()) == len(lists[1] or ())


def _class_names(run: RunFiles, classes: int) -> list[str]:
    return list(run.classes) if len(run.classes) == classes else [str(c) for c in range(classes)]


def _clients(run: RunFiles, missing: list[str]) -> list[Block]:
    """Return how the clients fare: bands of quantiles, and one by one where they are few enough."""
    records = run.of(CLIENTS)
    if not records:
        if run.records:
            missing.append(
                "The clients' own test data were not evaluated, so there is no spread over clients "
                "(evaluation.clients_every=1 asks for it)."
            )
        return []
    names = dict.fromkeys(
        name.removesuffix(QUANTILES) for r in records for name in r.metrics if name.endswith(QUANTILES)
    )
    if not names:
        missing.append(
            "Single clients' figures were not kept (an older version), so there is no picture of them."
        )
    blocks: list[Block | None] = []
    for name in names:
        blocks.append(_quantile_chart(records, name))
        blocks.append(_client_chart(run, records, name))
    return [block for block in blocks if block is not None]


def _quantile_chart(records: Sequence[Record], name: str) -> Chart | None:
    kept = [r for r in records if len(r.metrics.get(name + QUANTILES) or ()) == len(LEVELS)]
    if not kept:
        return None
    rounds = [float(r.round) for r in kept]

    def at(level: float) -> list[float | None]:
        return [finite(r.metrics[name + QUANTILES][LEVELS.index(level)]) for r in kept]

    bands = [
        Series(
            "all clients", rounds, at(0.5), 0, at(0.0), at(1.0), "the worst to the best client", points=False
        ),
        Series(
            "80 %",
            rounds,
            at(0.5),
            0,
            at(0.1),
            at(0.9),
            "10th to 90th percentile",
            points=False,
            dash="solid",
        ),
        Series(
            "half of them", rounds, at(0.5), 0, at(0.25), at(0.75), "25th to 75th percentile", dash="solid"
        ),
        Series("worst client", rounds, at(0.0), 3, dash="dash"),
    ]
    clients = kept[-1].answered or len(kept[-1].metrics.get(CLIENTS_ASKED) or ())
    final = kept[-1].metrics[name + QUANTILES]
    middle = [number(final[LEVELS.index(level)], True) for level in (0.1, 0.5, 0.9)]
    return charts.lines(
        f"Spread of {name} over clients",
        bands,
        f"The line is the median of {counted(clients, 'client')}; the bands hold half of them, 80 % and all. At round "
        f"{kept[-1].round}: median {middle[1]}, 10th to 90th percentile {middle[0]} to {middle[2]}, "
        f"worst {number(final[0], True)}.",
        y=name,
        percent=True,
        legend=False,
    )


def _client_chart(run: RunFiles, records: Sequence[Record], name: str) -> Block | None:
    kept = [
        r
        for r in records
        if r.metrics.get(name + BY_CLIENT)
        and len(r.metrics[name + BY_CLIENT]) == len(r.metrics.get(CLIENTS_ASKED) or ())
    ]
    if not kept:
        total = max((r.answered for r in records), default=0)
        return Note(
            f"{counted(total, 'client')}: too many to keep one by one; the bands above hold all of them."
        )
    clients = sorted({k for r in kept for k in r.metrics[CLIENTS_ASKED]})
    row = {k: i for i, k in enumerate(clients)}
    z = np.full((len(clients), len(kept)), np.nan)
    for column, r in enumerate(kept):
        for k, value in zip(r.metrics[CLIENTS_ASKED], r.metrics[name + BY_CLIENT], strict=True):
            known = finite(value)
            z[row[k], column] = np.nan if known is None else known
    last = np.where(np.isfinite(z), z, -1.0)[:, -1]
    order = np.argsort(-last, kind="stable")
    z, clients = z[order], [clients[i] for i in order]
    crowded = len(clients) > MOST_CLIENT_ROWS
    best, worst = clients[0], clients[-1]
    return charts.heat(
        f"{name.capitalize()} by client",
        z,
        [str(r.round) for r in kept],
        [str(i + 1) for i in range(len(clients))] if crowded else [str(k) for k in clients],
        f"Each client's own test data by round, the best at the end on top: client {best} "
        f"({number(finite(float(z[0, -1])), True)}) to client {worst} ({number(finite(float(z[-1, -1])), True)})."
        + (" Neighbours in this order are put together." if crowded else "")
        + " Empty: not evaluated.",
        x="round",
        y="clients in order" if crowded else "client",
        value=name,
        percent=True,
        low=0,
        high=1,
        row_height=16,
        all_data=len(clients) <= MOST_CLIENT_ROWS and len(kept) <= 40,
    )


def _partition(run: RunFiles) -> list[Block]:
    counts = run.counts
    if counts is None or not counts.size:
        return []
    clients, classes = counts.shape
    totals = counts.sum(axis=1)
    names = _class_names(run, classes)
    crowded = clients > MOST_CLIENT_ROWS
    order = np.arange(clients)
    if crowded:
        order = np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))
    shares = counts[order] / np.maximum(totals[order], 1)[:, None]
    held = (counts > 0).sum(axis=1)
    about = (
        f"{counted(clients, 'client')} hold {number(int(totals.sum()))} training samples of {classes} classes, "
        f"{number(int(totals.min()))} to {number(int(totals.max()))} each (median {number(float(np.median(totals)))}), "
        f"of {number(int(held.min()))} to {number(int(held.max()))} classes each."
    )
    blocks: list[Block | None] = [
        charts.heat(
            "Classes by client",
            shares if crowded else counts.astype(np.float64),
            names,
            [str(k + 1) for k in range(clients)] if crowded else [str(k) for k in order],
            about + (" Clients are ordered by their largest class; colour is the share of a client's samples."
                     if crowded else " Colour is the number of samples."),
            x="class",
            y="clients in order" if crowded else "client",
            value="share" if crowded else "samples",
            percent=crowded,
            low=0,
            digits=".0%" if crowded else ",d",
            row_height=16,
        ),
        _sizes(totals, crowded),
    ]  # fmt: skip
    return [block for block in blocks if block is not None]


def _sizes(totals: Any, crowded: bool) -> Chart | None:
    if not crowded:
        return charts.bars(
            "Samples by client",
            [str(k) for k in range(len(totals))],
            {"samples": [float(n) for n in totals]},
            f"Training samples that each client holds: {number(int(totals.min()))} to {number(int(totals.max()))}.",
            x="client",
            y="samples",
            height=240,
        )
    edges = np.histogram_bin_edges(totals, bins=min(40, len(np.unique(totals))))
    found, _ = np.histogram(totals, edges)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    return charts.bars(
        "Clients by size",
        middles,
        {"clients": [float(n) for n in found]},
        f"How many of the {counted(len(totals), 'client')} hold how many training samples.",
        x="samples of a client",
        y="clients",
        height=240,
    )


def _failures(run: RunFiles) -> list[Block]:
    asked = sum(r.asked for r in run.records)
    failed = sum(r.failed for r in run.records)
    if not run.records:
        return []
    if not failed:
        return [Note(f"No client failed in {counted(asked, 'request')}.", GOOD)]
    found = [(r, f) for r in run.records for f in r.failures]
    kinds = Counter(f.kind for _, f in found)
    rounds = sorted({r.round for r in run.records})
    by_kind: dict[str, list[float | None]] = {}
    for kind in kinds:
        per_round = Counter(r.round for r, f in found if f.kind == kind)
        by_kind[kind] = [float(per_round.get(at, 0)) for at in rounds]
    by_client = Counter(f.client for _, f in found)
    worst = ", ".join(f"client {k} ({n})" for k, n in by_client.most_common(5))
    places, stacks, wide = _binned_sums(rounds, by_kind)
    chart = charts.bars(
        "Failures by round",
        places,
        stacks,
        f"{number(failed)} of {counted(asked, 'request')} failed: "
        f"{', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}. Most often: {worst}." + wide,
        x="round",
        y="failed clients",
        height=260,
    )
    rows = [
        [
            cell(f.round),
            Cell(r.phase, r.phase),
            cell(f.client),
            Cell(f.kind, f.kind, BAD),
            Cell(_first(f.reason)),
        ]
        for r, f in found[:MOST_FAILURES]
    ]
    note = f"The first {number(MOST_FAILURES)} of {number(len(found))}." if len(found) > MOST_FAILURES else ""
    heads = [Column("round", True), Column("phase"), Column("client", True), Column("kind"), Column("reason")]
    table = Table("Failed requests", heads, rows, note=note)
    return [chart, table] if chart is not None else [table]


def _binned_sums(
    rounds: Sequence[int], stacks: dict[str, list[float | None]], most: int = 200
) -> tuple[list[Any], dict[str, list[float | None]], str]:
    """Return sums over equal stretches of rounds where single rounds are too many for bars."""
    step = -(-len(rounds) // most)
    if step <= 1:
        return list(rounds), stacks, ""
    starts = range(0, len(rounds), step)
    summed: dict[str, list[float | None]] = {
        name: [math.fsum(v or 0.0 for v in values[at : at + step]) for at in starts]
        for name, values in stacks.items()
    }
    return [rounds[at] for at in starts], summed, f" A bar is the sum of {step} rounds."


def _costs(run: RunFiles) -> list[Block]:
    if not run.records:
        return []
    rounds = sorted({r.round for r in run.records if r.seconds or r.bytes_down or r.bytes_up})
    phases = dict.fromkeys(r.phase for r in run.records)
    names = {SERVER: "evaluation by the server", CLIENTS: "evaluation by the clients", "train": "training"}
    spent: dict[str, list[float | None]] = {}
    for phase in phases:
        by_round = {r.round: r.seconds for r in run.of(phase)}
        spent[names.get(phase, phase)] = [by_round.get(at, 0.0) for at in rounds]
    totals = {name: math.fsum(v or 0.0 for v in values) for name, values in spent.items()}
    places, stacks, binned = _binned_sums(rounds, spent)
    told = ", ".join(f"{name} {seconds(total)}" for name, total in totals.items())
    slots = {"training": 0, "evaluation by the server": 2, "evaluation by the clients": 1}
    blocks: list[Block | None] = [
        charts.bars(
            "Seconds by round",
            places,
            stacks,
            f"In all: {told}." + binned,
            x="round",
            y="seconds",
            slots=slots,
            wide=False,
            height=280,
        )
    ]
    traffic = []
    for slot, (name, key) in enumerate((("to clients", "bytes_down"), ("from clients", "bytes_up"))):
        sums, so_far = [], 0
        for at in rounds:
            so_far += sum(getattr(r, key) for r in run.records if r.round == at) if len(rounds) < 300 else 0
            sums.append(float(so_far))
        if len(rounds) >= 300:
            per_round: Counter[int] = Counter()
            for r in run.records:
                per_round[r.round] += getattr(r, key)
            sums = np.cumsum([float(per_round[at]) for at in rounds]).tolist()
        traffic.append(
            Series(name, [float(at) for at in rounds], [s / 1e6 for s in sums], slot, points=False)
        )
    blocks.append(
        charts.lines(
            "Payload so far",
            traffic,
            f"{size(sum(r.bytes_down for r in run.records))} were sent to clients and "
            f"{size(sum(r.bytes_up for r in run.records))} came back, over all phases.",
            y="MB",
            from_zero=True,
            wide=False,
            height=280,
        )
    )
    blocks.append(_cost_table(run))
    return [block for block in blocks if block is not None]


def _cost_table(run: RunFiles) -> Table | None:
    cost = run.summary.get("cost")
    if not isinstance(cost, dict):
        return None
    rows = []
    for phase in ("train", "evaluate"):
        found = cost.get(phase)
        if isinstance(found, dict):
            down, up = finite(found.get("bytes_down")), finite(found.get("bytes_up"))
            rows.append(
                [
                    Cell(phase, phase),
                    Cell(size(down or 0), down),
                    Cell(size(up or 0), up),
                    Cell(seconds(finite(found.get("seconds"))), finite(found.get("seconds"))),
                    cell(found.get("client_steps")),
                    cell(found.get("flops")),
                ]
            )
    heads = [
        Column("what"),
        *(Column(n, True) for n in ("bytes down", "bytes up", "time", "client steps", "FLOPs")),
    ]
    note = f"FLOPs: {cost['flops_counted']}." if cost.get("flops_counted") else ""
    return Table("Cost", heads, rows, note=note, filtered=False)


def _pictures(directory: Path, missing: list[str]) -> list[Block]:
    """Return the run's own pictures that the report does not draw itself."""
    found: list[Block] = []
    for path in sorted((directory / "figures").glob("*.png")):
        if path.name not in DRAWN_ANEW or (path.name == "partition.png" and not _has(directory)):
            block = picture(path, path.stem.replace("_", " "), missing)
            found += [] if block is None else [block]
    return found


def _has(directory: Path) -> bool:
    return (directory / "partition.npz").exists()


def picture(path: Path, title: str, missing: list[str]) -> Picture | None:
    """Return a picture to be put into the page; None, with a line in ``missing``, where that cannot be."""
    try:
        data = path.read_bytes()
    except OSError as error:
        missing.append(f"{path.name} cannot be read ({error}).")
        return None
    if not data.startswith(b"\x89PNG") or len(data) > MOST_PICTURE_BYTES:
        missing.append(f"{path.name} is no PNG of at most {size(MOST_PICTURE_BYTES)}; left out.")
        return None
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return Picture(title, f"{path.name}, as it was drawn when it was made.", uri)


def _settings(run: RunFiles) -> list[Block]:
    if not run.config:
        return []
    defaults = flat(Simulation().plain())
    rows = []
    for key, value in flat(run.config).items():
        default = defaults.get(key, "")
        known = key in defaults
        own = not known or default != value
        rows.append(
            [
                Cell(key, key),
                Cell(_shown(value), _shown(value)),
                Cell(_shown(default) if known else "–", _shown(default) if known else ""),
                Cell("differs" if own and known else "of the choice" if own else "", "0" if own else "1",
                     WARN if own and known else ""),
            ]
        )  # fmt: skip
    heads = [Column("key"), Column("value"), Column("default"), Column("")]
    made: Iterable[tuple[str, Any]] = (
        *(run.summary.get("versions") or {}).items(),
        ("commit", run.summary.get("git_commit")),
        ("configuration hash", run.summary.get("config_hash")),
    )
    versions = [[Cell(str(k), str(k)), Cell(str(v or "–"), str(v or ""))] for k, v in made]
    blocks: list[Block] = [Fold("All settings", [Table("Settings", heads, rows)], counted(len(rows), "key"))]
    if run.summary:
        made_with = Table("Made with", [Column("what"), Column("version")], versions, filtered=False)
        version = (run.summary.get("versions") or {}).get("flowerbed", "?")
        blocks.append(Fold("Versions", [made_with], f"flowerbed {version}"))
    return blocks


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _first(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:300]
