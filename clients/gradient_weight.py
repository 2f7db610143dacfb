"""How far a round of local SGD moves the parameters for a unit of gradient."""

from __future__ import annotations

from flowerbed.clients.local_round import Clock
from flowerbed.clients.params import LocalParams
from flowerbed.errors import require


def gradient_weight(params: LocalParams, clock: Clock, mu: float = 0.0) -> float:
    """Return the sum of the weights with which the round's gradients enter the update, step sizes included.

    Local SGD moves the parameters by -sum_j a_j g_j over its gradients g_j; returned is sum_j a_j. It is
    found by running the optimizer on a gradient that is always one, hence exact for momentum (also Nesterov),
    learning-rate schedules, and a proximal term of weight ``mu``:

        plain SGD           eta K
        momentum rho        eta [K - rho (1 - rho^K) / (1 - rho)] / (1 - rho)
        proximal term mu    (1 - (1 - eta mu)^K) / mu

    This is eta ||a||_1 of Wang et al. 2020 (FedNova, section 4). Weight decay and clipping count as part of
    the gradient.
    """
    moved = velocity = 0.0
    for step in clock.all_steps:
        gradient = 1.0 - mu * moved
        velocity = params.momentum * velocity + gradient
        direction = gradient + params.momentum * velocity if params.nesterov else velocity
        moved += params.lr_at(step, clock.steps, clock.rounds) * direction
    return moved


def require_gradient_weight(strategy: str, params: LocalParams) -> None:
    """Raise ``ConfigError`` where local training has no such weight; ``strategy`` is named in the message."""
    require(
        params.optimizer == "sgd",
        f"{strategy} divides a client's update by the weight of its gradients, which local.optimizer="
        f"{params.optimizer} does not have; set local.optimizer=sgd.",
    )
    require(
        params.lr > 0,
        f"{strategy} divides a client's update by its step sizes and local.lr is 0; give a local.lr above 0.",
    )
    require(
        not (params.persist and params.momentum),
        f"{strategy} needs a momentum that starts anew each round; set local.persist=false or local.momentum=0.",
    )
