"""A paper at one scale, from its protocol to verdicts: everything but the screen."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flowerbed.errors import ConfigError, require, unknown_name
from flowerbed.experiments.comparison import FINISHED
from flowerbed.experiments.config import Settings, merged
from flowerbed.experiments.reproduction.claims import Claim, Verdict, check_metric, judge
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper, Scale, load_paper, load_scale
from flowerbed.experiments.reproduction.running import Job, Outcome, united
from flowerbed.experiments.reproduction.schedule import Watcher, plan, run_all

SMOKE = "smoke"
OUT = Path("runs/papers")


@dataclass(frozen=True)
class Reproduction:
    """A paper that was run."""

    scale: Scale
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    outcomes: Mapping[tuple[str, int], Outcome]
    """By arm and seed."""
    verdicts: tuple[Verdict, ...]
    """Of the claims that were asked for; () at smoke scale, which evaluates none."""
    directories: Mapping[tuple[str, int], Path]
    further_seconds: float
    """What runs took that are no arms here: models of other papers or seeds, from which an arm starts."""
    whole: bool
    """Whether it is the protocol as it stands: all arms, seeds and claims, nothing changed."""

    @property
    def broken(self) -> list[tuple[str, int, Outcome]]:
        """The runs that failed or diverged."""
        return [(arm, seed, o) for (arm, seed), o in self.outcomes.items() if o.status not in FINISHED]

    @property
    def seconds(self) -> float:
        """What all runs took, one after the other."""
        return math.fsum(o.seconds for o in self.outcomes.values()) + self.further_seconds

    def of(self, arm: str) -> list[Outcome]:
        """Return an arm's outcomes in the order of the seeds."""
        return [self.outcomes[arm, seed] for seed in self.seeds]

    def finished(self, arm: str, seed: int) -> Finished:
        """Return a run for a picture; raises ``ConfigError`` for one that has no model."""
        outcome = self.outcomes[arm, seed]
        if outcome.status not in FINISHED:
            raise ConfigError(f"{arm}, seed {seed} {outcome.status}; it has no model.")
        return Finished(arm, seed, self.directories[arm, seed], outcome.values)


def reproduce(
    name: str,
    scale: str = "quick",
    out: str | Path = OUT,
    *,
    claims: Collection[str] | None = None,
    seeds: Sequence[int] | None = None,
    settings: Settings | None = None,
    shared: Settings | None = None,
    workers: int | None = None,
    watcher: Watcher | None = None,
) -> Reproduction:
    """Run a paper's arms with all seeds through the ordinary simulation, and judge its claims.

    ``claims`` limits the claims, and with them the arms; ``settings`` are overrides of every arm, such as
    ``{"federation": {"clients": 10}}``; ``shared`` are those that decide no result (grid, folders of data).
    ``workers`` runs go on side by side, by default one a core. Called again it uses what is there and goes on where
    it was interrupted. Raises ``ConfigError`` for what cannot work, and for a claim on a metric that an arm lacks.
    """
    paper, shared = load_paper(name), shared or {}
    found = load_scale(paper, scale, merged(shared, settings or {}))
    chosen = chosen_claims(paper, claims)
    arms = tuple(found.arms) if claims is None else _needed(found, chosen)
    asked = found.seeds if seeds is None else tuple(seeds)
    require(
        0 < len(asked) == len(set(asked)),
        f"The seeds {list(asked)} repeat or are none; each is evidence once.",
    )
    jobs = plan(found, arms, asked, Path(out), shared)
    watching = watcher or Watcher()
    # What an analysis adds is known only once all runs are over.
    watching = watching if paper.analyse else _Checking(paper, chosen, watching)
    watching.planned(len(jobs))
    made = run_all(jobs, workers or max(1, min(cores(), len(jobs))), watching)
    own = {
        (job.arm, job.seed): job
        for job in jobs.values()
        if job.paper == paper.address and job.arm in arms and job.seed in asked
    }
    outcomes = {key: made[job.key] for key, job in own.items()}
    directories = {key: job.directory for key, job in own.items()}
    outcomes = _analysed(paper, outcomes, directories)
    observed = {key: outcome.observed for key, outcome in outcomes.items()}
    for claim in chosen:
        for metric, arm in sorted(claim.needs()):
            for seed in asked:
                check_metric(observed[arm, seed], metric, f"claim '{claim.name}': arm '{arm}', seed {seed}")
    verdicts = () if scale == SMOKE else tuple(judge(claim, observed, asked) for claim in chosen)
    further = math.fsum(
        made[key].seconds for key, job in jobs.items() if own.get((job.arm, job.seed)) is not job
    )
    whole = not settings and claims is None and asked == found.seeds
    return Reproduction(found, arms, asked, outcomes, verdicts, directories, further, whole)


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_claims(paper: Paper, names: Collection[str] | None) -> list[Claim]:
    """Return the claims with these names, or all; raises ``ConfigError`` for a name that is none."""
    by_name = {claim.name: claim for claim in paper.claims}
    for name in names or ():
        if name not in by_name:
            raise ConfigError(unknown_name(f"claim of '{paper.slug}'", name, by_name))
    return [claim for name, claim in by_name.items() if names is None or name in names]


def _needed(scale: Scale, claims: Sequence[Claim]) -> tuple[str, ...]:
    wanted = {arm for claim in claims for _, arm in claim.needs()}
    return tuple(arm for arm in scale.arms if arm in wanted)


def _analysed(
    paper: Paper, outcomes: dict[tuple[str, int], Outcome], directories: Mapping[tuple[str, int], Path]
) -> dict[tuple[str, int], Outcome]:
    """Return the outcomes with what the paper's analysis of all arms says, for every seed whose runs all worked."""
    if paper.analyse is None:
        return outcomes
    outcomes = dict(outcomes)
    for seed in sorted({seed for _, seed in outcomes}):
        runs = {arm: o for (arm, s), o in outcomes.items() if s == seed}
        if any(o.status not in FINISHED for o in runs.values()):
            continue
        finished = {arm: Finished(arm, seed, directories[arm, seed], o.values) for arm, o in runs.items()}
        for arm, values in paper.analyse(finished).items():
            before = outcomes[arm, seed]
            outcomes[arm, seed] = replace(before, values=united(before.values, values, "paper's analysis"))
    return outcomes


class _Checking(Watcher):
    """Refuses a claim on a metric that an arm lacks as soon as that arm's first run is over."""

    def __init__(self, paper: Paper, claims: Sequence[Claim], watcher: Watcher) -> None:
        self._paper, self._claims, self._watcher = paper, claims, watcher

    def planned(self, runs: int) -> None:
        self._watcher.planned(runs)

    def begins(self, job: Job) -> None:
        self._watcher.begins(job)

    def advanced(self, job: Job, round_: int) -> None:
        self._watcher.advanced(job, round_)

    def ended(self, job: Job, outcome: Outcome) -> None:
        self._watcher.ended(job, outcome)
        if job.paper != self._paper.address:
            return
        for claim in self._claims:
            for metric, arm in sorted(claim.needs()):
                if arm == job.arm:
                    check_metric(
                        outcome.observed, metric, f"claim '{claim.name}': arm '{arm}', seed {job.seed}"
                    )
