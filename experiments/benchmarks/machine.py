"""On what something was measured: machine, versions, commit; and the arithmetic that the device can do."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flowerbed import __version__
from flowerbed.machine import processor

PACKAGES = ("torch", "numpy", "flwr", "ray", "pfl")
MATMUL = {"cpu": 1024, "cuda": 8192}


def stamp(device: str, pfl_path: str | None = None) -> dict[str, Any]:
    """Return what belongs to every figure: when, on what, with which versions and how busy the machine was."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {"flowerbed": __version__, **_versions(pfl_path)},
        "load": os.getloadavg()[0],
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _versions(pfl_path: str | None) -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if pfl_path is not None:
        for distribution in metadata.distributions(name="pfl", path=[pfl_path]):
            found["pfl"] = distribution.version
    return found


def commit() -> str:
    """Return the commit of the checkout, marked if files differ from it; the version where there is none."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def matmul_flops(device: str, repeats: int = 10) -> float:
    """Return the FLOP/s of torch's float32 product of two large square matrices, the best of ``repeats``.

    On a CPU with one thread. A yardstick, not a ceiling: a convolution may run faster than a product.
    """
    size = MATMUL[device]
    a = torch.ones(size, size, device=device)
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    try:
        for _ in range(repeats):
            started = time.perf_counter()
            a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 2.0 * size**3 / best


def watch_gpu() -> Callable[[], float | None]:
    """Start to sample the utilisation of the first GPU; the returned function ends that and tells the mean.

    In percent as ``nvidia-smi`` says it, five times a second; None where there is no ``nvidia-smi``.
    """
    query = [
        "nvidia-smi",
        "-i",
        "0",
        "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits",
        "-lms",
        "200",
    ]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return lambda: None
    seen: list[float] = []

    def read() -> None:
        assert process.stdout is not None
        seen.extend(_numbers(process.stdout))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def ended() -> float | None:
        process.terminate()
        process.wait()
        reader.join(timeout=1)
        return sum(seen) / len(seen) if seen else None

    return ended


def _numbers(lines: Any) -> Iterator[float]:
    for line in lines:
        with contextlib.suppress(ValueError):
            yield float(line)
