"""Tiny Shakespeare: next-character prediction with the speakers of the plays as natural clients."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Remote, Search
from flowerbed.errors import ConfigError, DataError

_NAMES = (
    "shakespeare/tinyshakespeare.txt.gz",
    "shakespeare/tinyshakespeare.txt",
    "shakespeare/input.txt",
    "tinyshakespeare/input.txt",
)
_REMOTE = Remote(
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
    "sha256",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


@dataclass(frozen=True)
class Shakespeare:
    """1.1 million characters of Shakespeare's plays (Karpathy 2015), by speaker, as in LEAF's task.

    A speaker's speeches are joined in order and cut into sequences: ``inputs`` are ``seq_len`` characters
    and ``labels`` the same shifted by one, so each character is predicted once; a rest shorter than that is
    dropped. The last ``test_fraction`` of a speaker's sequences (rounded, but never all of them) is the
    test split, a split in time as in LEAF (Caldas et al. 2018). Speakers with fewer than ``min_sequences``
    are left out. ``classes`` is the vocabulary of the whole text, ``domains`` the speakers by appearance.
    """

    seq_len: int = 80
    test_fraction: float = 0.1
    min_sequences: int = 2

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.min_sequences < 1:
            raise ConfigError("shakespeare seq_len and min_sequences must be at least 1.")
        if not 0 < self.test_fraction < 1:
            raise ConfigError(
                f"shakespeare test_fraction must lie between 0 and 1, not {self.test_fraction}."
            )

    def locate(self, search: Search) -> Found:
        """Return the text file (plain or gzip) or a download."""
        for folder in search.folders("."):
            for name in (*_NAMES, _REMOTE.file_name):
                if (folder / name).is_file() and (name in _NAMES or folder.name == search.name):
                    return Found("text", (folder / name,))
        return Found("text", search.fetch([_REMOTE], "the text as FOLDER/shakespeare/input.txt"))

    def read(self, found: Found) -> Dataset:
        """Decode the file; raises ``DataError`` if no speaker has enough text."""
        text = _read_text(found.files[0])
        vocabulary = sorted(set(text))
        number = {character: index for index, character in enumerate(vocabulary)}
        speakers: list[str] = []
        parts: tuple[list[np.ndarray[tuple[int, int], np.dtype[np.int64]]], ...] = ([], [])
        counts: tuple[list[int], ...] = ([], [])
        for speaker, speech in speeches(text).items():
            windows = (len(speech) - 1) // self.seq_len
            if windows < self.min_sequences:
                continue
            ids = np.array([number[character] for character in speech], dtype=np.int64)
            starts = np.arange(windows)[:, None] * self.seq_len
            sequences = ids[starts + np.arange(self.seq_len + 1)]
            train = max(1, windows - round(self.test_fraction * windows))
            for index, rows in enumerate((sequences[:train], sequences[train:])):
                parts[index].append(rows)
                counts[index].append(len(rows))
            speakers.append(speaker)
        if not sum(counts[1]):
            raise DataError(
                f"{found.files[0]} has too little text for sequences of {self.seq_len}; lower seq_len."
            )
        splits = []
        for rows, sizes in zip(parts, counts):
            sequences = np.concatenate(rows)
            domain = torch.from_numpy(np.repeat(np.arange(len(speakers)), sizes))
            splits.append(
                Split(
                    torch.from_numpy(sequences[:, :-1].copy()),
                    torch.from_numpy(sequences[:, 1:].copy()),
                    {"domain": domain},
                )
            )
        return Dataset(
            name="shakespeare",
            train=splits[0],
            test=splits[1],
            classes=tuple(vocabulary),
            domains=tuple(speakers),
            mean=(0.0,),
            std=(1.0,),
            task="next-token",
        )


def speeches(text: str) -> dict[str, str]:
    """Return each speaker's speeches in order, joined by newlines, in order of first appearance.

    Speeches are blocks between blank lines whose first line is the speaker's name and a colon; a block
    without such a line continues the speech before it.
    """
    spoken: dict[str, list[str]] = {}
    speaker = None
    for block in text.split("\n\n"):
        first, _, rest = block.strip("\n").partition("\n")
        if first.endswith(":"):
            speaker, block = first[:-1], rest
        if speaker is not None and block.strip("\n"):
            spoken.setdefault(speaker, []).append(block.strip("\n"))
    return {name: "\n".join(blocks) for name, blocks in spoken.items()}


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
