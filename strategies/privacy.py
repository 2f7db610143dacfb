"""User-level differential privacy around any algorithm, on the server (central) or on the clients (local).

Central: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, Algorithm 1 with
flat clipping and equal weights, n replies a round:

    u = 1/n sum_k u_k min(1, C / ||u_k||) + N(0, (z C / n)^2 I),      u_k = w_k - w_t.

The algorithm then gets w_t + u in the place of *every* client's model: whatever it does with it (server momentum,
Adam, control variates) is post-processing, hence equally private. Further streams of the replies are part of u_k
as they are, from zero. Algorithms that look at replies one by one are refused.

Adaptive clipping: Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021,
Algorithm 1. With b_k = [||u_k|| <= C] the server releases

    b = 1/n (sum_k (b_k - 1/2) + N(0, sigma_b^2)) + 1/2    and sets    C <- C exp(-eta_C (b - gamma)).

The pair (u, b) costs as much as noise multiplier z if u gets z_u = (z^-2 - (2 sigma_b)^-2)^(-1/2).

Local: see ``flowerbed.clients.privacy``; here it is accounted for. So are single examples where clients train by DP-SGD
(``flowerbed.clients.dpsgd``).

What epsilon covers: the parameters and further streams that clients send in training. It does not cover
BatchNorm statistics (refused unless ``allow_buffers``), the metrics that clients report (sample counts, losses)
and evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from flowerbed import seeds
from flowerbed.clients import updates
from flowerbed.clients.defence import ExamplePrivacy
from flowerbed.clients.params import LocalParams
from flowerbed.clients.transform_params import PrivacyParams
from flowerbed.clients.updates import Update
from flowerbed.errors import RunError, require
from flowerbed.storage import Tensors
from flowerbed.strategies.accountant import Release, epsilon
from flowerbed.strategies.base import ClientReply, ServerTransform


class CentralPrivacy(ServerTransform):
    """The Gaussian mechanism on the mean of the clients' updates."""

    def __init__(self, params: PrivacyParams, seed: int, clients: int, cohort: int) -> None:
        """``cohort`` clients of ``clients`` are asked in a round; raises ``ConfigError`` for what cannot work."""
        self.params = params
        self.seed = seed
        self.clip = params.clip
        self.releases = 0
        self._release = Release(params.noise, params.sampling, clients, cohort)
        self._bit_noise = (params.bit_noise or cohort / 20) if params.noise else 0.0
        self._update_noise = params.noise
        if params.adaptive and params.noise:
            require(
                2 * self._bit_noise > params.noise,
                f"privacy.noise={params.noise} leaves nothing for adaptive clipping: it must stay below twice "
                f"privacy.bit_noise, here {self._bit_noise}; raise privacy.bit_noise or federation.cohort.",
            )
            self._update_noise = (params.noise**-2 - (2 * self._bit_noise) ** -2) ** -0.5
        if params.noise:
            epsilon(self._release, 1, params.delta)

    def replies(
        self, server_round: int, current: Tensors, replies: list[ClientReply], parameters: frozenset[str]
    ) -> list[ClientReply]:
        stream = updates.whole_numbers(replies[0].streams)
        if stream is not None:
            raise RunError(
                f"Round {server_round}: stream '{stream}' holds whole numbers, which Gaussian noise cannot "
                "protect; this strategy does not combine with privacy.mode=central."
            )
        sent = [updates.update_of(reply.streams, current, parameters) for reply in replies]
        norms = [updates.norm(update) for update in sent]
        mean = self._noisy_mean(server_round, sent, norms)
        if self.params.adaptive:
            self._follow_norms(server_round, norms)
        self.releases += 1
        return [replace(r, streams=updates.with_update(r.streams, current, mean)) for r in replies]

    def _noisy_mean(self, server_round: int, sent: list[Update], norms: list[float]) -> Update:
        generator = seeds.torch_rng(self.seed, "privacy noise", server_round)
        std = self._update_noise * self.clip / len(sent)
        factors = [updates.clip_factor(length, self.clip) / len(sent) for length in norms]
        mean: Update = {}
        for key, value in sent[0].items():
            mean[key] = updates.gaussian_like(value, std, generator)
            for update, factor in zip(sent, factors, strict=True):
                mean[key] += update[key] * factor
        return mean

    def _follow_norms(self, server_round: int, norms: list[float]) -> None:
        noise = seeds.numpy_rng(self.seed, "privacy clip", server_round).normal(0.0, self._bit_noise)
        unclipped = sum(float(length <= self.clip) - 0.5 for length in norms)
        share = (unclipped + noise) / len(norms) + 0.5
        self.clip *= math.exp(-self.params.clip_lr * (share - self.params.quantile))

    def metrics(self) -> Mapping[str, float]:
        found = {"privacy-clip": self.clip}
        if self.params.noise:
            found["privacy-epsilon"] = epsilon(self._release, self.releases, self.params.delta)
        return found

    def state_dict(self) -> Tensors:
        return {
            "clip": torch.tensor(self.clip, dtype=torch.float64),
            "releases": torch.tensor(self.releases),
        }

    def load_state_dict(self, state: Tensors) -> None:
        self.clip, self.releases = float(state["clip"]), int(state["releases"])


class LocalLedger(ServerTransform):
    """Accounts for ``LocalPrivacy``: epsilon of the client that has sent most often.

    No sampling helps a client whose server knows that it was asked. Any two data sets of a client are
    neighbours, so that one reply changes by twice the clip norm at most.
    """

    def __init__(self, params: PrivacyParams) -> None:
        self.params = params
        self._sent: dict[int, int] = {}
        # Twice the clip norm of sensitivity is half the noise multiplier.
        self._release = Release(params.noise / 2, "none", 1, 1)
        if params.noise:
            epsilon(self._release, 1, params.delta)

    def replies(
        self, server_round: int, current: Tensors, replies: list[ClientReply], parameters: frozenset[str]
    ) -> list[ClientReply]:
        for reply in replies:
            self._sent[reply.node] = self._sent.get(reply.node, 0) + 1
        return replies

    def metrics(self) -> Mapping[str, float]:
        if not self.params.noise:
            return {}
        return {"privacy-epsilon": epsilon(self._release, max(self._sent.values()), self.params.delta)}

    def state_dict(self) -> Tensors:
        return {"nodes": torch.tensor(list(self._sent)), "sent": torch.tensor(list(self._sent.values()))}

    def load_state_dict(self, state: Tensors) -> None:
        self._sent = dict(zip(state["nodes"].tolist(), state["sent"].tolist(), strict=True))


class ExampleLedger(ServerTransform):
    """Accounts for DP-SGD at the clients: epsilon of one example of the client that has spent most.

    The batches of an epoch share no example, so that an example is in one step of each, whose sum another example
    changes by twice the clip norm at most; what later steps make of it is post-processing. ``poisson`` instead counts
    every step as one of independent draws. Numbers of samples are public.
    """

    def __init__(self, spent: ExamplePrivacy, local: LocalParams) -> None:
        self.spent, self.local = spent, local
        self._epochs: dict[int, tuple[int, int]] = {}
        """By node: the last epoch that it was in, and how many it was in."""
        self._steps: dict[int, tuple[int, int]] = {}
        """By node: its samples, and the steps that it made."""
        if spent.noise:
            self._epsilon_of(1, 1, 1)

    def replies(
        self, server_round: int, current: Tensors, replies: list[ClientReply], parameters: frozenset[str]
    ) -> list[ClientReply]:
        for reply in replies:
            samples = round(reply.examples)
            steps, per_epoch = self.local.steps_per_round(samples), self.local.batches_per_epoch(samples)
            first, last = (server_round - 1) * steps // per_epoch, (server_round * steps - 1) // per_epoch
            before, epochs = self._epochs.get(reply.node, (-1, 0))
            self._epochs[reply.node] = last, epochs + last - max(first, before + 1) + 1
            self._steps[reply.node] = samples, self._steps.get(reply.node, (0, 0))[1] + steps
        return replies

    def metrics(self) -> Mapping[str, float]:
        if not self.spent.noise:
            return {}
        return {"privacy-example-epsilon": max(self.epsilons().values())}

    def epsilons(self) -> dict[int, float]:
        """Return epsilon of an example of every client that has answered, by node."""
        return {
            node: self._epsilon_of(samples, steps, self._epochs[node][1])
            for node, (samples, steps) in self._steps.items()
        }

    def _epsilon_of(self, samples: int, steps: int, epochs: int) -> float:
        if self.spent.sampling == "poisson":
            batch = min(self.local.batch_size or samples, samples)
            return epsilon(Release(self.spent.noise, "poisson", samples, batch), steps, self.spent.delta)
        return epsilon(Release(self.spent.noise / 2, "none", 1, 1), epochs, self.spent.delta)

    def state_dict(self) -> Tensors:
        nodes = list(self._steps)
        rows = [[*self._epochs[node], *self._steps[node]] for node in nodes]
        return {"nodes": torch.tensor(nodes), "spent": torch.tensor(rows).view(len(nodes), 4)}

    def load_state_dict(self, state: Tensors) -> None:
        rows = dict(zip(state["nodes"].tolist(), state["spent"].tolist(), strict=True))
        self._epochs = {node: (row[0], row[1]) for node, row in rows.items()}
        self._steps = {node: (row[2], row[3]) for node, row in rows.items()}
