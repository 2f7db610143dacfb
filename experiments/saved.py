"""What commands leave in folders, read back without torch: which kind it is, one line, and one screen about it.

A folder is known by one file. These files are written once and whole, but a folder may be half copied, or of another
version: whatever is missing is said, and the rest is shown.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowerbed.errors import ConfigError
from flowerbed.experiments.text import duration, number, table

RUN, SWEEP = "run", "sweep"
ATTACK, MATRIX, COMPARISON, REPRODUCTION = "attack", "matrix", "comparison", "reproduction"
RESULT_FILES = {
    ATTACK: "attack.json",
    MATRIX: "matrix.json",
    COMPARISON: "comparison.json",
    REPRODUCTION: "record.json",
}
"""The kinds that are one file of results, written at the end."""
KINDS = (RUN, SWEEP, *RESULT_FILES)
NULLS = "null: "
WIDEST = 72
"""Columns of a text in a table, at most."""


def kind_of(names: Collection[str]) -> str | None:
    """Return the kind of a folder that holds files of these names; None if it is nothing of ours."""
    for kind, name in RESULT_FILES.items():
        if name in names:
            return kind
    if "jobs.jsonl" in names:
        return SWEEP
    if "config.yaml" in names or "metrics.jsonl" in names or "summary.json" in names:
        return RUN
    return None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises ``ConfigError`` if it is not there, cut off, or something else."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is cut off or damaged ({error}); make it anew.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object; make it anew.")
    return found


def headline(kind: str, content: Mapping[str, Any]) -> str:
    """Return one line about a result; raises ``ConfigError`` if it is of a form that is not known."""
    return _guarded(kind, lambda: _HEADLINES[kind](content))


def screen(kind: str, directory: Path, content: Mapping[str, Any]) -> str:
    """Return one screen about a result; raises ``ConfigError`` if it is of a form that is not known."""
    return _guarded(kind, lambda: f"{kind} in {directory}\n\n{_SCREENS[kind](content)}")


def overview(folder: Path) -> list[tuple[str, str, str]]:
    """Return kind, name and one line for everything directly in ``folder``."""
    found = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        kind = kind_of({path.name for path in place.iterdir()})
        if kind is None:
            continue
        line = ""
        if kind in RESULT_FILES:
            try:
                line = headline(kind, read_object(place / RESULT_FILES[kind]))
            except ConfigError as error:
                line = str(error)
        elif kind == RUN and (place / "summary.json").exists():
            try:
                line = _run_line(read_object(place / "summary.json"))
            except ConfigError as error:
                line = str(error)
        elif kind == RUN:
            line = "unfinished"
        found.append((kind, place.name, line))
    return found


def _guarded(kind: str, make: Any) -> str:
    try:
        return str(make())
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"The {RESULT_FILES[kind]} has another form than this version of flowerbed writes "
            f"({type(error).__name__}: {error}); make it anew."
        ) from error


def _run_line(summary: Mapping[str, Any]) -> str:
    final = summary.get("final") or {}
    said = [f"{name} {number(final[name])}" for name in ("accuracy", "loss") if name in final]
    return ", ".join([str(summary.get("status")), *said, f"{summary.get('rounds', '?')} rounds"])


def _attack_line(content: Mapping[str, Any]) -> str:
    psnr = content["summary"]["psnr"]
    nulls = [value["mean"] for name, value in content["summary"].items() if name.startswith(NULLS)]
    against = f", best null {max(nulls):.1f}" if nulls else ""
    return (
        f"{content['attack']} on {len(content['victims'])} updates: PSNR {psnr['mean']:.1f} dB{against}, "
        f"worst {psnr['worst']:.1f}"
    )


def _attack_screen(content: Mapping[str, Any]) -> str:
    options = " ".join(f"attack.{name}={value}" for name, value in content["options"].items())
    defence = "not recorded"
    if content.get("defence"):
        knows = "knows" if content.get("adaptive") else "does not know"
        defence = f"{content['defence']['name']}; the attacker {knows} of it"
    about = [
        ("attack", f"{content['attack']} {options}".rstrip()),
        ("run", str(content["run"])),
        ("granted", ", ".join(content["granted"]) or "nothing beside the update"),
        ("defence", defence),
        ("victims", _victims(content["victims"])),
        ("gradients", f"{sum(v['evaluations'] for v in content['victims']):,}"),
        ("time", duration(sum(v["seconds"] for v in content["victims"]))),
        *_made_with(content),
    ]
    figures = [("figure", "mean", "95 % interval", "worst")]
    figures += [
        (name, f"{v['mean']:.4g}", f"{v['low']:.4g} to {v['high']:.4g}", f"{v['worst']:.4g}")
        for name, v in content["summary"].items()
    ]
    note = "Worst is the sample that leaked most. An attack below a null model, which uses no gradient, shows nothing."
    return "\n\n".join([table(about), table(figures, header=True), note])


def _victims(victims: Sequence[Mapping[str, Any]]) -> str:
    samples = sum(len(v["labels"]["true"]) for v in victims)
    clients, rounds = sorted({v["client"] for v in victims}), sorted({v["round"] for v in victims})
    return f"{len(victims)} updates of {samples} samples; clients {_few(clients)}, rounds {_few(rounds)}"


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown}, ... ({len(numbers)})"


def _matrix_line(content: Mapping[str, Any]) -> str:
    cells = content["cells"]
    top = max(cells, key=lambda cell: float(cell["summary"]["psnr"]["mean"]))
    return (
        f"{len({c['defence'] for c in cells})} defences x {len({c['attack'] for c in cells})} attacks; most leaks from "
        f"{top['defence']} by {top['attack']}: {top['summary']['psnr']['mean']:.1f} dB"
    )


def _matrix_screen(content: Mapping[str, Any]) -> str:
    rows = [("defence", "round", "attack", "attacker", "PSNR", "worst", "null", "labels", "accuracy")]
    for cell in content["cells"]:
        s = cell["summary"]
        rows.append(
            (
                cell["defence"],
                str(cell["round"]),
                cell["attack"],
                cell["knows"],
                f"{s['psnr']['mean']:.1f}",
                f"{s['psnr']['worst']:.1f}",
                f"{s[f'{NULLS}class mean']['mean']:.1f}",
                f"{s['labels']['mean']:.3g}",
                number(cell["utility"]),
            )
        )
    return "\n\n".join([table(rows, header=True), table(_made_with(content))])


def _comparison_line(content: Mapping[str, Any]) -> str:
    name, metric = next(iter(content["metrics"].items()))
    best = min(metric["rows"], key=lambda row: float(row["rank"]))
    failed = sum(not run["ok"] for run in content["runs"])
    return (
        f"{len(content['methods'])} methods x {len(content['seeds'])} seeds; first in {name}: {best['method']}"
        + (f" {best['mean']['mean']:.4g}" if best["mean"] else "")
        + (f"; {failed} runs failed" if failed else "")
    )


def _comparison_screen(content: Mapping[str, Any]) -> str:
    blocks = []
    for name, metric in content["metrics"].items():
        better = "lower" if metric["lower_is_better"] else "higher"
        rows = [
            (f"{name} ({better} is better)", "mean", "95 % interval", "rank",
             f"minus {content['reference']}", "p (Holm)")
        ]  # fmt: skip
        for row in metric["rows"]:
            mean, gap = row["mean"] or {}, row["difference"] or {}
            rows.append(
                (
                    row["method"],
                    number(mean.get("mean")),
                    _interval(mean),
                    f"{row['rank']:.2g}",
                    "reference" if row["method"] == content["reference"] else number(gap.get("mean")),
                    number(row["p_t_holm"]),
                )
            )
        blocks.append(table(rows, header=True))
    return "\n\n".join(
        [*blocks, "\n".join(f"- {note}" for note in (content["selection"], *content["notes"]))]
    )


def _interval(interval: Mapping[str, Any]) -> str:
    if interval.get("low") is None:
        return "-"
    return f"{interval['low']:.4g} to {interval['high']:.4g}"


def _reproduction_line(content: Mapping[str, Any]) -> str:
    verdicts = [claim["verdict"] for claim in content["claims"]]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    return f"{content['slug']}, {content['scale']} scale: {counted or 'no claims evaluated'}"


def _reproduction_screen(content: Mapping[str, Any]) -> str:
    where = content["hardware"]
    runs = [(arm, run) for arm, about in content["arms"].items() for run in about["runs"]]
    about = [
        ("paper", f"{content['title']} ({content['slug']})"),
        ("scale", f"{content['scale']}, seeds {', '.join(map(str, content['seeds']))}, {len(runs)} runs"),
        ("time", f"{duration(content['seconds'])}, on {where['cores']} cores of {where['processor']}"),
        ("made", content["made"]),
        *_made_with(content),
    ]
    if not content["whole"]:
        about.append(("note", "not the protocol as it stands, so it is no record of the ledger"))
    claims = [("claim", "verdict", "smallest mean gap (must be at least 0)")]
    for claim in content["claims"]:
        judged = (*claim["conditions"], *claim["mechanism"])
        gap = min((float(one["mean"]) for one in judged), default=None)
        of = f" of {len(judged)}" if len(judged) > 1 else ""
        said = claim["reason"] if gap is None else f"{gap:.3g}{of}"
        claims.append((_short(claim["claim"]), claim["verdict"], _short(said)))
    broken = [
        f"- {arm}, seed {run['seed']} {run['status']}: {run['reason']}"
        for arm, run in runs
        if run["status"] not in ("completed", "stopped")
    ]
    blocks = [table(about), table(claims, header=True), *(["\n".join(broken)] if broken else [])]
    return "\n\n".join(blocks)


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _made_with(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {value}" for name, value in (content.get("versions") or {}).items())
    return [("git commit", str(content.get("git_commit") or "-")), ("versions", versions or "-")]


_HEADLINES = {
    ATTACK: _attack_line,
    MATRIX: _matrix_line,
    COMPARISON: _comparison_line,
    REPRODUCTION: _reproduction_line,
}
_SCREENS = {
    ATTACK: _attack_screen,
    MATRIX: _matrix_screen,
    COMPARISON: _comparison_screen,
    REPRODUCTION: _reproduction_screen,
}
