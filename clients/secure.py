"""The client's side of secure aggregation; the protocol is described in ``flowerbed.strategies.secure``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients import masking, updates
from flowerbed.clients.local_round import MODEL, LocalRound, Reply
from flowerbed.clients.masking import Ring, Secrets
from flowerbed.clients.transform_params import SecureParams
from flowerbed.clients.transforms import ClientTransform, Request
from flowerbed.errors import ClientError

KEYS, SHARES, UNMASK = "secure keys", "secure shares", "secure unmask"
"""The exchanges around a training round, by the phase of their messages."""
SECURE = "secure"
"""The stream that carries what the protocol needs."""
MASKED = "masked "
"""Prefix of the streams that carry masked sums."""


@dataclass(frozen=True)
class SecureMasking(ClientTransform):
    """Masks what a client sends so that the server learns nothing but the sum over clients."""

    params: SecureParams

    def answer(self, request: Request) -> Reply | None:
        if request.phase not in (KEYS, SHARES, UNMASK):
            return None
        secrets = Secrets.draw(request.hidden_seed, request.client, request.round)
        if request.phase == KEYS:
            keys = {"cipher": secrets.cipher, "mask": secrets.mask}
            return _reply({name: rows([masking.public_key(key)]) for name, key in keys.items()})
        found = request.received[SECURE]
        position = _position(found["cipher"], secrets.cipher)
        if request.phase == SHARES:
            return _reply({"sealed": rows(self._seal(request, secrets, found["cipher"], position))})
        return _reply({"shares": rows(_reveal(secrets, found))})

    def statistics(self, local: LocalRound, reply: Reply) -> Reply:
        return self.reply(local, reply)

    def reply(self, local: LocalRound, reply: Reply) -> Reply:
        secrets = Secrets.draw(local.hidden_seed, local.client, local.clock.round)
        found = local.received[SECURE]
        position, alive = _position(found["mask"], secrets.mask), found["alive"].tolist()
        around = masking.neighbours(position, len(alive), self.params.neighbours)
        partners = [j for j in around if alive[j]]
        if not alive[position] or len(partners) < masking.shares_needed(len(around), self.params.threshold):
            raise ClientError("too few clients exchanged keys in this round to hide this one's update")
        start = {n: v.to(local.device) for n, v in local.received[MODEL].items()}
        update = updates.update_of(reply.streams, start, _floating(reply))
        values, clipped = quantise(update, self.params, local.generator("secure rounding"))
        masking.add_mask(values, secrets.own, 1)
        for j in partners:
            seed = masking.agree(secrets.mask, as_bytes(found["mask"][j]), "mask")
            masking.add_mask(values, seed, 1 if position < j else -1)
        streams: dict[str, dict[str, Tensor]] = {}
        for (stream, name), words in values.items():
            shape = reply.streams[stream][name].shape
            streams.setdefault(MASKED + stream, {})[name] = torch.from_numpy(words.view(np.int32)).reshape(
                shape
            )
        counters = {n: v for n, v in reply.streams.get(MODEL, {}).items() if not v.is_floating_point()}
        if counters:
            streams[MODEL] = counters
        return replace(reply, streams=streams, metrics={**reply.metrics, "secure-clipped": clipped})

    def _seal(self, request: Request, secrets: Secrets, cipher: Tensor, position: int) -> list[bytes]:
        """Return, for every neighbour in order, this client's share of both secrets that only it can read."""
        around = masking.neighbours(position, len(cipher), self.params.neighbours)
        needed = masking.shares_needed(len(around), self.params.threshold)
        rng = seeds.numpy_rng(request.hidden_seed, "secure shares", request.client, request.round)
        own = masking.split(secrets.own, len(around), needed, rng)
        mask = masking.split(secrets.mask, len(around), needed, rng)
        sealed = []
        for j, *shares in zip(around, own, mask, strict=True):
            key = masking.agree(secrets.cipher, as_bytes(cipher[j]), "shares")
            sealed.append(masking.seal(key, position, b"".join(shares)))
        return sealed


def _reveal(secrets: Secrets, found: Mapping[str, Tensor]) -> list[bytes]:
    """Return, for every neighbour asked about, its share of its own mask or, if it dropped out, of its key."""
    revealed = []
    asked = (found["position"].tolist(), found["dropped"].tolist(), found["sealed"])
    for sender, dropped, sealed in zip(*asked, strict=True):
        key = masking.agree(secrets.cipher, as_bytes(found["cipher"][sender]), "shares")
        both = masking.unseal(key, sender, as_bytes(sealed))
        half = slice(masking.SHARE_BYTES, None) if dropped else slice(masking.SHARE_BYTES)
        revealed.append(both[half])
    return revealed


def quantise(update: updates.Update, params: SecureParams, generator: torch.Generator) -> tuple[Ring, float]:
    """Return the update as integers 0 ... 2^bits - 1 over [-clip, clip], and the share that was clipped.

    Rounding is stochastic, so that the sum has no bias.
    """
    levels, values, clipped, total = 2**params.bits - 1, {}, 0, 0
    for key, value in update.items():
        position = (value.clamp(-params.clip, params.clip) + params.clip) * (levels / (2 * params.clip))
        jitter = torch.rand(value.shape, generator=generator, dtype=torch.float64, device=value.device)
        words = (position + jitter).floor().clamp(0, levels).to(torch.int64)
        values[key] = words.cpu().numpy().astype(np.uint32).reshape(-1)
        clipped += int((value.abs() > params.clip).sum())
        total += value.numel()
    return values, clipped / max(1, total)


def rows(values: list[bytes]) -> Tensor:
    """Return byte strings of one length as the rows of a uint8 tensor."""
    return torch.from_numpy(np.frombuffer(b"".join(values), dtype=np.uint8).reshape(len(values), -1).copy())


def as_bytes(row: Tensor) -> bytes:
    """Return one row of what ``rows`` made."""
    return row.numpy().tobytes()


def _position(keys: Tensor, private: bytes) -> int:
    """Return this client's position on the ring: where its public key is."""
    mine = masking.public_key(private)
    for position, key in enumerate(keys):
        if as_bytes(key) == mine:
            return position
    raise ClientError("this client's keys are not among those of the round; it did not answer in time")


def _floating(reply: Reply) -> frozenset[str]:
    """Return the model's floating tensors; raises ``ClientError`` for what cannot be masked."""
    stream = updates.whole_numbers(reply.streams)
    kinds = [v.is_complex() for tensors in reply.streams.values() for v in tensors.values()]
    if stream is not None or any(kinds):
        raise ClientError(
            f"stream '{stream or MODEL}' does not hold real numbers alone; this strategy and model do not "
            "combine with secure.enabled"
        )
    return frozenset(n for n, v in reply.streams.get(MODEL, {}).items() if v.is_floating_point())


def _reply(tensors: dict[str, Tensor]) -> Reply:
    return Reply({SECURE: tensors}, {"num-examples": 0})
