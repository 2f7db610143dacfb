"""Models without convolutions: they take any input shape and flatten it."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from flowerbed.models.base import Net, Shape, classifier, require_at_least_one


def linear(input_shape: Shape, num_classes: int, *, softmax: bool = False) -> Net:
    """Return multinomial logistic regression; its features are the flattened input.

    ``softmax`` ends it in one, so that a cross entropy applies it twice: a defect of released code, for comparison.
    """
    net = classifier(nn.Flatten(), math.prod(input_shape), num_classes)
    return Net(net.body, nn.Sequential(net.head, nn.Softmax(-1)), net.feature_dim) if softmax else net


def mlp(input_shape: Shape, num_classes: int, *, hidden: tuple[int, ...] = (200,)) -> Net:
    """Return a ReLU network with layers of ``hidden`` units.

    ``hidden=(200, 200)`` is the 2NN of McMahan et al. 2017.
    """
    require_at_least_one("mlp", hidden=min(hidden, default=0))
    widths = (math.prod(input_shape), *hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return classifier(nn.Sequential(*layers), widths[-1], num_classes)
