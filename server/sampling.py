"""Which clients are asked: seeded draws over the registered clients, a function of the run and the round alone.

No rule makes anything of the size of the federation in a round: what must, it makes once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flowerbed import seeds
from flowerbed.errors import require
from flowerbed.registry import Registry
from flowerbed.strategies.base import Sampler


@dataclass(frozen=True)
class Draws:
    """What a sampling rule is told about the run."""

    seed: int
    cohort: int
    """Clients asked to train in a round (m); 0 means all."""
    oversample: float = 0.0
    """Share of further clients asked, so that failures leave enough replies."""
    evaluators: int = 0
    """Clients asked to evaluate; 0 means all."""
    examples: npt.NDArray[np.int64] | None = None
    """The number of training samples of every client (n_k); None where it is unknown."""
    able: Callable[[], npt.NDArray[np.bool_]] | None = None
    """Returns whether each client has what ``devices`` asks of it; None where nothing is known of them."""

    @property
    def wanted(self) -> int:
        """Clients that a training round asks; 0 means all."""
        return math.ceil(self.cohort * (1 + self.oversample))


SAMPLERS: Registry[Callable[[Draws], Sampler]] = Registry("sampler")
"""Name -> what makes the rule of a run from its ``Draws``."""


@dataclass(frozen=True)
class UniformSampler:
    """Draws without replacement, every client equally likely."""

    seed: int
    cohort: int
    """Clients asked to train in a round (m); 0 means all."""
    oversample: float = 0.0
    """Share of further clients asked, so that failures leave enough replies."""
    evaluators: int = 0
    """Clients asked to evaluate; 0 means all."""

    @classmethod
    def of(cls, draws: Draws) -> UniformSampler:
        """Return the rule of a run."""
        return cls(draws.seed, draws.cohort, draws.oversample, draws.evaluators)

    def train(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the clients of a training round; the first ``cohort`` usable replies are used."""
        wanted = math.ceil(self.cohort * (1 + self.oversample))
        return self._draw("sample train", wanted, server_round, nodes)

    def evaluate(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the clients that evaluate after a round."""
        return self._draw("sample evaluate", self.evaluators, server_round, nodes)

    def _draw(self, purpose: str, wanted: int, server_round: int, nodes: Sequence[int]) -> list[int]:
        if not wanted or wanted >= len(nodes):
            return list(nodes)
        rng = seeds.numpy_rng(self.seed, purpose, server_round)
        return [nodes[i] for i in rng.choice(len(nodes), size=wanted, replace=False)]


class WeightedSampler:
    """Draws one client after another, each with a chance in proportion to its samples among those not drawn yet.

    Clients without samples are never asked. Who is drawn in proportion to its data should not be weighed by it
    again: use ``strategy.weighting=uniform``. That mean is then close to the one over all clients by samples
    (exactly so in expectation only with replacement, Li et al., ICLR 2020, scheme I); the difference vanishes
    as the cohort becomes a small share of the clients. Evaluation is uniform.
    """

    def __init__(self, draws: Draws) -> None:
        """Raises ``ConfigError`` if the clients' samples are unknown, or too few clients have any."""
        require(
            draws.examples is not None,
            "federation.sampling=weighted needs to know every client's number of samples; use sampling=uniform.",
        )
        assert draws.examples is not None
        self._draws = draws
        self._uniform = UniformSampler.of(draws)
        self._bounds = np.cumsum(draws.examples, dtype=np.float64)
        holders = int(np.count_nonzero(draws.examples))
        require(
            draws.wanted <= holders,
            f"federation.sampling=weighted asks {draws.wanted} clients a round and {holders} have samples; lower "
            "federation.cohort.",
        )
        self._holders = holders

    def train(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the clients of a training round, in the order in which they were drawn."""
        wanted = self._draws.wanted
        if not wanted or wanted >= len(nodes):
            return list(nodes)
        rng = seeds.numpy_rng(self._draws.seed, "sample train weighted", server_round)
        # Who is drawn again is passed over, which leaves the others their chances among each other; where
        # that would be most draws, the same distribution comes from one exponential number for every client.
        if 2 * wanted > self._holders:
            assert self._draws.examples is not None
            with np.errstate(divide="ignore"):
                arrivals = rng.exponential(size=len(nodes)) / self._draws.examples
            return [nodes[i] for i in np.argsort(arrivals, kind="stable")[:wanted]]
        drawn: dict[int, None] = {}
        while len(drawn) < wanted:
            points = rng.random(2 * (wanted - len(drawn))) * self._bounds[-1]
            drawn.update(dict.fromkeys(np.searchsorted(self._bounds, points, side="right").tolist()))
        return [nodes[i] for i in list(drawn)[:wanted]]

    def evaluate(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the clients that evaluate after a round."""
        return self._uniform.evaluate(server_round, nodes)


class CyclicSampler:
    """Goes through all clients in a random order, then again in another one: everybody takes part equally often.

    A round that a pass ends in goes on with the first clients of the next pass that are not in it yet; those who
    are come right after it. Evaluation is uniform.
    """

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._uniform = UniformSampler.of(draws)
        self._number = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def train(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the clients of a training round."""
        clients, wanted = len(nodes), self._draws.wanted
        if not wanted or wanted >= clients:
            return list(nodes)
        number, start = divmod((server_round - 1) * wanted, clients)
        drawn = self._pass(number, clients)[start : start + wanted]
        if len(drawn) < wanted:
            drawn = np.concatenate([drawn, self._pass(number + 1, clients)[: wanted - len(drawn)]])
        return [nodes[i] for i in drawn]

    def evaluate(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the clients that evaluate after a round."""
        return self._uniform.evaluate(server_round, nodes)

    def _pass(self, number: int, clients: int) -> npt.NDArray[np.int64]:
        """Return the order of a pass. It depends on the end of the one before, so they are made in turn."""
        if number < self._number or len(self._order) != clients:
            self._number = -1
        while self._number < number:
            self._number += 1
            order = seeds.numpy_rng(self._draws.seed, "sample train cyclic", self._number).permutation(
                clients
            )
            wanted = self._draws.wanted
            begun = self._number * clients % wanted
            if begun:
                waiting = np.isin(order, self._order[clients - begun :])
                first = np.flatnonzero(~waiting)[: wanted - begun]
                order = np.concatenate([order[first], np.delete(order, first)])
            self._order = order
        return self._order


class AbleSampler:
    """Draws without replacement among the clients that have the memory and keep the deadline of ``devices``.

    Who is never asked has no say in the model, as in every rule of this kind (Nishio & Yonetani, ICC 2019: FedCS);
    partial work (``devices.work=speed``) is the other way. Evaluation is uniform over all.
    """

    def __init__(self, draws: Draws) -> None:
        """Raises ``ConfigError`` if nothing is known of the clients, or too few of them are able."""
        require(
            draws.able is not None,
            "federation.sampling=able needs to know what the clients' devices can; use sampling=uniform.",
        )
        assert draws.able is not None
        self._uniform = UniformSampler.of(draws)
        able = draws.able()
        self._able: list[int] = np.flatnonzero(able).tolist()
        require(
            1 <= draws.wanted <= len(self._able),
            f"federation.sampling=able asks {draws.wanted or 'all'} clients a round and {len(self._able)} of "
            f"{len(able)} have the memory of devices.ram_mb and keep devices.deadline; give a federation.cohort "
            "of at most that many, or ask less of them.",
        )

    def train(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the clients of a training round."""
        return self._uniform.train(server_round, [nodes[i] for i in self._able])

    def evaluate(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the clients that evaluate after a round."""
        return self._uniform.evaluate(server_round, nodes)


SAMPLERS.add("uniform", UniformSampler.of)
SAMPLERS.add("weighted", WeightedSampler)
SAMPLERS.add("cyclic", CyclicSampler)
SAMPLERS.add("able", AbleSampler)


def make_sampler(name: str, draws: Draws) -> Sampler:
    """Return the sampling rule of a run; raises ``ConfigError`` for an unknown name."""
    return SAMPLERS.get(name)(draws)
