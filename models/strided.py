"""A convolutional network without pooling, with a choice of normalisation: the cheapest that learns from colours."""

from __future__ import annotations

from torch import nn

from flowerbed.models import layers
from flowerbed.models.base import Net, Shape, classifier
from flowerbed.models.layers import GlobalMean, image_shape, sequence


def strided_cnn(
    input_shape: Shape,
    num_classes: int,
    *,
    norm: str = "bn",
    widths: tuple[int, ...] = (16, 32, 64),
    groups: int = 8,
) -> Net:
    """Return 3x3 convolutions of stride 2 with normalisation and ReLU, and a mean over positions.

    ``norm`` is bn or gn (``groups`` groups). The features, as many as the last of ``widths``, are never negative.
    """
    channels, *_ = image_shape("strided_cnn", input_shape, 2 ** len(widths))
    modules: list[nn.Module] = []
    for width in widths:
        convolution = nn.Conv2d(channels, width, 3, 2, padding=1, bias=False)
        modules += [convolution, layers.norm(norm, width, groups), nn.ReLU()]
        channels = width
    return classifier(sequence(norm, *modules, GlobalMean()), channels, num_classes)
