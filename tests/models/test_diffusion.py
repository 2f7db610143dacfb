"""Diffusion models and samplers: closed forms, limits, and what is counted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.diffusion import (
    DiffusionPrior,
    Empirical,
    Guidance,
    Multistep,
    Schedule,
    Unconditional,
    UNet,
    ddim_step,
    denoising_loss,
    guided,
    sample,
)

STEPS = 50


class Gaussian(DiffusionPrior):
    """p(x_0) = N(m, v I): the predicted noise in closed form; counts its calls."""

    def __init__(self, mean: float = 0.4, variance: float = 0.25, steps: int = 1000) -> None:
        super().__init__(2, "linear", steps)
        self.mean, self.variance, self.asked = mean, variance, 0

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.asked += len(x)
        a, s = self.schedule.rates(t, x)
        mean = self.mean if labels is None else torch.where(labels == 1, -self.mean, self.mean).view(-1, 1)
        return s * (x - a * mean) / (a**2 * self.variance + s**2)


def empirical(kernel: float = 0.3) -> Empirical:
    prior = Empirical((1, 2, 2), 2, centres=5, kernel=kernel, steps=STEPS)
    rng = torch.Generator().manual_seed(3)
    prior.centres.copy_(torch.randn(5, 1, 2, 2, generator=rng))
    prior.labels.copy_(torch.tensor([0, 0, 1, 1, 1]))
    return prior.double()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_index_is_shifted_so_that_minus_one_is_the_clean_image() -> None:
    schedule = Schedule.named("linear")
    assert (schedule.signal(-1), schedule.noise(-1)) == (1.0, 0.0)
    assert schedule.signal(0) ** 2 == pytest.approx(1 - 1e-4)
    product = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000))
    assert schedule.signal(999) ** 2 == pytest.approx(product, rel=1e-6)
    for t in (0, 17, 999):
        assert schedule.signal(t) ** 2 + schedule.noise(t) ** 2 == pytest.approx(1)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [20, 1000])
def test_schedules_lose_the_image_gradually(name: str, steps: int) -> None:
    schedule = Schedule.named(name, steps)
    assert schedule.steps == steps
    assert (schedule.abar.diff() < 0).all()
    assert schedule.signal(steps - 1) < 0.05


def test_the_grid_covers_all_times_evenly_down_to_zero() -> None:
    schedule = Schedule.named("linear")
    assert schedule.grid(4) == [999, 666, 333, 0]
    assert schedule.grid(1000) == list(range(999, -1, -1))
    with pytest.raises(ConfigError, match="1001 cannot be visited"):
        schedule.grid(1001)


def test_the_empirical_prior_is_the_score_of_its_mixture() -> None:
    """e = -s grad log p_t, by autograd through the density of the mixture written out."""
    prior = empirical()
    x, t = noise(6, 1, 2, 2).requires_grad_(), 23
    a, s = prior.schedule.signal(t), prior.schedule.noise(t)
    for labels, among in (
        (None, [0, 1, 2, 3, 4]),
        (torch.zeros(6).long(), [0, 1]),
        (torch.full((6,), 2), [0, 1, 2, 3, 4]),
    ):
        total = torch.zeros(6, dtype=torch.float64)
        for i in among:
            squares = ((x - a * prior.centres[i]) ** 2).sum((1, 2, 3))
            total = total + torch.exp(-squares / (2 * ((a * 0.3) ** 2 + s**2)))
        (score,) = torch.autograd.grad(total.log().sum(), x)
        torch.testing.assert_close(prior.at(x, t, labels), -s * score, rtol=1e-9, atol=1e-9)


def test_at_the_end_of_the_noise_the_denoised_image_is_the_mean() -> None:
    prior = empirical()
    x = noise(3, 1, 2, 2)
    found = prior.denoised(x, prior.at(x, STEPS - 1), STEPS - 1)
    torch.testing.assert_close(found, prior.centres.mean(0).expand_as(found), rtol=0.0, atol=0.1)


def test_ddim_without_noise_solves_the_gaussian_in_closed_form() -> None:
    """The flow of N(m, v) maps x_T to m + sqrt(v) (x_T - a_T m) / sqrt(a_T^2 v + s_T^2)."""
    prior = Gaussian()
    x, labels = noise(4, 3), torch.zeros(4).long()
    a, s = prior.schedule.signal(999), prior.schedule.noise(999)
    exact = 0.4 + 0.5 * (x - a * 0.4) / math.sqrt(a**2 * 0.25 + s**2)
    error = {}
    for solver, steps in (("ddim", 1000), ("ddim", 20), ("dpm", 20)):
        made = sample(prior, x, labels, Unconditional(), steps=steps, solver=solver).images
        error[solver, steps] = float((made - exact).abs().max())
    assert error["ddim", 1000] < 0.01
    # The second-order solver is the better one at the same number of calls.
    assert error["dpm", 20] < 0.5 * error["ddim", 20]


def test_the_multistep_solver_by_hand() -> None:
    schedule = Schedule.named("linear")
    x, first, second = torch.tensor([0.7]), torch.tensor([0.2]), torch.tensor([0.5])
    place = [math.log(schedule.signal(t) / schedule.noise(t)) for t in (900, 600, 300)]
    h = [place[1] - place[0], place[2] - place[1]]
    solver = Multistep(schedule)
    y = solver(x, first, 900, 600)
    expected = (
        schedule.noise(600) / schedule.noise(900) * 0.7 - schedule.signal(600) * (math.exp(-h[0]) - 1) * 0.2
    )
    assert float(y) == pytest.approx(expected, rel=1e-5)
    r = h[0] / h[1]
    estimate = (1 + 1 / (2 * r)) * 0.5 - 1 / (2 * r) * 0.2
    z = solver(y, second, 600, 300)
    expected = (
        schedule.noise(300) / schedule.noise(600) * expected
        - schedule.signal(300) * (math.exp(-h[1]) - 1) * estimate
    )
    assert float(z) == pytest.approx(expected, rel=1e-5)
    assert solver(z, second, 300, -1) is second


def test_eta_one_keeps_the_variance_of_the_gaussian_and_eta_zero_draws_nothing() -> None:
    prior = Gaussian()
    x = noise(4000, 1)
    labels, rng = torch.zeros(4000).long(), torch.Generator().manual_seed(1)
    made = sample(prior, x, labels, Unconditional(), steps=200, eta=1.0, generator=rng).images
    assert float(made.std()) == pytest.approx(0.5, abs=0.03)
    assert float(made.mean()) == pytest.approx(0.4, abs=0.03)
    state = rng.get_state()
    one = ddim_step(prior, x, prior.at(x, 500), 500, 400, generator=rng)
    assert torch.equal(rng.get_state(), state)
    assert torch.equal(one, ddim_step(prior, x, prior.at(x, 500), 500, 400))


@pytest.mark.parametrize(("on", "calls"), [(None, 20), (range(3), 13), (range(0), 10)])
def test_every_call_is_counted(on: range | None, calls: int) -> None:
    prior = Gaussian()
    made = sample(prior, noise(4, 1), torch.ones(4).long(), Guidance(3.0, on), steps=10)
    assert made.calls.tolist() == [calls] * 4
    assert prior.asked == 4 * calls


def test_scale_one_is_the_label_alone_and_a_negative_label_is_led_away_from() -> None:
    prior = Gaussian()
    x, labels = noise(5, 1), torch.ones(5).long()
    alone = sample(prior, x, labels, Guidance(9.0, ()), steps=10).images
    torch.testing.assert_close(sample(prior, x, labels, Guidance(1.0), steps=10).images, alone)
    same = sample(prior, x, labels, Guidance(9.0), steps=10, negative=labels).images
    torch.testing.assert_close(same, alone)
    assert float((sample(prior, x, labels, Guidance(2.0), steps=10).images - alone).abs().max()) > 0.1
    assert float(guided(torch.tensor(3.0), torch.tensor(1.0), 2.0)) == 5.0


def test_the_unet_knows_time_and_label_and_starts_at_zero() -> None:
    torch.manual_seed(0)
    net = UNet((3, 8, 12), 4, base=8, widths=(1, 2, 2))
    x = torch.randn(5, 3, 8, 12)
    assert (net.at(x, 3) == 0).all()
    torch.nn.init.normal_(net.leave.weight)
    one = net.at(x, 3)
    assert one.shape == x.shape
    assert not torch.equal(one, net.at(x, 700))
    labels = torch.tensor([0, 1, 2, 3, 4])
    found = net.at(x, 3, labels)
    different = [not torch.equal(found[i], one[i]) for i in range(5)]
    assert different == [True, True, True, True, False]
    # All its parameters take part.
    found.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_wrong_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs sides that 4 divides"):
        UNet((1, 6, 6), 2, widths=(1, 2, 2))
    with pytest.raises(ConfigError, match="is none of linear, cosine"):
        Empirical((1, 2, 2), 2, centres=3, schedule="steep")
    with pytest.raises(ConfigError, match="centres=0"):
        Empirical((1, 2, 2), 2, centres=0)
    with pytest.raises(ConfigError, match="set eta=0"):
        sample(
            Gaussian(), noise(1, 1), torch.zeros(1).long(), Unconditional(), steps=2, solver="dpm", eta=1.0
        )


def test_models_are_built_by_name_with_the_seed() -> None:
    spec = ModelSpec("flowerbed.models.diffusion:UNet", (1, 8, 8), 3, {"base": 4})
    one, other = spec.build(1).state_dict(), spec.build(1).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_loss_of_the_exact_predictor_is_below_that_of_another() -> None:
    """It is the conditional mean of the noise, so nothing predicts better."""
    prior = Gaussian()
    rng = torch.Generator().manual_seed(5)
    x = 0.4 + 0.5 * torch.randn(4000, 2, generator=rng)

    def loss(scale: float) -> float:
        predict = lambda x, t, labels: scale * prior(x, t)
        return float(
            denoising_loss(
                predict, prior.schedule, x, torch.zeros(4000).long(), torch.Generator().manual_seed(1)
            )
        )

    assert loss(1.0) < min(loss(0.9), loss(1.1), loss(0.0))
    assert loss(0.0) == pytest.approx(1, abs=0.05)
