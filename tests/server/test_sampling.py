"""Who is asked: chances against enumeration, passes against counting, and nothing that grows with the federation."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.errors import ConfigError
from flowerbed.experiments.simulation import simulate
from flowerbed.server.sampling import (
    SAMPLERS,
    CyclicSampler,
    Draws,
    UniformSampler,
    WeightedSampler,
    make_sampler,
)

NODES = range(1000, 1000 + 10**9)


def weighted(examples: Sequence[int], cohort: int, seed: int = 0) -> WeightedSampler:
    return WeightedSampler(Draws(seed, cohort, examples=np.array(examples, dtype=np.int64)))


def chances(examples: Sequence[int], cohort: int) -> dict[tuple[int, ...], float]:
    """Return the chance of every ordered draw: each client in proportion to its samples among the rest."""
    found = {}
    for drawn in itertools.permutations(range(len(examples)), cohort):
        chance, left = 1.0, float(sum(examples))
        for client in drawn:
            chance, left = chance * examples[client] / left, left - examples[client]
        found[drawn] = chance
    return found


@pytest.mark.parametrize(
    ("examples", "cohort"), [([5, 1, 3], 2), ([1, 2, 3, 4, 5, 6, 0], 2), ([4, 1, 1, 2], 3)]
)
def test_weighted_draws_have_the_chances_of_successive_sampling(examples: list[int], cohort: int) -> None:
    """The first and last case draw most clients, which is done in another way than the second."""
    sampler, rounds = weighted(examples, cohort), 6000
    drawn = Counter(tuple(sampler.train(r, range(len(examples)))) for r in range(1, rounds + 1))
    for outcome, chance in chances(examples, cohort).items():
        spread = (rounds * chance * (1 - chance)) ** 0.5
        assert abs(drawn[outcome] - rounds * chance) <= 5 * spread + 1e-9


@settings(max_examples=40)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 9))
def test_weighted_draws_are_distinct_clients_with_samples(
    examples: list[int], cohort: int, seed: int
) -> None:
    holders = sum(map(bool, examples))
    if cohort > holders:
        with pytest.raises(ConfigError, match="weighted asks"):
            weighted(examples, cohort)
        return
    sampler = weighted(examples, cohort, seed)
    drawn = sampler.train(3, range(len(examples)))
    assert len(set(drawn)) == len(drawn) == cohort
    if cohort < len(examples):
        assert all(examples[client] for client in drawn)
    assert drawn == weighted(examples, cohort, seed).train(3, range(len(examples)))


@settings(max_examples=40)
@given(st.integers(2, 30), st.data(), st.integers(0, 9))
def test_cyclic_passes_ask_everybody_once_and_nobody_twice_in_a_round(
    clients: int, data: Any, seed: int
) -> None:
    cohort = data.draw(st.integers(1, clients - 1))
    sampler = CyclicSampler(Draws(seed, cohort))
    rounds = [sampler.train(r, range(clients)) for r in range(1, 4 * clients + 1)]
    assert all(len(set(drawn)) == cohort for drawn in rounds)
    calls = list(itertools.chain.from_iterable(rounds))
    for start in range(0, len(calls) - clients + 1, clients):
        assert sorted(calls[start : start + clients]) == list(range(clients))
    # A function of the round alone: in any order, and from a new sampler as after a resume.
    assert sampler.train(2, range(clients)) == rounds[1]
    assert CyclicSampler(Draws(seed, cohort)).train(len(rounds), range(clients)) == rounds[-1]


def test_cyclic_orders_differ_from_pass_to_pass() -> None:
    sampler = CyclicSampler(Draws(0, 10))
    assert sampler.train(1, range(40)) != sampler.train(5, range(40))


@pytest.mark.parametrize("name", ["uniform", "weighted", "cyclic"])
def test_all_clients_are_asked_where_the_cohort_is_everybody(name: str) -> None:
    sampler = make_sampler(name, Draws(0, 0, examples=np.array([3, 0, 1])))
    assert sampler.train(1, [7, 8, 9]) == [7, 8, 9]
    assert sampler.evaluate(1, [7, 8, 9]) == [7, 8, 9]


def test_uniform_draws_make_nothing_of_the_size_of_the_federation() -> None:
    """A billion clients: any list of them would not fit."""
    drawn = UniformSampler(0, 10).train(1, NODES)
    assert len(set(drawn)) == 10
    assert all(node in NODES for node in drawn)


def test_a_rule_of_ones_own_is_named_by_import_path(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rule.py").write_text(
        "class First:\n"
        "    def __init__(self, draws):\n        self.cohort = draws.cohort\n"
        "    def train(self, server_round, nodes):\n        return list(nodes[: self.cohort])\n"
        "    evaluate = train\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sampler = make_sampler("own_rule:First", Draws(0, 2))
    assert sampler.train(5, [4, 5, 6]) == [4, 5]


def test_unknown_rules_and_unknown_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="sampler 'cyclik'.*cyclic"):
        make_sampler("cyclik", Draws(0, 2))
    with pytest.raises(ConfigError, match="needs to know"):
        make_sampler("weighted", Draws(0, 2))


@pytest.mark.parametrize("name", sorted(SAMPLERS.names()))
def test_a_run_with_each_rule_completes(name: str) -> None:
    federation = {"clients": 7, "cohort": 3, "rounds": 3, "sampling": name}
    result = simulate(federation=federation, evaluation={"every": 0}, grid={"device": "cpu"})
    assert [r.answered for r in result.history if r.phase == "train"] == [3, 3, 3]
