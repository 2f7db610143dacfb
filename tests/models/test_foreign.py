"""timm models pass through; a stand-in shows how, the library itself is asked where it is installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowerbed.errors import ConfigError
from flowerbed.models.base import Net, roles
from flowerbed.models.zoo import build_model, list_models


class StandIn(nn.Module):
    """A classifier with the methods of a timm model."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Linear(channels, 6)
        self.fc: nn.Module = nn.Linear(6, classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        assert num_classes == 0
        self.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.stem(x.mean((2, 3))))
        return y


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Install a stand-in for timm; return the options that it is asked with."""
    asked: dict[str, Any] = {}

    def create_model(name: str, **options: Any) -> nn.Module:
        if "drop_rat" in options:
            raise TypeError("unexpected keyword argument 'drop_rat'")
        asked.update(options, name=name)
        model = StandIn(options["in_chans"], options["num_classes"])
        if name == "headless":
            model.fc = nn.Identity()
        return model

    timm = ModuleType("timm")
    vars(timm).update(
        create_model=create_model,
        is_model=lambda name: name in ("small", "headless"),
        list_models=lambda: ["small", "headless"],
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    return asked


def test_it_becomes_a_net(asked: dict[str, Any]) -> None:
    model = build_model("timm:small", (2, 8, 8), 3, seed=1, drop_rate=0.5)
    assert asked == {"name": "small", "pretrained": False, "in_chans": 2, "num_classes": 3, "drop_rate": 0.5}
    assert isinstance(model, Net)
    assert model.feature_dim == 6
    assert roles(model) == {
        "body.stem.weight": "backbone",
        "body.stem.bias": "backbone",
        "head.weight": "head",
        "head.bias": "head",
    }
    x = torch.randn(4, 2, 8, 8)
    assert torch.equal(model.head(model.features(x)), model(x))
    again = build_model("timm:small", (2, 8, 8), 3, seed=1)
    assert torch.equal(again(x), model(x))


def test_what_cannot_be_had_is_refused(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no model 'smal'; list them with the pattern 'timm:\*'"):
        build_model("timm:smal", (2, 8, 8), 3)
    with pytest.raises(ConfigError, match="does not end in one linear layer"):
        build_model("timm:headless", (2, 8, 8), 3)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'drop_rat'"):
        build_model("timm:small", (2, 8, 8), 3, drop_rat=0.5)
    with pytest.raises(ConfigError, match="takes images"):
        build_model("timm:small", (64,), 3)
    assert list_models("timm:s*") == ["timm:small"]
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="pip install timm"):
        build_model("timm:small", (2, 8, 8), 3)
    assert list_models("timm:*") == []


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_real_models(name: str) -> None:
    if not list_models(f"timm:{name}"):
        pytest.skip("timm is not installed, or its torchvision does not fit torch")
    model = build_model(f"timm:{name}", (3, 224, 224), 3).eval()
    assert isinstance(model, Net)
    x = torch.zeros(1, 3, 224, 224)
    assert model.features(x).shape == (1, model.feature_dim)
    assert model(x).shape == (1, 3)
