"""Methods x seeds through the same simulation, and what can be said about the difference.

``flowerbed compare`` and ``compare`` run every method on the same data, split and sampled clients seed by seed,
read off the same figure for all of them (the mean of the last evaluations, never the best one), and report mean,
interval, rank and paired tests. A run that is already there, of the same configuration, is used again, and one
that was interrupted goes on; a run that failed is shown as failed, and its method gets no mean.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowerbed.errors import CheckpointError, ConfigError, DataError, require, unknown_name
from flowerbed.experiments import compare_report
from flowerbed.experiments import metrics as summaries
from flowerbed.experiments.comparison import FINISHED, ON_CLIENTS, Comparison, Metric, Run
from flowerbed.experiments.config import Simulation, merged
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.simulation import run_simulation
from flowerbed.server.callbacks import CLIENTS, Callback, MetricsLog, Record

SHARED = ("dataset", "data", "partition", "encoder", "evaluation", "stop")
"""What all methods of a comparison must have in common, besides the number of clients and of rounds."""


class Watcher(Callback):
    """Sees every round of every run, and where one run ends and the next begins. As it stands it does nothing."""

    def begins(self, method: str, seed: int) -> None:
        """The next run."""

    def ended(self, run: Run) -> None:
        """What came of it."""


def compare(
    methods: Sequence[str | Mapping[str, Any]] | Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    *,
    metrics: Sequence[str] = ("accuracy",),
    reference: str | None = None,
    watcher: Watcher | None = None,
) -> Comparison:
    """Run methods x seeds and compare them.

    ``methods`` are strategies, by name or as ``{"name": "fedprox", "mu": 0.1}``; or labels with the sections that
    make the method, ``{"FedProx, 5 epochs": {"strategy": "fedprox", "local": {"epochs": 5}}}``. ``settings`` are
    the sections that all share, as for ``simulate``. With ``out`` the runs are kept there, finished ones are used
    again, and the report is written beside them. The first method is the reference of the tests.

    Raises ``ConfigError`` before anything is run if a method cannot work or does not share the others' data.
    """
    common = dict(settings or {})
    if not isinstance(methods, Mapping):
        choices = [m if isinstance(m, Mapping) else {"name": m} for m in methods]
        names = [str(choice.get("name")) for choice in choices]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"The strategy {twice} is there twice; give methods as labels with settings.")
        methods = {name: {"strategy": choice} for name, choice in zip(names, choices, strict=True)}
    simulations = {label: Simulation.of(merged(common, own)) for label, own in methods.items()}
    return compare_simulations(simulations, seeds, out, metrics=metrics, reference=reference, watcher=watcher)


def compare_simulations(
    methods: Mapping[str, Simulation],
    seeds: Sequence[int],
    out: str | Path | None = None,
    *,
    metrics: Sequence[str] = ("accuracy",),
    reference: str | None = None,
    watcher: Watcher | None = None,
) -> Comparison:
    """Do what ``compare`` does with whole simulations, whose own seeds and run directories do not matter."""
    wanted, watcher = tuple(Metric(name) for name in metrics), watcher or Watcher()
    _check(methods, seeds, wanted, reference)
    root = Path(out) if out is not None else None
    plan = [(label, seed) for seed in seeds for label in methods]
    for label in methods:
        _check_buildable(label, replace(methods[label], seed=seeds[0]), root)
    runs: list[Run] = []
    for label, seed in plan:
        watcher.begins(label, seed)
        runs.append(_run(label, replace(methods[label], seed=seed), wanted, root, watcher))
        watcher.ended(runs[-1])
    comparison = Comparison(
        wanted, tuple(seeds), dict(methods), tuple(runs), reference or next(iter(methods))
    )
    if root is not None:
        compare_report.write(comparison, root)
    return comparison


def run_directory(root: Path, label: str, simulation: Simulation) -> Path:
    """Return where a comparison keeps a run: configuration, seed and rounds decide, so nothing is mixed up."""
    slug = re.sub(r"[^\w.]+", "-", label).strip("-.")
    rounds = simulation.federation.rounds
    return root / "runs" / f"{slug}-seed{simulation.seed}-r{rounds}-{simulation.identity}"


def _run(
    label: str,
    simulation: Simulation,
    metrics: Sequence[Metric],
    root: Path | None,
    watcher: Watcher,
) -> Run:
    """Run, resume or reuse one run."""
    directory = run_directory(root, label, simulation) if root is not None else None
    # One line of progress for all runs is enough.
    params = replace(
        simulation.run, dir=None if directory is None else str(directory), overwrite=True, progress=False
    )
    simulation = replace(simulation, run=params)
    summary = _summary(directory)
    reused = summary.get("status") in FINISHED
    records: list[Record] = []
    status, reason = "failed", ""
    try:
        if not reused:
            result = _start_or_resume(simulation, directory, watcher)
            records, status, reason = result.history, result.status, result.reason
    except (ConfigError, DataError, CheckpointError) as error:
        raise type(error)(f"{label}, seed {simulation.seed}: {error}") from error
    except Exception as error:  # noqa: BLE001 - the other methods may work; this one is shown as failed
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    if directory is not None:
        summary = _summary(directory)
        records = MetricsLog(directory / "metrics.jsonl").records()
        if reused:
            status, reason = summary["status"], summary["reason"]
    return _described(label, simulation, metrics, records, status, reason, summary, directory, reused)


def _start_or_resume(simulation: Simulation, directory: Path | None, watcher: Watcher) -> Any:
    if directory is not None and (directory / "config.yaml").exists():
        try:
            return run_simulation(simulation, callbacks=(watcher,), resume=True)
        except CheckpointError:
            # It was interrupted before its first checkpoint.
            pass
    return run_simulation(simulation, callbacks=(watcher,))


def _described(
    label: str,
    simulation: Simulation,
    metrics: Sequence[Metric],
    records: Sequence[Record],
    status: str,
    reason: str,
    summary: Mapping[str, Any],
    directory: Path | None,
    reused: bool,
) -> Run:
    last = simulation.evaluation.last
    values: dict[str, float] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    generic = False
    for metric in metrics:
        selected = summaries.mean_of_last(records, metric.phase, last)
        key = metric.found_in(selected)
        if key is None:
            if status in FINISHED:
                raise ConfigError(
                    f"{label}, seed {simulation.seed}: "
                    + unknown_name(f"metric of {metric.phase}", metric.key, selected)
                    + " The run is kept."
                )
            continue
        generic |= key != metric.key
        curves[metric.name] = [
            (r.round, r.metrics[key]) for r in records if r.phase == metric.phase and key in r.metrics
        ]
        if status in FINISHED:
            values[metric.name] = selected[key]
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        status, reason, values = "diverged", f"{bad[0]} is {values[bad[0]]}", {}
    phases = {metric.phase for metric in metrics}
    judged = min(len(summaries.evaluations(records, phase)[-last:]) for phase in phases)
    return Run(
        method=label,
        seed=simulation.seed,
        status=status,
        reason=reason,
        rounds=max((r.round for r in records), default=0),
        evaluations=judged,
        values=values,
        curves=curves,
        cost=summary.get("cost") or summaries.cost(records, None),
        generic=generic,
        directory=None if directory is None else str(directory),
        reused=reused,
        made_with=_made_with(summary),
    )


def _made_with(summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    commit = (summary.get("git_commit") or "unknown")[:10]
    return f"commit {commit} with torch {summary['versions'].get('torch', 'unknown')}"


def _summary(directory: Path | None) -> dict[str, Any]:
    path = directory / "summary.json" if directory is not None else None
    if path is None or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _check(
    methods: Mapping[str, Simulation],
    seeds: Sequence[int],
    metrics: Sequence[Metric],
    reference: str | None,
) -> None:
    require(len(methods) > 0, "A comparison needs at least one method: strategy=fedavg,fedprox.")
    require(len(seeds) > 0, "A comparison needs at least one seed: seeds=0,1,2.")
    require(len(set(seeds)) == len(seeds), f"The seeds {list(seeds)} repeat; every run counts once.")
    require(len(metrics) > 0, "A comparison needs at least one metric.")
    if reference is not None and reference not in methods:
        raise ConfigError(unknown_name("method (reference)", reference, methods))
    (first_label, first), *others = methods.items()
    for label, other in others:
        for section in SHARED:
            require(
                getattr(first, section) == getattr(other, section),
                f"'{first_label}' and '{label}' differ in {section}; paired runs share data, split and the rule by "
                "which figures are selected. Give it once for all methods.",
            )
        for key in ("clients", "rounds"):
            one, two = getattr(first.federation, key), getattr(other.federation, key)
            require(
                one == two,
                f"'{first_label}' and '{label}' differ in federation.{key} ({one} and {two}); "
                "give it once for all methods.",
            )
    by_identity: dict[str, str] = {}
    for label, simulation in methods.items():
        twin = by_identity.setdefault(replace(simulation, seed=0).identity, label)
        require(twin == label, f"'{twin}' and '{label}' are the same method; leave one out.")
    if any(metric.phase == CLIENTS for metric in metrics):
        require(
            first.evaluation.clients_every > 0,
            f"A metric of the clients ({ON_CLIENTS}...) needs evaluation.clients_every=1 or more.",
        )


def _check_buildable(label: str, simulation: Simulation, root: Path | None) -> None:
    """Refuse a method that cannot work before the first run starts; what is finished needs no check."""
    if root is not None and _summary(run_directory(root, label, simulation)).get("status") in FINISHED:
        return
    try:
        build_parts(simulation)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{label}: {error}") from error
