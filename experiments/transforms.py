"""What the configuration puts between clients, algorithm and server: privacy, masks, and dishonest clients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowerbed.clients.app import ClientSpec, choose_device
from flowerbed.clients.byzantine import attack_transforms, byzantine_clients, make_trigger
from flowerbed.clients.compression import Compression
from flowerbed.clients.defence import Defence
from flowerbed.clients.defences import DEFENCES
from flowerbed.clients.privacy import LocalPrivacy
from flowerbed.clients.secure import SecureMasking
from flowerbed.clients.transform_params import BACKDOOR, INNER_PRODUCT
from flowerbed.clients.transforms import ClientTransform
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import ConfigError, require
from flowerbed.experiments.config import Choice, Simulation, build
from flowerbed.experiments.sharded import Counting
from flowerbed.models import evaluation
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.server.device_params import NONE
from flowerbed.server.grids.base import FIRST_NODE_ID
from flowerbed.server.loop import ServerEvaluator
from flowerbed.storage import Tensors
from flowerbed.strategies.attacks.observer import RELEASED, SERVER, SUM, Observer
from flowerbed.strategies.base import FederatedStrategy, ServerTransform
from flowerbed.strategies.collusion import InnerProductManipulation
from flowerbed.strategies.privacy import CentralPrivacy, ExampleLedger, LocalLedger
from flowerbed.strategies.secure import SecureAggregation

OBSERVATIONS = "observations"
"""The folder of a run directory that holds what the server saw of single clients."""


def client_transforms(simulation: Simulation, dataset: Dataset) -> tuple[ClientTransform, ...]:
    """Return every client's transforms: what byzantine clients forge need not keep to the privacy of honest ones.

    Defences come first, so that privacy holds for what is sent, masks come last, around whatever is sent.
    """
    privacy, byzantine = simulation.privacy, simulation.byzantine
    members = byzantine_clients(byzantine, simulation.federation.clients, simulation.seed)
    defended = simulation.defence.name != "none"
    defence = (build_defence(simulation.defence),) if defended else ()
    honest = (LocalPrivacy(privacy.clip, privacy.noise),) if privacy.mode == "local" else ()
    attack = attack_transforms(byzantine, members, dataset, simulation.seed)
    masking = (SecureMasking(simulation.secure),) if simulation.secure.enabled else ()
    packing = (Compression(),) if simulation.devices.compression != NONE else ()
    return (*defence, *honest, *attack, *masking, *packing)


def evaluation_transforms(
    simulation: Simulation, model: ModelSpec, dataset: Dataset
) -> tuple[ClientTransform, ...]:
    """Return what lets workers evaluate in the server's place, where they are asked to."""
    if not simulation.evaluation.sharded:
        return ()
    require(
        not simulation.federation.time_limit,
        "evaluation.sharded asks workers as clients, and federation.time_limit would end them; set one of the two off.",
    )
    return (Counting(simulation.seed, model, dataset, simulation.grid.device),)


def build_defence(choice: Choice) -> Defence:
    """Return the defence of that name, or import path, with its options."""
    kind = DEFENCES.get(choice.name)
    found = build(kind, choice.options, "defence")
    assert isinstance(found, Defence)
    return found


def server_transforms(
    simulation: Simulation, strategy: FederatedStrategy, info: ModelInfo, secret: int | None = None
) -> tuple[ServerTransform, ...]:
    """Return what stands before the algorithm; raises ``ConfigError`` for what privacy cannot protect.

    ``secret`` is the server's own seed of noise where clients know the run's.

    Whoever observes single clients comes first, where replies are as they arrive; who sees sums comes behind their
    unmasking, who sees what is released comes last. Byzantine clients that collude come next: what they
    forge is what arrives.
    """
    federation, byzantine, privacy = simulation.federation, simulation.byzantine, simulation.privacy
    asked = min(math.ceil(federation.wanted * (1 + federation.oversample)), federation.clients)
    found: list[ServerTransform] = []
    observer = _observer(simulation, strategy)
    view = view_of(simulation)
    if observer is not None and view == SERVER:
        found.append(observer)
    if simulation.secure.enabled:
        _require_maskable(simulation, strategy)
        everyone = any(phase.everyone for phase in strategy.phases(federation.rounds))
        most = federation.clients if everyone else asked
        found.append(SecureAggregation(simulation.secure, simulation.seed, asked, most))
    if observer is not None and view == SUM:
        found.append(observer)
    if byzantine.attack == INNER_PRODUCT:
        members = byzantine_clients(byzantine, federation.clients, simulation.seed)
        found.append(InnerProductManipulation(frozenset(FIRST_NODE_ID + k for k in members), byzantine.scale))
    if privacy.mode != "none":
        _require_protectable(simulation, strategy, info)
    if privacy.mode == "central":
        found.append(
            CentralPrivacy(privacy, simulation.seed if secret is None else secret, federation.clients, asked)
        )
    if privacy.mode == "local":
        found.append(LocalLedger(privacy))
    spent = build_defence(simulation.defence).privacy
    if spent is not None:
        _require_all_in_steps(simulation, strategy)
        found.append(ExampleLedger(spent, simulation.local))
    if observer is not None and view == RELEASED:
        found.append(observer)
    return tuple(found)


def view_of(simulation: Simulation) -> str:
    """Return what of the exchange is observed: server, sum or released."""
    if simulation.observe.view == RELEASED:
        return RELEASED
    return SUM if simulation.secure.enabled else SERVER


def _observer(simulation: Simulation, strategy: FederatedStrategy) -> Observer | None:
    observe = simulation.observe
    if not observe.rounds:
        return None
    if simulation.run.dir is None:
        raise ConfigError("observe.rounds keeps exchanges in the run directory; give run.dir.")
    view = view_of(simulation)
    require(
        view == SERVER or not observe.clients,
        f"observe.clients={list(observe.clients)} names single clients, and "
        + (
            "with secure.enabled the server sees but the sum of a cohort"
            if view == SUM
            else "observe.view=released sees but the model that a round ends with"
        )
        + "; leave observe.clients out.",
    )
    assert strategy.setting is not None
    assert strategy.setting.server is not None
    return Observer(
        Path(simulation.run.dir) / OBSERVATIONS,
        strategy.setting.server.model,
        clients=observe.clients or None,
        rounds=observe.rounds,
        first_node=FIRST_NODE_ID,
        view=view,
    )


def _require_all_in_steps(simulation: Simulation, strategy: FederatedStrategy) -> None:
    asked = [phase.name for phase in strategy.phases(1) if phase.message_type != "train"]
    require(
        not asked,
        f"defence={simulation.defence.name} protects local steps, and strategy '{simulation.strategy.name}' also asks "
        f"clients for statistics (phase {asked[:1]}); choose another strategy.",
    )


def _require_protectable(simulation: Simulation, strategy: FederatedStrategy, info: ModelInfo) -> None:
    name, mode = simulation.strategy.name, simulation.privacy.mode
    require(
        mode == "local" or not strategy.individual_replies,
        f"privacy.mode=central gives the algorithm one noisy mean in place of the replies, and strategy '{name}' "
        "needs each of them; use privacy.mode=local or another strategy.",
    )
    asked = [phase.name for phase in strategy.phases(1) if phase.message_type != "train"]
    require(
        not asked,
        f"privacy.mode={mode} protects updates, and strategy '{name}' also asks clients for statistics (phase "
        f"{asked[:1]}); choose another strategy.",
    )
    sent = info.roles.keys() - info.parameters - strategy.half.private(info)
    require(
        not sent or simulation.privacy.allow_buffers,
        f"privacy.mode={mode} does not protect the statistics of normalisation layers ({min(sent, default='')} and "
        "others); use a model without them (norm=gn), or accept it with privacy.allow_buffers=true.",
    )
    require(
        mode == "central" or not simulation.federation.oversample,
        "privacy.mode=local counts the replies that are used; federation.oversample lets clients send others, so "
        "set it to 0.",
    )


def _require_maskable(simulation: Simulation, strategy: FederatedStrategy) -> None:
    name = simulation.strategy.name
    require(
        not strategy.individual_replies,
        f"secure.enabled hides the replies from the server, and strategy '{name}' needs each of them; choose another "
        "strategy.",
    )
    asked = [phase.name for phase in strategy.phases(1) if phase.message_type != "train"]
    require(
        not asked or strategy.sums_in_queries,
        f"secure.enabled masks updates, and strategy '{name}' also asks clients for statistics (phase {asked[:1]}); "
        "choose another strategy.",
    )
    require(
        simulation.privacy.mode != "central",
        "privacy.mode=central clips every update on the server, which sees none with secure.enabled; use "
        "privacy.mode=local.",
    )
    require(
        simulation.byzantine.attack != INNER_PRODUCT,
        "byzantine.attack=inner-product needs the honest updates, which nobody sees with secure.enabled; choose "
        "another attack.",
    )


def with_backdoor_success(
    evaluate: ServerEvaluator, simulation: Simulation, spec: ClientSpec
) -> ServerEvaluator:
    """Add to the server's evaluation how often the backdoor works, as ``backdoor-success``.

    It is the share of the test images of other classes that, with the trigger, are taken for the target. Without
    a backdoor attack ``evaluate`` is returned as it is.
    """
    if simulation.byzantine.attack != BACKDOOR:
        return evaluate
    dataset, device = spec.dataset, choose_device(spec.device)
    module = spec.model.build(spec.seed).to(device)
    trigger = make_trigger(simulation.byzantine, dataset)
    others = dataset.test.inputs[dataset.test.labels != trigger.target]

    @torch.no_grad()
    def measured(model: Tensors) -> Mapping[str, Any]:
        module.load_state_dict(model)
        module.eval()
        fooled = 0
        for start in range(0, len(others), evaluation.BATCH):
            inputs = others[start : start + evaluation.BATCH].to(device)
            outputs = module(trigger.stamp(dataset.prepare(inputs)))
            fooled += int((outputs.argmax(-1) == trigger.target).sum())
        return {**evaluate(model), "backdoor-success": fooled / max(1, len(others))}

    return measured
