"""The rules that divide samples among clients; each states its paper and which published variant it is.

A partitioner answers with one owner per sample, so no rule can lose or double a sample. Where
flwr-datasets' partitioners do what a paper says they are used (``Dirichlet`` per class, ``Pathological``);
the docstrings of the others say why not.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from flowerbed.errors import ConfigError
from flowerbed.seeds import global_streams, numpy_rng, torch_seed

Integers = npt.NDArray[np.int64]
Labels = npt.NDArray[Any]

_FLOWER_ATTEMPTS = 5


class Partitioner(Protocol):
    """A rule with its parameters; a frozen dataclass."""

    def owners(self, labels: Labels, num_clients: int, seed: int, domains: Integers | None) -> Integers:
        """Return the client of each sample, int64 ``(N,)`` in ``0..num_clients-1``, none without samples.

        ``labels`` is ``(N,)`` or, for next-token tasks, ``(N, L)``; ``domains`` is ``(N,)`` or ``None``.
        Called with ``1 <= num_clients <= N``. Raises ``ConfigError`` if the rule cannot be applied.
        """
        ...


@dataclass(frozen=True)
class Iid:
    """A uniformly random division into parts whose sizes differ by at most one (McMahan et al. 2017, sec. 3).

    Ours, because flwr-datasets' ``IidPartitioner`` cuts the data in stored order, without a seed.
    """

    def owners(self, labels: Labels, num_clients: int, seed: int, domains: Integers | None) -> Integers:
        """Return the client of each sample."""
        return _deal(len(labels), num_clients, numpy_rng(seed, "datasets.partition.iid"))


@dataclass(frozen=True)
class Draws:
    """Every client draws ``per_client`` different samples of the whole data set at random, apart from the others.

    For federations of more clients than there are samples, up to millions: draws are computed when a client takes
    part. Clients share samples, so this is no division of the data; the artificial users of pfl-research (Granqvist
    et al. 2024) are of this kind.
    """

    per_client: int = 50

    def __post_init__(self) -> None:
        _check_at_least("draws per_client", self.per_client, 1)

    def check(self, samples: int) -> None:
        """Raise ``ConfigError`` if there are too few samples."""
        if self.per_client > samples:
            raise ConfigError(
                f"draws with per_client={self.per_client} needs as many samples; there are {samples}. Lower it."
            )

    def owners(self, labels: Labels, num_clients: int, seed: int, domains: Integers | None) -> Integers:
        """Refuse: samples have no single owner."""
        raise ConfigError("The partition 'draws' gives no sample one owner; make it with partition().")


DirichletVariant = Literal["per-class", "per-class-balanced", "per-client"]


@dataclass(frozen=True)
class Dirichlet:
    """Label skew drawn from a Dirichlet distribution with concentration ``alpha``; three published variants.

    ``per-class`` (Yurochkin et al. 2019, as written in the paper): for each class, the clients' shares are
    drawn from Dir(alpha 1_K); client sizes vary. The draw is repeated until every client has ``min_size``
    samples. This is flwr-datasets' ``DirichletPartitioner``.

    ``per-class-balanced`` (the code of Yurochkin et al. 2019, spread by NIID-Bench, Li et al. 2022, with
    ``min_size`` 10): the same, but a client that already holds more than N/K samples gets nothing of the
    later classes. flwr-datasets' ``DirichletPartitioner(self_balancing=True)``.

    ``per-client`` (Hsu et al. 2019): all clients have equal sizes (up to one sample). Each draws its class
    mixture from Dir(alpha C p), where p is the overall class distribution, which is Dir(alpha 1_C) for
    balanced data, and its samples from that mixture without replacement; an exhausted class is left out
    and the mixture renormalised. Clients are served in random order. Ours: flwr-datasets'
    ``InnerDirichletPartitioner`` ignores p, needs labels without gaps, and divides by zero when a client's
    whole mixture is exhausted.

    ``alpha`` is above 0: small is skewed, large approaches the overall distribution.
    """

    alpha: float = 0.5
    variant: DirichletVariant = "per-class"
    min_size: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(
                f"dirichlet needs a finite alpha above 0, not {self.alpha}; for an iid division use 'iid'."
            )
        _check_choice("dirichlet variant", self.variant, get_args(DirichletVariant))
        _check_at_least("dirichlet min_size", self.min_size, 1)

    def owners(self, labels: Labels, num_clients: int, seed: int, domains: Integers | None) -> Integers:
        """Return the client of each sample; raises ``ConfigError`` if ``min_size`` cannot be met."""
        classes = _class_ids("dirichlet", labels)
        if num_clients * self.min_size > len(classes):
            raise ConfigError(
                f"dirichlet with min_size={self.min_size} and {num_clients} clients needs "
                f"{num_clients * self.min_size} samples; there are {len(classes)}. Lower min_size or clients."
            )
        if self.variant == "per-client":
            return _per_client_dirichlet(
                classes, num_clients, self.alpha, numpy_rng(seed, "datasets.partition.dirichlet")
            )
        return self._by_flower(classes, num_clients, seed)

    def _by_flower(self, classes: Integers, num_clients: int, seed: int) -> Integers:
        kinds = _flower_partitioners(f"dirichlet variant '{self.variant}'")
        for attempt in range(_FLOWER_ATTEMPTS):
            partitioner = kinds.DirichletPartitioner(
                num_partitions=num_clients,
                partition_by="label",
                alpha=float(self.alpha),
                min_partition_size=self.min_size,
                self_balancing=self.variant == "per-class-balanced",
                seed=torch_seed(seed, "datasets.partition.dirichlet", attempt),
            )
            try:
                return _owners_from_flower(partitioner, classes, num_clients, seed)
            except ValueError as error:
                # Its own limit of draws; a further seed is a further batch of draws.
                if "max number of attempts" not in str(error):
                    raise ConfigError(f"dirichlet with alpha={self.alpha} failed: {error}") from error
        raise ConfigError(
            f"dirichlet with alpha={self.alpha} gave some of {num_clients} clients fewer than "
            f"min_size={self.min_size} samples in every draw. Raise alpha, lower min_size or the number of "
            "clients, or use variant='per-client', whose clients have equal sizes."
        )


@dataclass(frozen=True)
class DirichletFloor:
    """First ``floor`` samples of each class for each client, then the rest of each class by Dir(alpha 1_K).

    The partition of GGEUR's released code (Ma et al. 2025, with floor 1 and alpha from 0.01): no client lacks a class,
    however skewed. Shares are rounded down and the last client takes the remainder, as there.
    """

    alpha: float = 0.1
    floor: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"dirichlet_floor needs a finite alpha above 0, not {self.alpha}.")
        _check_at_least("dirichlet_floor floor", self.floor, 1)

    def owners(self, labels: Labels, num_clients: int, seed: int, domains: Integers | None) -> Integers:
        """Return the client of each sample; raises ``ConfigError`` if a class is too small."""
        classes = _class_ids("dirichlet_floor", labels)
        rng = numpy_rng(seed, "datasets.partition.dirichlet_floor")
        owners = np.empty(len(classes), dtype=np.int64)
        for label in np.unique(classes):
            rows = rng.permutation(np.flatnonzero(classes == label))
            rest = len(rows) - num_clients * self.floor
            if rest < 0:
                raise ConfigError(
                    f"dirichlet_floor with floor={self.floor} needs {num_clients * self.floor} samples of class "
                    f"{label}, which has {len(rows)}; lower floor or the number of clients."
                )
            counts = np.floor(rng.dirichlet(np.full(num_clients, self.alpha)) * rest).astype(np.int64)
            counts[-1] += rest - counts.sum()
            owners[rows] = np.repeat(np.arange(num_clients), counts + self.floor)
        return owners


@dataclass(frozen=True)
class Shards:
    """Sort by label, cut into ``num_clients * per_client`` shards, deal them at random (McMahan et al. 2017).

    With ``per_client`` 2, most clients see two classes. Shard sizes differ by at most one; where the number
    divides, as in the paper, they are equal. Ours, because flwr-datasets' ``ShardPartitioner`` drops the
    remainder when it does not divide. Within a class the order is random.
    """

    per_client: int = 2

    def __post_init__(self) -> None:
        _check_at_least("shards per_client", self.per_client, 1)

    def owners(self, labels: Labels, num_clients: int, seed: int, domains: Integers | None) -> Integers:
        """Return the client of each sample; raises ``ConfigError`` if there are more shards than samples."""
        classes = _class_ids("shards", labels)
        shards = num_clients * self.per_client
        if shards > len(classes):
            raise ConfigError(
                f"{num_clients} clients with {self.per_client} shards each need {shards} shards, but there are "
                f"only {len(classes)} samples; lower shards per_client or the number of clients."
            )
        rng = numpy_rng(seed, "datasets.partition.shards")
        shuffled = rng.permutation(len(classes))
        by_label = shuffled[np.argsort(classes[shuffled], kind="stable")]
        client_of_shard = rng.permutation(np.repeat(np.arange(num_clients), self.per_client))
        owners = np.empty(len(classes), dtype=np.int64)
        owners[by_label] = np.repeat(client_of_shard, _even_sizes(len(classes), shards))
        return owners


ClassAssignment = Literal["first-deterministic", "deterministic"]


@dataclass(frozen=True)
class Pathological:
    """Exactly ``classes_per_client`` classes for each client (NIID-Bench, Li et al. 2022, "#C = k").

    ``first-deterministic`` is that paper's rule: client i holds class i mod C and further classes at random;
    ``deterministic`` gives client i the classes i, i+1, ... mod C. The samples of a class are cut evenly
    among its clients. This is flwr-datasets' ``PathologicalPartitioner``; its third mode, ``random``, may
    leave classes without a client and so lose samples, and is therefore not offered.
    """

    classes_per_client: int = 2
    assignment: ClassAssignment = "first-deterministic"

    def __post_init__(self) -> None:
        _check_at_least("pathological classes_per_client", self.classes_per_client, 1)
        _check_choice("pathological assignment", self.assignment, get_args(ClassAssignment))

    def owners(self, labels: Labels, num_clients: int, seed: int, domains: Integers | None) -> Integers:
        """Return the client of each sample; raises ``ConfigError`` if a class would stay without a client."""
        kinds = _flower_partitioners("pathological")
        classes = _class_ids("pathological", labels)
        count = len(np.unique(classes))
        if self.classes_per_client > count:
            raise ConfigError(
                f"pathological classes_per_client={self.classes_per_client} is more than the {count} classes."
            )
        partitioner = kinds.PathologicalPartitioner(
            num_partitions=num_clients,
            partition_by="label",
            num_classes_per_partition=self.classes_per_client,
            class_assignment_mode=self.assignment,
            seed=torch_seed(seed, "datasets.partition.pathological"),
        )
        try:
            owners = _owners_from_flower(partitioner, classes, num_clients, seed)
        except ValueError as error:
            raise ConfigError(
                f"pathological with {num_clients} clients of {self.classes_per_client} classes does not fit: "
                f"{error} Use fewer clients or fewer classes_per_client."
            ) from error
        lost = np.unique(classes[owners < 0])
        if len(lost):
            raise ConfigError(
                f"pathological with {num_clients} clients of {self.classes_per_client} classes leaves "
                f"{len(lost)} classes without a client; use at least {count} clients or more "
                "classes_per_client."
            )
        return owners


QuantityProfile = Literal["power", "exponential", "dirichlet"]


@dataclass(frozen=True)
class Quantity:
    """Clients differ in the number of samples only; which samples is uniformly random.

    Sizes are proportional to, for client k = 0..K-1:
    ``power``: ``(k + 1) ** strength`` (strength 1: linear, 0: equal);
    ``exponential``: ``strength ** (k / (K - 1))``, so the largest client has ``strength`` times the smallest;
    ``dirichlet``: one draw from Dir(strength 1_K) (NIID-Bench, Li et al. 2022, "quantity skew").
    Each client first gets ``min_size`` samples; the others are shared out in proportion (largest remainder).

    Ours, because flwr-datasets' size partitioners have no strength, no seed and fail where e^K outgrows the
    data (about 12 clients).
    """

    profile: QuantityProfile = "power"
    strength: float = 1.0
    min_size: int = 1

    def __post_init__(self) -> None:
        _check_choice("quantity profile", self.profile, get_args(QuantityProfile))
        _check_at_least("quantity min_size", self.min_size, 1)
        lowest = 0 if self.profile == "power" else 1 if self.profile == "exponential" else None
        if not np.isfinite(self.strength) or (lowest is None and self.strength <= 0):
            raise ConfigError(f"quantity strength must be finite and above 0, not {self.strength}.")
        if lowest is not None and self.strength < lowest:
            raise ConfigError(
                f"quantity strength for profile '{self.profile}' is at least {lowest}, not {self.strength}."
            )

    def owners(self, labels: Labels, num_clients: int, seed: int, domains: Integers | None) -> Integers:
        """Return the client of each sample; raises ``ConfigError`` if ``min_size`` cannot be met."""
        free = len(labels) - num_clients * self.min_size
        if free < 0:
            raise ConfigError(
                f"quantity with min_size={self.min_size} and {num_clients} clients needs "
                f"{num_clients * self.min_size} samples; there are {len(labels)}. Lower min_size or clients."
            )
        rng = numpy_rng(seed, "datasets.partition.quantity")
        sizes = self.min_size + largest_remainder(self._weights(num_clients, rng), free)
        return rng.permutation(np.repeat(np.arange(num_clients), sizes))

    def _weights(self, num_clients: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        if self.profile == "dirichlet":
            return rng.dirichlet(np.full(num_clients, float(self.strength)))
        # Logarithms, so that a steep profile over many clients does not overflow.
        place = np.arange(num_clients)
        if self.profile == "power":
            logs = self.strength * np.log(place + 1.0)
        else:
            logs = np.log(self.strength) * place / max(num_clients - 1, 1)
        weights: npt.NDArray[np.float64] = np.exp(logs - logs.max())
        return weights


DomainAllocation = Literal["equal", "proportional"]


@dataclass(frozen=True)
class Domain:
    """Each client holds samples of one domain only (speaker, style, hospital ...).

    With as many clients as domains, client k is domain k. With more, a domain is divided iid among several
    clients: ``equal`` gives the domains equally many clients (the first ones one more), ``proportional``
    about as many as they have samples, at least one. Clients are numbered domain by domain.

    Ours, because flwr-datasets' ``NaturalIdPartitioner`` makes exactly one client of each domain.
    """

    allocation: DomainAllocation = "equal"

    def __post_init__(self) -> None:
        _check_choice("domain allocation", self.allocation, get_args(DomainAllocation))

    def owners(self, labels: Labels, num_clients: int, seed: int, domains: Integers | None) -> Integers:
        """Return the client of each sample; raises ``ConfigError`` without domains or with too many."""
        if domains is None:
            raise ConfigError("The partition 'domain' needs a data set with domains, such as pacs.")
        names, domain, sizes = np.unique(domains, return_inverse=True, return_counts=True)
        if num_clients < len(names):
            raise ConfigError(
                f"The partition 'domain' cannot put {len(names)} domains on {num_clients} clients without "
                f"mixing them; use at least {len(names)} clients."
            )
        if self.allocation == "equal":
            clients = _even_sizes(num_clients, len(names))
        else:
            # One client each; the others by the samples beyond the first, so no client stays empty.
            clients = 1 + largest_remainder(sizes - 1, num_clients - len(names))
        if (clients > sizes).any():
            worst = int(np.argmax(clients - sizes))
            raise ConfigError(
                f"Domain {names[worst]} has {sizes[worst]} samples for {clients[worst]} clients; use fewer "
                "clients or allocation='proportional'."
            )
        rng = numpy_rng(seed, "datasets.partition.domain")
        owners = np.empty(len(domain), dtype=np.int64)
        first = np.cumsum(clients) - clients
        for number in range(len(names)):
            owners[domain == number] = first[number] + _deal(int(sizes[number]), int(clients[number]), rng)
        return owners


def largest_remainder(weights: npt.ArrayLike, total: int) -> Integers:
    """Return whole shares of ``total`` in proportion to ``weights`` (Hamilton's method).

    ``weights`` is ``(n,)``, non-negative, not all 0 unless ``total`` is 0; a weight of 0 gets 0. Ties in the
    remainder go to the lower index.
    """
    weight = np.asarray(weights, dtype=np.float64)
    if total == 0:
        return np.zeros(len(weight), dtype=np.int64)
    exact = weight / weight.sum() * total
    shares: Integers = np.floor(exact).astype(np.int64)
    left = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:left]] += 1
    return shares


def _per_client_dirichlet(
    classes: Integers, num_clients: int, alpha: float, rng: np.random.Generator
) -> Integers:
    count = int(classes.max()) + 1
    available = np.bincount(classes, minlength=count)
    present = available > 0
    concentration = alpha * present.sum() * available[present] / len(classes)
    # Shuffled samples of each class, handed out from the front.
    pools = [rng.permutation(np.flatnonzero(classes == label)) for label in range(count)]
    left = available.copy()
    owners = np.empty(len(classes), dtype=np.int64)
    sizes = _even_sizes(len(classes), num_clients)
    for client in rng.permutation(num_clients):
        mixture = np.zeros(count)
        mixture[present] = rng.dirichlet(concentration)
        need = int(sizes[client])
        while need:
            weights = np.where(left > 0, mixture, 0.0)
            if not weights.sum() > 0:
                # Everything this client wanted is gone; it gets what is left, in proportion.
                weights = left.astype(np.float64)
            # Drawing all at once and cutting what is not there, then drawing the rest anew without the
            # exhausted classes, has the same distribution as drawing one by one.
            drawn = np.minimum(rng.multinomial(need, weights / weights.sum()), left)
            for label in np.flatnonzero(drawn):
                start = available[label] - left[label]
                owners[pools[label][start : start + drawn[label]]] = client
            left -= drawn
            need -= int(drawn.sum())
    return owners


def _flower_partitioners(rule: str) -> Any:
    """Return the module ``flwr_datasets.partitioner``; raises ``ConfigError`` if it is not installed."""
    try:
        # Importing Hugging Face's datasets below it draws from Python's global generator.
        with global_streams(0, "datasets.partition.import"):
            from flwr_datasets import partitioner
    except ImportError as error:
        raise ConfigError(
            f"The partition {rule} needs flwr-datasets, which is not installed; install it with: "
            "pip install flwr-datasets"
        ) from error
    return partitioner


def _owners_from_flower(partitioner: Any, classes: Integers, num_clients: int, seed: int) -> Integers:
    """Let a flwr-datasets partitioner divide (label, index) rows; -1 marks a sample that it left out.

    The rows are shuffled first: its partitioners draw how many samples of a class a client gets, but cut
    the class in stored order.
    """
    import datasets

    order = numpy_rng(seed, "datasets.partition.order").permutation(len(classes))
    partitioner.dataset = datasets.Dataset.from_dict({"label": classes[order], "index": order})
    owners = np.full(len(classes), -1, dtype=np.int64)
    with warnings.catch_warnings():
        # It warns of every repeated draw and lost class; the callers turn what matters into errors.
        warnings.filterwarnings("ignore", message="The specified min_partition_size|Classes: ")
        for client in range(num_clients):
            owners[np.asarray(partitioner.load_partition(client)["index"][:], dtype=np.int64)] = client
    return owners


def _deal(samples: int, num_clients: int, rng: np.random.Generator) -> Integers:
    """Return random owners for ``samples`` such that client sizes differ by at most one."""
    owners: Integers = rng.permutation(np.repeat(np.arange(num_clients), _even_sizes(samples, num_clients)))
    return owners


def _even_sizes(total: int, parts: int) -> Integers:
    """Return ``parts`` sizes that sum to ``total``; the first ``total % parts`` are one larger."""
    sizes = np.full(parts, total // parts, dtype=np.int64)
    sizes[: total % parts] += 1
    return sizes


def _class_ids(rule: str, labels: Labels) -> Integers:
    if labels.ndim != 1:
        raise ConfigError(
            f"The partition '{rule}' needs one label per sample, but labels have shape {labels.shape}; "
            "use iid, quantity or domain."
        )
    return labels.astype(np.int64)


def _check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"The {what} is one of {', '.join(known)}; not '{value}'.")


def _check_at_least(what: str, value: int, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ConfigError(f"{what} must be a whole number of at least {lowest}, not {value!r}.")
