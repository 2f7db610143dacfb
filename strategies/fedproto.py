"""FedProto: nothing but class prototypes travels.

Reference: Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022,
equations (3) to (7), Algorithm 1.

Client k:  whole model by SGD on CE + lambda ||f(x) - C_y||^2 / d, the mean square over the d features; samples of a
           class without a prototype have no second term. Then C_kc = mean of f(x) over its samples of class c.
Server:    C_c = sum_k n_kc C_kc / sum_k n_kc over the replies that own c (``weighting=uniform``: plain mean, as in
           the released code); a class that no reply owns keeps its prototype.

Models start from the run's initial one and may drift apart as they like; here all have one architecture. The
released code collects C_kc while the last epoch still moves the model; here it is taken afterwards, in
evaluation mode.

Evaluated are the client's own model with its own head (``""``), and the paper's rule (``personal``): the
nearest C_c among the classes in the client's training data, by f of its own model. Both before further local
training; classes absent from the training data are never predicted. The server has no model to evaluate."""

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
"""Stream and state: ``mean`` ``(C, D)`` and ``count`` int64 ``(C,)``; no samples, no prototype."""


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
        return {} if known is None else {"mean": known["mean"].to(local.device), "known": _known(local)}

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
        prototypes, known = local.received[PROTOTYPES]["mean"].to(local.device), _known(local)
        own = class_counts(local.train_data.y, local.task.classes) > 0
        # A client whose classes nobody has sent yet can only choose among those that somebody has.
        allowed = known & own if bool((known & own).any()) else known

        def nearest(x: Tensor) -> Tensor:
            exact = "donot_use_mm_for_euclid_dist"
            scores = -torch.cdist(local.parts.features(x), prototypes, compute_mode=exact).square()
            lowest = scores.amin(dim=1, keepdim=True) - 1
            return scores.where(allowed, lowest)

        return two_predictors(local, nearest)


@torch.no_grad()
def class_means(local: LocalRound) -> Tensors:
    """Return the mean features of each class in the client's data, zero without samples, and the counts."""
    local.model.eval()
    data = local.train_data
    features = torch.cat([local.parts.features(data.x[i : i + BATCH]) for i in range(0, len(data), BATCH)])
    count = torch.bincount(data.y, minlength=local.task.classes)
    sums = torch.zeros(len(count), features.shape[1], dtype=torch.float64, device=features.device)
    sums.index_add_(0, data.y, features.double())
    return {"mean": (sums / count.clamp(min=1).unsqueeze(1)).to(features.dtype), "count": count}


def _known(local: LocalRound) -> Tensor:
    return local.received[PROTOTYPES]["count"].to(local.device) > 0


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
        streams = [reply.streams[PROTOTYPES] for reply in replies]
        before = self.state.get(PROTOTYPES, {key: torch.zeros_like(v) for key, v in streams[0].items()})
        means, counts = before["mean"].clone(), before["count"].clone()
        for c in range(len(counts)):
            owners = [s for s in streams if s["count"][c] > 0]
            if owners:
                weights = [
                    float(s["count"][c]) if self.params.weighting == "examples" else 1.0 for s in owners
                ]
                means[c] = weighted_mean([{"": s["mean"][c]} for s in owners], weights)[""]
                counts[c] = sum(int(s["count"][c]) for s in owners)
        self.state[PROTOTYPES] = {"mean": means, "count": counts}
        return {}
