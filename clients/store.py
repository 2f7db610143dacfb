"""Per-client state that survives rounds, the death of an actor, and the process.

Every write makes a new *version*, named by the round that wrote it, and a client in round t reads the
newest version below t. So a round that is run again (its worker died, or the whole run was killed and
resumed) reads exactly what it read the first time, and a checkpoint only has to remember its round.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from flowerbed.storage import TensorGroups, load_groups, save_groups

ClientState = TensorGroups
"""Groups of one client: "private", "optimizer", "generator", and a strategy's own."""

_VERSION = re.compile(r"round-(\d+)\.safetensors")


class ClientStore(Protocol):
    """Where the state of clients is kept; one instance serves all clients of a run."""

    def read(self, client: int, before_round: int) -> ClientState:
        """Return the newest state of ``client`` written in a round below ``before_round``; {} if none."""

    def write(self, client: int, round_: int, state: ClientState) -> None:
        """Keep ``state`` as the version of ``round_``; an earlier version of that round is replaced."""

    def rewind(self, to_round: int) -> None:
        """Forget every version written after ``to_round``."""

    def prune(self, keep_round: int) -> None:
        """Forget the versions that no run resumed at ``keep_round`` or later can read."""


class MemoryStore:
    """Versions in this process's memory: for runs without a directory."""

    def __init__(self) -> None:
        self._versions: dict[int, dict[int, ClientState]] = {}

    def read(self, client: int, before_round: int) -> ClientState:
        versions = self._versions.get(client, {})
        rounds = [r for r in versions if r < before_round]
        return _copied(versions[max(rounds)]) if rounds else {}

    def write(self, client: int, round_: int, state: ClientState) -> None:
        versions = self._versions.setdefault(client, {})
        versions[round_] = _copied(state)
        self._versions[client] = _from(versions, _oldest_needed(versions, round_ - 1))

    def rewind(self, to_round: int) -> None:
        for client, versions in self._versions.items():
            self._versions[client] = {r: s for r, s in versions.items() if r <= to_round}

    def prune(self, keep_round: int) -> None:
        for client, versions in self._versions.items():
            self._versions[client] = _from(versions, _oldest_needed(versions, keep_round))


class DiskStore:
    """One safetensors file a client and version under ``root``; safe to share between processes.

    Picklable: an actor opens the same directory. Files are written beside their final name and renamed,
    so a killed process leaves a whole version or none.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def _folder(self, client: int) -> Path:
        # Two levels, so that a directory never holds more than about a thousand entries of a million clients.
        return self.root / f"{client // 1000:04d}" / f"{client:07d}"

    def _rounds(self, folder: Path) -> list[int]:
        if not folder.is_dir():
            return []
        return sorted(int(m[1]) for f in os.listdir(folder) if (m := _VERSION.fullmatch(f)))

    def read(self, client: int, before_round: int) -> ClientState:
        folder = self._folder(client)
        rounds = [r for r in self._rounds(folder) if r < before_round]
        return load_groups(folder / _file(rounds[-1])) if rounds else {}

    def write(self, client: int, round_: int, state: ClientState) -> None:
        folder = self._folder(client)
        folder.mkdir(parents=True, exist_ok=True)
        save_groups(folder / _file(round_), state)

    def rewind(self, to_round: int) -> None:
        for folder in self.root.glob("*/*"):
            for round_ in self._rounds(folder):
                if round_ > to_round:
                    (folder / _file(round_)).unlink()

    def prune(self, keep_round: int) -> None:
        for folder in self.root.glob("*/*"):
            rounds = self._rounds(folder)
            for round_ in rounds:
                if round_ < _oldest_needed(rounds, keep_round):
                    (folder / _file(round_)).unlink()


def _file(round_: int) -> str:
    return f"round-{round_:06d}.safetensors"


def _oldest_needed(rounds: Iterable[int], keep_round: int) -> int:
    """Return the newest version up to ``keep_round``: the oldest one that a reader from there on can get."""
    return max((r for r in rounds if r <= keep_round), default=keep_round)


def _from(versions: Mapping[int, ClientState], oldest: int) -> dict[int, ClientState]:
    return {r: s for r, s in versions.items() if r >= oldest}


def _copied(state: ClientState) -> ClientState:
    return {group: {n: t.detach().clone() for n, t in tensors.items()} for group, tensors in state.items()}
