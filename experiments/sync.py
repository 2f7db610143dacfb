"""The command ``flowerbed sync``: sends what wandb has kept offline."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flowerbed.errors import ConfigError, require
from flowerbed.offline import has_wandb_key

DESCRIPTION = "Send the runs below DIR that were tracked offline (tracking=wandb) to Weights & Biases."
EPILOG = """\
This is the one command that sends anything, and it needs your key: wandb login, or WANDB_API_KEY. WANDB_BASE_URL names
a server of your own. What was sent before is not sent again.
"""


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Send what the command line ``arguments`` asks for; return wandb's exit code, 0 if there was nothing to send."""
    asked = _parser().parse_args(list(arguments))
    for folder in asked.directories:
        require(folder.is_dir(), f"{folder} is no folder; name a run, or a folder of runs.")
    found = waiting(asked.directories)
    if as_json:
        print(json.dumps([str(path) for path in found]))
    elif not found:
        print("nothing to send: no run below was tracked offline, or all are sent")
    elif asked.dry_run:
        print("\n".join(map(str, found)))
    if asked.dry_run or not found:
        return 0
    require(
        importlib.util.find_spec("wandb") is not None, "sync needs wandb: pip install 'flowerbed[tracking]'."
    )
    if not has_wandb_key():
        raise ConfigError("There is no key for Weights & Biases: wandb login, or set WANDB_API_KEY.")
    further = ["--project", asked.project] if asked.project else []
    further += ["--entity", asked.entity] if asked.entity else []
    # This process is offline by default, which wandb would inherit.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    command = [sys.executable, "-m", "wandb", "sync", *further, *map(str, found)]
    # With --json, standard output is for JSON alone.
    said = sys.stderr if as_json else None
    return subprocess.run(command, env=environment, stdout=said, check=False).returncode


def waiting(folders: Sequence[Path]) -> list[Path]:
    """Return wandb's folders of offline runs below ``folders`` that wandb has not marked as sent, oldest first."""
    found = set()
    for top in folders:
        for folder, inside, _ in os.walk(top):
            for name in inside:
                path = Path(folder, name)
                if name.startswith("offline-run-"):
                    logs = [
                        log
                        for log in path.glob("*.wandb")
                        if not log.with_name(f"{log.name}.synced").exists()
                    ]
                    found |= {path} if logs else set()
            # Below these there is nothing more, and checkpoints may be many.
            inside[:] = [
                name for name in inside if not name.startswith("offline-run-") and name != "checkpoints"
            ]
    return sorted(found, key=lambda path: (path.name, path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed sync",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a run, or a folder of runs")
    parser.add_argument("--project", metavar="NAME", help="another project than the run's")
    parser.add_argument("--entity", metavar="NAME", help="whose project (yours)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    parser.add_argument("--json", action="store_true", help="print what is sent as JSON")
    return parser
