"""Learning rates of their own for some of the parameters, by way of their gradients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flowerbed.storage import Tensors


def scaled(
    gradients: Tensors,
    parameters: Mapping[str, Tensor],
    factors: Mapping[str, float],
    weight_decay: float = 0.0,
) -> Tensors:
    """Return gradients with which SGD moves each parameter as with ``factors[name]`` times the learning rate.

    Momentum is linear in the gradients; ``weight_decay``, which SGD adds afterwards, is scaled along. Names without a
    factor keep their gradient. Adam divides every scale out again, so this is for SGD only.
    """
    found = dict(gradients)
    for name, factor in factors.items():
        if name in found:
            found[name] = found[name] * factor
            if weight_decay:
                found[name] = found[name] + (factor - 1) * weight_decay * parameters[name].detach()
    return found
