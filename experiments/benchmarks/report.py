"""Measurements as one document, from which tables and verdicts follow: JSON to keep, Markdown to read.

A document is a mapping of sections by key, each complete in itself with its stamp, so that one part can be
measured again without the others. A section of kind ``model`` holds what every contestant's rounds have cost;
one of kind ``item`` a single figure and the bar that it is held against.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowerbed.errors import ConfigError
from flowerbed.experiments.benchmarks.race import Ratio, Result, ratio, repository
from flowerbed.storage import atomic_write

Document = dict[str, Any]
MET, MISSED, UNKNOWN = "met", "NOT MET", "not measured"


@dataclass(frozen=True)
class Item:
    """A figure with its bar."""

    key: str
    title: str
    value: float | None
    bar: float | None = None
    at_most: bool = True
    """Whether the bar is an upper bound; else the value must reach it."""
    low: float | None = None
    high: float | None = None
    note: str = ""
    """What else was seen, or why there is no value."""

    @classmethod
    def of(cls, key: str, title: str, found: Ratio, **more: Any) -> Item:
        """Return the item of a median and its interval."""
        return cls(key, title, found.median, low=found.low, high=found.high, **more)


@dataclass(frozen=True)
class Bar:
    """How many times faster than each reference a contestant shall be on a model."""

    model: str
    contestant: str
    title: str
    wanted: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """One line of the table of bars."""

    title: str
    bar: str
    found: str
    verdict: str


def model_section(
    title: str,
    stamp: Mapping[str, Any],
    results: Sequence[Result],
    references: Sequence[str],
    *,
    steps: int,
    flops: float,
    peak: float,
    absent: Mapping[str, str],
) -> Document:
    """Return the section of one model: medians a round, and how many times faster each is than the references.

    ``steps``: client steps of a round; ``flops``: of a step; ``peak``: FLOP/s of the device's matrix product;
    ``absent``: contestants that could not take part, with the reason.
    """
    contestants: Document = {name: {"failure": reason} for name, reason in absent.items()}
    for result in results:
        if result.failure or not result.turns:
            contestants[result.name] = {"failure": result.failure or "took no turn"}
            continue
        cpu, wall = result.median("cpu"), result.median("wall")
        contestants[result.name] = {
            "cpu": cpu,
            "wall": wall,
            "steps_per_cpu_second": steps / max(cpu, 1e-9),
            "steps_per_second": steps / max(wall, 1e-9),
            "gpu_used": result.used,
            "turns": [asdict(turn) for turn in result.turns],
        }
    by_name = {result.name: result for result in results}
    faster: Document = {}
    for result in results:
        faster[result.name] = {
            reference: {
                quantity: asdict(found)
                for quantity in ("cpu", "wall")
                if (found := ratio(by_name[reference], result, quantity)) is not None
            }
            for reference in references
            if reference in by_name
        }
    return {
        "kind": "model",
        "title": title,
        "stamp": dict(stamp),
        "steps": steps,
        "flops": flops,
        "matmul_flops": peak,
        "contestants": contestants,
        "faster": faster,
    }


def item_section(item: Item, stamp: Mapping[str, Any]) -> Document:
    """Return the section of one figure."""
    return {"kind": "item", "stamp": dict(stamp), **asdict(item)}


def verdicts(document: Document, bars: Sequence[Bar], quantity: str = "cpu") -> list[Verdict]:
    """Return a line for every bar of models and items, in that order."""
    lines = []
    for bar in bars:
        section = document.get(f"model {bar.model}", {})
        for reference, wanted in bar.wanted.items():
            title = f"{bar.title} vs {reference}"
            found = section.get("faster", {}).get(bar.contestant, {}).get(reference, {}).get(quantity)
            if found is None:
                reason = _reason(section, bar.contestant) or _reason(section, reference)
                lines.append(Verdict(title, f">= {wanted:.3g}x", reason or "-", UNKNOWN))
            else:
                verdict = MET if found["median"] >= wanted else MISSED
                lines.append(Verdict(title, f">= {wanted:.3g}x", _shown(found, "x"), verdict))
    for section in document.values():
        if section["kind"] == "item" and section["bar"] is not None:
            lines.append(_item_verdict(section))
    return lines


def _item_verdict(section: Document) -> Verdict:
    bar = f"{'<=' if section['at_most'] else '>='} {section['bar']:g}"
    if section["value"] is None:
        return Verdict(section["title"], bar, section["note"] or "-", UNKNOWN)
    kept = section["value"] <= section["bar"] if section["at_most"] else section["value"] >= section["bar"]
    found = _shown({"median": section["value"], "low": section["low"], "high": section["high"]})
    return Verdict(section["title"], bar, found, MET if kept else MISSED)


def _reason(section: Document, contestant: str) -> str:
    reason: str = section.get("contestants", {}).get(contestant, {}).get("failure", "")
    return f"{contestant}: {reason}" if reason else ""


def _shown(found: Mapping[str, float | None], unit: str = "") -> str:
    text = f"{found['median']:.3g}{unit}"
    return text if found["low"] is None else f"{text} ({found['low']:.3g} to {found['high']:.3g})"


def markdown(title: str, method: str, document: Document, lines: Sequence[Verdict]) -> str:
    """Return the whole report."""
    parts = [f"# {title}", method.strip()]
    stamps = [section["stamp"] for section in document.values()]
    if stamps:
        parts.append("## Machine\n\n" + _machine(max(stamps, key=lambda stamp: str(stamp["date"]))))
    if lines:
        rows = [f"| {v.title} | {v.bar} | {cell(v.found)} | {v.verdict} |" for v in lines]
        parts.append("\n".join(["## Bars\n", "| what | bar | found | verdict |", "|---|---|---|---|", *rows]))
    for section in document.values():
        if section["kind"] == "model":
            parts.append(_model_table(section))
    items = [section for section in document.values() if section["kind"] == "item"]
    if items:
        rows = [
            f"| {s['title']} | {'-' if s['value'] is None else _shown({**s, 'median': s['value']})} "
            f"| {cell(s['note'])} | {_when(s['stamp'])} |"
            for s in items
        ]
        parts.append(
            "\n".join(
                ["## Further figures\n", "| what | value | seen | measured |", "|---|---:|---|---|", *rows]
            )
        )
    return "\n\n".join(parts) + "\n"


def cell(text: str) -> str:
    """Return text as it can stand in a Markdown table."""
    return text.replace("|", "/").replace("\n", " ")


def _when(stamp: Mapping[str, Any]) -> str:
    return f"{stamp['commit']}, {stamp['date']}, load {stamp['load']:.1f}"


def _machine(stamp: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    lines = [
        f"- {stamp['cpu']}, {stamp['cores']} cores, {stamp['memory_gib']} GiB; {stamp['system']}",
        *([f"- {stamp['gpu']}"] if "gpu" in stamp else []),
        f"- Python {stamp['python']}; {versions}",
        f"- {_when(stamp)}",
    ]
    return "\n".join(lines)


def _model_table(section: Document) -> str:
    references = list(dict.fromkeys(r for found in section["faster"].values() for r in found))
    peak = section["matmul_flops"]
    gpu = "gpu" in section["stamp"]
    head = ["contestant", "CPU s", "wall s", "steps / CPU s", "steps / s", "of matmul"]
    head += ["GPU used"] if gpu else []
    head += [f"{quantity} vs {r}" for quantity in ("CPU", "wall") for r in references]
    sizes = f"{section['steps']} client steps a round, {section['flops'] / 1e6:.4g} MFLOP a step"
    lines = [
        f"## {section['title']}",
        "",
        f"{sizes}; float32 matrix product {peak / 1e9:.4g} GFLOP/s. {_when(section['stamp'])}",
        "",
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
    ]
    absent = []
    for name, found in section["contestants"].items():
        if found.get("failure"):
            absent.append(f"- {name}: not measured, {found['failure']}")
            continue
        rate = found["steps_per_second"] if gpu else found["steps_per_cpu_second"]
        used = found["gpu_used"]
        cells = [
            name,
            f"{found['cpu']:.4g}",
            f"{found['wall']:.4g}",
            f"{found['steps_per_cpu_second']:.4g}",
            f"{found['steps_per_second']:.4g}",
            f"{rate * section['flops'] / peak:.1%}",
        ]
        if gpu:
            cells.append("-" if used is None else f"{used:.0f} %")
        for quantity in ("cpu", "wall"):
            for reference in references:
                times = section["faster"].get(name, {}).get(reference, {}).get(quantity)
                cells.append("-" if times is None else _shown(times, "x"))
        lines.append(f"| {' | '.join(cells)} |")
    parts = ["\n".join(lines), "\n".join(absent)]
    for name, profile in section.get("profiles", {}).items():
        parts.append(f"Where the time of {name} goes:\n\n```\n{profile}\n```")
    return "\n\n".join(part for part in parts if part)


def read(path: Path) -> Document:
    """Return the document in ``path``; {} if there is none."""
    file = path.with_suffix(".json")
    if not file.exists():
        return {}
    document: Document = json.loads(file.read_text())
    return document


def write(path: Path, document: Document, text: str) -> None:
    """Write ``path``.json and ``path``.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path.with_suffix(".json"), (json.dumps(document, indent=1) + "\n").encode())
    atomic_write(path.with_suffix(".md"), text.encode())


def stored(name: str) -> Path:
    """Return where the checkout keeps the results called ``name``; raises ``ConfigError`` outside a checkout."""
    docs = repository() / "docs"
    if not docs.is_dir():
        raise ConfigError("--store writes into the docs of a checkout, and this is none; give --out FILE.")
    return docs / "benchmarks" / name
