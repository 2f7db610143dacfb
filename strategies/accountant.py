"""How much privacy a run has spent: Renyi accounting by Google's dp-accounting library.

A client is the unit: everything that one client's whole data may change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from flowerbed.errors import ConfigError

# Whole orders alone: they have closed forms, fractional ones are series that may not converge.
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)


@dataclass(frozen=True)
class Release:
    """One round's release of a Gaussian sum over sampled clients."""

    noise: float
    """Standard deviation of the noise over the clip norm (z)."""
    sampling: str
    """fixed-size, poisson or none; see ``PrivacyParams.sampling``."""
    clients: int
    cohort: int
    """Clients asked in a round."""


def epsilon(release: Release, count: int, delta: float) -> float:
    """Return epsilon at ``delta`` after ``count`` such releases; infinite if they have no noise."""
    if release.noise == 0 and count:
        return float("inf")
    if not count:
        return 0.0
    rdp = library().rdp.compute_epsilon(ORDERS, _one_release(release) * count, delta)
    return float(rdp[0])


@lru_cache(maxsize=16)
def _one_release(release: Release) -> npt.NDArray[np.float64]:
    """Return the Renyi divergence of one release at every order."""
    found = library()
    related = found.NeighboringRelation
    if release.sampling == "fixed-size":
        # Neighbours replace one client: the sum changes by twice the clip norm.
        event = found.SampledWithoutReplacementDpEvent(
            release.clients, release.cohort, found.GaussianDpEvent(release.noise / 2)
        )
        relation = related.REPLACE_ONE
    elif release.sampling == "poisson":
        event = found.PoissonSampledDpEvent(
            release.cohort / release.clients, found.GaussianDpEvent(release.noise)
        )
        relation = related.ADD_OR_REMOVE_ONE
    else:
        event, relation = found.GaussianDpEvent(release.noise), related.REPLACE_SPECIAL
    accountant = found.rdp.RdpAccountant(ORDERS, relation)
    accountant.compose(event)
    rdp: npt.NDArray[np.float64] = np.asarray(accountant.rdp)
    return rdp


def library() -> Any:
    """Return dp-accounting, imported on first use; ``ConfigError`` says how to install it."""
    try:
        return import_module("dp_accounting")
    except ImportError as error:
        raise ConfigError(
            "Accounting for privacy.noise > 0 needs dp-accounting; install it with pip install "
            "'flowerbed[privacy]'."
        ) from error
