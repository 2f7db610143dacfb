"""The search for ATS's policies: its scores by hand and by a loop, and what it prefers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowerbed.datasets.augment import Scale
from flowerbed.errors import ConfigError
from flowerbed.experiments.leakage import policies
from flowerbed.models.base import ModelSpec

NET = ModelSpec("dlg_lenet", (1, 8, 8), 4)


def batch(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=rng), torch.randint(0, 4, (count,), generator=rng)


def test_the_accuracy_score_by_hand() -> None:
    """A linear model has one Jacobian for all images: correlations of 1, eigenvalues n and n - 1 zeros."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    x, _ = batch(3)
    k = policies.SMALL
    expected = -(math.log(3 + k) + 1 / (3 + k)) - 2 * (math.log(k) + 1 / k)
    assert policies.accuracy_score(net, x) == pytest.approx(expected, rel=1e-3)


def test_the_privacy_score_against_a_loop() -> None:
    net, (x, y) = NET.build(0), batch(3)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))

    def gradient(image: torch.Tensor, label: torch.Tensor) -> list[torch.Tensor]:
        loss = F.cross_entropy(net(image[None]), label[None])
        return list(torch.autograd.grad(loss, list(net.parameters())))

    heights = [0.0] * (policies.POINTS + 1)
    for i in range(3):
        whole = gradient(x[i], y[i])
        for point in range(policies.POINTS + 1):
            b = point / policies.POINTS
            made = gradient(b * x[i] + (1 - b) * noise[i], y[i])
            cosines = [
                float(F.cosine_similarity(a.flatten(), c.flatten(), 0))
                for a, c in zip(made, whole, strict=True)
            ]
            heights[point] += sum(cosines) / len(cosines) / 3
    area = sum((a + b) / 2 for a, b in itertools.pairwise(heights)) / policies.POINTS
    assert policies.privacy_score(net, x, noise, y) == pytest.approx(area, abs=1e-4)
    assert policies.privacy_score(net, x, x, y) == pytest.approx(1, abs=1e-5), "noise that is the image"


def test_the_search_ranks_what_it_keeps() -> None:
    net, (x, y) = NET.build(0), batch()
    found = policies.search(net, x, y, Scale(), tried=8, kept=0.5)
    everything = policies.search(net, x, y, Scale(), tried=8, kept=1.0)
    assert len(found) == 4
    assert [r.privacy for r in found] == sorted(r.privacy for r in found)
    left = [r.accuracy for r in everything if r not in found]
    assert min(r.accuracy for r in found) >= max(left)
    with pytest.raises(ConfigError, match="nothing to choose from"):
        policies.search(net, x, y, Scale(), tried=0)


def test_the_command_prints_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "TRIED", 3)
    policies.main(["dataset=digits", "model=dlg_lenet"])
    assert "defence=ats defence.policies=[[" in capsys.readouterr().out
