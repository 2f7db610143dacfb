"""Models with another ending than they were asked for: a variational bottleneck before the head, a head without bias.

The bottleneck is that of PRECODE (Scheliga et al. 2022), see ``flowerbed.clients.model_defences``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.errors import ConfigError
from flowerbed.models.base import Net, Shape, require_at_least_one

BOTTLENECKED = f"{__name__}:bottlenecked"
UNBIASED = f"{__name__}:unbiased"
"""Where their builders are found."""
BOTTLENECK = "body.bottleneck"
"""The layer's name in a model."""


class Bottleneck(nn.Module):
    """Features ``(N, D)`` to features ``(N, D)``, through ``size`` numbers with noise.

    In training mode the noise is drawn from torch's generator. Otherwise it is ``noise``, a buffer that is no part of
    the state and is zero unless somebody hands another in (``functional_call``), ``(1, size)`` or ``(N, size)``.
    """

    noise: Tensor

    def __init__(self, features: int, size: int, beta: float) -> None:
        super().__init__()
        self.encode = nn.Linear(features, 2 * size)
        self.decode = nn.Linear(size, features)
        self.size, self.beta = size, beta
        self.register_buffer("noise", torch.zeros(1, size), persistent=False)
        self.term: Tensor | None = None
        """beta times the divergence of the last forward pass, until it is taken."""

    def forward(self, r: Tensor) -> Tensor:
        """Return what the head sees."""
        mean, log_variance = self.encode(r).chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else self.noise
        squares = mean.square() + log_variance.exp() - 1 - log_variance
        self.term = self.beta * 0.5 * squares.sum(-1).mean()
        z: Tensor = self.decode(mean + (0.5 * log_variance).exp() * noise)
        return z


def divergence(module: nn.Module) -> Tensor:
    """Return what the bottlenecks of a model add to the loss of its last forward pass; 0 where it has none."""
    total = torch.zeros(())
    for part in module.modules():
        if isinstance(part, Bottleneck) and part.term is not None:
            # Taken once: the tensor of a finished computation is of no use, and could not be copied.
            total, part.term = total + part.term, None
    return total


class _Body(nn.Module):
    def __init__(self, body: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.body = body
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.bottleneck(self.body(x))
        return z


def bottlenecked(
    input_shape: Shape,
    num_classes: int,
    base: str = "mlp",
    options: Mapping[str, Any] | None = None,
    size: int = 256,
    beta: float = 1e-3,
) -> Net:
    """Return the model ``base`` with a variational bottleneck of ``size`` numbers before its head."""
    # Here: the zoo is made of models.
    from flowerbed.models.zoo import draw_net

    require_at_least_one("bottlenecked", size=size)
    inner = draw_net(base, input_shape, num_classes, **(options or {}))
    layer = Bottleneck(inner.feature_dim, size, float(beta))
    return Net(_Body(inner.body, layer), inner.head, inner.feature_dim)


def unbiased(
    input_shape: Shape, num_classes: int, base: str = "mlp", options: Mapping[str, Any] | None = None
) -> Net:
    """Return the model ``base`` whose last linear layer has no bias; raises ``ConfigError`` if it ends in none."""
    from flowerbed.models.zoo import draw_net

    net = draw_net(base, input_shape, num_classes, **(options or {}))
    if not isinstance(net.head, nn.Linear):
        raise ConfigError(f"Model '{base}' ends in no linear layer whose bias could be left out.")
    head = nn.Linear(net.head.in_features, net.head.out_features, bias=False)
    with torch.no_grad():
        head.weight.copy_(net.head.weight)
    return Net(net.body, head, net.feature_dim)
