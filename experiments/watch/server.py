"""The page's server: loopback only, reads only, and answers nobody who does not know the token.

The page itself holds nothing of the runs. Everything else needs the token in the header ``Authorization: Bearer``,
which the page takes from the fragment of its address: browsers send a fragment to no server and put it into no log,
other pages cannot add such a header, and cookies, which other servers on this machine would receive, are not used.
Requests are answered only if they name this machine as their host, so that no foreign name can be pointed here (DNS
rebinding). No address names a file: entries go by identifiers from the index, pictures by names from a listing.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from flowerbed import __version__
from flowerbed.errors import ConfigError
from flowerbed.experiments import saved
from flowerbed.experiments.watch.follow import Follower, plain
from flowerbed.experiments.watch.index import Entry, Index, pictures

LOOPBACK: Final = "127.0.0.1"
PAGE = Path(__file__).parent / "page"
ASSETS = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/watch.js": ("watch.js", "text/javascript; charset=utf-8"),
    "/watch.css": ("watch.css", "text/css; charset=utf-8"),
}
OWN_HOST = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", re.IGNORECASE)
"""Any port: it is another one at the near end of a tunnel."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MOST_ROWS = 200
MOST_INSIDE = 200
TEXT_LIMIT = 200_000
PICTURE_LIMIT = 32 << 20
STREAMS = 64
"""Pages that may follow at once; each holds a thread."""
FOLLOWED = 16
"""Runs whose curves are kept in memory."""
NO_SERIES: dict[str, Any] = {
    "phases": {},
    "failures": [],
    "failed": {},
    "notes": [],
    "generation": 0,
    "counts": {},
}
BEAT = 10.0
"""Seconds after which a silent stream sends a sign of life; that is how a closed page is noticed."""


class WatchServer(ThreadingHTTPServer):
    """Serves an index; ``stop`` ends all streams."""

    daemon_threads = True
    # A restarted server must get the port of the one before it.
    allow_reuse_address = True

    def __init__(self, port: int, index: Index, token: str, interval: float = 1.0) -> None:
        self.index, self.token, self.interval = index, token, interval
        self.stop = threading.Event()
        self.streams = threading.BoundedSemaphore(STREAMS)
        self._followers: OrderedDict[str, Follower] = OrderedDict()
        self._lock = threading.Lock()
        super().__init__((LOOPBACK, port), Handler)

    def follower(self, entry: Entry) -> Follower:
        """Return what follows a run, up to date."""
        with self._lock:
            follower = self._followers.pop(entry.id, None) or Follower(entry.directory / "metrics.jsonl")
            self._followers[entry.id] = follower
            if len(self._followers) > FOLLOWED:
                self._followers.popitem(last=False)
        follower.refresh()
        return follower

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a page that was closed while it was answered."""
        import sys

        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Refused(Exception):
    """A request that is not answered: status and what to say."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: WatchServer
    protocol_version = "HTTP/1.1"
    server_version = "flowerbed"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        """Answer, or say why not."""
        try:
            self._answer()
        except Refused as refused:
            self._send(refused.status, "text/plain; charset=utf-8", f"{refused}\n".encode())

    def _refuse(self) -> None:
        # What the request may bring along is not read, so the connection ends.
        self.close_connection = True
        headers = {"Allow": "GET", "Connection": "close"}
        self._send(
            HTTPStatus.METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", b"This page only reads.\n", headers
        )

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _answer(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not OWN_HOST.fullmatch(hosts[0]):
            raise Refused(
                HTTPStatus.MISDIRECTED_REQUEST, "This server answers to 127.0.0.1 and localhost only."
            )
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(HTTPStatus.FORBIDDEN, "Asked for by another page.")
        if self.headers.get("Content-Length", "0") != "0" or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise Refused(HTTPStatus.BAD_REQUEST, "This page takes nothing.")
        address = urlsplit(self.path)
        if address.path in ASSETS:
            name, kind = ASSETS[address.path]
            self._send(HTTPStatus.OK, kind, (PAGE / name).read_bytes())
            return
        given = self.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            raise Refused(HTTPStatus.UNAUTHORIZED, "Open the address that flowerbed watch has printed.")
        route = ROUTES.get(address.path)
        if route is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")
        try:
            asked = {key: values[-1] for key, values in parse_qs(address.query, max_num_fields=20).items()}
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        route(self, asked)

    def list(self, asked: dict[str, str]) -> None:
        """Answer with one page of the list."""
        try:
            page = self.server.index.page(
                search=asked.get("search", ""),
                status=asked.get("status", ""),
                kind=asked.get("kind", ""),
                sort=asked.get("sort", "updated"),
                descending=asked.get("order", "descending") == "descending",
                offset=_natural_number(asked, "offset", 0),
                limit=min(_natural_number(asked, "limit", 50), MOST_ROWS),
            )
        except ConfigError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        page["folders"] = [str(root) for root in self.server.index.roots]
        self._json(page)

    def one(self, asked: dict[str, str]) -> None:
        """Answer with everything about one entry."""
        self._json(content(self.server, self._entry(asked)))

    def picture(self, asked: dict[str, str]) -> None:
        """Answer with a picture of an entry."""
        path = pictures(self._entry(asked).directory).get(asked.get("name", ""))
        if path is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such picture.")
        try:
            with open(path, "rb") as file:
                data = file.read(PICTURE_LIMIT + 1)
        except OSError as error:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such picture.") from error
        if len(data) > PICTURE_LIMIT:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The picture is too large to be shown.")
        self._send(HTTPStatus.OK, "image/png", data)

    def events(self, asked: dict[str, str]) -> None:
        """Stream what changes: of the list its version, of one entry its content, then its new records."""
        entry = self._entry(asked) if "id" in asked else None
        if not self.server.streams.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{STREAMS} pages are open; close one.")
        try:
            self.close_connection = True
            self._head(HTTPStatus.OK, "text/event-stream; charset=utf-8", {"Connection": "close"})
            stream = Stream(self.wfile.write, self.server)
            if entry is None:
                stream.list()
            else:
                stream.entry(entry.id)
        except OSError:
            # The page was closed.
            pass
        finally:
            self.server.streams.release()

    def _entry(self, asked: dict[str, str]) -> Entry:
        entry = self.server.index.get(asked.get("id", ""))
        if entry is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such entry (any more, or not found yet).")
        return entry

    def _json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, "application/json", dumped(value))

    def _send(
        self, status: HTTPStatus, kind: str, body: bytes, further: dict[str, str] | None = None
    ) -> None:
        self._head(status, kind, {"Content-Length": str(len(body)), **(further or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, further: dict[str, str]) -> None:
        # Also what is no proper HTTP is answered with all headers.
        self.request_version = self.protocol_version
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS, **further}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no proper request with the same headers, and without repeating any of it."""
        self.close_connection = True
        self.command = getattr(self, "command", None) or ""
        status = HTTPStatus(code)
        self._send(
            status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode(), {"Connection": "close"}
        )

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: the terminal is for what a person wants to know."""


ROUTES: dict[str, Callable[[Handler, dict[str, str]], None]] = {
    "/api/list": Handler.list,
    "/api/entry": Handler.one,
    "/api/picture": Handler.picture,
    "/api/events": Handler.events,
}


class Stream:
    """Server-sent events, written until the page is closed or the server stops."""

    def __init__(self, write: Callable[[bytes], Any], server: WatchServer) -> None:
        self._write, self._server = write, server
        self._sent = time.monotonic()

    def list(self) -> None:
        """Send the list's version whenever it changes."""
        version = -1
        while not self._server.stop.is_set():
            if version != self._server.index.version:
                version = self._server.index.version
                self._event("list", {"version": version})
            self._pause()

    def entry(self, id_: str) -> None:
        """Send an entry's content, its new records, and its content again when something else has changed."""
        server = self._server
        known: Any = None
        sent_generation = 0
        counts: dict[str, int] = {}
        while not server.stop.is_set():
            entry = server.index.get(id_)
            if entry is None:
                self._event("gone", {})
                return
            # What changes but for new records: the file of metrics alone is followed.
            other = {name: stamp for name, stamp in entry.stamps.items() if name != "metrics.jsonl"}
            follower = server.follower(entry) if "metrics.jsonl" in entry.stamps else None
            generation, now = follower.cursor() if follower else (0, {})
            state = (other, follower is None, entry.state(server.index.clock()), _stamp(entry.directory))
            if state != known or generation != sent_generation:
                value = content(server, entry)
                # Records may have come since the cursor was read: what counts is what is sent.
                known, sent_generation, counts = state, value.get("generation", 0), value.get("counts", {})
                self._event("entry", value)
            elif follower and now != counts:
                value = {**follower.since(counts), "row": entry.row(server.index.clock())}
                if value["generation"] == generation:
                    counts = value["counts"]
                    self._event("records", value)
            self._pause()

    def _event(self, name: str, value: Any) -> None:
        self._write(b"event: " + name.encode() + b"\ndata: " + dumped(value) + b"\n\n")
        self._sent = time.monotonic()

    def _pause(self) -> None:
        if time.monotonic() - self._sent > BEAT:
            self._write(b": alive\n\n")
            self._sent = time.monotonic()
        self._server.stop.wait(self._server.interval)


def content(server: WatchServer, entry: Entry) -> dict[str, Any]:
    """Return everything about one entry, and in ``notes`` what is missing."""
    now = server.index.clock()
    notes = list(entry.notes)
    inside = server.index.inside(entry)
    found: dict[str, Any] = {
        "row": entry.row(now),
        "directory": str(entry.directory),
        "pictures": list(pictures(entry.directory)),
        "inside": [other.row(now) for other in inside[:MOST_INSIDE]],
        "inside_total": len(inside),
    }
    if entry.kind == saved.RUN:
        found |= _run(server, entry, notes, now)
    elif entry.kind in saved.RESULT_FILES:
        try:
            result = saved.read_object(entry.directory / saved.RESULT_FILES[entry.kind])
            found["screen"] = saved.screen(entry.kind, entry.directory, result)
        except ConfigError as error:
            if str(error) not in notes:
                notes.append(str(error))
    found["notes"] = notes
    return found


def _run(server: WatchServer, entry: Entry, notes: list[str], now: float) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    if "summary.json" in entry.stamps:
        try:
            summary = saved.read_object(entry.directory / "summary.json")
        except ConfigError as error:
            if str(error) not in notes:
                notes.append(str(error))
    else:
        written = (
            "" if entry.state(now) == "running" else f"; nothing was written for {_ago(now - entry.updated)}"
        )
        notes.append(f"summary.json is not there: the run goes on, or was killed{written}")
    if "metrics.jsonl" not in entry.stamps:
        notes.append("metrics.jsonl is not there: no round is complete yet")
    versions = summary.get("versions")
    made_by = versions.get("flowerbed") if isinstance(versions, dict) else None
    if made_by is not None and made_by != __version__:
        notes.append(f"made by flowerbed {made_by}; this is {__version__}, and shows what it knows of")
    # A file that the index has not seen is a link, or came this moment: neither is followed.
    series = server.follower(entry).whole() if "metrics.jsonl" in entry.stamps else NO_SERIES
    thinned = max((phase["step"] for phase in series["phases"].values()), default=1)
    if thinned > 1:
        notes.append(f"a long run: every {_ordinal(thinned)} round is drawn")
    text = ""
    if "config.yaml" in entry.stamps:
        with contextlib.suppress(OSError), open(entry.directory / "config.yaml", errors="replace") as file:
            text = file.read(TEXT_LIMIT)
    return {**series, "summary": plain(summary), "config": text, "series_notes": series["notes"]}


def _stamp(directory: Path) -> tuple[int, ...]:
    """Return when files were added to a folder or its figures."""
    stamps = []
    for folder in (directory, directory / "figures"):
        try:
            stamps.append(folder.stat().st_mtime_ns)
        except OSError:
            stamps.append(0)
    return tuple(stamps)


def dumped(value: Any) -> bytes:
    """Return JSON in one line that every browser reads."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=str).encode()


def _natural_number(asked: dict[str, str], name: str, default: int) -> int:
    text = asked.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name} is no number from 0.")
    return int(text)


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
