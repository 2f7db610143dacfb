"""FedProto: nothing but class prototypes travels.

Reference: Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022,
equations (3) to (7), Algorithm 1.

Client k:  whole model by SGD on CE + lambda ||f(x) - C_y||^2 / d, the mean square over the d features; samples of a
           class without a prototype have no second term. Then C_kc = mean of f(x) over its samples of class c.
Server:    C_c = sum_k n_kc C_kc / sum_k n_kc over the replies that own c (``weighting=uniform``: plain mean, as in
           the released code); a class that no reply owns keeps its prototype.

Models start from the run's initial one and may drift apart as they like; here all have one architecture. The released
code collects C_kc while the last epoch still moves the model; here it is taken afterwards, in evaluation mode.

Evaluated are the client's own model with its own head (``""``), and the paper's rule (``personal``): the nearest C_c
among the classes in the client's training data, by f of its own model. Both before further local training; classes
absent from the training data are never predicted. The server has no model to evaluate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import Predictor
from flowerbed.clients.local_round import Extras, LocalRound, Trained
from flowerbed.errors import require
from flowerbed.models.evaluation import BATCH
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import weighted_mean
from flowerbed.strategies.base import STRATEGIES, ClientReply, FederatedStrategy, Setting
from flowerbed.strategies.heads import require_head
from flowerbed.strategies.local import LocalOnlyHalf
from flowerbed.strategies.logit_adjustment import class_counts
from flowerbed.strategies.personal import two_predictors

PROTOTYPES = "prototypes"
"""Stream and state: ``classes`` int64 ``(n,)``, ``mean`` ``(n, D)`` and, from clients, ``count`` ``(n,)``."""


@dataclass(frozen=True)
class FedProtoParams:
    """The pull towards the prototypes, and their average."""

    lambda_: float = 1.0
    """lambda: weight of the distance to the prototypes."""
    weighting: str = "examples"
    """examples: clients weigh by their samples of the class; uniform: the same."""

    def __post_init__(self) -> None:
        require(self.lambda_ >= 0, f"strategy.lambda_ is {self.lambda_}; give 0 (local training) or more.")
        require(
            self.weighting in ("examples", "uniform"),
            f"strategy.weighting is '{self.weighting}'; choose examples or uniform.",
        )


class FedProtoHalf(LocalOnlyHalf):
    """Keeps its model; sends the means of its features."""

    params: FedProtoParams

    def begin(self, local: LocalRound) -> Extras:
        known = local.received.get(PROTOTYPES)
        return {} if known is None else _table(known, local)

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        features = model.features(batch["x"])
        fit = task.loss(model.head(features), batch["y"]).mean()
        if not extras:
            return fit, {}
        known = extras["known"][batch["y"]].unsqueeze(1)
        distance = ((features - extras["mean"][batch["y"]]) * known).square().mean()
        return fit + self.params.lambda_ * distance, {}

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        return {**super().end(local, trained, extras), PROTOTYPES: class_means(local)}

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        table = _table(local.received[PROTOTYPES], local)
        own = class_counts(local.train_data.y, local.task.classes) > 0
        # A client whose classes nobody has sent yet can only choose among those that somebody has.
        allowed = table["known"] & own if bool((table["known"] & own).any()) else table["known"]

        def nearest(x: Tensor) -> Tensor:
            exact = "donot_use_mm_for_euclid_dist"
            scores = -torch.cdist(local.parts.features(x), table["mean"], compute_mode=exact).square()
            lowest = scores.amin(dim=1, keepdim=True) - 1
            return scores.where(allowed, lowest)

        return two_predictors(local, nearest)


@torch.no_grad()
def class_means(local: LocalRound) -> Tensors:
    """Return the mean features of each class that the client has, and how many samples they are means of."""
    local.model.eval()
    data = local.train_data
    chunks = [local.parts.features(data.x[i : i + BATCH]) for i in range(0, len(data), BATCH)]
    features = torch.cat(chunks)
    classes, place, count = torch.unique(data.y, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(classes), features.shape[1], dtype=torch.float64, device=features.device)
    sums.index_add_(0, place, features.double())
    return {"classes": classes, "mean": (sums / count.unsqueeze(1)).to(features.dtype), "count": count}


def _table(known: Mapping[str, Tensor], local: LocalRound) -> Tensors:
    """Return ``mean`` ``(C, D)``, zero where no prototype is known, and ``known`` bool ``(C,)``."""
    classes, rows = known["classes"].to(local.device), known["mean"].to(local.device)
    mean = rows.new_zeros(local.task.classes, rows.shape[1])
    flags = torch.zeros(local.task.classes, dtype=torch.bool, device=local.device)
    mean[classes], flags[classes] = rows, True
    return {"mean": mean, "known": flags}


@STRATEGIES.register("fedproto")
class FedProto(FederatedStrategy):
    """Averages prototypes class by class."""

    Params = FedProtoParams
    Half = FedProtoHalf
    params: FedProtoParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require_head(setting, "FedProto")

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return dict(self.state)

    def broadcast_evaluate(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return dict(self.state)

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        kept = self.state.get(PROTOTYPES, {"classes": torch.empty(0, dtype=torch.int64)})
        means = {int(c): kept["mean"][row] for row, c in enumerate(kept["classes"])}
        sent: dict[int, list[tuple[Tensor, float]]] = {}
        for reply in replies:
            stream = reply.streams[PROTOTYPES]
            for c, mean, count in zip(stream["classes"], stream["mean"], stream["count"], strict=True):
                weight = float(count) if self.params.weighting == "examples" else 1.0
                sent.setdefault(int(c), []).append((mean, weight))
        for c, rows in sent.items():
            means[c] = weighted_mean([{"": mean} for mean, _ in rows], [weight for _, weight in rows])[""]
        classes = sorted(means)
        self.state[PROTOTYPES] = {
            "classes": torch.tensor(classes),
            "mean": torch.stack([means[c] for c in classes]),
        }
        return {}
