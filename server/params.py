"""What the server decides: the federation's size, its patience, and when to evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from flowerbed.errors import require


@dataclass(frozen=True)
class FederationParams:
    """Who takes part, for how long, and what happens when clients fail."""

    clients: int = 10
    """Registered clients (N)."""
    cohort: int = 0
    """Clients that train in a round (m); 0 means all."""
    sampling: str = "uniform"
    """Who is asked to train: uniform; weighted (chances by samples; use strategy.weighting=uniform with it); cyclic
    (shuffled passes over all clients); able (uniform among those that meet ``devices``); or package.module:Class,
    made from a flowerbed.server.sampling.Draws."""
    rounds: int = 20
    """Training rounds (T)."""
    oversample: float = 0.0
    """Share of further clients asked; the first ``cohort`` usable replies, in order of asking, are used."""
    quorum: float = 0.5
    """Least share of the cohort that must answer usably; below it the run ends with an error. At least one
    usable reply is needed whatever the share."""
    time_limit: float = 0.0
    """Seconds that a client may take for one message; 0 means no limit."""

    def __post_init__(self) -> None:
        require(self.clients >= 1, f"federation.clients is {self.clients}; give at least 1.")
        require(self.rounds >= 0, f"federation.rounds is {self.rounds}; give 0 or more.")
        require(
            0 <= self.cohort <= self.clients,
            f"federation.cohort is {self.cohort} but there are {self.clients} clients; give a cohort between "
            "1 and federation.clients, or 0 for all of them.",
        )
        require(self.oversample >= 0, f"federation.oversample is {self.oversample}; give 0 or more.")
        require(0 <= self.quorum <= 1, f"federation.quorum is {self.quorum}; give a share between 0 and 1.")
        require(self.time_limit >= 0, f"federation.time_limit is {self.time_limit}; give 0 (off) or more.")

    @property
    def wanted(self) -> int:
        """Replies that a round uses at most."""
        return self.cohort or self.clients


@dataclass(frozen=True)
class EvaluationParams:
    """When the model is evaluated, and on whose data."""

    every: int = 1
    """Rounds between evaluations of the global model on the test set by the server; 0 means only at the end."""
    clients_every: int = 0
    """Rounds between evaluations by the clients on their own test data; 0 means never."""
    clients: int = 0
    """Clients that evaluate; 0 means all."""
    mask: str = "none"
    """Classes that no client's own evaluation can predict, whatever the method: none; train: those that the client
    has no training sample of; test: those that it has no test sample of, an oracle."""
    sharded: bool = False
    """Whether the workers of grid=ray evaluate the server's test set, each a part, in place of the driver; worth it
    where these have the GPUs, or are on other machines."""
    measures: tuple[str, ...] = ()
    """Further metrics of the server's evaluations: functions by import path, package.module:function, of a
    ``flowerbed.experiments.measures.Measured``."""
    last: int = 5
    """Evaluations over which the summary's final figures are averaged (never the best one)."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"evaluation.every is {self.every}; give 0 or more.")
        require(self.clients_every >= 0, f"evaluation.clients_every is {self.clients_every}; give 0 or more.")
        require(self.clients >= 0, f"evaluation.clients is {self.clients}; give 0 (all) or more.")
        require(
            self.mask in ("none", "train", "test"),
            f"evaluation.mask is '{self.mask}'; choose none, train or test.",
        )
        require(self.last >= 1, f"evaluation.last is {self.last}; give at least 1.")
        object.__setattr__(self, "measures", tuple(self.measures))
        require(
            all(":" in path for path in self.measures),
            f"evaluation.measures is {list(self.measures)}; give import paths, package.module:function.",
        )


@dataclass(frozen=True)
class StopParams:
    """Early stopping on a server metric; off unless ``patience`` or ``target`` is set."""

    metric: str = "accuracy"
    mode: str = "max"
    """max or min."""
    patience: int = 0
    """Evaluations without an improvement of ``min_delta`` after which the run stops; 0 means never."""
    min_delta: float = 0.0
    target: float | None = None
    """Stop as soon as the metric reaches this value."""

    def __post_init__(self) -> None:
        require(self.mode in ("max", "min"), f"stop.mode is '{self.mode}'; choose max or min.")
        require(self.patience >= 0, f"stop.patience is {self.patience}; give 0 (off) or more.")
