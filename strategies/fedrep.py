"""FedRep: shared representation, private heads, trained one after the other.

Reference: Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021,
Algorithm 1.

Model:     body theta (shared) and head h_k (private to client k).
Client k:  1. h_k by ``head_epochs`` epochs of SGD on F_k(theta_t, .), body frozen;
           2. theta_k by ``local.epochs`` epochs (or ``local.steps`` steps) of SGD on F_k(., h_k), head frozen.
Server:    theta_{t+1} = sum_k p_k theta_k.

``head_epochs=10`` and ``local.epochs=1`` are the released code's; the paper averages uniformly
(``weighting=uniform``). A round therefore makes more local steps than FedAvg's with the same ``local``
section: compare at equal ``steps``. Both trainings have clocks of their own for data order and schedule. The
released code lets BatchNorm statistics of the frozen body move in step 1; here a frozen part keeps its
buffers too, although the forward pass normalises by the batch.

Evaluated is what FedPer evaluates: the received body with the client's own head, before local training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flowerbed.clients.local_round import MODEL, LocalRound, Reply, Trained, shared_model
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import train
from flowerbed.errors import require
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.fedper import FedPerHalf
from flowerbed.strategies.heads import require_head
from flowerbed.strategies.personal import whole_model


@dataclass(frozen=True)
class FedRepParams(FedAvgParams):
    """FedAvg's parameters, for the body, and the head's share of the work."""

    head_epochs: int = 10
    """tau_h: epochs in which only the head trains, at the start of every local round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.head_epochs >= 1, f"strategy.head_epochs is {self.head_epochs}; give at least 1.")


class FedRepHalf(FedPerHalf):
    """Trains the head, then the body."""

    params: FedRepParams

    def run(self, local: LocalRound) -> Reply:
        head, body = local.info.head, local.info.backbone
        heads = replace(local.local, epochs=self.params.head_epochs, steps=0)
        first = self._train(local, heads, frozen=body, scope=" head")
        last = self._train(local, None, frozen=head, scope=" body")
        metrics = {
            "num-examples": last.examples,
            "steps": first.steps + last.steps,
            "head-loss": first.metrics["loss"],
            **last.metrics,
        }
        return Reply({MODEL: shared_model(local, head)}, metrics)

    def _train(
        self, local: LocalRound, params: LocalParams | None, frozen: frozenset[str], scope: str
    ) -> Trained:
        before = whole_model(local)
        trained = train(
            local, self.loss, extras={}, hooks=self.hooks(), params=params, frozen=frozen, scope=scope
        )
        local.load({name: before[name] for name in frozen - local.info.parameters})
        return trained


@STRATEGIES.register("fedrep")
class FedRep(FedAvg):
    """FedAvg on the body."""

    Params = FedRepParams
    Half = FedRepHalf
    params: FedRepParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require_head(setting, "FedRep")
