"""Groups: which numbers belong together, norms, scaling, and choosing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flowerbed.errors import ConfigError
from flowerbed.models.base import classifier
from flowerbed.models.groups import (
    Layer,
    Member,
    inner,
    input_blocks,
    largest,
    lasso_factors,
    norms,
    output_units,
    scaled,
    sizes,
)
from flowerbed.models.info import ModelInfo
from flowerbed.models.zoo import build_model


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.ReLU(),
    )
    return classifier(body, 5, 4)


def test_units_hold_their_bias_and_norm_and_the_head_is_left_out() -> None:
    info = ModelInfo.of(network())
    assert output_units(info) == [
        Layer(3, (Member("body.0.weight"), Member("body.1.weight"), Member("body.1.bias"))),
        Layer(5, (Member("body.4.weight"), Member("body.4.bias"))),
    ]
    assert sizes(output_units(info), info.shapes).tolist() == [20.0] * 3 + [13.0] * 5


def test_every_norm_of_a_residual_network_goes_with_its_convolution() -> None:
    model = build_model("resnet8", (3, 16, 16), 10, 0)
    layers = output_units(ModelInfo.of(model))
    assert all(len(layer.members) == 3 for layer in layers)
    normed = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(layer.count for layer in layers) == sum(m.num_features for m in normed)


def test_norms_and_inner_products_against_a_loop() -> None:
    model = network()
    groups, state = output_units(ModelInfo.of(model)), model.state_dict()
    other = {n: torch.randn_like(v) if v.is_floating_point() else v for n, v in state.items()}

    def pieces(of: dict[str, Tensor]) -> list[Tensor]:
        return [
            torch.cat([of[m.tensor][j].double().flatten() for m in layer.members])
            for layer in groups
            for j in range(layer.count)
        ]

    mine, theirs = pieces(state), pieces(other)
    torch.testing.assert_close(norms(groups, state), torch.stack([p.norm() for p in mine]))
    torch.testing.assert_close(
        inner(groups, state, other), torch.stack([(p * q).sum() for p, q in zip(mine, theirs, strict=True)])
    )


def test_scaling_touches_its_group_alone_and_zero_is_exact() -> None:
    model = network()
    groups, state = output_units(ModelInfo.of(model)), model.state_dict()
    state["body.0.weight"][1, 0, 0, 0] = float("inf")
    factors = torch.tensor([1.0, 0.0, 0.5] + [1.0] * 5, dtype=torch.float64)
    after = scaled(groups, state, factors)
    for name in ("body.0.weight", "body.1.weight", "body.1.bias"):
        assert torch.equal(after[name][0], state[name][0])
        assert not after[name][1].any()
        assert torch.equal(after[name][2], state[name][2] * 0.5)
    assert torch.equal(after["body.4.weight"], state["body.4.weight"])
    assert "head.weight" not in after


def test_a_dead_group_emits_nothing_even_behind_a_norm() -> None:
    model, x = network().eval(), torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        model.get_parameter("body.1.bias").fill_(1.0)
        groups = output_units(ModelInfo.of(model))
        alive = torch.ones(8, dtype=torch.float64)
        alive[1] = 0
        model.load_state_dict(scaled(groups, model.state_dict(), alive), strict=False)
        assert not model.get_submodule("body")[:3](x)[:, 1].any()  # type: ignore[operator]
        # With its filter alone at zero the channel still emits the shift.
        model.get_parameter("body.1.bias").fill_(1.0)
        assert model.get_submodule("body")[:3](x)[:, 1].all()  # type: ignore[operator]


def test_blocks_of_inputs() -> None:
    info = ModelInfo.of(classifier(nn.Identity(), 6, 2))
    (layer,) = input_blocks(info, 2)
    assert layer == Layer(3, (Member("head.weight", 1, 2),))
    weight = {"head.weight": torch.tensor([[1.0, 2, 0, 0, 3, 4], [2, 0, 0, 0, 0, 0]])}
    assert norms([layer], weight).tolist() == [3.0, 0.0, 5.0]
    after = scaled([layer], weight, torch.tensor([2.0, 1.0, 0.0]))["head.weight"]
    assert after.tolist() == [[2, 4, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]]
    with pytest.raises(ConfigError, match="do not divide the 6"):
        input_blocks(info, 4)


def test_the_largest_stay_and_no_layer_is_emptied() -> None:
    groups = [Layer(3, (Member("a"),)), Layer(3, (Member("b"),))]
    values = torch.tensor([5.0, 6, 4, 1, 1, 0.5])
    assert largest(groups, values, 3).tolist() == [True, True, False, False, True, False]
    assert largest(groups, values, 3, least=0).tolist() == [True, True, True, False, False, False]
    with pytest.raises(ConfigError, match="1 groups are too few"):
        largest(groups, values, 1)


def test_group_lasso_is_the_minimiser_of_its_objective() -> None:
    """Along the ray of a group the objective is 1/2 (s n - n)^2 + threshold s n."""
    n, threshold = torch.tensor([3.0, 1.0, 0.0]).double(), torch.tensor([1.0, 2.0, 1.0]).double()
    found = lasso_factors(n, threshold)
    grid = torch.linspace(0, 1.2, 12001).double()[:, None]
    objective = 0.5 * (grid * n - n) ** 2 + threshold * grid * n
    torch.testing.assert_close(found[:2], grid[objective.argmin(0), 0][:2], rtol=0, atol=1e-4)
    assert found.tolist() == [pytest.approx(2 / 3), 0.0, 0.0]
