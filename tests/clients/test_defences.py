"""Defences on hand-worked updates, and through a whole run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor

from flowerbed.clients.defence import DEFENCES, Encoding
from flowerbed.clients.defences import RESIDUAL, Clip, Dgc, Noise, Prune, Qsgd, Sign, Soteria
from flowerbed.clients.local_round import MODEL
from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation


def update(*values: float, name: str = "w") -> dict[tuple[str, str], Tensor]:
    return {(MODEL, name): torch.tensor(values, dtype=torch.float64)}


def of(found: dict[tuple[str, str], Tensor]) -> list[float]:
    return found[MODEL, "w"].tolist()


@pytest.fixture
def local() -> Any:
    return worlds.open_round(LocalParams(batch_size=4))


def test_clipping_bounds_the_whole(local: Any) -> None:
    both = {**update(3.0, 0.0), **update(4.0, name="v")}
    found = Clip(2.5).changed(both, local)
    assert of(found) == [1.5, 0.0]
    assert found[MODEL, "v"].tolist() == [2.0]
    assert of(Clip(10.0).changed(both, local)) == [3.0, 0.0]


def test_pruning_keeps_the_largest(local: Any) -> None:
    assert of(Prune(0.5).changed(update(1.0, -3.0, 2.0, 0.5), local)) == [0.0, -3.0, 2.0, 0.0]
    assert of(Prune(0.01).changed(update(1.0, -3.0), local)) == [0.0, -3.0], "at least one"
    assert RESIDUAL not in local.state


def test_feedback_sends_later_what_was_left_out(local: Any) -> None:
    """Two rounds: what is sent and what is owed add up to what was wanted."""
    prune = Prune(0.5, feedback=True)
    first = of(prune.changed(update(1.0, -3.0), local))
    second = of(prune.changed(update(1.0, 0.5), local))
    assert (first, second) == ([0.0, -3.0], [2.0, 0.0])
    assert local.state[RESIDUAL]["w"].tolist() == [0.0, 0.5]


def test_signs_keep_the_mean_size(local: Any) -> None:
    assert of(Sign().changed(update(1.0, -3.0, 0.0, 2.0), local)) == [1.5, -1.5, 0.0, 1.5]


def test_stochastic_rounding_has_levels_and_no_bias(local: Any) -> None:
    value = torch.linspace(-1, 1, 7, dtype=torch.float64)
    size = float(value.norm())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([Qsgd(4)._rounded(value, generator) for _ in range(4000)])
    levels = (drawn / size * 4).round(decimals=9)
    assert set(levels.flatten().tolist()) <= {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    torch.testing.assert_close(drawn.mean(0), value, rtol=0, atol=0.03)
    assert of(Qsgd().changed(update(0.0, 0.0), local)) == [0.0, 0.0]


def test_noise_has_the_asked_size(local: Any) -> None:
    value = {(MODEL, "w"): torch.full((20_000,), 2.0, dtype=torch.float64)}
    for defence, expected in ((Noise(0.5), 1.0), (Noise(0.5, relative=False), 0.5)):
        found = defence.changed(value, local)[MODEL, "w"] - 2
        assert float(found.std()) == pytest.approx(expected, rel=0.03)
        assert abs(float(found.mean())) < 0.03
    # The expected cosine distance of noise, against one draw.
    a, b = value[MODEL, "w"], Noise(1.0).changed(value, local)[MODEL, "w"]
    measured = 1 - float((a @ b) / (a.norm() * b.norm()))
    floor = Noise(1.0).known(LocalParams())["floor"]
    assert floor == pytest.approx(1 - 1 / math.sqrt(2)) == pytest.approx(measured, abs=0.02)


def test_soteria_prunes_columns_of_the_least_scores() -> None:
    """The body is linear: d r_i / d x is row i of its weight, so the scores are known in closed form."""
    from torch import nn

    from flowerbed.models.base import Net
    from flowerbed.models.info import ModelInfo
    from flowerbed.models.parts import ModelParts

    net = Net(nn.Linear(6, 3, bias=False), nn.Linear(3, 3), 3)
    with torch.no_grad():
        net.body.weight.copy_(torch.diag(torch.tensor([1.0, 3.0, 2.0, 0, 0, 0]))[:3])
    base = worlds.open_round(LocalParams(batch_size=0))
    state = {n: v.detach().clone() for n, v in net.state_dict().items()}
    from dataclasses import replace

    local = replace(
        base, model=net, parts=ModelParts.resident(net), info=ModelInfo.of(net), received={MODEL: state}
    )
    r = local.train_data.x @ state["body.weight"].T
    expected = (torch.tensor([1.0, 3.0, 2.0]) / (r.abs() + 0.1)).sum(0)
    defence = Soteria(prune=0.4)
    torch.testing.assert_close(defence._scores(local), expected)
    weight = torch.ones(3, 3, dtype=torch.float64)
    found = defence.changed({(MODEL, "head.weight"): weight}, local)[MODEL, "head.weight"]
    gone = int(expected.argmin())
    assert [bool((found[:, i] == 0).all()) for i in range(3)] == [i == gone for i in range(3)]
    assert worlds.equal(dict(net.state_dict()), state), "the trained model is put back"


@pytest.mark.parametrize("name", sorted(DEFENCES))
def test_every_defence_runs_and_only_touches_parameters(name: str) -> None:
    options = {"clip": {"bound": 0.01}}.get(name, {})
    # Where single examples are told apart, batch norm is refused; elsewhere its statistics tell of what was seen.
    model = "mlp" if name == "dpsgd" else "worlds:bn_net"
    sections: dict[str, Any] = {"model": {"name": model}, "federation": {"clients": 1, "rounds": 1}}
    plain = worlds.run("fedavg", **sections).result.model
    found = worlds.run("fedavg", defence={"name": name, **options}, **sections).result.model
    buffers = [n for n in plain if "running" in n]
    sees_the_same = not issubclass(DEFENCES.get(name), Encoding) and name != "precode"
    assert bool(buffers) == (model != "mlp")
    assert not sees_the_same or all(torch.equal(plain[n], found[n]) for n in buffers)
    assert worlds.equal(plain, found) == (name == "none")


def test_a_residual_reaches_the_next_round_of_a_run() -> None:
    """What pruning leaves out of one round is sent in the next: two runs that differ in nothing else."""
    sections: dict[str, Any] = {"federation": {"clients": 1, "rounds": 2}}
    kept, lost = (
        worlds.run("fedavg", defence={"name": "prune", "keep": 0.05, "feedback": feedback}, **sections)
        for feedback in (True, False)
    )
    assert kept.state(0)[RESIDUAL]
    assert not worlds.equal(kept.result.model, lost.result.model)


def test_deep_gradient_compression_by_hand(local: Any) -> None:
    """Momentum 1/2, one of two entries a round: r and v are 0 where something was sent."""
    dgc = Dgc(keep=0.5, momentum=0.5, warmup=0)
    # v = (1, -3), r = (1, -3): -3 is sent, left is (1, 0) of both.
    assert of(dgc.changed(update(1.0, -3.0), local)) == [0.0, -3.0]
    # v = (0.5 + 2, 0 + 0.5), r = (1 + 2.5, 0.5).
    assert of(dgc.changed(update(2.0, 0.5), local)) == [3.5, 0.0]
    # v = (0 + 0, 0.25 + 0), r = (0, 0.5 + 0.25).
    assert of(dgc.changed(update(0.0, 0.0), local)) == [0.0, 0.75]


def test_deep_gradient_compression_warms_up_and_clips(local: Any) -> None:
    dgc = Dgc(keep=0.001, warmup=4)
    assert [dgc.keep_at(r) for r in (1, 2, 3, 4, 5)] == [0.25, 0.25**2, 0.25**3, 0.25**4, 0.001]
    sent = of(Dgc(keep=1.0, momentum=0.0, warmup=0, bound=2.5).changed(update(3.0, 4.0), local))
    assert sent == pytest.approx([1.5, 2.0])


def test_without_momentum_and_warmup_it_is_pruning_with_feedback() -> None:
    sections: dict[str, Any] = {"federation": {"clients": 2, "rounds": 3}}
    one = worlds.run("fedavg", defence={"name": "dgc", "keep": 0.1, "momentum": 0.0, "warmup": 0}, **sections)
    two = worlds.run("fedavg", defence={"name": "prune", "keep": 0.1, "feedback": True}, **sections)
    assert worlds.equal(one.result.model, two.result.model)


def test_laplace_noise_has_the_asked_size(local: Any) -> None:
    value = {(MODEL, "w"): torch.full((200_000,), 2.0, dtype=torch.float64)}
    found = Noise(0.5, relative=False, kind="laplace").changed(value, local)[MODEL, "w"] - 2
    assert float(found.std()) == pytest.approx(0.5, rel=0.02)
    # E|n| is std / sqrt(2) for Laplace, and std sqrt(2 / pi) for a normal distribution.
    assert float(found.abs().mean()) == pytest.approx(0.5 / math.sqrt(2), rel=0.02)


def test_no_defence_is_the_run_of_before_there_was_any() -> None:
    assert Simulation.of({}).identity == Simulation.of({"defence": "none"}).identity
    assert Simulation.of({}).identity != Simulation.of({"defence": "sign"}).identity


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("noise", {"std": -1.0}, "defence.std is -1"),
        ("clip", {"bound": 0.0}, "defence.bound is 0"),
        ("prune", {"keep": 0.0}, "defence.keep is 0"),
        ("qsgd", {"levels": 0}, "defence.levels is 0"),
        ("soteria", {"prune": 1.0}, "defence.prune is 1"),
        ("soteria", {"epsilon": 0.0}, "defence.epsilon is 0"),
        ("noise", {"kind": "pink"}, "Unknown kind of noise 'pink'"),
        ("dgc", {"keep": 0.0}, "defence.keep is 0"),
        ("dgc", {"momentum": 1.0}, "defence.momentum is 1"),
        ("mixup", {"k": 1}, "defence.k is 1"),
        ("mixup", {"k": 2, "high": 0.4}, "leave no coefficients for 2 samples"),
        ("labels", {"smoothing": 1.0}, "defence.smoothing is 1"),
        ("labels", {"flip": 1.5}, "defence.flip is 1.5"),
        ("ats", {"policies": []}, "defence.policies is empty"),
        ("ats", {"policies": [[3, 50]]}, "from 0 to 49"),
        ("precode", {"size": 0}, "defence.size is 0"),
        ("precode", {"beta": -1.0}, "defence.beta is -1"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        worlds.run("fedavg", defence={"name": name, **options})


def test_what_was_left_out_is_there_in_the_next_round_of_a_run() -> None:
    """Of an algorithm that keeps nothing itself, too."""

    def model(feedback: bool, rounds: int) -> dict[str, torch.Tensor]:
        defence = {"name": "prune", "keep": 0.05, "feedback": feedback}
        return worlds.run("fedavg", defence=defence, federation={"rounds": rounds}).result.model

    def same(rounds: int) -> bool:
        one, other = model(True, rounds), model(False, rounds)
        return all(torch.equal(one[n], other[n]) for n in one)

    assert same(1)
    assert not same(2)


def test_what_does_not_combine_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes the place of local.momentum"):
        worlds.run("fedavg", defence={"name": "dgc"}, local={"momentum": 0.9})
    with pytest.raises(ConfigError, match="changes a last linear layer"):
        worlds.run("fedavg", defence={"name": "soteria"}, model={"name": "worlds:deep_head"})
    with pytest.raises(ConfigError, match="has a loss of its own"):
        worlds.run("moon", defence={"name": "mixup"})
    with pytest.raises(ConfigError, match="grid.engine=cohort cannot be used: Ats"):
        worlds.run("fedavg", defence={"name": "ats"}, grid={"engine": "cohort"})
