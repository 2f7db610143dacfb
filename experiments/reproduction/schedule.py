"""All runs of a paper, in an order in which every model is there when it is needed; side by side where cores allow."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments.comparison import FINISHED
from flowerbed.experiments.config import Settings
from flowerbed.experiments.reproduction import digests
from flowerbed.experiments.reproduction.paper import Scale, load_paper, load_scale
from flowerbed.experiments.reproduction.running import MODEL, Job, Key, Outcome, execute
from flowerbed.server.callbacks import Callback, Record, read_lines

POLL = 0.5
"""Seconds between two looks at what the runs in other processes have written."""


class Watcher(Callback):
    """Sees the runs begin, go on and end. As it stands it does nothing."""

    def planned(self, runs: int) -> None:
        """So many runs are to be made, finished or reused."""

    def begins(self, job: Job) -> None:
        """A run starts."""

    def advanced(self, job: Job, round_: int) -> None:
        """A run has completed a round."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A run is over."""


def plan(
    scale: Scale, names: Iterable[str], seeds: Iterable[int], out: Path, shared: Settings
) -> dict[Key, Job]:
    """Return the runs of the arms ``names``, and those whose models they start from, each after what it needs.

    ``shared`` are settings that decide no result (grid, folders) for arms of other papers. Raises ``ConfigError`` for
    an arm that does not exist or needs itself.
    """
    jobs: dict[Key, Job] = {}
    scales = {scale.paper.slug: scale}
    codes = {scale.paper.slug: digests.module(scale.paper)}

    def add(slug: str, arm: str, seed: int, waiting: tuple[Key, ...]) -> Job:
        if slug not in scales:
            scales[slug] = load_scale(load_paper(slug), scale.name, shared)
            codes[slug] = digests.module(scales[slug].paper)
        owner = scales[slug]
        key = (owner.paper.address, arm, seed)
        if key in jobs:
            return jobs[key]
        if arm not in owner.arms:
            raise ConfigError(f"An arm starts from the model of '{slug}/{arm}', which does not exist.")
        if key in waiting:
            raise ConfigError(f"The arm '{arm}' of '{slug}' needs its own model to start from.")
        asked = owner.arms[arm]
        needed = {
            ref: add(*_reference(ref, slug, seed), (*waiting, key)) for ref in sorted(asked.references())
        }
        starts = {ref: job.directory.name for ref, job in needed.items()}
        found = digests.run(codes[slug], asked, seed, starts)
        directory = out / slug / scale.name / "runs" / f"{arm}-seed{seed}-{found}"
        models = {ref: str(job.directory / MODEL) for ref, job in needed.items()}
        needs = tuple(job.key for job in needed.values())
        jobs[key] = Job(owner.paper.address, arm, seed, asked.filled(seed, models), directory, needs)
        return jobs[key]

    for seed in seeds:
        for arm in names:
            add(scale.paper.slug, arm, seed, ())
    return jobs


def run_all(jobs: Mapping[Key, Job], workers: int, watcher: Watcher) -> dict[Key, Outcome]:
    """Run everything, ``workers`` at a time; with one worker in this process.

    Whose start is missing because that run failed or diverged is failed itself.
    """
    return _one_by_one(jobs, watcher) if workers == 1 else _side_by_side(jobs, workers, watcher)


def _one_by_one(jobs: Mapping[Key, Job], watcher: Watcher) -> dict[Key, Outcome]:
    outcomes: dict[Key, Outcome] = {}
    for key, job in jobs.items():
        watcher.begins(job)
        outcomes[key] = _without_start(job, outcomes) or execute(job, (_Rounds(job, watcher),))
        watcher.ended(job, outcomes[key])
    return outcomes


def _side_by_side(jobs: Mapping[Key, Job], workers: int, watcher: Watcher) -> dict[Key, Outcome]:
    # Fresh processes: a forked copy of one that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    outcomes: dict[Key, Outcome] = {}
    waiting = dict(jobs)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running: dict[Future[Outcome], Job] = {}
        try:
            while waiting or running:
                for key, job in list(waiting.items()):
                    if len(running) < workers and all(need in outcomes for need in job.needs):
                        del waiting[key]
                        watcher.begins(job)
                        lost = _without_start(job, outcomes)
                        if lost is not None:
                            outcomes[key] = lost
                            watcher.ended(job, lost)
                        else:
                            running[pool.submit(execute, job)] = job
                done, _ = wait(running, POLL, FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    outcomes[job.key] = future.result()
                    watcher.ended(job, outcomes[job.key])
                for job in running.values():
                    watcher.advanced(job, rounds_done(job.directory))
        except BrokenProcessPool as error:
            raise RunError(
                "The process of a run died, perhaps for want of memory; what is finished is kept. Try --jobs 1."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {key: outcomes[key] for key in jobs}


def rounds_done(directory: Path) -> int:
    """Return the last round that a run has written a record of; 0 before the first."""
    lines = read_lines(directory / "metrics.jsonl")
    return Record.parse(lines[-1]).round if lines else 0


def _without_start(job: Job, outcomes: Mapping[Key, Outcome]) -> Outcome | None:
    for need in job.needs:
        if outcomes[need].status not in FINISHED:
            _, arm, seed = need
            return Outcome("failed", f"it starts from {arm}, seed {seed}, which {outcomes[need].status}", {})
    return None


def _reference(text: str, slug: str, seed: int) -> tuple[str, str, int]:
    """Return slug, arm and seed of ``[slug/]arm[@seed]``."""
    place, _, at = text.partition("@")
    owner, slash, arm = place.rpartition("/")
    return (owner if slash else slug), arm, int(at) if at else seed


class _Rounds(Callback):
    """Tells the watcher of the rounds of the run in this process."""

    def __init__(self, job: Job, watcher: Watcher) -> None:
        self._job, self._watcher = job, watcher

    def recorded(self, record: Record) -> None:
        self._watcher.advanced(self._job, record.round)
