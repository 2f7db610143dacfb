"""What the robust aggregation rules share: their pieces as pure functions, and the check of their condition.

Rules that work coordinate by coordinate (median, trimmed mean) are applied to the clients' models: shifting all
of them by the broadcast model shifts the result by the same, so this is the rule on updates w_k - w_t, without
the rounding of a difference. Rules that compare clients (Krum, Bulyan) need distances, which are taken by
direct subtraction in float64: |x|^2 + |y|^2 - 2<x,y> cancels as soon as the models have nearly converged, and
then selects by noise.

Every reply weighs the same: a number of examples is whatever a client says. Of what is no parameter, every
coordinate takes the median over the replies, integer counters the lower one, so that BatchNorm statistics
cannot be used to get around the rule. Sums run over sorted values: the result does not depend on the order of
the replies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flowerbed.errors import RunError, require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply, FederatedStrategy, Setting

Rule = Callable[[Tensor], Tensor]
"""Maps real values ``(n, ...)`` of n replies to one ``(...)`` of the same type."""


@dataclass(frozen=True)
class RobustParams:
    """What every robust rule is told."""

    f: int = 1
    """Byzantine clients among a round's replies that the rule must withstand."""

    def __post_init__(self) -> None:
        require(self.f >= 0, f"strategy.f is {self.f}; give 0 or more byzantine clients.")


class RobustStrategy(FederatedStrategy):
    """Base of the robust rules: refuses rounds that are too small, aggregates what is no parameter."""

    individual_replies = True
    Params = RobustParams
    params: RobustParams
    condition: ClassVar[str] = "2f + 1"
    """Least number of replies, as the paper writes it."""

    def least_replies(self) -> int:
        """Return the least number of replies with which the rule withstands ``f`` byzantine clients."""
        return 2 * self.params.f + 1

    def combine_models(
        self, current: Tensors, models: Sequence[Tensors], parameters: Sequence[str]
    ) -> Tensors:
        """Return the parameters that follow from the clients' models. For algorithms to override."""
        raise NotImplementedError

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        replies = setting.cohort or setting.clients
        require(
            replies >= self.least_replies(),
            f"{self._named()}, but a round has {replies}; raise federation.cohort to at least "
            f"{self.least_replies()} or lower strategy.f.",
        )

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        if len(replies) < self.least_replies():
            raise RunError(
                f"Round {server_round}: {self._named()}, but only {len(replies)} came; lower strategy.f, or "
                "ask more clients (federation.cohort, federation.oversample)."
            )
        models = [reply.model for reply in replies]
        moving = self.parameters(current)
        names = [name for name in models[0] if name in moving]
        rest = [name for name in models[0] if name not in moving]
        return {**by_coordinate(models, rest, median), **self.combine_models(current, models, names)}

    def _named(self) -> str:
        name, least = type(self).__name__, self.least_replies()
        return f"{name} with f={self.params.f} needs {self.condition} = {least} replies a round"


def by_coordinate(models: Sequence[Tensors], names: Iterable[str], rule: Rule) -> Tensors:
    """Apply ``rule`` to each named tensor of the models; complex numbers are two coordinates."""
    result: Tensors = {}
    for name in names:
        values = torch.stack([model[name] for model in models])
        if values.is_complex():
            result[name] = torch.view_as_complex(rule(torch.view_as_real(values)).contiguous())
        else:
            result[name] = rule(values)
    return result


def median(values: Tensor) -> Tensor:
    """Return the median of ``(n, ...)`` over the replies: the mean of the middle two for an even n.

    Of whole numbers it is the lower of the two.
    """
    ordered = values.sort(dim=0).values
    low, high = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
    if not values.is_floating_point():
        return low
    return low.double().add(high.double()).div(2).to(values.dtype)


def trimmed_mean(values: Tensor, f: int) -> Tensor:
    """Return the mean of ``(n, ...)`` over the replies without the f smallest and f largest of each place."""
    kept = values.sort(dim=0).values[f : len(values) - f]
    return kept.double().mean(dim=0).to(values.dtype)


def mean_around_median(values: Tensor, count: int) -> Tensor:
    """Return the mean of the ``count`` values of ``(n, ...)`` that are closest to the median, place by place.

    Of two values equally far from the median the smaller is closer.
    """
    ordered = values.double().sort(dim=0).values
    distance = (ordered - median(ordered)).abs()
    closest = distance.argsort(dim=0, stable=True)[:count].sort(dim=0).values
    return ordered.gather(0, closest).mean(dim=0).to(values.dtype)


def squared_distances(models: Sequence[Tensors], names: Iterable[str]) -> Tensor:
    """Return ``||w_i - w_j||^2`` over the named tensors, float64 ``(n, n)``, by direct subtraction."""
    upper = torch.zeros(len(models), len(models), dtype=torch.float64)
    for name in names:
        values = torch.stack([model[name] for model in models])
        real = torch.view_as_real(values) if values.is_complex() else values
        rows = real.double().reshape(len(models), -1)
        for i in range(len(rows) - 1):
            upper[i, i + 1 :] += (rows[i + 1 :] - rows[i]).square().sum(dim=1).cpu()
    return upper + upper.T


def krum_order(distances: Tensor, f: int) -> list[int]:
    """Return the clients by Krum's score, best first.

    The score is the sum of squared distances to the n - f - 2 nearest others, at least one. Two clients that are
    each other's nearest often tie; then further neighbours decide, one after the other.
    """
    neighbours = max(1, len(distances) - f - 2)
    # The smallest of a row is the client's distance to itself.
    scores = distances.sort(dim=1).values.cumsum(dim=1)[:, min(neighbours, len(distances) - 1) :]
    # The last key of lexsort is the first to decide.
    order: list[int] = np.lexsort(scores.flip(1).T.numpy()).tolist()
    return order


def bulyan_selection(distances: Tensor, f: int) -> list[int]:
    """Return the n - 2f clients that Krum picks one after the other, each time among those that are left."""
    left = list(range(len(distances)))
    chosen: list[int] = []
    for _ in range(len(distances) - 2 * f):
        chosen.append(left.pop(krum_order(distances[left][:, left], f)[0]))
    return chosen
