"""The process of one contestant: ``python -m flowerbed.experiments.benchmarks.contestant SPECIFICATION``.

The specification is JSON: ``kind`` and what that kind needs. Kept apart from the contestants themselves so that
each process imports only its own.
"""

from __future__ import annotations

import cProfile
import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from flowerbed.experiments.benchmarks.gate import Finished, Gate, private_replies


def run(gate: Gate, specification: Mapping[str, Any]) -> dict[str, Any]:
    """Run the contestant of ``specification`` until it or the gate ends it; return what it has to say."""
    kind = specification["kind"]
    if kind in ("flowerbed", "central"):
        from flowerbed.experiments.benchmarks.competitors import flowerbed_side

        side = flowerbed_side.run if kind == "flowerbed" else flowerbed_side.central
        return side(gate, specification["settings"])
    folder, model, device = Path(specification["folder"]), specification["model"], specification["device"]
    if kind == "pfl":
        from flowerbed.experiments.benchmarks.competitors import pfl_side

        return pfl_side.run(gate, folder, model, device)
    if kind == "flower":
        from flowerbed.experiments.benchmarks.competitors import flower_side

        return flower_side.run(gate, folder, model, specification["workers"])
    from flowerbed.experiments.benchmarks.competitors import plain

    return plain.run(gate, folder, model, device, averaging=kind == "averaging")


def main() -> int:
    """Run the contestant that the command line describes."""
    specification = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    synchronise: Callable[[], None] | None = None
    if specification.get("device") == "cuda":
        synchronise = torch.cuda.synchronize
    gate = Gate(
        private_replies(),
        profile=cProfile.Profile() if "profile" in specification else None,
        unseen=specification.get("profile", 0),
        tree=specification.get("tree", False),
        limit=specification.get("limit", 0),
        synchronise=synchronise,
    )
    try:
        facts = run(gate, specification)
    except Finished:
        facts = {}
    gate.end(**facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
