"""What a machine with an address of its own gets from a real server: a network namespace plays that machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import wait_until

from flowerbed.experiments.deploy import folder
from flowerbed.experiments.deploy.folder import Deployment, ServerSettings
from flowerbed.experiments.deploy.node import free_port, preflight

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HOST, ELSEWHERE = "10.231.77.1", "10.231.77.2"
SPACE, LINK = f"flowerbed{os.getpid() % 10000}", f"fb{os.getpid() % 10000}"
ASK = """
import json, ssl, sys, urllib.error, urllib.request
base, ca = sys.argv[1:3]
context = ssl.create_default_context(cafile=ca)
def ask(path, data=None, headers={}):
    request = urllib.request.Request(base + path, data=data, headers=headers)
    try:
        return urllib.request.urlopen(request, context=context, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code
protobuf = {"content-type": "application/protobuf", "accept": "application/protobuf"}
found = {path: ask(path, b"", protobuf) for path in (
    "/v1/control/list-nodes", "/v1/control/register-node", "/v1/control/start-run", "/v1/runtime/acquire-task",
    "/v1/fleet/pull-messages")}
found |= {path: ask(path) for path in ("/health", "/docs", "/openapi.json")}
found["too large"] = ask("/v1/fleet/push-object", b"x" * 2000001, protobuf)
print(json.dumps(found))
"""


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def elsewhere() -> Iterator[list[str]]:
    """Return the beginning of a command that runs on the other machine."""
    if shutil.which("ip") is None or ip("netns", "add", SPACE).returncode:
        pytest.skip("needs iproute2 and the right to make network namespaces")
    try:
        for words in (
            f"link add {LINK}a type veth peer name {LINK}b netns {SPACE}",
            f"addr add {HOST}/30 dev {LINK}a",
            f"link set {LINK}a up",
            f"-n {SPACE} addr add {ELSEWHERE}/30 dev {LINK}b",
            f"-n {SPACE} link set {LINK}b up",
        ):
            done = ip(*words.split())
            if done.returncode:
                pytest.skip(f"no virtual network here: {done.stderr.strip()}")
        yield ["ip", "netns", "exec", SPACE]
    finally:
        ip("link", "del", f"{LINK}a")
        ip("netns", "del", SPACE)


@pytest.fixture
def fed(elsewhere: list[str], tmp_path: Path) -> Iterator[Deployment]:
    settings = ServerSettings(HOST, free_port(), request_mb=2.0)
    made = folder.create(tmp_path / "fed", settings, ["a"], [], 10)
    command = [sys.executable, "-m", "flowerbed.experiments.cli", "deploy", "server", str(made.root)]
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def answers() -> bool:
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        try:
            preflight(made.here, made.authority)
        except ConnectionError:
            return False
        return True

    try:
        wait_until(answers, "the server answers")
        yield made
    finally:
        server.terminate()
        server.wait(30)


def test_elsewhere_is_served_as_a_device_and_nothing_else(elsewhere: list[str], fed: Deployment) -> None:
    base = f"{HOST}:{fed.settings.port}"
    asked = [sys.executable, "-c", ASK, f"https://{base}", str(fed.authority)]
    remote = subprocess.run([*elsewhere, *asked], capture_output=True, text=True, check=True)
    found = json.loads(remote.stdout)
    assert found.pop("/health") == 200
    assert found.pop("too large") == 413
    assert found.pop("/v1/fleet/pull-messages") == 401, "a device without a key"
    assert set(found.values()) == {404}
    # The same questions here: the interfaces are there.
    local = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    assert local["/docs"] == 200
    assert local["/v1/control/list-nodes"] == 200

    plain = f"import urllib.request; urllib.request.urlopen('http://{base}/health', timeout=20)"
    refused = subprocess.run(
        [*elsewhere, sys.executable, "-c", plain], capture_output=True, text=True, check=False
    )
    assert refused.returncode, "plaintext was served"
