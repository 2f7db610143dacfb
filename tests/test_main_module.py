"""The command line as a module."""

import subprocess
import sys


def test_the_package_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flowerbed", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("flowerbed ")
