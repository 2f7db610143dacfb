"""FedMatch, labels at the clients: two disjoint halves of the weights, and agreement with similar clients.

Reference: Jeong, Yoon, Yang, Hwang, "Federated Semi-Supervised Learning with Inter-Client Consistency & Disjoint
Learning", ICLR 2021, equations (2) to (5), Algorithm 1; code: github.com/wyjeong/FedMatch.

The weights are a sum, theta = sigma + psi. At every step of client k, on B labelled and mu B unlabelled samples u:

    sigma:  lambda_s CE(f(sigma + sg psi; weak(x)), y)
    psi:    1/n sum over the n kept u [ lambda_i / H sum_h KL( f(theta_h; weak(u)) || f(sg sigma + psi; weak(u)) )
                                        + lambda_a CE(f(sg sigma + psi; strong(u)), y_u) ]
            + lambda_l2 ||sigma - psi||^2 + lambda_l1 |psi|_1

u is kept if max f(theta; weak(u)) >= tau. y_u is the class with most votes of f(theta; .) and the H helpers' f(theta_h;
.), theta_h = sigma_t + psi_h. A supervised gradient never reaches psi, an unsupervised one never sigma.

Server:  sigma and psi are averaged, every reply alike. Every ``h_interval`` rounds each client that has answered before
also gets the psi of the H clients whose models are nearest to its own, by what they answer to one fixed Gaussian image.

Traffic: theta and psi travel both ways (2x FedAvg), plus H times psi down in rounds with helpers. Server state: psi,
and for each client its last psi and its answer, so memory grows with the number of clients.

Defaults are the released ones (lambda_s 10, lambda_i = lambda_a 0.01, lambda_l2 10, lambda_l1 1e-4, tau 0.75, H 2,
helpers every 10 rounds, psi_0 = 0.2 sigma_0, uniform mean); there local SGD is 1e-3 and a labelled batch 10.

Deviations: both gradients are taken at the same point of a step (released: first sigma, then psi); theta_0 is the
model's own initialisation, so sigma_0 = theta_0 / 1.2; ties of votes go to the client itself (released: to the lowest
class); the answer to the Gaussian image is computed by the client, which has the model; nothing is sent sparsely;
mu fixes the unlabelled batch (released: all unlabelled samples in one pass over the labelled ones). Helpers use the
receiving client's BatchNorm statistics. The anchor lambda_l2 makes plain gradient steps diverge unless
``local.lr`` lambda_l2 < 1, which is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor
from torch.nn import functional as F

from flowerbed import messages, seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Trained
from flowerbed.clients.teacher import teacher
from flowerbed.clients.training import Batches
from flowerbed.clients.unlabelled import STRONG, TRUTH, WEAK, joined_batches, pseudo_label_counts
from flowerbed.errors import require
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import weighted_mean
from flowerbed.strategies.base import STRATEGIES, ClientReply, Setting
from flowerbed.strategies.semi_supervised import (
    JointParams,
    PseudoLabelFedAvg,
    classes_of,
    nothing_unlabelled,
    supervised_loss,
)

PSI, HELPER, ANSWER, PSI_OF = "psi", "helper ", "answer", "psi of client "
OWN_VOTE = 1.5
"""Between one vote and two: a client's own choice wins ties, but not against two others that agree."""


@dataclass(frozen=True)
class FedMatchParams(JointParams):
    """Hyper-parameters of FedMatch, and FedAvg's."""

    tau: float = 0.75
    """Confidence from which an unlabelled sample is used."""
    weighting: str = "uniform"
    """uniform: every reply weighs the same, as in the paper; examples: p_k proportional to n_k."""
    lambda_s: float = 10.0
    """Weight of the supervised loss."""
    lambda_i: float = 0.01
    """Weight of inter-client consistency."""
    lambda_a: float = 0.01
    """Weight of the agreed pseudo-label."""
    lambda_l2: float = 10.0
    """Pull of psi towards sigma."""
    lambda_l1: float = 1e-4
    """Weight of the sparsity of psi."""
    H: int = 2
    """Helpers of a client."""
    h_interval: int = 10
    """Rounds between two with helpers."""
    psi_factor: float = 0.2
    """psi_0 / sigma_0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_s", "lambda_i", "lambda_a", "lambda_l2", "lambda_l1", "psi_factor", "H"):
            require(
                getattr(self, name) >= 0, f"strategy.{name} is {getattr(self, name)}; give 0 (off) or more."
            )
        require(self.h_interval >= 1, f"strategy.h_interval is {self.h_interval}; give at least 1.")


class FedMatchHalf(ClientHalf):
    """Trains sigma in the resident model and psi beside it."""

    params: FedMatchParams

    def batches(self, local: LocalRound) -> Batches:
        return joined_batches(local, self.params.strong, self.params.mu)

    def begin(self, local: LocalRound) -> Extras:
        psi = {n: v.to(local.device, copy=True) for n, v in local.received[PSI].items()}
        sigma = {n: value - psi[n] for n, value in local.parameters().items()}
        local.load(sigma)
        streams = [local.received[s] for s in sorted(local.received) if s.startswith(HELPER)]
        helpers = [{n: sigma[n] + v.to(local.device) for n, v in stream.items()} for stream in streams]
        return {PSI: psi, HELPER: helpers}

    def further(self, extras: Extras) -> Tensors:
        return {f"{PSI} {name}": value for name, value in extras[PSI].items()}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        sigma, psi = model.parameters, extras[PSI]
        on_sigma = {n: value + psi[n].detach() for n, value in sigma.items()}
        on_psi = {n: value.detach() + psi[n] for n, value in sigma.items()}
        supervised = supervised_loss(
            ModelParts.functional(model.module, on_sigma, model.buffers), batch, task
        )
        students = ModelParts.functional(model.module, on_psi, model.buffers)
        unsupervised, counts = self._unlabelled(students, batch, extras[HELPER], task)
        anchor = sum_of((value.detach() - psi[n]).square().sum() for n, value in sigma.items())
        sparsity = sum_of(value.abs().sum() for value in psi.values())
        value = self.params.lambda_s * supervised + unsupervised
        value = value + self.params.lambda_l2 * anchor + self.params.lambda_l1 * sparsity
        return value, {
            "loss-labelled": supervised,
            "loss-unlabelled": unsupervised,
            "psi-distance": anchor,
            "psi-l1": sparsity,
            **counts,
        }

    def _unlabelled(
        self, model: ModelParts, batch: Batch, helpers: Sequence[Tensors], task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the weighted consistency and pseudo-label losses, means over the kept samples."""
        if not len(batch[WEAK]):
            return nothing_unlabelled(batch, task)
        classes = classes_of(task)
        weak = model(batch[WEAK])
        others = []
        for tensors in helpers:
            with teacher(model, tensors) as helper:
                others.append(helper(batch[WEAK]).log_softmax(-1))
        confidence, own = weak.detach().softmax(-1).max(-1)
        kept = confidence >= self.params.tau
        labels = agreed(own, [other.argmax(-1) for other in others], classes)
        per_sample = self.params.lambda_a * F.cross_entropy(model(batch[STRONG]), labels, reduction="none")
        for other in others:
            apart = (other.exp() * (other - weak.log_softmax(-1))).sum(-1)
            per_sample = per_sample + self.params.lambda_i / len(others) * apart
        value = (kept * per_sample).sum() / kept.sum().clamp(min=1)
        return value, pseudo_label_counts(labels, kept, batch[TRUTH], classes)

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        psi = {n: value.detach().clone() for n, value in extras[PSI].items()}
        local.load({n: value + psi[n] for n, value in local.parameters().items()})
        noise = seeds.torch_rng(local.seed, "fedmatch image")
        image = torch.randn(1, *local.train_data.x.shape[1:], generator=noise).to(local.device)
        with teacher(local.parts, {}) as model:
            answer = model(image)[0].softmax(-1)
        return {**super().end(local, trained, extras), PSI: psi, ANSWER: {ANSWER: answer}}


def agreed(own: Tensor, others: Sequence[Tensor], classes: int) -> Tensor:
    """Return the class with most votes for each sample (int64); ties go to ``own``."""
    votes = OWN_VOTE * F.one_hot(own, classes)
    for other in others:
        votes = votes + F.one_hot(other, classes)
    return votes.argmax(-1)


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of scalars."""
    return torch.stack(list(terms)).sum()


@STRATEGIES.register("fedmatch")
class FedMatch(PseudoLabelFedAvg):
    """Averages both halves and finds every client's helpers."""

    Params = FedMatchParams
    Half = FedMatchHalf
    params: FedMatchParams
    individual_replies = True

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require(
            setting.local.lr * self.params.lambda_l2 < 1,
            f"local.lr={setting.local.lr} times strategy.lambda_l2={self.params.lambda_l2} is 1 or more, so that psi "
            "would swing ever further around sigma; lower one of them.",
        )

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        if PSI not in self.state:
            share = self.params.psi_factor / (1 + self.params.psi_factor)
            moving = self.parameters(self.current)
            self.state[PSI] = {n: share * v for n, v in self.current.items() if n in moving}
        return {PSI: self.state[PSI]}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask as usual; in rounds with helpers every message carries its own client's."""
        asked = list(super().configure_train(server_round, arrays, config, grid))
        self._clients = {node: str(i) for i, node in enumerate(grid.get_node_ids())}
        if server_round % self.params.h_interval:
            return asked
        for message in asked:
            helpers = self.helpers(self._clients[message.metadata.dst_node_id])
            streams = {
                f"{HELPER}{i}": messages.array_record(self.state[PSI_OF + h]) for i, h in enumerate(helpers)
            }
            message.content = RecordDict({**message.content, **streams})
        return asked

    def helpers(self, client: str) -> list[str]:
        """Return the at most H clients whose answers are nearest to this one's; none if it never answered."""
        answers = self.state.get(ANSWER, {})
        if client not in answers:
            return []
        distances = {c: float((a - answers[client]).norm()) for c, a in answers.items() if c != client}
        return sorted(distances, key=lambda c: (distances[c], int(c)))[: self.params.H]

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        mean = weighted_mean([r.streams[PSI] for r in replies], self.weights(replies))
        self.state[PSI] = self.step(server_round, self.state[PSI], mean)
        answers = dict(self.state.get(ANSWER, {}))
        for reply in replies:
            client = self._clients[reply.node]
            self.state[PSI_OF + client] = reply.streams[PSI]
            answers[client] = reply.streams[ANSWER][ANSWER]
        self.state[ANSWER] = answers
        return super().aggregate(server_round, current, replies)
