"""What the reproduction of global magnitude pruning runs on, and what it measures."""

from __future__ import annotations

from torch import nn

from flowerbed.models.base import Net, Shape, classifier
from flowerbed.models.layers import GlobalMean, conv3x3, image_shape
from flowerbed.models.resnet import BasicBlock


def thin_resnet(input_shape: Shape, num_classes: int) -> Net:
    """Return ResNet-8 with batch norm whose first convolution halves the image: a quarter of the work."""
    channels, *_ = image_shape("thin_resnet", input_shape, 8)
    body = nn.Sequential(
        conv3x3(channels, 16, 2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        BasicBlock(16, 16, 1, "A", "bn", 1),
        BasicBlock(16, 32, 2, "A", "bn", 1),
        BasicBlock(32, 64, 2, "A", "bn", 1),
        GlobalMean(),
    )
    return classifier(body, 64, num_classes)


def bottleneck(
    input_shape: Shape, num_classes: int, *, scale: float = 0.3, widths: tuple[int, ...] = (32, 64)
) -> Net:
    """Return a network that a global threshold can cut through: a convolution of 4 channels, small at the start.

    ``scale`` multiplies the initial weights of that layer, whose size batch norm hides.
    """
    channels, *_ = image_shape("bottleneck", input_shape, 8)
    layers: list[nn.Module] = []
    for following, stride in ((widths[0], 2), (4, 1), (widths[1], 2), (widths[1], 1)):
        convolution = nn.Conv2d(channels, following, 3, stride, padding=1, bias=False)
        if following == 4:
            convolution.weight.data.mul_(scale)
        layers += [convolution, nn.BatchNorm2d(following), nn.ReLU()]
        channels = following
    return classifier(nn.Sequential(*layers, GlobalMean()), channels, num_classes)
