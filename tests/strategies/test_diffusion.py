"""Training a diffusion model as a federation, and collecting the centres of an exact one."""

from __future__ import annotations

import pytest
import torch
import worlds

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.models.diffusion import UNet
from flowerbed.models.parts import ModelParts
from flowerbed.strategies.diffusion import EMA, DdpmHalf, DdpmParams

DDPM = "flowerbed.strategies.diffusion:Ddpm"
COLLECTED = "flowerbed.strategies.diffusion:Collected"
DATA = {"name": "flowerbed.datasets.symmetric:Symmetric"}
UNET = {"name": "flowerbed.models.diffusion:UNet", "base": 4}
ADAM = {"optimizer": "adam", "lr": 1e-3, "persist": True}


def test_the_average_of_the_weights_is_delivered_and_goes_on_across_rounds() -> None:
    few = {"dataset": DATA, "model": UNET, "data": {"client_samples": 256}, "local": ADAM}
    world = worlds.run(DDPM, {"ema": 0.9}, federation={"clients": 1, "rounds": 2}, **few)
    # Four steps, whether in two rounds or one: the same average.
    once = worlds.run(
        DDPM, {"ema": 0.9}, federation={"clients": 1, "rounds": 1}, **{**few, "local": {**ADAM, "epochs": 2}}
    )
    assert worlds.equal(world.result.model, once.result.model)
    assert worlds.equal(world.result.model, world.parts.strategy.state[EMA])
    assert not worlds.equal(world.result.model, world.trained)
    plain = worlds.run(DDPM, {"ema": 0.0}, federation={"clients": 1, "rounds": 2}, **few)
    assert worlds.equal(plain.result.model, world.trained)


def test_the_average_of_one_step_by_hand() -> None:
    world = worlds.run(
        DDPM,
        {"ema": 0.9},
        dataset=DATA,
        model=UNET,
        data={"client_samples": 64},
        local={"batch_size": 0},
        federation={"clients": 1, "rounds": 1},
    )
    initial = world.parts.spec.model.build(3).state_dict()
    for name, value in world.result.model.items():
        torch.testing.assert_close(value, 0.9 * initial[name] + 0.1 * world.trained[name])
    assert not worlds.equal(initial, world.trained)


def test_clients_weigh_in_the_average_by_their_samples() -> None:
    world = worlds.run(DDPM, dataset=DATA, model=UNET, data={"client_samples": 256}, local=ADAM)
    assert set(world.parts.strategy.state[EMA]) == set(world.result.model)
    assert all(torch.isfinite(v).all() for v in world.result.model.values())


def test_labels_are_left_out_as_often_as_asked() -> None:
    net = UNet((1, 8, 8), 10, base=4)
    seen = []
    net.label.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    half = DdpmHalf(DdpmParams(drop=0.25))
    batch = {"x": torch.zeros(4000, 1, 8, 8), "y": torch.arange(4000) % 10}
    torch.manual_seed(0)
    half.loss(ModelParts.resident(net), batch, {}, None)  # type: ignore[arg-type]
    assert float((seen[0] == 10).float().mean()) == pytest.approx(0.25, abs=0.03)
    kept = seen[0] != 10
    assert torch.equal(seen[0][kept], batch["y"][kept])


def test_the_collected_centres_are_the_clients_samples() -> None:
    model = {"name": "flowerbed.models.diffusion:Empirical", "centres": 200}
    world = worlds.run(
        COLLECTED, dataset=DATA, model=model, data={"client_samples": 200}, federation={"rounds": 1}
    )
    found, parts = world.result.model, world.parts
    rows = torch.cat([torch.from_numpy(parts.train.indices(c).copy()) for c in range(4)])
    assert torch.equal(found["labels"], parts.dataset.train.labels[rows])
    assert torch.equal(found["centres"], parts.dataset.prepare(parts.dataset.train.inputs[rows]))
    assert float(found["centres"].min()) == -1
    assert float(found["centres"].max()) == 1


def test_too_few_samples_and_other_models_are_refused() -> None:
    model = {"name": "flowerbed.models.diffusion:Empirical", "centres": 300}
    with pytest.raises(ConfigError, match="have 200 samples, the model needs 300"):
        worlds.run(COLLECTED, dataset=DATA, model=model, data={"client_samples": 200})
    with pytest.raises(ConfigError, match="'Empirical' only"):
        worlds.run(COLLECTED, dataset=DATA, model=UNET)
    with pytest.raises(ConfigError, match="strategy.ema is 1"):
        DdpmParams(ema=1.0)
    with pytest.raises(ConfigError, match="strategy.drop is 2"):
        DdpmParams(drop=2.0)


def test_what_predicts_no_noise_is_refused_by_name() -> None:
    local = worlds.open_round(LocalParams())
    with pytest.raises(Exception, match="is no diffusion model"):
        DdpmHalf(DdpmParams()).begin(local)
