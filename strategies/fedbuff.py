"""FedBuff and FedAsync: asynchronous federated learning, with clients of different speeds.

References: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
Algorithm 1 (FedBuff); Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", 2019, Algorithm 1 (FedAsync).

``concurrency`` clients train at any time. A client that finishes is replaced at once by a free one, which
starts from the model of that moment. A server update, which is a *round* of our loop, happens when
``federation.cohort`` results (K, the buffer) are in. A result whose client started tau updates ago weighs
s(tau) = (1 + tau)^-a.

    FedBuff:   w <- w + eta_g / K  sum_k s(tau_k) (w_k - w_{start of k})
    FedAsync:  w <- (1 - alpha_t) w + alpha_t w_k,   alpha_t = alpha s(tau_k),   K = 1

Time is simulated, not measured: client k needs e^{sigma z_k} (1 + jitter |n|) units a job, with z_k and n
standard normal from seeded streams. So who finishes when is known before anybody trains, the K jobs of a round
run in parallel like any cohort's, each from its own starting model, and the run is as reproducible and as
resumable as a synchronous one. ``virtual-seconds`` and ``staleness`` are reported every round.

Deviations: FedBuff's paper draws arrivals at a constant rate with half-normal durations; here the number in
flight is constant. A client is not given a second job within the round in which its first one ended. BatchNorm
statistics follow the same rule as parameters, integer counters take the largest value. FedAsync's proximal
term (rho) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from flowerbed import messages, seeds
from flowerbed.clients.local_round import MODEL
from flowerbed.errors import ConfigError, require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import CONFIG, STRATEGIES, ClientReply, FederatedStrategy, Setting

START = "start of version "


@dataclass(frozen=True)
class FedBuffParams:
    """Hyper-parameters of FedBuff; the buffer K is ``federation.cohort``."""

    concurrency: int = 0
    """Clients in flight; 0 means twice the buffer, but no more than there are."""
    server_lr: float = 1.0
    """eta_g."""
    a: float = 0.5
    """Exponent of the staleness weight (1 + tau)^-a; 0 ignores staleness."""
    sigma: float = 0.5
    """Spread of the clients' speeds (standard deviation of the log of their time)."""
    jitter: float = 0.1
    """Spread of one client's times."""

    def __post_init__(self) -> None:
        require(self.concurrency >= 0, f"strategy.concurrency is {self.concurrency}; give 0 or more.")
        require(self.server_lr > 0, f"strategy.server_lr is {self.server_lr}; give a number above 0.")
        require(self.a >= 0, f"strategy.a is {self.a}; give 0 or more.")
        require(self.sigma >= 0, f"strategy.sigma is {self.sigma}; give 0 or more.")
        require(self.jitter >= 0, f"strategy.jitter is {self.jitter}; give 0 or more.")


@dataclass(frozen=True)
class FedAsyncParams(FedBuffParams):
    """Hyper-parameters of FedAsync."""

    alpha: float = 0.6
    """Mixing weight of a result without staleness."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.alpha <= 1, f"strategy.alpha is {self.alpha}; give a number in (0, 1].")


@dataclass(frozen=True)
class Job:
    """One client at work."""

    ends: float
    """Virtual time at which its result arrives."""
    client: int
    version: int
    """Number of server updates before it started."""


@STRATEGIES.register("fedbuff")
class FedBuff(FederatedStrategy):
    """Keeps clients in flight, and aggregates the first K results by staleness."""

    Params = FedBuffParams
    params: FedBuffParams
    individual_replies = True

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        wanted = self.params.concurrency
        if wanted > setting.clients or (wanted and wanted < self._buffer):
            raise ConfigError(
                f"strategy.concurrency is {wanted}; give a number between federation.cohort ({self._buffer}) "
                f"and federation.clients ({setting.clients}), or 0."
            )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Advance virtual time until K results are in; ask for these, each from its own starting model."""
        self.current = messages.tensors(arrays)
        self.state[f"{START}{server_round - 1}"] = self.current
        nodes = list(grid.get_node_ids())
        flying, time, arrived = self._advance(server_round, len(nodes))
        self._arrived = {nodes[job.client]: job for job in arrived}
        settings = ConfigRecord({**config, "server-round": server_round, "phase": self.phase.name})
        contents = {
            version: RecordDict(
                {MODEL: messages.array_record(self.state[f"{START}{version}"]), CONFIG: settings}
            )
            for version in {job.version for job in arrived}
        }
        needed = {f"{START}{job.version}" for job in (*flying, *arrived)}
        self.state = {g: t for g, t in self.state.items() if not g.startswith(START) or g in needed}
        self.state["flying"] = _encoded(flying, time)
        return [
            Message(content=contents[job.version], dst_node_id=nodes[job.client], message_type="train")
            for job in arrived
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is not None:
            staleness = [server_round - 1 - job.version for job in self._arrived.values()]
            metrics["staleness"] = sum(staleness) / len(staleness)
            metrics["virtual-seconds"] = float(self.state["flying"]["time"])
        return arrays, metrics

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        weights, starts = [], []
        for reply in replies:
            version = self._arrived[reply.node].version
            weights.append(self.weight(server_round - 1 - version))
            starts.append(self.state[f"{START}{version}"])
        return self.combine_models(current, starts, [reply.model for reply in replies], weights)

    def weight(self, tau: int) -> float:
        """Return s(tau) for a client that started ``tau`` server updates ago."""
        return float((1 + tau) ** -self.params.a)

    def combine_models(
        self, current: Tensors, starts: Sequence[Tensors], models: Sequence[Tensors], weights: Sequence[float]
    ) -> Tensors:
        """Return w + eta_g / K sum_k s_k (w_k - w_start of k)."""
        result: Tensors = {}
        for name, w in current.items():
            if not w.is_floating_point():
                result[name] = torch.stack([model[name] for model in models]).amax(dim=0)
                continue
            moved = w.double()
            for start, model, weight in zip(starts, models, weights, strict=True):
                step = self.params.server_lr * weight / len(models)
                moved = moved + step * (model[name].double() - start[name].double())
            result[name] = moved.to(w.dtype)
        return result

    @property
    def _buffer(self) -> int:
        return (self.setting.cohort or self.setting.clients) if self.setting else 1

    def _advance(self, server_round: int, clients: int) -> tuple[list[Job], float, list[Job]]:
        """Return who flies after this round's K-th arrival, the virtual time, and the K that arrived."""
        flying, time = _decoded(self.state["flying"]) if "flying" in self.state else ([], 0.0)
        wanted = min(self.params.concurrency or 2 * self._buffer, clients)
        rng = seeds.numpy_rng(self._seed, "asynchronous clients", server_round)
        arrived: list[Job] = []
        while len(arrived) < self._buffer:
            busy = {job.client for job in (*flying, *arrived)}
            while len(flying) < wanted and len(busy) < clients:
                client = int(rng.integers(clients))
                if client in busy:
                    continue
                busy.add(client)
                lasts = self._pace(client) * (1 + self.params.jitter * abs(rng.normal()))
                flying.append(Job(time + lasts, client, server_round - 1))
            flying.sort(key=lambda job: (job.ends, job.client))
            arrived.append(flying.pop(0))
            time = arrived[-1].ends
        return flying, time, arrived

    def _pace(self, client: int) -> float:
        z = seeds.numpy_rng(self._seed, "client speed", client).normal()
        return math.exp(self.params.sigma * z)

    @property
    def _seed(self) -> int:
        return self.setting.seed if self.setting else 0


@STRATEGIES.register("fedasync")
class FedAsync(FedBuff):
    """Mixes every single result into the model as it arrives."""

    Params = FedAsyncParams
    params: FedAsyncParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        if self._buffer != 1:
            raise ConfigError(
                f"FedAsync updates the model with every result; set federation.cohort=1 (it is {self._buffer}), "
                "or use fedbuff."
            )

    def combine_models(
        self, current: Tensors, starts: Sequence[Tensors], models: Sequence[Tensors], weights: Sequence[float]
    ) -> Tensors:
        """Return (1 - alpha s) w + alpha s w_k."""
        mix = self.params.alpha * weights[0]
        return {
            name: w + mix * (models[0][name] - w) if w.is_floating_point() else models[0][name]
            for name, w in current.items()
        }


def _encoded(flying: Sequence[Job], time: float) -> Tensors:
    return {
        "ends": torch.tensor([job.ends for job in flying], dtype=torch.float64),
        "client": torch.tensor([job.client for job in flying], dtype=torch.int64),
        "version": torch.tensor([job.version for job in flying], dtype=torch.int64),
        "time": torch.tensor(time, dtype=torch.float64),
    }


def _decoded(state: Tensors) -> tuple[list[Job], float]:
    rows = zip(state["ends"].tolist(), state["client"].tolist(), state["version"].tolist(), strict=True)
    return [Job(*row) for row in rows], float(state["time"])
