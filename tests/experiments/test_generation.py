"""How generated images are judged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError
from flowerbed.experiments.generation import denoising, frechet
from flowerbed.experiments.measures import Measured
from flowerbed.models.diffusion import Empirical, UNet


def test_the_frechet_distance_of_gaussians_that_share_their_axes() -> None:
    """(m_1 - m_2)^2 + sum (sd_1 - sd_2)^2, on samples whose moments are exact."""
    rng = torch.Generator().manual_seed(0)
    raw = torch.randn(500, 3, generator=rng, dtype=torch.float64)
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T.cov())).T
    one, other = white * torch.tensor([1.0, 2.0, 0.5]), white * torch.tensor([3.0, 2.0, 0.1]) + 1
    assert frechet(one, other) == pytest.approx(3 + 4 + 0 + 0.16, rel=1e-8)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=rng, dtype=torch.float64))
    assert frechet(one @ turn, other @ turn) == pytest.approx(7.16, rel=1e-8)
    assert frechet(one, one) == pytest.approx(0, abs=1e-8)


def test_the_denoising_error_is_1_for_knowing_nothing_and_less_with_a_label() -> None:
    data = load_dataset("flowerbed.datasets.symmetric:Symmetric")
    cpu = torch.device("cpu")
    nothing = denoising(Measured(UNet((1, 8, 8), 10, base=4).eval(), data, 0, cpu))
    assert nothing["denoising"] == pytest.approx(1, abs=0.02)
    prior = Empirical((1, 8, 8), 10, centres=len(data.train))
    prior.centres.copy_(data.prepare(data.train.inputs))
    prior.labels.copy_(data.train.labels)
    found = denoising(Measured(prior, data, 0, cpu))
    assert found["denoising"] < found["denoising-unlabelled"] < 0.2
    assert found == denoising(Measured(prior, data, 1, cpu))


def test_another_model_is_refused() -> None:
    data = load_dataset("flowerbed.datasets.symmetric:Symmetric")
    with pytest.raises(ConfigError, match="Linear predicts no noise"):
        denoising(Measured(nn.Linear(1, 1), data, 0, torch.device("cpu")))
