"""Stock Flower strategies in our loop: they run, keep float32, are reproducible and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowerbed.errors import ConfigError
from flowerbed.experiments.simulation import resume, simulate
from flowerbed.server.loop import RunResult
from flowerbed.strategies.flower import FlowerParams, FlowerStrategy, flower_names

OPTIONS: dict[str, dict[str, Any]] = {
    "Bulyan": {"num_malicious_nodes": 1},
    "DifferentialPrivacyServerSideAdaptiveClipping": {"noise_multiplier": 0.1},
    "DifferentialPrivacyServerSideFixedClipping": {"noise_multiplier": 0.01, "clipping_norm": 1.0},
    "FedAdagrad": {},
    "FedAdam": {"eta": 0.01},
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9},
    "FedMedian": {},
    "FedProx": {"proximal_mu": 0.1},
    "FedTrimmedAvg": {"beta": 0.2},
    "FedYogi": {},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "QFedAvg": {"client_learning_rate": 0.1},
}


def run(name: str, rounds: int, directory: Path | None = None) -> RunResult:
    key = "options" if name != "fedavg" else None
    strategy = {"name": "flower", "flower": name, key: OPTIONS[name]} if key else {"name": name}
    return simulate(
        strategy=strategy,
        model={"name": "small_cnn"},
        federation={"clients": 9, "cohort": 7, "rounds": rounds},
        local={"batch_size": 64},
        evaluation={"every": 0, "clients_every": 2},
        run={"dir": None if directory is None else str(directory)},
        grid={"device": "cpu"},
    )


def test_the_table_names_every_strategy_that_is_offered() -> None:
    assert sorted(OPTIONS) == flower_names()


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_runs_keep_their_types_and_resume_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = run(name, 3)
    assert {v.dtype for v in whole.model.values()} == {torch.float32}
    assert whole.final("evaluate-clients")["accuracy"] >= 0
    assert not whole.failures
    run(name, 2, tmp_path / "short")
    longer = resume(tmp_path / "short", federation={"rounds": 3})
    for key, value in whole.model.items():
        assert torch.equal(longer.model[key], value), key


def test_flowers_fedavg_is_ours_up_to_rounding() -> None:
    """The same clients are not sampled (Flower draws its own), so all take part here."""
    settings: dict[str, Any] = {"federation": {"clients": 5, "rounds": 2}, "evaluation": {"every": 0}}
    ours = simulate(strategy="fedavg", **settings)
    theirs = simulate(strategy="flower:FedAvg", **settings)
    for key, value in ours.model.items():
        torch.testing.assert_close(theirs.model[key], value, rtol=1e-5, atol=1e-6)


def test_integer_buffers_stay_integers() -> None:
    result = simulate(
        strategy="flower:FedAdam",
        model={"name": "resnet8", "norm": "bn"},
        federation={"clients": 3, "rounds": 1},
        evaluation={"every": 0},
        local={"batch_size": 128},
    )
    counters = {n: v for n, v in result.model.items() if n.endswith("num_batches_tracked")}
    assert counters
    assert all(v.dtype == torch.int64 for v in counters.values())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"flower": "FedAdan"}, "Did you mean 'FedAdam'"),
        ({"flower": "FedXgbBagging"}, "Unknown Flower strategy"),
        ({"flower": "no.such.module:Thing"}, "cannot be imported"),
    ],
)
def test_unknown_strategies_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowerStrategy(FlowerParams(**params))


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match="Unknown option of Flower's FedAdam 'etta'.*Did you mean 'eta'"):
        simulate(strategy={"name": "flower:FedAdam", "etta": 0.1})
