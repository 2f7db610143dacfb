"""Choices of samples before and beside the partition: long tail, labelled part, matching test sets."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

from flowerbed.datasets.partitioners import Integers, largest_remainder
from flowerbed.datasets.partitions import Partition
from flowerbed.errors import ConfigError
from flowerbed.seeds import numpy_rng

Array = Tensor | npt.ArrayLike


def long_tail(labels: Array, num_classes: int, imbalance_factor: float, seed: int) -> Integers:
    """Return the indices of an exponentially long-tailed part of the samples; **the others are dropped**.

    Class ``c`` keeps ``floor(n_max * imbalance_factor ** (-c / (C - 1)))`` random samples, n_max being the
    size of the largest class (Cao et al. 2019, sec. 4), so that the first class has ``imbalance_factor``
    times the last one's. Apply it to the train split before partitioning. The indices are increasing int64.

    Raises ``ConfigError`` if the factor is below 1 or a class is too small, or would be empty.
    """
    if not 1 <= imbalance_factor < float("inf"):
        raise ConfigError(f"The imbalance factor must be at least 1, not {imbalance_factor}.")
    classes = _classes(labels)
    sizes = np.bincount(classes, minlength=num_classes)
    if len(sizes) > num_classes:
        raise ConfigError(f"There are labels up to {len(sizes) - 1} but num_classes is {num_classes}.")
    places = np.arange(num_classes) / max(num_classes - 1, 1)
    # The tiny allowance keeps exact quotients such as 500 * 100 ** -1 from being floored one too low.
    wanted = np.floor(sizes.max() * float(imbalance_factor) ** -places + 1e-9).astype(np.int64)
    if (wanted > sizes).any() or not wanted.all():
        worst = int(np.argmax((wanted > sizes) | (wanted == 0)))
        raise ConfigError(
            f"The long tail needs {wanted[worst]} samples of class {worst}, which has {sizes[worst]}; "
            "every class needs at least one. Use another imbalance factor or a balanced set."
        )
    rng = numpy_rng(seed, "datasets.long_tail")
    kept = [
        rng.permutation(np.flatnonzero(classes == label))[: wanted[label]] for label in range(num_classes)
    ]
    return np.sort(np.concatenate(kept))


def domain_skew(labels: Array, domains: Array, samples: npt.ArrayLike, alpha: float, seed: int) -> Integers:
    """Return those of ``samples`` that stay when every domain keeps a Dirichlet share of its images of each class.

    For each class, p ~ Dir(alpha 1_D) over the D domains, and domain d keeps floor(p_d n) random ones of its n samples
    (Office-Home-LDS of Ma et al. 2025, which keeps the first ones). About 1 / D of the samples are left, and many
    domains have none of a class. ``labels`` and ``domains`` are ``(N,)``; the indices are increasing int64.

    Raises ``ConfigError`` unless ``alpha`` is above 0, or if nothing is left.
    """
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"The domain skew must be a finite number above 0, not {alpha}.")
    classes, domain = _classes(labels), np.asarray(domains, dtype=np.int64)
    pool = np.asarray(samples, dtype=np.int64)
    rng = numpy_rng(seed, "datasets.domain_skew")
    names = np.unique(domain)
    kept = []
    for label in np.unique(classes):
        shares = rng.dirichlet(np.full(len(names), float(alpha)))
        for name, share in zip(names, shares, strict=True):
            rows = rng.permutation(pool[(classes[pool] == label) & (domain[pool] == name)])
            kept.append(rows[: int(share * len(rows))])
    result: Integers = np.sort(np.concatenate(kept))
    if not len(result):
        raise ConfigError(f"A domain skew of {alpha} leaves none of {len(pool)} samples; use more of them.")
    return result


def labelled_split(
    labels: Array,
    indices: npt.ArrayLike,
    seed: int,
    *,
    fraction: float | None = None,
    per_class: int | None = None,
    classes: npt.ArrayLike | None = None,
) -> tuple[Integers, Integers]:
    """Divide ``indices`` (for example one client's) into ``(labelled, unlabelled)`` for semi-supervision.

    Exactly one of ``fraction`` and ``per_class`` is given. ``fraction`` in [0, 1] labels
    ``round(fraction * n)`` samples in all, shared among the classes in proportion (largest remainder).
    ``per_class`` labels that many of each class that occurs, or all where there are fewer. With ``classes`` only
    samples of these are labelled; a fraction stays one of all n samples, as far as these classes have so many.
    Every index appears in exactly one of the two arrays, which are increasing int64.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    by_sample = _classes(labels)[chosen]
    present, sizes = np.unique(by_sample, return_counts=True)
    if classes is not None:
        allowed = np.isin(present, classes)
        present, sizes = present[allowed], sizes[allowed]
    if (fraction is None) == (per_class is None):
        raise ConfigError("A labelled split needs either a fraction or a number per_class.")
    if fraction is not None:
        if not 0 <= fraction <= 1:
            raise ConfigError(f"The labelled fraction must lie in 0..1, not {fraction}.")
        counts = largest_remainder(sizes, min(round(fraction * len(chosen)), int(sizes.sum())))
    else:
        assert per_class is not None
        if per_class < 0:
            raise ConfigError(f"The labelled number per_class must not be negative, but is {per_class}.")
        counts = np.minimum(sizes, per_class)
    rng = numpy_rng(seed, "datasets.labelled_split")
    labelled = np.zeros(len(chosen), dtype=bool)
    for label, count in zip(present, counts):
        labelled[rng.permutation(np.flatnonzero(by_sample == label))[:count]] = True
    return np.sort(chosen[labelled]), np.sort(chosen[~labelled])


def labelled_classes(class_counts: npt.ArrayLike, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return which of its classes each client has labels of: class-mismatched labels.

    ``class_counts`` is ``(clients, classes)``, as from ``Partition.class_counts``; the result is bool of that
    shape. Client by client, the ``share`` in (0, 1] of the classes that it holds, rounded up, is chosen at random
    among those that the fewest clients before it have labels of. So every class that is held has labels somewhere
    as soon as the clients have room for that.
    """
    counts = np.asarray(class_counts, dtype=np.int64)
    if counts.ndim != 2 or not 0 < share <= 1:
        raise ConfigError(
            f"The share of labelled classes must lie in (0, 1] and counts be (clients, classes); got {share} and "
            f"shape {counts.shape}."
        )
    rng = numpy_rng(seed, "datasets.labelled_classes")
    chosen = np.zeros(counts.shape, dtype=bool)
    for client, held in enumerate(counts > 0):
        present = rng.permutation(np.flatnonzero(held))
        fewest_first = present[np.argsort(chosen[:, present].sum(axis=0), kind="stable")]
        # The tiny allowance keeps exact products such as 0.1 * 10 from being rounded up to one more.
        chosen[client, fewest_first[: math.ceil(share * len(present) - 1e-9)]] = True
    return chosen


def matched_test_partition(test_labels: Array, train_class_counts: npt.ArrayLike, seed: int) -> Partition:
    """Divide the test set so that each client is tested on the class mixture it trains on.

    ``train_class_counts`` is ``(clients, classes)``, as from ``Partition.class_counts``. Client k gets the
    share of class c's test samples that it holds of class c's train samples (largest remainder), chosen at
    random. Each test sample of a class that some client holds is assigned exactly once; samples of other
    classes to nobody. Clients may stay without test samples.
    """
    counts = np.asarray(train_class_counts, dtype=np.int64)
    classes = _classes(test_labels)
    if counts.ndim != 2 or (len(classes) and classes.max() >= counts.shape[1]):
        raise ConfigError(
            f"The class counts must be (clients, classes) and cover all test labels; got {counts.shape}."
        )
    rng = numpy_rng(seed, "datasets.matched_test_partition")
    owners = np.full(len(classes), -1, dtype=np.int64)
    for label in range(counts.shape[1]):
        samples = rng.permutation(np.flatnonzero(classes == label))
        if counts[:, label].any():
            shares = largest_remainder(counts[:, label], len(samples))
            owners[samples] = np.repeat(np.arange(len(counts)), shares)
    return Partition.from_owners(owners, len(counts))


def _classes(labels: Array) -> Integers:
    classes = np.asarray(labels, dtype=np.int64)
    if classes.ndim != 1:
        raise ConfigError(f"One label per sample is needed, but labels have shape {classes.shape}.")
    return classes
