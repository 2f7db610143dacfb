"""How a training set is divided among clients: the ``Partition`` and the one call that makes it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from flowerbed.datasets import partitioners as rules
from flowerbed.datasets.partitioners import Integers, Partitioner
from flowerbed.errors import ConfigError
from flowerbed.registry import Registry
from flowerbed.seeds import numpy_rng

PARTITIONS: Registry[type[Partitioner]] = Registry("partition")
"""Name -> partitioner, a frozen dataclass whose fields are the rule's parameters."""

PARTITIONS.add("iid", rules.Iid)
PARTITIONS.add("draws", rules.Draws)
PARTITIONS.add("dirichlet", rules.Dirichlet)
PARTITIONS.add("dirichlet_floor", rules.DirichletFloor)
PARTITIONS.add("shards", rules.Shards)
PARTITIONS.add("pathological", rules.Pathological)
PARTITIONS.add("quantity", rules.Quantity)
PARTITIONS.add("domain", rules.Domain)


@dataclass(frozen=True, eq=False)
class Partition:
    """Which samples each client holds, as one index array with offsets (no object per client).

    ``samples`` is int64 ``(assigned,)``; client ``k`` holds ``samples[offsets[k] : offsets[k + 1]]``, in
    increasing order. ``offsets`` is int64 ``(clients + 1,)``.
    """

    samples: Integers
    offsets: Integers

    @classmethod
    def from_owners(cls, owners: npt.ArrayLike, num_clients: int) -> Partition:
        """Return the partition in which sample ``i`` belongs to client ``owners[i]``; -1 is nobody."""
        owner = np.asarray(owners, dtype=np.int64)
        if owner.ndim != 1 or (len(owner) and not (owner.min() >= -1 and owner.max() < num_clients)):
            raise ConfigError(f"Owners must be one client per sample in -1..{num_clients - 1}.")
        order = np.argsort(owner, kind="stable")
        unassigned = int(np.count_nonzero(owner < 0))
        counts = np.bincount(owner[owner >= 0], minlength=num_clients)
        return cls(order[unassigned:], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))

    def __post_init__(self) -> None:
        for array in (self.samples, self.offsets):
            array.flags.writeable = False

    @property
    def num_clients(self) -> int:
        """The number of clients."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Integers:
        """The number of samples of each client, int64 ``(clients,)``."""
        return np.diff(self.offsets)

    def size(self, client: int) -> int:
        """Return the number of samples of one client, without looking at the others."""
        return int(self.offsets[client + 1] - self.offsets[client])

    def indices(self, client: int) -> Integers:
        """Return the client's sample indices, a read-only view; raises ``ConfigError`` for no such client."""
        if not 0 <= client < self.num_clients:
            raise ConfigError(f"There is no client {client}; clients are 0..{self.num_clients - 1}.")
        return self.samples[self.offsets[client] : self.offsets[client + 1]]

    def within(self, samples: Integers) -> Partition:
        """Return the same division of other samples: the i-th of ``samples`` stands for sample i."""
        return replace(self, samples=samples[self.samples])

    def class_counts(self, labels: Tensor | npt.ArrayLike, num_classes: int) -> Integers:
        """Return how many samples of each class each client holds, int64 ``(clients, classes)``."""
        client = np.repeat(np.arange(self.num_clients), self.sizes)
        cells = client * num_classes + np.asarray(labels, dtype=np.int64)[self.samples]
        counts = np.bincount(cells, minlength=self.num_clients * num_classes)
        return counts.reshape(self.num_clients, num_classes)


class DrawnPartition(Partition):
    """Every client has its own random draw from one pool, computed when it is asked for; clients share samples.

    ``samples`` is the pool. What belongs to a client is a function of the seed and its number alone, so nothing is
    kept for the registered clients, of whom there may be more than samples.
    """

    def __init__(
        self, pool: Integers, clients: int, per_client: int, seed: int, purpose: str = "draws"
    ) -> None:
        """Let each of ``clients`` draw ``per_client`` different samples of ``pool``."""
        super().__init__(np.asarray(pool, dtype=np.int64), np.empty(0, dtype=np.int64))
        fields = {"_clients": clients, "_per_client": per_client, "_seed": seed, "_purpose": purpose}
        self.__dict__.update(fields)

    def __reduce__(self) -> tuple[type[DrawnPartition], tuple[Any, ...]]:
        own = self.__dict__
        return DrawnPartition, (
            self.samples, own["_clients"], own["_per_client"], own["_seed"], own["_purpose"],
        )  # fmt: skip

    @property
    def num_clients(self) -> int:
        return int(self.__dict__["_clients"])

    @property
    def sizes(self) -> Integers:
        return np.broadcast_to(np.int64(self.__dict__["_per_client"]), self.num_clients)

    def size(self, client: int) -> int:
        return int(self.__dict__["_per_client"])

    def indices(self, client: int) -> Integers:
        if not 0 <= client < self.num_clients:
            raise ConfigError(f"There is no client {client}; clients are 0..{self.num_clients - 1}.")
        own = self.__dict__
        rng = numpy_rng(own["_seed"], f"datasets.partition.{own['_purpose']}", client)
        drawn: Integers = self.samples[
            np.sort(rng.choice(len(self.samples), own["_per_client"], replace=False))
        ]
        return drawn

    def within(self, samples: Integers) -> Partition:
        own = self.__dict__
        pool = samples[self.samples]
        return DrawnPartition(pool, own["_clients"], own["_per_client"], own["_seed"], own["_purpose"])

    def of_test(self, samples: int) -> DrawnPartition:
        """Return test data by the same rule: every client's own draw from that many test samples."""
        own = self.__dict__
        size = min(own["_per_client"], samples)
        return DrawnPartition(np.arange(samples), own["_clients"], size, own["_seed"], "test draws")

    def class_counts(self, labels: Tensor | npt.ArrayLike, num_classes: int) -> Integers:
        """Return how many samples of each class each client holds; computes every client's draw."""
        classes = np.asarray(labels, dtype=np.int64)
        rows = [np.bincount(classes[self.indices(k)], minlength=num_classes) for k in range(self.num_clients)]
        return np.stack(rows).astype(np.int64)


def partition(
    rule: str | Partitioner,
    labels: Tensor | npt.ArrayLike,
    num_clients: int,
    seed: int,
    domains: Tensor | npt.ArrayLike | None = None,
    **parameters: Any,
) -> Partition:
    """Divide the samples among clients: each sample goes to exactly one client, each client gets some.

    The rule ``draws`` alone lets clients share samples; see ``DrawnPartition``.

    ``rule`` is a name in ``PARTITIONS`` with its ``parameters``, or a partitioner. ``labels`` is ``(N,)``
    classes (for next-token tasks ``(N, L)``, which only rules that ignore labels accept) and ``domains`` an
    optional ``(N,)`` of domain indices. The result is a pure function of the arguments.

    Raises ``ConfigError`` if the parameters are invalid or the division is impossible.
    """
    partitioner = _build(rule, parameters)
    label_array = np.asarray(labels)
    domain_array = None if domains is None else np.asarray(domains, dtype=np.int64)
    if num_clients < 1:
        raise ConfigError(f"A partition needs at least one client, not {num_clients}.")
    if isinstance(partitioner, rules.Draws):
        partitioner.check(len(label_array))
        return DrawnPartition(np.arange(len(label_array)), num_clients, partitioner.per_client, seed)
    if num_clients > len(label_array):
        raise ConfigError(
            f"{num_clients} clients cannot share {len(label_array)} samples; use fewer clients or more data."
        )
    if domain_array is not None and domain_array.shape != label_array.shape[:1]:
        raise ConfigError(f"There are {len(label_array)} samples but domains of shape {domain_array.shape}.")
    owners = partitioner.owners(label_array, num_clients, seed, domain_array)
    result = Partition.from_owners(owners, num_clients)
    if len(result.samples) != len(label_array) or not result.sizes.all():
        raise ConfigError(
            f"The partitioner {partitioner} left out samples or clients; its owners() must name a client for "
            "every sample and at least one sample for every client."
        )
    return result


def _build(rule: str | Partitioner, parameters: dict[str, Any]) -> Partitioner:
    if not isinstance(rule, str):
        if parameters:
            raise ConfigError(f"Parameters go with a partition's name; {rule} already has its own.")
        return rule
    kind = PARTITIONS.get(rule)
    signature = inspect.signature(kind)
    try:
        signature.bind(**parameters)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "(none)"
        raise ConfigError(
            f"The parameters of the partition '{rule}' do not fit: {error}. Known: {known}."
        ) from error
    return kind(**parameters)
