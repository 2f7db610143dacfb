"""What the reproduction of compressed features runs on, and what it measures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.compress_features import TARGET, CompressParams
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import Net, Shape
from flowerbed.models.feature_masks import LeadingLinear, decomposition, nested_law
from flowerbed.models.layers import ChannelsLast, image_shape
from flowerbed.models.zoo import draw_net


def ordered(input_shape: Shape, num_classes: int, *, of: str = "", width: int = 256, draw: int = 0) -> Net:
    """Return a network ``of`` any kind with a classifier that can be cut off, the ``draw``-th of its initial weights.

    Without ``of``: two convolutions with stride 2 (16 and 32 channels) and a dense layer, with batch norm.
    """
    for _ in range(draw + 1):
        net = draw_net(of, input_shape, num_classes) if of else _conv_dense(input_shape, width)
        net = Net(net.body, LeadingLinear(net.feature_dim, num_classes), net.feature_dim)
    return net


def _conv_dense(input_shape: Shape, width: int) -> Net:
    channels, height, across = image_shape("ordered", input_shape, 4)
    layers: list[nn.Module] = []
    for following in (16, 32):
        layers += [
            nn.Conv2d(channels, following, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(following),
            nn.ReLU(),
        ]
        channels, height, across = following, -(-height // 2), -(-across // 2)
    dense = nn.Linear(channels * height * across, width, bias=False)
    body = nn.Sequential(ChannelsLast(*layers), nn.Flatten(), dense, nn.BatchNorm1d(width), nn.ReLU())
    return Net(body, nn.Identity(), width)


def curve(input_shape: Shape, num_classes: int, *, width: int = 200) -> Net:
    """Return two dense layers of that width and one number at the end, which can be cut off."""
    body = nn.Sequential(nn.Linear(input_shape[0], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return Net(body, LeadingLinear(width, 1), width)


def ramp(*, samples: int = 100, noise: float = 0.4, draw: int = 0) -> Dataset:
    """Return y = x + e with x in [0, 10] and e ~ N(0, (noise x)^2); the test set is the line itself."""
    rng = seeds.numpy_rng(draw, "compress features ramp")
    x = rng.uniform(0, 10, samples)
    y = x + noise * x * rng.standard_normal(samples)
    line = np.linspace(0, 10, 201)
    train, test = (
        Split(
            torch.from_numpy(a).float()[:, None],
            torch.zeros(len(a), dtype=torch.int64),
            {TARGET: torch.from_numpy(b).float()},
        )
        for a, b in ((x, y), (line, line))
    )
    return Dataset("ramp", train, test, ("y",), (5.0,), (2.9,), task="measured")


def memorised(measured: Measured) -> dict[str, float]:
    """Return the share of the (noisy) training labels that the model gives, and K with its share of D."""
    outputs, labels = measured.outputs(measured.dataset.train)
    return {"fits-noisy": float((outputs.argmax(-1) == labels).double().mean()), **_cut(measured.model)}


def _cut(model: nn.Module) -> dict[str, float]:
    head = next(m for m in model.modules() if isinstance(m, LeadingLinear))
    kept = min(int(head.kept), head.in_features)
    return {"kept": float(kept), "kept-share": kept / head.in_features}


def off_the_line(measured: Measured) -> dict[str, float]:
    """Return the root mean squared distance of the toy's prediction from y = x."""
    outputs, _ = measured.outputs()
    wanted = measured.dataset.test.extras[TARGET]
    return {
        "line-error": float((outputs.squeeze(-1) - wanted).square().mean().sqrt()),
        **_cut(measured.model),
    }


@torch.no_grad()
def theorem(run: Finished) -> dict[str, float]:
    """Return Theorem 1's bias and variance on 1,000 training samples and their noisy labels, for one network."""
    model, dataset = run.model, run.dataset
    asked = CompressParams(**run.simulation.strategy.options)
    if not isinstance(model, Net) or dataset.task == "measured" or asked.mask == "dropout":
        return {}
    split, weight, channels = dataset.train, weight_of(model), model.feature_dim
    law = nested_law(channels, asked.sigma, asked.mu) if asked.mask == "nested" else torch.ones(1)
    found = []
    for rows in torch.split(torch.arange(min(1000, len(split))), 100):
        z = model.features(dataset.prepare(split.inputs[rows]))
        every = (z.unsqueeze(1) * weight).cumsum(-1) if asked.mask == "nested" else (z @ weight.T)[..., None]
        log_q = every.permute(2, 0, 1).double().log_softmax(-1)
        p = F.one_hot(split.labels[rows], dataset.num_classes).double()
        found.append(torch.stack(decomposition(log_q, law, p)[:2]))
    bias, variance = torch.cat(found, 1).mean(1).tolist()
    return {"noisy-bias": bias, "noisy-variance": variance}


def weight_of(net: Net) -> Tensor:
    """Return the weights of the classifier, ``(C, D)``."""
    assert isinstance(net.head, LeadingLinear)
    return net.head.weight
