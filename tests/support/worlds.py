"""Small federations on digits, and plain PyTorch twins of what their clients do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import Clock, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import ClientState, MemoryStore
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.experiments.simulation import make_federation, open_grid
from flowerbed.models.base import ModelSpec, Net
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification
from flowerbed.seeds import seed_sequence
from flowerbed.server.loop import RunResult

Tensors = dict[str, Tensor]
BATCH, LR = 128, 0.1


def bn_net(input_shape: tuple[int, ...], num_classes: int) -> Net:
    """Return a small network with one batch normalisation."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 8), nn.BatchNorm1d(8), nn.ReLU())
    return Net(body, nn.Linear(8, num_classes), 8)


def deep_head(input_shape: tuple[int, ...], num_classes: int) -> Net:
    """Return a small network whose head has two layers."""
    head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, num_classes))
    return Net(nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 8)), head, 8)


@dataclass(frozen=True)
class World:
    """A finished run with everything that it left."""

    result: RunResult
    trained: Tensors
    """The model that training would go on with."""
    store: MemoryStore
    parts: Parts

    def sampled(self, round_: int) -> list[int]:
        """Return the clients that train in a round."""
        setting = self.parts.strategy.setting
        assert setting is not None
        return setting.sampler.train(round_, range(setting.clients))

    def state(self, client: int) -> ClientState:
        """Return what the client keeps."""
        return self.store.read(client, 10**6)


def run(strategy: str, options: Mapping[str, Any] | None = None, **sections: Any) -> World:
    """Run a strategy on digits: four clients with skewed classes, two rounds of a small network."""
    base: dict[str, Any] = {
        "strategy": {"name": strategy, **(options or {})},
        "model": {"name": "mlp", "hidden": [8]},
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "federation": {"clients": 4, "rounds": 2},
        "local": {"batch_size": BATCH, "lr": LR},
        "evaluation": {"every": 0},
        "grid": {"device": "cpu"},
        "seed": 3,
    }
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if "name" not in value else value
    parts = build_parts(Simulation.of(base))
    store = MemoryStore()
    with open_grid(parts, store) as grid:
        federation = make_federation(parts, grid)
        result = federation.run()
    return World(result, federation.model, store, parts)


def open_round(
    local: LocalParams,
    *,
    spec: ModelSpec | None = None,
    data: ClientData | None = None,
    received: Mapping[str, Mapping[str, Tensor]] | None = None,
    state: ClientState | None = None,
    dtype: torch.dtype = torch.float32,
) -> LocalRound:
    """Return a local round of a small classifier (3 classes, 6 inputs) on 20 random samples."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(20, 6, generator=generator, dtype=dtype)
    y = torch.randint(0, 3, (20,), generator=generator)
    data = data or ClientData(x, y, torch.arange(20), {})
    spec = spec or ModelSpec("mlp", (6,), 3, {"hidden": (5,)})
    model = spec.build(1).to(dtype)
    initial = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return LocalRound(
        client=0, seed=0, clock=Clock(1, 5, local.steps_per_round(len(data))), phase="train", config={},
        received={"arrays": initial, **(received or {})}, model=model, parts=ModelParts.resident(model),
        info=ModelInfo.of(model), task=Classification(spec.num_classes), local=local, open_train=lambda: data,
        open_test=lambda: data, state={} if state is None else state, device=torch.device("cpu"),
        open_initial=lambda: initial,
    )  # fmt: skip


def plain_epochs(
    parts: Parts, net: nn.Module, client: int, epochs: range, moving: Callable[[str], bool], lr: float = LR
) -> None:
    """Train ``net`` on the client's data by plain SGD; only parameters that ``moving`` accepts move."""
    data, indices = parts.dataset, parts.train.indices(client)
    x, y = data.prepare(data.train.inputs[indices]), data.train.labels[indices]
    optimizer = torch.optim.SGD([p for n, p in net.named_parameters() if moving(n)], lr=lr)
    net.train()
    for epoch in epochs:
        for rows in torch.split(order_of(client, len(y), epoch), BATCH):
            net.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()


def order_of(client: int, examples: int, epoch: int) -> Tensor:
    """Return the order in which a client of a ``run`` visits its samples."""
    stream = np.random.Generator(np.random.PCG64(seed_sequence(3, "data order", client, epoch)))
    return torch.from_numpy(stream.permutation(examples))


def plain_rounds(
    parts: Parts,
    private: Callable[[str], bool],
    train: Callable[[nn.Module, int, int], None],
    rounds: int = 2,
) -> tuple[Tensors, list[Tensors]]:
    """Return the shared model and the clients' own after plain federated rounds with all clients.

    ``train(net, client, round)`` trains in place, rounds counted from 0; names that ``private`` accepts stay
    with the client, the others are averaged by the number of samples.
    """
    net = parts.spec.model.build(3)
    shared = copy.deepcopy(net.state_dict())
    own = [copy.deepcopy(net.state_dict()) for _ in range(parts.train.num_clients)]
    weights = [float(n) for n in parts.train.sizes]
    for t in range(rounds):
        for client, mine in enumerate(own):
            net.load_state_dict({n: mine[n] if private(n) else v for n, v in shared.items()})
            train(net, client, t)
            own[client] = copy.deepcopy(net.state_dict())
        for name, value in shared.items():
            if not private(name):
                shared[name] = mean([mine[name] for mine in own], weights).to(value.dtype)
    return dict(shared), [dict(mine) for mine in own]


def mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean in float64."""
    return sum(w * v.double() for w, v in zip(weights, values, strict=True)) / sum(weights)  # type: ignore[return-value]


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two models have the same names and bits."""
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Assert that two models agree to rounding, by name."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
