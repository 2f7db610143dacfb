"""What this machine is."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path


def processor() -> str:
    """Return the name of the processor as its maker calls it; where Linux does not tell, what Python knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            # Arm processors have no name, but a number of their part.
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
