"""Labels only: federated averaging that never looks at an unlabelled sample.

The control that every semi-supervised method must beat, at equal steps.

Server:    FedAvg.
Client k:  S_k local steps on batches of its labelled samples alone, S_k following from all its n_k samples.

S_k is what any other strategy does with the same ``local`` settings; the labelled samples are just visited more
often. A batch holds at most the labelled samples there are. Replies weigh n_k, as in the semi-supervised methods;
a client without any label trains nothing and weighs nothing.

The other end of the scale, the fully supervised upper bound, is ``strategy=fedavg data.labelled=1``: same steps, all
labels. With all labels seen, this strategy is FedAvg bit for bit.
"""

from __future__ import annotations

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, LocalRound, Reply, shared_model
from flowerbed.clients.training import Batches
from flowerbed.clients.unlabelled import labelled, labelled_batches
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.fedavg import FedAvg


class LabelsOnlyHalf(ClientHalf):
    """Plain local training on the labelled samples."""

    def batches(self, local: LocalRound) -> Batches:
        return labelled_batches(local, local.local)

    def run(self, local: LocalRound) -> Reply:
        if not len(labelled(local.train_data)):
            model = shared_model(local, self.private(local.info))
            return Reply({MODEL: model}, {"num-examples": 0, "steps": 0, "loss": 0.0})
        return super().run(local)


@STRATEGIES.register("labels_only")
class LabelsOnly(FedAvg):
    """FedAvg; what differs is the client."""

    Half = LabelsOnlyHalf
