"""Named random streams.

Every random decision of the platform draws from a stream that is a pure function of
``(run seed, purpose, *numbers)``. The global generators of Python, numpy and torch are never consumed by
our own code, so adding a consumer moves nobody else's numbers and the number of workers changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_sequence(seed: int, purpose: str, *numbers: int) -> np.random.SeedSequence:
    """Return the ``SeedSequence`` of the stream; ``numbers`` are for example the client and the round."""
    digest = hashlib.sha256(purpose.encode()).digest()
    word = int.from_bytes(digest[:8], "little")
    return np.random.SeedSequence(entropy=seed, spawn_key=(word, *numbers))


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


@contextlib.contextmanager
def global_streams(seed: int, purpose: str, *numbers: int) -> Iterator[None]:
    """Run foreign code that draws from the *global* generators on the stream, then put them back.

    Stock Flower strategies sample with ``random`` and add noise with ``numpy.random``; modules such as
    dropout draw from torch's default generator. Inside the block all three (torch: CPU and every visible
    GPU) are seeded from the stream; afterwards their previous states are restored.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    word = torch_seed(seed, purpose, *numbers)
    random.seed(word)
    np.random.seed(word % 2**32)
    torch.manual_seed(word)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
