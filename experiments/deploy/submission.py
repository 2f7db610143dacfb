"""What is submitted to the server: one run, described in its directory before anything starts."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowerbed.errors import CheckpointError, ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.server.checkpoint import Checkpoints
from flowerbed.storage import atomic_write

ROOT = "FLOWERBED_DEPLOYMENT"
"""Environment variable of the server with the deployment's folder; ``flowerbed deploy server`` sets it."""
FILE = "flower.json"


def unique_name(name: str) -> str:
    """Return a name for devices to keep state under that no other run ever had, also where a folder was emptied."""
    return f"{name}.{secrets.token_hex(4)}"


def folder_name(unique: str) -> str:
    """Return the name of a run's folder, given what ``unique_name`` made of it."""
    return unique.rpartition(".")[0]


@dataclass(frozen=True)
class Submission:
    """One run of a deployment."""

    simulation: Simulation
    expectations: str
    """What devices are told, as JSON; it stays the same when the run goes on."""
    run_ids: tuple[int, ...] = ()
    """Flower's ids of the attempts, oldest first."""
    further_rounds: int = 0
    """Rounds beside those of training, for statistics."""
    secret: int = field(default_factory=lambda: secrets.randbits(128))
    """The seed of the server's noise, which devices must not know; kept, because a round that is run again must not
    be given out with other noise."""

    @classmethod
    def read(cls, directory: Path) -> Submission:
        """Read what ``write`` wrote; raises ``ConfigError`` if there is nothing of the kind."""
        try:
            plain = json.loads((directory / FILE).read_text())
            return cls(
                Simulation.of(plain["simulation"]),
                plain["expectations"],
                tuple(plain["run_ids"]),
                plain["further_rounds"],
                plain["secret"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{directory} holds no run of this deployment: {error}.") from error

    @property
    def rounds(self) -> int:
        """All rounds of the run."""
        return self.simulation.federation.rounds + self.further_rounds

    def write(self, directory: Path) -> None:
        """Write the submission into the run's directory."""
        plain: dict[str, Any] = {
            "simulation": self.simulation.plain(),
            "expectations": self.expectations,
            "run_ids": list(self.run_ids),
            "further_rounds": self.further_rounds,
            "secret": self.secret,
        }
        atomic_write(directory / FILE, json.dumps(plain, indent=1).encode(), durable=True)

    def attempted(self, run_id: int) -> Submission:
        """Return the submission with one more attempt."""
        return replace(self, run_ids=(*self.run_ids, run_id))

    @staticmethod
    def begun(directory: Path) -> bool:
        """Return whether there is a checkpoint to go on from.

        Where a first attempt ended before one, its remains are removed: the run starts anew under the same name, and
        devices that have trained for it already do so again, to the same bits.
        """
        checkpoint, _ = Checkpoints(directory / "checkpoints").newest()
        if checkpoint is not None:
            return True
        if (directory / "config.yaml").exists():
            for name in ("config.yaml", "metrics.jsonl", "summary.json"):
                try:
                    (directory / name).unlink(missing_ok=True)
                except OSError as error:
                    raise CheckpointError(
                        f"{directory / name} cannot be removed: {error.strerror}."
                    ) from error
        return False
