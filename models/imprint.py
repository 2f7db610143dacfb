"""Models that a malicious server sends: a layer in front whose gradient writes down what went in.

Fowl et al., "Robbing the Fed: Directly Obtaining Private Data in Federated Learning with Modified Models", ICLR 2022.
k rows with one and the same w and biases -c_1 < ... : row i of

    a = relu(W x - c),   y = x + v 1^T a

fires for h(x) = <w, x> > c_i, and all rows hand the same gradient down, since all columns behind them are v. So the
difference of the gradients of rows i and i + 1 is that of the samples with c_i < h(x) <= c_{i+1} alone. With the c_i at
the quantiles i / k of h, B samples fall into k bins of equal share, and on average B (1 - 1/k)^(B - 1) of them are
alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowerbed.models.base import Net, Shape, require_at_least_one

IMPRINT = "body.imprint"


class Imprint(nn.Module):
    """The layer: ``(N, *shape)`` in and out."""

    def __init__(self, shape: Shape, bins: int, mean: float, std: float, leak: float) -> None:
        """h(x) is the mean over the inputs, taken to be normal with this mean and deviation."""
        super().__init__()
        size = math.prod(shape)
        self.shape = shape
        self.rows = nn.Linear(size, bins)
        self.back = nn.Parameter(torch.full((size,), leak))
        quantiles = torch.special.ndtri(
            (torch.arange(bins, dtype=torch.float64) + 1e-3).clamp(max=bins) / bins
        )
        with torch.no_grad():
            self.rows.weight.fill_(1 / size)
            self.rows.bias.copy_(-(mean + std * quantiles))

    def forward(self, x: Tensor) -> Tensor:
        """Return x, and a little of the sum of all activations everywhere."""
        fired = self.rows(x.flatten(1)).relu().sum(1, keepdim=True)
        y: Tensor = x + (fired * self.back).view(-1, *self.shape)
        return y


class _Body(nn.Module):
    def __init__(self, imprint: Imprint, body: nn.Module) -> None:
        super().__init__()
        self.imprint = imprint
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.body(self.imprint(x))
        return z


def imprinted(
    input_shape: Shape,
    num_classes: int,
    base: str = "dlg_lenet",
    bins: int = 64,
    mean: float = 0.0,
    std: float = 1.0,
    leak: float = 0.01,
) -> Net:
    """Return the model ``base`` behind an imprint layer (Fowl et al. 2022), as a malicious server would send it.

    ``mean`` and ``std`` are those of a sample's mean input over samples, which the server knows from public data.
    """
    # Here: the zoo is made of models, this one among them.
    from flowerbed.models.zoo import draw_model

    require_at_least_one("imprinted", bins=bins)
    inner = draw_model(base, input_shape, num_classes)
    assert isinstance(inner, Net)
    layer = Imprint(input_shape, bins, mean, std, leak)
    return Net(_Body(layer, inner.body), inner.head, inner.feature_dim)
