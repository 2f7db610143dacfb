"""Methods whose clients keep a part of the model, or fine-tune it: against plain PyTorch twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import worlds
from torch import nn

from flowerbed.clients.local_round import Clock
from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.strategies.fedbabu import FedBABUHalf
from flowerbed.strategies.fedbn import FedBNHalf, FedBNParams
from flowerbed.strategies.fedrep import FedRepHalf, FedRepParams
from flowerbed.strategies.finetune import FineTuneHalf, FineTuneParams
from flowerbed.strategies.personal import Tuning, hosting, tuned

BN = {"name": "worlds:bn_net"}


def head(name: str) -> bool:
    return name.startswith("head.")


def body(name: str) -> bool:
    return not head(name)


def everything(name: str) -> bool:
    return True


def nothing(name: str) -> bool:
    return False


def norm(name: str) -> bool:
    return name.startswith("body.2.")


def one_epoch(world: worlds.World, moving: Callable[[str], bool]) -> Callable[[nn.Module, int, int], None]:
    return lambda net, client, t: worlds.plain_epochs(world.parts, net, client, range(t, t + 1), moving)


@pytest.mark.parametrize(
    ("strategy", "private", "moving"),
    [
        ("local", everything, everything),
        ("fedper", head, everything),
        ("fedbabu", nothing, body),
        ("finetune", nothing, everything),
    ],
)
def test_rounds_equal_a_plain_loop(
    strategy: str, private: Callable[[str], bool], moving: Callable[[str], bool]
) -> None:
    world = worlds.run(strategy)
    shared, own = worlds.plain_rounds(world.parts, private, one_epoch(world, moving))
    worlds.close(world.trained, shared)
    for client, mine in enumerate(own):
        kept = world.state(client).get("private", {})
        worlds.close(kept, {n: v for n, v in mine.items() if private(n)})


def test_fedrep_equals_a_plain_loop_of_head_then_body() -> None:
    world = worlds.run("fedrep", {"head_epochs": 2})

    def train(net: nn.Module, client: int, t: int) -> None:
        worlds.plain_epochs(world.parts, net, client, range(2 * t, 2 * t + 2), head)
        worlds.plain_epochs(world.parts, net, client, range(t, t + 1), body)

    shared, own = worlds.plain_rounds(world.parts, head, train)
    worlds.close(world.trained, shared)
    for client, mine in enumerate(own):
        worlds.close(world.state(client)["private"], {n: v for n, v in mine.items() if head(n)})


def test_fedrep_moves_one_part_at_a_time_and_its_buffers() -> None:
    local = worlds.open_round(LocalParams(batch_size=5, lr=0.3), spec=ModelSpec("worlds:bn_net", (6,), 3))
    half = FedRepHalf(FedRepParams(head_epochs=1))
    parts = {"head": local.info.head, "body": local.info.backbone}
    for trained, other in (("head", "body"), ("body", "head")):
        before = {n: v.clone() for n, v in local.model.state_dict().items()}
        half._train(local, None, parts[other], scope="")
        after = local.model.state_dict()
        assert all(torch.equal(after[n], before[n]) for n in parts[other])
        assert all(not torch.equal(after[n], before[n]) for n in parts[trained])


def test_fedrep_gives_the_head_a_clock_of_its_own() -> None:
    """The head's three epochs a round go through the whole cosine, as the body's one does."""
    local = worlds.open_round(LocalParams(batch_size=0, schedule="cosine", lr=1.0))
    local.clock = Clock(round=5, rounds=5, steps=1)
    half = FedRepHalf(FedRepParams(head_epochs=3))
    heads = replace(local.local, epochs=3)
    trained = half._train(local, heads, local.info.backbone, scope="")
    # Steps 12, 13 and 14 of 15.
    assert trained.lr == pytest.approx(0.5 * (1 + math.cos(14 / 15 * math.pi)))


def test_a_head_changes_only_by_its_own_training() -> None:
    federation = {"clients": 4, "cohort": 2}
    worlds_after = [worlds.run("fedper", federation={**federation, "rounds": t}) for t in range(1, 5)]
    initial = worlds_after[0].parts.model
    heads = {client: initial["head.weight"] for client in range(4)}
    for t, world in enumerate(worlds_after, start=1):
        asked = world.sampled(t)
        assert len(asked) == 2
        for client, before in heads.items():
            now = world.state(client).get("private", initial)["head.weight"]
            assert torch.equal(now, before) == (client not in asked)
            heads[client] = now
        assert torch.equal(world.trained["head.weight"], initial["head.weight"])


def test_fedbabus_head_is_the_initial_one_and_does_not_travel_back() -> None:
    world = worlds.run("fedbabu", local={"momentum": 0.9, "weight_decay": 0.1})
    assert all(torch.equal(world.trained[n], world.parts.model[n]) for n in world.trained if head(n))
    local = worlds.open_round(LocalParams())
    reply = FedBABUHalf(FineTuneParams()).run(local)
    assert not any(head(n) for n in reply.streams["arrays"])


def test_fedbn_keeps_normalisation_and_shares_the_rest() -> None:
    world = worlds.run("fedbn", model=BN)
    shared, own = worlds.plain_rounds(world.parts, norm, one_epoch(world, everything))
    worlds.close(
        {n: v for n, v in world.trained.items() if not norm(n)},
        {n: v for n, v in shared.items() if not norm(n)},
    )
    for client, mine in enumerate(own):
        worlds.close(world.state(client)["private"], {n: v for n, v in mine.items() if norm(n)})
    kept = [world.state(c)["private"]["body.2.running_mean"] for c in range(4)]
    assert not torch.equal(kept[0], kept[1])


def test_the_first_round_of_fedbn_is_fedavgs_outside_normalisation() -> None:
    federation = {"clients": 4, "rounds": 1}
    ours = worlds.run("fedbn", model=BN, federation=federation).trained
    plain = worlds.run("fedavg", model=BN, federation=federation).trained
    assert all(torch.equal(ours[n], plain[n]) for n in ours if not norm(n))


def test_which_normalisation_is_private() -> None:
    info = worlds.open_round(LocalParams(), spec=ModelSpec("worlds:bn_net", (6,), 3)).info
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert FedBNHalf(FedBNParams()).private(info) == {f"body.2.{n}" for n in names}
    grouped = worlds.open_round(LocalParams(), spec=ModelSpec("resnet8", (3, 8, 8), 3, {"norm": "gn"})).info
    assert FedBNHalf(FedBNParams()).private(grouped) == frozenset()
    assert FedBNHalf(FedBNParams(layers="all")).private(grouped) == grouped.normalisation != frozenset()


def test_fine_tuning_leaves_training_alone_bit_for_bit() -> None:
    evaluated = {"every": 1, "clients_every": 1}
    tuned_run = worlds.run(
        "finetune", {"tune_epochs": 2}, evaluation=evaluated, local={"persist": True, "momentum": 0.5}
    )
    plain = worlds.run("fedavg", evaluation=evaluated, local={"persist": True, "momentum": 0.5})
    assert worlds.equal(tuned_run.trained, plain.trained)
    assert tuned_run.result.final()["accuracy"] == plain.result.final()["accuracy"]
    clients = tuned_run.result.final("evaluate-clients")
    assert clients["accuracy"] == plain.result.final("evaluate-clients")["accuracy"]
    assert clients["personal-accuracy"] > clients["accuracy"]


@pytest.mark.parametrize("part", ["all", "body", "head"])
def test_the_tuned_model_is_a_plain_loop_away(part: str) -> None:
    local = worlds.open_round(LocalParams(batch_size=0, lr=0.5, schedule="cosine", epochs=7))
    half = FineTuneHalf(FineTuneParams(tune_epochs=3, tune_lr=0.2, tune_part=part))
    personal = half.predictors(local)["personal"]
    twin = ModelSpec("mlp", (6,), 3, {"hidden": (5,)}).build(1)
    moving = {"all": everything, "body": body, "head": head}[part]
    optimizer = torch.optim.SGD([p for n, p in twin.named_parameters() if moving(n)], lr=0.2)
    x, y = local.train_data.x, local.train_data.y
    for _ in range(3):
        twin.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(personal(x), twin(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(personal(x), local.model(x))


def test_tuning_and_hosting_put_everything_back() -> None:
    spec = ModelSpec("worlds:bn_net", (6,), 3)
    local = worlds.open_round(LocalParams(batch_size=5, persist=True, momentum=0.9), spec=spec)
    before = {n: v.clone() for n, v in local.model.state_dict().items()}
    found = tuned(local, FineTuneHalf().loss, Tuning(local.local), Tuning(local.local, local.info.head))
    assert worlds.equal(dict(local.model.state_dict()), before)
    assert not worlds.equal(found, before)
    assert local.state == {}
    with hosting(local, found):
        assert worlds.equal(dict(local.model.state_dict()), found)
    assert worlds.equal(dict(local.model.state_dict()), before)


def test_a_server_without_a_whole_model_evaluates_nothing() -> None:
    evaluation = {"every": 1, "clients_every": 1}
    private = worlds.run("fedper", evaluation=evaluation).result
    assert private.final() == {}
    assert private.final("evaluate-clients")["personal-accuracy"] > 0.1
    assert worlds.run("fedbabu", {"tune_epochs": 1}, evaluation=evaluation).result.final()["accuracy"] > 0


def test_local_training_sends_nothing() -> None:
    world = worlds.run("local")
    train = [r for r in world.result.history if r.phase == "train"]
    assert worlds.equal(world.trained, world.parts.model)
    assert all(r.bytes_down < 1000 and r.bytes_up < 1000 for r in train)


@pytest.mark.parametrize(
    "strategy", ["fedper", "fedrep", "fedbabu", "fedrod", "fedproto", "tau_norm", "creff"]
)
def test_a_model_without_a_head_is_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match="has none"):
        worlds.run(strategy, model={"name": "toys:Scalar"})


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("fedrep", {"head_epochs": 0}, "strategy.head_epochs is 0"),
        ("finetune", {"tune_epochs": 0}, "strategy.tune_epochs is 0"),
        ("finetune", {"tune_lr": -1.0}, "strategy.tune_lr is -1"),
        ("finetune", {"tune_part": "tail"}, "strategy.tune_part is 'tail'"),
        ("fedbn", {"layers": "some"}, "strategy.layers is 'some'"),
        ("fedbn", {}, "this model has none, which would be FedAvg"),
        ("fedper", {"server_lr": 0.0}, "strategy.server_lr is 0"),
    ],
)
def test_bad_parameters_are_named(strategy: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        worlds.run(strategy, options)
