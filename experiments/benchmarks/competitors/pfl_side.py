"""pfl-research (Granqvist et al. 2024, PyPI ``pfl``) on the workload, through its public interface.

As its own benchmark does it: users are tensors made once, weights equal for every user, the central optimizer
is SGD with learning rate 1, images lie in memory with the channels last and are turned inside the model.
Leaner than that benchmark in one thing: the model is put into training mode once, not in every step.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.experiments.benchmarks.competitors import plain
from flowerbed.experiments.benchmarks.gate import Gate
from flowerbed.experiments.benchmarks.workload import MODELS, read_work

ENDLESS = 10**9


class PflModule(nn.Module):
    """A plain model with the two methods that pfl asks for."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.net = plain.build(model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``(N, H, W, C)``."""
        outputs: Tensor = self.net(x.permute(0, 3, 1, 2))
        return outputs

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        return F.cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return the summed loss and its weight."""
        return {"loss": Weighted(F.cross_entropy(self(x), y, reduction="sum").item(), len(y))}


class AtTheGate(TrainingProcessCallback):  # type: ignore[misc]
    """Reports each central iteration."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_begin(self, *, model: Any) -> Any:
        """Wait for the first turn."""
        self.gate.open()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """Count the round."""
        self.gate.passed()
        return False, Metrics()


def run(gate: Gate, folder: Path, model: str, device: str) -> dict[str, Any]:
    """Train until the gate says that it is over."""
    os.environ["PFL_PYTORCH_DEVICE"] = device
    work = read_work(folder)
    x, y = plain.tensors(folder, MODELS[model].view, device)
    x = x.permute(0, 1, 3, 4, 2).contiguous()
    data = [PyTorchTensorDataset((x[user], y[user])) for user in range(work.users)]
    sampler = get_user_sampler("minimize_reuse", list(range(work.users)))
    federated = FederatedDataset(data.__getitem__, sampler)
    torch.manual_seed(0)
    module = PflModule(model)
    module.train()
    pfl_model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=ENDLESS,
            # It evaluates in iteration 0, which is one of the rounds that warm up.
            evaluation_frequency=ENDLESS,
            train_cohort_size=work.cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(federated, federated, postprocessors=[WeightByUser()]),
        model=pfl_model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=work.batch
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[AtTheGate(gate)],
        send_metrics_to_platform=False,
    )
    return {}
