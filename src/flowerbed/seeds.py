"""Named random streams.

Every random decision of the platform draws from a stream that is a pure function of
``(run seed, purpose, *numbers)``. The global generators of Python, numpy and torch are never consumed by
our own code, so adding a consumer moves nobody else's numbers and the number of workers changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch

CPU = torch.device("cpu")


def seed_sequence(seed: int, purpose: str, *numbers: int) -> np.random.SeedSequence:
    """Return the ``SeedSequence`` of the stream; ``numbers`` are for example the client and the round."""
    return np.random.SeedSequence(entropy=seed, spawn_key=(_word(purpose), *numbers))


@functools.lru_cache(maxsize=1024)
def _word(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def numpy_rng(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return a numpy generator at the start of the stream."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, *numbers)))


def torch_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return a 63-bit integer with which to seed a torch generator for the stream."""
    high, low = seed_sequence(seed, purpose, *numbers).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def torch_rng(seed: int, purpose: str, *numbers: int, device: str = "cpu") -> torch.Generator:
    """Return a torch generator at the start of the stream."""
    return torch.Generator(device=device).manual_seed(torch_seed(seed, purpose, *numbers))


def torch_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's default generators: the CPU's, and that of ``device`` if it is a GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_torch_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put back what ``torch_states`` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextlib.contextmanager
def torch_stream(seed: int, purpose: str, *numbers: int, device: torch.device = CPU) -> Iterator[None]:
    """Let code that draws from torch's *default* generators (dropout) draw from the stream.

    Afterwards the generators of the CPU and of ``device`` are as they were.
    """
    before = torch_states(device)
    word = torch_seed(seed, purpose, *numbers)
    torch.default_generator.manual_seed(word)
    if device.type == "cuda":
        torch.cuda.manual_seed(word)
    try:
        yield
    finally:
        set_torch_states(before, device)


@contextlib.contextmanager
def global_streams(seed: int, purpose: str, *numbers: int) -> Iterator[None]:
    """Run foreign code that draws from *any* global generator on the stream, then put them back.

    Stock Flower strategies sample with ``random`` and add noise with ``numpy.random``.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    word = torch_seed(seed, purpose, *numbers)
    random.seed(word)
    np.random.seed(word % 2**32)
    try:
        with torch_stream(seed, purpose, *numbers):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
