"""A device joins: what can be wrong is found out first, then its two processes run and are looked after."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from flowerbed.errors import ConfigError
from flowerbed.experiments.deploy import certificates, flower
from flowerbed.experiments.deploy.folder import (
    DEVICE,
    FLOWER_HOME,
    KEY,
    NODE_SETTINGS,
    NodeSettings,
    read_settings,
)

SKEW = 60.0
"""Seconds by which a device's clock may differ from the server's; Flower takes no signature older than 5 minutes."""
AGAIN = (2.0, 5.0, 15.0, 60.0)
"""Seconds before a SuperNode that ended is started again."""
STEADY = 120.0
"""Seconds after which a SuperNode counts as having run well."""
REFUSED = ("404 Not Found", "401 Unauthorized", "Invalid SuperNode authentication")
"""What a SuperNode says when the server does not know its key."""
BUSY = "Failed to activate SuperNode"
"""What it says when the server takes the device for connected already."""

Say = Callable[[str], None]


@dataclass
class DeviceNode:
    """One device's folder and the processes that work for it."""

    folder: Path
    settings: NodeSettings
    say: Say
    _stopped: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def load(cls, folder: Path, say: Say) -> DeviceNode:
        """Read the folder; raises ``ConfigError`` for the first thing wrong in it."""
        folder = folder.expanduser().absolute()
        require_bundle(folder)
        settings = read_settings(folder / NODE_SETTINGS, NodeSettings)
        certificates.check_node_key(folder / KEY)
        certificates.read_certificate(folder / "ca.crt")
        if not (folder / DEVICE).is_file():
            raise ConfigError(f"{folder / DEVICE} is missing; it says where this device's data are.")
        return cls(folder, settings, say)

    def run(self) -> None:
        """Be a device of the federation until told to stop; raises ``FlowerbedError`` where that cannot work."""
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._wait_for_server()
            if not self._stopped.is_set():
                self._serve()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, *_: object) -> None:
        self._stopped.set()

    def _wait_for_server(self) -> None:
        told = False
        while not self._stopped.is_set():
            try:
                preflight(self.settings.server, self.folder / "ca.crt")
            except ConnectionError as error:
                if not told:
                    self.say(f"The server {self.settings.server} cannot be reached yet ({error}); trying on.")
                told = True
                self._stopped.wait(2)
            else:
                return

    def _serve(self) -> None:
        attempt = 0
        while not self._stopped.is_set():
            started = time.monotonic()
            code, last = self._one_life()
            if self._stopped.is_set():
                return
            if any(sign in line for sign in REFUSED for line in last):
                raise ConfigError(
                    f"The server {self.settings.server} does not know this device's key; on the server's machine run "
                    f"flowerbed deploy register DIR, with {KEY}.pub of this folder in place of the old one."
                )
            if any(BUSY in line for line in last):
                self.say(
                    "The server takes this device for connected: it was cut off less than half a minute ago, or its "
                    "key is in use on another machine. Trying again."
                )
                self._stopped.wait(AGAIN[0])
                continue
            attempt = 0 if time.monotonic() - started > STEADY else attempt + 1
            wait = AGAIN[min(attempt, len(AGAIN) - 1)]
            said = f": {last[-1]}" if last else ""
            self.say(f"The SuperNode ended with {code}{said}. It is started again in {wait:.0f} s.")
            self._stopped.wait(wait)
            self._wait_for_server()

    def _one_life(self) -> tuple[int, list[str]]:
        """Run a SuperNode, and a warm process beside it, until it ends; return its code and its last lines."""
        home = self.folder / FLOWER_HOME
        home.mkdir(mode=0o700, exist_ok=True)
        secret = home / "secret"
        certificates.write_private(secret, secrets.token_hex(32).encode())
        address = f"127.0.0.1:{free_port()}"
        environment = flower.environment(
            home, FLOWERBED_DEVICE=str(self.folder / DEVICE), FLOWERBED_ALLOW=",".join(self.settings.modules)
        )
        last: deque[str] = deque(maxlen=40)
        with contextlib.ExitStack() as stack:
            node = stack.enter_context(_child(self._supernode(address, secret), environment, pipe=True))
            reader = threading.Thread(target=self._read, args=(node.stdout, last), daemon=True)
            reader.start()
            if self.settings.warm:
                worker = [sys.executable, "-m", "flowerbed.experiments.deploy.worker", address, str(secret)]
                warm = stack.enter_context(_child(worker, environment))
            while node.poll() is None and not self._stopped.is_set():
                if self.settings.warm and warm.poll() is not None:
                    self.say("The warm process ended; the SuperNode is started again with a new one.")
                    break
                self._stopped.wait(0.2)
            ended = node.poll()
        reader.join(2)
        return (ended if ended is not None else -1), list(last)

    def _supernode(self, address: str, secret: Path) -> list[str]:
        told = self.settings
        host, _, port = address.rpartition(":")
        command = [sys.executable, "-m", "flowerbed.experiments.deploy.supernode", str(told.poll)]
        command += ["--root-certificates", str(self.folder / "ca.crt"), "--superlink", told.server]
        command += ["--auth-supernode-private-key", str(self.folder / KEY), "--host", host, "--port", port]
        command += ["--node-config", f"partition-id={told.client} num-partitions={told.clients}"]
        if told.warm:
            command += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        return command

    def _read(self, stream: IO[str] | None, last: deque[str]) -> None:
        for line in stream or ():
            text = line.rstrip()
            if text:
                last.append(text)
                self.say(text)


def preflight(server: str, authority: Path) -> None:
    """Find out whether the server can be reached and trusted, and whether the clocks agree.

    Raises ``ConfigError`` for what somebody must put right, ``ConnectionError`` for a server that is not there (yet).
    """
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cafile=str(authority))
    try:
        with (
            socket.create_connection((host, int(port)), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname=host) as connection,
        ):
            connection.sendall(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = _received(connection)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(_distrusted(server, authority, error)) from error
    except ssl.SSLError as error:
        raise ConfigError(
            f"{server} speaks no TLS ({error.reason or error}); a device never talks plaintext. Correct server= in "
            f"{NODE_SETTINGS}."
        ) from error
    except socket.gaierror as error:
        raise ConnectionError(f"the name {host} is not known: {error.strerror}") from error
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from error
    _check_clock(server, answer)


def _received(connection: ssl.SSLSocket) -> bytes:
    received = b""
    while len(received) < 65536:
        piece = connection.recv(4096)
        if not piece:
            break
        received += piece
    return received


def _distrusted(server: str, authority: Path, error: ssl.SSLCertVerificationError) -> str:
    reason = error.verify_message.rstrip(".")
    remedies = {
        "certificate has expired": "on the server's machine run: flowerbed deploy renew DIR",
        "certificate is not yet valid": "set this device's clock",
    }
    if "mismatch" in reason or "not valid for" in reason:
        remedy = (
            f"use a name that the certificate has in {NODE_SETTINGS}, or add this one on the server's machine: "
            "flowerbed deploy renew DIR --san NAME"
        )
    else:
        remedy = remedies.get(
            reason, f"copy the ca.crt of that server's deployment to {authority}, or somebody is in between"
        )
    return f"The certificate of {server} is not trusted: {reason}; {remedy}."


def _check_clock(server: str, answer: bytes) -> None:
    head = answer.partition(b"\r\n\r\n")[0].decode("latin-1")
    dates = [line.partition(":")[2].strip() for line in head.splitlines() if line.lower().startswith("date:")]
    if not dates:
        return
    theirs = email.utils.parsedate_to_datetime(dates[0])
    ours = datetime.datetime.now(datetime.UTC)
    skew = (ours - theirs).total_seconds()
    if abs(skew) > SKEW:
        raise ConfigError(
            f"This device's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} that of {server} "
            f"({ours:%Y-%m-%d %H:%M:%S} and {theirs:%Y-%m-%d %H:%M:%S} UTC), and signatures of another time are "
            "refused; set the clocks (timedatectl set-ntp true)."
        )


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def require_free(host: str, port: int) -> None:
    """Raise ``ConfigError`` if somebody listens there already, or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"The server cannot listen on {host} port {port} ({error.strerror}); stop what does, or set another "
                "port in deployment.toml and in every node.toml."
            ) from error


@contextlib.contextmanager
def _child(
    command: list[str], environment: dict[str, str], *, pipe: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run a process in a group of its own, and end the whole group with the block."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if pipe else None,
        stderr=subprocess.STDOUT if pipe else None,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        if process.stdout is not None:
            process.stdout.close()


def require_bundle(folder: Path) -> None:
    """Raise ``ConfigError`` unless the folder is that of a device."""
    if not (folder / NODE_SETTINGS).is_file():
        raise ConfigError(
            f"{folder} is no device's folder ({NODE_SETTINGS} is missing); deploy init makes one for each device in "
            "DIR/nodes."
        )
