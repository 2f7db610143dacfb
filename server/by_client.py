"""What single clients' own test data say, kept beside the figures of all clients together.

``evaluation.spread`` sums the clients up in five numbers; who they are, and how all of them move from round to round,
is read off these lists. They are no part of any figure by which methods are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowerbed.pooling import Metric

CLIENTS_ASKED = "client-numbers"
BY_CLIENT, QUANTILES = "-by-client", "-quantiles"
ACCURACY = "accuracy"
LEVELS = tuple(step / 20 for step in range(21))
"""Of the quantiles: 0 (the worst client), 0.05, ..., 1 (the best)."""
MOST_CLIENTS = 1000
"""More clients than this are kept as quantiles only, or a line of the metrics would grow without bound."""


def by_client(clients: Sequence[int], replies: Sequence[Mapping[str, Metric]]) -> dict[str, list[Any]]:
    """Return, for every predictor's accuracy, its quantiles over clients and the clients' own figures.

    ``clients`` are the numbers of those that sent ``replies``, in that order. Clients without test samples are left
    out. ``accuracy-quantiles`` has one figure for each of ``LEVELS``, interpolated linearly between clients;
    ``client-numbers`` and ``accuracy-by-client`` belong together place by place, and are left out for more than
    ``MOST_CLIENTS``.
    """
    tested = [(k, r) for k, r in zip(clients, replies, strict=True) if r.get("num-examples")]
    if not tested:
        return {}
    names = [
        name
        for name, value in tested[0][1].items()
        if (name == ACCURACY or name.endswith(f"-{ACCURACY}")) and not isinstance(value, list)
    ]
    found: dict[str, list[Any]] = {}
    for name in names:
        own = [r[name] for _, r in tested if name in r]
        if len(own) < len(tested):
            continue
        found[name + QUANTILES] = np.quantile(np.asarray(own, dtype=np.float64), LEVELS).tolist()
        if len(tested) <= MOST_CLIENTS:
            found[name + BY_CLIENT] = own
    if found and len(tested) <= MOST_CLIENTS:
        found[CLIENTS_ASKED] = [k for k, _ in tested]
    return found
