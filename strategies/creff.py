"""CReFF: FedAvg, and a classifier re-trained on federated features.

Reference: Shang et al., "Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training
with Federated Features", IJCAI 2022, Algorithm 1, equations (4) to (7).

Client k:  g_kc = mean over its samples of class c of the gradient of CE by the weight of the *re-trained* head, at
           the received model's features; then FedAvg's local training of the received model (with its own head).
Server:    FedAvg on the models, bit for bit; g_c = plain mean of g_kc over the replies that own c;
           federated features v (m for each class) by ``match_steps`` SGD steps at ``match_lr`` on
           sum_c sum_rows 1 - cos(gradient of CE at v_c, g_c); then a fresh linear head by SGD on v.

The re-trained head takes the head's place in the model that is evaluated and delivered, and goes to the
clients for the next round's gradients (the first round uses the model's own). Features persist over rounds;
those of a class that no reply owns are left as they are.

Differences from the released code: it estimates g_kc from ten draws of at most 32 augmented (DSA) samples,
here it is the mean over all of them; and its optimizer restarts are ours, one per round. Defaults are its
own: m = 100, 100 matching steps at 0.1, 300 epochs at 0.01 in batches of 32. Its experiments: 20 clients, 8 a
round, 200 rounds of 10 epochs, batch 32, lr 0.1, ResNet-8.

Privacy: g_kc reveals sums of features by class. Evaluated is the model with the re-trained head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Trained
from flowerbed.errors import require
from flowerbed.models.evaluation import BATCH
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import weighted_mean
from flowerbed.strategies.base import STRATEGIES, ClientReply, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.heads import linear_head

HEAD = "retrained head"
"""Stream and state: ``weight`` ``(C, D)`` and ``bias`` ``(C,)``."""
GRADIENTS = "class gradients"
"""Stream: ``gradient`` ``(C, C, D)`` by class of the samples, and whether it ``owned`` any, ``(C,)``."""
FEATURES = "federated features"
"""State: ``v`` ``(C, m, D)``."""


@dataclass(frozen=True)
class CReFFParams(FedAvgParams):
    """FedAvg's parameters and the server's re-training."""

    m: int = 100
    """Federated features of each class."""
    match_steps: int = 100
    """Steps a round of matching the gradients."""
    match_lr: float = 0.1
    head_epochs: int = 300
    """Epochs over the federated features for a fresh head."""
    head_lr: float = 0.01
    head_batch: int = 32
    """Features a step of that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("m", "match_steps", "head_epochs", "head_batch"):
            require(getattr(self, name) >= 1, f"strategy.{name} is {getattr(self, name)}; give at least 1.")
        for name in ("match_lr", "head_lr"):
            require(
                getattr(self, name) > 0, f"strategy.{name} is {getattr(self, name)}; give a number above 0."
            )


class CReFFHalf(ClientHalf):
    """FedAvg's client that also reports class gradients at the received model."""

    def begin(self, local: LocalRound) -> Extras:
        head = local.received[HEAD]
        return {GRADIENTS: local_gradients(local, head["weight"], head["bias"])}

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        return {**super().end(local, trained, extras), GRADIENTS: extras[GRADIENTS]}


@torch.no_grad()
def local_gradients(local: LocalRound, weight: Tensor, bias: Tensor) -> Tensors:
    """Return the client's mean gradient of each of its classes, at the resident model's features."""
    local.model.eval()
    data = local.train_data
    features = torch.cat([local.parts.features(data.x[i : i + BATCH]) for i in range(0, len(data), BATCH)])
    weight, bias = weight.to(local.device), bias.to(local.device)
    owned = torch.bincount(data.y, minlength=len(weight)) > 0
    gradient = features.new_zeros(len(weight), *weight.shape)
    for c in torch.nonzero(owned).flatten():
        gradient[c] = class_gradient(features[data.y == c], c, weight, bias)
    return {"gradient": gradient, "owned": owned.to(torch.int64)}


def class_gradient(features: Tensor, label: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the gradient by ``weight`` of the mean cross entropy of ``features`` ``(n, D)``, all of one class.

    Shape ``(C, D)``; differentiable by the features.
    """
    error = (features @ weight.T + bias).softmax(-1) - F.one_hot(label, len(weight)).to(features.dtype)
    return error.T @ features / len(features)


def matched(v: Tensor, classes: Tensor, real: Tensor, weight: Tensor, bias: Tensor, p: CReFFParams) -> Tensor:
    """Return the features ``(C, m, D)`` after matching their gradients to ``real`` ``(n, C, D)`` of ``classes``."""
    v = v.clone().requires_grad_()
    optimizer = torch.optim.SGD([v], lr=p.match_lr)
    for _ in range(p.match_steps):
        (v.grad,) = torch.autograd.grad(mismatch(v, classes, real, weight, bias), v)
        optimizer.step()
    return v.detach()


def mismatch(v: Tensor, classes: Tensor, real: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the sum over classes and rows of one minus the cosine between synthetic and real gradients."""
    made = torch.stack([class_gradient(v[c], c, weight, bias) for c in classes])
    return (1 - F.cosine_similarity(made, real, dim=-1)).sum()


def trained_head(v: Tensor, p: CReFFParams, generator: torch.Generator) -> Tensors:
    """Return a fresh linear head after SGD on the cross entropy of the features ``(C, m, D)``.

    It starts as ``torch.nn.Linear`` does, uniform in +-1/sqrt(D).
    """
    classes, count, dim = v.shape
    x, y = v.flatten(0, 1), torch.arange(classes).repeat_interleave(count)
    one_hot, bound = F.one_hot(y, classes).to(v.dtype), dim**-0.5
    weight = torch.empty(classes, dim, dtype=v.dtype).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(classes, dtype=v.dtype).uniform_(-bound, bound, generator=generator)
    for _ in range(p.head_epochs):
        for rows in torch.split(torch.randperm(len(x), generator=generator), p.head_batch):
            batch = x[rows]
            # The gradient in closed form: autograd would be most of the cost of these small steps.
            error = (torch.addmm(bias, batch, weight.T).softmax(-1) - one_hot[rows]) / len(rows)
            weight.addmm_(error.T, batch, alpha=-p.head_lr)
            bias.sub_(error.sum(0), alpha=p.head_lr)
    return {"weight": weight, "bias": bias}


@STRATEGIES.register("creff")
class CReFF(FedAvg):
    """FedAvg, then matching and re-training on the server."""

    Params = CReFFParams
    Half = CReFFHalf
    params: CReFFParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        weight, bias = linear_head(setting, "CReFF")
        require(bias is not None, "CReFF re-trains a linear head with a bias; this model's head has none.")
        self._names = {"weight": weight, "bias": str(bias)}

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return {HEAD: self._head()}

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        classes, real = mean_gradients([reply.streams[GRADIENTS] for reply in replies])
        weight, bias = self._head().values()
        seed = self.setting.seed if self.setting else 0
        if FEATURES not in self.state:
            shape = (len(weight), self.params.m, weight.shape[1])
            start = torch.randn(shape, generator=seeds.torch_rng(seed, "federated features"))
            self.state[FEATURES] = {"v": start.to(weight.dtype)}
        v = matched(self.state[FEATURES]["v"], classes, real, weight, bias, self.params)
        head = trained_head(v, self.params, seeds.torch_rng(seed, HEAD, server_round))
        self.state |= {FEATURES: {"v": v}, HEAD: head}
        return super().aggregate(server_round, current, replies)

    def deliver(self, model: Tensors) -> Tensors:
        head = self.state.get(HEAD, {})
        return {**model, **{self._names[key]: value for key, value in head.items()}}

    def _head(self) -> Tensors:
        """Return the head at which gradients are taken: before any re-training, the model's own."""
        return self.state.get(HEAD) or {key: self.current[name] for key, name in self._names.items()}


def mean_gradients(streams: list[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the classes that any client owns ``(n,)`` and the plain means of their gradients ``(n, C, D)``."""
    classes = torch.nonzero(torch.stack([s["owned"] for s in streams]).amax(0)).flatten()
    means = []
    for c in classes:
        rows: list[Tensors] = [{"": s["gradient"][c]} for s in streams if s["owned"][c]]
        means.append(weighted_mean(rows, [1.0] * len(rows))[""])
    return classes, torch.stack(means)
