"""The small convolutional networks of the federated literature.

Where the papers write pool(relu(x)) the layers here are relu(pool(x)): the two commute, also in their
gradients, and the second rectifies a quarter of the values. What follows the last pool acts on flat features, so that
values and their gradients have one memory order.
"""

from __future__ import annotations

from torch import nn

from flowerbed.errors import ConfigError, unknown_name
from flowerbed.models.base import Net, Shape, classifier
from flowerbed.models.layers import ChannelsLast, MaxPool, image_shape, norm

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "leaky_relu": nn.LeakyReLU}
"""Those without a kink that hides the second derivative, or with a small one."""


def lenet5(input_shape: Shape, num_classes: int) -> Net:
    """Return LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, as it is used today.

    As in the paper, smaller images are centred in 32x32 zeros. 61,706 parameters for 28x28x1, 10 classes.
    """
    channels, height, width = image_shape("lenet5", input_shape)
    missing_h, missing_w = max(32 - height, 0), max(32 - width, 0)
    margins = (missing_w // 2, missing_w - missing_w // 2, missing_h // 2, missing_h - missing_h // 2)
    pooled_h, pooled_w = (((max(side, 32) - 4) // 2 - 4) // 2 for side in (height, width))
    body = ChannelsLast(
        nn.ZeroPad2d(margins),
        nn.Conv2d(channels, 6, 5),
        MaxPool(),
        nn.ReLU(),
        nn.Conv2d(6, 16, 5),
        MaxPool(),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(16 * pooled_h * pooled_w, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
    )
    return classifier(body, 84, num_classes)


def dlg_lenet(input_shape: Shape, num_classes: int, activation: str = "sigmoid", uniform: float = 0.5) -> Net:
    """Return three 5x5 convolutions of 12 channels (strides 2, 2, 1) and no pooling: the victim of gradient inversion.

    With sigmoids and weights drawn from [-0.5, 0.5] it is the LeNet of Zhu et al. 2019 (Deep Leakage from Gradients):
    twice differentiable, so that its gradients tell everything. ``activation``: sigmoid or leaky_relu; ``uniform``: the
    bound of all initial weights and biases, 0 keeps PyTorch's.
    """
    channels, height, width = image_shape("dlg_lenet", input_shape)
    if activation not in ACTIVATIONS:
        raise ConfigError(unknown_name("activation of model 'dlg_lenet'", activation, ACTIVATIONS))
    if uniform < 0:
        raise ConfigError(f"Option uniform={uniform} of model 'dlg_lenet' must be 0 (PyTorch's own) or more.")
    layers: list[nn.Module] = []
    for before, stride in ((channels, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(before, 12, 5, stride, padding=2), ACTIVATIONS[activation]()]
    features = 12 * -(-height // 4) * -(-width // 4)
    net = classifier(nn.Sequential(*layers, nn.Flatten()), features, num_classes)
    if uniform:
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -uniform, uniform)
    return net


def leaf_cnn(input_shape: Shape, num_classes: int) -> Net:
    """Return the CNN of McMahan et al. 2017 and of LEAF's FEMNIST (Caldas et al. 2018).

    1,663,370 parameters for 28x28x1 and 10 classes.
    """
    channels, height, width = image_shape("leaf_cnn", input_shape, 4)
    body = ChannelsLast(
        nn.Conv2d(channels, 32, 5, padding=2),
        MaxPool(),
        nn.ReLU(),
        nn.Conv2d(32, 64, 5, padding=2),
        MaxPool(),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
    )
    return classifier(body, 512, num_classes)


def pfl_cnn(input_shape: Shape, num_classes: int) -> Net:
    """Return the CIFAR-10 CNN of Reddi et al. 2021 and of the pfl-research benchmarks (Granqvist et al. 2024).

    1,626,442 parameters for 32x32x3 and 10 classes.
    """
    channels, height, width = image_shape("pfl_cnn", input_shape, 6)
    body = ChannelsLast(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        MaxPool(),
        nn.Flatten(),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128),
        nn.ReLU(),
        nn.Dropout(0.5),
    )
    return classifier(body, 128, num_classes)


def small_cnn(input_shape: Shape, num_classes: int, *, groups: int = 8) -> Net:
    """Return two convolutions with group norm: small enough for 8x8 digits on one core."""
    channels, height, width = image_shape("small_cnn", input_shape, 4)
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((channels, 16), (16, 32)):
        layers += [
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            norm("gn", channels_out, groups),
            MaxPool(),
            nn.ReLU(),
        ]
    features = 32 * (height // 4) * (width // 4)
    return classifier(nn.Sequential(*layers, nn.Flatten()), features, num_classes)
