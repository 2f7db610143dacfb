"""What the personalised methods share: second models on a client, local fine-tuning, and their checks.

The evaluation of every method reports two predictors on a client's own test samples (which follow its
training distribution, see ``flowerbed.datasets.subsets``; no class is masked): ``""``, the model that all
clients share, and ``personal``, the client's own. Where a method has no shared model, both are the client's
own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from flowerbed.clients.half import Predictor
from flowerbed.clients.local_round import LocalRound, shared_model
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import Loss, train
from flowerbed.models.parts import ModelParts
from flowerbed.storage import Tensors

PERSONAL = "personal"
"""The group of a client's state that holds its personal model or head, and the name of that predictor."""


@dataclass(frozen=True)
class Tuning:
    """One stage of local fine-tuning."""

    params: LocalParams
    frozen: frozenset[str] = frozenset()
    """Parameters that it does not move."""


def whole_model(local: LocalRound) -> Tensors:
    """Return a copy of the resident model's parameters and buffers."""
    return shared_model(local, frozenset())


def personal_model(local: LocalRound) -> Tensors:
    """Return the client's personal model; one that has not trained yet has the run's initial model."""
    return dict(local.state.get(PERSONAL) or local.open_initial())


def parts_of(local: LocalRound, tensors: Mapping[str, Tensor]) -> ModelParts:
    """Return the model with the given parameters and buffers in place of the resident ones."""
    parameters = {n: v.to(local.device) for n, v in tensors.items() if n in local.info.parameters}
    buffers = {n: v.to(local.device) for n, v in tensors.items() if n not in local.info.parameters}
    return ModelParts.functional(local.model, parameters, buffers)


def two_predictors(local: LocalRound, personal: Predictor) -> Mapping[str, Predictor]:
    """Return the received model and the personal predictor under their names."""
    return {"": local.model, PERSONAL: personal}


@contextlib.contextmanager
def hosting(local: LocalRound, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the resident model hold other values for a while, then those that it has now."""
    before = whole_model(local)
    local.load(tensors)
    try:
        yield
    finally:
        local.load(before)


def tuned(local: LocalRound, loss: Loss, *stages: Tuning) -> Tensors:
    """Return the resident model as further local training leaves it; the resident one stays as it is.

    Nothing is kept of the optimizer, and the learning rate of a stage is constant.
    """
    with hosting(local, {}):
        for number, stage in enumerate(stages):
            params = replace(stage.params, schedule="constant", persist=False)
            train(local, loss, extras={}, params=params, frozen=stage.frozen, scope=f" tuning {number}")
        return whole_model(local)
