"""SCAFFOLD: control variates against client drift.

Reference: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
Algorithm 1.

Client i:  y <- y - eta_l (g_i(y) - c_i + c),  K steps from x;
           option I:   c_i+ = the gradient of F_i at x, over all of the client's data
           option II:  c_i+ = c_i - c + (x - y) / (K eta_l)
           sends y and dc_i = c_i+ - c_i, and keeps c_i+.
Server:    x <- x + eta_g mean_S (y_i - x);  c <- c + (m / N) mean_S dc_i.  Means are uniform, N is all clients.

c and all c_i start at zero, and c stays the mean of all N c_i, also under partial participation. Both ways
carry twice the bytes of FedAvg. y travels in place of y - x, which says the same and is exact for one client.

K eta_l is replaced by the true weight of the round's gradients (``flowerbed.clients.gradient_weight``), so that
c_i+ of option II is a mean gradient also with momentum, Nesterov momentum and learning-rate schedules. That
needs SGD, and momentum that starts anew each round. Option I walks through the data once more in batches of
``local.batch_size``, not augmented, with modules in training mode but without touching BatchNorm's statistics.
Control variates belong to parameters; BatchNorm statistics are averaged. A reply that is lost after training
leaves c and that client's c_i apart by its dc_i / N.

Defaults: option II and eta_g = 1, as in the paper's experiments. ``weighting`` concerns the models only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.gradient_weight import gradient_weight, require_gradient_weight
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Trained
from flowerbed.clients.training import Loss, module_stream
from flowerbed.errors import require
from flowerbed.models.parts import ModelParts
from flowerbed.pooling import UNIFORM, Mean, Pooling
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

CONTROL = "control"
"""Stream of c (down) and dc_i (up), group of c (server) and c_i (client)."""


@dataclass(frozen=True)
class ScaffoldParams(FedAvgParams):
    """Hyper-parameters of SCAFFOLD; ``server_lr`` is eta_g."""

    weighting: str = "uniform"
    """uniform: mean of the models as in the paper; examples: p_k proportional to n_k."""
    option: int = 2
    """How a client renews its control variate: 1 (gradient at x) or 2 (mean gradient of the round)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.option in (1, 2), f"strategy.option is {self.option}; choose 1 or 2.")


class ScaffoldHalf(ClientHalf):
    """Local steps along g - c_i + c."""

    stateful = True

    def begin(self, local: LocalRound) -> Extras:
        server = {n: c.to(local.device) for n, c in local.received[CONTROL].items()}
        own = {n: c.to(local.device) for n, c in local.state.get(CONTROL, {}).items()}
        own = own or {n: torch.zeros_like(c) for n, c in server.items()}
        extras = {
            "start": local.parameters(),
            "server": server,
            "own": own,
            # Taken first, because g + c - c_i would round even where c equals c_i.
            "shift": {n: c - own[n] for n, c in server.items()},
        }
        if self.params.option == 1:
            extras["gradient"] = full_gradient(local, self.loss, extras)
        return extras

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        return {n: g + extras["shift"][n] for n, g in gradients.items()}

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        own = extras["own"]
        if self.params.option == 1:
            change = {n: g - own[n] for n, g in extras["gradient"].items()}
        else:
            weight = gradient_weight(local.local, local.clock)
            change = {
                n: (extras["start"][n] - y.detach()) / weight - extras["server"][n]
                for n, y in local.parts.parameters.items()
            }
        # The client adds what it sends, in the order of the server, so that one client has c equal to c_i.
        local.state[CONTROL] = {**own, **{n: own[n] + dc for n, dc in change.items()}}
        return {**super().end(local, trained, extras), CONTROL: change}


@STRATEGIES.register("scaffold")
class Scaffold(FedAvg):
    """Keeps c in ``state["control"]``."""

    Params = ScaffoldParams
    Half = ScaffoldHalf
    params: ScaffoldParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require_gradient_weight(type(self).__name__, setting.local)

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        moving = self.parameters(self.current)
        if CONTROL not in self.state:
            self.state[CONTROL] = {n: torch.zeros_like(w) for n, w in self.current.items() if n in moving}
        return {CONTROL: self.state[CONTROL]}

    @property
    def pooled(self) -> Pooling | None:
        return {MODEL: Mean(MODEL, self.params.weighting), CONTROL: Mean(CONTROL, UNIFORM)}

    def combine(
        self, server_round: int, current: Tensors, means: Mapping[str, Tensors], count: int
    ) -> Tensors:
        control, share = self.state[CONTROL], count / self.clients
        self.state[CONTROL] = {**control, **{n: control[n] + share * dc for n, dc in means[CONTROL].items()}}
        return super().combine(server_round, current, means, count)


def full_gradient(local: LocalRound, loss: Loss, extras: Extras) -> Tensors:
    """Return the gradient of ``loss`` over all training samples at the current parameters, by name.

    Batches of ``local.batch_size`` in the order of the data, with modules in training mode; buffers are copies.
    Parameters that the loss does not touch have gradient zero.
    """
    data, size = local.train_data, local.local.batch_size or len(local.train_data)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in local.parts.parameters.items()}
    buffers = {n: b.clone() for n, b in local.parts.buffers.items()}
    parts = ModelParts.functional(local.model, parameters, buffers)
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    local.model.train()
    with module_stream(local, persist=False, scope=" full gradient"):
        for start in range(0, len(data), size):
            batch = data.batch(slice(start, start + size))
            value, _ = loss(parts, batch, extras, local.task)
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    total[name] += gradient * (len(batch["y"]) / len(data))
    return total
