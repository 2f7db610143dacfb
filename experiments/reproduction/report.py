"""A reproduction as a person reads it: the verdicts on the screen, Markdown and pictures in its folder."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flowerbed.experiments import paired
from flowerbed.experiments.reproduction import figures
from flowerbed.experiments.reproduction.claims import (
    DIRECTION,
    MECHANISM,
    NOT_EVALUATED,
    NOT_REPRODUCED,
    REPRODUCED,
    Judged,
    Verdict,
)
from flowerbed.experiments.reproduction.engine import SMOKE, Reproduction
from flowerbed.experiments.reproduction.ledger import Record
from flowerbed.experiments.text import duration
from flowerbed.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

LOG = logging.getLogger(__name__)
COLOURS = {
    REPRODUCED: "green",
    DIRECTION: "yellow",
    MECHANISM: "yellow",
    NOT_REPRODUCED: "red",
    NOT_EVALUATED: "dim",
}


def folder_of(made: Reproduction, out: Path) -> Path:
    """Return where a reproduction's files are kept."""
    return out / made.scale.paper.slug / made.scale.name


def write(made: Reproduction, record: Record, out: Path) -> list[Path]:
    """Write record.json, report.md and the pictures beside the runs; returns the files."""
    folder = folder_of(made, out)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _draw(made, folder)
    texts = {
        "record.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n",
        "report.md": markdown(made, record, [path.name for path in drawn]),
    }
    for name, text in texts.items():
        atomic_write(folder / name, text.encode())
    return [*(folder / name for name in texts), *drawn]


def markdown(made: Reproduction, record: Record, pictures: list[str]) -> str:
    """Return the report as Markdown."""
    paper = made.scale.paper
    blocks = [f"# {paper.title}", f"`{paper.slug}`, {about(made, record)}"]
    if made.verdicts:
        rows = [[v.text, v.verdict, *numbers(v)] for v in made.verdicts]
        blocks += ["## Claims", _table(["claim", "verdict", "inequality", "gap (must be at least 0)"], rows)]
    names = figures.claimed_metrics(made)
    rows = [
        [arm, made.scale.arms[arm].about, *(cell(made, arm, name) for name in names)] for arm in made.arms
    ]
    blocks += ["## Arms", _table(["arm", "what it is", *names], rows)]
    blocks += [f"![{name}]({name})" for name in pictures]
    if made.broken:
        lines = (f"- {arm}, seed {seed} {o.status}: {o.reason}" for arm, seed, o in made.broken)
        blocks += ["## Broken runs", "\n".join(lines)]
    return "\n\n".join(blocks) + "\n"


def about(made: Reproduction, record: Record) -> str:
    """Return the sentence that says what was run, how long and where."""
    where = record["hardware"]
    changed = "" if made.whole else " Not the protocol as it stands, so it is no record of the ledger."
    return (
        f"{made.scale.name} scale, seeds {', '.join(map(str, made.seeds))}: {len(made.outcomes)} runs, "
        f"{duration(made.seconds)} one after the other, on {where['cores']} cores of {where['processor']}"
        + (f" with {where['gpu']}" if where["gpu"] else "")
        + f", torch {record['versions'].get('torch')}.{changed}"
    )


def claims_table(made: Reproduction) -> Table:
    """Return the verdicts for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=made.scale.paper.title, title_justify="left", header_style="bold", show_lines=True)
    for name in ("claim", "verdict", "gap (must be at least 0)"):
        table.add_column(name, overflow="fold")
    for verdict in made.verdicts:
        inequality, gap = numbers(verdict)
        said = [verdict.verdict, *([verdict.reason] if verdict.reason else [])]
        table.add_row(
            Text(f"{verdict.claim}\n{verdict.text}"),
            Text("\n".join(said), COLOURS[verdict.verdict]),
            Text(f"{inequality}\n{gap}"),
        )
    return table


def arms_table(made: Reproduction) -> Table:
    """Return the arms' figures in the claims' metrics for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    names = figures.claimed_metrics(made)
    table = Table(box=SIMPLE_HEAD, header_style="bold")
    table.add_column("arm")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for arm in made.arms:
        table.add_row(Text(arm), *(Text(cell(made, arm, name)) for name in names))
    return table


def cell(made: Reproduction, arm: str, metric: str) -> str:
    """Return an arm's mean with the half width of its interval, or why there is none."""
    outcomes = made.of(arm)
    broken = [o.status for o in outcomes if o.status in ("failed", "diverged")]
    if broken:
        return f"{len(broken)} of {len(outcomes)} {broken[0]}"
    interval = paired.t_interval([o.values.get(metric) for o in outcomes])
    if interval is None:
        return ""
    half = "" if interval.high is None else f" ± {interval.high - interval.mean:.2g}"
    return f"{interval.mean:.4g}{half}"


def numbers(verdict: Verdict) -> tuple[str, str]:
    """Return a verdict's inequalities and their gaps, a line each; or the reason why there are none."""
    judged = (*verdict.conditions, *verdict.mechanism)
    if not judged:
        return "", verdict.reason
    return "\n".join(one.text for one in judged), "\n".join(map(_gap, judged))


def _gap(judged: Judged) -> str:
    within = "" if judged.low is None else f" [{judged.low:.3g}, {judged.high:.3g}]"
    return f"{judged.mean:.3g}{within}; by seed {', '.join(f'{gap:.3g}' for gap in judged.gaps)}"


def _draw(made: Reproduction, folder: Path) -> list[Path]:
    """Draw what can be drawn; a picture that fails is logged and costs nobody the result."""
    pictures: dict[str, Callable[[], Figure | None]] = {
        "arms.png": lambda: figures.arms_figure(made),
        "curves.png": lambda: figures.curves_figure(made),
    }
    own = made.scale.paper.figure
    if own is not None:
        pictures[f"{made.scale.paper.slug}.png"] = lambda: own(made)
    drawn = []
    for name, make in pictures.items():
        try:
            figure = make()
            if figure is not None:
                data = io.BytesIO()
                figure.savefig(data, format="png")
                atomic_write(folder / name, data.getvalue())
                drawn.append(folder / name)
        except Exception as error:
            if isinstance(error, KeyError) and not made.whole:
                LOG.info("%s shows arms that the claims asked for do not need; it is not drawn.", name)
                continue
            if made.scale.name == SMOKE:
                # A smoke run is there to find this.
                raise
            LOG.warning("%s was not drawn: %s: %s", folder / name, type(error).__name__, error)
    return drawn


def _table(header: list[str], rows: list[list[str]]) -> str:
    def joined(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", "<br>") for c in cells) + " |"

    return "\n".join([joined(header), joined(["---"] * len(header)), *map(joined, rows)])
