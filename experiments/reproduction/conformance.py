"""The house contract for papers, as plain functions; the test suite runs them over every paper there is.

A check returns nothing and raises ``AssertionError`` with a sentence that says what is broken. All run at smoke scale;
those that repeat runs take the arms that differ in strategy or model, one of each kind.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import load_file

from flowerbed.experiments.comparison import FINISHED
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.conformance import assert_equal
from flowerbed.experiments.reproduction.catalogue import catalogue
from flowerbed.experiments.reproduction.engine import SMOKE, reproduce
from flowerbed.experiments.reproduction.paper import SCALES, Scale, built, load_paper, load_scale
from flowerbed.experiments.reproduction.running import MODEL, Job, Outcome, execute, simulation_of
from flowerbed.experiments.reproduction.schedule import Watcher, plan, run_all
from flowerbed.experiments.simulation import run_simulation
from flowerbed.server.callbacks import Callback
from flowerbed.server.grids.base import torch_threads
from flowerbed.storage import Tensors

TIMES = ("seconds",)
"""What two equal runs may differ in: metrics whose name ends so."""


def check_is_described(name: str) -> None:
    """The paper has a row in the catalogue, a protocol at every scale, and claims on arms that exist."""
    paper = load_paper(name)
    assert paper.slug == name, f"the module of '{name}' says that it is '{paper.slug}'"
    assert paper.slug in catalogue(), f"'{paper.slug}' is not in the catalogue"
    assert paper.claims, f"'{paper.slug}' claims nothing"
    for scale in SCALES:
        found = load_scale(paper, scale)
        assert all(arm.about for arm in found.arms.values()), f"an arm of '{paper.slug}' lacks its `about`"


def check_smoke(name: str) -> None:
    """Every arm runs to its end at smoke scale, and has the metrics that the claims speak of."""
    with tempfile.TemporaryDirectory() as folder:
        made = reproduce(name, SMOKE, folder, workers=1)
    for arm, seed, outcome in made.broken:
        raise AssertionError(f"{arm}, seed {seed} {outcome.status}: {outcome.reason}")


def check_same_seed_same_bits(name: str) -> None:
    """Two runs of an arm with one seed deliver the same model and the same figures, in every bit."""
    for arm, one, other in _twice(name):
        first, second = _done(one), _done(other)
        assert_equal(_model(one), _model(other), f"{arm}: two runs with the same seed differ")
        assert _timeless(first) == _timeless(second), (
            f"{arm}: two runs with the same seed measure differently"
        )


def check_resumes(name: str) -> None:
    """An arm that is cut off after its first round and goes on ends as one that was not, in every bit."""
    for arm, whole, cut in _twice(name):
        if simulation_of(whole).federation.rounds < 2:
            continue
        with contextlib.suppress(_Cut):
            run_simulation(simulation_of(cut), callbacks=(_CutOff(),))
        first, second = _done(whole), _done(cut)
        assert_equal(
            _model(whole), _model(cut), f"{arm}: a resumed run differs from one that was not interrupted"
        )
        assert _timeless(first) == _timeless(second), f"{arm}: a resumed run measures differently"


def check_one_client_is_central(name: str) -> None:
    """Every arm with a plain twin equals it in every bit."""
    paper, scale = load_paper(name), _smoke(name)
    for arm, central in paper.central.items():
        with tempfile.TemporaryDirectory() as folder:
            job = _job(scale, arm, Path(folder))
            _done(job)
            simulation = Simulation.of(job.settings)
            # Another number of threads adds in another order.
            with torch_threads(simulation.grid.threads):
                twin = central(simulation)
            assert_equal(_model(job), twin, f"{arm}: one client is not the central run")


CHECKS: tuple[Callable[[str], None], ...] = (
    check_is_described,
    check_smoke,
    check_same_seed_same_bits,
    check_resumes,
    check_one_client_is_central,
)


def check_table_is_complete() -> None:
    """Every paper module is in the catalogue; what is checked is every module that there is."""
    strange = sorted(set(built()) - catalogue().keys())
    assert not strange, f"no such papers are in the catalogue: {strange}"


def representatives(scale: Scale) -> list[str]:
    """Return the first arm of each combination of strategy and model."""
    found: dict[tuple[str, str], str] = {}
    for name, arm in scale.arms.items():
        simulation = arm.simulation(scale.seeds[0], dict.fromkeys(arm.references(), "model"))
        found.setdefault((simulation.strategy.name, simulation.model.name), name)
    return list(found.values())


def _smoke(name: str) -> Scale:
    return load_scale(load_paper(name), SMOKE, {"run": {"checkpoint_every": 1}})


def _twice(name: str) -> Iterator[tuple[str, Job, Job]]:
    """Yield every representative with two jobs for it, in places of their own."""
    scale = _smoke(name)
    for arm in representatives(scale):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            yield arm, _job(scale, arm, Path(one)), _job(scale, arm, Path(other))


def _job(scale: Scale, arm: str, folder: Path) -> Job:
    """Return the job of an arm, those that it starts from done."""
    *before, (_, job) = plan(scale, (arm,), scale.seeds[:1], folder, {}).items()
    run_all(dict(before), 1, Watcher())
    return job


def _done(job: Job) -> Outcome:
    outcome = execute(job)
    assert outcome.status in FINISHED, f"{job.arm} {outcome.status}: {outcome.reason}"
    return outcome


def _model(job: Job) -> Tensors:
    return load_file(job.directory / MODEL)


def _timeless(outcome: Outcome) -> dict[str, float]:
    return {name: value for name, value in outcome.values.items() if not name.endswith(TIMES)}


class _Cut(Exception):
    """The run is cut off here."""


class _CutOff(Callback):
    """Ends a run when its second round begins."""

    def asked(self, server_round: int, phase: str, clients: int) -> None:
        if server_round == 2:
            raise _Cut
