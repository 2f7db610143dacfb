"""Other weights in the resident model: the frozen models that a loss compares with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from flowerbed.models.parts import ModelParts


@contextmanager
def teacher(model: ModelParts, tensors: Mapping[str, Tensor]) -> Iterator[ModelParts]:
    """Give the model with the parameters and buffers ``tensors``, by name, to compare with.

    Inside, nothing is differentiated, batch norm uses its running statistics and dropout is off, so that a
    teacher is a function of its weights alone and draws no random number. Afterwards every module is in the
    mode it was in. Names that are left out keep the model's own tensors.
    """
    modes = [(module, module.training) for module in model.module.modules()]
    model.module.eval()
    try:
        with torch.no_grad():
            yield ModelParts.functional(model.module, tensors, {})
    finally:
        for module, training in modes:
            module.training = training
