"""SemiFL: labels at the server, pseudo-labels at the clients, training in turns.

Reference: Diao, Ding, Tarokh, "SemiFL: Semi-Supervised Federated Learning for Unlabeled Clients with Alternate
Training", NeurIPS 2022, Algorithm 1; code: github.com/diaoenmao/SemiFL-Semi-Supervised-Federated-Learning-
for-Unlabeled-Clients-with-Alternate-Training.

Server, before round 1 and after every aggregation: E_s epochs of supervised training on its own labelled samples
(``data.server_per_class``), then BatchNorm's running statistics anew from those samples.

Client k, with w_t as received, once a round:

    q_i = softmax f(w_t; x_i) for all its samples, evaluation mode, plain images;  y_i = argmax q_i
    Fix = {i : max q_i >= tau};  Mix = |Fix| samples drawn from all, with replacement
    L   = CE(f(strong(x_i)), y_i)  +  lambda [ l CE(f(x_m), y_i) + (1 - l) CE(f(x_m), y_j) ]

with i from Fix, j from Mix, x_m = l weak(x_i) + (1 - l) weak(x_j), and one l ~ Beta(a, a) a batch. A client whose Fix
is empty trains nothing and does not take part in the mean. Server, over the m clients that trained:

    v <- beta v + (w_t - 1/m sum_k w_k);   w <- w_t - eta_s v      (buffers: the mean)

Labels of clients are never read, whatever ``data.labelled`` says. Defaults are the released ones: tau 0.95, a 0.75,
lambda 1, E_s 5, beta 0.5, eta_s 1; there local SGD is 0.03, momentum 0.9, Nesterov, weight decay 5e-4, batch 10, 5
epochs, ``local.clip_norm`` 1. The server trains with ``local`` too, but for its epochs.

Deviations: a client makes the steps that follow from all its samples (released: epochs over Fix), so that methods
compare at equal steps; BatchNorm's statistics come from the server's samples alone, since the released pass over
every client's data costs a round of its own and their privacy; optimizers start anew at every turn; samples a
client draws for Mix are drawn at every step.

With tau above 1 no client trains: what remains is supervised training on the server's samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from flwr.app import Message
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients.data import CLEAN, Batch, ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Metric, Reply, shared_model
from flowerbed.clients.training import Batches, train, view_of
from flowerbed.clients.unlabelled import STRONG, pseudo_label_counts, views
from flowerbed.errors import ConfigError, require
from flowerbed.models.batchnorm import recompute_statistics
from flowerbed.models.evaluation import BATCH
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import scalar, weighted_mean
from flowerbed.strategies.base import STRATEGIES, ClientReply, FederatedStrategy, Phase, Setting
from flowerbed.strategies.semi_supervised import (
    Aggregated,
    PseudoLabelParams,
    check_data,
    classes_of,
    with_rates,
)
from flowerbed.strategies.server_side import ServerSide

VELOCITY = "velocity"
MIXED, MIXED_Y, SHARE = "mixed", "mixed-y", "mixed-share"


@dataclass(frozen=True)
class SemiFLParams(PseudoLabelParams):
    """Hyper-parameters of SemiFL."""

    a: float = 0.75
    """Both parameters of MixUp's Beta distribution."""
    lambda_: float = 1.0
    """lambda: weight of the MixUp loss; 0 leaves it out."""
    server_epochs: int = 5
    """E_s: the server's passes over its samples at every turn."""
    server_lr: float = 1.0
    """eta_s."""
    beta: float = 0.5
    """The server's momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.a > 0, f"strategy.a is {self.a}; give a number above 0.")
        require(self.lambda_ >= 0, f"strategy.lambda_ is {self.lambda_}; give 0 (off) or more.")
        require(self.server_epochs >= 1, f"strategy.server_epochs is {self.server_epochs}; give at least 1.")
        require(self.server_lr > 0, f"strategy.server_lr is {self.server_lr}; give a number above 0.")
        require(0 <= self.beta < 1, f"strategy.beta is {self.beta}; give a number in [0, 1).")


class SemiFLHalf(ClientHalf):
    """Names its samples once, then learns the names."""

    params: SemiFLParams

    def run(self, local: LocalRound) -> Reply:
        data, classes = local.train_data, classes_of(local.task)
        labels, kept = pseudo_labels(local, self.params.tau)
        counts = pseudo_label_counts(labels, kept, data.extras.get(CLEAN, data.y), classes)
        metrics: dict[str, Metric] = {"num-examples": len(data), "steps": 0, "loss": 0.0}
        metrics |= {name: count.tolist() for name, count in counts.items()}
        if kept.any():
            named = replace(data, y=labels)
            trained = train(local, self.loss, extras={}, batches=self.named_batches(local, named, kept))
            metrics |= {"steps": trained.steps, **trained.metrics}
        return Reply({MODEL: shared_model(local, frozenset())}, metrics)

    def named_batches(self, local: LocalRound, named: ClientData, kept: Tensor) -> Batches:
        """Return batches of Fix in both views, each with a MixUp partner drawn from all ``named`` samples."""
        fix = views(local, local.local, named.take(kept), self.params.strong)

        def batch(step: int) -> Batch:
            found = fix(step)
            rng = seeds.numpy_rng(local.seed, "mixup", local.client, step)
            rows = torch.from_numpy(rng.integers(len(named), size=len(found["y"]))).to(local.device)
            share = torch.tensor(rng.beta(self.params.a, self.params.a), dtype=found["x"].dtype).to(
                local.device
            )
            x = view_of(local, named.x[rows], named.scale, local.local.augment, "augment mixup", step)
            mixed = share * found["x"] + (1 - share) * x
            return {**found, MIXED: mixed, MIXED_Y: named.y[rows], SHARE: share}

        return batch

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        fix = task.loss(model(batch[STRONG]), batch["y"]).mean()
        if not self.params.lambda_:
            return fix, {"loss-fix": fix}
        mixed, share = model(batch[MIXED]), batch[SHARE]
        first, second = (task.loss(mixed, batch[y]).mean() for y in ("y", MIXED_Y))
        mix = share * first + (1 - share) * second
        return fix + self.params.lambda_ * mix, {"loss-fix": fix, "loss-mix": mix}


@torch.no_grad()
def pseudo_labels(local: LocalRound, tau: float) -> tuple[Tensor, Tensor]:
    """Return the resident model's label of every sample (int64) and whether its confidence reaches ``tau``."""
    local.model.eval()
    found = [local.model(x).softmax(-1).max(-1) for x in torch.split(local.train_data.x, BATCH)]
    confidence = torch.cat([f.values for f in found])
    return torch.cat([f.indices for f in found]), confidence >= tau


@STRATEGIES.register("semifl")
class SemiFL(FederatedStrategy):
    """Trains on the server's labels in turn with the clients."""

    Params = SemiFLParams
    Half = SemiFLHalf
    params: SemiFLParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        check_data(labels_at_server(setting)[1], self.params.strong)

    def start_phase(self, phase: Phase, model: Tensors) -> Tensors:
        return self._supervised(1, model)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        return with_rates(super().aggregate_train(server_round, replies))

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        models = [r.model for r in replies if scalar(r.metrics["steps"])]
        model = self._moved(current, weighted_mean(models, [1.0] * len(models))) if models else current
        return self._supervised(server_round + 1, model)

    def _moved(self, current: Tensors, mean: Tensors) -> Tensors:
        """Return the broadcast model after one step of momentum towards the clients' mean."""
        moving, before = sorted(self.parameters(current)), self.state.get(VELOCITY, {})
        velocity = {
            n: self.params.beta * before.get(n, torch.zeros_like(current[n])) + (current[n] - mean[n])
            for n in moving
        }
        self.state[VELOCITY] = velocity
        return mean | {n: current[n] - self.params.server_lr * velocity[n] for n in moving}

    def _supervised(self, turn: int, model: Tensors) -> Tensors:
        """Return the model after the server's turn, the first of which comes before round 1."""
        setting, server = labels_at_server(self.setting)
        local = replace(setting.local, epochs=self.params.server_epochs, steps=0, persist=False)
        opened = server.open(model, local, turn, setting.rounds + 1)
        train(opened, ClientHalf().loss, extras={})
        recompute_statistics(
            opened.model, torch.split(opened.train_data.x, local.batch_size or len(opened.train_data))
        )
        return {name: value.cpu() for name, value in shared_model(opened, frozenset()).items()}


def labels_at_server(setting: Setting | None) -> tuple[Setting, ServerSide]:
    """Return the run's setting and the server's part of it; raises ``ConfigError`` if that has no labels."""
    if setting is None or setting.server is None or not len(setting.server.samples):
        raise ConfigError(
            "semifl trains on labels at the server and it has none; set data.server_per_class, for example to 10."
        )
    return setting, setting.server
