"""Which kernel computes a cohort, in blocks of how many clients: chosen by a short measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

BLOCK_BYTES = 2**22
"""Stacked weights of a block that stay in the cache of a core."""
LARGEST = 128
"""Clients in a block."""
REPEATS = 2
HOPELESS = 10.0
"""A kernel this many times slower than the best one in its first, cold trial is not tried again."""
BUDGET = 10.0
"""Seconds after which no further kernel is tried."""


@dataclass(frozen=True)
class Plan:
    """What was chosen. Picklable: workers that are given the same plan compute the same bits."""

    kernel: str
    """One of ``KERNELS``."""
    block: int
    """Clients computed together."""
    reason: str
    """Why, in a sentence."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Client steps per CPU-second that were measured, by kernel and block."""


@dataclass(frozen=True)
class Candidate:
    """A kernel that might be chosen."""

    kernel: str
    block: int
    trial: Callable[[], int]
    """Does a few steps and returns how many client steps they were."""

    @property
    def label(self) -> str:
        return "one client at a time" if self.kernel == "generic" else f"{self.kernel} x {self.block}"


def measured(candidates: Iterable[Candidate], device: torch.device) -> Plan:
    """Return the plan with the best rate; its reason also says why kernels failed their trial.

    On a CPU the rate is per CPU-second, so that other processes do not disturb it; on a GPU per second. A
    failure of the generic kernel is the client's own, and raised.
    """
    rates: dict[Candidate, float] = {}
    failed: dict[str, str] = {}
    unfinished: dict[str, str] = {}
    started = time.monotonic()
    for candidate in candidates:
        if candidate.kernel in failed:
            continue
        if rates and time.monotonic() - started > BUDGET:
            unfinished[candidate.kernel] = (
                f"not all of {candidate.kernel} was tried within {BUDGET:.0f} seconds"
            )
            continue
        try:
            rates[candidate] = _rate(candidate, device, max(rates.values(), default=0.0) / HOPELESS)
        except Exception as error:
            if candidate.kernel == "generic":
                raise
            failed[candidate.kernel] = first_line(error)
    if not rates:
        raise RuntimeError(impossible("no kernel could be tried", failed))
    best = max(rates, key=lambda candidate: rates[candidate])
    named = {candidate.label: rate for candidate, rate in rates.items()}
    others = ", ".join(f"{label} {rate:,.0f}" for label, rate in named.items() if label != best.label)
    reason = f"{best.label} makes {rates[best]:,.0f} client steps a second" + (
        f" ({others})" if others else ""
    )
    reason = "; ".join([reason, *unfinished.values()])
    return Plan(best.kernel, best.block, impossible(reason, failed), named)


def impossible(reason: str, failed: Mapping[str, str]) -> str:
    """Return the reason with the kernels that cannot be used, and why."""
    return "; ".join([reason, *(f"{kernel} cannot be used: {why}" for kernel, why in failed.items())])


def blocks(bytes_of_model: int) -> list[int]:
    """Return the block sizes worth measuring: about ``BLOCK_BYTES`` of stacked weights, at most ``LARGEST``."""
    fitting = max(1, BLOCK_BYTES // max(1, bytes_of_model))
    return sorted({min(LARGEST, size) for size in (max(1, fitting // 2), fitting, 2 * fitting)})


def compiled_block(bytes_of_model: int, device: torch.device) -> int:
    """Return the block size of a kernel that is too slow to make ready to be tried with several."""
    return LARGEST if device.type == "cuda" else min(LARGEST, max(1, BLOCK_BYTES // max(1, bytes_of_model)))


def first_line(error: BaseException) -> str:
    """Return what an error says first, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _rate(candidate: Candidate, device: torch.device, hopeless: float) -> float:
    """Return the best rate of a few trials; only one trial where the first is below ``hopeless``."""
    best = 0.0
    for _ in range(1 + REPEATS):
        begin = _now(device)
        steps = candidate.trial()
        best = max(best, steps / max(_now(device) - begin, 1e-9))
        if best < hopeless:
            break
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
