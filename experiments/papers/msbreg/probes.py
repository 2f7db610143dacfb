"""What the reproduction of MSBReg runs on, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import ConfigError
from flowerbed.experiments.measures import Measured
from flowerbed.models.base import Net, Shape
from flowerbed.models.layers import GlobalMean, image_shape
from flowerbed.models.probes import effective_rank, nearest_neighbour_probe, ridge_probe, spread
from flowerbed.models.zoo import draw_net

LABELLED, TESTED = 6000, 5000
"""Images that the probes are fitted to, and judged by."""


def embedder(
    input_shape: Shape,
    num_classes: int,
    *,
    encoder: str = "conv3",
    norm: str = "none",
    d: int = 32,
    hidden: int = 128,
    projector: str = "layer",
    predictor: bool = False,
) -> Net:
    """Return an encoder and a projector to ``d`` dimensions as the body, a predictor or nothing as the head.

    ``encoder``: conv3, three strided convolutions (16, 32, 64 channels) and the mean over positions; or the body of a
    model by name, with ``norm`` bn or gn. ``projector``: the norm of projector and predictor, layer or batch.
    """
    if encoder == "conv3":
        channels, *_ = image_shape("embedder", input_shape, 8)
        layers: list[nn.Module] = []
        for following in (16, 32, 64):
            layers += [nn.Conv2d(channels, following, 3, 2, padding=1), nn.ReLU()]
            channels = following
        features, width = nn.Sequential(*layers, GlobalMean()), channels
    else:
        options = {} if norm == "none" else {"norm": norm}
        net = draw_net(encoder, input_shape, num_classes, **options)
        features, width = nn.Sequential(net.body), net.feature_dim
    if projector not in ("layer", "batch"):
        raise ConfigError(f"Option projector='{projector}' of an embedder must be 'layer' or 'batch'.")

    def mapping(inputs: int) -> nn.Sequential:
        norm = nn.LayerNorm(hidden) if projector == "layer" else nn.BatchNorm1d(hidden)
        return nn.Sequential(nn.Linear(inputs, hidden), norm, nn.ReLU(), nn.Linear(hidden, d))

    return Net(nn.Sequential(features, mapping(width)), mapping(d) if predictor else nn.Identity(), d)


@torch.no_grad()
def embedded(measured: Measured, rows: int, test: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, unit embeddings and labels of the first ``rows`` samples of a split."""
    split = measured.dataset.test if test else measured.dataset.train
    body = measured.model.get_submodule("body")
    assert isinstance(body, nn.Sequential)
    features = []
    for start in range(0, min(rows, len(split)), 500):
        x = split.inputs[start : min(start + 500, rows)].to(measured.device)
        features.append(body[0](measured.dataset.prepare(x)))
    found = torch.cat(features)
    z = F.normalize(body[1](found), dim=1)
    return found.cpu(), z.cpu(), split.labels[: len(found)]


def probed(measured: Measured) -> Mapping[str, float]:
    """Return the accuracies of a ridge and a neighbour probe, and rank (absolute, as a share of d) and spread of z."""
    features, _, labels = embedded(measured, LABELLED, test=False)
    tested, z, wanted = embedded(measured, TESTED, test=True)
    rank = effective_rank(z)
    return {
        "probe": ridge_probe(features, labels, tested, wanted),
        "neighbours": nearest_neighbour_probe(features, labels, tested, wanted),
        "effective-rank": rank,
        "rank-share": rank / z.shape[1],
        "spread": spread(z),
    }
