"""The part of a report that is about papers: the ledger with its verdicts, and each paper's figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowerbed.errors import ConfigError
from flowerbed.experiments.reports import charts
from flowerbed.experiments.reports.charts import Dot
from flowerbed.experiments.reports.collect import PAPERS, read_json, records_below
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
from flowerbed.experiments.reports.run import picture
from flowerbed.experiments.reports.wording import (
    cell,
    counted,
    finite,
    heading,
    interval,
    is_share,
    number,
    seconds,
)
from flowerbed.experiments.reproduction import ledger
from flowerbed.experiments.reproduction.catalogue import catalogue
from flowerbed.experiments.reproduction.claims import (
    DIRECTION,
    MECHANISM,
    NOT_EVALUATED,
    NOT_REPRODUCED,
    REPRODUCED,
)
from flowerbed.experiments.reproduction.figures import MOST_METRICS
from flowerbed.experiments.reproduction.ledger import ABSENT, EDITED, NOT_RUN, RECORDED, STALE, Standing
from flowerbed.experiments.reproduction.paper import built

TONES = {
    REPRODUCED: GOOD, DIRECTION: WARN, MECHANISM: WARN, NOT_REPRODUCED: BAD, NOT_EVALUATED: MUTED,
    RECORDED: GOOD, STALE: WARN, EDITED: BAD, NOT_RUN: MUTED, ABSENT: MUTED,
}  # fmt: skip


def ledger_part(folders: Sequence[Path], folder: Path = ledger.LEDGER) -> Part:
    """Return every paper of the catalogue with its standing; ``folders`` hold runs of papers, with their pictures."""
    missing: list[str] = []
    there = built()
    standings = []
    for slug in catalogue():
        try:
            standings.append(ledger.standing(slug, slug in there, folder))
        except ConfigError as error:
            missing.append(f"{slug}: {error}")
            standings.append(Standing(slug, EDITED, "its record cannot be read"))
    found = [records_below(path) for path in folders]
    pictures = {slug: [p for one in found for p in one.get(slug, ())] for slug in catalogue()}
    kept = [s for s in standings if s.record is not None]
    sections = [
        Section("Outcome", [_tiles(standings)]),
        Section("Ledger", [_ledger_table(standings)]),
        Section(
            "Papers", [_paper(s.record, s, pictures[s.slug], missing) for s in kept if s.record is not None]
        ),
    ]
    if not any(pictures.values()):
        missing.append(
            "The papers' own pictures are kept beside their runs: name that folder too, for example "
            "flowerbed report --papers runs/papers"
        )
    subtitle = (
        f"{counted(len(standings), 'paper')} of the catalogue, {counted(len(kept), 'record')} in the ledger"
    )
    return Part(PAPERS, "Papers", subtitle, sections, missing)


def reproductions_part(folder: Path) -> Part:
    """Return the reproductions below a folder, as ``flowerbed reproduce`` left them, whatever the ledger says."""
    missing: list[str] = []
    blocks: list[Block] = []
    records = []
    for folders in records_below(folder).values():
        for path in folders:
            record = read_json(path / "record.json", missing)
            if isinstance(record, Mapping):
                records.append(record)
                blocks.append(_paper(record, None, [path], missing))
    sections = [Section("Outcome", [_claim_tiles(records)]), Section("Papers", blocks)]
    return Part(
        PAPERS,
        f"Papers in {folder.resolve().name}",
        f"{folder} · {counted(len(records), 'reproduction')}",
        sections,
        missing,
    )


def _tiles(standings: Sequence[Standing]) -> Tiles:
    counts = Counter(s.status for s in standings)
    order = [RECORDED, STALE, EDITED, NOT_RUN, ABSENT]
    tiles = [
        Tile(name, number(counts[name]), "papers", TONES[name] if name != ABSENT else "")
        for name in order
        if counts[name]
    ]
    return Tiles([*tiles, *_claim_tiles([s.record for s in standings if s.record]).tiles])


def _claim_tiles(records: Sequence[Mapping[str, Any]]) -> Tiles:
    verdicts = Counter(str(c.get("verdict")) for r in records for c in r.get("claims", ()))
    tiles = [Tile(f"claims {name}", number(n), f"of {sum(verdicts.values())}", TONES.get(name, ""))
             for name, n in verdicts.most_common()]  # fmt: skip
    spent = sum(finite(r.get("seconds")) or 0.0 for r in records)
    return Tiles([*tiles, Tile("time", seconds(spent), "of all records, one run after the other")])


def _ledger_table(standings: Sequence[Standing]) -> Table:
    rows = []
    order = [RECORDED, STALE, EDITED, NOT_RUN, ABSENT]
    for s in sorted(standings, key=lambda s: order.index(s.status)):
        entry, record = catalogue()[s.slug], s.record or {}
        verdicts = Counter(s.verdicts)
        status = s.status + (f": {s.reason}" if s.reason else "")
        rows.append(
            [
                Cell(s.slug, s.slug, link=f"paper-{s.slug}" if s.record else ""),
                Cell(entry.title, entry.title),
                Cell(status, s.status, TONES[s.status]),
                cell(verdicts[REPRODUCED] if record else None),
                cell(verdicts[DIRECTION] + verdicts[MECHANISM] if record else None),
                cell(verdicts[NOT_REPRODUCED] if record else None),
                cell(verdicts[NOT_EVALUATED] if record else None),
                Cell(str(record.get("scale", "–")), record.get("scale")),
                cell(len(record["seeds"]) if record.get("seeds") else None),
                Cell(str(record.get("made", "–"))[:10], record.get("made")),
                Cell(seconds(finite(record.get("seconds"))), finite(record.get("seconds"))),
                Cell(entry.seam, entry.seam),
            ]
        )
    heads = [Column("paper"), Column("title"), Column("status"), Column("reproduced", True), Column("partly", True),
             Column("not", True), Column("not evaluated", True), Column("scale"), Column("seeds", True), Column("made"),
             Column("time", True), Column("leans on")]  # fmt: skip
    note = (
        "Claims by their verdict; partly: the effect has the right sign but not the claimed size, or only the weaker "
        "statement about the mechanism holds. A record holds as long as the protocol, the paper's code and its claims "
        "are what they were; else it is stale."
    )
    return Table("Every paper of the catalogue", heads, rows, note=note)


def _paper(
    record: Mapping[str, Any], standing: Standing | None, folders: Sequence[Path], missing: list[str]
) -> Fold:
    claims = [c for c in record.get("claims", ()) if isinstance(c, Mapping)]
    verdicts = [str(c.get("verdict")) for c in claims]
    blocks: list[Block] = [Note(_about(record))]
    if standing is not None and standing.reason:
        blocks.append(Note(f"{standing.status}: {standing.reason}", TONES[standing.status]))
    if claims:
        blocks.append(_claims_table(str(record.get("slug")), claims))
    blocks += _arms(record)
    for folder in folders:
        if folder.name == record.get("scale"):
            blocks += _own_pictures(folder, str(record.get("slug")), missing)
    broken = [
        f"{arm}, seed {r.get('seed')} {r.get('status')}: {r.get('reason')}"
        for arm, found in (record.get("arms") or {}).items()
        for r in found.get("runs", ())
        if r.get("status") in ("failed", "diverged")
    ]
    blocks += [Note(text, WARN) for text in broken[:10]]
    counts = Counter(verdicts)
    worst = next((v for v in (NOT_REPRODUCED, MECHANISM, DIRECTION, REPRODUCED) if counts[v]), NOT_EVALUATED)
    detail = ", ".join(f"{n} {v}" for v, n in counts.most_common()) or "no claims evaluated"
    key = f"paper-{record.get('slug')}"
    title = f"{record.get('slug')}: {record.get('title')}"
    return Fold(title, blocks, detail, TONES[worst], key if standing is not None else "")


def _about(record: Mapping[str, Any]) -> str:
    where, versions = record.get("hardware") or {}, record.get("versions") or {}
    runs = sum(len(a.get("runs", ())) for a in (record.get("arms") or {}).values())
    gpu = f" with {where['gpu']}" if where.get("gpu") else ""
    return (
        f"{record.get('scale')} scale, seeds {', '.join(map(str, record.get('seeds', ())))}: {counted(runs, 'run')} in "
        f"{seconds(finite(record.get('seconds')))}, one after the other, on {where.get('cores', '?')} cores of "
        f"{where.get('processor', 'an unknown processor')}{gpu}, torch {versions.get('torch', '?')}, made "
        f"{str(record.get('made', '?'))[:10]}."
    )


def _claims_table(slug: str, claims: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for c in claims:
        judged = [*c.get("conditions", ()), *c.get("mechanism", ())]
        verdict = str(c.get("verdict"))
        reason = f"\n{c['reason']}" if c.get("reason") else ""
        for place, one in enumerate(judged or [{}]):
            mean, low, high = (finite(one.get(key)) for key in ("mean", "low", "high"))
            marked = (
                None if mean is None else (mean, mean if low is None else low, mean if high is None else high)
            )
            gaps = [finite(g) for g in one.get("gaps", ())]
            rows.append(
                [
                    Cell(f"{c.get('claim')}\n{c.get('text')}" if place == 0 else f"{c.get('claim')}, continued",
                         str(c.get("claim"))),
                    Cell(verdict + (reason if place == 0 else ""), verdict, TONES.get(verdict, "")),
                    Cell(interval(mean, low, high), mean, mark=marked),
                    Cell(str(one.get("text", "–")), str(one.get("text", ""))),
                    Cell(", ".join(number(g) for g in gaps), None),
                ]
            )  # fmt: skip
    heads = [Column("claim"), Column("verdict"), Column("gap", True), Column("inequality"), Column("by seed")]
    note = (
        "An inequality holds where its gap is at least 0 (the dotted line); beside it the 95 % interval over seeds, "
        "each in a scale of its own."
    )
    return Table(f"Claims of {slug}", heads, rows, note=note)


def _arms(record: Mapping[str, Any]) -> list[Block]:
    """Return the arms' figures in the metrics that the claims speak of."""
    arms = {str(k): v for k, v in (record.get("arms") or {}).items() if isinstance(v, Mapping)}
    texts = " ".join(
        str(one.get("text"))
        for c in record.get("claims", ())
        for one in (*c.get("conditions", ()), *c.get("mechanism", ()))
    )
    names = dict.fromkeys(n for a in arms.values() for n in a.get("figures", {}))
    claimed = sorted((n for n in names if f"{n}[" in texts), key=lambda n: texts.index(f"{n}["))[
        :MOST_METRICS
    ]
    blocks: list[Block | None] = []
    for name in claimed:
        rows = []
        for slot, (arm, found) in enumerate(arms.items()):
            figures = found.get("figures", {}).get(name)
            if figures is None or f"{name}[{arm}]" not in texts:
                continue
            statuses = [str(r.get("status")) for r in found.get("runs", ())]
            broken = [s for s in statuses if s in ("failed", "diverged")]
            said = f"{len(broken)} of {len(statuses)} {broken[0]}" if broken else ""
            values = [v for x in figures.get("values", ()) if (v := finite(x)) is not None]
            mean, low, high = (finite(figures.get(key)) for key in ("mean", "low", "high"))
            rows.append(Dot(arm, mean, low, high, values, slot, said))
        blocks.append(
            charts.dots(
                f"{heading(name)} by arm",
                rows,
                "The arms that the claims compare: mean over seeds with the 95 % interval, and each seed.",
                x=name,
                percent=is_share(name),
                wide=False,
                one_colour=True,
            )
        )
    table = Table(
        "Arms",
        [Column("arm"), Column("what it is"), *(Column(n, True) for n in claimed)],
        [
            [Cell(arm, arm), Cell(str(found.get("about", "")), str(found.get("about", ""))),
             *(cell(finite((found.get("figures", {}).get(n) or {}).get("mean")), is_share(n)) for n in claimed)]
            for arm, found in arms.items()
        ],
    )  # fmt: skip
    return [*(block for block in blocks if block is not None), table]


def _own_pictures(folder: Path, slug: str, missing: list[str]) -> list[Block]:
    """Return the paper's own figure and the curves; what the report draws itself is left out."""
    found: list[Block] = []
    for name, title in ((f"{slug}.png", "The paper's figure"), ("curves.png", "Curves of the arms")):
        if (folder / name).exists():
            shown = picture(folder / name, f"{title}: {slug}", missing)
            found += [] if shown is None else [shown]
    return found
