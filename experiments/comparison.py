"""What a comparison consists of, and what follows from it: metrics, runs, rows of statistics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowerbed.experiments import paired
from flowerbed.experiments.config import Simulation
from flowerbed.server.callbacks import CLIENTS, SERVER

FINISHED = ("completed", "stopped")
ON_CLIENTS = "clients:"
PERSONAL = "personal-"
LOWER_IS_BETTER = re.compile(r"(^|-)(loss|ece|std)$")


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation: ``accuracy`` on the server's test set, ``clients:accuracy-worst`` on the clients'.

    ``clients:personal-...`` falls back on the generic model where a method has no personal one: that model is
    what it offers its clients.
    """

    name: str

    @property
    def phase(self) -> str:
        """The evaluation that it is read from."""
        return CLIENTS if self.name.startswith(ON_CLIENTS) else SERVER

    @property
    def key(self) -> str:
        """Its name there."""
        return self.name.removeprefix(ON_CLIENTS)

    @property
    def lower_is_better(self) -> bool:
        """Whether rank 1 is the smallest value (loss, calibration error, spread)."""
        return LOWER_IS_BETTER.search(self.key) is not None

    @property
    def percent(self) -> bool:
        """Whether it is a share that is written in per cent."""
        return not self.key.endswith("jain") and ("accuracy" in self.key or self.key.endswith("ece"))

    def found_in(self, values: Mapping[str, float]) -> str | None:
        """Return the name under which ``values`` hold it, or None."""
        generic = self.key.removeprefix(PERSONAL) if self.phase == CLIENTS else self.key
        return next((key for key in (self.key, generic) if key in values), None)


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    method: str
    seed: int
    status: str
    """completed, stopped (early), failed, or diverged (a figure that is not finite)."""
    reason: str
    rounds: int
    evaluations: int
    """Evaluations that a figure is the mean of; where server and clients differ, the fewer."""
    values: Mapping[str, float]
    """The selected figure by metric; {} unless the run is finished."""
    curves: Mapping[str, Sequence[tuple[int, float]]]
    """All evaluations, (round, figure), by metric."""
    cost: Mapping[str, Any]
    generic: bool = False
    """Whether a ``personal-`` metric is the generic model's, for lack of another."""
    directory: str | None = None
    reused: bool = False
    made_with: str = ""
    """Commit and versions."""

    @property
    def ok(self) -> bool:
        """Whether its figures count."""
        return self.status in FINISHED


@dataclass(frozen=True)
class Row:
    """What a comparison says about one method in one metric."""

    method: str
    values: tuple[float | None, ...]
    """By seed; None where the run failed."""
    mean: paired.Interval | None
    """None unless all runs are finished."""
    rank: float
    difference: paired.Interval | None
    """To the reference, seed by seed; None for the reference itself."""
    p_t: float | None
    p_t_holm: float | None
    p_flip: float | None
    p_flip_holm: float | None


@dataclass(frozen=True)
class Comparison:
    """All runs, and the settings of each method."""

    metrics: tuple[Metric, ...]
    seeds: tuple[int, ...]
    methods: Mapping[str, Simulation]
    runs: tuple[Run, ...]
    reference: str

    @property
    def failed(self) -> list[Run]:
        """The runs that failed or diverged."""
        return [run for run in self.runs if not run.ok]

    @property
    def last(self) -> int:
        """Evaluations that a figure is the mean of, at most."""
        return next(iter(self.methods.values())).evaluation.last

    def of(self, method: str) -> list[Run]:
        """Return a method's runs in the order of the seeds."""
        return [run for run in self.runs if run.method == method]

    def rows(self, metric: Metric) -> list[Row]:
        """Return a row a method, in the order in which they were given.

        Both tests are corrected for the number of methods that are compared with the reference (Holm).
        """
        values = {m: tuple(run.values.get(metric.name) for run in self.of(m)) for m in self.methods}
        ranks = paired.mean_ranks(values, metric.lower_is_better)
        gaps = {
            m: None if m == self.reference else paired.differences(values[m], values[self.reference])
            for m in self.methods
        }
        p_t = [None if gap is None else paired.paired_t(gap) for gap in gaps.values()]
        p_flip = [None if gap is None else paired.sign_flip(gap) for gap in gaps.values()]
        tests = zip(p_t, paired.holm(p_t), p_flip, paired.holm(p_flip), strict=True)
        return [
            Row(m, values[m], paired.t_interval(values[m]), ranks[m], paired.t_interval(gap or ()), *p)
            for (m, gap), p in zip(gaps.items(), tests, strict=True)
        ]
