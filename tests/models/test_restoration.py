"""Restoring images from measurements: descent on an image, and the solvers of others."""

from __future__ import annotations

import pytest
import torch
from gaussian_prior import SHAPE, Gaussian, images, problem, rng

from flowerbed.models.inverse import BlockMean, Clamp, Mask, random_mask
from flowerbed.models.restoration import Adam, Problem, data_gradient, dps, pigdm, total_variation


def test_the_step_is_that_of_torchs_adam() -> None:
    mu = images()
    p = mu.clone().requires_grad_()
    optimizer = torch.optim.Adam([p], lr=0.1, betas=(0.9, 0.99))
    adam = Adam(0.1)
    for i in range(5):
        gradient = images(i + 10) * 0.1**i
        p.grad = gradient
        optimizer.step()
        mu = adam.step(mu, gradient)
        torch.testing.assert_close(mu, p.detach(), rtol=1e-9, atol=1e-9)


def test_a_measurement_that_is_not_linear_has_its_derivative() -> None:
    mu = torch.tensor([[[[0.2, -0.9]]]], dtype=torch.float64)
    y = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    # (2 * .2 - 1) * 2, and 0 where it is cut off.
    torch.testing.assert_close(
        data_gradient(Clamp(), y, mu), torch.tensor([[[[-1.2, 0.0]]]], dtype=torch.float64)
    )


def test_dps_and_pigdm_are_one_step_by_hand() -> None:
    """A step of each against the Jacobian of the Gaussian's denoised image, (a / abar) K = K / a."""
    prior = Gaussian()
    one = problem(prior=prior)
    a, s = prior.schedule.signal(999), prior.schedule.noise(999)
    noise = torch.randn(SHAPE, generator=rng(), dtype=torch.float64)
    x = a * one.start + s * noise
    clean = prior.mean + (x.flatten(1) / a - prior.mean) @ prior.gain(999).T
    h = torch.diag(torch.tensor([1.0, 0, 1, 0]).double())
    missed = one.y.flatten(1) - clean @ h
    jacobian = prior.gain(999) / a
    slope = -2 * missed @ h @ jacobian
    expected = clean - 0.3 * slope / missed.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        dps(one, rng(), steps=1, zeta=0.3, eta=0.0).flatten(1), expected, rtol=1e-6, atol=1e-8
    )
    replaced = torch.where(torch.diagonal(h) > 0, one.y.flatten(1), clean)
    expected = replaced + 0.7 * a * missed @ jacobian
    torch.testing.assert_close(
        pigdm(one, rng(), steps=1, weight=0.7, eta=0.0).flatten(1), expected, rtol=1e-6, atol=1e-8
    )


def test_total_variation_smooths_and_keeps_what_is_flat() -> None:
    """A flat image seen through a mask comes back flat, and noise loses most of its variation."""
    mask = Mask(torch.tensor([True, False, True, True]).view(1, 1, 2, 2))
    flat = torch.full(SHAPE, 0.4, dtype=torch.float64)
    found = total_variation(Problem(Gaussian(), mask, mask(flat), flat), steps=400, lam=0.1, lr=0.02)
    torch.testing.assert_close(found, flat, rtol=0.0, atol=0.03)
    rough = total_variation(problem([True] * 4), steps=400, lam=5.0, lr=0.02)
    assert float(rough.std((2, 3)).max()) < 0.2 * float(images().std((2, 3)).min())


def test_a_mask_sees_noise_only_where_it_sees() -> None:
    truth = torch.zeros(400, 1, 4, 4)
    stream = rng()
    one = Problem.measured(Gaussian(), random_mask(truth.shape, 0.5, stream), truth, 0.5, stream)
    assert (one.y[one.operator.hidden(truth)] == 0).all()
    assert float(one.y[~one.operator.hidden(truth)].std()) == pytest.approx(0.5, abs=0.02)
    blocks = Problem.measured(Gaussian(), BlockMean(2), truth, 0.5, rng())
    assert blocks.y.shape == (400, 1, 2, 2)
    assert float(blocks.y.std()) == pytest.approx(0.5, abs=0.03)


def test_judged_is_what_was_hidden() -> None:
    one = problem()
    wrong_where_seen = one.truth + 9 * one.operator(torch.ones_like(one.truth))
    assert (one.judged(wrong_where_seen) > 150).all()
    assert (one.judged(one.truth + 0.2) < 21).all()
