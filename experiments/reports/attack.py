"""The parts of a report that are about attacks: what single clients gave away, and what that costs to prevent."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowerbed.experiments.leakage.matrix import ADAPTIVE
from flowerbed.experiments.leakage.matrix_report import NULL
from flowerbed.experiments.leakage.report import FOUND, ORIGINAL, PAIRS, place_of
from flowerbed.experiments.leakage.scoring import HIT
from flowerbed.experiments.reports import charts
from flowerbed.experiments.reports.charts import Dot, Family, Point, Series
from flowerbed.experiments.reports.collect import ATTACK, MATRIX, read_json, read_run
from flowerbed.experiments.reports.page import (
    BAD,
    GOOD,
    WARN,
    Block,
    Cell,
    Column,
    Fold,
    Gallery,
    Note,
    Pair,
    Part,
    Section,
    Table,
    Tile,
    Tiles,
)
from flowerbed.experiments.reports.run import picture
from flowerbed.experiments.reports.wording import cell, counted, finite, interval, number, seconds

MOST_PAIRS = 48
"""Pairs of images in a gallery."""
PAIRS_A_CELL = 6
MOST_CURVES = 24
NULLS = "null: "
FIGURES = ("psnr", "ssim", "labels", "top-1", "top-10", "hit", "mse", "fmse")
ERRORS = ("mse", "fmse")
Images = npt.NDArray[np.uint8]


def attack_part(directory: Path, title: str = "") -> Part:
    """Return everything that can be shown of an attack on a run."""
    missing: list[str] = []
    found = read_json(directory / "attack.json", missing)
    if not isinstance(found, Mapping):
        return Part(ATTACK, title or directory.name, str(directory), [], missing)
    summary = {k: v for k, v in (found.get("summary") or {}).items() if isinstance(v, Mapping)}
    victims = [v for v in found.get("victims", ()) if isinstance(v, Mapping)]
    defence = str((found.get("defence") or {}).get("name", "?"))
    knows = "knows of it" if found.get("adaptive") else "does not know of it"
    subtitle = f"{directory} · attack '{found.get('attack')}' on {counted(len(victims), 'update')}, defence {defence}"
    if defence != "none":
        subtitle += f", the attacker {knows}"
    granted = found.get("granted") or ()
    blocks: list[Block] = [_attack_tiles(summary, victims)]
    if granted:
        blocks.append(Note(f"Granted to the attacker: {', '.join(map(str, granted))}."))
    sections = [
        Section("Outcome", blocks),
        Section("Gallery", _gallery(directory, victims, missing)),
        Section("How close", _closeness(summary, victims)),
        Section("How it got there", _descent(victims)),
        Section("Figures", [_figure_table(summary), *_victim_table(victims)]),
    ]
    return Part(ATTACK, title or f"Attack {found.get('attack')}", subtitle, sections, missing)


def _attack_tiles(summary: Mapping[str, Mapping[str, Any]], victims: Sequence[Mapping[str, Any]]) -> Tiles:
    psnr, null = summary.get("psnr") or {}, summary.get(NULL) or {}
    mean, base = finite(psnr.get("mean")), finite(null.get("mean"))
    tiles = [
        Tile("PSNR", f"{number(mean)} dB", f"95 % interval {_between(psnr)}; the sample that leaked most "
             f"{number(finite(psnr.get('worst')))} dB")
    ]  # fmt: skip
    if mean is not None and base is not None:
        gap = mean - base
        said = "more than" if gap > 0 else "less than"
        tiles.append(
            Tile("against the class mean", f"{gap:+.1f} dB", f"it shows {said} what needs no gradient at all "
                 f"({number(base)} dB)", BAD if gap > 0 else GOOD)
        )  # fmt: skip
    hit = finite((summary.get("hit") or {}).get("mean"))
    if hit is not None:
        tiles.append(
            Tile("copies", number(hit, True), f"samples of at least {HIT:.0f} dB", BAD if hit else GOOD)
        )
    labels = finite((summary.get("labels") or {}).get("mean"))
    if labels is not None:
        tiles.append(Tile("labels found", number(labels, True), "as a multiset"))
    spent = sum(int(v.get("evaluations") or 0) for v in victims)
    took = math.fsum(finite(v.get("seconds")) or 0.0 for v in victims)
    tiles.append(Tile("gradients", number(spent), f"of the victims' model, {seconds(took)}"))
    return Tiles(tiles)


def _between(value: Mapping[str, Any]) -> str:
    return f"{number(finite(value.get('low')))} to {number(finite(value.get('high')))}"


def pairs_of(
    directory: Path, victims: Sequence[Mapping[str, Any]], missing: list[str], most: int = MOST_PAIRS
) -> tuple[list[Pair], int]:
    """Return pairs of images, those that leaked most first, and how many there are in all."""
    path = directory / PAIRS
    if not path.exists():
        return [], 0
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        missing.append(f"{PAIRS} cannot be read ({str(error).splitlines()[0]}).")
        return [], 0
    found: list[tuple[float, Images, Images, str, str]] = []
    for v in victims:
        end = place_of(v)
        originals, made = tensors.get(f"{ORIGINAL}-{end}"), tensors.get(f"{FOUND}-{end}")
        images = [i for i in v.get("images", ()) if isinstance(i, Mapping)]
        if originals is None or made is None or not len(originals) == len(made) == len(images):
            missing.append(
                f"{PAIRS} does not hold the images of client {v.get('client')} in round {v.get('round')}."
            )
            continue
        true = (v.get("labels") or {}).get("true") or [None] * len(images)
        for i, figures in enumerate(images):
            psnr = finite(figures.get("psnr"))
            label = f", class {true[i]}" if i < len(true) and true[i] is not None else ""
            detail = (
                f"SSIM {number(finite(figures.get('ssim')))}; client {v['client']}, round {v['round']}{label}"
            )
            caption = f"{number(psnr)} dB"
            found.append((-math.inf if psnr is None else psnr, originals[i], made[i], caption, detail))
    found.sort(key=lambda entry: -entry[0])
    shown = [Pair(uri(a), uri(b), caption, detail) for _, a, b, caption, detail in found[:most]]
    return shown, len(found)


def uri(image: Images) -> str:
    """Return an image ``(C, H, W)`` of bytes as a data URI of PNG."""
    from PIL import Image

    channels = image.shape[0]
    pixels = image[0] if channels == 1 else np.moveaxis(image[:3], 0, -1)
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _gallery(directory: Path, victims: Sequence[Mapping[str, Any]], missing: list[str]) -> list[Block]:
    pairs, total = pairs_of(directory, victims, missing)
    if pairs:
        note = "Left the original, right what was reconstructed; those that leaked most come first."
        if total > len(pairs):
            note += f" The first {len(pairs)} of {number(total)}."
        return [Gallery(counted(total, "sample"), pairs, note)]
    path = directory / "gallery.png"
    if not path.exists():
        missing.append("There are no images: neither pairs.safetensors nor gallery.png is there.")
        return []
    found = picture(path, "originals above reconstructions", missing)
    return [] if found is None else [found]


def _closeness(summary: Mapping[str, Mapping[str, Any]], victims: Sequence[Mapping[str, Any]]) -> list[Block]:
    rules = {k.removeprefix(NULLS): float(v["mean"]) for k, v in summary.items() if k.startswith(NULLS)
             and finite(v.get("mean")) is not None}  # fmt: skip
    rows = []
    for v in victims[:60]:
        values = [finite(i.get("psnr")) for i in v.get("images", ()) if isinstance(i, Mapping)]
        known = [x for x in values if x is not None]
        if known:
            rows.append(
                Dot(
                    f"client {v.get('client')}, round {v.get('round')}", sum(known) / len(known), values=known
                )
            )
    chart = charts.dots(
        "PSNR of each update",
        rows,
        "Mean over the samples of an update, and each sample; the dashed line is the class mean, which uses no "
        "gradient: what does not pass it shows nothing."
        + (f" The first 60 of {len(victims)} updates." if len(victims) > 60 else ""),
        x="PSNR in dB, more is closer",
        one_colour=True,
    )
    if chart is None:
        return []
    # Null models lie close together, so their names stand in the summary and in a chart of their own.
    nulls = [
        Dot(
            name,
            value,
            finite(summary[NULLS + name].get("low")),
            finite(summary[NULLS + name].get("high")),
            slot=6,
        )
        for name, value in rules.items()
    ]
    mean = summary.get("psnr") or {}
    nulls.insert(
        0,
        Dot(
            "this attack", finite(mean.get("mean")), finite(mean.get("low")), finite(mean.get("high")), slot=1
        ),
    )
    against = charts.dots(
        "The attack and the null models",
        nulls,
        "Mean PSNR with its 95 % interval. Class mean: the mean training image of the class. Mean colour: the image's "
        "own, which no attacker has. Random and nearest image: others of the class, the nearest chosen by an oracle.",
        x="PSNR in dB",
        wide=True,
    )
    with_rule = {} if "class mean" not in rules else {"class mean": rules["class mean"]}
    charts.draw_rules(_layout(chart), with_rule, False, upright=True)
    return [block for block in (against, chart) if block is not None]


def _layout(chart: Any) -> dict[str, Any]:
    found: dict[str, Any] = chart.figure["layout"]
    return found


def _descent(victims: Sequence[Mapping[str, Any]]) -> list[Block]:
    series = []
    for slot, v in enumerate(victims[:MOST_CURVES]):
        curve = [finite(x) for x in v.get("curve", ())]
        if len(curve) > 1:
            steps = [float(i) for i in range(1, len(curve) + 1)]
            series.append(
                Series(f"client {v.get('client')}, round {v.get('round')}", steps, curve, slot, points=False)
            )
    positive = all(x is None or x > 0 for s in series for x in s.y)
    chart = charts.lines(
        "Cost by step",
        series,
        "What the attack minimises, of the best restart of each update."
        + (f" The first {MOST_CURVES} of {len(victims)} updates." if len(victims) > MOST_CURVES else ""),
        x="step",
        y="cost",
        log_y=positive,
        legend=len(series) <= 8,
    )
    return [] if chart is None else [chart]


def _figure_table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    names = [*(n for n in FIGURES if n in summary), *(n for n in summary if n not in FIGURES)]
    rows = [
        [
            Cell(name, name),
            *(cell(finite(summary[name].get(key))) for key in ("mean", "low", "high", "worst")),
        ]
        for name in names
    ]
    heads = [Column("figure"), *(Column(n, True) for n in ("mean", "low", "high", "worst"))]
    note = (
        "Low and high: bootstrapped 95 % interval of the mean. Worst: the sample that leaked most. PSNR and the null "
        "models in dB; SSIM at most 1; labels, top-1, top-10 and hit are shares."
    )
    return Table("Figures over all samples", heads, rows, note=note, filtered=False)


def _victim_table(victims: Sequence[Mapping[str, Any]]) -> list[Block]:
    rows = []
    for v in victims:
        images = [i for i in v.get("images", ()) if isinstance(i, Mapping)]
        labels = v.get("labels") or {}

        def mean(name: str, images: Sequence[Mapping[str, Any]] = images) -> float | None:
            known = [x for i in images if (x := finite(i.get(name))) is not None]
            return sum(known) / len(known) if known else None

        accuracy = finite(labels.get("accuracy"))
        rows.append(
            [
                cell(v.get("client")),
                cell(v.get("round")),
                cell(len(images)),
                *(cell(mean(name)) for name in ("psnr", "ssim")),
                Cell(", ".join(map(str, labels.get("true", ()))), None),
                Cell(", ".join(map(str, labels.get("found", ()))), None),
                Cell(
                    number(accuracy, True),
                    accuracy,
                    "" if accuracy is None else WARN if accuracy == 1 else "",
                ),
                cell(finite(v.get("cost"))),
                cell(v.get("evaluations")),
                Cell(seconds(finite(v.get("seconds"))), finite(v.get("seconds"))),
            ]
        )
    heads = [Column("client", True), Column("round", True), Column("samples", True), Column("PSNR", True),
             Column("SSIM", True), Column("true labels"), Column("labels found"), Column("share found", True),
             Column("cost", True), Column("gradients", True), Column("seconds", True)]  # fmt: skip
    return [Table("Updates", heads, rows)] if rows else []


# ---- matrices -------------------------------------------------------------------------------------------------------


def matrix_part(directory: Path) -> Part:
    """Return a matrix of defences and attacks."""
    missing: list[str] = []
    found = read_json(directory / "matrix.json", missing)
    cells = [c for c in (found.get("cells", ()) if isinstance(found, Mapping) else ()) if _whole(c, missing)]
    rounds = list(dict.fromkeys(c["round"] for c in cells))
    defences = list(dict.fromkeys(c["defence"] for c in cells))
    attacks = list(dict.fromkeys(c["attack"] for c in cells))
    sections = [Section("Outcome", _verdicts(cells, rounds, defences))]
    sections.append(Section("What leaks", _heat_maps(cells, rounds, defences, missing)))
    sections.append(Section("Leakage and utility", _utilities(directory, cells, rounds, defences)))
    sections.append(Section("Gallery", _contact_sheets(directory, cells, rounds, defences, missing)))
    sections.append(Section("Cells", _cell_table(cells)))
    subtitle = (
        f"{directory} · {counted(len(defences), 'defence')}, {counted(len(attacks), 'attack')}, models of "
        f"{counted(len(rounds), 'round')}"
    )
    return Part(
        MATRIX, f"Attacks in {directory.resolve().name}", subtitle, [s for s in sections if cells], missing
    )


def _whole(c: Any, missing: list[str]) -> bool:
    known = isinstance(c, Mapping) and all(k in c for k in ("defence", "attack", "round", "knows", "summary"))
    whole = known and isinstance(c["summary"].get("psnr"), Mapping)
    if not whole:
        missing.append("matrix.json has a cell that cannot be read; left out.")
    return bool(whole)


def _psnr(c: Mapping[str, Any], key: str = "mean") -> float | None:
    return finite(c["summary"]["psnr"].get(key))


def _null(c: Mapping[str, Any]) -> float | None:
    return finite((c["summary"].get(NULL) or {}).get("mean"))


def _worst(cells: Sequence[Mapping[str, Any]], defence: str, round_: int) -> Mapping[str, Any] | None:
    """Return the attack that leaks most from a defence: what it must be judged by."""
    own = [c for c in cells if c["defence"] == defence and c["round"] == round_ and _psnr(c) is not None]
    return max(own, key=lambda c: _psnr(c) or -math.inf, default=None)


def _verdicts(
    cells: Sequence[Mapping[str, Any]], rounds: Sequence[int], defences: Sequence[str]
) -> list[Block]:
    rows = []
    for defence in defences:
        for round_ in rounds:
            top = _worst(cells, defence, round_)
            if top is None:
                continue
            mean, null = _psnr(top), _null(top)
            gap = None if mean is None or null is None else mean - null
            text = interval(mean, _psnr(top, "low"), _psnr(top, "high"))
            tone = "" if gap is None else BAD if gap > 0 else GOOD
            rows.append(
                [
                    Cell(defence, defence),
                    cell(round_),
                    Cell(f"{top['attack']} ({top['knows']})", str(top["attack"])),
                    Cell(text, mean),
                    cell(null),
                    Cell("–" if gap is None else f"{gap:+.1f} dB", gap, tone),
                    cell(finite(top.get("utility")), True),
                ]
            )
    heads = [Column("defence"), Column("round", True), Column("worst attack"), Column("PSNR, dB", True),
             Column("class mean, dB", True), Column("against it", True), Column("accuracy", True)]  # fmt: skip
    note = (
        "A defence is judged by the attack that leaks most from it; one below the class mean shows nothing."
    )
    return [Table("What leaks most from each defence", heads, rows, note=note)]


def _heat_maps(
    cells: Sequence[Mapping[str, Any]], rounds: Sequence[int], defences: Sequence[str], missing: list[str]
) -> list[Block]:
    columns = list(dict.fromkeys((c["attack"], c["knows"]) for c in cells))
    names = [f"{a}, {k}" if k == ADAPTIVE else str(a) for a, k in columns]
    known = [v for c in cells for v in (_psnr(c), _null(c)) if v is not None]
    blocks: list[Block | None] = []
    for round_ in rounds:
        found = {(c["defence"], c["attack"], c["knows"]): c for c in cells if c["round"] == round_}
        z = np.full((len(defences), len(columns) + 1), np.nan)
        for y, defence in enumerate(defences):
            for x, key in enumerate(columns):
                value = _psnr(found[defence, *key]) if (defence, *key) in found else None
                z[y, x] = np.nan if value is None else value
            nulls = [v for c in found.values() if c["defence"] == defence and (v := _null(c)) is not None]
            z[y, -1] = nulls[0] if nulls else np.nan
        above = sum(
            (v := _psnr(c)) is not None and (n := _null(c)) is not None and v > n for c in found.values()
        )
        blocks.append(
            charts.heat(
                f"Mean PSNR, model of round {round_}",
                z,
                [*names, "null: class mean"],
                [str(d) for d in defences],
                f"In dB by defence and attack; the last column is the null model. {above} of {len(found)} attacks leak "
                "more than it. Empty: not made, since knowing of that defence makes no difference.",
                x="attack",
                y="defence",
                value="PSNR, dB",
                low=min(known) if known else None,
                high=max(known) if known else None,
                digits=".1f",
                row_height=44,
            )
        )
    return [block for block in blocks if block is not None]


def _utilities(
    directory: Path, cells: Sequence[Mapping[str, Any]], rounds: Sequence[int], defences: Sequence[str]
) -> list[Block]:
    families = _families(directory, defences)
    blocks: list[Block | None] = []
    for round_ in rounds:
        points: dict[str, list[Point]] = {}
        for defence in defences:
            top = _worst(cells, defence, round_)
            mean, utility = (None, None) if top is None else (_psnr(top), finite(top.get("utility")))
            if top is not None and mean is not None and utility is not None:
                point = Point(str(defence), utility, mean, _psnr(top, "low"), _psnr(top, "high"))
                points.setdefault(families[defence], []).append(point)
        nulls = [v for c in cells if c["round"] == round_ and (v := _null(c)) is not None]
        rules = {"class mean": sum(nulls) / len(nulls)} if nulls else {}
        drawn = [Family(name, found, slot, True) for slot, (name, found) in enumerate(points.items())]
        blocks.append(
            charts.scatter(
                f"Leakage and utility, model of round {round_}",
                drawn,
                "PSNR of the worst attack on each defence, with its 95 % interval, over the accuracy that the defended "
                "run reached; strengths of one defence are joined. Further down and right is better; below the dashed "
                "line, which needs no gradient, an attack shows nothing.",
                x="accuracy of the run",
                y="PSNR of the worst attack, dB",
                percent_x=True,
                rules=rules,
                wide=len(rounds) == 1,
            )
        )
    return [block for block in blocks if block is not None]


def _families(directory: Path, defences: Sequence[str]) -> dict[str, str]:
    """Return the name of each defence's kind, from the configuration of its run; its label where there is none."""
    kinds = {}
    for defence in defences:
        folder = directory / "runs" / "".join(c if c.isalnum() or c in "-_." else "-" for c in str(defence))
        section = read_run(folder).config.get("defence") if folder.is_dir() else None
        name = section.get("name") if isinstance(section, Mapping) else None
        kinds[defence] = str(name or defence)
    return kinds


def _contact_sheets(
    directory: Path,
    cells: Sequence[Mapping[str, Any]],
    rounds: Sequence[int],
    defences: Sequence[str],
    missing: list[str],
) -> list[Block]:
    """Return, for each defence, what the worst attack on it saw."""
    blocks: list[Block] = []
    for defence in defences:
        for round_ in rounds:
            top = _worst(cells, defence, round_)
            if top is None:
                continue
            label = "".join(c if c.isalnum() or c in "-_." else "-" for c in str(defence))
            attack = f"{top['attack']}-round-{round_}-{top['knows']}"
            folder = (
                directory
                / "runs"
                / label
                / "attacks"
                / "".join(c if c.isalnum() or c in "-_." else "-" for c in attack)
            )
            found = read_json(folder / "attack.json", missing) if (folder / "attack.json").exists() else {}
            victims = [v for v in (found or {}).get("victims", ()) if isinstance(v, Mapping)]
            pairs, total = pairs_of(folder, victims, missing, PAIRS_A_CELL)
            title = f"{defence}, model of round {round_}: {top['attack']} ({top['knows']})"
            if pairs:
                note = (
                    f"The {len(pairs)} of {number(total)} samples that leaked most."
                    if total > len(pairs)
                    else ""
                )
                blocks.append(Gallery(title, pairs, note, wide=False))
            elif (folder / "gallery.png").exists():
                shown = picture(folder / "gallery.png", title, missing)
                blocks += [] if shown is None else [shown]
    if not blocks:
        missing.append("There are no images of the attacks beside matrix.json.")
    return blocks


def _cell_table(cells: Sequence[Mapping[str, Any]]) -> list[Block]:
    shown = [name for name in FIGURES if any(name in c["summary"] for c in cells)]
    rows = []
    for c in cells:
        gap = None if (v := _psnr(c)) is None or (n := _null(c)) is None else v - n
        row = [Cell(str(c["defence"]), str(c["defence"])), cell(c["round"]), Cell(str(c["attack"]), str(c["attack"])),
               Cell(str(c["knows"]), str(c["knows"]))]  # fmt: skip
        for name in shown:
            value = c["summary"].get(name) or {}
            mean, low, high = (finite(value.get(key)) for key in ("mean", "low", "high"))
            row.append(Cell(interval(mean, low, high), mean))
        row.append(
            Cell("–" if gap is None else f"{gap:+.1f}", gap, "" if gap is None else BAD if gap > 0 else GOOD)
        )
        row += [cell(finite(c.get("utility")), True), cell(c.get("evaluations"))]
        row.append(Cell(seconds(finite(c.get("seconds"))), finite(c.get("seconds"))))
        rows.append(row)
    heads = [Column("defence"), Column("round", True), Column("attack"), Column("attacker")]
    heads += [Column(name, True) for name in shown]
    heads += [
        Column("dB above class mean", True),
        Column("accuracy", True),
        Column("gradients", True),
        Column("time", True),
    ]
    note = "Means with bootstrapped 95 % intervals over the victims' samples."
    table = Table("Every attack on every defence", heads, rows, note=note)
    return [table] if len(rows) <= 20 else [Fold("All cells", [table], counted(len(rows), "cell"))]
