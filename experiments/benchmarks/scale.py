"""How a round's seconds and memory grow with the registered clients and with the cohort.

Clients are as light as they come, so that what the platform does with them is what is seen: two samples of 16
pixels, one step of an MLP with 5,410 parameters. Every size is a fresh process with flowerbed as it comes; all
sizes of a sweep live at once and take turns, as in ``bench speed``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.errors import require
from flowerbed.experiments.benchmarks import accounting, machine, report
from flowerbed.experiments.benchmarks.competitors.flowerbed_side import ENDLESS, merged
from flowerbed.experiments.benchmarks.race import Entry, Result, race
from flowerbed.experiments.benchmarks.report import Item, cell
from flowerbed.experiments.benchmarks.variants import VARIANTS

REGISTERED = (1_000, 10_000, 100_000, 1_000_000)
COHORTS = (10, 100, 1_000, 10_000)
COHORT = 100
"""The cohort while the registered clients grow."""
CLIENTS = 100_000
"""The registered clients while the cohort grows."""
SAMPLES, SIDE, CLASSES = 2, 4, 10
SAMPLE_BYTES = SIDE * SIDE + 8
FLAT, LINEAR = 1.1, 1.1
MEMORY_MIB = 16.0

METHOD = f"""\
Clients with {SAMPLES} samples of {SIDE}x{SIDE} pixels, one step of an MLP (5,410 parameters, 22 kB a model), IID, \
FedAvg, in process, one thread, no evaluation. One sweep grows the registered clients, the other the cohort. A size \
is a process of its own; medians over turns after a first round that is thrown away. Memory is that of the process \
without files and shared memory; a round adds the most that was seen in any round, the first one included, over what \
was there when all was built. Growth is the exponent b of the least-squares fit of a n^b: 0 does not grow, 1 is \
linear."""


def tiny_samples(samples: int) -> Dataset:
    """Return a data set of ``samples`` noisy images, which a configuration names by this function's path."""
    rng = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(0, 256, (count, 1, SIDE, SIDE), generator=rng, dtype=torch.uint8)
        return Split(images, torch.randint(0, CLASSES, (count,), generator=rng))

    names = tuple(str(label) for label in range(CLASSES))
    return Dataset("tiny", split(samples), split(10 * CLASSES), names, (0.5,), (0.3,))


def settings(clients: int, cohort: int) -> dict[str, Any]:
    """Return the settings of an endless run."""
    return {
        "dataset": {
            "name": f"{__spec__.name if __spec__ else __name__}:tiny_samples",
            "samples": clients * SAMPLES,
        },
        "model": "mlp",
        "federation": {"clients": clients, "cohort": cohort, "rounds": ENDLESS},
        "local": {"steps": 1, "batch_size": SAMPLES, "lr": 0.01},
        "evaluation": {"every": 0},
        "grid": {"device": "cpu"},
        "run": {"progress": False, "checkpoint_every": 0},
    }


def sweep(
    sizes: Sequence[tuple[int, int]], more: Mapping[str, Mapping[str, Any]], turns: int, say: Any
) -> list[dict[str, Any]]:
    """Measure each ``(clients, cohort)``; return a row for each, with ``failure`` where there is nothing else."""
    entries = [
        Entry(
            f"{clients:,} registered, cohort {cohort:,}",
            {"kind": "flowerbed", "settings": merged(settings(clients, cohort), more)},
        )
        for clients, cohort in sizes
    ]
    results = race(entries, turns=turns, warm=1, least=0.5, watch_memory=True, say=say)
    return [row(clients, cohort, result) for (clients, cohort), result in zip(sizes, results, strict=True)]


def row(clients: int, cohort: int, result: Result) -> dict[str, Any]:
    """Return what one size has shown; seconds, and bytes."""
    if result.failure or not result.turns:
        return {"clients": clients, "cohort": cohort, "failure": result.failure or "took no turn"}
    return {
        "clients": clients,
        "cohort": cohort,
        "failure": "",
        "build_cpu": result.ready_cpu,
        "cpu": result.median("cpu"),
        "wall": result.median("wall"),
        "resident": result.built_bytes,
        "data": clients * SAMPLES * SAMPLE_BYTES,
        "risen": result.round_bytes,
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return b of the least-squares line log(value) = log(a) + b log(size); None below two usable points."""
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True) if x > 0 and y > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (math.fsum(column) / len(points) for column in zip(*points, strict=True))
    spread = math.fsum((x - mean_x) ** 2 for x, _ in points)
    return math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else None


def items(kind: str, rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    """Return the figures of a sweep over ``clients`` or ``cohort``."""
    usable = [r for r in rows if not r["failure"]]
    if len(usable) < len(rows) or len(usable) < 2:
        reason = "; ".join(f"{r[kind]:,}: {r['failure']}" for r in rows if r["failure"]) or "one size only"
        return [Item(f"{kind} time", f"growth with {kind}", None, bar=FLAT, note=reason)]
    first, last = usable[0], usable[-1]
    name = "registered clients" if kind == "clients" else "cohort"
    sizes = [float(r[kind]) for r in usable]
    growth = exponent(sizes, [r["cpu"] for r in usable])
    note = "" if growth is None else f"growth {growth:.2f}; "
    note += ", ".join(f"{r[kind]:,}: {r['cpu'] * 1000:.3g} ms" for r in usable)
    if kind == "clients":
        value = last["cpu"] / first["cpu"]
        timed = Item(
            "clients time", f"CPU a round, {last[kind]:,} over {first[kind]:,} registered", value, bar=FLAT
        )
        memories = [r["resident"] + r["risen"] - r["data"] for r in usable]
        told = "memory without the data, built and in a round"
    else:
        # The smallest cohort pays the fixed part of a round; the second shows what a client costs.
        base = usable[min(1, len(usable) - 2)]
        value = (last["cpu"] / last[kind]) / (base["cpu"] / base[kind])
        timed = Item(
            "cohort time", f"CPU a client, cohort {last[kind]:,} over {base[kind]:,}", value, bar=LINEAR
        )
        memories = [r["risen"] for r in usable]
        told = "memory that a round adds"
    grown = (memories[-1] - memories[0]) / 2**20
    shown = ", ".join(f"{r[kind]:,}: {m / 2**20:.0f} MiB" for r, m in zip(usable, memories, strict=True))
    each = (memories[-1] - memories[0]) / (last[kind] - first[kind])
    return [
        Item(timed.key, timed.title, timed.value, bar=timed.bar, note=note),
        Item(
            f"{kind} memory",
            f"{told}, {name} {last[kind]:,} minus {first[kind]:,}, MiB",
            grown,
            bar=MEMORY_MIB,
            note=f"{shown}; {each:.0f} bytes each",
        ),
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of all sweeps as a Markdown table."""
    head = ["registered", "cohort", "build CPU s", "CPU s a round", "wall s a round", "CPU ms a client"]
    head += ["data MiB", "resident MiB", "round adds MiB"]
    lines = [f"| {' | '.join(head)} |", f"|{'---:|' * len(head)}"]
    for r in rows:
        if r["failure"]:
            lines.append(f"| {r['clients']:,} | {r['cohort']:,} | {cell(r['failure'])} | | | | | | |")
            continue
        mib = [f"{r[name] / 2**20:.1f}" for name in ("data", "resident", "risen")]
        each = f"{1000 * r['cpu'] / r['cohort']:.3g}"
        sizes = [f"{r['clients']:,}", f"{r['cohort']:,}"]
        seconds = [f"{r[name]:.3g}" for name in ("build_cpu", "cpu", "wall")]
        lines.append(f"| {' | '.join([*sizes, *seconds, each, *mib])} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="flowerbed bench scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--registered", nargs="*", type=int, default=list(REGISTERED), metavar="N")
    parser.add_argument("--cohorts", nargs="*", type=int, default=list(COHORTS), metavar="M")
    parser.add_argument("--cohort", type=int, default=COHORT, help="cohort of the first sweep (default 100)")
    parser.add_argument(
        "--clients", type=int, default=CLIENTS, help="clients of the second (default 100,000)"
    )
    in_process = [variant.name for variant in VARIANTS if not variant.ray]
    parser.add_argument("--variant", choices=in_process, default=in_process[0], help="how flowerbed runs")
    parser.add_argument("--turns", type=int, default=5, help="turns of each size (default 5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json and FILE.md")
    parser.add_argument(
        "--store", action="store_true", help="write docs/benchmarks/scale.json and .md instead"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; the exit status is 1 if a bar is missed."""
    options = parse(argv)
    accounting.require_proc()
    require(options.turns >= 1, f"--turns is {options.turns}; give at least 1.")
    for sizes in (options.registered, options.cohorts):
        require(
            len(sizes) != 1 and min(sizes, default=1) >= 1, "A sweep needs at least two sizes of at least 1."
        )
    sweeps = {
        "clients": [(clients, options.cohort) for clients in sorted(options.registered)],
        "cohort": [(options.clients, cohort) for cohort in sorted(options.cohorts)],
    }
    for sizes in sweeps.values():
        for clients, cohort in sizes:
            require(1 <= cohort <= clients, f"A cohort of {cohort} out of {clients} clients is impossible.")
    out = report.stored("scale") if options.store else options.out
    variant = next(variant for variant in VARIANTS if variant.name == options.variant)
    require(not variant.missing(), f"--variant '{variant.name}' is {variant.missing()}")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    document: report.Document = {}
    rows: list[dict[str, Any]] = []
    text = ""
    for kind, sizes in sweeps.items():
        if not sizes:
            continue
        stamp = machine.stamp("cpu")
        found = sweep(sizes, variant.settings, options.turns, say)
        rows += found
        for item in items(kind, found):
            document[f"item {item.key}"] = {**report.item_section(item, stamp), "rows": found}
        method = f"{METHOD} Run: {variant.name} ({variant.note}).\n\n## Sizes\n\n{table(rows)}"
        text = report.markdown("Scale", method, document, report.verdicts(document, ()))
        if out is not None:
            report.write(out, document, text)
    print(json.dumps(document, indent=1) if options.json else text)
    return int(any(line.verdict == report.MISSED for line in report.verdicts(document, ())))


if __name__ == "__main__":
    raise SystemExit(main())
