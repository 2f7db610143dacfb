"""The smallest honest setting of every registered strategy. A strategy missing here fails the suite."""

from __future__ import annotations

from flowerbed.experiments.conformance import Case

CASES = {
    case.strategy: case
    for case in (
        Case("fedavg"),
        # Asynchronous mixing keeps a share of the old model: one client is not the central loop.
        Case("fedasync", settings={"federation": {"cohort": 1}}, one_client_is_central=False),
        Case("fedbuff", settings={"federation": {"cohort": 2}}, one_client_is_central=False),
        # Flower weighs in float32, w * (n / n): exact for one client, and it draws no one.
        Case("flower", settings={"strategy": {"name": "flower", "flower": "FedAdam"}}, one_client_is_central=False),
    )
}
