"""Compressed updates: what a client sends instead of a model, and how the server gets the model back.

Let b be what the client received, w what it would send and e what it still owes from earlier rounds, all over the
compressed tensors of a stream together (d numbers); for streams whose values are changes themselves, b = 0.

    u = w - b + e
    top-k   k = max(1, round(keep d)) largest |u| travel, ties to the lower index; elsewhere the server takes b
    int8    q = round(u / s) travels, s = max |u| / 127 over a tensor's numbers that travel: an error of at most s / 2
    e'      u less what the server adds to b

Without int8 what travels are the values of b + u, so that keep = 1 is the identity to the bit. With feedback e' is kept
for the next round (error feedback: Seide et al. 2014; Stich et al. 2018, "Sparsified SGD with Memory"), so that what
the server has added in all rounds and what is still owed are together the sum of the clients' updates.

On the wire a stream is two array records: under its own name the tensors that are not compressed (buffers, integers),
and under ``packed NAME`` the arrays below. Positions travel as indices or as a bit mask, whichever is smaller.

    names   uint8, the names of the tensors joined by newlines      values  (k,), int8 or the tensors' own type
    indices int32 (k,), increasing; or                              scales  float32, one for each tensor; with int8
    mask    uint8, one bit for each of the d numbers; neither where all travel
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor

from flowerbed import messages
from flowerbed.errors import ConfigError, require
from flowerbed.storage import Tensors

MODEL = "arrays"
PACKED = "packed "
"""Prefix of the name of a stream's compressed part."""
NAMES, VALUES, INDICES, MASK, SCALES = "names", "values", "indices", "mask", "scales"
KEEP, BITS, FEEDBACK, STREAMS = "compress-keep", "compress-bits", "compress-feedback", "compress-streams"
"""Settings of a message that ask for a compressed reply."""
LEVELS = 127


class UnpackError(Exception):
    """A compressed reply is not what a client of ours could have sent; says what is wrong."""


@dataclass(frozen=True)
class Scheme:
    """How much of an update travels, and in how many bits."""

    keep: float = 1.0
    """Share of the numbers that travel, the largest ones."""
    bits: int = 32
    """8, or 32 for numbers in their own type."""

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, f"keep is {self.keep}; give a share above 0, at most 1.")
        require(self.bits in (8, 32), f"bits is {self.bits}; give 8 or 32.")

    def count(self, total: int) -> int:
        """Return k, how many of ``total`` numbers travel."""
        return min(total, max(1, round(self.keep * total)))

    def nbytes(self, total: int) -> int:
        """Return about how many bytes ``total`` float32 numbers take."""
        k = self.count(total)
        return k * self.bits // 8 + (0 if k == total else min(4 * k, -(-total // 8)))


@dataclass(frozen=True)
class Compressed:
    """A stream's compressed part, and what the client must remember."""

    arrays: Tensors
    owed: Tensors
    """e', in the type of the tensors."""


def compress(
    values: Mapping[str, Tensor], base: Mapping[str, Tensor], scheme: Scheme, owed: Mapping[str, Tensor]
) -> Compressed:
    """Compress floating tensors of one type, ``values`` (w), against ``base`` (b) and ``owed`` (e; {} for none)."""
    names = list(values)
    kinds = {value.dtype for value in values.values()}
    if len(kinds) != 1 or not all(kind.is_floating_point for kind in kinds):
        raise ConfigError(f"Tensors of the types {sorted(map(str, kinds))} cannot be compressed together.")
    wide = {name: values[name].double() - base[name].double() for name in names}
    if owed:
        wide = {name: update + owed[name].double() for name, update in wide.items()}
        # Where nothing is owed w is what travels, not w - b + b, which may round.
        sums = {n: (base[n].double() + wide[n]).to(values[n].dtype) for n in names}
        values = {n: torch.where(owed[n] == 0, values[n], sums[n]) for n in names}
    update = torch.cat([wide[name].reshape(-1) for name in names])
    chosen = _largest(update.abs(), scheme.count(update.numel()))
    arrays: Tensors = {NAMES: torch.frombuffer(bytearray("\n".join(names).encode()), dtype=torch.uint8)}
    if len(chosen) < update.numel():
        arrays |= _positions(chosen, update.numel())
    if scheme.bits == 8:
        sizes = [wide[name].numel() for name in names]
        arrays |= _quantised(update[chosen], _owners(chosen, sizes), len(names))
    else:
        arrays[VALUES] = torch.cat([values[name].reshape(-1) for name in names])[chosen]
    received = decompress(arrays, base)
    remaining = {n: (wide[n] - (received[n].double() - base[n].double())).to(values[n].dtype) for n in names}
    return Compressed(arrays, remaining)


def decompress(arrays: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors that a compressed part stands for, given b; raises ``UnpackError`` for garbage."""
    names = _names(arrays, base)
    shapes = [base[name].shape for name in names]
    sizes = [base[name].numel() for name in names]
    total = sum(sizes)
    chosen = _chosen(arrays, total)
    values = arrays.get(VALUES)
    k = total if chosen is None else len(chosen)
    if values is None or values.shape != (k,):
        raise UnpackError(
            f"{'no' if values is None else tuple(values.shape)} values for the {k} positions that are named"
        )
    kinds = {base[name].dtype for name in names}
    start = torch.cat([base[name].reshape(-1) for name in names])
    where = slice(None) if chosen is None else chosen
    if values.dtype == torch.int8:
        scales = arrays.get(SCALES)
        if scales is None or scales.shape != (len(names),) or scales.dtype != torch.float32:
            raise UnpackError("int8 values without one float32 scale for each tensor")
        every = torch.arange(total) if chosen is None else chosen
        change = values.double() * scales.double()[_owners(every, sizes)]
        result = start.clone()
        result[where] = (start.double()[where] + change).to(start.dtype)
    elif kinds == {values.dtype}:
        result = start.clone()
        result[where] = values
    else:
        raise UnpackError(f"values of type {values.dtype} for tensors of type {sorted(map(str, kinds))}")
    pieces = torch.split(result, sizes)
    return {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}


def unpacked(content: RecordDict, sent: RecordDict) -> RecordDict:
    """Return a reply's content with every compressed stream whole again, given the content that was sent.

    Content without one is returned as it is. Raises ``UnpackError`` for garbage.
    """
    records = messages.array_records(content)
    packed = [name for name in records if name.startswith(PACKED)]
    if not packed:
        return content
    received = messages.array_records(sent)
    result = RecordDict()
    for name, record in content.items():
        if name not in packed:
            result[name] = record
    for name in packed:
        stream = name.removeprefix(PACKED)
        if stream not in received:
            raise UnpackError(f"stream '{stream}' is compressed and was not sent")
        reference = messages.tensors(received[stream])
        base = reference if stream == MODEL else {n: torch.zeros_like(v) for n, v in reference.items()}
        whole = decompress(messages.tensors(records[name]), base)
        if stream in records:
            whole |= messages.tensors(records[stream])
        ordered = [*(n for n in reference if n in whole), *(n for n in whole if n not in reference)]
        result[stream] = messages.array_record({n: whole[n] for n in ordered})
    return result


def _largest(size: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest numbers, int64 and increasing; ties go to the lower position."""
    if k == len(size):
        return torch.arange(k)
    threshold = torch.topk(size, k, sorted=True).values[-1]
    above = torch.nonzero(size > threshold)[:, 0]
    equal = torch.nonzero(size == threshold)[:, 0][: k - len(above)]
    return torch.cat([above, equal]).sort().values


def _positions(chosen: Tensor, total: int) -> Tensors:
    if 4 * len(chosen) <= -(-total // 8):
        return {INDICES: chosen.to(torch.int32)}
    bits = np.zeros(total, dtype=bool)
    bits[chosen.numpy()] = True
    return {MASK: torch.from_numpy(np.packbits(bits))}


def _owners(chosen: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the number of the tensor in which each position lies."""
    return torch.searchsorted(torch.tensor(sizes).cumsum(0), chosen, right=True)


def _quantised(update: Tensor, owners: Tensor, count: int) -> Tensors:
    largest = torch.zeros(count, dtype=torch.float64).scatter_reduce(0, owners, update.abs(), "amax")
    scales = (largest / LEVELS).to(torch.float32)
    steps = scales.double()[owners]
    whole = torch.where(steps > 0, update / steps, 0.0).round().clamp(-LEVELS, LEVELS)
    return {VALUES: whole.to(torch.int8), SCALES: scales}


def _names(arrays: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[str]:
    try:
        names = arrays[NAMES].numpy().tobytes().decode().split("\n")
    except (KeyError, UnicodeDecodeError) as error:
        raise UnpackError("the names of its tensors cannot be read") from error
    for name in names:
        if name not in base or not base[name].is_floating_point():
            raise UnpackError(f"'{name}' is no tensor of real numbers that was sent")
    if len(set(names)) != len(names):
        raise UnpackError("a tensor is named twice")
    return names


def _chosen(arrays: Mapping[str, Tensor], total: int) -> Tensor | None:
    """Return the positions that travelled, int64 and increasing; None for all of them."""
    if MASK in arrays and INDICES in arrays:
        raise UnpackError("positions both as a list and as a mask")
    if MASK in arrays:
        mask = arrays[MASK]
        if mask.dtype != torch.uint8 or mask.shape != (-(-total // 8),):
            raise UnpackError(f"a mask of {mask.numel()} bytes for {total} numbers")
        return torch.from_numpy(np.flatnonzero(np.unpackbits(mask.numpy(), count=total)))
    if INDICES not in arrays:
        return None
    chosen = arrays[INDICES]
    if chosen.dtype != torch.int32 or chosen.dim() != 1 or len(chosen) > total:
        raise UnpackError("its positions are no list of int32")
    chosen = chosen.long()
    if len(chosen) and (
        int(chosen[0]) < 0 or int(chosen[-1]) >= total or not bool((chosen.diff() > 0).all())
    ):
        raise UnpackError(f"its positions do not increase from 0 to below {total}")
    return chosen
