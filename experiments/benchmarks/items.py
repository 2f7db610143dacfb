"""Figures beside the race of the models: what a federation costs where there is little to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowerbed.experiments.benchmarks import overhead
from flowerbed.experiments.benchmarks.competitors.flowerbed_side import ENDLESS, merged, settings_of
from flowerbed.experiments.benchmarks.race import (
    WARM_ROUNDS,
    Entry,
    Result,
    Say,
    median_interval,
    race,
    ratio,
)
from flowerbed.experiments.benchmarks.report import Item
from flowerbed.experiments.benchmarks.variants import strict_settings
from flowerbed.experiments.benchmarks.workload import CLASSES, MODELS, RaceModel, Work

SINGLE_SAMPLES, SINGLE_MODEL = 2000, "leaf_cnn"
COHORTS = (10, 50, 250, 1000)
MEMORY_MODEL = "leaf_cnn"
ECHO_ROUNDS = 200
STARTS = 5


@dataclass(frozen=True)
class Place:
    """Where and how items are measured."""

    folder: Path
    """The prepared workload; items add files of their own."""
    work: Work
    turns: int
    least: float
    small: bool
    """A smoke run: everything as small as it goes."""
    say: Say

    def settings(self, model: str) -> dict[str, Any]:
        """Return flowerbed's settings for the workload on ``model``."""
        return workload_settings(self.folder, self.work, MODELS[model], "cpu")


def workload_settings(folder: Path, work: Work, model: RaceModel, device: str) -> dict[str, Any]:
    """Return flowerbed's settings for the workload: an endless run."""
    return settings_of(
        folder,
        model.view,
        {"name": model.name, **model.options},
        clients=work.users,
        cohort=work.cohort,
        rounds=ENDLESS,
        local={"epochs": 1, "batch_size": work.batch, "lr": work.lr},
        device=device,
    )


def few_images(folder: Path, name: str, samples: int) -> None:
    """Write ``name``.npz with ``samples`` grey images of noise."""
    rng = np.random.Generator(np.random.PCG64(0))
    parts = {"train": samples, "test": 10 * CLASSES}
    arrays: dict[str, Any] = {}
    for part, count in parts.items():
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % CLASSES
    np.savez(folder / f"{name}.npz", **arrays)


def on_ray(settings: dict[str, Any], folder: Path, workers: int, run: str) -> dict[str, Any]:
    """Return the settings on that many Ray workers; a run on Ray needs a directory."""
    own = {"dir": str(folder / run), "figures": False}
    return merged(settings, {"grid": {"name": "ray", "workers": workers}, "run": own})


def single_client(place: Place) -> list[Item]:
    """Measure a federation of one client against the plain central loop, and compare the bits."""
    samples = 40 if place.small else SINGLE_SAMPLES
    few_images(place.folder, "single", samples)
    rounds = WARM_ROUNDS + place.turns
    settings = settings_of(
        place.folder,
        "single",
        {"name": SINGLE_MODEL},
        clients=1,
        cohort=1,
        rounds=rounds,
        local={"epochs": 1, "batch_size": 10, "lr": 0.01, "persist": True},
    )
    settings = merged(settings, strict_settings())
    entries = [
        Entry(kind, {"kind": kind, "settings": settings, "limit": rounds})
        for kind in ("central", "flowerbed")
    ]
    central, federated = race(entries, turns=place.turns, least=0.0, say=place.say)
    title = f"one client / central loop, CPU ({SINGLE_MODEL}, {samples} samples)"
    found = ratio(federated, central)
    if found is None:
        return [_failed("single", title, [central, federated], bar=1.02)]
    equal = federated.facts.get("digest") == central.facts.get("digest")
    bits = Item(
        "single bits",
        "one client and central loop differ in bits (0 no, 1 yes)",
        float(not equal),
        bar=0.0,
        note=f"SHA-256 of the models after {rounds} epochs: {'equal' if equal else 'different'}",
    )
    return [Item.of("single", title, found, bar=1.02), bits]


def echo(place: Place) -> list[Item]:
    """Measure clients that train nothing."""
    title = "no-op client, CPU ms at 10k parameters in process"
    try:
        costs = overhead.run(
            ["10k"], ["bare", "inprocess platform"], {"10k": 5 if place.small else ECHO_ROUNDS}
        )
    except RuntimeError as error:
        return [Item("echo", title, None, bar=overhead.IN_PROCESS_CPU_MS_AT_10K, note=str(error))]
    bare, ours = (cost.cpu_ms for cost in costs)
    return [
        Item(
            "echo",
            title,
            ours,
            bar=overhead.IN_PROCESS_CPU_MS_AT_10K,
            note=f"bare copies {bare:.3g} ms; mean of {costs[0].rounds} rounds of {overhead.COHORT} clients",
        )
    ]


def two_workers(place: Place) -> list[Item]:
    """Measure two Ray workers against one, in wall time."""
    settings = place.settings("pfl_cnn")
    entries = [
        Entry(
            f"{workers} workers",
            {
                "kind": "flowerbed",
                "tree": True,
                "settings": on_ray(settings, place.folder, workers, f"workers-{workers}"),
            },
        )
        for workers in (1, 2)
    ]
    results = race(entries, turns=place.turns, least=place.least, say=place.say)
    title = "two workers over one, wall (pfl_cnn)"
    found = ratio(results[0], results[1], "wall")
    if found is None:
        return [_failed("workers", title, results, bar=1.7, at_most=False)]
    walls = [result.median("wall") for result in results]
    note = f"{walls[0]:.3g} s and {walls[1]:.3g} s a round"
    return [Item.of("workers", title, found, bar=1.7, at_most=False, note=note)]


def start(place: Place) -> list[Item]:
    """Measure the CPU seconds from the start of the process to the end of the first round."""
    items = []
    settings = place.settings("linear")
    for key, title, bar, tree in (
        ("start", "start to first round, CPU s in process", 2.5, False),
        ("start ray", "start to first round, CPU s with two actors", 8.0, True),
    ):
        seen, results = [], []
        # The first start fills caches (decoded data, byte code) and is not counted.
        for i in range(2 if place.small else STARTS + 1):
            chosen = on_ray(settings, place.folder, 2, f"start-{i}") if tree else settings
            entry = Entry(title, {"kind": "flowerbed", "tree": tree, "settings": chosen})
            results = race([entry], turns=1, warm=0, least=0.0, say=place.say)
            if results[0].failure:
                break
            seen.append(results[0].first_round_cpu)
        if results[0].failure:
            items.append(_failed(key, title, results, bar=bar))
            continue
        found = median_interval(seen[1:])
        note = f"a new process each time: {', '.join(f'{value:.3g}' for value in seen[1:])}"
        items.append(Item.of(key, title, found, bar=bar, note=note))
    return items


def memory(place: Place) -> list[Item]:
    """Measure by how much a round raises the peak memory, for growing cohorts, one client after the other."""
    cohorts = (2, 4) if place.small else COHORTS
    few_images(place.folder, "memory", 10 * max(cohorts))
    title = (
        f"peak memory of a round: cohort {cohorts[-1]} minus cohort {cohorts[0]}, in models ({MEMORY_MODEL})"
    )
    results = []
    for cohort in cohorts:
        settings = settings_of(
            place.folder,
            "memory",
            {"name": MEMORY_MODEL},
            clients=max(cohorts),
            cohort=cohort,
            rounds=ENDLESS,
            local={"steps": 1, "batch_size": 10, "lr": 0.01},
        )
        settings = merged(settings, strict_settings())
        entry = Entry(f"cohort {cohort}", {"kind": "flowerbed", "settings": settings})
        # The first turn is the first round: later ones find the memory of earlier ones.
        results += race([entry], turns=2, warm=0, least=0.0, watch_memory=True, say=place.say)
    if any(result.failure for result in results):
        return [_failed("memory", title, results, bar=2.0)]
    risen = {cohort: result.round_bytes for cohort, result in zip(cohorts, results, strict=True)}
    one = MODELS[MEMORY_MODEL].parameters * 4
    shown = ", ".join(f"{cohort}: {bytes_ / 2**20:.0f} MiB" for cohort, bytes_ in risen.items())
    return [
        Item(
            "memory",
            title,
            (risen[cohorts[-1]] - risen[cohorts[0]]) / one,
            bar=2.0,
            note=f"added by the first rounds, by cohort: {shown}; a model has {one / 2**20:.1f} MiB",
        )
    ]


def _failed(key: str, title: str, results: list[Result], *, bar: float, at_most: bool = True) -> Item:
    reasons = "; ".join(f"{result.name}: {result.failure}" for result in results if result.failure)
    return Item(key, title, None, bar=bar, at_most=at_most, note=reasons)


ITEMS: dict[str, Callable[[Place], list[Item]]] = {
    "single": single_client,
    "echo": echo,
    "workers": two_workers,
    "start": start,
    "memory": memory,
}
