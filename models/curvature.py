"""Curvature of a model: gradients of single samples, their Gram matrix, Hessian-vector products, power iteration.

With J the per-sample gradients of an output, ``(N, P)``, and the loss half the mean square, the Gauss-Newton
matrix G = J^T J / N is the Hessian wherever every residual is zero. Its non-zero eigenvalues are those of the
``(N, N)`` matrix J J^T / N, which is all that is formed here: P may be large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from flowerbed.errors import ConfigError
from flowerbed.storage import Tensors

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix as what it does to a vector ``(P,)``."""


@dataclass(frozen=True)
class Sizes:
    """How large a positive semidefinite matrix is, in three norms; ``largest <= frobenius <= trace``."""

    trace: float
    frobenius: float
    largest: float
    """The largest eigenvalue."""


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return named tensors as one vector ``(P,)``, in their order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def like(vector: Tensor, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the vector ``(P,)`` cut into tensors of the names and shapes of ``tensors``; undoes ``flat``."""
    pieces = torch.split(vector, [tensor.numel() for tensor in tensors.values()])
    return {n: piece.view(t.shape) for (n, t), piece in zip(tensors.items(), pieces, strict=True)}


def output_gradients(model: nn.Module, x: Tensor, chunk: int | None = None) -> Tensor:
    """Return the gradient of every sample's output: ``(N, P)`` for outputs ``(N,)``, ``(N, C, P)`` for ``(N, C)``.

    P counts the parameters in the order of ``named_parameters``. ``chunk`` samples are computed at a time (None: all).
    The model is in evaluation mode meanwhile, since samples must not know of each other.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    before = model.training

    def output(tensors: Tensors, sample: Tensor) -> Tensor:
        found: Tensor = functional_call(model, tensors, (sample.unsqueeze(0),))[0]
        return found

    model.eval()
    try:
        rows = vmap(jacrev(output), (None, 0), chunk_size=chunk)(parameters, x)
    finally:
        model.train(before)
    leading = rows[next(iter(parameters))].ndim - next(iter(parameters.values())).ndim
    return torch.cat([row.flatten(leading) for row in rows.values()], -1)


def gram(gradients: Tensor) -> Tensor:
    """Return J J^T / N, ``(N, N)``, of per-sample gradients J ``(N, P)``, in float64."""
    rows = gradients.double()
    return rows @ rows.T / len(rows)


def sizes(matrix: Tensor) -> Sizes:
    """Return the norms of a positive semidefinite matrix, hence of G if it is the ``gram`` of J."""
    return Sizes(
        float(matrix.trace()),
        float(torch.linalg.matrix_norm(matrix)),
        float(torch.linalg.eigvalsh(matrix)[-1]),
    )


def hessian(loss: Callable[[Tensors], Tensor], parameters: Mapping[str, Tensor]) -> Product:
    """Return the Hessian of ``loss`` at ``parameters`` as a product with vectors ``(P,)``.

    The gradient is computed once, a product costs one more backward pass through it. Layers need a second
    derivative; ReLU's is zero wherever it exists.
    """
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    found = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True, allow_unused=True)
    reached = [
        (g, leaf) for g, leaf in zip(found, leaves.values(), strict=True) if g is not None and g.requires_grad
    ]

    def product(vector: Tensor) -> Tensor:
        along = like(vector, leaves)
        moved = {id(leaf): along[name] for name, leaf in leaves.items()}
        if not reached:
            return torch.zeros_like(vector)
        second = torch.autograd.grad(
            [g for g, _ in reached],
            list(leaves.values()),
            grad_outputs=[moved[id(leaf)] for _, leaf in reached],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([s.reshape(-1) for s in second]).detach()

    return product


def power_iteration(
    product: Product, start: Tensor, tolerance: float = 1e-10, most: int = 10_000
) -> tuple[float, Tensor]:
    """Return the eigenvalue of a symmetric matrix that is largest in size, with its sign, and its unit vector.

    ``start`` is any vector that is not orthogonal to it, best a random one. It ends once the eigenvalue changes by less
    than ``tolerance`` of itself. Raises ``ConfigError`` if that takes more than ``most`` products.
    """
    vector = start / torch.linalg.vector_norm(start)
    before = torch.inf
    for _ in range(most):
        moved = product(vector)
        value, length = float(vector @ moved), torch.linalg.vector_norm(moved)
        if not float(length):
            return 0.0, vector
        vector = moved / length
        if abs(value - before) <= tolerance * abs(value):
            return value, vector
        before = value
    raise ConfigError(f"The power iteration did not settle within {most} products; raise its tolerance.")
