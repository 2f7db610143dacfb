"""The smallest honest setting of every registered strategy. A strategy missing here fails the suite."""

from __future__ import annotations

from flowerbed.experiments.conformance import Case

CASES = {
    case.strategy: case
    for case in (
        Case("fedavg"),
        # Flower weighs in float32, w * (n / n): exact for one client, and it draws no one.
        Case("flower", settings={"strategy": {"name": "flower", "flower": "FedAdam"}}, one_client_is_central=False),
    )
}
