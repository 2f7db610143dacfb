"""A device is the same client as a simulated one: parity, persistence, refusals."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployed import expectations, make_devices, parts_of
from flwr.app import Context, Message

from flowerbed.clients.device_data import save_npz
from flowerbed.clients.device_store import DeviceStore, Usage
from flowerbed.clients.store import DiskStore, MemoryStore
from flowerbed.datasets.form import DataForm
from flowerbed.errors import ClientError, ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.deploy.device import (
    RUN_KEY,
    DeviceConfig,
    DeviceDataParams,
    Expectations,
    Quotas,
    Report,
    check,
    client_number,
    device_app,
)
from flowerbed.experiments.parts import Parts
from flowerbed.experiments.simulation import make_federation, open_grid
from flowerbed.server.device_params import DeviceParams
from flowerbed.server.devices import DeviceLink, survey
from flowerbed.server.grids.inprocess import InProcessGrid


def fleet(configs: list[Path]) -> Callable[[], Callable[[Message, Context], Message]]:
    """Return an app that answers each message by a new app of the right device: one process per message."""

    def answer(message: Message, context: Context) -> Message:
        return device_app(configs[int(context.node_config["partition-id"])])(message, context)

    return lambda: answer


def deployed(folder: Path, parts: Parts) -> InProcessGrid:
    config = {RUN_KEY: expectations(parts).dumps()}
    return InProcessGrid(fleet(make_devices(folder, parts)), len(parts.train.sizes), run_config=config)


CASES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "scaffold": {},
    "fedloge": {"options": {"gamma": 1.0, "beta": 0.3, "ssec_steps": 20, "ssec_lr": 0.01}},
    "fedlabel": {"options": {"beta": 0.15}, "data": {"labelled": 0.3}},
    "ggeur": {"options": {"T": 30}, "model": {"name": "linear"}},
}


@pytest.mark.parametrize("strategy", CASES)
def test_a_device_is_bit_for_bit_the_simulated_client(strategy: str, tmp_path: Path) -> None:
    case = dict(CASES[strategy])
    parts = parts_of(strategy, case.pop("options", None), **case)
    with open_grid(parts, MemoryStore()) as grid:
        simulated = make_federation(parts, grid).run()
    again = parts_of(strategy, dict(CASES[strategy]).pop("options", None), **case)
    with deployed(tmp_path, again) as grid:
        real = make_federation(again, grid).run()
    assert not real.failures
    assert simulated.model.keys() == real.model.keys()
    for name, value in simulated.model.items():
        assert torch.equal(value, real.model[name]), name
    assert simulated.final("clients") == real.final("clients")


# The store and restarts.


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"own": {"v": torch.full((1000,), value)}}


def test_a_device_keeps_a_few_versions_and_says_when_the_server_goes_back_too_far(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path, "run", keep=3)
    assert store.read(0, 5) == {}
    for round_ in (2, 3, 5, 6, 9):
        store.write(0, round_, state(round_))
    assert [store.read(0, t)["own"]["v"][0].item() for t in (6, 7, 10)] == [5.0, 6.0, 9.0]
    # Before its first round a client never had a state: nothing is lost there.
    assert store.read(0, 2) == {}
    with pytest.raises(ClientError, match="round 4 starts from is gone.*keep_rounds"):
        store.read(0, 4)
    # Another process, and another run.
    assert DeviceStore(tmp_path, "run", keep=3).read(0, 10)["own"]["v"][0] == 9.0
    assert DeviceStore(tmp_path, "other", keep=3).read(0, 10) == {}


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 101])
def test_a_run_is_no_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        DeviceStore(tmp_path, name, keep=1)


def require_kept(store: DeviceStore) -> None:
    assert store.read(0, 10)["own"]["v"][0] == 1.0
    assert not [p for p in store.root.rglob("*") if p.name.startswith(".")], "a partial file is left"


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DeviceStore(tmp_path, "run", keep=3)
    store.write(0, 1, state(1.0))
    DeviceStore(tmp_path, "finished", keep=3).write(0, 1, state(1.0))
    written = os.fdopen

    def full(handle: int, *rest: Any) -> Any:
        file = written(handle, *rest)
        file.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(
        ClientError, match=r"the disk with .* is full .* make room or remove .* \(finished"
    ) as caught:
        store.write(0, 2, state(2.0))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    require_kept(store)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        store = DeviceStore(tmp_path, "run", keep=3)
        store.write(0, 1, state(1.0))
        (tmp_path / "ballast").write_bytes(b"x" * (os.statvfs(tmp_path).f_bavail * 4096 - 3000))
        with pytest.raises(ClientError, match="is full"):
            store.write(0, 2, state(2.0))
        require_kept(store)
        (tmp_path / "ballast").unlink()
        store.write(0, 2, state(2.0))
        assert store.read(0, 10)["own"]["v"][0] == 2.0
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_a_failure_of_that_round_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of("scaffold", federation={"rounds": 3, "quorum": 0.5})
    write = DiskStore.write

    def sometimes(self: DiskStore, client: int, round_: int, kept: Any) -> None:
        if (client, round_) == (1, 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, client, round_, kept)

    monkeypatch.setattr(DiskStore, "write", sometimes)
    with deployed(tmp_path, parts) as grid:
        result = make_federation(parts, grid).run()
    (failure,) = result.failures
    assert (failure.round, failure.client) == (2, 1)
    assert "is full" in failure.reason
    kept = DeviceStore(tmp_path / "device-1" / "store", "run-1", 10)
    assert kept.read(1, 3).keys() == kept.read(1, 2).keys() == {"control"}


# Quotas and limits of the owner.


def usage(folder: Path, **quotas: Any) -> Usage:
    return Usage(folder, Quotas(**quotas))


def test_quotas_count_over_processes_and_start_anew_every_day(tmp_path: Path) -> None:
    for _ in range(2):
        usage(tmp_path, trainings_per_day=2).accept(10, train=True)
    usage(tmp_path, trainings_per_day=2).accept(10, train=False)
    with pytest.raises(ClientError, match=r"quota: the trainings of today .* quotas\.trainings_per_day"):
        usage(tmp_path, trainings_per_day=2).accept(10, train=True)
    counted = json.loads((tmp_path / "usage.json").read_text())
    assert (counted["download"], counted["trainings"]) == (30, 2)
    (tmp_path / "usage.json").write_text(json.dumps({**counted, "day": "2000-01-01"}))
    usage(tmp_path, trainings_per_day=2).accept(10, train=True)
    assert json.loads((tmp_path / "usage.json").read_text())["trainings"] == 1
    # A clock that was set back gives no new quota; a damaged file costs no more than the count.
    (tmp_path / "usage.json").write_text(json.dumps({**counted, "day": "9999-12-31"}))
    with pytest.raises(ClientError, match="trainings_per_day"):
        usage(tmp_path, trainings_per_day=2).accept(10, train=True)
    (tmp_path / "usage.json").write_text("{")
    usage(tmp_path, trainings_per_day=2).accept(10, train=True)


def test_bytes_have_quotas_in_both_directions(tmp_path: Path) -> None:
    limits = {"download_mb_per_day": 0.001, "upload_mb_per_day": 0.002, "message_mb": 0.0015}
    usage(tmp_path, **limits).accept(900, train=False)
    with pytest.raises(ClientError, match="download_mb_per_day"):
        usage(tmp_path, **limits).accept(200, train=False)
    usage(tmp_path, **limits).release(1400)
    with pytest.raises(ClientError, match="upload_mb_per_day"):
        usage(tmp_path, **limits).release(700)
    with pytest.raises(
        ClientError, match=r"the message has 0\.0 MB, this device's quotas\.message_mb is 0\.0015"
    ):
        usage(tmp_path, **limits).accept(1600, train=False)
    # Without quotas nothing is written at all.
    usage(tmp_path / "none").accept(10**12, train=True)
    assert not (tmp_path / "none").exists()


def test_a_device_over_its_quota_is_a_failure_named_so(tmp_path: Path) -> None:
    parts = parts_of(federation={"quorum": 0.5})
    configs = make_devices(tmp_path, parts)
    configs[2].write_text(configs[2].read_text() + "[quotas]\ntrainings_per_day = 1\n")
    with InProcessGrid(fleet(configs), 3, run_config={RUN_KEY: expectations(parts).dumps()}) as grid:
        result = make_federation(parts, grid).run()
    assert [(f.round, f.client, f.kind) for f in result.failures] == [(2, 2, "quota")]


def test_a_ticket_comes_back(tmp_path: Path) -> None:
    parts = parts_of()
    with deployed(tmp_path, parts) as grid:
        federation = make_federation(parts, grid)
        federation.link = DeviceLink(DeviceParams(), [], tickets=True)
        result = federation.run()
    assert not result.failures
    with open_grid(parts_of(), MemoryStore()) as grid:
        plain = make_federation(parts_of(), grid).run()
    assert all(torch.equal(v, result.model[n]) for n, v in plain.model.items())


def test_the_memory_limit_is_one_line(tmp_path: Path) -> None:
    """In a process of its own, because a limit cannot be taken back."""
    parts = parts_of()
    make_devices(tmp_path, parts)
    code = f"""
import torch
from flowerbed.experiments.deploy import device
def greedy(*arguments): return torch.zeros(4 * 10**9, dtype=torch.uint8)
device.DeviceApp._reply = greedy
from pathlib import Path
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flowerbed.server.grids import flower_compat
flower_compat.set_identity(1)
path = Path({str(tmp_path / "device-0" / "device.toml")!r})
path.write_text("memory_limit_mb = 1500\\n" + path.read_text())
message = Message(RecordDict({{"c": ConfigRecord({{}})}}), dst_node_id=7, message_type="query")
flower_compat.set_message_id(message, "1")
try:
    device.device_app(path)(message, Context(1, 7, {{}}, RecordDict(), {{}}))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ClientError the device ran out of memory (memory_limit_mb=1500)" in done.stdout, done.stderr[
        -2000:
    ]


# Which device this is, and what it tells.


@pytest.mark.parametrize(
    ("client", "told", "message"),
    [(-1, None, "has no number"), (1, 2, r"client=1 and the node's partition-id is 2")],
)
def test_a_device_without_one_number(client: int, told: int | None, message: str, tmp_path: Path) -> None:
    made = DeviceConfig(DeviceDataParams("npz"), tmp_path, client=client)
    with pytest.raises(ClientError, match=message):
        client_number(made, {} if told is None else {"partition-id": told})
    assert client_number(made, {"partition-id": 1}) == 1


def test_a_survey_reaches_devices_and_the_capabilities_are_theirs(tmp_path: Path) -> None:
    parts = parts_of()
    configs = make_devices(tmp_path, parts)
    capable = "[capabilities]\nram_mb = 512\nspeed = 0.5\nbandwidth_mbit = 2.5\n"
    configs[1].write_text(configs[1].read_text() + capable)
    with InProcessGrid(fleet(configs), 3, run_config={RUN_KEY: expectations(parts).dumps()}) as grid:
        found = survey(grid, grid.get_node_ids())
    assert {node: client for node, (client, _) in found.items()} == {1000: 0, 1001: 1, 1002: 2}
    weak = found[1001][1]
    assert (weak.speed, weak.bandwidth_mbit, weak.ram_mb) == (0.5, 2.5, 512)
    assert [found[node][1].examples for node in (1000, 1001, 1002)] == parts.train.sizes.tolist()
    # Without a run it still says which one it is.
    with InProcessGrid(fleet(configs), 3) as grid:
        assert survey(grid, [1001])[1001][0] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client = 0", r"\[data\] needs a kind|\[data\] is missing"),
        ("= 3", "is no TOML"),
        ('clint = 0\n[data]\nkind = "npz"', "Did you mean 'client'"),
        ('threads = "two"\n[data]\nkind = "npz"', "threads must be a whole number, got 'two'"),
        ('threads = true\n[data]\nkind = "npz"', "threads must be a whole number, got True"),
        ('threads = 0\n[data]\nkind = "npz"', "threads is 0; give 1 or more"),
        ('device = "tpu"\n[data]\nkind = "npz"', "choose auto, cpu or cuda"),
        ('[data]\nkind = "npz"\n[quotas]\nmessages = 3', r"Unknown key in \[quotas\] 'messages'"),
        (
            '[data]\nkind = "npz"\n[capabilities]\nspeed = 0',
            "capabilities.speed is 0.0; give a number above 0",
        ),
        ('data = "npz"', "'data' must be a table"),
        ('[data]\npath = "x"', r"\[data\] needs a kind"),
    ],
)
def test_a_bad_configuration_is_one_error_that_names_the_file(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "device.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        DeviceConfig.read(path)
    assert str(path) in str(caught.value)


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml cannot be read: No such file"):
        DeviceConfig.read(tmp_path / "missing.toml")


# The dry run.


def report_of(tmp_path: Path, parts: Parts, text: str = "", **changes: Any) -> Report:
    (path, *_) = make_devices(tmp_path, parts)
    path.write_text(f"{text}\n{path.read_text()}")
    return check(path, replace(expectations(parts), **changes))


def test_a_dry_run_of_a_good_device(tmp_path: Path) -> None:
    parts = parts_of()
    report = report_of(tmp_path, parts)
    assert report.ok, report.lines()
    assert report.facts["training samples"] == str(parts.train.size(0))
    assert "MB" in report.facts["model"]
    assert not (tmp_path / "device-0" / "store" / "runs").exists()


def test_a_dry_run_names_each_mismatch_once(tmp_path: Path) -> None:
    parts = parts_of()
    form, tensors = DataForm.of(parts.dataset), expectations(parts).tensors
    name = next(iter(tensors))
    changes: dict[str, dict[str, Any]] = {
        r"inputs have shape \(1, 8, 8\), the run's data 'digits' have \(1, 9, 9\)": {
            "form": replace(form, input_shape=(1, 9, 9)),
        },
        r"labels hold 9, the run knows the classes 0\.\.2": {"form": replace(form, classes=("0", "1", "2"))},
        "The model 'mlp' differs between device and server": {"tensors": {**tensors, name: (1, 2)}},
        "Unknown strategy 'fedavgg'": {
            "simulation": {**expectations(parts).simulation, "strategy": {"name": "fedavgg"}}
        },
    }
    for number, (message, change) in enumerate(changes.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        report = report_of(folder, parts, **change)
        assert [p for p in report.problems if re.search(message, p)], (message, report.problems)
        assert len(report.problems) == (2 if "form" in change else 1), report.problems


def test_a_dry_run_needs_room(tmp_path: Path) -> None:
    parts = parts_of(model={"name": "mlp", "hidden": [4000]})
    for number, (text, message) in enumerate(
        [
            ("memory_limit_mb = 1", "memory_limit_mb is 1"),
            ("store = '/proc/none'", "The store /proc/none cannot be"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (problem,) = report_of(folder, parts, text).problems
        assert message in problem


def test_a_dry_run_with_something_that_is_no_expectation(tmp_path: Path) -> None:
    (path, *_) = make_devices(tmp_path, parts_of())
    for text in ("", "{}", "[1]", '{"form": 3}'):
        (problem,) = check(path, text).problems
        assert "the same version of flowerbed" in problem


def test_expectations_survive_a_journey_as_json() -> None:
    wanted = expectations(parts_of())
    again = Expectations.loads(wanted.dumps())
    assert again.form == wanted.form
    assert again.tensors == wanted.tensors
    assert Simulation.of(again.simulation).strategy == Simulation.of(wanted.simulation).strategy


# Little data.


def write_samples(folder: Path, parts: Parts, rows: list[int]) -> None:
    save_npz(folder / "data.npz", parts.dataset, rows, [])


@pytest.mark.parametrize("count", [1, 3])
def test_a_device_with_hardly_any_data_takes_part(count: int, tmp_path: Path) -> None:
    parts = parts_of("fedloge", CASES["fedloge"]["options"], model={"name": "mlp", "hidden": [16]})
    configs = make_devices(tmp_path, parts)
    write_samples(configs[0].parent, parts, list(range(count)))
    report = check(configs[0], expectations(parts))
    assert report.ok, report.lines()
    assert any("fewer training samples than a batch" in note for note in report.notes)
    assert any("no training sample of" in note for note in report.notes)
    with InProcessGrid(fleet(configs), 3, run_config={RUN_KEY: expectations(parts).dumps()}) as grid:
        result = make_federation(parts, grid).run()
    assert not result.failures
    assert all(bool(torch.isfinite(v).all()) for v in result.model.values())


def test_a_device_without_samples_says_so(tmp_path: Path) -> None:
    parts = parts_of(federation={"quorum": 0.5})
    configs = make_devices(tmp_path, parts)
    write_samples(configs[0].parent, parts, [])
    (problem,) = check(configs[0], expectations(parts)).problems
    assert problem == "This device has no training samples; add some, or lower data.test_fraction."
    with InProcessGrid(fleet(configs), 3, run_config={RUN_KEY: expectations(parts).dumps()}) as grid:
        result = make_federation(parts, grid).run()
    assert {(f.client, "no training samples" in f.reason) for f in result.failures} == {(0, True)}


def test_one_sample_and_batch_normalisation_is_told_before_joining(tmp_path: Path) -> None:
    parts = parts_of(model={"name": "worlds:bn_net"})
    configs = make_devices(tmp_path, parts)
    write_samples(configs[0].parent, parts, [0])
    (problem,) = check(configs[0], expectations(parts)).problems
    assert "a batch of one sample needs a model without batch normalisation" in problem


def test_a_device_that_knows_only_some_labels(tmp_path: Path) -> None:
    """Labels of -1 are unknown to everybody, so no measure of pseudo-labels may touch them."""
    parts = parts_of("fedlabel", {"beta": 0.15}, data={"labelled": 0.3})
    configs = make_devices(tmp_path, parts)
    for path in configs:
        with np.load(path.parent / "data.npz") as arrays:
            found = dict(arrays)
        labels = np.where(found.pop("labelled_train"), found["y_train"], -1)
        np.savez(path.parent / "data.npz", **{**found, "y_train": labels})
    with InProcessGrid(fleet(configs), 3, run_config={RUN_KEY: expectations(parts).dumps()}) as grid:
        result = make_federation(parts, grid).run()
    assert not result.failures
    with open_grid(parts, MemoryStore()) as grid:
        simulated = make_federation(parts_of("fedlabel", {"beta": 0.15}, data={"labelled": 0.3}), grid).run()
    assert all(torch.equal(v, result.model[n]) for n, v in simulated.model.items())


def test_a_base_installation_is_enough_for_a_device() -> None:
    """What a process of a device imports, from the configuration to the strategies."""
    code = """
import sys
import flowerbed.experiments.deploy.device, flowerbed.experiments.parts, flowerbed.experiments.transforms
from flowerbed.strategies.loader import load_all
load_all()
extras = "ray hydra omegaconf wandb matplotlib sklearn scipy pandas pyarrow PIL yaml torchvision dp_accounting cma"
print(*sorted(set(extras.split()) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
