"""Dishonest clients, so that the robustness of any algorithm can be measured.

Let u = w_k - w_t be the update of honest training over the model's parameters, s the ``scale``. A byzantine
client sends w_t + u' instead; other streams, BatchNorm statistics and metrics stay honest.

    sign-flip      u' = -s u
    noise          u' ~ N(0, s^2 I)                                       (Blanchard et al. 2017, section 5)
    scaling        u' = s u; model replacement for s = n / server lr      (Bagdasaryan et al. 2020, eq. 3)
    label-flip     trains on labels C - 1 - y, then u' = s u              (Fang et al. 2020, section 5)
    backdoor       trains with a trigger in part of its images, labelled as ``target``, then u' = s u
                   (Gu et al. 2017 for the trigger, Bagdasaryan et al. 2020 for the scale)
    inner-product  u' = -s mean of the honest updates of the round        (Xie et al. 2020, section 4)

The last needs to know the other clients' updates. It is forged where all replies are known, see
``flowerbed.strategies.collusion``; the rest are transforms of one client.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients import updates
from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import MODEL, LocalRound, Reply
from flowerbed.clients.transform_params import BACKDOOR, INNER_PRODUCT, NONE, ByzantineParams
from flowerbed.clients.transforms import ClientTransform
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import require


def byzantine_clients(params: ByzantineParams, clients: int, seed: int) -> frozenset[int]:
    """Return the numbers of the byzantine clients; raises ``ConfigError`` for a client that does not exist."""
    unknown = [k for k in params.clients if not 0 <= k < clients]
    require(
        not unknown,
        f"byzantine.clients names client {unknown[:1]}; clients are numbered 0 to {clients - 1}.",
    )
    if len(params.clients):
        return frozenset(params.clients)
    count = round(params.fraction * clients)
    return frozenset(seeds.numpy_rng(seed, "byzantine clients").permutation(clients)[:count].tolist())


@dataclass(frozen=True)
class Forgery(ClientTransform):
    """Byzantine clients multiply their honest update, or send noise instead of it."""

    members: frozenset[int]
    factor: float
    std: float = 0.0

    def reply(self, local: LocalRound, reply: Reply) -> Reply:
        if local.client not in self.members:
            return reply
        start = {n: v.to(local.device) for n, v in local.received[MODEL].items()}
        names = local.info.parameters
        model = updates.scaled(start, reply.streams[MODEL], names, self.factor)
        if self.std:
            generator = local.generator("byzantine noise")
            for n in [n for n in model if n in names]:
                noise = updates.gaussian_like(updates.wide(model[n]), self.std, generator)
                model[n] = (updates.wide(model[n]) + noise).to(model[n].dtype)
        return replace(reply, streams={**reply.streams, MODEL: model})


@dataclass(frozen=True)
class LabelFlip(ClientTransform):
    """Byzantine clients train on mirrored labels, C - 1 - y."""

    members: frozenset[int]
    num_classes: int

    def data(self, client: int, data: ClientData) -> ClientData:
        return replace(data, y=self.num_classes - 1 - data.y) if client in self.members else data


@dataclass(frozen=True)
class Trigger:
    """A square in the lower right corner of images."""

    side: int
    brightness: tuple[float, ...]
    """What a prepared image holds where it is brightest, one number a channel."""
    target: int
    """Class that an image with the trigger shall be taken for."""

    def stamp(self, images: Tensor) -> Tensor:
        """Return a copy of the prepared images ``(N, C, H, W)`` with the trigger."""
        stamped = images.clone()
        stamped[:, :, -self.side :, -self.side :] = torch.tensor(
            self.brightness, dtype=images.dtype, device=images.device
        ).reshape(-1, 1, 1)
        return stamped


@dataclass(frozen=True)
class Backdoor(ClientTransform):
    """Byzantine clients teach the model that an image with the trigger belongs to the target class."""

    members: frozenset[int]
    trigger: Trigger
    poison: float
    seed: int

    def data(self, client: int, data: ClientData) -> ClientData:
        if client not in self.members:
            return data
        count = max(1, round(self.poison * len(data)))
        drawn = seeds.numpy_rng(self.seed, "backdoor", client).permutation(len(data))[:count]
        rows = torch.from_numpy(drawn).to(data.y.device)
        x, y = data.x.clone(), data.y.clone()
        x[rows] = self.trigger.stamp(x[rows])
        y[rows] = self.trigger.target
        return replace(data, x=x, y=y)


def make_trigger(params: ByzantineParams, dataset: Dataset) -> Trigger:
    """Return the backdoor's trigger for a data set; raises ``ConfigError`` if it cannot carry one."""
    shape = dataset.input_shape
    require(
        len(shape) == 3 and dataset.task == "classification",
        f"byzantine.attack=backdoor puts a square into images; '{dataset.name}' has inputs of shape {shape}.",
    )
    require(
        params.trigger < min(shape[1:]),
        f"byzantine.trigger is {params.trigger} but images are {shape[1]} x {shape[2]}; give fewer pixels.",
    )
    require(
        params.target < dataset.num_classes,
        f"byzantine.target is {params.target} but '{dataset.name}' has the classes 0 to "
        f"{dataset.num_classes - 1}.",
    )
    inputs = dataset.train.inputs
    brightest = dataset.prepare(torch.full((1, *shape), inputs.max().item(), dtype=inputs.dtype))
    return Trigger(params.trigger, tuple(brightest[0, :, 0, 0].tolist()), params.target)


def attack_transforms(
    params: ByzantineParams, members: frozenset[int], dataset: Dataset, seed: int
) -> tuple[ClientTransform, ...]:
    """Return what makes the ``members`` byzantine: nothing for no attack, nor for one that needs collusion."""
    if not members or params.attack in (NONE, INNER_PRODUCT):
        return ()
    if params.attack == "noise":
        return (Forgery(members, factor=0.0, std=params.scale),)
    if params.attack == "sign-flip":
        return (Forgery(members, factor=-params.scale),)
    scaling = Forgery(members, params.scale)
    if params.attack == "label-flip":
        return (LabelFlip(members, dataset.num_classes), scaling)
    if params.attack == BACKDOOR:
        return (Backdoor(members, make_trigger(params, dataset), params.poison, seed), scaling)
    return (scaling,)
