"""The pictures of a run: how it learned, and who holds what.

Drawn with matplotlib's Agg canvas directly, so neither a display nor pyplot's global state is touched.
matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flowerbed.server.callbacks import CLIENTS, SERVER, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Counts = npt.NDArray[np.int64]
LOG = logging.getLogger(__name__)

INK, GRID = "#333333", "#dddddd"
BLUE, ORANGE, RED, GREY = "#2b6ca3", "#d9822b", "#b33a3a", "#888888"
NUMBERED = 320
"""Most cells that carry their number."""
MOST_TICKS = 20
CROWDED = 60
"""More clients than this are not drawn one by one."""


def draw(
    folder: Path, records: Sequence[Record], counts: Counts | None, class_names: Sequence[str], title: str
) -> list[Path]:
    """Draw everything there is data for into ``folder`` and return the files.

    ``counts`` is int64 ``(clients, classes)``; None where there are too many clients for a picture.

    A run is worth more than its pictures: what cannot be drawn is logged, never raised.
    """
    drawn: list[Path] = []
    pictures: dict[str, Callable[[], Figure | None]] = {
        "partition.png": lambda: None if counts is None else partition_figure(counts, class_names, title),
        "accuracy.png": lambda: accuracy_figure(records, title),
        "pseudo_labels.png": lambda: pseudo_label_figure(records, title),
    }
    for name, make in pictures.items():
        try:
            figure = make()
            if figure is not None:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(folder / name)
                drawn.append(folder / name)
        except Exception as error:  # noqa: BLE001 - the run is over; its result counts
            LOG.warning("%s was not drawn: %s: %s", folder / name, type(error).__name__, error)
    return drawn


def accuracy_figure(records: Sequence[Record], title: str = "") -> Figure | None:
    """Return accuracy and loss by round, on the server's test set and on the clients'; None without any."""
    server = [r for r in records if r.phase == SERVER]
    clients = [r for r in records if r.phase == CLIENTS]
    training = [r for r in records if r.phase not in (SERVER, CLIENTS) and "loss" in r.metrics]
    if not server and not clients and not training:
        return None
    figure, axes = _canvas(9, 3.6, 2)
    accuracy, loss = axes
    _line(accuracy, server, "accuracy", "server's test set", BLUE)
    _line(accuracy, clients, "accuracy-mean", "clients' own test data, mean", ORANGE)
    _line(accuracy, clients, "accuracy-worst", "clients' own test data, worst", RED, style="--")
    _line(loss, server, "loss", "server's test set", BLUE)
    _line(loss, clients, "loss", "clients' own test data", ORANGE)
    _line(loss, training, "loss", "local training", GREY, style=":")
    accuracy.set_ylim(0, 1)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    loss.set_ylim(bottom=0)
    _by_round(accuracy, "accuracy", records)
    _by_round(loss, "loss", records)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def pseudo_label_figure(records: Sequence[Record], title: str = "") -> Figure | None:
    """Return how many pseudo-labels were used, how good they were and who wrote them, by round.

    None without any. Rounds in which no unlabelled sample was seen are left out.
    """
    seen = [r for r in records if sum(r.metrics.get("pseudo-total-per-class", ()))]
    if not seen:
        return None
    figure, (used, right) = _canvas(9, 3.6, 2)
    _line(used, seen, "pseudo-coverage", "used, of all seen (coverage)", BLUE)
    _line(used, seen, "pseudo-precision", "right, of those used (precision)", ORANGE)
    _line(used, seen, "agreement", "both experts agree, of those used", GREY, style=":")
    _line(used, seen, "chosen-global-share", "written by the global expert, of those used", RED, style="--")
    _line(right, seen, "pseudo-correct-share", "used and right", BLUE)
    _line(right, seen, "global-alone-correct-share", "had the global expert decided alone", RED, style="--")
    _line(right, seen, "local-alone-correct-share", "had the local expert decided alone", GREY, style="--")
    _by_round(used, "pseudo-labels", records)
    _by_round(right, "used and right, of all seen", records)
    for axis in (used, right):
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    used.set_ylim(0, 1.02)
    right.set_ylim(bottom=0)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def partition_figure(counts: Counts, class_names: Sequence[str], title: str = "") -> Figure:
    """Return the clients' classes as a heat map, and their sizes beside it.

    ``counts`` is int64 ``(clients, classes)``. Few clients get a row with numbers each. Many are ordered by
    their largest class and coloured by shares, since single rows and counts are no longer readable.
    """
    clients, classes = counts.shape
    crowded = clients > CROWDED
    if crowded:
        counts = counts[np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))]
    totals = counts.sum(axis=1)
    height = float(np.clip(1.8 + 0.24 * clients, 2.6, 8.0))
    width = float(np.clip(4.2 + 0.42 * classes, 6.4, 11.0))
    figure, (heat, sizes) = _canvas(width, height, 2, width_ratios=(4, 1), sharey=True)
    cells = counts / np.maximum(totals, 1)[:, None] if crowded else counts
    image = heat.imshow(cells, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    heat.set_xlabel("class", color=INK, fontsize=9)
    heat.set_ylabel("clients, ordered by largest class" if crowded else "client", color=INK, fontsize=9)
    _ticks(heat.xaxis, classes, class_names)
    _ticks(heat.yaxis, clients, [str(k) for k in range(clients)])
    if not crowded and clients * classes <= NUMBERED:
        _numbers(heat, counts)
    bar = figure.colorbar(image, ax=heat, pad=0.02, aspect=30)
    bar.set_label("share of the client's samples" if crowded else "samples", color=INK, fontsize=8)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    if crowded:
        sizes.fill_betweenx(np.arange(clients), 0, totals, step="mid", color=BLUE, linewidth=0)
    else:
        sizes.barh(np.arange(clients), totals, height=0.8, color=BLUE)
    sizes.set_xlim(left=0)
    sizes.set_xlabel("samples", color=INK, fontsize=9)
    sizes.tick_params(labelleft=False, left=False)
    sizes.grid(True, axis="x", color=GRID, linewidth=0.8)
    sizes.set_axisbelow(True)
    sizes.locator_params(axis="x", nbins=3)
    heat.set_ylim(clients - 0.5, -0.5)
    text = f"{clients} clients, {totals.min()} to {totals.max()} samples each" if clients > 1 else "1 client"
    heat.set_title(f"{text}, {totals.sum()} in all", loc="left", color=INK, fontsize=9)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _canvas(width: float, height: float, columns: int, **layout: Any) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, **layout)
    for axis in axes:
        axis.tick_params(colors=INK, labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color("#999999")
    return figure, list(axes)


def _by_round(axis: Axes, label: str, records: Sequence[Record]) -> None:
    """Give an axis whose curves are drawn its title, its legend, and the rounds of the whole run."""
    from matplotlib.ticker import MaxNLocator

    axis.set_title(label, loc="left", color=INK, fontsize=10)
    axis.set_xlabel("round", color=INK, fontsize=9)
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = max(r.round for r in records)
    axis.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)


def _line(
    axis: Axes, records: Sequence[Record], metric: str, label: str, colour: str, style: str = "-"
) -> None:
    points = [(r.round, r.metrics[metric]) for r in records if metric in r.metrics]
    if points:
        # A short run shows its single evaluations; a long one only the curve.
        marker = "o" if len(points) <= 30 else None
        axis.plot(*zip(*points, strict=True), style, color=colour, label=label, marker=marker, markersize=3)


def _ticks(axis: Any, count: int, names: Sequence[str]) -> None:
    step = max(1, -(-count // MOST_TICKS))
    # Round numbers are easier to read off than every 53rd client.
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000) if s >= step), step)
    places = list(range(0, count, step))
    shown = [names[place] if place < len(names) else str(place) for place in places]
    slanted = axis.axis_name == "x" and max(map(len, shown)) > 3
    axis.set_ticks(
        places, shown, **({"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {})
    )


def _numbers(axis: Axes, counts: Counts) -> None:
    dark = counts.max() * 0.55
    for row, column in np.argwhere(counts > 0):
        count = counts[row, column]
        axis.text(column, row, f"{count}", ha="center", va="center", fontsize=7,
                  color="white" if count > dark else INK)  # fmt: skip
