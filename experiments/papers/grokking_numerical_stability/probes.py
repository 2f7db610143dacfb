"""What the reproduction of StableMax and perpGrad runs on, and what it measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.errors import require
from flowerbed.experiments.papers.grokking_numerical_stability import COLLAPSED, StabilityParams
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import Net, Shape
from flowerbed.models.softmax import LOSSES, collapsed, dtype_of
from flowerbed.server.callbacks import SERVER

GROKKED = 0.95
"""Test accuracy that counts as generalisation."""


def mlp(input_shape: Shape, num_classes: int, *, width: int = 200, bias: bool = False) -> Net:
    """Return two hidden ReLU layers of ``width``, with torch's initial weights."""
    layers: list[nn.Module] = [nn.Flatten()]
    for size in (math.prod(input_shape), width):
        layers += [nn.Linear(size, width, bias=bias), nn.ReLU()]
    return Net(nn.Sequential(*layers), nn.Linear(width, num_classes, bias=bias), width)


class OnTokens(nn.Module):
    """Two one-hot operands ``(N, 2 p)`` and an equals sign, read by an encoder: its last output ``(N, D)``."""

    def __init__(self, p: int, encoder: nn.TransformerEncoder, width: int) -> None:
        super().__init__()
        self.p = p
        self.embedding = nn.Embedding(p + 1, width)
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        operands = x.reshape(-1, 2, self.p) @ self.embedding.weight[: self.p]
        equals = self.embedding.weight[self.p].expand(len(x), 1, -1)
        read: Tensor = self.encoder(torch.cat([operands, equals], 1))
        return read[:, -1]


def transformer(
    input_shape: Shape, num_classes: int, *, width: int = 128, heads: int = 4, feedforward: int = 2048
) -> Net:
    """Return the paper's transformer: one layer of torch's encoder, no positions, read at the last token."""
    (inputs,) = input_shape
    require(
        inputs == 2 * num_classes,
        f"This transformer reads two one-hot operands below {num_classes} and the inputs have {inputs} numbers; "
        "choose a modular data set.",
    )
    layer = nn.TransformerEncoderLayer(width, heads, feedforward, batch_first=True)
    body = OnTokens(num_classes, nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), width)
    return Net(body, nn.Linear(width, num_classes), width)


def diagnosis(finished: Finished) -> dict[str, float]:
    """Return what the run came to: when it generalised, what collapsed and when, and which way the gradient points.

    Epochs are of the evaluation grid; one that never came is the number of epochs of the run plus a round.
    """
    asked = StabilityParams(**finished.simulation.strategy.options)
    local, records = finished.simulation.local, finished.records
    model, train = finished.model, finished.dataset.train
    x, y = finished.dataset.prepare(train.inputs), train.labels
    each = local.steps_per_round(len(y)) // local.batches_per_epoch(len(y))
    never = (finished.simulation.federation.rounds + 1) * each
    server = [(r.round * each, r.metrics) for r in records if r.phase == SERVER]
    trained = [(r.round * each, r.metrics) for r in records if COLLAPSED in r.metrics]

    def first(rows: Sequence[tuple[int, Mapping[str, Any]]], name: str, above: float) -> float:
        return float(next((epoch for epoch, found in rows if found[name] > above), never))

    outputs = model(x)
    dtype = dtype_of(asked.precision)
    value = LOSSES[asked.loss](outputs, y, dtype)
    weights = [p for p in model.parameters() if p.ndim == 2]
    gradients = torch.autograd.grad(value, weights)
    cosines = [
        float(-(w.detach() * g).sum() / (w.detach().norm() * g.norm()).clamp(min=1e-30))
        for w, g in zip(weights, gradients, strict=True)
    ]
    return {
        "grokked-at": first(server, "accuracy", GROKKED),
        "collapsed-at": first(trained, COLLAPSED, 0.05),
        "collapsed": float(collapsed(outputs, dtype).float().mean()),
        # What a softmax in float32 would say of the same logits, whatever the loss was.
        "softmax-collapsed": float(collapsed(outputs, torch.float32).float().mean()),
        "train-accuracy": float((outputs.argmax(-1) == y).float().mean()),
        "largest-logit": float(outputs.detach().abs().max()),
        "norm": float(torch.cat([w.detach().flatten() for w in weights]).norm()),
        **{f"cosine-{i}": c for i, c in enumerate(cosines, start=1)},
    }
