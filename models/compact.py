"""Channels that are exactly zero, taken out: the smaller model that structured sparsity promises.

Which layers share a channel (a residual sum, a batch norm, the inputs of what follows) is read off the model's graph by
torch-pruning (Fang et al., "DepGraph", CVPR 2023). A channel goes if everything that writes it is exactly zero: filters
or rows with their biases, scale and shift of their normalisation.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowerbed.errors import ConfigError
from flowerbed.models.info import ModelInfo

if TYPE_CHECKING:
    from torch_pruning import DependencyGraph
    from torch_pruning.dependency import Group

ATOL, RTOL = 1e-4, 1e-3
"""How far the outputs may be off: sums over fewer channels are taken in another order."""


def compacted(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy in evaluation mode without the channels that are exactly zero; its outputs are the same.

    ``x`` ``(N, ...)`` are some prepared inputs on the model's device: with them the graph is read and the outputs are
    compared. Every layer keeps a channel, and the head every output. Raises ``ConfigError`` without torch-pruning, for
    models whose graph cannot be read, and where the outputs change: what follows a channel of zeros may not make
    anything else of it, as a sigmoid or the statistics of a group norm do.
    """
    try:
        from torch_pruning import DependencyGraph
    except ImportError as error:
        raise ConfigError(
            f"Taking channels out needs torch-pruning ({error}): pip install 'flowerbed[sparsity]'."
        ) from error
    small = copy.deepcopy(model).eval().requires_grad_(True)
    with torch.no_grad():
        expected = small(x)
    try:
        graph = DependencyGraph().build_dependency(small, example_inputs=x)
        heads = {small.get_submodule(name.rpartition(".")[0]) for name in ModelInfo.of(small).head}
        # All groups are known before the first one changes the model.
        for group in list(graph.get_all_groups(ignored_layers=list(heads))):
            root = group[0].dep
            zero = (~_alive(graph, group)).nonzero().flatten().tolist()
            if zero:
                graph.get_pruning_group(root.target.module, root.handler, zero).prune()
        with torch.no_grad():
            found = small(x)
    except Exception as error:
        # Reading a graph, or running what was cut wrongly, fails with errors of every kind.
        raise ConfigError(
            f"The channels of {type(model).__name__} cannot be taken out: {type(error).__name__}: {error}. "
            "Take the model whole."
        ) from error
    if not torch.allclose(found, expected, atol=ATOL, rtol=RTOL):
        difference = float((found - expected).abs().max())
        raise ConfigError(
            f"Without its zero channels {type(model).__name__} computes something else (by up to {difference:.3g}): "
            "what follows a channel has to be zero where the channel is. Take the model whole."
        )
    return small


def _alive(graph: DependencyGraph, group: Group) -> Tensor:
    """Return which channels ``(C,)`` of a group something writes; at least one of them."""
    alive = torch.zeros(len(group[0].idxs), dtype=torch.bool)
    for item in group:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            # Added or multiplied by itself, which is no layer: nothing says that zero stays zero.
            return torch.ones_like(alive)
        if graph.is_out_channel_pruning_fn(item.dep.handler):
            for weight in module.parameters(recurse=False):
                writes = weight.detach().flatten(1).ne(0).any(1) if weight.ndim > 1 else weight.detach() != 0
                alive[torch.tensor(item.root_idxs)] |= writes.cpu()[torch.tensor(item.idxs)]
    alive[0] |= ~alive.any()
    return alive
