"""The cryptography of secure aggregation: keys, masks that cancel, and secrets shared among clients.

Every primitive is the ``cryptography`` package's: X25519 key agreement, HKDF-SHA256, AES-256 in counter mode
as the mask generator, AES-256-GCM for what is sent through the server. Shamir's scheme is over the prime field
of order 2^521 - 1, in which a 32-byte secret is one element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from flowerbed import seeds

PRIME = 2**521 - 1
SECRET_BYTES = 32
SHARE_BYTES = 66
SEALED_BYTES = 2 * SHARE_BYTES + 16
"""Two shares and the authentication tag."""

Words = npt.NDArray[np.uint32]
Ring = dict[tuple[str, str], Words]
"""Vectors of integers modulo 2^32, flat, by stream and name."""


@dataclass(frozen=True)
class Secrets:
    """What one client draws for one round."""

    cipher: bytes
    """Private key under which shares reach it."""
    mask: bytes
    """Private key from which the masks with its neighbours follow."""
    own: bytes
    """Seed of its own mask."""

    @classmethod
    def draw(cls, seed: int, client: int, round_: int) -> Secrets:
        """Return the secrets of a client in a round, a pure function of its seed."""
        drawn = seeds.numpy_rng(seed, "secure aggregation", client, round_).bytes(3 * SECRET_BYTES)
        return cls(*(drawn[i * SECRET_BYTES : (i + 1) * SECRET_BYTES] for i in range(3)))


def public_key(private: bytes) -> bytes:
    """Return the 32-byte public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: str) -> bytes:
    """Return the 32 bytes that both owners of the two keys, and nobody else, can compute."""
    secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(SHA256(), SECRET_BYTES, salt=None, info=purpose.encode()).derive(secret)


def seal(key: bytes, sender: int, content: bytes) -> bytes:
    """Return ``content`` encrypted and authenticated; a key serves one message of each of two senders."""
    return AESGCM(key).encrypt(sender.to_bytes(12, "big"), content, None)


def unseal(key: bytes, sender: int, sealed: bytes) -> bytes:
    """Return what ``seal`` hid; raises ``cryptography.exceptions.InvalidTag`` if it was changed."""
    return AESGCM(key).decrypt(sender.to_bytes(12, "big"), sealed, None)


def add_mask(values: Ring, seed: bytes, sign: int) -> None:
    """Add (``sign`` 1) or subtract (-1) the mask of ``seed``, in place, modulo 2^32.

    The mask is AES-CTR's key stream as little-endian words, over the vectors in the order of their names.
    """
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    for key in sorted(values):
        mask = np.frombuffer(stream.update(bytes(4 * values[key].size)), dtype="<u4")
        if sign > 0:
            values[key] += mask
        else:
            values[key] -= mask


def split(secret: bytes, count: int, threshold: int, rng: np.random.Generator) -> list[bytes]:
    """Return ``count`` shares, of which any ``threshold`` give the secret and fewer say nothing about it.

    Share i (from 0) is the value at i + 1 of a random polynomial of degree ``threshold`` - 1.
    """
    # Four bytes beyond the field's size make the reduction's bias negligible.
    drawn = [int.from_bytes(rng.bytes(SHARE_BYTES + 4), "big") % PRIME for _ in range(threshold - 1)]
    coefficients = [int.from_bytes(secret, "big"), *drawn]
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret from shares by index: the polynomial's value at 0, by Lagrange's formula."""
    points = {index + 1: int.from_bytes(share, "big") for index, share in shares.items()}
    secret = 0
    for x, value in points.items():
        above, below = 1, 1
        for other in points:
            if other != x:
                above, below = above * -other % PRIME, below * (x - other) % PRIME
        secret += value * above * pow(below, -1, PRIME)
    return (secret % PRIME).to_bytes(SHARE_BYTES, "big")[-SECRET_BYTES:]


def neighbours(position: int, count: int, degree: int) -> list[int]:
    """Return the positions that ``position`` shares masks with on a ring of ``count`` clients.

    The ``degree`` nearest, half on each side; everybody else if the degree is 0 or reaches all.
    """
    if degree == 0 or degree >= count - 1:
        return [other for other in range(count) if other != position]
    steps = range(1, degree // 2 + 1)
    return sorted({(position + sign * step) % count for step in steps for sign in (-1, 1)})


def shares_needed(degree: int, share: float) -> int:
    """Return how many of ``degree`` neighbours' shares give a secret, for the setting ``secure.threshold``."""
    return max(1, int(np.ceil(share * degree)))
