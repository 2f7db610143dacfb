"""Checkpoints of a run: a directory a round, whole or not there, verified when read.

A checkpoint holds the server's side (model, strategy state, round). The clients' side needs no copy: their
store keeps versions by round (``flowerbed.clients.store``) and is rewound to the checkpoint's round.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowerbed.errors import CheckpointError
from flowerbed.storage import TensorGroups, Tensors, load_groups, save_groups

_NAME = re.compile(r"round-(\d{6})")
MODEL_FILE = "model.safetensors"
STRATEGY_FILE = "strategy.safetensors"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """The server's state after a round."""

    round: int
    model: Tensors
    strategy: TensorGroups
    extra: dict[str, Any]
    """Plain JSON: the configuration's identity and the number of records in the metrics log."""


class Checkpoints:
    """The checkpoints under one directory; the newest ``keep`` are kept."""

    def __init__(self, root: str | os.PathLike[str], keep: int = 2) -> None:
        self.root = Path(root)
        self.keep = keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint so that a killed process or a full disk leaves the older ones untouched.

        Raises ``CheckpointError`` (for example no space left) after removing the half-written directory.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        final = self.root / f"round-{checkpoint.round:06d}"
        partial = self.root / f".partial-{checkpoint.round:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            save_groups(partial / MODEL_FILE, {"model": checkpoint.model})
            save_groups(partial / STRATEGY_FILE, checkpoint.strategy)
            manifest = {
                "round": checkpoint.round,
                "extra": checkpoint.extra,
                "sha256": {name: _digest(partial / name) for name in (MODEL_FILE, STRATEGY_FILE)},
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for name in (MODEL_FILE, STRATEGY_FILE, MANIFEST, "."):
                _sync(partial / name)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"The checkpoint of round {checkpoint.round} cannot be written under {self.root}: {error}. "
                    "Make room there, then resume the run; older checkpoints are untouched."
                ) from error
            raise
        _sync(self.root)
        for old in self.rounds()[: -self.keep]:
            shutil.rmtree(self.root / f"round-{old:06d}", ignore_errors=True)
        return final

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(int(m[1]) for p in self.root.iterdir() if (m := _NAME.fullmatch(p.name)))

    def load(self, round_: int) -> Checkpoint:
        """Read one checkpoint; raises ``CheckpointError`` naming the file that is damaged."""
        folder = self.root / f"round-{round_:06d}"
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            for name, digest in manifest["sha256"].items():
                if _digest(folder / name) != digest:
                    raise CheckpointError(
                        f"The checkpoint file {folder / name} is damaged (checksum differs)."
                    )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"The checkpoint {folder} cannot be read: {error}.") from error
        model = load_groups(folder / MODEL_FILE)["model"]
        return Checkpoint(manifest["round"], model, load_groups(folder / STRATEGY_FILE), manifest["extra"])

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that is whole (None if there is none) and what was skipped and why."""
        skipped: list[str] = []
        for round_ in reversed(self.rounds()):
            try:
                return self.load(round_), skipped
            except CheckpointError as error:
                skipped.append(str(error))
        return None, skipped

    def resumable(self, identity: str) -> Checkpoint:
        """Return the newest whole checkpoint.

        Raises ``CheckpointError`` if there is none, or if it was made with another configuration.
        """
        checkpoint, skipped = self.newest()
        if checkpoint is None:
            found = f" ({' '.join(skipped)})" if skipped else ""
            raise CheckpointError(f"No usable checkpoint under {self.root}{found}; start anew.")
        if checkpoint.extra["identity"] != identity:
            raise CheckpointError(
                f"The checkpoint in {self.root} belongs to another configuration; resume with the "
                "configuration it was made with, or choose another run.dir."
            )
        return checkpoint


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
