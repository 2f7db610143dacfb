"""DP-SGD: every step clips the gradients of its examples one by one and adds noise to their sum.

Reference: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, Algorithm 1. With the gradients g_n of B
examples, over all parameters that train together,

    g~ = 1/B (sum_n g_n min(1, C / |g_n|) + N(0, (z C)^2 I)).

Gradients of single examples are Opacus's (Yousefpour et al. 2021): hooks of its own for every kind of layer, functorch
for others. Clipping and noise are here, because steps are those of the one training loop.

What is protected is one example of a client, not the client; the accounting is
``flowerbed.strategies.privacy.ExampleLedger``. Metrics (losses, numbers of samples) and evaluation are not protected.
The noise of a simulation comes from the run's seeded streams; where privacy is meant in earnest the seed must be
secret.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.clients import updates
from flowerbed.clients.defence import Defence, ExamplePrivacy, require_base_loss
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import Evaluation, StepGradients, backpropagate
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import ClientError, ConfigError, require
from flowerbed.models.info import ModelInfo

SAMPLING = ("none", "poisson")


@dataclass(frozen=True)
class DpSgd(Defence):
    """Differential privacy of single examples: gradients clipped one by one, noise on their sum (Abadi et al. 2016)."""

    clip: float = 1.0
    """C, the largest norm of the gradient of one example."""
    noise: float = 1.0
    """z, the standard deviation of the noise on the sum over C; 0 clips only."""
    delta: float = 1e-5
    """Failure probability at which epsilon is reported; should be below one over a client's examples."""
    sampling: str = "none"
    """What accounting assumes of the batches: none, that an example is in one batch of every epoch, which is how they
    are drawn; poisson, independent draws, the customary tighter figure that shuffled batches do not strictly earn."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.clip) and self.clip > 0, f"defence.clip is {self.clip}; give a norm above 0."
        )
        require(
            math.isfinite(self.noise) and self.noise >= 0,
            f"defence.noise is {self.noise}; give 0 (clipping only) or more.",
        )
        require(0 < self.delta < 1, f"defence.delta is {self.delta}; give a probability between 0 and 1.")
        require(
            self.sampling in SAMPLING,
            f"defence.sampling is '{self.sampling}'; choose from {', '.join(SAMPLING)}.",
        )

    @property
    def privacy(self) -> ExamplePrivacy | None:
        return ExamplePrivacy(self.noise, self.delta, self.sampling)

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        found: dict[str, Any] = {"imitation": {"name": "dpsgd", "clip": self.clip}}
        if local.steps == 1 and local.batch_size and not local.momentum:
            # Of the update, in every coordinate.
            found["update_noise"] = local.lr * self.noise * self.clip / local.batch_size
        return found

    def check(self, half: ClientHalf, module: nn.Module, local: LocalParams, dataset: Dataset) -> None:
        library()
        require_base_loss(self, half, "it takes the gradients of single examples")
        mixing = sorted(ModelInfo.of(module).normalisation & {n for n, _ in module.named_buffers()})
        require(
            not mixing,
            f"defence=dpsgd needs gradients of single examples, and batch norm ({mixing[:1]}) mixes them; use a model "
            "without it (model.norm=gn).",
        )
        recurrent = [
            n for n, m in module.named_modules() if isinstance(m, nn.RNNBase | nn.MultiheadAttention)
        ]
        require(
            not recurrent,
            f"defence=dpsgd cannot take the gradients of single examples of {recurrent[:1]}, one of PyTorch's "
            "recurrent or attention layers; choose another model.",
        )
        require(
            not local.replacement,
            "defence=dpsgd counts on an example being in a batch once; local.replacement=true draws it several times.",
        )
        require(
            local.precision == "float32",
            f"defence=dpsgd computes in float32; local.precision={local.precision} does not combine with it.",
        )

    def begin(self, local: LocalRound) -> None:
        generator = local.generator("defence noise")

        def estimate(compute: Evaluation, parameters: Mapping[str, Tensor]) -> StepGradients:
            value, metrics, samples = per_example(local.model, compute, parameters)
            return value, metrics, private(samples, self.clip, self.noise, generator)

        local.estimate = estimate


def per_example(
    module: nn.Module, compute: Evaluation, parameters: Mapping[str, Tensor]
) -> tuple[Tensor, Mapping[str, Tensor], dict[str, Tensor]]:
    """Return the loss of a batch, what it reports, and the gradient of each of its B examples, ``(B, ...)`` by name.

    The loss must be the mean over the batch of what depends on one example each.
    """
    with _observed(module):
        value, metrics, found = backpropagate(compute, parameters)
        samples: dict[str, Tensor] = {}
        count = compute.batch["y"].shape[0]
        for name, parameter in parameters.items():
            own: Any = getattr(parameter, "grad_sample", None)
            if own is None and found[name] is not None:
                raise ClientError(f"the gradients of single examples of '{name}' cannot be taken")
            samples[name] = parameter.new_zeros(count, *parameter.shape) if own is None else own
    return value, metrics, samples


@torch.no_grad()
def private(
    samples: Mapping[str, Tensor], clip: float, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the noisy mean of clipped gradients ``(B, ...)``, by name."""
    squares = [value.flatten(1).double().square().sum(1) for value in samples.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    # An example without any gradient is not divided by 0.
    factors = (clip / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    found = {}
    for name, value in samples.items():
        total = torch.tensordot(factors, value.double(), 1)
        total += updates.gaussian_like(total, noise * clip, generator)
        found[name] = (total / len(norms)).to(value.dtype)
    return found


@contextlib.contextmanager
def _observed(module: nn.Module) -> Iterator[None]:
    """Let backward passes leave ``grad_sample`` at every parameter; afterwards the module is as it was."""
    hooks = library().GradSampleHooks(module, loss_reduction="mean", strict=False)
    # Its convolutions take channels to come first in memory, whatever the strides, and are wrong where they come last.
    hooks.rearrange_grad_samples = functools.partial(_contiguous, hooks.rearrange_grad_samples)
    try:
        with warnings.catch_warnings():
            # Of the first layer, whose input needs no gradient; its parameters' are all that is wanted.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        hooks.cleanup()
        for part in module.modules():
            for name in ("activations", "max_batch_len"):
                part.__dict__.pop(name, None)


def _contiguous(
    rearranged: Callable[..., tuple[list[Tensor], Tensor]], **given: Any
) -> tuple[list[Tensor], Tensor]:
    activations, gradients = rearranged(**given)
    return [value.contiguous() for value in activations], gradients.contiguous()


def library() -> Any:
    """Return Opacus's module of gradient hooks, imported on first use; ``ConfigError`` says how to install it."""
    try:
        return import_module("opacus.grad_sample")
    except ImportError as error:
        raise ConfigError(
            "defence=dpsgd takes gradients of single examples with Opacus; install it with pip install "
            "'flowerbed[privacy]'."
        ) from error
