"""The fast engine of one client at a time: the resident model's layers in other forms while a round trains.

On CPUs only. What differs from the strict engine:

- Large dense layers go through oneDNN where that is faster (``flowerbed.clients.engine_routes``), and under
  plain SGD the weight moves within the backward pass, ``w -= lr g^T x`` in one product. Both change the last bits: a
  step's update differs from the strict one by about 1e-6 of its length. Errors grow with the steps as training
  itself amplifies them, and where a rectifier or a maximum is tied within rounding, its gradient may go elsewhere.
- Dropout whose probability is a multiple of 1/256 draws bytes: masks of the same distribution, from the same
  stream, but not those of the strict engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.clients.engine_routes import Routes
from flowerbed.models.fast import Descent, dense, dropout

Compute = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]


class FastLayers:
    """The fast forms of a model's layers; the model has them only within ``applied``."""

    def __init__(self, model: nn.Module, routes: Routes) -> None:
        """``routes`` says how the dense layers are computed, by the shape of their weight."""
        self.lr = 0.0
        """The learning rate of ``descend``."""
        self._descent = Descent()
        self._forwards: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = []
        owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        for module in model.modules():
            own = module.__dict__
            if type(module) is nn.Linear:
                route = routes.get((module.out_features, module.in_features))
                if route is not None and owners[id(module.weight)] == 1:
                    self._forwards.append((own, dense(module, route, self._descent)))
            elif type(module) is nn.Dropout and (module.p * 256).is_integer() and 0 < module.p < 1:
                self._forwards.append((own, dropout(module)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model's layers compute in their fast forms."""
        for own, forward in self._forwards:
            # An instance's own ``forward`` goes before that of its class.
            own["forward"] = forward
        try:
            yield
        finally:
            for own, _ in self._forwards:
                del own["forward"]

    def descend(
        self, compute: Compute, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor], dict[str, Tensor | None]]:
        """Do what ``backpropagate`` does, and move the dense weights on the way: these have no gradient then."""
        self._descent.begin()
        value, metrics = compute()
        with self._descent.along(self.lr):
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        return value, metrics, dict(zip(parameters, gradients, strict=True))
