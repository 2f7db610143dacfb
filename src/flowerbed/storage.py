"""Groups of named tensors on disk, written so that a reader finds all of a file or none of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flowerbed.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
"""Named tensors: a model's parameters and buffers, or any other stream."""
TensorGroups = dict[str, Tensors]
"""Named groups of named tensors: the state of a strategy or of a client."""


def save_groups(
    path: Path, groups: Mapping[str, Mapping[str, torch.Tensor]], *, durable: bool = False
) -> None:
    """Write groups of tensors to ``path`` atomically; group and tensor names may hold any character.

    ``durable`` also waits until they have reached the disk.
    """
    flat: dict[str, torch.Tensor] = {}
    names: list[tuple[str, str]] = []
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            flat[str(len(names))] = tensor.detach().cpu().contiguous()
            names.append((group, name))
    meta = {"groups": json.dumps(list(groups)), "names": json.dumps(names)}
    atomic_write(path, save(flat, metadata=meta), durable=durable)


def load_groups(path: Path) -> TensorGroups:
    """Read what ``save_groups`` wrote; raises ``CheckpointError`` if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            groups: TensorGroups = {group: {} for group in json.loads(meta["groups"])}
            for key, (group, name) in enumerate(json.loads(meta["names"])):
                groups[group][name] = file.get_tensor(str(key))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"The state file {path} cannot be read ({error}); remove the run directory and start again, "
            "or resume from an older checkpoint."
        ) from error
    return groups


def atomic_write(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write ``data`` to ``path`` so that ``path`` holds all of it or keeps what it was.

    ``durable`` also waits until the data has reached the disk.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` have reached the disk as well."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
