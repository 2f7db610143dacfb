"""Texts that a new deployment is made of."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# Only what Flower itself needs is a dependency here: the devices have flowerbed installed, and nothing is installed
# when a run starts.
APP = """\
# The Flower app of a deployment: both halves are in the installed package flowerbed.
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "flowerbed-app"
version = "1.0.0"
description = "A federation of flowerbed"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "flowerbed"

[tool.flwr.app.components]
serverapp = "flowerbed.experiments.deploy.server_app:app"
clientapp = "flowerbed.experiments.deploy.client_app:app"

[tool.flwr.app.config]
# What the run expects of devices, as JSON; filled in when it is submitted.
flowerbed = ""
"""

SERVER_COMMENTS = {
    "address": "host name or address by which devices reach the server; the certificate is made out to it",
    "port": "the one port, for devices and, from this machine alone, for the operator",
    "bind": "address to listen on",
    "join_wait": "seconds that a run waits at its start for devices that are not connected",
    "reconnect": "seconds that a round waits for a device that has gone",
    "patience": "seconds after which a device that has not answered counts as failed",
    "poll": "seconds between two looks for replies",
    "request_mb": "largest single request of a device in MB; Flower sends models in pieces of 5 MB",
}
NODE_COMMENTS = {
    "server": "host:port of the server",
    "name": "what the operator calls this device",
    "client": "number of this device in the federation",
    "clients": "how many devices there are",
    "poll": "seconds between two looks for work",
    "warm": "fork every message's process from one with the libraries loaded, which takes no app with code in it",
    "allow": "modules beside flowerbed's from which a run may name strategies and models, separated by commas",
}


def device(client: int) -> str:
    """Return the first ``device.toml`` of a device."""
    return f"""\
# What this device says of itself; relative paths count from this folder.
client = {client}
store = "store"

[data]
kind = "npz"
path = "data.npz"
"""


def server_unit(root: Path) -> str:
    """Return a systemd unit for the server."""
    return f"""\
[Unit]
Description=flowerbed federation server
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={sys.executable} -m flowerbed.experiments.cli deploy server {root}
# Decoded data sets; the home is not writable.
Environment=FLOWERBED_CACHE={root}/cache
Restart=on-failure
RestartSec=5
# 2: something must be put right first.
RestartPreventExitStatus=2
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths={root}

[Install]
WantedBy=multi-user.target
"""


def node_unit(name: str) -> str:
    """Return a systemd unit for a device, whose folder is expected in /etc."""
    return f"""\
[Unit]
Description=flowerbed device {name}
Wants=network-online.target
After=network-online.target

[Service]
# Where flowerbed is installed on the device, and where this folder was copied to:
ExecStart=/opt/flowerbed/bin/flowerbed deploy node /etc/flowerbed
Restart=on-failure
RestartSec=10
# 2: something must be put right first.
RestartPreventExitStatus=2
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths=/etc/flowerbed

[Install]
WantedBy=multi-user.target
"""


def compose(address: str, port: int, names: Sequence[str], user: str) -> str:
    """Return a compose file: the server, and every device as a container beside it (for a rehearsal).

    ``user`` is UID:GID of who owns the folder: without capabilities not even root may read what is another's.
    """
    nodes = "".join(
        f"""\
  {name}:
    <<: *flowerbed
    command: flowerbed deploy node /device
    volumes: ["./nodes/{name}:/device"]
    depends_on: [server]
"""
        for name in names
    )
    return f"""\
# An image with `pip install flowerbed`, by the name in FLOWERBED_IMAGE. Operator's commands run inside the server's
# container: docker compose exec server flowerbed deploy status /deployment
x-flowerbed: &flowerbed
  image: ${{FLOWERBED_IMAGE:-flowerbed}}
  user: "{user}"
  read_only: true
  tmpfs: ["/tmp"]
  cap_drop: ["ALL"]
  security_opt: ["no-new-privileges:true"]
  restart: on-failure

services:
  server:
    <<: *flowerbed
    command: flowerbed deploy server /deployment
    volumes: [".:/deployment"]
    environment: ["FLOWERBED_CACHE=/deployment/cache"]
    ports: ["{port}:{port}"]
    # The certificate is made out to this name.
    networks: {{default: {{aliases: ["{address}"]}}}}
{nodes}"""
