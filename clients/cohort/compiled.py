"""One step of many clients as compiled code: ``torch.compile``, which on a GPU replays it as one CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

LOG = logging.getLogger(__name__)
SHAPES = 4
"""For how many shapes of its arguments a function is compiled; each costs seconds. Others run as they are."""
RECOMPILATIONS = 64
"""How often a process may compile the same lines of code: once for every model, loss and shape."""


class Compiled:
    """A function of tensors that gives what it gives, compiled where it can be.

    What it returns is to be used up before the next call: a CUDA graph writes to the same place again.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self._function, self._graphs = function, device.type == "cuda"
        mode = "reduce-overhead" if self._graphs else "default"
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
        self._shapes: set[object] = set()
        self.refused: str | None = None
        """Why it could not be compiled, once that is known."""

    def __call__(self, *arguments: Any) -> Any:
        shapes = _shapes(arguments)
        known = shapes in self._shapes
        if self.refused is not None or not (known or len(self._shapes) < SHAPES):
            return self._function(*arguments)
        try:
            found = self._run(arguments)
        except Exception as error:
            if known:
                raise
            found = self._function(*arguments)  # Raises what is no fault of the compiler.
            lines = str(error).strip().splitlines() or [""]
            self.refused = f"{type(error).__name__}: {lines[0][:200]}"
            LOG.warning(
                "cohort engine: torch.compile cannot compile this loss (%s); it runs as it is.", self.refused
            )
        self._shapes.add(shapes)
        return found

    def _run(self, arguments: tuple[Any, ...]) -> Any:
        # Here, since it takes as long to import as all the rest of torch.
        from torch._dynamo import config

        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with config.patch(recompile_limit=RECOMPILATIONS):
            return self._compiled(*arguments)


def _shapes(arguments: tuple[Any, ...]) -> object:
    """Return shapes and types of all tensors in the arguments."""
    leaves = pytree.tree_leaves(arguments)
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor))
