"""``flowerbed explain``: how a run would be computed, and why, without running it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord

from flowerbed import messages
from flowerbed.clients.app import Worker
from flowerbed.clients.store import DiskStore
from flowerbed.errors import ConfigError
from flowerbed.experiments.composition import compose_simulations
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.experiments.progress import waiting
from flowerbed.experiments.simulation import make_federation, open_grid
from flowerbed.pooling import blocks
from flowerbed.server.grids.base import SimulationGrid
from flowerbed.server.loop import Federation

USAGE = """\
usage: flowerbed explain [KEY=VALUE ...]

Say how a run with these settings would be computed (see: flowerbed simulate --help), and why. The data are
loaded and, where clients may be computed together, the kernels are measured; nothing is trained or written.
"""


def explain(arguments: Sequence[str], as_json: bool = False) -> int:
    """Print how the run that ``arguments`` describe would be computed; return the exit code."""
    if any(text in ("-h", "--help") for text in arguments):
        print(USAGE, end="")
        return 0
    flags = [text for text in arguments if text.startswith("-")]
    if flags:
        raise ConfigError(f"explain knows no flag {flags[0]}; give settings, KEY=VALUE.")
    (simulation,) = compose_simulations(arguments)
    with waiting("loading data and measuring kernels"):
        found = decisions(build_parts(simulation))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        width = max(map(len, found))
        print("\n".join(f"{name.ljust(width)}  {sentence}" for name, sentence in found.items()))
    return 0


def decisions(parts: Parts) -> dict[str, str]:
    """Return what was decided for a run, a sentence each."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_grid(parts, DiskStore(Path(folder))) as grid,
    ):
        federation = make_federation(parts, grid)
        federation.strategy.phase = next(
            phase for phase in federation.strategy.phases(1) if phase.message_type == "train"
        )
        refusal = federation.pooling_refusal()
        found = {"sampling": _sampling(parts), "grid": _grid(parts, type(grid).__name__)}
        if refusal is None:
            found["exchange"] = (
                "pooled: replies come back as sums, the same bits as one message from each client"
            )
            found["engine"] = _engine(parts, federation)
        else:
            found["exchange"] = f"messages: {refusal}"
            found["engine"] = "generic: one client at a time, because replies come back as messages"
    return found


def _sampling(parts: Parts) -> str:
    params = parts.simulation.federation
    return f"{params.sampling}: {params.wanted} of {params.clients} clients a round"


def _grid(parts: Parts, kind: str) -> str:
    params = parts.simulation.grid
    if kind == "InProcessGrid":
        alone = params.name != "inprocess"
        return "inprocess: clients run in this process" + (", as there is but one" if alone else "")
    where = f"the cluster at {params.address}" if params.address else "this machine"
    return f"ray: {params.workers} workers on {where}, {params.threads} thread(s) each"


def _engine(parts: Parts, federation: Federation) -> str:
    spec = parts.spec
    cohort = parts.simulation.federation.wanted
    size = spec.block_size(cohort, getattr(federation.grid, "parallel", False))
    cut = f"{len(blocks(cohort, size))} blocks of up to {size} clients"
    refusal = spec.engine_refusal()
    if refusal is not None:
        return f"generic: {refusal}; {cut} are added up"
    arrays = messages.array_record(federation.model)
    content, nodes = federation.strategy.question(1, arrays, ConfigRecord({}), federation.grid)
    grid = cast(SimulationGrid, federation.grid)
    numbers = [grid.partition_id(node) for node in nodes[:size]]
    plan = Worker(spec).plan(content, numbers)
    assert plan is not None
    kind = "generic" if plan.kernel == "generic" else "cohort"
    together = "" if kind == "generic" else f", kernel {plan.kernel}, {plan.block} clients at once"
    return f"{kind}{together}: {plan.reason}; {cut} are added up"
