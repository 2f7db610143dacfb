"""Secure aggregation: the pieces against known answers, and whole runs with drop-outs at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.exceptions import InvalidTag
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.clients import masking
from flowerbed.clients.local_round import LocalRound, Reply
from flowerbed.clients.masking import Secrets
from flowerbed.clients.secure import KEYS, MASKED, SHARES, UNMASK, quantise
from flowerbed.clients.store import MemoryStore
from flowerbed.clients.transform_params import SecureParams
from flowerbed.clients.transforms import ClientTransform, Request
from flowerbed.errors import ClientError, ConfigError, RunError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.simulation import make_federation, open_grid, resume, simulate
from flowerbed.server.loop import RunResult
from flowerbed.storage import Tensors

TRAIN = "train"
UNIFORM = {"name": "fedavg", "weighting": "uniform"}
STEP = 2 * 4.0 / (2**22 - 1)
"""Distance of two levels with the default clip and bits."""


# The pieces.


@given(
    secret=st.binary(min_size=32, max_size=32),
    count=st.integers(1, 8),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_t_shares_give_the_secret_and_fewer_do_not(secret: bytes, count: int, data: Any) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = dict(enumerate(masking.split(secret, count, threshold, np.random.default_rng(0))))
    order = data.draw(st.permutations(range(count)))
    assert masking.join({i: shares[i] for i in order[:threshold]}) == secret
    assert masking.join(shares) == secret
    if threshold > 1:
        assert masking.join({i: shares[i] for i in order[: threshold - 1]}) != secret


def test_shamir_by_hand() -> None:
    """The line 5 + 3 x has the values 8 and 11 at 1 and 2."""
    shares = {0: (8).to_bytes(66, "big"), 1: (11).to_bytes(66, "big")}
    assert int.from_bytes(masking.join(shares), "big") == 5


def test_the_mask_is_the_ciphers_known_key_stream() -> None:
    """AES-256 of the zero block under the zero key (FIPS 197, as in NIST's known answer tests)."""
    values = {("s", "w"): np.zeros(4, dtype=np.uint32)}
    masking.add_mask(values, bytes(32), 1)
    assert values["s", "w"].tobytes().hex() == "dc95c078a2408989ad48a21492842087"


def test_masks_cancel_modulo_two_to_the_32() -> None:
    start = {("s", name): np.arange(5, dtype=np.uint32) - np.uint32(2) for name in "ba"}
    values = {key: words.copy() for key, words in start.items()}
    masking.add_mask(values, b"k" * 32, 1)
    assert all((values[key] != start[key]).any() for key in start)
    # The order in which the vectors are held does not matter.
    masking.add_mask(dict(reversed(values.items())), b"k" * 32, -1)
    assert all((values[key] == start[key]).all() for key in start)


def test_two_clients_agree_and_others_do_not() -> None:
    a, b, c = (Secrets.draw(0, client, 1).mask for client in range(3))
    shared = masking.agree(a, masking.public_key(b), "mask")
    assert shared == masking.agree(b, masking.public_key(a), "mask")
    assert shared != masking.agree(c, masking.public_key(a), "mask")
    assert shared != masking.agree(a, masking.public_key(b), "shares")
    assert Secrets.draw(0, 0, 2) != Secrets.draw(0, 0, 1) != Secrets.draw(1, 0, 1)


def test_a_sealed_share_cannot_be_changed() -> None:
    sealed = masking.seal(bytes(32), 3, b"share")
    assert masking.unseal(bytes(32), 3, sealed) == b"share"
    with pytest.raises(InvalidTag):
        masking.unseal(bytes(32), 3, sealed[:-1] + bytes([sealed[-1] ^ 1]))


@given(count=st.integers(2, 12), half=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_neighbours_are_mutual(count: int, half: int) -> None:
    around = [masking.neighbours(i, count, 2 * half) for i in range(count)]
    for i, others in enumerate(around):
        assert i not in others
        assert len(others) == (min(2 * half, count - 1) if half else count - 1)
        assert all(i in around[j] for j in others)


def test_rounding_stays_in_range_and_has_no_bias() -> None:
    params = SecureParams(clip=1.0, bits=2)
    update = {
        ("arrays", "w"): torch.full((40_000,), 0.1, dtype=torch.float64),
        ("arrays", "v"): torch.tensor([9.0, -9.0]).double(),
    }
    values, clipped = quantise(update, params, torch.Generator().manual_seed(0))
    # Levels -1, -1/3, 1/3, 1; 0.1 lies 1.65 steps above the lowest.
    assert set(values["arrays", "w"].tolist()) == {1, 2}
    assert values["arrays", "w"].mean() == pytest.approx(1.65, abs=6 * 0.48 / 200)
    assert values["arrays", "v"].tolist() == [3, 0]
    assert clipped == 2 / 40_002


# Whole runs.


@dataclass(frozen=True)
class Failing(ClientTransform):
    """Lets clients fail at one step."""

    clients: frozenset[int]
    step: str

    def answer(self, request: Request) -> Reply | None:
        if request.phase == self.step and request.client in self.clients:
            raise ClientError("lost")
        return None

    def reply(self, local: LocalRound, reply: Reply) -> Reply:
        if self.step == TRAIN and local.client in self.clients:
            raise ClientError("lost")
        return reply


class Recording(ClientTransform):
    """Keeps what the clients send; placed after the masks."""

    def __init__(self) -> None:
        self.sent: dict[int, Mapping[str, Any]] = {}

    def reply(self, local: LocalRound, reply: Reply) -> Reply:
        self.sent[local.client] = reply.streams
        return reply


def settings_of(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "strategy": UNIFORM,
        "model": {"name": "mlp", "hidden": [16]},
        "federation": {"clients": 8, "cohort": 6, "rounds": 1, "quorum": 0.1},
        "local": {"batch_size": 128},
        "evaluation": {"every": 0},
        "grid": {"device": "cpu"},
    }
    return {**base, **sections}


def run_with(
    first: ClientTransform | None, last: ClientTransform | None = None, **sections: Any
) -> RunResult:
    parts = build_parts(Simulation.of(settings_of(**sections)))
    more = ((first,) if first else (), (last,) if last else ())
    spec = replace(parts.spec, transforms=(*more[0], *parts.spec.transforms, *more[1]))
    parts = replace(parts, spec=spec)
    with open_grid(parts, MemoryStore()) as grid:
        return make_federation(parts, grid).run()


def secure(**options: Any) -> dict[str, Any]:
    return {"secure": {"enabled": True, **options}}


def distance(one: Tensors, other: Tensors) -> float:
    return max(float((one[n].double() - v.double()).abs().max()) for n, v in other.items())


def metrics(result: RunResult) -> dict[str, Any]:
    return dict(next(r for r in reversed(result.history) if r.phase == TRAIN).metrics)


@pytest.mark.parametrize("neighbours", [0, 4, 2])
def test_it_is_the_uniform_mean_up_to_rounding(neighbours: int) -> None:
    masked = run_with(None, **secure(neighbours=neighbours))
    assert distance(masked.model, run_with(None).model) < STEP + 1e-6
    assert not masked.failures
    found = metrics(masked)
    assert found["secure-dropped"] == 0
    assert found["secure-clipped"] == 0
    assert found["secure-bytes"] > 0


@pytest.mark.parametrize(("neighbours", "lost"), [(0, frozenset({1, 4})), (4, frozenset({1}))])
@pytest.mark.parametrize("step", [KEYS, SHARES, TRAIN])
def test_the_sum_is_that_of_the_clients_that_are_left(
    step: str, neighbours: int, lost: frozenset[int]
) -> None:
    """Of six clients two are lost (one, where three of four neighbours must stay): the others' mean comes out."""
    everyone = {"clients": 6, "rounds": 1, "quorum": 0.1}
    options = secure(neighbours=neighbours, threshold=0.51)
    masked = run_with(Failing(lost, step), federation=everyone, **options)
    plain = run_with(Failing(lost, TRAIN), federation=everyone)
    assert distance(masked.model, plain.model) < STEP + 1e-6
    assert {failure.client for failure in masked.failures} == lost
    # Only who has shared its secrets can be missed in the sum.
    assert metrics(masked)["secure-dropped"] == (len(lost) if step == TRAIN else 0)


def test_who_is_lost_after_training_still_counts() -> None:
    masked = run_with(Failing(frozenset({1}), UNMASK), federation={"clients": 6, "rounds": 1}, **secure())
    plain = run_with(None, federation={"clients": 6, "rounds": 1})
    assert distance(masked.model, plain.model) < STEP + 1e-6


def test_too_many_drop_outs_end_the_run() -> None:
    with pytest.raises(RunError, match=r"Round 1: a mask cannot be removed, . of the 4 shares"):
        run_with(
            Failing(frozenset({0, 1, 2}), TRAIN),
            federation={"clients": 6, "rounds": 1, "quorum": 0.1},
            **secure(),
        )
    with pytest.raises(RunError, match="only 2 clients sent keys, which hides nobody"):
        run_with(Failing(frozenset({0, 1}), KEYS), federation={"clients": 4, "rounds": 1}, **secure())


def test_what_is_sent_looks_like_noise() -> None:
    """With lr = 0 every update is zero; what leaves a client is uniform, and differs between clients."""
    seen = Recording()
    run_with(None, seen, local={"lr": 0.0}, model={"name": "mlp", "hidden": [512]}, **secure())
    assert len(seen.sent) == 6
    assert all(set(streams) == {f"{MASKED}arrays"} for streams in seen.sent.values())
    vectors = [
        torch.cat([t.flatten() for t in streams[f"{MASKED}arrays"].values()]).numpy().view(np.uint32)
        for streams in seen.sent.values()
    ]
    for words in vectors:
        counts = np.histogram(words, bins=16, range=(0, 2**32))[0]
        expected = len(words) / 16
        # Chi square with 15 degrees of freedom: 60 is beyond the 1 - 1e-6 quantile.
        assert ((counts - expected) ** 2 / expected).sum() < 60
    assert (vectors[0] != vectors[1]).mean() > 0.99


def test_batch_norm_statistics_are_masked_as_well() -> None:
    sections: dict[str, Any] = {
        "model": {"name": "resnet8", "norm": "bn"},
        "federation": {"clients": 3, "rounds": 1},
        "local": {"batch_size": 512},
    }
    seen = Recording()
    masked = run_with(None, seen, **sections, **secure())
    plain = run_with(None, **sections).model
    assert distance(masked.model, plain) < STEP + 1e-6
    in_clear = seen.sent[0]["arrays"]
    assert in_clear
    assert all(n.endswith("num_batches_tracked") for n in in_clear)
    assert all(masked.model[n].dtype == v.dtype for n, v in plain.items())


@pytest.mark.parametrize("strategy", ["fedadam", "scaffold", "fedbabu", "flower:FedAvgM"])
def test_algorithms_act_on_the_mean_and_resume_to_the_same_bits(strategy: str, tmp_path: Path) -> None:
    """Clipping without a bound gives every algorithm the plain uniform mean in the same way."""
    common = settings_of(strategy=strategy, federation={"clients": 5, "cohort": 4, "rounds": 3})
    masked = simulate(**common, **secure())
    plain = simulate(**common, privacy={"mode": "central", "clip": 1e6, "noise": 0.0})
    assert distance(masked.model, plain.model) < 1e-3
    assert not masked.failures
    short = {**common, "federation": {"clients": 5, "cohort": 4, "rounds": 2}}
    simulate(**short, **secure(), run={"dir": str(tmp_path / "short")})
    longer = resume(tmp_path / "short", federation={"rounds": 3})
    assert all(torch.equal(longer.model[n], v) for n, v in masked.model.items())


def test_it_combines_with_local_privacy_and_byzantine_clients() -> None:
    more: dict[str, Any] = {
        "privacy": {"mode": "local", "noise": 0.0, "clip": 0.05},
        "byzantine": {"attack": "sign-flip", "fraction": 0.25},
    }
    masked, plain = run_with(None, **more, **secure()), run_with(None, **more)
    assert distance(masked.model, plain.model) < STEP + 1e-6


# Refusals.


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"strategy": "median"}, "strategy 'median' needs each of them"),
        ({"strategy": "flower:Krum"}, "needs each of them"),
        ({"privacy": {"mode": "central", "noise": 0.0}}, "use privacy.mode=local"),
        ({"byzantine": {"attack": "inner-product", "fraction": 0.25}}, "nobody sees"),
        ({"federation": {"clients": 8, "cohort": 2, "rounds": 1}}, "raise federation.cohort to at least 3"),
        ({"secure": {"enabled": True, "bits": 30}}, "secure.bits is 30: the sum over 6 clients"),
    ],
)
def test_what_cannot_be_secure_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(**{**settings_of(), **secure(), **sections})


@pytest.mark.parametrize(
    "bad",
    [
        {"neighbours": 3},
        {"neighbours": -2},
        {"threshold": 0.5},
        {"threshold": 1.1},
        {"clip": 0.0},
        {"bits": 0},
    ],
    ids=str,
)
def test_bad_parameters_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"secure.{next(iter(bad))} is"):
        SecureParams(**bad)
