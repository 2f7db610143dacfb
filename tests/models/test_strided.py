"""The strided network against its description."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowerbed.errors import ConfigError
from flowerbed.models.zoo import build_model

STRIDED = "flowerbed.models.strided:strided_cnn"


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_it_is_three_strided_convolutions_and_a_mean(norm: str) -> None:
    net = build_model(STRIDED, (3, 32, 32), 10, norm=norm).eval()
    convolutions = 9 * (3 * 16 + 16 * 32 + 32 * 64)
    assert sum(p.numel() for p in net.parameters()) == convolutions + 2 * (16 + 32 + 64) + 65 * 10
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    state, y = net.state_dict(), x
    convolution = [n for n, v in state.items() if v.dim() == 4]
    scale = [n for n, v in state.items() if n.startswith("body") and v.dim() == 1 and n.endswith("weight")]
    for weight, gain in zip(convolution, scale, strict=True):
        y = F.conv2d(y, state[weight], stride=2, padding=1)
        bias = state[gain.replace("weight", "bias")]
        if norm == "gn":
            y = F.group_norm(y, 8, state[gain], bias)
        else:
            mean, var = (state[gain.replace("weight", name)] for name in ("running_mean", "running_var"))
            y = F.batch_norm(y, mean, var, state[gain], bias)
        y = y.relu()
    features = net.features(x)
    torch.testing.assert_close(features, y.mean((2, 3)))
    assert features.shape == (4, 64)
    assert bool((features >= 0).all())


def test_widths_and_refusals() -> None:
    assert build_model(STRIDED, (1, 8, 8), 3, widths=(8, 16)).feature_dim == 16
    with pytest.raises(ConfigError, match="at least 8x8"):
        build_model(STRIDED, (1, 4, 4), 3)
    with pytest.raises(ConfigError, match="must be 'bn'"):
        build_model(STRIDED, (1, 8, 8), 3, norm="ln")
