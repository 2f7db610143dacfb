"""Malicious servers: what is broadcast in place of the honest model, so that updates give more away.

A tampering is a pure function of the honest model and of what the server saw before; ``MaliciousServer`` puts it into
any run, between the strategy and its messages. The reply to a tampered model tells nothing about the honest one, so the
strategy gets the honest model back in its place: a tampered round trains nothing, and leaves no trace in the model.

=====================  ==============================================================================================
``trap_weights``       the first dense layer fires for few samples, each row for others (Boenisch et al. 2021)
``class_fishing``      a head under which samples of one class alone reach the body (Wen et al. 2022)
``feature_fishing``    the same among the samples of one class: those below a cut of one feature, which is moved from
                       round to round until a single sample is below it (Wen et al. 2022, with bisection)
=====================  ==============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.app import RecordDict
from flwr.app.message import Message
from flwr.serverapp import Grid
from torch import nn

from flowerbed import messages, seeds
from flowerbed.clients.local_round import MODEL
from flowerbed.errors import ConfigError, require
from flowerbed.models.base import ModelSpec, Net
from flowerbed.registry import Registry
from flowerbed.storage import Tensors
from flowerbed.strategies.attacks.labels import dummies
from flowerbed.strategies.attacks.observation import Observation, SideInfo, batch_size, gradient_of
from flowerbed.strategies.attacks.observer import Observer, name_of
from flowerbed.strategies.base import ClientReply, ServerTransform

TAMPERINGS: Registry[type[Tampering]] = Registry("tampering")
HONEST, HEAD = "none", "head"


@dataclass(frozen=True)
class Exchange:
    """What a malicious server knows when it is about to send a model to a client."""

    model: ModelSpec
    honest: Tensors
    """Parameters and buffers that the strategy wants to send."""
    client: int
    round: int
    seed: int
    side: SideInfo
    """How clients train, and how the model's inputs relate to pixels."""
    before: Sequence[Observation] = ()
    """Earlier exchanges with this client under the same tampering, by round."""

    def module(self) -> nn.Module:
        """Return the honest model."""
        module = self.model.build(0)
        module.load_state_dict({**module.state_dict(), **self.honest})
        return module


class Tampering:
    """Base of what a malicious server does; subclasses are frozen dataclasses of their options."""

    def broadcast(self, exchange: Exchange) -> Tensors:
        """Return the tensors to send in place of the honest ones of the same names.

        Raises ``ConfigError`` for a model that it cannot be done to.
        """
        raise NotImplementedError


@TAMPERINGS.register(HONEST)
@dataclass(frozen=True)
class Honest(Tampering):
    """The model as it is."""

    def broadcast(self, exchange: Exchange) -> Tensors:
        return {}


@TAMPERINGS.register("trap_weights")
@dataclass(frozen=True)
class TrapWeights(Tampering):
    """A first dense layer whose rows fire for few samples.

    In every row half of the weights, at random places, are -|n| with n ~ N(0, sigma^2), the other half are s times the
    same sizes. For pixels of like brightness the sum is then a little below 0, and a ReLU passes what few samples have
    their ink at the right places. Boenisch et al., "When the Curious Abandon Honesty", EuroS&P 2023, section 5.
    """

    sigma: float = 0.5
    """Deviation of the negative weights, on pixels in [0, 1]."""
    s: float = 0.95
    """Size of the positive weights, as a share of the negative ones; less makes rows fire more rarely."""

    def __post_init__(self) -> None:
        require(self.sigma > 0, f"tampering.sigma is {self.sigma}; give a number above 0.")
        require(0 < self.s <= 1, f"tampering.s is {self.s}; give a share above 0, at most 1.")

    def broadcast(self, exchange: Exchange) -> Tensors:
        name, layer = first_dense(exchange.module(), exchange.model)
        rows, size = layer.weight.shape
        rng = seeds.torch_rng(exchange.seed, "trap weights", exchange.round)
        sizes = self.sigma * torch.randn(rows, size // 2, generator=rng, dtype=torch.float64).abs()
        halves = [-sizes, self.s * sizes] + ([torch.zeros(rows, 1).double()] if size % 2 else [])
        places = torch.rand(rows, size, generator=rng).argsort(1)
        weight = torch.cat(halves, 1).gather(1, places)
        # The rows are meant for pixels: value = (pixel - mean) / std is undone in the layer.
        channels, pixels = exchange.model.input_shape[0], size // exchange.model.input_shape[0]
        std, mean = (
            torch.tensor(v, dtype=torch.float64).expand(channels).repeat_interleave(pixels)
            for v in (exchange.side.scale.std, exchange.side.scale.mean)
        )
        bias = (weight * mean).sum(1)
        own = layer.weight.dtype
        return {f"{name}.weight": (weight * std).to(own), f"{name}.bias": bias.to(own)}


@TAMPERINGS.register("class_fishing")
@dataclass(frozen=True)
class ClassFishing(Tampering):
    """A head that makes the model sure of all classes but one, and hides no sample of that one.

    The rows of the other classes are 0 and their biases large, so a sample of another class has a loss without a
    gradient by its features; a sample of the class has one. Wen et al., "Fishing for User Data in Large-Batch Federated
    Learning via Gradient Magnification", ICML 2022, section 3.2.
    """

    target: int = 0
    """The class."""
    weight: float = 0.5
    """All weights of its row."""
    bias: float = 1000.0
    """Of the other classes."""

    def __post_init__(self) -> None:
        require(self.target >= 0, f"tampering.target is {self.target}; classes count from 0.")
        require(self.weight != 0, "tampering.weight is 0; then no sample has a gradient.")

    def broadcast(self, exchange: Exchange) -> Tensors:
        name, head = head_of(exchange.module(), exchange.model, self.target)
        weight, bias = torch.zeros_like(head.weight), torch.full_like(head.bias, self.bias)
        weight[self.target], bias[self.target] = self.weight, 0.0
        return {f"{name}.weight": weight.detach(), f"{name}.bias": bias.detach()}


@TAMPERINGS.register("feature_fishing")
@dataclass(frozen=True)
class FeatureFishing(Tampering):
    """A head that lets through the samples of a class with a feature below a cut, and finds the cut that leaves one.

    The target's logit is m (r_j - v), all others are 0. A sample of the class with r_j above v has no loss, one below
    it has. The target's bias gradient says how many there were, so the next round's cut is found by bisection. It is
    meant for clients whose samples are all of one class, the same ones in every round. Wen et al. 2022, section 3.3.
    """

    target: int = 0
    """The class."""
    sharpness: float = 300.0
    """m, in deviations of the feature."""

    def __post_init__(self) -> None:
        require(self.target >= 0, f"tampering.target is {self.target}; classes count from 0.")
        require(self.sharpness > 0, f"tampering.sharpness is {self.sharpness}; give a number above 0.")

    @torch.no_grad()
    def broadcast(self, exchange: Exchange) -> Tensors:
        module = exchange.module().eval()
        name, head = head_of(module, exchange.model, self.target)
        assert isinstance(module, Net)
        x = dummies(exchange.model.input_shape, exchange.side, exchange.seed)
        features = module.features(x).double()
        place = int(features.std(0).argmax())
        mean, std = float(features[:, place].mean()), max(float(features[:, place].std()), 1e-6)
        steep = self.sharpness / std
        seen = [(cut_of(o), caught(o, exchange.side)) for o in exchange.before]
        cut = next_cut(seen, mean, std)
        weight, bias = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
        weight[self.target, place], bias[self.target] = steep, -steep * cut
        return {f"{name}.weight": weight, f"{name}.bias": bias}


def cut_of(seen: Observation) -> float:
    """Return v of a model that was sent to fish by a feature."""
    weight, bias = seen.sent[f"{HEAD}.weight"], seen.sent[f"{HEAD}.bias"]
    target = target_of(seen)
    return -float(bias[target]) / float(weight[target].sum())


def target_of(seen: Observation) -> int:
    """Return the class that was fished for; raises ``ConfigError`` for a model that was not sent to fish."""
    weight = seen.sent.get(f"{HEAD}.weight")
    rows = [] if weight is None else torch.nonzero(weight.any(1)).flatten().tolist()
    if len(rows) != 1 or f"{HEAD}.bias" not in seen.sent:
        raise ConfigError(
            f"The model that client {seen.client} got in round {seen.round} was not made to fish; run with "
            "tampering=class_fishing or tampering=feature_fishing."
        )
    return int(rows[0])


def caught(seen: Observation, side: SideInfo) -> int:
    """Return how many samples of the target reached the body: -B db_target.

    Exact where all others have no share in db_target: those of other classes under ``ClassFishing``.
    """
    target, name = target_of(seen), f"{HEAD}.bias"
    if all(torch.equal(value, seen.sent[n]) for n, value in seen.returned.items()):
        return 0
    return max(0, round(-batch_size(seen, side) * float(gradient_of(seen, side)[name][target])))


def next_cut(seen: Sequence[tuple[float, int]], first: float, step: float) -> float:
    """Return the cut to try after those ``seen``, each with the number of samples below it.

    One that left a single sample is kept; else the interval between the largest cut with none and the smallest one with
    several is halved, or searched for in steps that double.
    """
    if not seen:
        return first
    for cut, count in seen:
        if count == 1:
            return cut
    empty, full = ([cut for cut, count in seen if (count > 0) is some] for some in (False, True))
    if not full:
        return max(empty) + step * 2.0 ** (len(empty) - 1)
    if not empty:
        return min(full) - step * 2.0 ** (len(full) - 1)
    return (max(empty) + min(full)) / 2


def first_dense(module: nn.Module, model: ModelSpec) -> tuple[str, nn.Linear]:
    """Return the linear layer that sees the whole input; raises ``ConfigError`` where there is none."""
    inputs = math.prod(model.input_shape)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            if layer.in_features == inputs and layer.bias is not None and len(model.input_shape) == 3:
                return name, layer
            break
        if isinstance(layer, nn.Conv2d):
            break
    raise ConfigError(
        f"Trap weights go into a first dense layer with a bias that sees the whole image, and the model "
        f"'{model.name}' has none; use model=mlp."
    )


def head_of(module: nn.Module, model: ModelSpec, target: int) -> tuple[str, nn.Linear]:
    """Return the last linear layer; raises ``ConfigError`` where there is none with a bias, or no such class."""
    head = module.head if isinstance(module, Net) else None
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise ConfigError(
            f"Fishing needs a model that ends in one linear layer with a bias, and '{model.name}' does not."
        )
    require(
        target < head.out_features,
        f"tampering.target is {target}, and the model has the classes 0 to {head.out_features - 1}.",
    )
    return HEAD, head


class MaliciousServer(ServerTransform):
    """Sends tampered models in the observed rounds, keeps what comes back, and hides it from the strategy.

    It takes the observer's place before all other transforms, and lets it write what it does. Only clients that are
    observed get a tampered model.
    """

    def __init__(
        self,
        tampering: Tampering,
        observer: Observer,
        model: ModelSpec,
        folder: Path,
        *,
        clients: Collection[int] | None,
        rounds: Collection[int],
        first_node: int,
        seed: int,
        side: SideInfo,
    ) -> None:
        """``folder`` is where the observer writes; ``clients`` and ``rounds`` are those it keeps."""
        self._tampering, self._observer, self._model, self._folder = tampering, observer, model, folder
        self._clients, self._rounds, self._first = clients, sorted(rounds), first_node
        self._seed, self._side = seed, side
        self._sent: dict[int, Tensors] = {}
        """What went out in this round, by node."""
        self._round = 0

    def configure(self, server_round: int, asked: Sequence[Message], grid: Grid) -> None:
        self._round, self._sent = server_round, {}
        for message in asked:
            node = message.metadata.dst_node_id
            if message.metadata.message_type != "train" or not self._wants(server_round, node):
                continue
            honest, client = messages.tensors(message.content.array_records[MODEL]), node - self._first
            before = self._before(server_round, client)
            exchange = Exchange(self._model, honest, client, server_round, self._seed, self._side, before)
            sent = {**honest, **self._tampering.broadcast(exchange)}
            # A content is shared by all messages of the round: this one gets its own.
            message.content = RecordDict({**message.content, MODEL: messages.array_record(sent)})
            self._sent[node] = sent

    def replies(
        self, server_round: int, current: Tensors, replies: list[ClientReply], parameters: frozenset[str]
    ) -> list[ClientReply]:
        if self._round != server_round and any(self._wants(server_round, reply.node) for reply in replies):
            raise ConfigError(
                "This strategy writes its messages itself, so a malicious server cannot tamper with them "
                "(tampering=...); use one like fedavg."
            )
        found = []
        for reply in replies:
            sent = self._sent.get(reply.node)
            if sent is None or MODEL not in reply.streams:
                found.append(reply)
                continue
            self._observer.replies(server_round, sent, [reply], parameters)
            honest = {n: current[n] for n in reply.streams[MODEL]}
            found.append(replace(reply, streams={**reply.streams, MODEL: honest}))
        return found

    def _wants(self, server_round: int, node: int) -> bool:
        return server_round in self._rounds and (self._clients is None or node - self._first in self._clients)

    def _before(self, server_round: int, client: int) -> list[Observation]:
        """Return what was kept of a client in earlier rounds; also after a run was resumed."""
        stems = [
            self._folder / name_of(earlier, client) for earlier in self._rounds if earlier < server_round
        ]
        return [Observation.load(stem) for stem in stems if stem.with_suffix(".json").exists()]
