"""Makes a prior that comes with the package from a run: ``python -m flowerbed.experiments.leakage.ship RUN NAME``.

Only the averaged generator is kept; the header of the file holds the run's configuration hash, seed and versions, so
that what made it can be repeated and compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save

from flowerbed.errors import ConfigError
from flowerbed.storage import atomic_write
from flowerbed.strategies.attacks.generative import AVERAGE, WEIGHTS

MOST_BYTES = 2 * 2**20


def ship(run: Path, name: str, folder: Path = WEIGHTS) -> Path:
    """Write ``folder``/``name``.safetensors; raises ``ConfigError`` if it would be larger than 2 MiB."""
    kept = {
        n.removeprefix(AVERAGE): v
        for n, v in load_file(run / "model.safetensors").items()
        if n.startswith(AVERAGE)
    }
    summary = json.loads((run / "summary.json").read_text())
    told = {key: str(summary[key]) for key in ("config_hash", "seed", "rounds", "versions")}
    data = save({n: v.contiguous() for n, v in kept.items()}, metadata=told)
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{name} has {len(data):,} bytes, too many for the package; give users its recipe.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    atomic_write(path, data)
    return path


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), sys.argv[2]))
