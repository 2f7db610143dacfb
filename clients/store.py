"""Per-client state that survives rounds, the death of an actor, and the process.

Every write makes a new *version*, named by the round that wrote it, and a client in round t reads the
newest version below t. So a round that is run again (its worker died, or the whole run was killed and
resumed) reads exactly what it read the first time, and a checkpoint only has to remember its round.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from flowerbed.storage import TensorGroups, load_groups, save_groups

ClientState = TensorGroups
"""Groups of one client: "private", "optimizer", "generator", and a strategy's own."""

_VERSION = re.compile(r"round-(\d+)\.safetensors")
_NOTES = re.compile(r"round-(\d+)\.")
WRITTEN = "written"


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

    Every process notes in ``written/round-T.<process>`` which clients it wrote in round T, before it writes them.
    So pruning looks at the clients of the rounds that have passed, each once, and never at all of them.
    """

    def __init__(self, root: str | os.PathLike[str], *, durable: bool = False) -> None:
        """``durable`` waits until what was written has reached the disk, which survives a loss of power."""
        self.root = Path(root)
        self.durable = durable
        self._notes: tuple[str, int] | None = None
        """The path and the descriptor of the file of notes that this process writes."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_notes": None}

    def _folder(self, client: int) -> Path:
        # Two levels, so that a directory never holds more than about a thousand entries of a million clients.
        return self.root / f"{client // 1000:04d}" / f"{client:07d}"

    def _path(self, client: int, round_: int) -> Path:
        return self._folder(client) / _file(round_)

    def _rounds(self, folder: Path) -> list[int]:
        if not folder.is_dir():
            return []
        return sorted(int(m[1]) for f in os.listdir(folder) if (m := _VERSION.fullmatch(f)))

    def read(self, client: int, before_round: int) -> ClientState:
        folder = self._folder(client)
        rounds = [r for r in self._rounds(folder) if r < before_round]
        return load_groups(folder / _file(rounds[-1])) if rounds else {}

    def write(self, client: int, round_: int, state: ClientState) -> None:
        self._note(client, round_)
        folder = self._folder(client)
        folder.mkdir(parents=True, exist_ok=True)
        save_groups(folder / _file(round_), state, durable=self.durable)

    def rewind(self, to_round: int) -> None:
        for folder in self.root.glob("[0-9]*/*"):
            for round_ in self._rounds(folder):
                if round_ > to_round:
                    (folder / _file(round_)).unlink()
        for notes, round_ in self._noted():
            if round_ > to_round:
                notes.unlink(missing_ok=True)

    def prune(self, keep_round: int) -> None:
        for notes, round_ in self._noted():
            if round_ <= keep_round:
                for client in set(notes.read_text().split()):
                    self._prune_client(int(client), keep_round)
                notes.unlink(missing_ok=True)

    def _prune_client(self, client: int, keep_round: int) -> None:
        folder = self._folder(client)
        rounds = self._rounds(folder)
        oldest = _oldest_needed(rounds, keep_round)
        for round_ in rounds:
            if round_ < oldest:
                (folder / _file(round_)).unlink(missing_ok=True)

    def _note(self, client: int, round_: int) -> None:
        path = str(self.root / WRITTEN / f"{_stem(round_)}.{socket.gethostname()}-{os.getpid()}")
        if self._notes is None or self._notes[0] != path or not os.path.exists(path):
            if self._notes is not None:
                os.close(self._notes[1])
            os.makedirs(self.root / WRITTEN, exist_ok=True)
            self._notes = path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self._notes[1], f"{client}\n".encode())

    def _noted(self) -> list[tuple[Path, int]]:
        """Return the files of notes with their rounds."""
        folder = self.root / WRITTEN
        names = os.listdir(folder) if folder.is_dir() else []
        return [(folder / name, int(m[1])) for name in names if (m := _NOTES.match(name))]


def _stem(round_: int) -> str:
    return f"round-{round_:06d}"


def _file(round_: int) -> str:
    return f"{_stem(round_)}.safetensors"


def _oldest_needed(rounds: Iterable[int], keep_round: int) -> int:
    """Return the newest version up to ``keep_round``: the oldest one that a reader from there on can get."""
    return max((r for r in rounds if r <= keep_round), default=keep_round)


def _from(versions: Mapping[int, ClientState], oldest: int) -> dict[int, ClientState]:
    return {r: s for r, s in versions.items() if r >= oldest}


def _copied(state: ClientState) -> ClientState:
    return {group: {n: t.detach().clone() for n, t in tensors.items()} for group, tensors in state.items()}
