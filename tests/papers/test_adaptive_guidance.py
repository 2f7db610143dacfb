"""Adaptive guidance: the identities and pitfalls of the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import worlds
from torch import Tensor

from flowerbed.errors import ConfigError
from flowerbed.experiments.papers.adaptive_guidance import (
    LEARNED,
    MOMENTS,
    SAMPLES,
    AdaptiveGuidance,
    AdaptiveGuidanceParams,
    LinearGuidance,
    Recorded,
    Weighted,
    cosine,
    errors,
    fitted,
    moments,
    search,
)
from flowerbed.models.diffusion import (
    DiffusionPrior,
    Empirical,
    Guidance,
    Policy,
    Predictions,
    Sampled,
    sample,
)

PAPER = "flowerbed.experiments.papers.adaptive_guidance:AdaptiveSampling"
T, S = 12, 7.5


def prior() -> Empirical:
    """Return a prior of three classes of 4x4 images."""
    made = Empirical((1, 4, 4), 3, centres=30, kernel=0.3)
    rng = torch.Generator().manual_seed(0)
    made.labels.copy_(torch.arange(30) % 3)
    means = torch.randn(3, 1, 4, 4, generator=rng).clamp(-1, 1)
    made.centres.copy_(means[made.labels] + 0.3 * torch.randn(30, 1, 4, 4, generator=rng))
    return made


def starts(count: int = 12) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(7)
    return torch.randn(count, 1, 4, 4, generator=rng), torch.arange(count) % 3


def made(policy: Policy, model: DiffusionPrior | None = None) -> Sampled:
    with torch.no_grad():
        return sample(model or prior(), *starts(), policy, steps=T)


def test_a_threshold_above_1_is_full_guidance_bit_for_bit() -> None:
    full, ag = made(Guidance(S)), made(AdaptiveGuidance(S, 1.1))
    assert torch.equal(full.images, ag.images)
    assert ag.calls.tolist() == [2 * T] * 12


def test_a_threshold_of_minus_1_guides_once() -> None:
    """The step at which the threshold is passed is still a guided one and costs two calls."""
    once, ag = made(Guidance(S, {0})), made(AdaptiveGuidance(S, -1.0))
    assert torch.equal(once.images, ag.images)
    assert ag.calls.tolist() == [T + 1] * 12


def test_scale_1_makes_all_policies_equal() -> None:
    alone = made(Guidance(1.0, ())).images
    total = moments(prior(), *starts(), AdaptiveGuidanceParams(T=T, s=1.0, k=6))
    for policy in (Guidance(1.0), AdaptiveGuidance(1.0, 0.95), LinearGuidance(1.0, fitted(total), 6)):
        torch.testing.assert_close(made(policy).images, alone, rtol=1e-4, atol=1e-4)


def test_each_image_switches_for_itself_as_if_it_were_alone() -> None:
    """No image's calls depend on the batch; images that are done are not computed any more."""
    whole, (start, labels) = made(AdaptiveGuidance(S, 0.99)), starts()
    assert len(set(whole.calls.tolist())) > 1
    for i in (0, 5, 11):
        with torch.no_grad():
            one = sample(prior(), start[i : i + 1], labels[i : i + 1], AdaptiveGuidance(S, 0.99), steps=T)
        assert int(one.calls[0]) == int(whole.calls[i])
        torch.testing.assert_close(one.images[0], whole.images[i], rtol=1e-4, atol=1e-4)


def test_the_rows_computed_are_the_calls_counted() -> None:
    model, rows = prior(), []
    model.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    found = made(AdaptiveGuidance(S, 0.99), model)
    assert sum(rows) == int(found.calls.sum())


def test_there_is_no_way_back() -> None:
    """The cosine of the noise dips; once off, guidance stays off."""
    policy = AdaptiveGuidance(S, 0.5)
    x = torch.zeros(1, 2)
    script = [((1.0, 0.0), (0.0, 1.0)), ((1.0, 0.0), (1.0, 0.1)), ((1.0, 0.0), (0.0, 1.0))]

    class Scripted(Predictions):
        def __init__(self, c: tuple[float, float], u: tuple[float, float]) -> None:
            self.c, self.u, self.x, self.asked = torch.tensor([c]), torch.tensor([u]), x, 0

        def conditional(self) -> Tensor:
            return self.c

        def unconditional(self, rows: Tensor | None = None) -> Tensor:
            self.asked += 1
            return self.u

    policy.space = "noise"
    steps = [Scripted(*one) for one in script]
    made_ = [policy(i, step).tolist()[0] for i, step in enumerate(steps)]
    assert [step.asked for step in steps] == [1, 1, 0]
    assert made_ == [pytest.approx([7.5, -6.5]), pytest.approx([1.0, -0.65]), [1.0, 0.0]]


def test_on_images_the_cosine_of_the_noise_stops_at_once_and_that_of_x0_does_not() -> None:
    """The pitfall of pixel space; a warm-up is the other way out."""
    assert made(AdaptiveGuidance(S, 0.991, "noise")).calls.tolist() == [T + 1] * 12
    assert made(AdaptiveGuidance(S, 0.991, "noise", warm_up=6)).calls.min() >= T + 6
    assert made(AdaptiveGuidance(S, 0.991, "x0")).calls.min() > T + 2
    full = Recorded(S)
    made(full)
    assert float(full.cosines["noise"][0].min()) > 0.999
    assert float(full.cosines["x0"][0].mean()) < float(full.cosines["x0"][-1].mean())


def test_the_cosine_by_hand() -> None:
    model, (start, labels) = prior(), starts(2)
    now = Predictions(model, start, 500, labels, model.unlabelled(start), torch.zeros(2).long())
    e_c, e_u = now.conditional(), now.unconditional()
    one = ((start - model.schedule.noise(500) * e_c) / model.schedule.signal(500)).flatten(1)
    other = ((start - model.schedule.noise(500) * e_u) / model.schedule.signal(500)).flatten(1)
    expected = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    torch.testing.assert_close(cosine(now, e_c, e_u, "x0"), expected)


class Linear(DiffusionPrior):
    """e_u = 0.3 e_c + 0.5 e_c of the step before: exactly linear in the past."""

    def __init__(self) -> None:
        super().__init__(2, "linear", 1000)
        self.before: Tensor | None = None
        self.latest: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        if int(labels[0]) != self.null:
            self.before, self.latest = self.latest, torch.sin(3 * x + t.view(-1, 1) / 300)
            return self.latest
        assert self.latest is not None
        return 0.3 * self.latest + (0 if self.before is None else 0.5 * self.before)


def test_a_linear_past_is_found_exactly() -> None:
    asked = AdaptiveGuidanceParams(T=6, s=2.0, k=3)
    start = torch.randn(400, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(400).long()
    coefficients = fitted(moments(Linear(), start, labels, asked))
    expected = torch.zeros(6, 12, dtype=torch.float64)
    for t in range(6):
        expected[t, t] = 0.3
        if t:
            expected[t, t - 1] = 0.5
    # e_u(t - 1) is itself linear in e_c, so only the estimates are unique, not the coefficients.
    full = Recorded(2.0)
    fresh = torch.randn(50, 3, generator=torch.Generator().manual_seed(2))
    sample(Linear(), fresh, labels[:50], full, steps=6)
    found = errors(full, coefficients)
    assert found["linear-error"] < 1e-4
    assert found["conditional-error"] > 0.1
    assert errors(full, expected)["linear-error"] < 1e-6


def test_the_fit_is_least_squares_on_all_trajectories_also_from_many_clients() -> None:
    """Against a solver on rows stacked by hand, the ridge as rows too; clients' moments add up to those of all.

    Without any ridge the coefficients reach 10^4 here: the predictions are almost collinear.
    """
    asked, model, (start, labels) = AdaptiveGuidanceParams(T=T), prior().double(), starts()
    start = start.double()
    parts = [moments(model, start[i::3], labels[i::3], asked) for i in range(3)]
    whole = moments(model, start, labels, asked)
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-10, atol=1e-8)
    kept = Recorded(S)
    with torch.no_grad():
        sample(model, start, labels, kept, steps=T)
    coefficients = fitted(whole)
    for t in (0, 2, 4):
        a = torch.stack([*kept.c[: t + 1], *kept.u[:t]]).flatten(1).T
        b = kept.u[t].flatten()
        ridge = (1e-8 * a.square().sum(0).mean()).sqrt() * torch.eye(a.shape[1], dtype=a.dtype)
        padded = torch.cat([b, b.new_zeros(a.shape[1])])
        best = torch.linalg.lstsq(torch.cat([a, ridge]), padded[:, None], driver="gelsd").solution[:, 0]
        mine = torch.cat([coefficients[t, : t + 1], coefficients[t, T : T + t]])
        torch.testing.assert_close(mine, best, rtol=1e-4, atol=1e-5)


def test_linear_guidance_alternates_and_counts() -> None:
    coefficients = fitted(moments(prior(), *starts(), AdaptiveGuidanceParams(T=T)))
    found = made(LinearGuidance(S, coefficients, 6))
    assert found.calls.tolist() == [T + 3] * 12
    # The first step is truly guided, so one step alone is that of guidance.
    torch.testing.assert_close(made(LinearGuidance(S, coefficients, 1)).images, made(Guidance(S, {0})).images)


def test_hard_policies_are_those_of_their_largest_weights() -> None:
    alpha = torch.zeros(T, 5)
    alpha[:4, 3] = 1
    alpha[4:, 1] = 1
    assert torch.equal(made(Weighted(S, alpha, hard=True)).images, made(Guidance(S, range(4))).images)
    sharp = made(Weighted(S, 50 * alpha, hard=False)).images
    torch.testing.assert_close(sharp, made(Guidance(S, range(4))).images, rtol=1e-3, atol=1e-3)
    for choice, scale in ((2, S / 2), (4, 2 * S)):
        alone = torch.nn.functional.one_hot(torch.full((T,), choice), 5)
        assert torch.equal(made(Weighted(S, alone, hard=True)).images, made(Guidance(scale)).images)


def test_a_search_in_which_calls_cost_everything_ends_with_single_calls() -> None:
    asked = AdaptiveGuidanceParams(T=4, k=2, search_steps=15, cost=100.0)
    found = search(prior(), *starts(4), asked)
    assert (found.argmax(1) < 2).all()
    free = search(prior(), *starts(4), AdaptiveGuidanceParams(T=4, k=2, search_steps=15, cost=0.0))
    assert not torch.equal(found, free)


def world(policy: str, rounds: int = 1, clients: int = 1, **options: Any) -> worlds.World:
    small = {"images": 10, "fitted_on": 10, "T": 6, "k": 3, **options}
    return worlds.run(
        PAPER, {"policy": policy, **small},
        dataset={"name": "flowerbed.datasets.symmetric:Symmetric"},
        model={"name": "flowerbed.models.diffusion:Empirical", "centres": 5},
        federation={"clients": clients, "rounds": rounds},
    )  # fmt: skip


def test_policies_start_from_the_same_noise_also_after_a_round_of_calibration() -> None:
    """With scale 1 they also end the same."""
    images = [world(policy, s=1.0).state(0)[SAMPLES]["images"] for policy in ("cfg", "linear", "ag")]
    torch.testing.assert_close(images[0], images[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images[0], images[2], rtol=1e-4, atol=1e-4)


def test_rounds_add_images_and_clients_have_their_own() -> None:
    found = world("conditional", rounds=2, clients=2)
    one, other = (found.state(client)[SAMPLES] for client in (0, 1))
    assert len(one["labels"]) == 20
    assert one["labels"].tolist() == [i % 10 for i in range(20)]
    assert not torch.equal(one["images"][:10], one["images"][10:])
    assert not torch.equal(one["images"], other["images"])
    # The model is sent and comes back as it was.
    assert worlds.equal(found.result.model, found.trained)


def test_the_control_has_at_least_the_calls_of_the_method() -> None:
    kept = world("ag", gamma_bar=0.99).state(0)[SAMPLES]
    assert kept["control calls"].double().mean() >= kept["calls"].double().mean()
    assert int(kept["control calls"][0]) < kept["calls"].double().mean() + 1


def test_clients_fit_one_policy_together() -> None:
    found = world("linear", clients=3)
    assert found.parts.strategy.state[LEARNED][MOMENTS].shape == (6, 12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"policy": "best"}, "strategy.policy is 'best'"),
        ({"space": "v"}, "strategy.space is 'v'"),
        ({"k": 21}, "strategy.k is 21"),
        ({"images": 0}, "strategy.images is 0"),
        ({"cost": -1.0}, "strategy.cost is -1.0"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        AdaptiveGuidanceParams(**options)
