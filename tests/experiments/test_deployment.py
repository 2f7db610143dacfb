"""A real SuperLink and real devices on loopback give the bits of a simulation, whatever is killed on the way.

FedLoGe, with its private heads, is in ``test_walkthrough``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Loopback, Meanwhile, assert_same, loopback, simulated, wait_until

from flowerbed.errors import RunError
from flowerbed.experiments.deploy import operate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SMALL = [
    "federation.rounds=2",
    "data.client_samples=240",
    "partition=dirichlet",
    "partition.alpha=0.5",
    "evaluation.clients_every=1",
    "run.figures=false",
    "seed=3",
]
MOMENTUM = ["local.momentum=0.9", "local.persist=true"]
CASES = {
    "fedavg": [*MOMENTUM],
    # Control variates of every client live on its disk.
    "scaffold": ["local.momentum=0"],
    "fedlabel": ["strategy.beta=0.15", "data.labelled=0.3"],
    # A round of statistics before training.
    "ggeur": ["strategy.T=30", "strategy.base=fedavg", "model=linear"],
}


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("deployment")) as made:
        made.share([f"strategy={next(iter(CASES))}", *SMALL])
        for number in range(3):
            made.node(number)
        wait_until(lambda: len(made.online()) == 3, "all devices are connected")
        yield made


@pytest.mark.parametrize("strategy", CASES)
def test_devices_give_the_bits_of_a_simulation_though_one_is_killed_and_restarted(
    fed: Loopback, strategy: str
) -> None:
    overrides = [f"strategy={strategy}", *SMALL, *CASES[strategy]]
    fed.share(overrides)

    def power_cut() -> None:
        """Kill a device after the first round that trained."""
        wait_until(lambda: any(r.phase == "train" for r in fed.records(strategy)), "the first round")
        fed.kill("node-1")
        fed.node(1)

    cut = Meanwhile(power_cut)
    assert fed.run(overrides, strategy) == 0
    cut.done()
    records = fed.records(strategy)
    assert [r.failed for r in records] == [0] * len(records)
    assert {r.answered for r in records if r.asked} == {3}
    assert_same(fed.model(strategy), simulated(fed.deployment, strategy))


def test_flowers_own_command_submits_it_as_well(fed: Loopback) -> None:
    overrides = ["strategy=fedavg", *SMALL, "federation.rounds=1"]
    fed.share(overrides)
    said: list[str] = []
    operate.prepare(fed.deployment, overrides, "submitted", said.append)
    home, *command = said[0].split()
    name, _, value = home.partition("=")
    environment = {**os.environ, name: value}
    flwr = str(Path(sys.executable).with_name(command[0]))
    subprocess.run([flwr, *command[1:]], env=environment, check=True, timeout=300)

    def told() -> dict[str, object]:
        return next(r for r in operate.status(fed.deployment).runs if r["name"] == "submitted")

    wait_until(lambda: told()["status"] == "finished:completed", "the run is over")
    assert told()["attempts"] == 1
    assert_same(fed.model("submitted"), simulated(fed.deployment, "submitted"))


def test_masked_updates_give_them_too_though_every_device_draws_masks_of_its_own(fed: Loopback) -> None:
    overrides = ["strategy=fedavg", *SMALL, "secure.enabled=true", "federation.rounds=1"]
    fed.share(overrides)
    assert fed.run(overrides, "masked") == 0
    assert_same(fed.model("masked"), simulated(fed.deployment, "masked"))


def test_so_does_the_ray_grid(fed: Loopback) -> None:
    if "fedavg" not in fed.deployment.run_names():
        pytest.skip("the run on devices, which this compares with, was not made")
    assert_same(fed.model("fedavg"), simulated(fed.deployment, "fedavg", {"name": "ray", "workers": 2}))


def test_a_server_that_is_killed_in_the_middle_goes_on_to_the_same_bits(fed: Loopback) -> None:
    overrides = ["strategy=scaffold", *SMALL, "local.momentum=0", "federation.rounds=3"]
    fed.share(overrides)

    def power_cut() -> None:
        checkpoint = fed.deployment.runs / "cut" / "checkpoints" / "round-000001"
        wait_until(checkpoint.exists, "the first checkpoint")
        fed.kill("server")
        fed.server()

    cut = Meanwhile(power_cut)
    assert fed.run(overrides, "cut") == 0
    cut.done()
    assert any("goes on" in line for line in fed.lines)
    assert_same(fed.model("cut"), simulated(fed.deployment, "cut"))


def test_a_run_that_is_stopped_is_no_success_and_can_be_resumed(fed: Loopback) -> None:
    overrides = ["strategy=fedavg", *SMALL, *MOMENTUM, "federation.rounds=9"]
    fed.share(overrides)

    def stop() -> None:
        checkpoint = fed.deployment.runs / "halted" / "checkpoints" / "round-000001"
        wait_until(checkpoint.exists, "the first checkpoint")
        operate.stop(fed.deployment, "halted", fed.lines.append)

    told = Meanwhile(stop)
    with pytest.raises(RunError, match="halted was stopped"):
        fed.run(overrides, "halted")
    told.done()
    reached = max(r.round for r in fed.records("halted"))
    assert reached < 9
    fewer = [f"federation.rounds={reached + 1}"]
    assert operate.resume(fed.deployment, "halted", fewer, False, fed.lines.append) == 0
    expected = simulated(fed.deployment, "halted", rounds=reached + 1)
    assert_same(fed.model("halted"), expected)


def test_a_run_that_fails_says_so_and_does_not_exit_with_success(fed: Loopback) -> None:
    overrides = ["strategy=fedavg", *SMALL, "local.lr=1e30"]
    fed.share(overrides)
    with pytest.raises(RunError, match="diverged failed: .*Round 1"):
        fed.run(overrides, "diverged")
    (told,) = (r for r in operate.status(fed.deployment).runs if r["name"] == "diverged")
    assert told["status"] == "finished:failed"
    assert "Round 1" in told["last_error"]
