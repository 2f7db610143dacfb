"""What can go wrong in a deployment, each told in one line; and the parts of it that need no running server."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import importlib
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from flowerbed.errors import ClientError, ConfigError, RunError
from flowerbed.experiments import cli
from flowerbed.experiments.deploy import (
    certificates,
    client_app,
    folder,
    node,
    operate,
    superlink,
    supernode,
    worker,
)
from flowerbed.experiments.deploy.folder import Deployment, NodeSettings, ServerSettings
from flowerbed.experiments.deploy.submission import Submission, folder_name, unique_name


@pytest.fixture
def fed(tmp_path: Path) -> Deployment:
    return folder.create(
        tmp_path / "fed", ServerSettings("fed.example.org", 9443), ["a", "b"], ["10.0.0.7"], 30
    )


# The folder.


def test_private_files_are_private_and_nothing_else_is_executable(fed: Deployment) -> None:
    keys = {p.relative_to(fed.root) for p in fed.root.rglob("*") if p.is_file() and p.suffix == ".key"}
    assert {str(k) for k in keys} == {
        "certificates/ca.key",
        "certificates/server.key",
        "nodes/a/node.key",
        "nodes/b/node.key",
    }
    for path in (fed.root, *fed.root.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.suffix == ".key":
            assert mode == 0o600, path
        elif path.is_file():
            assert not mode & 0o133, path
    assert stat.S_IMODE(fed.root.stat().st_mode) == 0o700
    assert not list(fed.bundle("a").glob("*ca.key")), "the authority's key stays with the operator"


def test_what_is_written_is_what_is_read(fed: Deployment) -> None:
    again = Deployment.load(fed.root)
    assert again == fed
    told = folder.read_settings(fed.bundle("b") / folder.NODE_SETTINGS, NodeSettings)
    assert told == NodeSettings("fed.example.org:9443", "b", 1, 2)
    named = fed.with_node_ids({"b": 2**63 + 5})
    assert (
        [n.node_id for n in Deployment.load(fed.root).nodes]
        == [0, 2**63 + 5]
        == [n.node_id for n in named.nodes]
    )


def test_the_device_file_is_one_that_the_device_reads(fed: Deployment) -> None:
    from flowerbed.clients.device_config import DeviceConfig

    config = DeviceConfig.read(fed.bundle("b") / folder.DEVICE)
    assert (config.client, config.data.kind) == (1, "npz")


def test_the_app_is_a_flower_app_that_carries_no_code_and_asks_for_no_package(fed: Deployment) -> None:
    import io
    import tomllib
    import zipfile

    from flwr.cli.build import build_fab_from_disk

    from flowerbed.experiments.deploy.device import RUN_KEY

    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(fed.app)))
    assert [n for n in bundle.namelist() if n.endswith(".py")] == []
    told = tomllib.loads((fed.app / "pyproject.toml").read_text())
    assert [d.split(">")[0] for d in told["project"]["dependencies"]] == ["flwr"]
    # Flower takes no setting that the app does not have.
    assert told["tool"]["flwr"]["app"]["config"] == {RUN_KEY: ""}
    for reference in told["tool"]["flwr"]["app"]["components"].values():
        module, _, name = reference.partition(":")
        assert hasattr(importlib.import_module(module), name)


def test_units_and_the_compose_file_can_be_read_and_name_what_is_there(fed: Deployment) -> None:
    import configparser

    import yaml

    composed = yaml.safe_load((fed.root / "compose.yaml").read_text())
    assert set(composed["services"]) == {"server", "a", "b"}
    assert composed["services"]["server"]["ports"] == ["9443:9443"]
    assert composed["services"]["server"]["networks"]["default"]["aliases"] == ["fed.example.org"]
    for service in composed["services"].values():
        assert service["read_only"] is True
        assert service["user"] == f"{os.getuid()}:{os.getgid()}", "no capability to read another's folder"
        for volume in service["volumes"]:
            assert (fed.root / volume.partition(":")[0]).is_dir()
    for unit in (fed.root / "flowerbed-server.service", fed.bundle("a") / "flowerbed-node.service"):
        parsed = configparser.ConfigParser(strict=False, interpolation=None)
        parsed.read(unit)
        assert "flowerbed" in parsed["Service"]["ExecStart"]
        assert parsed["Service"]["RestartPreventExitStatus"] == "2", (
            "what must be put right is not tried again"
        )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("port = 9443", "'address' is missing"),
        ('address = "x"\nprot = 1', "Did you mean 'port'"),
        ('address = "x"\nport = "9"', "port must be of type int"),
        ('address = "x"\nport = 99999', "number from 1 to 65535"),
        ('address = "x"\npoll = 0', "poll is 0.0"),
        ("address = ", "no TOML"),
    ],
)
def test_a_wrong_setting_is_named(fed: Deployment, text: str, word: str) -> None:
    (fed.root / folder.SETTINGS).write_text(text)
    with pytest.raises(ConfigError, match=word):
        Deployment.load(fed.root)


@pytest.mark.parametrize(
    ("names", "word"), [([], "at least one"), (["a", "a"], "twice"), (["../x"], "cannot be a device's name")]
)
def test_devices_that_cannot_be_named(tmp_path: Path, names: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        folder.create(tmp_path / "new", ServerSettings("x"), names, [], 30)
    assert not (tmp_path / "new" / "certificates").exists()


def test_a_folder_in_use_is_left_alone(fed: Deployment) -> None:
    before = fed.authority.read_bytes()
    with pytest.raises(ConfigError, match="not empty"):
        folder.create(fed.root, ServerSettings("x"), ["a"], [], 30)
    assert fed.authority.read_bytes() == before


# Certificates and keys.


def test_the_certificate_has_the_names_that_were_asked_for_and_those_of_this_machine(fed: Deployment) -> None:
    certificate = certificates.read_certificate(fed.certificates / "server.crt")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"fed.example.org", "localhost"}
    assert {str(a) for a in names.get_values_for_type(x509.IPAddress)} == {"10.0.0.7", "127.0.0.1", "::1"}
    certificates.check_server(fed.certificates)


def test_an_expired_certificate_and_a_clock_before_its_time(fed: Deployment) -> None:
    now = datetime.datetime.now(datetime.UTC)
    with pytest.raises(ConfigError, match="server's certificate expired on .*deploy renew"):
        certificates.check_server(fed.certificates, now + datetime.timedelta(days=31))
    with pytest.raises(ConfigError, match="clock says .*set the clock"):
        certificates.check_server(fed.certificates, now - datetime.timedelta(days=1))


def test_a_certificate_of_another_authority_or_another_key(fed: Deployment, tmp_path: Path) -> None:
    other = folder.create(tmp_path / "other", ServerSettings("x"), ["a"], [], 30)
    (fed.certificates / "server.crt").write_bytes((other.certificates / "server.crt").read_bytes())
    with pytest.raises(ConfigError, match="was not signed by"):
        certificates.check_server(fed.certificates)
    certificates.make_server(fed.certificates, ["x"], 30)
    (fed.certificates / "server.key").write_bytes((other.certificates / "server.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        certificates.check_server(fed.certificates)


@pytest.mark.parametrize("name", ["server.key", "ca.crt", "server.crt"])
def test_a_file_that_is_missing(fed: Deployment, name: str) -> None:
    (fed.certificates / name).unlink()
    with pytest.raises(ConfigError, match=name):
        certificates.check_server(fed.certificates)


def test_keys_that_others_may_read_are_refused(fed: Deployment) -> None:
    key = fed.bundle("a") / folder.KEY
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 644.*chmod 600"):
        node.DeviceNode.load(fed.bundle("a"), print)
    (fed.certificates / "server.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        certificates.check_server(fed.certificates)


def test_a_key_that_is_none(fed: Deployment) -> None:
    key = fed.bundle("a") / folder.KEY
    certificates.write_private(key, b"-----BEGIN OPENSSH PRIVATE KEY-----\nnonsense\n")
    with pytest.raises(ConfigError, match=r"node\.key cannot be read"):
        node.DeviceNode.load(fed.bundle("a"), print)
    public = key.with_name("node.key.pub")
    public.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKJ8C9L2mVXCbGbwZ4zzVZMTvCFAvHO2BeCaYuuiaVhs x\n")
    with pytest.raises(ConfigError, match="another kind"):
        certificates.read_public_key(public)


def test_the_public_key_is_in_the_form_in_which_flower_keeps_it(fed: Deployment) -> None:
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

    private = certificates.check_node_key(fed.bundle("a") / folder.KEY)
    found = certificates.read_public_key(fed.bundle("a") / f"{folder.KEY}.pub")
    assert found == public_key_to_bytes(private.public_key())
    assert isinstance(bytes_to_public_key(found).curve, ec.SECP384R1)


# Before a device joins.


class TlsServer(threading.Thread):
    """Answers every connection with an HTTP response of a given date, over TLS or plainly."""

    def __init__(self, certificate: Path | None, shift: float = 0.0) -> None:
        super().__init__(daemon=True)
        self._shift = shift
        self._context = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate / "server.crt", certificate / "server.key")
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.start()

    def run(self) -> None:
        while True:
            try:
                raw, _ = self._socket.accept()
            except OSError:
                return
            date = email.utils.formatdate(time.time() + self._shift, usegmt=True)
            answer = f"HTTP/1.1 200 OK\r\ndate: {date}\r\ncontent-length: 0\r\n\r\n".encode()
            try:
                with (
                    raw
                    if self._context is None
                    else self._context.wrap_socket(raw, server_side=True) as open_
                ):
                    open_.recv(4096)
                    open_.sendall(answer)
            except OSError:
                pass

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def serving() -> Iterator[Any]:
    made: list[TlsServer] = []

    def serve(certificate: Path | None, shift: float = 0.0) -> int:
        made.append(TlsServer(certificate, shift))
        return int(made[-1].port)

    yield serve
    for server in made:
        server.close()


def test_a_server_that_is_what_it_should_be(fed: Deployment, serving: Any) -> None:
    node.preflight(f"127.0.0.1:{serving(fed.certificates)}", fed.authority)
    node.preflight(f"localhost:{serving(fed.certificates, 30)}", fed.authority)


@pytest.mark.parametrize(("shift", "word"), [(400, "behind"), (-400, "ahead of")])
def test_clocks_that_differ_are_told_apart_from_wrong_keys(
    fed: Deployment, serving: Any, shift: float, word: str
) -> None:
    with pytest.raises(ConfigError, match=rf"clock is (39\d|40\d) s {word}.*set the clocks"):
        node.preflight(f"127.0.0.1:{serving(fed.certificates, shift)}", fed.authority)


def test_a_server_of_somebody_else(fed: Deployment, serving: Any, tmp_path: Path) -> None:
    other = folder.create(tmp_path / "other", ServerSettings("x"), ["a"], [], 30)
    with pytest.raises(ConfigError, match=r"is not trusted.*copy the ca\.crt"):
        node.preflight(f"127.0.0.1:{serving(other.certificates)}", fed.authority)


def test_a_name_that_the_certificate_does_not_have(fed: Deployment, serving: Any) -> None:
    with pytest.raises(ConfigError, match="is not trusted.*renew DIR --san"):
        node.preflight(f"127.0.0.2:{serving_all(fed.certificates, serving)}", fed.authority)


def serving_all(certificate: Path, serving: Any) -> int:
    """Return the port of a server that listens on another loopback address as well."""
    server = TlsServer(certificate)
    server.close()
    server = TlsServer.__new__(TlsServer)
    threading.Thread.__init__(server, daemon=True)
    server._shift = 0.0
    server._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server._context.load_cert_chain(certificate / "server.crt", certificate / "server.key")
    server._socket = socket.create_server(("127.0.0.2", 0))
    server.port = server._socket.getsockname()[1]
    server.start()
    return int(server.port)


def test_an_expired_server_certificate_is_named_at_the_device(fed: Deployment, serving: Any) -> None:
    expire(fed.certificates)
    with pytest.raises(ConfigError, match="has expired; on the server's machine run: flowerbed deploy renew"):
        node.preflight(f"127.0.0.1:{serving(fed.certificates)}", fed.authority)


def expire(certificate: Path) -> None:
    """Replace the server's certificate by the same one, valid until yesterday."""
    old = certificates.read_certificate(certificate / "server.crt")
    signer = load_pem_private_key((certificate / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(7)
        .not_valid_before(yesterday - datetime.timedelta(days=9))
        .not_valid_after(yesterday)
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    made = builder.sign(signer, hashes.SHA384())
    from cryptography.hazmat.primitives.serialization import Encoding

    (certificate / "server.crt").write_bytes(made.public_bytes(Encoding.PEM))


def test_a_server_without_tls_is_not_spoken_to(fed: Deployment, serving: Any) -> None:
    with pytest.raises(ConfigError, match="speaks no TLS.*never talks plaintext"):
        node.preflight(f"127.0.0.1:{serving(None)}", fed.authority)


def test_a_server_that_is_not_there_is_waited_for(fed: Deployment) -> None:
    with pytest.raises(ConnectionError, match="refused"):
        node.preflight(f"127.0.0.1:{node.free_port()}", fed.authority)
    with pytest.raises(ConnectionError, match="is not known"):
        node.preflight("no-such-host.invalid:9092", fed.authority)


def test_a_port_in_use(fed: Deployment, serving: Any) -> None:
    port = serving(None)
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port} .*set another port"):
        node.require_free("127.0.0.1", port)
    node.require_free("127.0.0.1", node.free_port())


# The guard.


def through_guard(
    path: str, client: str, server: str = "192.0.2.1", length: int | None = 3, kind: str = "http"
) -> int:
    """Return the status of a request to the guard with a limit of 10 bytes; 200 is what is behind it."""
    statuses: list[int] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(event: Any) -> None:
        if event["type"] == "http.response.start":
            statuses.append(event["status"])

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": kind, "path": path, "headers": headers, "client": (client, 5), "server": (server, 9)}
    asyncio.run(superlink.Guard(behind, 10)(scope, None, send))  # type: ignore[arg-type]
    return statuses[0]


@pytest.mark.parametrize(
    ("path", "client", "status"),
    [
        ("/v1/fleet/pull-messages", "203.0.113.9", 200),
        ("/health", "203.0.113.9", 200),
        ("/v1/control/register-node", "203.0.113.9", 404),
        ("/v1/control/start-run", "203.0.113.9", 404),
        ("/v1/runtime/acquire-task", "203.0.113.9", 404),
        ("/docs", "203.0.113.9", 404),
        ("/openapi.json", "203.0.113.9", 404),
        ("/v1/fleet/../control/start-run", "203.0.113.9", 200),
        ("/v1/control/start-run", "127.0.0.1", 200),
        ("/v1/control/start-run", "127.8.8.8", 200),
        ("/v1/control/start-run", "::1", 200),
        ("/v1/control/start-run", "::ffff:127.0.0.1", 200),
        # The machine itself, by its own address.
        ("/v1/control/start-run", "192.0.2.1", 200),
    ],
)
def test_only_this_machine_reaches_more_than_devices_need(path: str, client: str, status: int) -> None:
    # What is behind takes paths literally, so the one with dots is a device's path that does not exist.
    assert through_guard(path, client) == status


@pytest.mark.parametrize(("length", "status"), [(10, 200), (11, 413), (10**12, 413), (None, 411)])
@pytest.mark.parametrize("client", ["203.0.113.9", "127.0.0.1"])
def test_a_devices_request_has_a_size_and_a_limit(client: str, length: int | None, status: int) -> None:
    assert through_guard("/v1/fleet/push-object", client, length=length) == status


def test_a_websocket_from_elsewhere_is_refused_too() -> None:
    assert through_guard("/v1/control/x", "203.0.113.9", kind="websocket") == 404


def test_the_guard_stands_in_the_superlink_and_a_node_answers_for_itself_only() -> None:
    """In a process of its own, because it changes Flower's modules."""
    code = """
from types import SimpleNamespace as N
import flowerbed.experiments.deploy.superlink as ours
from flwr.superlink import main as flwr_main
from flwr.superlink.servicer.fleet import fleet_handlers
taken = []
fleet_handlers.push_messages = lambda request, state: taken.append(request)
fleet_handlers.activate_node = lambda request, state: state.get_node_id_by_public_key(request.public_key)
ours.install(1234)
assert flwr_main._get_middleware()[0].cls is ours.Guard, "outermost"
def push(node, source):
    messages = [N(metadata=N(src_node_id=source))]
    return fleet_handlers.push_messages(request=N(node=N(node_id=node), messages_list=messages), state=None)
push(5, 5)
try:
    push(5, 6)
except Exception as error:
    assert error.status_code == 403, error
else:
    raise AssertionError("a forged reply was taken")
assert len(taken) == 1
def activate(key):
    state = N(get_node_id_by_public_key={b"known": 7}.get)
    return fleet_handlers.activate_node(request=N(public_key=key), state=state)
assert activate(b"known") == 7
try:
    activate(b"other")
except Exception as error:
    assert error.status_code == 404, error
else:
    raise AssertionError("an unknown key was let in")
from flwr.superlink.routers.fleet import router
assert router.fleet_handlers is fleet_handlers, "the router looks the handler up where it was replaced"
print("good")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "good", done.stderr


# No code from the server.


def bundle(client: str = "flowerbed.experiments.deploy.client_app:app", **files: str) -> bytes:
    import io
    import zipfile

    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("pyproject.toml", f'[tool.flwr.app.components]\nclientapp = "{client}"\n')
        for name, text in files.items():
            archive.writestr(name.replace("__", "."), text)
    return held.getvalue()


def test_an_app_with_code_is_refused(fed: Deployment) -> None:
    from flwr.cli.build import build_fab_from_disk

    worker.require_no_code(build_fab_from_disk(fed.app))
    worker.require_no_code(bundle(README__md="x"))
    (fed.app / "evil.py").write_text("import os")
    for app, word in (
        (build_fab_from_disk(fed.app), r"holds 'evil\.py'"),
        (bundle(flowerbed__pth="import os"), r"flowerbed\.pth"),
        (bundle(client="evil:app"), "client is 'evil:app'"),
        (bundle(client="flowerbedx.y:app"), "client is"),
    ):
        with pytest.raises(ClientError, match=word):
            worker.require_no_code(app)


@pytest.mark.parametrize(
    ("section", "value", "refused"),
    [
        ("strategy", {"name": "fedavg"}, False),
        ("strategy", {"name": "subprocess:Popen", "args": "x"}, True),
        ("strategy", {"name": "flower", "flower": "subprocess:Popen"}, True),
        ("strategy", {"name": "flower:subprocess:Popen"}, True),
        ("strategy", {"name": "flower:FedAdam"}, False),
        ("strategy", {"name": "flowerbed.strategies.fedprox:FedProx"}, False),
        ("strategy", {"name": "flowerbedx:FedProx"}, True),
        ("strategy", {"name": "mine.methods:Own"}, False),
        ("strategy", {"name": "mineral:Own"}, True),
        ("model", {"name": "runpy:run_path"}, True),
        ("model", {"name": "mlp", "hidden": [8], "inner": {"deep": ["os:system"]}}, True),
        ("model", {"name": "timm:resnet18"}, False),
        ("defence", {"name": "os:system"}, True),
        ("local", {"augment": "os:system"}, True),
        # A device loads its own data.
        ("dataset", {"name": "server.module:factory"}, False),
    ],
)
def test_a_run_names_only_what_a_devices_owner_allows(section: str, value: Any, refused: bool) -> None:
    text = json.dumps({"simulation": {section: value}})
    if refused:
        with pytest.raises(ClientError, match=f"in '{section}'.*allow="):
            client_app.refuse_foreign(text, ["mine"])
    else:
        client_app.refuse_foreign(text, ["mine"])


def test_the_app_that_devices_run_refuses_before_it_looks_anything_up(tmp_path: Path) -> None:
    from types import SimpleNamespace

    app = client_app.OwnCodeOnly(tmp_path / "there-is-none.toml", [])
    run = {"flowerbed": json.dumps({"simulation": {"model": {"name": "os:system"}}})}
    with pytest.raises(ClientError, match="this device takes nothing from the module os"):
        app(SimpleNamespace(), SimpleNamespace(run_config=run))  # type: ignore[arg-type]
    assert isinstance(client_app.app, client_app.OwnCodeOnly)


# Processes.


def test_the_supernodes_waits_are_shortened_and_nobody_elses() -> None:
    code = """
import time
import flowerbed.experiments.deploy.supernode as ours
ours.install(0.01)
from flwr.supernode import start_client_internal as theirs
before = time.monotonic()
theirs.time.sleep(3)
theirs.time.sleep(0.5)
assert time.monotonic() - before < 2
assert theirs.time.monotonic is time.monotonic and theirs.time is not time
from flwr.supercore import heartbeat
from flwr.supernode import fleet_http_connection
from flwr.common import constant
for module in (heartbeat, fleet_http_connection):
    assert module.HEARTBEAT_DEFAULT_INTERVAL == ours.HEARTBEAT >= constant.HEARTBEAT_MIN_INTERVAL
import inspect
assert inspect.getsource(theirs).count("time.sleep(") == 3, "Flower waits elsewhere now; look at ShortWaits again"
print("good")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "good", done.stderr
    assert supernode.LOCAL < 0.5


@pytest.mark.parametrize("stopped_in", ["pull_object", "confirm_message_received"])
def test_a_message_whose_run_is_stopped_while_it_is_fetched_leaves_nothing_behind(stopped_in: str) -> None:
    """Flower keeps it otherwise, without its objects, and answers it much later in place of another one."""
    code = """
import sys
from types import SimpleNamespace as N
if sys.argv[2] == "ours":
    import flowerbed.experiments.deploy.supernode as ours
    ours.install(0.01)
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as theirs
from flwr.supernode.nodestate import NodeStateFactory
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 1, 0
message = Message(RecordDict({"a": ConfigRecord({"b": 1})}), 7, "train")
message.metadata.__dict__["_message_id"] = message.object_id
objects = ObjectStoreFactory()
state = NodeStateFactory(objectstore_factory=objects).state()
state.set_node_id(7)
state.store_run(N(run_id=5, fab_hash="f", primary_task_type="", series_id=1))
def stopped(*given):
    raise RunNotRunningException
def fetched(*given):
    return b"x"
part = {name: stopped if name == sys.argv[1] else fetched for name in ("pull_object", "confirm_message_received")}
# The objects are not what their hashes say, which is no matter here.
objects.store().verify = False
found = theirs._pull_and_store_message(
    state=state, object_store=objects.store(), node_config={}, receive=lambda: (message, get_object_tree(message)),
    get_run=stopped, get_fab=stopped, trusted_entities=None, **part)
print(found, len(state.get_messages_legacy(is_reply=False)))
"""
    left = {
        way: subprocess.run(
            [sys.executable, "-c", code, stopped_in, way], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
        for way in ("ours", "theirs")
    }
    # Flower's own way is here to show that the message is one which it would keep.
    assert left == {"ours": "None 0", "theirs": "None 1"}


def test_a_process_that_hangs_does_not_keep_the_next_message_from_being_answered(tmp_path: Path) -> None:
    """The first task hangs, the others end; the first is ended once the others have come."""
    code = """
import os, sys, time
from types import SimpleNamespace as N
import flowerbed.experiments.deploy.worker as ours
ours.GRACE, ours.IDLE = 0.5, 0.01
folder, hung = sys.argv[1], []
tasks = iter(["hangs", "ends", "ends", None])
def acquire(request):
    token = next(tasks, None)
    return N(HasField=lambda name: token is not None, token=token)
ours._runtime = lambda address, secret: (N(AcquireTask=acquire), None)
count = 0
def fork(address, token):
    global count
    count += 1
    pid = os.fork()
    if pid == 0:
        if token == "hangs":
            time.sleep(600)
        open(os.path.join(folder, str(count)), "w").close()
        os._exit(0)
    if token == "hangs":
        hung.append(pid)
    return pid
ours._fork = fork
parent, deadline = os.getppid(), time.monotonic() + 20
def still_there():
    try:
        os.kill(hung[0], 0)
        return True
    except (IndexError, ProcessLookupError):
        return not hung
os.getppid = lambda: parent if still_there() and time.monotonic() < deadline else 0
begin = time.monotonic()
ours.serve("x", b"", parent)
assert sorted(os.listdir(folder)) == ["2", "3"], os.listdir(folder)
assert not still_there(), "the process that hangs was left"
assert time.monotonic() - begin >= 0.5, "and was not ended at once"
print("good")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "good", done.stderr


def test_what_looks_after_a_device_is_small_and_a_device_needs_the_base_install_only() -> None:
    heavy = ("ray", "hydra", "omegaconf", "wandb", "matplotlib", "sklearn", "scipy", "pandas")
    code = (
        "import sys\n"
        "import flowerbed.experiments.deploy.command, flowerbed.experiments.deploy.node\n"
        "print([n for n in ('torch', 'flwr', 'numpy', *HEAVY) if n in sys.modules])\n"
        "import flowerbed.experiments.deploy.client_app, flowerbed.experiments.deploy.worker\n"
        "import flowerbed.experiments.deploy.supernode\n"
        "print([n for n in HEAVY if n in sys.modules])"
    ).replace("HEAVY", repr(heavy))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_every_private_flower_name_is_where_it_is_looked_for() -> None:
    for name in (
        "cli.build:build_fab_from_disk",
        "common.serde:fab_to_proto",
        "common.serde:run_from_proto",
        "common.serde:user_config_to_proto",
        "proto.control_pb2:ListNodesRequest",
        "proto.control_pb2:ListRunsRequest",
        "proto.control_pb2:RegisterNodeRequest",
        "proto.control_pb2:StartRunRequest",
        "proto.control_pb2:StopRunRequest",
        "proto.control_pb2:StreamLogsRequest",
        "proto.control_pb2:UnregisterNodeRequest",
        "proto.runtime_pb2:AcquireTaskRequest",
        "supercore.constant:TaskType",
        "supercore.control:ControlHttpClient",
        "supercore.error:FlowerError",
        "supercore.fab:Fab",
        "supercore.interceptors:RuntimeVersionHttpInterceptor",
        "supercore.interceptors:SuperExecAuthHttpInterceptor",
        "supercore.runtime:RuntimeHttpClient",
        "superlink.cli.flower_superlink:flower_superlink",
        "superlink.extensions:get_middleware",
        "superlink.servicer.fleet.fleet_handlers:activate_node",
        "superlink.servicer.fleet.fleet_handlers:push_messages",
        "supercore.run:RunNotRunningException",
        "supernode.cli.flower_supernode:flower_supernode",
        "supernode.start_client_internal:_pull_and_store_message",
        "supernode.runtime.run_clientapp:run_clientapp",
    ):
        module, _, attribute = name.partition(":")
        assert hasattr(importlib.import_module(f"flwr.{module}"), attribute), name


def test_flower_processes_are_kept_off_the_network(tmp_path: Path) -> None:
    from flowerbed.experiments.deploy import flower

    environment = flower.environment(tmp_path, FURTHER="1")
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["FURTHER"] == "1"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


HOMELESS = """
import os, pwd, sys
def nobody(*_): raise KeyError("no such user")
pwd.getpwuid = nobody
os.environ.pop("HOME", None); os.environ.pop("FLWR_HOME", None)
from pathlib import Path
from flowerbed.experiments.deploy import folder, operate
fed = folder.Deployment.load(Path(sys.argv[1]))
operate.connect(fed).close()
import flwr.cli.build
"""


def test_an_operator_needs_no_home(fed: Deployment) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS, str(fed.root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# Runs.


def test_a_submission_survives_its_file_and_names_are_unique(fed: Deployment, tmp_path: Path) -> None:
    from flowerbed.experiments.config import Simulation

    made = Submission(Simulation.of({"seed": 3}), '{"run": "x"}').attempted(2**63 + 1).attempted(5)
    made.write(tmp_path)
    again = Submission.read(tmp_path)
    assert again.simulation.identity == made.simulation.identity
    assert (again.expectations, again.run_ids) == (made.expectations, made.run_ids)
    first, second = unique_name("ward.v1"), unique_name("ward.v1")
    assert first != second
    assert folder_name(first) == folder_name(second) == "ward.v1"
    with pytest.raises(ConfigError, match="holds no run"):
        Submission.read(fed.root)


def test_what_is_run_must_fit_the_devices(fed: Deployment) -> None:
    with pytest.raises(ConfigError, match=r"federation\.clients is 5 and the deployment has 2 devices"):
        operate.planned(fed, ["federation.clients=5"], "x")
    with pytest.raises(ConfigError, match="grid=ray is for simulations"):
        operate.planned(fed, ["grid=ray"], "x")
    with pytest.raises(ConfigError, match="a, b of this deployment are not registered"):
        operate.run(fed, [], "x", False, print)
    with pytest.raises(ConfigError, match="cannot be a run's name"):
        operate.run(fed, [], "../x", False, print)


def test_flowers_own_command_can_submit_what_was_prepared(
    fed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.cli import flower_config
    from flwr.common.config import parse_config_args

    registered = fed.with_node_ids({"a": 11, "b": 12})
    said: list[str] = []
    directory = operate.prepare(registered, ["federation.rounds=2"], "own", said.append)
    words = said[0].split()
    assert words[1:3] == ["flwr", "run"]
    given = parse_config_args([words[words.index("--run-config") + 1]])
    assert given == {"flowerbed": Submission.read(directory).expectations}
    monkeypatch.setattr(flower_config, "get_flwr_home", lambda: Path(words[0].partition("=")[2]))
    connection = flower_config.read_superlink_connection()
    assert (connection.address, connection.root_certificates) == (fed.here, str(fed.authority))
    assert not connection.insecure
    with pytest.raises(ConfigError, match="There is a run 'own' already"):
        operate.prepare(registered, [], "own", print)


def test_shared_samples_are_those_of_the_simulation(fed: Deployment) -> None:
    import numpy as np

    parts, expectations = operate.planned(
        fed, ["data.client_samples=60", "partition=dirichlet", "partition.alpha=0.3"], "x"
    )
    operate.share(fed, parts)
    operate.write_plan(fed, expectations)
    for one in fed.nodes:
        with np.load(fed.bundle(one.name) / "data.npz", allow_pickle=False) as arrays:
            rows = parts.train.indices(one.client)
            assert np.array_equal(arrays["x_train"], parts.dataset.train.inputs[rows].numpy())
            assert np.array_equal(arrays["y_train"], parts.dataset.train.labels[rows].numpy())
        told = json.loads((fed.bundle(one.name) / folder.PLAN).read_text())
        assert told["simulation"]["federation"]["clients"] == 2
        assert str(fed.root) not in json.dumps(told), "no path of the server reaches a device"


def test_an_operator_without_a_server_is_told_to_start_it(fed: Deployment) -> None:
    away = Deployment(fed.root, ServerSettings("x", node.free_port(), "127.0.0.1"), fed.nodes)
    with pytest.raises(RunError, match="does not answer.*deploy server"):
        operate.status(away)


def test_commands_say_what_is_wrong(
    fed: Deployment, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments, word in (
        (["status", str(tmp_path)], "holds no deployment"),
        (["init", str(tmp_path / "new")], "--address"),
        (["init", str(tmp_path / "new"), "--address", "x:y"], "HOST:PORT"),
        (["node", str(fed.root)], "no device's folder"),
        (["node", str(fed.bundle("a")), "--dry-run"], "deploy plan"),
        (["unregister", str(fed.root)], "Name the devices"),
        (["register", str(fed.root), "seed=1"], "takes no settings"),
        (["stop", str(fed.root)], "no run yet"),
    ):
        assert cli.main(["deploy", *arguments]) == 2, arguments
        told = capsys.readouterr().err
        assert word in told, (arguments, told)
        assert len(told.strip().splitlines()) == 1


def test_a_new_deployment_and_a_new_certificate_by_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "fed"
    assert cli.main(["deploy", "init", str(root), "--address", "[2001:db8::5]:9443", "--nodes", "x,y"]) == 0
    made = Deployment.load(root)
    assert (made.settings.address, made.settings.port) == ("2001:db8::5", 9443)
    told = folder.read_settings(made.bundle("y") / folder.NODE_SETTINGS, NodeSettings)
    assert told.server == "[2001:db8::5]:9443"
    before = (made.certificates / "server.crt").read_bytes()
    assert cli.main(["deploy", "renew", str(root), "--san", "other.example.org"]) == 0
    after = certificates.read_certificate(made.certificates / "server.crt")
    names = after.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "other.example.org" in names.get_values_for_type(x509.DNSName)
    assert before != (made.certificates / "server.crt").read_bytes()
    certificates.check_server(made.certificates)


def test_the_pages_name_commands_and_settings_that_exist() -> None:
    import dataclasses
    import re

    from flowerbed.experiments.deploy.command import _parser

    root = Path(__file__).resolve().parents[2]
    pages = {
        name: (root / name).read_text() for name in ("README.md", "docs/deploy.md", "docs/threat-model.md")
    }
    pages["help"] = _parser().format_help()
    actions = set(_parser()._actions[1].choices or ())
    for name, text in pages.items():
        for action in re.findall(r"(?:flowerbed |`)deploy ([a-z]+)", text):
            assert action in actions, f"{name} names deploy {action}"
        for link in re.findall(r"\]\(([\w/.-]+\.md)\)", text):
            assert ((root / name).parent / link).is_file(), f"{name} links to {link}"
    settings = {f.name for kind in (ServerSettings, NodeSettings) for f in dataclasses.fields(kind)}
    told = {"join_wait", "reconnect", "patience", "poll", "request_mb", "allow", "warm"}
    assert told <= settings
    assert all(any(f"`{word}" in text for text in pages.values()) for word in told)
