"""How the fast engine computes dense layers on this processor: measured once, then remembered.

torch sends small float32 products to its BLAS, which is not the fastest way for every size and processor. What
was measured is kept in flowerbed's cache folder, by processor, torch and threads, so that later runs on this
machine, and all workers of a run, do the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.params import LocalParams
from flowerbed.datasets.cache import default_cache_dir
from flowerbed.machine import processor
from flowerbed.models.fast import Route, onednn_linear

Routes = Mapping[tuple[int, int], Route]
"""By the shape of a dense layer's weight, (outputs, inputs)."""

LARGE = 2**16
"""Weights of a layer from which it is worth a look: below, any other way costs more to call than it saves."""
WHOLE = 64
"""Rows to measure with where the batch is all of a client's data."""
REPEATS = 15
GAIN = 0.95
"""Share of the default's time below which the other way is taken, so that noise does not decide."""
CACHE_WORDS = 2**21
"""Numbers written between two measurements, as many as push a layer's weight out of a core's own cache."""


def find_routes(model: nn.Module, local: LocalParams, folder: Path | None = None) -> Routes:
    """Return the routes of the large dense layers of ``model`` for batches of ``local.batch_size`` samples.

    What ``folder`` (by default flowerbed's cache) does not know yet is measured, in some tens of milliseconds a
    layer, and kept there if it can be written. Other layers have no route; none has one on a GPU.
    """
    rows = local.batch_size or WHOLE
    shapes = {
        (m.out_features, m.in_features)
        for m in model.modules()
        if type(m) is nn.Linear
        and m.weight.numel() >= LARGE
        and m.weight.dtype == torch.float32
        and m.weight.device.type == "cpu"
    }
    if not shapes:
        return {}
    path = (folder or default_cache_dir()) / "engine" / f"{_machine()}.json"
    known = _read(path)
    missing = {shape for shape in shapes if _key(shape, rows) not in known}
    for shape in sorted(missing):
        known[_key(shape, rows)] = measure(*shape, rows)
    if missing:
        _write(path, known)
    return {shape: known[_key(shape, rows)] for shape in shapes}


def measure(outputs: int, inputs: int, rows: int) -> Route:
    """Return the faster way for each product of such a layer."""
    if not has_onednn():
        return Route()
    generator = torch.Generator().manual_seed(0)
    w, x, g, b = (
        torch.randn(shape, generator=generator)
        for shape in ((outputs, inputs), (rows, inputs), (rows, outputs), (outputs,))
    )
    return Route(
        output=_faster(lambda: onednn_linear(x, w, b), lambda: F.linear(x, w, b)),
        input_gradient=_faster(lambda: onednn_linear(g, w.t(), None), lambda: g @ w),
    )


def has_onednn() -> bool:
    """Return whether this torch has oneDNN's dense layer."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def describe(routes: Routes) -> str:
    """Return the routes in words."""
    if not routes:
        return "no dense layer is large enough for another way than torch's"
    ways = []
    for (outputs, inputs), route in sorted(routes.items()):
        through = [name for name, chosen in asdict(route).items() if chosen]
        ways.append(
            f"{inputs}x{outputs} " + (f"through oneDNN ({', '.join(through)})" if through else "as torch")
        )
    return "dense layers: " + "; ".join(ways)


def _faster(other: Callable[[], Tensor], default: Callable[[], Tensor]) -> bool:
    times: tuple[list[float], list[float]] = ([], [])
    cache = torch.zeros(CACHE_WORDS)
    with torch.no_grad():
        for function in (other, default):
            function()
        for _ in range(REPEATS):
            for function, found in zip((other, default), times, strict=True):
                cache.add_(1.0)
                begin = time.process_time()
                function()
                found.append(time.process_time() - begin)
    return statistics.median(times[0]) < GAIN * statistics.median(times[1])


def _machine() -> str:
    """Return what the fastest way depends on, as a file name."""
    name = processor() + torch.backends.cpu.get_cpu_capability()
    facts = (platform.machine(), name, torch.__version__, torch.get_num_threads())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _key(shape: tuple[int, int], rows: int) -> str:
    return "x".join(map(str, (*shape, rows)))


def _read(path: Path) -> dict[str, Route]:
    try:
        return {key: Route(**route) for key, route in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        # None yet, or not ours: measured anew.
        return {}


def _write(path: Path, known: Mapping[str, Route]) -> None:
    """Replace the file as a whole, so that another process reads the old or the new one."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump({key: asdict(route) for key, route in sorted(known.items())}, file)
        os.replace(name, path)
