"""A deployment on the operator's disk: one folder with everything, and in it one folder for every device."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowerbed.errors import ConfigError, require, unknown_name
from flowerbed.experiments.deploy import certificates, templates

SETTINGS = "deployment.toml"
NODE_SETTINGS = "node.toml"
DEVICE = "device.toml"
KEY = "node.key"
PLAN = "plan.json"
NODES = "nodes.json"
APP = "flowerbed-app"
FLOWER_HOME = "flower"
"""Folder for Flower's own files, on the server's machine and on a device."""
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class ServerSettings:
    """``deployment.toml``: what the server is told."""

    address: str
    """Host name or address by which devices reach the server; the certificate is made out to it."""
    port: int = 9092
    """The one port, for devices and, from this machine alone, for the operator."""
    bind: str = "0.0.0.0"
    """Address to listen on."""
    join_wait: float = 300.0
    """Seconds that a run waits at its start for devices that are not connected; it then goes on without them."""
    reconnect: float = 60.0
    """Seconds that a round waits for a device that has gone before it counts as failed."""
    patience: float = 3600.0
    """Seconds after which a device that has not answered counts as failed; ``federation.time_limit`` of a run, and a
    minute for the journey, come first where they are less."""
    poll: float = 0.2
    """Seconds between two looks for replies."""
    request_mb: float = 16.0
    """Largest single request of a device in MB; Flower sends models in pieces of 5 MB."""

    def __post_init__(self) -> None:
        require(bool(self.address), "address is empty; give the name by which devices reach the server.")
        require(0 < self.port < 65536, f"port is {self.port}; give a number from 1 to 65535.")
        for name in ("join_wait", "reconnect"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; give 0 or more seconds.")
        for name in ("patience", "poll", "request_mb"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; give a number above 0.")


@dataclass(frozen=True)
class NodeSettings:
    """``node.toml``: what a device is told beside what it says of itself in ``device.toml``."""

    server: str
    """``host:port`` of the server."""
    name: str
    client: int
    """The device's number in the federation, from 0."""
    clients: int
    """How many devices there are."""
    poll: float = 0.5
    """Seconds between two looks for work; each costs the server a signature check."""
    warm: bool = True
    """Keep a process with the libraries loaded, from which every message's process is forked; it takes no app that has
    code in it, which Flower's own launcher would run."""
    allow: str = ""
    """Modules beside flowerbed's from which a run may name strategies and models, separated by commas."""

    @property
    def modules(self) -> list[str]:
        """The modules of ``allow``."""
        return [module for name in self.allow.split(",") if (module := name.strip())]

    def __post_init__(self) -> None:
        require(
            self.server.count(":") >= 1 and self.server.rpartition(":")[2].isdigit(),
            f"server is '{self.server}'; write host:port.",
        )
        require(self.poll > 0, f"poll is {self.poll}; give a number of seconds above 0.")
        require(
            0 <= self.client < self.clients,
            f"client is {self.client} of {self.clients}; clients count from 0.",
        )


@dataclass(frozen=True)
class Node:
    """A device as the operator knows it."""

    name: str
    client: int
    node_id: int = 0
    """Given by the SuperLink when the device's key was registered; 0 before."""


@dataclass(frozen=True)
class Deployment:
    """The folder of a deployment."""

    root: Path
    settings: ServerSettings
    nodes: tuple[Node, ...] = field(default=())
    """By client number."""

    @classmethod
    def load(cls, root: Path) -> Deployment:
        """Read the folder; raises ``ConfigError`` if it holds no deployment or something in it is wrong."""
        root = root.expanduser().absolute()
        if not (root / SETTINGS).is_file():
            raise ConfigError(f"{root} holds no deployment; make one with: flowerbed deploy init {root}")
        settings = read_settings(root / SETTINGS, ServerSettings)
        return cls(root, settings, _read_nodes(root / NODES))

    @property
    def here(self) -> str:
        """host:port by which this machine reaches the server."""
        bind = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.bind, self.settings.bind)
        return f"[{bind}]:{self.settings.port}" if ":" in bind else f"{bind}:{self.settings.port}"

    @property
    def names(self) -> list[str]:
        """The names and addresses that the server's certificate must have, beside those of every machine."""
        own = [] if self.settings.bind in ("0.0.0.0", "::") else [self.settings.bind]
        return [self.settings.address, *own]

    @property
    def certificates(self) -> Path:
        """The folder of the authority and the server's certificate."""
        return self.root / "certificates"

    @property
    def authority(self) -> Path:
        """The certificate by which devices know the server."""
        return self.certificates / "ca.crt"

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.root / "runs"

    @property
    def app(self) -> Path:
        """The thin Flower app."""
        return self.root / APP

    def bundle(self, name: str) -> Path:
        """Return the folder that a device gets."""
        return self.root / "nodes" / name

    def with_node_ids(self, ids: Mapping[str, int]) -> Deployment:
        """Write down the node ids of devices by name; return the deployment that knows them."""
        nodes = tuple(dataclasses.replace(n, node_id=ids.get(n.name, n.node_id)) for n in self.nodes)
        _write_nodes(self.root / NODES, nodes)
        return dataclasses.replace(self, nodes=nodes)

    def run_names(self) -> list[str]:
        """Return the runs that there are, oldest first."""
        found = [p.parent for p in self.runs.glob("*/flower.json")]
        return [p.name for p in sorted(found, key=lambda p: (p / "flower.json").stat().st_ctime)]

    def run(self, name: str | None) -> Path:
        """Return the folder of a run, by default the newest; raises ``ConfigError`` if there is none."""
        known = self.run_names()
        if name is None:
            if not known:
                raise ConfigError(f"There was no run yet; start one with: flowerbed deploy run {self.root}")
            return self.runs / known[-1]
        if name not in known:
            raise ConfigError(unknown_name("run", name, known))
        return self.runs / name


def create(
    root: Path, settings: ServerSettings, names: Sequence[str], also: Sequence[str], days: int
) -> Deployment:
    """Write a new deployment; raises ``ConfigError`` if the folder is not empty or a name cannot be used."""
    root = root.expanduser().absolute()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"{root} is not empty; give a new folder.")
    require(bool(names), "A federation needs at least one device; give --nodes.")
    for name in names:
        require(
            NAME.fullmatch(name) is not None,
            f"'{name}' cannot be a device's name; use small letters, digits and '-'.",
        )
        require(list(names).count(name) == 1, f"The device name '{name}' is given twice.")
    require(days > 0, f"--days is {days}; give at least 1.")
    nodes = tuple(Node(name, client) for client, name in enumerate(names))
    deployment = Deployment(root, settings, nodes)
    root.mkdir(parents=True, exist_ok=True)
    # It holds private keys.
    root.chmod(0o700)
    deployment.certificates.mkdir(mode=0o700)
    certificates.make_authority(deployment.certificates, root.name)
    certificates.make_server(deployment.certificates, [*deployment.names, *also], days)
    write_settings(root / SETTINGS, settings, templates.SERVER_COMMENTS)
    _write_nodes(root / NODES, nodes)
    deployment.app.mkdir()
    (deployment.app / "pyproject.toml").write_text(templates.APP)
    (root / "flowerbed-server.service").write_text(templates.server_unit(root))
    owner = f"{os.getuid()}:{os.getgid()}"
    (root / "compose.yaml").write_text(templates.compose(settings.address, settings.port, names, owner))
    for node in nodes:
        _create_bundle(deployment, node)
    return deployment


def _create_bundle(deployment: Deployment, node: Node) -> None:
    folder = deployment.bundle(node.name)
    folder.mkdir(parents=True, mode=0o700)
    certificates.make_node_key(folder / KEY)
    (folder / "ca.crt").write_bytes(deployment.authority.read_bytes())
    settings = deployment.settings
    host = f"[{settings.address}]" if ":" in settings.address else settings.address
    told = NodeSettings(f"{host}:{settings.port}", node.name, node.client, len(deployment.nodes))
    write_settings(folder / NODE_SETTINGS, told, templates.NODE_COMMENTS)
    (folder / DEVICE).write_text(templates.device(node.client))
    (folder / "flowerbed-node.service").write_text(templates.node_unit(node.name))


def read_settings(path: Path, kind: type) -> Any:
    """Return the dataclass that a flat TOML file describes; raises ``ConfigError`` naming the file and the key."""
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}.") from error
    known = {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in plain.items():
        if key not in known:
            raise ConfigError(f"{path}: {unknown_name('key', key, known)}")
        wanted = str(known[key].type)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = {"str": isinstance(value, str), "bool": isinstance(value, bool), "float": number}
        if not right.get(wanted, number and isinstance(value, int)):
            raise ConfigError(f"{path}: {key} must be of type {wanted}, got {value!r}.")
        values[key] = float(value) if wanted == "float" else value
    missing = [n for n, f in known.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{path}: the key '{missing[0]}' is missing.")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_settings(path: Path, settings: Any, comments: Mapping[str, str]) -> None:
    """Write a flat dataclass as TOML with a comment on every key."""
    from flowerbed.storage import atomic_write

    lines = []
    for f in dataclasses.fields(settings):
        # JSON's numbers, strings and booleans are TOML's.
        lines += [f"# {comments[f.name]}", f"{f.name} = {json.dumps(getattr(settings, f.name))}"]
    atomic_write(path, ("\n".join(lines) + "\n").encode())


def _read_nodes(path: Path) -> tuple[Node, ...]:
    try:
        nodes = tuple(Node(**plain) for plain in json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"The list of devices {path} cannot be read: {error}.") from error
    if [n.client for n in nodes] != list(range(len(nodes))):
        raise ConfigError(
            f"{path} does not number its devices 0, 1, 2 ...; put it back as deploy init wrote it."
        )
    return nodes


def _write_nodes(path: Path, nodes: Sequence[Node]) -> None:
    # Brings torch, which the process that looks after a device's others does not need.
    from flowerbed.storage import atomic_write

    text = json.dumps([dataclasses.asdict(node) for node in nodes], indent=1)
    atomic_write(path, f"{text}\n".encode(), durable=True)
