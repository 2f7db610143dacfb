"""The command line up to the point where a run starts: what is composed, what is refused, what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowerbed.experiments import cli
from flowerbed.experiments.composition import compose_simulations
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.hydra_schema import CONF
from flowerbed.experiments.listing import things
from flowerbed.experiments.options import KINDS, thing
from flowerbed.models.zoo import MODELS
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.loader import load_all

Fails = Callable[..., str]

OWN_STRATEGY = '''
"""Half: FedAvg that goes half way."""
from __future__ import annotations
from dataclasses import dataclass
from flowerbed.errors import require
from flowerbed.strategies.aggregation import weighted_mean
from flowerbed.strategies.base import FederatedStrategy

@dataclass(frozen=True)
class HalfParams:
    mu: float = 0.5
    """How much of the old model stays."""

    def __post_init__(self) -> None:
        require(0 <= self.mu <= 1, f"strategy.mu is {self.mu}; give a number between 0 and 1.")

class Half(FederatedStrategy):
    Params = HalfParams

    def aggregate(self, server_round, current, replies):
        mean = weighted_mean([r.model for r in replies], [r.examples for r in replies])
        return {n: self.params.mu * current[n] + (1 - self.params.mu) * m for n, m in mean.items()}
'''


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Fails:
    """Return a function that runs a command which must exit with 2, and returns its one line of error."""

    def run(*arguments: str) -> str:
        assert cli.main(list(arguments)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("flowerbed: ")
        assert err.count("\n") == 1, "one line, no traceback"
        assert not any(tmp_path.rglob("config.yaml")), "nothing was started"
        return err

    return run


def compose(*overrides: str, **more: object) -> Simulation:
    (simulation,) = compose_simulations(overrides, **more)  # type: ignore[arg-type]
    return simulation


# What is composed.


def test_no_arguments_are_the_dataclass_defaults() -> None:
    composed, plain = compose(), Simulation()
    assert composed.strategy.name == "fedavg"
    for section in ("federation", "local", "evaluation", "stop", "data", "grid", "run", "tracking", "seed"):
        assert getattr(composed, section) == getattr(plain, section)


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_composes_with_its_own_defaults(kind: str) -> None:
    found = things(kind)
    composed = compose_simulations([f"{kind}={','.join(t.name for t in found)}"], sweep=True)
    for described, simulation in zip(found, composed, strict=True):
        choice = getattr(simulation, kind)
        assert choice.name == described.preset.get("name", described.name)
        given = {**{o.name: o.default for o in described.options}, **described.preset}
        given.pop("name")
        assert choice.options == {n: listed(v) for n, v in given.items()}


def listed(value: Any) -> Any:
    """Return a default as a configuration holds it: tuples are lists."""
    return list(map(listed, value)) if isinstance(value, tuple) else value


def test_names_that_other_tools_rely_on() -> None:
    composed = compose(
        "strategy=fedavg", "dataset=cifar10", "partition=dirichlet", "partition.alpha=0.3", "model=resnet8",
        "federation.clients=100", "federation.cohort=10", "federation.rounds=50", "local.epochs=2",
        "local.batch_size=64", "local.lr=0.05", "seed=7", "grid=ray", "grid.workers=3", "grid.address=auto",
        "run.dir=here", "tracking=wandb", "data.dir=there", "model.norm=gn",
    )  # fmt: skip
    assert composed.partition.plain()["alpha"] == 0.3
    assert composed.model.plain() == {"name": "resnet8", "norm": "gn", "groups": 8, "shortcut": "A"}
    federation, local = composed.federation, composed.local
    assert (federation.clients, federation.cohort, federation.rounds) == (100, 10, 50)
    assert (local.epochs, local.batch_size, local.lr) == (2, 64, 0.05)
    assert (composed.seed, composed.run.dir, composed.data.dir) == (7, "here", "there")
    assert (composed.grid.name, composed.grid.workers, composed.grid.address) == ("ray", 3, "auto")
    assert composed.tracking.name == "wandb"
    assert compose("grid=inprocess").grid.name == "inprocess"


@pytest.mark.parametrize(
    "overrides", [("strategy=flower:FedAdam",), ("strategy=flower", "strategy.flower=FedAdam")]
)
def test_both_ways_to_name_a_stock_flower_strategy(overrides: tuple[str, ...]) -> None:
    choice = compose(*overrides, "strategy.options.eta=0.01").strategy
    assert choice.plain() == {"name": "flower", "flower": "FedAdam", "options": {"eta": 0.01}, "inner": ""}


def test_names_outside_the_registries() -> None:
    assert compose("model=timm:resnet18", "model.pretrained=true").model.plain() == {
        "name": "timm:resnet18",
        "pretrained": True,
    }
    assert compose("dataset=npz:/data/a.npz", "dataset.layout=nhwc").dataset.plain() == {
        "name": "npz:/data/a.npz",
        "layout": "nhwc",
    }


def test_a_strategy_by_import_path_from_the_current_directory(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "own_module_for_cli.py").write_text(OWN_STRATEGY)
    name = "own_module_for_cli:Half"
    assert compose(f"strategy={name}", "strategy.mu=0.1").strategy.plain() == {"name": name, "mu": 0.1}
    assert "Unknown key in strategy 'mju'. Did you mean 'mu'?" in fails(
        "simulate", f"strategy={name}", "strategy.mju=1"
    )
    assert "strategy.mu is 2.0; give a number between 0 and 1." in fails(
        "simulate", f"strategy={name}", "strategy.mu=2"
    )
    assert "half" in fails("simulate", "strategy=own_module_for_cli:half")


def test_a_users_own_config_dir(tmp_path: Path, fails: Fails) -> None:
    folder = tmp_path / "conf" / "strategy"
    folder.mkdir(parents=True)
    head = "defaults:\n  - /schema/strategy/fedavg@_here_\n  - _self_\n"
    (folder / "half.yaml").write_text(head + "server_lr: 0.5\n")
    (folder / "typo.yaml").write_text(head + "server_rl: 0.5\n")
    composed = compose("strategy=half", config_dir=str(tmp_path / "conf"))
    assert composed.strategy.plain()["server_lr"] == 0.5
    error = fails("simulate", "--config-dir", "conf", "strategy=typo")
    assert "In 'strategy/typo': Unknown key in strategy 'server_rl'. Did you mean 'server_lr'?" in error
    assert "Did you mean 'half'?" in fails("simulate", "--config-dir", "conf", "strategy=halff")
    assert "no folder" in fails("simulate", "--config-dir", "elsewhere")


# What is refused.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federation.round=3", "Unknown key in federation 'round'. Did you mean 'rounds'? Known: clients, "),
        ("fedration.rounds=3", "Unknown setting 'fedration'. Did you mean 'federation'? Known: "),
        ("rounds=3", "Unknown setting 'rounds'."),
        ("+federation.x=3", "Unknown key in federation 'x'. Known: clients, cohort, "),
        ("+rounds=3", "Unknown setting 'rounds'."),
        ("~federation.rounds", "a setting cannot be taken away"),
        ("~model", "a setting cannot be taken away"),
        ("federation.rounds=many", "federation.rounds must be a whole number, got 'many'."),
        ("federation.rounds=2.5", "federation.rounds must be a whole number, got 2.5."),
        ("federation.rounds=null", "federation.rounds must be a whole number, got None."),
        ("local.lr=fast", "local.lr must be a number, got 'fast'."),
        ("stop.target=high", "stop.target must be a number, got 'high'."),
        ("data.download=perhaps", "data.download must be true or false, got 'perhaps'."),
        (
            "federation=3",
            "'federation' holds several settings, got 3; set them one by one: clients, cohort, ",
        ),
        ("federation.rounds", "'federation.rounds' is no setting; write key=value"),
        ("seed=0,1", "'seed=0,1' gives several values. To run each of them add --multirun (-m)"),
        (
            "strategy.server_rl=1",
            "Unknown key in strategy 'server_rl'. Did you mean 'server_lr'? Known: name, ",
        ),
        ("strategy.server_lr=-1", "strategy.server_lr is -1.0"),
        ("partition.alpha=0.3", "Unknown key in partition 'alpha'. Known: name."),
        ("strategy=fedavgg", "Unknown strategy 'fedavgg'. Did you mean 'fedavg'? Known: "),
        ("strategy=flower:FedAdamm", "Unknown Flower strategy 'FedAdamm'. Did you mean 'FedAdam'?"),
        ("strategy=no_such_module:Thing", "cannot be imported: No module named 'no_such_module'"),
        ("dataset=cifar11", "Unknown dataset 'cifar11'. Did you mean 'cifar10'?"),
        ("partition=dirichlett", "Unknown partition 'dirichlett'. Did you mean 'dirichlet'?"),
        ("model=resnet9", "Unknown model 'resnet9'. Did you mean 'resnet8'?"),
        ("grid=spark", "Unknown grid 'spark'. Known: inprocess, ray."),
        ("tracking=mlflow", "Unknown tracking 'mlflow'. Known: none, tensorboard, wandb."),
        ("hydra/launcher=none_such", "Unknown hydra/launcher 'none_such'. Known: "),
        ("federation.cohort=50", "federation.cohort is 50 but there are 10 clients"),
        ("seed=-1", "seed is -1; give 0 or more."),
    ],
)
def test_a_bad_override_is_one_clear_line(override: str, message: str, fails: Fails) -> None:
    assert message in fails("simulate", override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("partition=dirichlet", "partition.alpha=0"), "alpha above 0"),
        (("partition=quantity", "partition.profile=steep"), "not 'steep'"),
        (("dataset=cifar100", "dataset.labels=rough"), "not 'rough'"),
        (("model=mlp", "model.hidden=[wide]"), "model.hidden"),
        (("model=mlp", "model.hiden=[10]"), "Unknown key in model 'hiden'. Did you mean 'hidden'?"),
        (("model=resnet18", "model.norm=xx"), "norm"),
        (("strategy=flower:FedAdam", "strategy.options.etaa=1"), "Did you mean 'eta'?"),
        (("federation.clients=2000",), "2000 clients cannot share"),
        (("tracking=wandb", "tracking.mod=offline"), "Unknown key in tracking 'mod'. Did you mean 'mode'?"),
    ],
)
def test_values_are_checked_before_a_run_is_claimed(
    overrides: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["simulate", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.rglob("config.yaml"))
    assert not any(path.is_dir() and not any(path.iterdir()) for path in tmp_path.glob("runs/*/*"))


def test_every_value_of_a_sweep_is_checked_before_its_first_job(fails: Fails) -> None:
    assert "must be a whole number, got 'b'" in fails("simulate", "-m", "seed=0,1", "federation.rounds=1,b")
    assert "Unknown partition 'iidd'" in fails("simulate", "-m", "partition=dirichlet,iidd")
    error = fails("simulate", "-m", "partition=dirichlet,iid", "partition.alpha=1")
    assert "Unknown key in partition 'alpha'" in error
    assert "one value" in fails("simulate", "-m", "run.dir=a,b")


# What is printed.


def test_simulate_help_names_groups_keys_defaults_and_what_they_mean(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["simulate", "partition=dirichlet", "--help"]) == 0
    out = capsys.readouterr().out
    for text in ("federation.rounds=20", "Training rounds (T).", "partition.alpha=0.5", "*dirichlet", "--multirun",
                 "strategy.weighting=examples", "grid.name=inprocess", "local.lr=0.1", "Examples"):  # fmt: skip
        assert text in out
    assert max(map(len, out.splitlines())) <= 120
    for described in things("model"):
        assert described.name in out


def test_hydras_own_switches_still_work(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--cfg", "job", "federation.rounds=3"]) == 0
    assert "  rounds: 3\n" in capfd.readouterr().out


@pytest.mark.parametrize("plural", ["models", "strategies", "datasets", "partitions"])
def test_lists_as_text_and_json(plural: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", plural, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["list", plural]) == 0
    text = capsys.readouterr().out
    assert [item["name"] for item in found] == sorted(item["name"] for item in found)
    for item in found:
        assert set(item) == {"name", "summary", "options"}
        assert item["name"] in text


def test_list_takes_a_pattern_wherever_json_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["list", "models", "--json", "resnet*"], ["list", "models", "resnet*", "--json"]):
        assert cli.main(arguments) == 0
        names = [item["name"] for item in json.loads(capsys.readouterr().out)]
        assert names == MODELS.names("resnet*")
    assert cli.main(["list", "models", "zz*"]) == 0
    assert "No model matches" in capsys.readouterr().out


def test_every_strategy_of_ours_has_a_config_file_and_the_other_way_round() -> None:
    load_all()
    ours = {n for n in STRATEGIES.names() if STRATEGIES.get(n).__module__.startswith("flowerbed.strategies.")}
    assert {path.stem for path in (CONF / "strategy").glob("*.yaml")} == ours


def test_every_option_of_a_strategy_of_ours_says_what_it_is() -> None:
    load_all()
    for name in STRATEGIES.names():
        assert thing("strategy", name).summary, name


def test_a_traceback_is_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLOWERBED_TRACEBACK", "1")
    assert cli.main(["simulate", "local.lrr=1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_bad_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "overhed"]) == 2
    assert "Unknown benchmark 'overhed'. Did you mean 'overhead'?" in capsys.readouterr().err
    assert cli.main(["show", "nowhere"]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err
    assert cli.main(["resume", "nowhere"]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err
    for arguments in ([], ["lst"], ["list", "modells"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


# As a process.


def flowerbed(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowerbed.experiments.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_importing_the_command_is_cheap() -> None:
    code = (
        "import sys, flowerbed.experiments.cli\n"
        "print([n for n in ('torch', 'ray', 'flwr', 'hydra', 'numpy', 'rich', 'wandb') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_process_exits_with_the_code_and_no_traceback() -> None:
    done = flowerbed("simulate", "local.lrr=1")
    assert done.returncode == 2
    assert done.stderr.startswith("flowerbed: Unknown key in local 'lrr'. Did you mean 'lr'?")
    assert "Traceback" not in done.stderr
    assert flowerbed("--version").stdout.startswith("flowerbed ")
