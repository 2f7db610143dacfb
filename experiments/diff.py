"""The command ``flowerbed diff``: which settings and results of two runs, or of two folders of runs, differ.

Numbers are compared as they were written, so two runs that should be the same to the last bit can be shown to be.
Results are the summary and every scalar of every round. Where, when and how fast something was computed is shown as
circumstances, and makes no difference.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowerbed.errors import ConfigError, require
from flowerbed.experiments import report, saved
from flowerbed.experiments.text import number, table
from flowerbed.experiments.watch.follow import Follower, plain

DESCRIPTION = (
    "Say which settings and results of two runs, sweeps, folders of runs or results of one kind differ."
)
EPILOG = """\
The jobs of two sweeps are matched by their overrides, runs in other folders by their place in them.
Exit codes, as those of diff: 0 no difference, 1 some, 2 they could not be compared.
"""
HOW = ("grid", "cohort", "observe", "run", "tracking")
"""Sections that decide no result: all but ``flowerbed.experiments.config.IDENTITY``."""
NEUTRAL = ("data.dir", "data.cache", "data.download", "initial.weights")
CIRCUMSTANCES = ("git_commit", "versions", "wall_seconds", "peak_memory_mib", "resumed_from", "seconds", "made",
                 "hardware", "hashes", "seal", "made_with", "directory", "reused", "run")  # fmt: skip
"""Keys of summaries and records, at any depth, that say where, when and how fast."""
OF_THE_SETTINGS = ("config_hash", "seed")
"""Keys of a run's summary that repeat its settings."""
SHOWN = 40
"""Rows of a section on the screen."""
CELL = 44
ABSENT = "(not there)"


@dataclass(frozen=True)
class Difference:
    """What one key has on either side; a side without it is absent from ``sides``."""

    key: str
    sides: Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """Two runs, or two results of one kind."""

    name: str
    settings: list[Difference] = field(default_factory=list)
    results: list[Difference] = field(default_factory=list)
    circumstances: list[Difference] = field(default_factory=list)
    first: str = ""
    """Where the rounds' metrics part."""
    missing: list[str] = field(default_factory=list)
    """What could not be compared."""

    @property
    def same(self) -> bool:
        """Whether nothing that counts differs."""
        return not (self.settings or self.results or self.first)


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Compare what the command line ``arguments`` asks for; return the exit code."""
    asked = _parser().parse_args(list(arguments))
    require(
        0 <= asked.tolerance < 1, f"--tolerance is {asked.tolerance}; give a share from 0 (exact) to below 1."
    )
    pairs, alone = matched(asked.a, asked.b)
    found = [compared(name, kind, a, b, asked.tolerance) for name, kind, a, b in pairs]
    same = not alone and all(one.same for one in found)
    if as_json:
        print(json.dumps(_plain(asked.a, asked.b, found, alone, same)))
    else:
        print(text(asked.a, asked.b, found, alone))
    return 0 if same else 1


def matched(a: Path, b: Path) -> tuple[list[tuple[str, str, Path, Path]], list[tuple[str, str]]]:
    """Return what is to be compared (name, kind, both folders), and what only one side has (side, name).

    Raises ``ConfigError`` where the two are of different kinds, or nothing.
    """
    kinds = {side: _kind(path) for side, path in (("A", a), ("B", b))}
    if kinds["A"] != kinds["B"]:
        said = " and ".join(f"{path} is a {kinds[side] or 'folder'}" for side, path in (("A", a), ("B", b)))
        raise ConfigError(f"{said}; give two of the same kind.")
    kind = kinds["A"]
    if kind is not None and kind != saved.SWEEP:
        return [("", kind, a, b)], []
    ours, theirs = (_jobs(p) if kind == saved.SWEEP else _runs(p) for p in (a, b))
    for path, runs in ((a, ours), (b, theirs)):
        require(bool(runs), f"{path} holds no runs.")
    both = [(name, saved.RUN, ours[name], theirs[name]) for name in ours if name in theirs]
    alone = [("A", name) for name in ours if name not in theirs] + [
        ("B", name) for name in theirs if name not in ours
    ]
    return both, alone


def compared(name: str, kind: str, a: Path, b: Path, tolerance: float = 0.0) -> Compared:
    """Compare two folders of one kind; numbers are equal within the relative ``tolerance``."""
    if kind != saved.RUN:
        file = saved.RESULT_FILES[kind]
        ours, theirs = saved.read_object(a / file), saved.read_object(b / file)
        results, circumstances = _split(differences(ours, theirs, tolerance))
        return Compared(name, results=results, circumstances=circumstances)
    missing: list[str] = []
    settings: list[Difference] = []
    how: list[Difference] = []
    for one in differences(_config(a, missing), _config(b, missing), tolerance=0.0):
        if one.key != "run.dir":
            (how if one.key.split(".")[0] in HOW or one.key in NEUTRAL else settings).append(one)
    found = differences(_summary(a, missing), _summary(b, missing), tolerance)
    results, circumstances = _split([one for one in found if one.key not in OF_THE_SETTINGS])
    return Compared(name, settings, results, [*how, *circumstances], parting(a, b, tolerance), missing)


def differences(a: Mapping[str, Any], b: Mapping[str, Any], tolerance: float) -> list[Difference]:
    """Return the leaves in which two nested objects differ, by dotted key in the order of the first."""
    ours, theirs = dict(leaves(a)), dict(leaves(b))
    found = []
    for key in dict.fromkeys([*ours, *theirs]):
        sides = {side: plain(of[key]) for side, of in (("a", ours), ("b", theirs)) if key in of}
        if len(sides) < 2 or not equal(ours[key], theirs[key], tolerance):
            found.append(Difference(key, sides))
    return found


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no mapping, and no list with mappings in it, by its dotted key."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for i, item in enumerate(value):
            yield from leaves(item, f"{prefix}.{i}")
    else:
        yield prefix, value


def equal(a: Any, b: Any, tolerance: float) -> bool:
    """Return whether two leaves are equal; NaN is equal to NaN, 1 to 1.0, and a truth value to no number."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(equal(x, y, tolerance) for x, y in zip(a, b, strict=True))
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b)]
    if all(numbers):
        both_nan = math.isnan(a) and math.isnan(b)
        return both_nan or a == b or bool(math.isclose(a, b, rel_tol=tolerance, abs_tol=0.0))
    return type(a) is type(b) and bool(a == b)


def parting(a: Path, b: Path, tolerance: float) -> str:
    """Return the first round and figure in which the metrics of two runs differ, as a sentence; "" if in none."""
    ours, theirs = _rounds(a), _rounds(b)
    for place in sorted(ours.keys() | theirs.keys()):
        round_, phase = place
        one, two = ours.get(place), theirs.get(place)
        if one is None or two is None:
            return f"from round {round_} on: only {'B' if one is None else 'A'} has a record of {phase}"
        for name in dict.fromkeys([*one, *two]):
            x, y = one.get(name), two.get(name)
            if not equal(x, y, tolerance):
                return f"from round {round_} on: {phase}/{name} is {_said(x)} in A and {_said(y)} in B"
    return ""


def _rounds(directory: Path) -> dict[tuple[int, str], dict[str, float | None]]:
    follower = Follower(directory / "metrics.jsonl")
    follower.refresh()
    return {
        (round_, name): {metric: column[i] for metric, column in phase.columns.items() if metric != "seconds"}
        for name, phase in follower.phases.items()
        for i, round_ in enumerate(phase.rounds)
    }


def text(a: Path, b: Path, found: Sequence[Compared], alone: Sequence[tuple[str, str]]) -> str:
    """Return the differences as a person reads them."""
    blocks = [f"A: {a}\nB: {b}"]
    if len(found) == 1 and not found[0].name:
        blocks += list(_blocks(found[0]))
    else:
        for one in found:
            if not one.same:
                blocks += [f"== {one.name}", *_blocks(one, brief=True)]
        blocks += _lists(alone)
        blocks.append(f"{len(found)} pairs, {sum(one.same for one in found)} of them without a difference")
    return "\n\n".join(blocks)


def _lists(alone: Sequence[tuple[str, str]]) -> Iterator[str]:
    for side in ("A", "B"):
        names = [name for own, name in alone if own == side]
        more = [f"... and {len(names) - SHOWN} more; --json has all"] if len(names) > SHOWN else []
        if names:
            yield "\n".join([f"only in {side}:", *(f"  {name}" for name in [*names[:SHOWN], *more])])


def _blocks(one: Compared, brief: bool = False) -> Iterator[str]:
    if one.missing:
        yield "\n".join(f"- {text}" for text in one.missing)
    if one.same:
        yield "no difference in settings or results"
    for title, rows in (("settings", one.settings), ("results", one.results)):
        if rows:
            yield _section(title, rows)
    if one.first:
        yield f"rounds differ {one.first}"
    if one.circumstances and not brief:
        yield _section("circumstances (these count as no difference)", one.circumstances)


def _section(title: str, rows: Sequence[Difference]) -> str:
    cells = [(title, "A", "B", "B - A")]
    for row in rows[:SHOWN]:
        a, b = (_said(row.sides[side]) if side in row.sides else ABSENT for side in ("a", "b"))
        cells.append((row.key, a, b, _gap(row.sides)))
    if not any(cell[3] for cell in cells[1:]):
        cells = [cell[:3] for cell in cells]  # type: ignore[misc]
    more = f"\n... and {len(rows) - SHOWN} more; --json has all" if len(rows) > SHOWN else ""
    return table(cells, header=True) + more


def _gap(sides: Mapping[str, Any]) -> str:
    numbers = [
        value for value in sides.values() if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return f"{numbers[1] - numbers[0]:+.4g}" if len(numbers) == 2 else ""


def _said(value: Any) -> str:
    # All digits of a number that is no whole one: it may differ in the last.
    said = repr(value) if isinstance(value, float) else "null" if value is None else number(value)
    return said if len(said) <= CELL else f"{said[: CELL - 3]}..."


def _plain(
    a: Path, b: Path, found: Sequence[Compared], alone: Sequence[tuple[str, str]], same: bool
) -> dict[str, Any]:
    return {
        "a": str(a),
        "b": str(b),
        "same": same,
        "only_in_a": [name for side, name in alone if side == "A"],
        "only_in_b": [name for side, name in alone if side == "B"],
        "compared": [{**asdict(one), "same": one.same} for one in found],
    }


def _split(found: Sequence[Difference]) -> tuple[list[Difference], list[Difference]]:
    """Return what counts, and what is a circumstance."""
    about = [any(part in CIRCUMSTANCES for part in one.key.split(".")) for one in found]
    counts = [one for one, beside in zip(found, about, strict=True) if not beside]
    return counts, [one for one, beside in zip(found, about, strict=True) if beside]


def _kind(path: Path) -> str | None:
    require(path.is_dir(), f"{path} is no folder; give the folder of a run, a sweep, or of other results.")
    return saved.kind_of({item.name for item in path.iterdir()})


def _jobs(sweep: Path) -> dict[str, Path]:
    found = {}
    for job in report.read_jobs(sweep):
        # A sweep that was moved still has its runs in it, by number.
        inside = sweep / str(job.number)
        found[" ".join(sorted(job.overrides)) or "(no overrides)"] = (
            inside if inside.is_dir() else Path(job.directory)
        )
    return found


def _runs(folder: Path) -> dict[str, Path]:
    return {str(path.parent.relative_to(folder)): path.parent for path in sorted(folder.rglob("config.yaml"))}


def _config(directory: Path, missing: list[str]) -> dict[str, Any]:
    path = directory / "config.yaml"
    try:
        found = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        missing.append(f"{path} cannot be read: {why}")
        return {}
    return found if isinstance(found, dict) else {}


def _summary(directory: Path, missing: list[str]) -> dict[str, Any]:
    try:
        summary = report.read_summary(directory)
    except ConfigError as error:
        missing.append(str(error))
        return {}
    missing += [f"{directory}: {note}" for note in summary.pop("notes", ())]
    if summary.get("status") == "unfinished":
        # It names the folder, which is no difference.
        summary.pop("reason", None)
    return summary


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed diff",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("a", "b"):
        parser.add_argument(
            name, type=Path, metavar=name.upper(), help="folder of a run, a sweep, or of other results"
        )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="numbers this near are equal (%(default)s: exact)",
    )
    parser.add_argument("--json", action="store_true", help="print all differences as JSON")
    return parser
