"""The command ``flowerbed watch``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import stat
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from flowerbed.errors import ConfigError, require
from flowerbed.experiments.watch.index import Index
from flowerbed.experiments.watch.server import LOOPBACK, WatchServer

DESCRIPTION = "Follow running and finished runs in a page on this machine. It reads only, and only below DIR."
EPILOG = """\
The printed address holds a token; without it the page shows nothing. Token and port stay the same when the command is
started again, so an open page goes on by itself. From another machine: ssh -L 8377:127.0.0.1:8377 HOST, then the same
address. Links below DIR are not followed.
"""
PORT = 8377
FOLDERS = ("runs", "multirun")


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Serve what the command line ``arguments`` asks for until Ctrl-C; return the exit code."""
    asked = _parser().parse_args(list(arguments))
    for folder in asked.directories:
        require(folder.is_dir(), f"{folder} is no folder; name one that holds runs.")
    require(0 <= asked.port <= 65535, f"--port {asked.port} is no port; give 0 (any free one) to 65535.")
    folders = [folder.resolve() for folder in asked.directories or map(Path, FOLDERS)]
    folders = [f for f in dict.fromkeys(folders) if not any(other in f.parents for other in folders)]
    index = Index(folders)
    try:
        server = WatchServer(asked.port, index, token(asked.new_token))
    except OSError as error:
        raise ConfigError(
            f"Port {asked.port} of this machine is taken ({error.strerror}), perhaps by another flowerbed watch; "
            "give another --port, or 0 for any free one."
        ) from error
    scanner = threading.Thread(target=index.follow, args=(server.stop,), daemon=True)
    with server:
        scanner.start()
        address = f"http://{LOOPBACK}:{server.server_port}/#token={server.token}"
        if as_json:
            print(json.dumps({"url": address, "folders": [str(f) for f in folders]}), flush=True)
        else:
            shown = " and ".join(str(folder) for folder in folders)
            print(f"watching {shown}\nopen     {address}\nCtrl-C ends it; runs do not notice.", flush=True)
        if asked.open:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.2)
        server.stop.set()
    return 0


def token(new: bool = False) -> str:
    """Return this user's token, which survives a restart; made anew if asked for, missing, or readable by others.

    Where no file can be kept, the token is that of this process.
    """
    path = state_folder() / "watch-token"
    with contextlib.suppress(OSError):
        about = path.lstat()
        own = stat.S_ISREG(about.st_mode) and not about.st_mode & 0o077 and about.st_uid == os.getuid()
        found = path.read_text().strip() if own and not new else ""
        if len(found) >= 32 and found.isascii() and found.isalnum():
            return found
    made = secrets.token_hex(24)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        # Nobody else may read it, not even for a moment.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w") as file:
            file.write(f"{made}\n")
    return made


def state_folder() -> Path:
    """Return the user's folder for what programs keep between starts (XDG base directories)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "flowerbed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed watch",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories", nargs="*", type=Path, metavar="DIR", help=f"where runs are ({' and '.join(FOLDERS)})"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=PORT,
        metavar="N",
        help="on the loopback interface (%(default)s; 0: any free one)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--new-token", action="store_true", help="make the old address invalid")
    parser.add_argument("--json", action="store_true", help="print the address as JSON")
    return parser
