"""Attacks inside a generator: cuts without jumps, l1 balls against bisection, stages that only gain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_attacks import GENERATIVE, SCALE, SIDE, observed
from torch import Tensor

from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.generators import Gan, Generator
from flowerbed.strategies.attacks.descents import Descent
from flowerbed.strategies.attacks.generative import FeatureMaps, H, Latent, Prior, Weights, Z, onto_l1_ball
from flowerbed.strategies.attacks.inversion import Inversion
from flowerbed.strategies.attacks.presets import ATTACKS
from flowerbed.strategies.attacks.spaces import Rows

SHAPE, CLASSES = (1, 20, 24), 4
VICTIM = ModelSpec("dlg_lenet", SHAPE, CLASSES, {"activation": "leaky_relu", "uniform": 0.0})
ROWS = Rows(1, 2, 3, SHAPE, CLASSES, SCALE, 0)


@pytest.fixture(scope="module")
def prior() -> Prior:
    torch.manual_seed(0)
    generator = Generator(1, CLASSES, latent=5, embedding=3, width=4)
    # Statistics of some images, as training would leave them.
    generator.train()
    for _ in range(20):
        generator(torch.randn(16, 5), torch.randint(CLASSES, (16,)))
    return Prior(generator.eval().requires_grad_(False), SHAPE, SCALE)


def test_the_parts_make_the_whole(prior: Prior) -> None:
    z, y = torch.randn(3, 5), torch.tensor([0, 3, 1])
    g = prior.generator
    c = g.condition(y)
    whole = g.part(z, c, 0, g.layers)
    h, sizes = z, []
    for k in range(g.layers):
        assert torch.equal(g.part(h, c, k, g.layers), whole)
        h = g.part(h, c, k, k + 1)
        sizes.append(tuple(h.shape[1:]))
    assert sizes == [(16, 4, 4), (12, 8, 8), (8, 16, 16), (1, 32, 32)]
    assert bool((whole >= 0).all() and (whole <= 1).all())


def test_published_sizes_of_the_small_prior() -> None:
    gan = Gan(1, 10, 64, 32, 16)
    assert sum(p.numel() for p in gan.generator.parameters()) == 159_441
    assert sum(p.numel() for p in gan.discriminator.parameters()) == 93_769


def test_inputs_are_the_middle_of_the_image(prior: Prior) -> None:
    pixels = torch.rand(2, 1, 32, 32)
    found = prior.inputs(pixels)
    torch.testing.assert_close(SCALE.pixels(found), pixels[:, :, 6:26, 4:28])


def bisected(v: Tensor, radius: float) -> Tensor:
    """Return the projection by bisection on the threshold: the slow twin."""
    if float(v.abs().sum()) <= radius:
        return v
    low, high = 0.0, float(v.abs().max())
    for _ in range(100):
        middle = (low + high) / 2
        if float((v.abs() - middle).clamp(min=0).sum()) > radius:
            low = middle
        else:
            high = middle
    return v.sign() * (v.abs() - high).clamp(min=0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=1, max_size=12),
    radius=st.floats(0.01, 20),
)
def test_projection_onto_the_l1_ball(values: list[float], radius: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    found = onto_l1_ball(v[None], radius)[0]
    torch.testing.assert_close(found, bisected(v, radius), rtol=0, atol=1e-9)
    torch.testing.assert_close(onto_l1_ball(found[None], radius)[0], found, rtol=0, atol=1e-12)


def test_stages_follow_each_other_without_a_jump(prior: Prior) -> None:
    labels = torch.tensor([[0, 1, 2], [3, 3, 0]])
    space: Any = Latent(prior, stages=3, radii=(1.0, 2.0))
    variables = space.open(ROWS)
    seen = []
    while True:
        images = torch.func.vmap(space.decode)({**variables, **space.fixed}, labels)
        following = space.advance(variables, labels)
        if following is None:
            break
        space, variables = following
        again = torch.func.vmap(space.decode)({**variables, **space.fixed}, labels)
        torch.testing.assert_close(again, images)
        seen.append(space.k)
    assert seen == [1, 2, 3]
    for stages, last in ((0, None), (1, 1)):
        following = Latent(prior, stages=stages).advance(variables={Z: ROWS.draws("z", 3, 5)}, labels=labels)
        assert (following[0].k if following else None) == last  # type: ignore[attr-defined]


def test_the_ball_is_around_where_the_stage_began_for_each_sample(prior: Prior) -> None:
    start = torch.randn(2, 3, 16, 4, 4)
    space = FeatureMaps(prior, 1, start, 3, radii=(1.5, 9.0))
    variables = {H: start.clone()}
    variables[H][0, 0] += 1.0
    variables[H][1, 2, 0, 0, 0] += 0.5
    space.constrain(variables, ROWS)
    moved = (variables[H] - start).abs().flatten(2).sum(2)
    torch.testing.assert_close(moved[0, 0], torch.tensor(1.5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved[1, 2], torch.tensor(0.5), rtol=1e-4, atol=1e-4)
    assert float(moved.sum()) == pytest.approx(2.0, abs=1e-3)
    free = FeatureMaps(prior, 1, start, 3)
    far = {H: start + 5}
    free.constrain(far, ROWS)
    assert torch.equal(far[H], start + 5)


def test_weights_of_every_image_are_its_own(prior: Prior) -> None:
    labels = torch.tensor([[0, 1, 2], [3, 3, 0]])
    z = ROWS.draws("z", 3, 5)
    space, variables = Weights.after(prior, z, labels)
    before = torch.func.vmap(space.decode)({**variables, **space.fixed}, labels)
    plain = torch.func.vmap(Latent(prior).decode)({Z: z}, labels)
    torch.testing.assert_close(before, plain, rtol=1e-4, atol=1e-5)
    variables["out.bias"][1, 0] += 1
    after = torch.func.vmap(space.decode)({**variables, **space.fixed}, labels)
    changed = (after - before).abs().flatten(2).amax(2) > 1e-4
    assert changed.tolist() == [[False, False, False], [True, False, False]]


def test_the_penalty_of_a_code_is_its_divergence(prior: Prior) -> None:
    space = Latent(prior, kl=0.5)
    z = torch.tensor([[1.0, 3.0, 1.0, 3.0, 2.0]])
    m, s2 = 2.0, 0.8
    expected = 0.5 * -0.5 * (1 + torch.log(torch.tensor(s2)) - m**2 - s2)
    torch.testing.assert_close(space.penalty({Z: z}), expected)


def test_later_stages_explain_no_less(prior: Prior) -> None:
    """An image outside the generator's range: feature maps get nearer than the code alone, selection keeps the best."""
    x = SCALE.values(torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)))
    case = (observed(x, torch.tensor([2]), VICTIM), replace(SIDE, labels=torch.tensor([2])))
    descent = (Descent(steps=40, lr=0.05, schedule="ilo"),)
    costs = [
        Inversion("x", Latent(prior, stages=stages), descents=descent).run([case], seed=3)[0].cost
        for stages in (0, 3)
    ]
    assert costs[1] < 0.9 * costs[0]
    tight = Inversion("x", Latent(prior, stages=3, radii=(0.001,)), descents=descent).run([case], seed=3)[0]
    assert tight.cost == pytest.approx(costs[0], rel=0.05)


def test_a_stage_that_explains_enough_ends_the_choice(prior: Prior) -> None:
    x = SCALE.values(torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)))
    case = (observed(x, torch.tensor([2]), VICTIM), replace(SIDE, labels=torch.tensor([2])))
    descent = (Descent(steps=20, lr=0.05, schedule="ilo"),)
    one = Inversion("x", Latent(prior), descents=descent).run([case], seed=3)[0]
    stopped = Inversion("x", Latent(prior, stages=3), descents=descent, floor=one.cost * 1.01)
    assert torch.equal(stopped.run([case], seed=3)[0].x, one.x)


def test_the_last_stage_is_reported_where_that_is_asked_for(prior: Prior) -> None:
    """A last stage with a senseless rate ends far from where it began; only the control reports it."""
    x = SCALE.values(torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)))
    case = (observed(x, torch.tensor([2]), VICTIM), replace(SIDE, labels=torch.tensor([2])))
    good, bad = Descent(steps=20, lr=0.05, schedule="ilo"), Descent(steps=5, lr=1000.0)
    one, best, last = (
        Inversion("x", Latent(prior, stages=stages), descents=(good, bad), last_stage=asked).run(
            [case], seed=3
        )[0]
        for stages, asked in ((0, False), (1, False), (1, True))
    )
    assert torch.equal(best.x, one.x)
    assert best.cost == one.cost < last.cost
    assert not torch.equal(last.x, one.x)


def test_every_generative_preset_runs(prior: Prior) -> None:
    pytest.importorskip("cma", reason="the search of GGL; install flowerbed[attacks]")
    x = SCALE.values(torch.rand(2, *SHAPE))
    case = (observed(x, torch.tensor([2, 0]), VICTIM), SIDE)
    for name in GENERATIVE:
        attack = ATTACKS.get(name)(prior)
        short = tuple(replace(d, steps=2, population=6) for d in attack.descents)
        (found,) = replace(attack, descents=short, restarts=2).run([case])
        assert found.x.shape == x.shape, name
    with pytest.raises(ConfigError, match=r"give attack\.prior=FILE"):
        ATTACKS.get("gias")(None)


def test_cma_lowers_the_cost(prior: Prior) -> None:
    pytest.importorskip("cma", reason="the search of GGL; install flowerbed[attacks]")
    truth = prior.image(torch.full((1, 5), 0.7), torch.tensor([1]), 0)
    case = (observed(truth, torch.tensor([1]), VICTIM), replace(SIDE, labels=torch.tensor([1])))
    attack = Inversion("x", Latent(prior), descents=(Descent(steps=25, lr=0.5, method="cma", population=12),))
    (found,) = attack.run([case], seed=2)
    (again,) = attack.run([case], seed=2)
    assert found.curve[-1] < 0.2 * found.curve[0]
    assert torch.equal(found.x, again.x)
    assert found.evaluations == 25 * 12 + 1


def test_masked_entries_take_no_part(prior: Prior) -> None:
    """Of a gradient whose small entries were dropped, the rest is explained by the truth without any error."""
    x = SCALE.values(torch.rand(1, *SHAPE))
    seen = observed(x, torch.tensor([1]), VICTIM)
    pruned = {}
    for name, value in seen.returned.items():
        moved = value - seen.sent[name]
        kept = moved.abs() >= moved.abs().flatten().quantile(0.9)
        pruned[name] = seen.sent[name] + moved * kept

    class AtTruth(Latent):
        def open(self, rows: Rows) -> dict[str, Tensor]:
            return {"x": x[None].clone()}

        def decode(self, variables: Any, labels: Tensor) -> Tensor:
            found: Tensor = variables["x"]
            return found

        def penalty(self, variables: Any) -> Tensor:
            return torch.zeros(())

    case = (replace(seen, returned=pruned), replace(SIDE, labels=torch.tensor([1])))
    at_truth = Inversion("x", AtTruth(prior), descents=(Descent(steps=1, lr=1e-12),))
    (blind,) = at_truth.run([case])
    (adaptive,) = replace(at_truth, imitation="mask").run([case])
    assert adaptive.cost < 1e-4
    assert blind.cost > 0.01


def test_a_trained_prior_is_read_again(tmp_path: Path) -> None:
    torch.manual_seed(1)
    gan = Gan(1, CLASSES, 5, 3, 4)
    gan.average.out.bias.data.fill_(0.3)
    save_file({n: v.clone() for n, v in gan.state_dict().items()}, tmp_path / "run.safetensors")
    save_file({n: v.clone() for n, v in gan.average.state_dict().items()}, tmp_path / "average.safetensors")
    cpu = torch.device("cpu")
    found = [
        Prior.load(tmp_path / name, SHAPE, CLASSES, SCALE, cpu)
        for name in ("run.safetensors", "average.safetensors")
    ]
    z, y = torch.randn(2, 5), torch.tensor([1, 2])
    expected = gan.average.eval()(z, y)
    for prior in found:
        torch.testing.assert_close(prior.generator.part(z, prior.generator.condition(y), 0, 4), expected)
    for shape, classes, sentence in (
        (SHAPE, 10, "knows 4 classes, the attacked model 10"),
        ((3, 20, 20), CLASSES, "takes 3 x 20 x 20"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Prior.load(tmp_path / "run.safetensors", shape, classes, SCALE, cpu)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="holds no generator"):
        Prior.load(tmp_path / "other.safetensors", SHAPE, CLASSES, SCALE, cpu)
