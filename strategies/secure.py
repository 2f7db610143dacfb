"""Secure aggregation: the server learns the mean of the clients' updates and none of them.

References: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
figure 4 (the honest-but-curious protocol); Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead", CCS 2020, Algorithm 2 (SecAgg+: masks and shares with k neighbours instead of all).

The clients of a round stand on a ring in random order; i and j are neighbours if at most k / 2 apart.

    1. keys      every client sends two public keys; those who do not answer are left out of the ring.
    2. shares    every client splits the seed b_i of its own mask and its mask key s_i among its neighbours,
                 t of which can join them, each share encrypted for its reader.
    3. training  client i sends y_i = q(u_i) + PRG(b_i) + sum_{i < j} PRG(s_ij) - sum_{i > j} PRG(s_ij)  mod 2^32
                 over its neighbours j, where s_ij follows from either's key and the other's public one.
    4. unmask    for every client whose y_i arrived its neighbours reveal their share of b_i, for every one that
                 dropped out after step 2 their share of s_i, never both; the server removes what did not cancel.

u_i is the model's update with its floating buffers, and every further stream as it is; q rounds stochastically to
2^bits levels over [-clip, clip], so the mean errs by less than 2 clip / (2^bits - 1) in every coordinate. All
clients weigh the same. The algorithm gets w_t + mean in the place of every model, so that any combines with it
but those that need replies one by one. Integer counters and metrics are sent in clear.

Deviations: shares travel from the server to their readers in step 4 instead of before step 3, which saves an
exchange and changes nothing of what anybody can read. There is no protection against an active server (signed
keys, consistency check). In a simulation all secrets derive from the run's seed: arithmetic, traffic and
drop-outs are the protocol's, but whoever knows the seed knows the keys. A device has a secret of its own for each run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from flowerbed import messages, seeds
from flowerbed.clients import masking
from flowerbed.clients.local_round import MODEL
from flowerbed.clients.masking import Ring
from flowerbed.clients.secure import KEYS, MASKED, SECURE, SHARES, UNMASK, as_bytes, rows
from flowerbed.clients.transform_params import SecureParams
from flowerbed.clients.updates import wide
from flowerbed.errors import RunError, require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import CONFIG, ClientReply, ServerTransform

Sealed = dict[tuple[int, int], bytes]
"""Encrypted shares by the positions of sender and reader."""


@dataclass
class _Round:
    """What the server knows of a round between its exchanges."""

    grid: Grid
    nodes: list[int]
    """The ring, by position."""
    cipher: torch.Tensor
    mask: torch.Tensor
    sealed: Sealed = field(default_factory=dict)

    @property
    def alive(self) -> list[int]:
        """The positions of the clients that have shared their secrets."""
        return sorted({sender for sender, _ in self.sealed})


class SecureAggregation(ServerTransform):
    """Runs the exchanges around a training round and removes the masks from the sum."""

    merges = True

    def __init__(self, params: SecureParams, seed: int, cohort: int, most: int) -> None:
        """``cohort`` clients are asked in a training round, and at ``most`` so many in any round.

        Raises ``ConfigError`` for what cannot be secure.
        """
        require(
            cohort >= 3,
            f"secure.enabled hides a client among the others, and a round asks {cohort}; raise federation.cohort "
            "to at least 3.",
        )
        require(
            most << params.bits <= 1 << 32,
            f"secure.bits is {params.bits}: the sum over {most} clients does not fit 32 bits; give fewer bits.",
        )
        self.params = params
        self.seed = seed
        self._round: _Round | None = None
        self._bytes = 0
        self._dropped = 0

    # Before training.

    def configure(self, server_round: int, asked: Sequence[Message], grid: Grid) -> None:
        self._bytes = 0
        nodes = [message.metadata.dst_node_id for message in asked]
        order = seeds.numpy_rng(self.seed, "secure ring", server_round).permutation(len(nodes))
        keys = self._ask(grid, server_round, KEYS, {node: {} for node in nodes})
        ring = [nodes[i] for i in order if nodes[i] in keys]
        self._require_hidden(server_round, len(ring), "sent keys")
        cipher, mask = (torch.cat([keys[node][name] for node in ring]) for name in ("cipher", "mask"))
        self._round = _Round(grid, ring, cipher, mask)
        shared = self._ask(grid, server_round, SHARES, {n: {"cipher": cipher} for n in ring})
        for position, node in enumerate(ring):
            if node in shared:
                for reader, sealed in zip(self._around(position), shared[node]["sealed"], strict=True):
                    self._round.sealed[position, reader] = as_bytes(sealed)
        alive = self._round.alive
        self._require_hidden(server_round, len(alive), "shared their secrets")
        present = torch.tensor([position in alive for position in range(len(ring))], dtype=torch.uint8)
        record = messages.array_record({"mask": mask, "alive": present})
        for message in asked:
            message.content[SECURE] = record

    # After training.

    def replies(
        self, server_round: int, current: Tensors, replies: list[ClientReply], parameters: frozenset[str]
    ) -> list[ClientReply]:
        assert self._round is not None
        where = {node: position for position, node in enumerate(self._round.nodes)}
        present = sorted(where[reply.node] for reply in replies)
        dropped = [position for position in self._round.alive if position not in present]
        total = _sum_of(replies)
        own, keys = self._joined(server_round, present, dropped)
        for seed in own.values():
            masking.add_mask(total, seed, -1)
        for gone, key in keys.items():
            for j in set(self._around(gone)) & set(present):
                seed = masking.agree(key, as_bytes(self._round.mask[j]), "mask")
                masking.add_mask(total, seed, -1 if j < gone else 1)
        self._dropped = len(dropped)
        mean = self._mean(total, len(replies), replies[0].streams, current)
        return [
            replace(r, streams={**mean, MODEL: {**r.streams.get(MODEL, {}), **mean[MODEL]}}) for r in replies
        ]

    def metrics(self) -> Mapping[str, float]:
        """Return how many clients dropped out and the bytes of the exchanges around the training round."""
        return {"secure-dropped": float(self._dropped), "secure-bytes": float(self._bytes)}

    def _joined(
        self, server_round: int, present: list[int], dropped: list[int]
    ) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """Return the mask seeds of the present and the mask keys of the dropped clients, by position."""
        assert self._round is not None
        alive = {*present, *dropped}
        asked = {j: [i for i in self._around(j) if i in alive] for j in present}
        contents = {
            self._round.nodes[j]: {
                "cipher": self._round.cipher,
                "position": torch.tensor(senders),
                "dropped": torch.tensor([i in dropped for i in senders], dtype=torch.uint8),
                "sealed": rows([self._round.sealed[i, j] for i in senders]),
            }
            for j, senders in asked.items()
            if senders
        }
        answers = self._ask(self._round.grid, server_round, UNMASK, contents)
        shares: dict[int, dict[int, bytes]] = {i: {} for i in alive}
        for j, senders in asked.items():
            revealed = answers.get(self._round.nodes[j], {}).get("shares", ())
            for i, share in zip(senders, revealed, strict=False):
                shares[i][self._around(i).index(j)] = as_bytes(share)
        for i, found in shares.items():
            needed = masking.shares_needed(len(self._around(i)), self.params.threshold)
            if len(found) < needed:
                raise RunError(
                    f"Round {server_round}: a mask cannot be removed, {len(found)} of the {needed} shares that "
                    "are needed came; too many clients dropped out. Ask more (federation.cohort), or lower "
                    "secure.threshold."
                )
        joined = {i: masking.join(found) for i, found in shares.items()}
        return {i: joined[i] for i in present}, {i: joined[i] for i in dropped}

    def _mean(
        self, total: Ring, count: int, layout: Mapping[str, Tensors], current: Tensors
    ) -> dict[str, Tensors]:
        """Return the model and the other streams that belong to a sum of quantised updates."""
        step = 2 * self.params.clip / (2**self.params.bits - 1)
        result: dict[str, Tensors] = {MODEL: {}}
        for (stream, name), words in total.items():
            change = torch.from_numpy(words.astype(np.float64)) * (step / count) - self.params.clip
            change = change.reshape(layout[MASKED + stream][name].shape)
            if stream == MODEL:
                result[MODEL][name] = (wide(current[name]) + change).to(current[name].dtype)
            else:
                kind = current[name].dtype if name in current else torch.float32
                result.setdefault(stream, {})[name] = change.to(kind)
        return result

    def _ask(
        self, grid: Grid, server_round: int, stage: str, contents: Mapping[int, Tensors]
    ) -> dict[int, Tensors]:
        """Send every node its tensors and return the tensors of those that answer."""
        sent = []
        for node, tensors in contents.items():
            content = RecordDict({CONFIG: ConfigRecord({"server-round": server_round, "phase": stage})})
            if tensors:
                content[SECURE] = messages.array_record(tensors)
            self._bytes += messages.nbytes(content)
            sent.append(Message(content=content, dst_node_id=node, message_type="query"))
        answered: dict[int, Tensors] = {}
        for reply in _unheard(grid, sent):
            if reply.has_content():
                self._bytes += messages.nbytes(reply.content)
                answered[reply.metadata.src_node_id] = messages.tensors(reply.content.array_records[SECURE])
        return answered

    def _around(self, position: int) -> list[int]:
        assert self._round is not None
        return masking.neighbours(position, len(self._round.nodes), self.params.neighbours)

    def _require_hidden(self, server_round: int, count: int, did: str) -> None:
        if count < 3:
            raise RunError(
                f"Round {server_round}: only {count} clients {did}, which hides nobody; ask more clients "
                "(federation.cohort)."
            )


def _unheard(grid: Grid, sent: Sequence[Message]) -> list[Message]:
    """Exchange messages without the progress display, which counts the replies of the round itself."""
    listener = getattr(grid, "on_reply", None)
    if listener is None:
        return list(grid.send_and_receive(sent))
    grid.on_reply = None  # type: ignore[attr-defined]
    try:
        return list(grid.send_and_receive(sent))
    finally:
        grid.on_reply = listener  # type: ignore[attr-defined]


def _sum_of(replies: Sequence[ClientReply]) -> Ring:
    """Return the sum of the masked vectors modulo 2^32."""
    total: Ring = {}
    for reply in replies:
        for stream, tensors in reply.streams.items():
            if stream.startswith(MASKED):
                for name, words in tensors.items():
                    key = (stream.removeprefix(MASKED), name)
                    flat = words.numpy().reshape(-1).view(np.uint32)
                    total[key] = total[key] + flat if key in total else flat.copy()
    return total
