"""The client's side of compressed updates; the arithmetic is in ``flowerbed.compression``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowerbed.clients.local_round import MODEL, LocalRound, Reply
from flowerbed.clients.transforms import ClientTransform
from flowerbed.compression import BITS, FEEDBACK, KEEP, PACKED, STREAMS, Scheme, compress
from flowerbed.errors import ClientError
from flowerbed.storage import Tensors

OWED = "compression owed "
"""Prefix of the state that holds what earlier rounds left out, by stream."""


@dataclass(frozen=True)
class Compression(ClientTransform):
    """Sends what the message asks for: the whole update, or the compressed one. Comes last, after every defence."""

    @property
    def stateful(self) -> bool:
        return True

    def reply(self, local: LocalRound, reply: Reply) -> Reply:
        if KEEP not in local.config:
            return reply
        scheme = Scheme(float(local.config[KEEP]), int(local.config[BITS]))
        streams: dict[str, Mapping[str, Tensor]] = {}
        for stream, tensors in reply.streams.items():
            names = _compressible(local, stream, tensors)
            # What is not finite must reach the server's checks as it is, and must never be owed.
            if stream not in local.config[STREAMS] or not names or not _finite(tensors, names):
                streams[stream] = tensors
                continue
            if stream not in local.received:
                raise ClientError(
                    f"stream '{stream}' cannot be compressed, because the server sends none of that name; leave it out "
                    "of devices.streams"
                )
            streams |= self._packed(local, stream, tensors, names, scheme)
        return replace(reply, streams=streams)

    def _packed(
        self, local: LocalRound, stream: str, tensors: Mapping[str, Tensor], names: list[str], scheme: Scheme
    ) -> dict[str, Tensors]:
        """Return the stream's compressed part and, if there is any, the rest; keep what is left out."""
        own = {n: tensors[n].detach().cpu() for n in names}
        base = {n: local.received[stream][n] if stream == MODEL else torch.zeros_like(own[n]) for n in names}
        feedback = bool(local.config[FEEDBACK])
        owed = local.state.get(OWED + stream, {}) if feedback else {}
        made = compress(own, base, scheme, owed if owed.keys() == own.keys() else {})
        if feedback:
            local.state[OWED + stream] = made.owed
        rest = {n: v for n, v in tensors.items() if n not in own}
        return {PACKED + stream: made.arrays, **({stream: rest} if rest else {})}


def _compressible(local: LocalRound, stream: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose tensors are compressed: parameters, of the type that most numbers have."""
    sent = local.received.get(stream, {})
    real = [
        n
        for n, v in tensors.items()
        if v.is_floating_point()
        and (n in local.info.parameters or stream != MODEL)
        and (stream not in local.received or (n in sent and sent[n].dtype == v.dtype))
    ]
    sizes: dict[torch.dtype, int] = {}
    for name in real:
        sizes[tensors[name].dtype] = sizes.get(tensors[name].dtype, 0) + tensors[name].numel()
    usual = max(sizes, key=lambda kind: sizes[kind], default=None)
    return [n for n in real if tensors[n].dtype == usual]


def _finite(tensors: Mapping[str, Tensor], names: list[str]) -> bool:
    return all(bool(torch.isfinite(tensors[n]).all()) for n in names)
