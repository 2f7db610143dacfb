"""Where the files of a data set come from: a folder of the user, or a verified download."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

from flowerbed.errors import DataError

Progress = Callable[[str, int, int | None], None]
"""Called during a download with the file's name, the bytes so far and the total, if the server told it."""

Busy = Callable[[str], AbstractContextManager[object]]
"""Called with what is about to take long, such as decoding; the context ends when it is over."""

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Remote:
    """One official file: the addresses to try in turn and what its bytes must hash to."""

    urls: tuple[str, ...]
    algorithm: Literal["md5", "sha256"]
    digest: str

    @property
    def file_name(self) -> str:
        """The last part of the first address."""
        return self.urls[0].rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Found:
    """The files that a source will read, in the order its reader expects, and the form they have.

    No files means that the data comes with an installed package; such a set is not cached.
    """

    form: str
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Search:
    """Where to look for the files of the data set ``name`` and whether they may be downloaded."""

    name: str
    data_dir: Path | None
    download_dir: Path
    download: bool = True
    progress: Progress | None = None

    def folders(self, *relative: str) -> Iterator[Path]:
        """Yield the folders that exist: ``data_dir/relative`` in the order given, then earlier downloads.

        ``"."`` stands for ``data_dir`` itself. Raises ``DataError`` if ``data_dir`` is no folder.
        """
        candidates = [self.download_dir / self.name]
        if self.data_dir is not None:
            if not self.data_dir.is_dir():
                raise DataError(
                    f"The data folder {self.data_dir} does not exist; correct data_dir or FLOWERBED_DATA."
                )
            candidates = [self.data_dir / name for name in relative] + candidates
        yield from (folder for folder in candidates if folder.is_dir())

    def fetch(self, remotes: Sequence[Remote], files: str, otherwise: str = "") -> tuple[Path, ...]:
        """Return the remotes' local copies, downloading those that are not there yet.

        ``files`` says in words which files the user could provide instead and where; ``otherwise`` names
        another way to get them. Raises ``DataError`` if a download is forbidden, fails or does not verify.
        """
        folder = self.download_dir / self.name
        paths = tuple(folder / remote.file_name for remote in remotes)
        missing = [pair for pair in zip(remotes, paths) if not pair[1].exists()]
        if missing and not self.download:
            raise self.missing("downloads are switched off (download=false)", files, otherwise)
        for remote, path in missing:
            failures = []
            for url in remote.urls:
                try:
                    _download(url, remote, path, self.progress)
                    break
                except (OSError, HTTPException, DataError) as error:
                    failures.append(f"{url}: {error}")
            else:
                raise self.missing(f"no download succeeded ({'; '.join(failures)})", files, otherwise)
        return paths

    def missing(self, why: str, files: str, otherwise: str = "") -> DataError:
        """Return the error that says that the set is not here, why, and what the user can do."""
        where = "FLOWERBED_DATA is not set" if self.data_dir is None else f"it is not in {self.data_dir}"
        text = (
            f"The data set '{self.name}' is not available: {where} and {why}. "
            f"Put {files}, and set FLOWERBED_DATA (or data_dir) to that folder"
        )
        return DataError(f"{text}; or {otherwise}." if otherwise else f"{text}.")


def _download(url: str, remote: Remote, path: Path, progress: Progress | None) -> None:
    """Stream ``url`` into a ``.part`` file beside ``path``, verify it, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.new(remote.algorithm, usedforsecurity=False)
    # A name of its own for each process: two that download at once must not write into one file.
    handle, part_name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    part = Path(part_name)
    try:
        with (
            os.fdopen(handle, "wb") as file,
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as reply,
        ):
            length = reply.headers.get("Content-Length")
            total = int(length) if length else None
            done = 0
            while chunk := reply.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(path.name, done, total)
        if digest.hexdigest() != remote.digest:
            raise DataError(
                f"arrived with {remote.algorithm} {digest.hexdigest()} instead of {remote.digest}, so it is "
                "damaged or has changed; it was not kept"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
