"""One Step of Gradient Descent is Provably the Optimal In-Context Learner with One Layer of Linear Self-Attention.

Mahankali, Hashimoto and Ma, ICLR 2024, arXiv 2307.03576. A layer of linear attention reads n pairs u_i = [x_i; y_i] and
a query q = [x_{n+1}; 0], and predicts y_{n+1}. It is trained on fresh prompts, each with a function f of its own:

    pred = h^T W_V ( sum_{i <= n} u_i u_i^T ) W_K^T W_Q q          L = E (y_{n+1} - pred)^2

Every minimiser predicts what one step of gradient descent from 0 on the prompt's own squared loss
1/2 sum (w . x_i - y_i)^2 predicts, pred = sum_i y_i x_i^T A x_{n+1}:

    Theorem 1   x ~ N(0, I),      f linear                        A = eta I
    Theorem 2   x ~ N(0, Sigma),  f linear, w ~ N(0, Sigma^-1)    A = eta Sigma^-1, one preconditioned step
    Theorem 3   x ~ N(0, I),      f as likely as f(R .) and -f    A = eta I, another eta

With s = sum y_i x_i, L is quadratic in A. Its moments, for Sigma = I (for others after whitening),

    g = E[s . grad] / d = n k / d              k = E_f || E_x[f(x) x] ||^2
    kappa = E ||s||^2 / d = ( n E[(f^2 + sigma^2) ||x||^2] + n (n - 1) k ) / d

give eta = g / kappa. For linear f that is eta = 1 / (n + d + 1 + sigma^2) with
L* = sigma^2 + d (d + 1 + sigma^2) / (n + d + 1 + sigma^2); for f = a relu(w . x) k is d / 4 and E f^2 ||x||^2 is
d (d + 2) / 2. Over several distributions with shares p_c, each with its Sigma_c, the minimiser solves

    sum_c p_c kappa_c Sigma_c A Sigma_c = sum_c p_c g_c Sigma_c

With w = W_V^T h and M = W_K^T W_Q the coefficient of y_i x_i x_q^T is A = w_y M_xx + w_x M_yx^T: both terms. What else
the layer could do, w_x M_xx (no y) and w_y M_yx (y twice), must vanish. Only such products are compared: a factor may
move between w and M. Nothing of this is built in: all of W_K, W_Q, W_V and h are free.

Controls. Plain gradient descent with its best scalar step on anisotropic data; ridge regression with the prior's own
penalty, that is Bayes' rule for linear f, which one layer cannot reach; two layers, which must beat L*. Attention and
the closed form are judged on the same fresh prompts. The paper has theorems only; the training is ours: the sum over
the prompt is divided by n, weights start as N(0, 0.3^2) (zero is a saddle), Adam on a cosine schedule with clipping.

The theorems speak of global minimisers, and training need not find one. At quick scale with n = 160 one of three
initial weights ends, at every noise, in a stationary point where M_xx is nearly singular along w_x: the term w_x M_xx
then costs little, one direction of A is half as long as it should be, and four times the steps change nothing. The
claim on the step size fails there, and stays as it is.

Many clients: each owns distributions of prompts and draws its own stream. With a single plain SGD step a round,
momentum kept, the average is the pooled step, so the federation must reach the compromise above. W_K and W_Q are
averaged apart, which after long local training from far-away models is not the average of their product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound
from flowerbed.clients.streams import fresh_batches
from flowerbed.clients.training import Batches
from flowerbed.datasets.prompts import Prompts
from flowerbed.models.base import Shape, require_at_least_one
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

STREAM, CHUNK, INITIAL = "prompts", 10_000, 0.3


class Layer(nn.Module):
    """Linear self-attention of tokens ``z`` to the ``context``: W_V (sum_i u_i u_i^T / n) W_K^T W_Q z."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.k, self.q, self.v = (nn.Parameter(INITIAL * torch.randn(width, width)) for _ in range(3))

    def forward(self, context: Tensor, z: Tensor) -> Tensor:
        gram = context.mT @ context / context.shape[1]
        attended: Tensor = z @ (self.q.mT @ self.k) @ gram @ self.v.mT
        return attended


class LinearAttention(nn.Module):
    """Layers of linear attention and a read-out of the query's token; the query is no part of any context."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.h = nn.Parameter(INITIAL * torch.randn(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the prediction of each prompt, ``(B, n + 1, width)`` to ``(B,)``."""
        *earlier, last = self.layers
        for layer in earlier:
            tokens = tokens + layer(tokens[:, :-1], tokens)
        read: Tensor = last(tokens[:, :-1], tokens[:, -1:])
        # What deeper models add to the query's token counts; in the paper's single layer there is none.
        return ((read + tokens[:, -1:] if earlier else read) @ self.h)[:, 0]

    def effective(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return, of one layer, A ``(d, d)``, and the coefficients w_x M_xx ``(d, d, d)`` and w_y M_yx ``(d,)``."""
        (layer,) = self.layers
        assert isinstance(layer, Layer)
        w, m = layer.v.mT @ self.h, layer.k.mT @ layer.q
        a = w[-1] * m[:-1, :-1] + torch.outer(w[:-1], m[-1, :-1])
        return a, torch.einsum("a,bc->abc", w[:-1], m[:-1, :-1]), w[-1] * m[-1, :-1]


def linear_attention(input_shape: Shape, num_classes: int, *, layers: int = 1) -> LinearAttention:
    """Return the paper's layer for prompts ``(n + 1, d + 1)``, or a stack of such layers with residuals."""
    require_at_least_one("linear_attention", layers=layers)
    return LinearAttention(input_shape[1], layers)


class OneStepHalf(ClientHalf):
    """Trains on fresh prompts of the client's own distributions, by the squared error."""

    def batches(self, local: LocalRound) -> Batches:
        own = Prompts.of(local.train_data.x, local.train_data.extras)

        def draw(count: int, rng: torch.Generator) -> Batch:
            tokens, y, _ = own.draw(count, rng)
            return {"x": tokens, "y": y}

        return fresh_batches(local, draw, STREAM)

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return (batch["y"] - model(batch["x"])).square().mean(), {}


class OneStep(FedAvg):
    """FedAvg over clients with prompts of their own."""

    Params = FedAvgParams
    Half = OneStepHalf


def moments(table: Prompts) -> tuple[Tensor, Tensor]:
    """Return g and kappa of each distribution, float64 ``(K,)``."""
    n, d, variance = table.n, table.d, table.noise.double() ** 2
    k = torch.where(table.relu, d / 4, float(d)).double()
    squares = torch.where(table.relu, d * (d + 2) / 2, float(d * (d + 2))).double()
    return n * k / d, (n * (squares + variance * d) + n * (n - 1) * k) / d


def optimum(table: Prompts) -> tuple[Tensor, float]:
    """Return the minimiser A over all distributions with equal shares, ``(d, d)``, and the best scalar step."""
    g, kappa = moments(table)
    spectrum = table.spectrum.double()
    first, second = (g[:, None] * spectrum).mean(0), (kappa[:, None] * spectrum**2).mean(0)
    return torch.diag(first / second), float(first.sum() / second.sum())


def population_loss(table: Prompts, a: Tensor) -> float:
    """Return L of the predictor sum y_i x_i^T A x_q, with equal shares of the distributions."""
    g, kappa = moments(table)
    target = torch.where(table.relu, table.d / 2, float(table.d)).double() + table.noise.double() ** 2
    sigma = torch.diag_embed(table.spectrum.double())
    a = a.double()
    linear = torch.einsum("ab,kab->k", a, sigma)
    square = torch.einsum("ab,kbc,dc,kad->k", a, sigma, a, sigma)
    return float((target - 2 * g * linear + kappa * square).mean())
