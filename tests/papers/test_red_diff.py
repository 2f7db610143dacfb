"""RED-diff: the identities and pitfalls of the method, and its baselines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import worlds
from gaussian_prior import SHAPE, Gaussian, images, problem, rng

from flowerbed.clients.data import ClientData
from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.experiments.papers.red_diff import (
    CHOSEN,
    METHODS,
    MU,
    RESTORED,
    WEIGHTS,
    RedDiffHalf,
    RedDiffParams,
    prior_gradient,
    red_diff,
    solve,
    times,
)
from flowerbed.models.diffusion import DiffusionPrior
from flowerbed.models.inverse import box_mask
from flowerbed.models.restoration import Adam, data_gradient
from flowerbed.seeds import torch_rng

MODULE = "flowerbed.experiments.papers.red_diff"
DATA = {"name": "flowerbed.datasets.symmetric:Symmetric"}


def test_the_residual_is_that_of_the_denoised_image() -> None:
    """e_theta - e = (a / s)(mu - xhat), so that the linear weight gives lambda (mu - xhat) / n at every time."""
    prior, mu, asked = Gaussian(), images(), RedDiffParams(lam=0.7)
    for t in (3, 400, 999):
        a, s = prior.schedule.signal(t), prior.schedule.noise(t)
        e = torch.randn(SHAPE, generator=rng(), dtype=torch.float64)
        x = a * mu + s * e
        clean = prior.denoised(x, prior.at(x, t), t)
        torch.testing.assert_close(prior.at(x, t) - e, a / s * (mu - clean), rtol=1e-5, atol=1e-5)
        found = prior_gradient(prior, mu, t, asked, rng())
        torch.testing.assert_close(found, 0.7 * (mu - clean) / 4, rtol=1e-5, atol=1e-5)


def test_the_expected_gradient_of_a_gaussian_prior() -> None:
    """E_e[xhat] = m + K_t (mu - m); the mean over many draws agrees."""
    prior, asked = Gaussian(), RedDiffParams(lam=1.0)
    mu = images()[:1].expand(20_000, 1, 2, 2)
    for t in (100, 500):
        expected = (prior.eye - prior.gain(t)) @ (mu[0].flatten() - prior.mean) / 4
        found = prior_gradient(prior, mu, t, asked, rng()).mean(0).flatten()
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.01)


def test_long_descent_ends_where_the_gaussian_says() -> None:
    """The root of v H^T (H mu - y) / m + E_t lambda (I - K_t)(mu - m) / n, by plain SGD with falling steps."""
    prior, asked = Gaussian(), RedDiffParams(lam=2.0, steps=20)
    one = problem(prior=prior)
    grid = prior.schedule.grid(20)
    h = torch.diag(torch.tensor([1.0, 0, 1, 0]).double())
    pull = torch.stack([prior.eye - prior.gain(t) for t in grid]).mean(0) * 2.0 / 4
    root = torch.linalg.solve(h / 2 + pull, (h / 2 @ one.y.flatten(1).T) + (pull @ prior.mean)[:, None]).T
    mu, total, stream = one.start.repeat(200, 1, 1, 1), 0, rng()
    wide = replace(one, y=one.y.repeat(200, 1, 1, 1))
    for step in range(600):
        t = grid[step * 7 % 20]
        gradient = prior_gradient(prior, mu, t, asked, stream)
        gradient = gradient + data_gradient(wide.operator, wide.y, mu) / 2
        mu = mu - 0.4 * gradient
        if step >= 400:
            total = total + mu
    found = (total / 200).view(200, 2, 4).mean(0)
    torch.testing.assert_close(found, root, rtol=0.0, atol=0.02)


def test_the_loss_of_the_released_form_has_this_gradient() -> None:
    """v mean((y - H mu)^2) / 2 + lambda_t mean(sg(eps - e) mu): means over measured entries and over pixels."""
    prior, t, asked = Gaussian(), 300, RedDiffParams(lam=0.4)
    one = problem([True, True, True, False], prior)
    mu = images(4).requires_grad_()
    e = torch.randn(SHAPE, generator=rng(), dtype=torch.float64)
    a, s = prior.schedule.signal(t), prior.schedule.noise(t)
    with torch.no_grad():
        residual = prior.at(a * mu + s * e, t) - e
    seen = one.operator(torch.ones_like(mu)) > 0
    for i in range(2):
        loss = ((one.y - one.operator(mu))[i][seen[i]] ** 2).mean() / 2 + 0.4 * s / a * (residual * mu)[
            i
        ].mean()
        (expected,) = torch.autograd.grad(loss, mu)
        found = prior_gradient(prior, mu.detach(), t, asked, rng())
        found = found + data_gradient(one.operator, one.y, mu.detach()) / one.operator.size(mu)
        torch.testing.assert_close(found[i], expected[i], rtol=1e-6, atol=1e-9)


def test_without_a_prior_everything_seen_is_kept() -> None:
    one = problem([True] * 4)
    found = red_diff(one, RedDiffParams(lam=0.0, steps=50), rng())
    torch.testing.assert_close(found, one.y)


def test_without_measurements_only_the_prior_pulls() -> None:
    """Score distillation: with the denoised image as its own fixed point, mu goes to the prior's mean."""
    prior = Gaussian()
    one = problem(prior=prior)
    far = replace(one, y=one.y + 5)
    found = red_diff(far, RedDiffParams(v=0.0, lr=0.2, steps=400, lam=1.0), rng())
    assert (
        float((found.flatten(1) - prior.mean).abs().mean())
        < float((far.start.flatten(1) - prior.mean).abs().mean()) / 3
    )


def test_no_method_looks_at_the_truth() -> None:
    """The truth is for judging: with another one the very same image comes out, from the same start H^+ y."""
    one = problem()
    other = replace(one, truth=one.truth + 1)
    for method in METHODS:
        asked = RedDiffParams(method=method, steps=8)
        assert torch.equal(solve(one, asked, rng()), solve(other, asked, rng()))
    assert torch.equal(one.start, one.y)


def test_images_of_a_batch_do_not_touch() -> None:
    """Another image in the batch changes nothing of this one."""
    one = problem()
    other = replace(one, y=torch.cat([one.y[:1], 3 * one.y[1:]]))
    for method in METHODS:
        asked = RedDiffParams(method=method, steps=10)
        torch.testing.assert_close(solve(one, asked, rng())[0], solve(other, asked, rng())[0])


def test_the_mean_of_samples() -> None:
    stream = rng()
    asked = RedDiffParams(method="dps", steps=3)
    each = [solve(problem(), asked, stream) for _ in range(3)]
    torch.testing.assert_close(solve(problem(), replace(asked, samples=3), rng()), torch.stack(each).mean(0))


def test_the_times_go_down_by_default_and_cover_all() -> None:
    prior = Gaussian()
    asked = RedDiffParams(steps=10)
    down = times(prior, asked, rng())
    assert (down[0], down[-1]) == (999, 0)
    assert times(prior, replace(asked, order="ascending"), rng()) == down[::-1]
    mixed = times(prior, replace(asked, order="random"), rng())
    assert sorted(mixed, reverse=True) == down
    assert mixed != down


def test_weights_by_hand() -> None:
    found = {name: weight(4.0) for name, weight in WEIGHTS.items()}
    assert found == pytest.approx(
        {"const": 1, "sqrt": 2, "linear": 4, "square": 16, "log": 1.609438, "clip": 1, "power23": 2.519842}
    )


def world(kind: str, sections: dict[str, Any] | None = None, **options: Any) -> worlds.World:
    model = {"name": "flowerbed.models.diffusion:UNet", "base": 4}
    small = {"images": 4, "tuned_on": 3, "steps": 4, **options}
    more = {"federation": {"clients": 1, "rounds": 1}, **(sections or {})}
    return worlds.run(f"{MODULE}:{kind}", small, dataset=DATA, model=model, **more)


def test_settings_are_chosen_on_other_images() -> None:
    found = world("RedDiff", tune={"lam": [0.1, 0.2], "lr": [0.05, 100.0]})
    state = found.state(0)
    assert float(state[CHOSEN]["lr"]) == 0.05
    truth = state[RESTORED]["truth"]
    half, parts = RedDiffHalf(RedDiffParams(images=4, tuned_on=3)), found.parts
    local = worlds.open_round(LocalParams())
    local.seed = 3
    rows = torch.from_numpy(parts.test.indices(0).copy())
    x = parts.dataset.prepare(parts.dataset.test.inputs[rows])
    data = ClientData(x, parts.dataset.test.labels[rows], rows, {})
    local.open_test, local.model = lambda: data, Gaussian()
    tuning, _ = half.problem(local, len(data) - 3, 3)
    same = (truth[:, None] == tuning.truth[None]).flatten(2).all(2)
    assert not same.any()


def test_rounds_take_the_next_images() -> None:
    two = world("RedDiff", {"federation": {"clients": 1, "rounds": 2}}).state(0)[RESTORED]
    one = world("RedDiff").state(0)[RESTORED]
    assert len(two["psnr"]) == 8
    assert torch.equal(two["images"][:4], one["images"])
    assert not torch.equal(two["truth"][:4], two["truth"][4:])


def test_too_few_images_are_refused() -> None:
    with pytest.raises(Exception, match="360 test images and 400 were asked for"):
        world("RedDiff", images=400)
    with pytest.raises(Exception, match="images for tuning would be among those judged"):
        world("RedDiff", images=300, tuned_on=100, tune={"lr": [0.1, 0.2]})


def test_together_one_client_is_the_loop() -> None:
    """The image on the server, a step a round: what the solver makes at the client in one go."""
    joint = world("Joint", {"federation": {"clients": 1, "rounds": 4}}, lam=0.5, lr=0.05)
    alone = world("RedDiff", lam=0.5, lr=0.05)
    one, other = joint.state(0)[RESTORED], alone.state(0)[RESTORED]
    torch.testing.assert_close(one["images"], other["images"], rtol=1e-5, atol=1e-6)
    assert torch.equal(one["truth"], other["truth"])
    assert worlds.equal(joint.result.model, alone.result.model)


def test_together_clients_add_up_what_they_saw() -> None:
    """Three masks of one object: the gradient is the sum over all that was seen, divided by how much that is."""
    sections = {
        "federation": {"clients": 3, "rounds": 4},
        "partition": {"name": "draws", "per_client": 400},
    }
    found = world("Joint", sections, lam=0.5, lr=0.05, share=0.4)
    states = [found.state(client)[RESTORED] for client in range(3)]
    assert all(torch.equal(states[0]["truth"], state["truth"]) for state in states)
    measured = torch.stack([state["start"] for state in states])
    # Where something was seen there is noise, so that it is never 0.
    seen = (measured != 0).float()
    assert [int(one.sum()) for one in seen] == [4 * round(0.4 * 64)] * 3
    assert not torch.equal(seen[0], seen[1])
    prior, stream = found.parts.spec.model.build(3), torch_rng(3, "solver", 0, 0)
    prior.load_state_dict(found.result.model)
    assert isinstance(prior, DiffusionPrior)
    mu, adam = measured.sum(0) / seen.sum(0).clamp(min=1), Adam(0.05)
    size = seen.sum((0, 2, 3, 4)).view(4, 1, 1, 1)
    with torch.no_grad():
        for t in prior.schedule.grid(4):
            pull = prior_gradient(prior, mu, t, RedDiffParams(lam=0.5), stream)
            mu = adam.step(mu, pull + (seen * (mu - measured)).sum(0) / size)
    torch.testing.assert_close(found.parts.strategy.state[MU][MU], mu, rtol=1e-5, atol=1e-6)
    assert torch.equal(states[0]["images"], found.parts.strategy.state[MU][MU])


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("Joint", {"steps": 5}, "A step is a round here"),
        ("Joint", {"order": "random", "steps": 1}, "order that is not random"),
    ],
)
def test_together_needs_what_it_can_do(kind: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        world(kind, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "best"}, "strategy.method is 'best'"),
        ({"weight": "cube"}, "strategy.weight is 'cube'"),
        ({"lr": 0.0}, "strategy.lr is 0.0"),
        ({"sigma_v": -1.0}, "strategy.sigma_v is -1.0"),
        ({"share": 1.0}, "strategy.share is 1.0"),
        ({"tune": {"steps": [1.0]}}, "strategy.tune has 'steps'"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RedDiffParams(**options)


def test_the_box_is_in_the_middle() -> None:
    hidden = box_mask((1, 1, 8, 8), 4).hidden(torch.zeros(1, 1, 8, 8))[0, 0]
    assert hidden[2:6, 2:6].all()
    assert int(hidden.sum()) == 16
