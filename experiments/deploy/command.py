"""The command ``flowerbed deploy``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments.deploy import certificates, folder
from flowerbed.experiments.deploy.folder import DEVICE, PLAN, Deployment, ServerSettings
from flowerbed.experiments.deploy.node import DeviceNode, require_bundle

DESCRIPTION = (
    "A federation of real devices: a Flower SuperLink with TLS, and a SuperNode with a key on each device."
)
EPILOG = """\
On the server's machine:
  flowerbed deploy init fed --address fed.example.org --nodes ward-a,ward-b,ward-c
  flowerbed deploy server fed                                   serves until it is stopped
  flowerbed deploy register fed                                 lets the devices in
  flowerbed deploy run fed strategy=fedloge dataset=npz:reference.npz federation.rounds=20
  flowerbed deploy status fed                                   who is connected, which round, last error
  flowerbed deploy resume fed; flowerbed deploy stop fed; flowerbed deploy logs fed -f

On each device, with its folder fed/nodes/NAME and its data, named in device.toml:
  flowerbed deploy node NAME --dry-run                          do data and model fit what the server expects
  flowerbed deploy node NAME

To rehearse on one machine, deploy share fed KEY=VALUE ... gives every device the samples of a simulated client.
docs/deploy.md walks through all of it; docs/threat-model.md says who can see what.
Exit codes: 0 done (of run, resume and logs -f: the run came to its end), 1 a run failed or was stopped, 2 it could
not start as asked, 130 interrupted.
"""


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Do what the command line ``arguments`` asks for; return the exit code."""
    asked = _parser().parse_intermixed_args(list(arguments))
    words: list[str] = asked.words
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if overrides and asked.action not in ("run", "resume", "share", "plan"):
        raise ConfigError(f"deploy {asked.action} takes no settings, got '{overrides[0]}'.")
    if asked.action == "init":
        return _init(asked)
    if asked.action == "node":
        return _node(asked)
    deployment = Deployment.load(asked.directory)
    if asked.action == "renew":
        certificates.make_server(deployment.certificates, [*deployment.names, *asked.san], asked.days)
        _say("There is a new certificate; start the server again.")
        return 0
    return _operate(asked, deployment, overrides, names, as_json)


def _operate(
    asked: argparse.Namespace, deployment: Deployment, overrides: list[str], names: list[str], as_json: bool
) -> int:
    from flowerbed.experiments.deploy import operate

    name = names[0] if names else None
    if asked.action == "server":
        operate.serve(deployment, _say)
    if asked.action == "register":
        operate.register(deployment, names, _say)
        return 0
    if asked.action == "unregister":
        if not names:
            raise ConfigError("Name the devices to let in no longer: deploy unregister DIR NAME ...")
        operate.unregister(deployment, names, _say)
        return 0
    if asked.action in ("share", "plan"):
        parts, expectations = operate.planned(deployment, overrides, "rehearsal")
        operate.write_plan(deployment, expectations)
        if asked.action == "share":
            operate.share(deployment, parts)
        _say(
            f"{deployment.root / 'nodes'}: {'data.npz and ' if asked.action == 'share' else ''}{PLAN} of every device"
        )
        return 0
    if asked.action == "run" and asked.prepare:
        operate.prepare(deployment, overrides, asked.name, _say)
        return 0
    if asked.action == "run":
        return operate.run(deployment, overrides, asked.name, asked.detach, _say)
    if asked.action == "resume":
        return operate.resume(deployment, name, overrides, asked.detach, _say)
    if asked.action == "stop":
        operate.stop(deployment, name, _say)
        return 0
    if asked.action == "logs":
        return operate.logs(deployment, name, asked.follow, _say)
    found = operate.status(deployment)
    print(json.dumps(asdict(found), indent=1) if as_json else _table(found))
    return 0


def _init(asked: argparse.Namespace) -> int:
    if not asked.address:
        raise ConfigError("Say how devices reach this server: --address HOST or HOST:PORT.")
    host, port = _host_and_port(asked.address)
    nodes: str = asked.nodes
    names = [f"node-{i}" for i in range(int(nodes))] if nodes.isdigit() else nodes.split(",")
    settings = ServerSettings(host, port, asked.bind)
    made = folder.create(asked.directory, settings, names, asked.san, asked.days)
    _say(f"{made.root}: start the server with flowerbed deploy server {asked.directory},")
    _say(
        f"register the devices with flowerbed deploy register {asked.directory}, and give each its folder in nodes/."
    )
    return 0


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        return address.strip("[]"), ServerSettings(address).port
    if not port.isdigit():
        raise ConfigError(f"--address is '{address}'; write HOST or HOST:PORT.")
    return host.strip("[]"), int(port)


def _node(asked: argparse.Namespace) -> int:
    bundle = asked.directory.expanduser().absolute()
    require_bundle(bundle)
    if not asked.dry_run:
        DeviceNode.load(bundle, _say).run()
        return 0
    from flowerbed.experiments.deploy.client_app import refuse_foreign
    from flowerbed.experiments.deploy.device import check

    plan = asked.plan or bundle / PLAN
    try:
        expectations = plan.read_text()
    except OSError as error:
        raise ConfigError(
            f"What the server expects cannot be read from {plan} ({error.strerror}); the operator makes it with deploy "
            "plan DIR KEY=VALUE ..., give it with --plan."
        ) from error
    node = DeviceNode.load(bundle, _say)
    refuse_foreign(expectations, node.settings.modules)
    report = check(bundle / DEVICE, expectations)
    for line in report.lines():
        _say(line)
    reachable = _reachable(node)
    _say(reachable or f"server                 {node.settings.server} can be reached and is trusted")
    if report.problems:
        raise ConfigError(f"This device cannot take part: {report.problems[0]}")
    if reachable:
        raise RunError(f"This device could take part, but: {reachable}")
    return 0


def _reachable(node: DeviceNode) -> str:
    from flowerbed.experiments.deploy.node import preflight

    try:
        preflight(node.settings.server, node.folder / "ca.crt")
    except ConnectionError as error:
        return f"The server {node.settings.server} cannot be reached: {error}."
    return ""


def _table(found: object) -> str:
    plain = asdict(found)  # type: ignore[call-overload]
    lines = ["device            client  status          connected"]
    lines += [f"{n['name']:16}  {n['client']:6}  {n['status']:14}  {n['connected']}" for n in plain["nodes"]]
    if plain["strangers"]:
        lines.append(f"and {plain['strangers']} registered nodes that are none of this deployment's")
    for run in plain["runs"]:
        failures = sum(run["failures"].values())
        lines += ["", f"run {run['name']}: {run['status']}, round {run['round']} of {run['rounds']}"]
        lines[-1] += f", {failures} failures" if failures else ""
        lines[-1] += f", started {run['attempts']} times" if run["attempts"] > 1 else ""
        if run["last_error"]:
            lines.append(f"  last error: {run['last_error']}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed deploy",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = (
        "init", "server", "node", "register", "unregister", "renew", "plan", "share", "status", "run", "resume", "stop",
        "logs",
    )  # fmt: skip
    parser.add_argument("action", choices=actions, metavar="ACTION", help=", ".join(actions))
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="the deployment; for node, the device's folder"
    )
    parser.add_argument(
        "words", nargs="*", metavar="NAME | KEY=VALUE", help="devices, a run, or settings of the experiment"
    )
    init = parser.add_argument_group("init and renew")
    init.add_argument("--address", metavar="HOST[:PORT]", help="how devices reach the server (port 9092)")
    init.add_argument(
        "--nodes", default="3", metavar="N | NAME,...", help="the devices: how many, or their names (3)"
    )
    init.add_argument("--bind", default="0.0.0.0", metavar="ADDRESS", help="address to listen on (all)")
    init.add_argument(
        "--san", action="append", default=[], metavar="NAME", help="further name of the server; repeatable"
    )
    init.add_argument(
        "--days", type=int, default=397, help="days that the server's certificate is valid (397)"
    )
    node = parser.add_argument_group("node")
    node.add_argument(
        "--dry-run", action="store_true", help="check data, model and connection, and do not join"
    )
    node.add_argument("--plan", type=Path, metavar="FILE", help=f"what the server expects (DIR/{PLAN})")
    run = parser.add_argument_group("run, resume and logs")
    run.add_argument("--name", help="name of the run (date and time)")
    run.add_argument("--detach", action="store_true", help="submit it and do not wait for its end")
    run.add_argument(
        "--prepare",
        action="store_true",
        help="of run: only describe it, and print the flwr run that submits it",
    )
    run.add_argument("-f", "--follow", action="store_true", help="of logs: go on until the run is over")
    return parser
