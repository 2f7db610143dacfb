"""What a device keeps on its own disk: the client's state of every run, and what its quotas have counted.

Every message may be answered by a process of its own, and the device may lose power at any time; so nothing is in
memory alone, and a file is replaced only by a whole new one that has reached the disk.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hmac
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowerbed.clients.device_config import MEGABYTE, Quotas
from flowerbed.clients.store import ClientState, DiskStore
from flowerbed.errors import ClientError, ConfigError
from flowerbed.storage import atomic_write

RUNS = "runs"
USAGE = "usage.json"
SECRET = "secret"
FULL = (errno.ENOSPC, errno.EDQUOT)
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class DeviceStore(DiskStore):
    """The state of one client in one run: as in a simulation, but durable, and pruned without being told to.

    A device never hears which checkpoint a server still has, so it keeps its last ``keep`` versions. A server that
    goes back further is told so, instead of a client that silently starts anew.
    """

    def __init__(self, root: Path, run: str, keep: int) -> None:
        """Keep the state below ``root``; raises ``ConfigError`` for a name of a run that is no plain file name."""
        if not _RUN.fullmatch(run):
            raise ConfigError(
                f"The run is called '{run}'; a name has letters, digits, '.', '_' and '-' only."
            )
        super().__init__(root / RUNS / run, durable=True)
        self._store, self._keep = root, keep

    def read(self, client: int, before_round: int) -> ClientState:
        """Return the newest state written in a round below ``before_round``; {} if there never was one.

        Raises ``ClientError`` if there was one and it has been pruned.
        """
        state = super().read(client, before_round)
        first = self._first(client)
        if not state and first is not None and first < before_round:
            raise ClientError(
                f"the state that round {before_round} starts from is gone: the server went back further than the "
                f"{self._keep} versions that this device keeps; raise keep_rounds in its configuration and start the "
                "run anew"
            )
        return state

    def write(self, client: int, round_: int, state: ClientState) -> None:
        """Keep ``state``; where the disk is full, raise ``ClientError`` and leave every earlier state as it is."""
        try:
            super().write(client, round_, state)
            self._thin(client)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ClientError(self._full(state)) from error

    def _thin(self, client: int) -> None:
        folder = self._folder(client)
        gone = self._rounds(folder)[: -self._keep]
        if gone and self._first(client) is None:
            atomic_write(folder / "first", str(gone[0]).encode(), durable=True)
        for round_ in gone:
            self._path(client, round_).unlink(missing_ok=True)

    def _note(self, client: int, round_: int) -> None:
        # Notes are for pruning a million clients; this store has one, and prunes it as it writes.
        pass

    def _first(self, client: int) -> int | None:
        """Return the round of the first version that was pruned; None if none ever was."""
        path = self._folder(client) / "first"
        return int(path.read_text()) if path.exists() else None

    def _full(self, state: ClientState) -> str:
        needed = sum(t.nbytes for tensors in state.values() for t in tensors.values())
        others = [p for p in (self._store / RUNS).iterdir() if p.is_dir() and p != self.root]
        hint = f" or remove the state of finished runs ({', '.join(p.name for p in others[:3])} ...)"
        return (
            f"the disk with {self._store} is full ({needed / MEGABYTE:.1f} MB are needed, "
            f"{shutil.disk_usage(self._store).free / MEGABYTE:.1f} MB are free); make room"
            f"{hint if others else ''}, or set 'store' to a folder on another disk. Nothing that was kept is lost"
        )


@dataclass
class Usage:
    """What a device has transferred and computed today (UTC), for its quotas; on disk, so that all processes count."""

    folder: Path
    quotas: Quotas

    def accept(self, size: int, train: bool) -> None:
        """Count a message of ``size`` bytes that has arrived; raises ``ClientError`` if it exceeds a quota."""
        self._require_size("The message", size)
        used, q = self._read(), self.quotas
        used["download"] += size
        used["trainings"] += train
        self._require(used["download"], q.download_mb_per_day * MEGABYTE, "downloads", "download_mb_per_day")
        self._require(used["trainings"], q.trainings_per_day, "trainings", "trainings_per_day")
        self._write(used)

    def release(self, size: int) -> None:
        """Count a reply of ``size`` bytes that is about to leave; raises ``ClientError`` if it exceeds a quota."""
        self._require_size("The reply", size)
        used = self._read()
        used["upload"] += size
        self._require(
            used["upload"], self.quotas.upload_mb_per_day * MEGABYTE, "uploads", "upload_mb_per_day"
        )
        self._write(used)

    def _require_size(self, what: str, size: int) -> None:
        if 0 < self.quotas.message_mb * MEGABYTE < size:
            raise ClientError(
                f"quota: {what.lower()} has {size / MEGABYTE:.1f} MB, this device's quotas.message_mb is "
                f"{self.quotas.message_mb:g}"
            )

    def _require(self, used: float, most: float, what: str, key: str) -> None:
        if 0 < most < used:
            raise ClientError(f"quota: the {what} of today have reached this device's quotas.{key}")

    def _read(self) -> dict[str, Any]:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        fresh = {"day": today, "download": 0, "upload": 0, "trainings": 0}
        try:
            known = json.loads((self.folder / USAGE).read_text())
        except (OSError, ValueError):
            return fresh
        # A clock that was set back must not give the day's quota again.
        same = isinstance(known, Mapping) and known.keys() == fresh.keys() and known["day"] >= today
        return dict(known) if same else fresh

    def _write(self, used: Mapping[str, Any]) -> None:
        if self.quotas == Quotas():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            atomic_write(self.folder / USAGE, json.dumps(used).encode(), durable=True)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ClientError(
                f"the disk with {self.folder} is full; make room, or set 'store' to a folder on another disk. "
                "Nothing that was kept is lost"
            ) from error


def run_secret(folder: Path, run: str) -> int:
    """Return the entropy that this device, and nobody else, has for the noise and the keys of one run.

    A round that is run again draws the same, so that it gives nothing further away; another run draws anew.
    """
    path = folder / SECRET
    folder.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        # Made whole under another name first: two processes may be the first.
        own = folder / f".{SECRET}-{os.getpid()}"
        with os.fdopen(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
        own.unlink()
    return int.from_bytes(hmac.digest(path.read_bytes(), run.encode(), "sha256"), "big")


def writable(folder: Path) -> str | None:
    """Return why ``folder`` cannot be used as a store; None if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        atomic_write(probe, b"x", durable=True)
        probe.unlink()
    except OSError as error:
        return f"The store {folder} cannot be written: {error.strerror}; set 'store' to a folder that can be."
    return None
