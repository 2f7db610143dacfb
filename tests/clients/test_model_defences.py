"""PRECODE's bottleneck in a model and in a run, against a plain loop; and what it leaves open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import worlds
from torch import nn
from torch.nn import functional as F

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.bottleneck import BOTTLENECKED, UNBIASED, Bottleneck, divergence
from flowerbed.strategies.attacks.observation import Observation, SideInfo
from flowerbed.strategies.attacks.presets import ATTACKS
from flowerbed.strategies.attacks.spaces import Pixels

SPEC = ModelSpec(
    BOTTLENECKED, (1, 8, 8), 4, {"base": "mlp", "options": {"hidden": (12,)}, "size": 6, "beta": 0.1}
)


def test_the_model_is_the_one_asked_for_with_a_layer_more() -> None:
    inner = ModelSpec("mlp", (1, 8, 8), 4, {"hidden": (12,)}).build(3).state_dict()
    own = SPEC.build(3).state_dict()
    for name, value in inner.items():
        assert torch.equal(
            own[name if name.startswith("head") else name.replace("body", "body.body", 1)], value
        )
    assert sorted(n for n in own if "bottleneck" in n) == [
        f"body.bottleneck.{part}.{kind}" for part in ("decode", "encode") for kind in ("bias", "weight")
    ]
    with pytest.raises(ConfigError, match="ends in no linear layer"):
        ModelSpec(UNBIASED, (6,), 3, {"base": "worlds:deep_head"}).build(0)


def test_noise_is_drawn_in_training_alone() -> None:
    layer = Bottleneck(5, 3, 1.0)
    r = torch.randn(2, 5)
    assert not torch.equal(layer.train()(r), layer(r))
    assert torch.equal(layer.eval()(r), layer(r))
    # Noise that is handed in acts as that which was drawn.
    torch.manual_seed(0)
    drawn = layer.train()(r)
    torch.manual_seed(0)
    noise = torch.randn(2, 3)
    given = torch.func.functional_call(layer.eval(), {"noise": noise}, (r,))
    torch.testing.assert_close(given, drawn)


def test_the_divergence_is_that_of_the_last_pass_and_taken_once() -> None:
    net = SPEC.build(0)
    net(torch.zeros(2, 1, 8, 8))
    assert float(divergence(net).detach()) > 0
    assert float(divergence(net)) == 0
    assert float(divergence(nn.Linear(2, 2))) == 0


def test_a_step_of_a_run_against_a_plain_one() -> None:
    """One step of one client: the task's loss plus beta KL, with the noise of the client's module stream."""
    from flowerbed import seeds

    sections: dict[str, Any] = {"federation": {"clients": 1, "rounds": 1}, "local": {"steps": 1}}
    defence = {"name": "precode", "size": 4, "beta": 0.7}
    made = worlds.run("fedavg", defence=defence, **sections)
    parts = made.parts
    net = parts.spec.model.build(3).train()
    indices = parts.train.indices(0)
    rows = indices[worlds.order_of(0, len(indices), 0)[: worlds.BATCH].numpy()]
    x, y = parts.dataset.prepare(parts.dataset.train.inputs[rows]), parts.dataset.train.labels[rows]
    with seeds.torch_stream(3, "modules", 0, 1):
        outputs = net(x)
    layer = net.get_submodule("body.bottleneck")
    r = net.get_submodule("body.body")(x)
    mean, log_variance = layer.encode(r).chunk(2, 1)  # type: ignore[operator]
    own = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    loss = F.cross_entropy(outputs, y) + 0.7 * kl
    for name, p in net.named_parameters():
        (g,) = torch.autograd.grad(loss, p, retain_graph=True)
        torch.testing.assert_close(made.result.model[name], p.detach() - worlds.LR * g, rtol=1e-4, atol=1e-6)


def seen(x: torch.Tensor, y: torch.Tensor, lr: float = 0.1) -> tuple[Observation, SideInfo, torch.Tensor]:
    """Return what a server sees of one training step of the bottlenecked model, and the noise in it."""
    net = SPEC.build(0).train()
    torch.manual_seed(11)
    noise = torch.randn(len(y), 6)
    torch.manual_seed(11)
    loss = F.cross_entropy(net(x), y) + divergence(net)
    sent = {n: v.detach().clone() for n, v in net.state_dict().items()}
    named = dict(net.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    returned = {n: sent[n] - lr * g for n, g in zip(named, gradients, strict=True)}
    local = LocalParams(steps=1, batch_size=0, lr=lr)
    return Observation(0, 1, SPEC, sent, returned, len(y)), SideInfo(local=local), noise


def test_the_first_layer_is_read_out_whatever_the_bottleneck_does() -> None:
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    observation, side, _ = seen(x, torch.tensor([2]))
    (found,) = ATTACKS.get("readout")(None).run([(observation, side)])
    torch.testing.assert_close(found.x, x, rtol=0, atol=1e-3)


def test_who_searches_for_the_noise_explains_the_update() -> None:
    """At the true image and the true noise the cost is 0; without the noise it is not."""
    from dataclasses import replace

    from flowerbed.datasets.augment import PIXELS
    from flowerbed.strategies.attacks.candidates import Steps
    from flowerbed.strategies.attacks.costs import Costs, Terms
    from flowerbed.strategies.attacks.descents import Descent
    from flowerbed.strategies.attacks.imitations import imitation_of
    from flowerbed.strategies.attacks.inversion import Inversion
    from flowerbed.strategies.attacks.objectives import cosine
    from flowerbed.strategies.attacks.observation import gradient_of
    from flowerbed.strategies.attacks.spaces import NOISE, Rows, X

    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    observation, side, noise = seen(x, torch.tensor([2]))
    module = observation.module()
    assert side.local is not None
    costs = Costs(
        Terms(cosine, 1.0, (), None, 0.0, imitation_of("none")),
        Rows(1, 1, 1, (1, 8, 8), 4, PIXELS, 0), module, [module.state_dict()],
        [gradient_of(observation, side)], [torch.tensor([2])], Steps(side.local, (1,), 1),
        batch_statistics=False, chunk=0, device=torch.device("cpu"),
    )  # fmt: skip
    space = Pixels(bottleneck=6)
    given = costs.row(space, 0)
    _, known = costs.of(space, {X: x, NOISE: noise}, *given)
    _, unknown = costs.of(Pixels(), {X: x}, *given)
    assert float(known) == pytest.approx(0, abs=1e-4)
    assert float(unknown) > 0.01
    attack = Inversion("x", space, descents=(Descent(steps=3),))
    (found,) = attack.run([(observation, side)])
    assert found.x.shape == (1, 1, 8, 8)
    assert replace(attack, space=Pixels()).run([(observation, side)])[0].cost != found.cost
