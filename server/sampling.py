"""Which clients are asked: seeded draws over partition ids, a function of the round alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowerbed import seeds


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
