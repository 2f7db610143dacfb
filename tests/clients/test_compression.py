"""Compressed updates: the identity, closed forms, a slow twin, error bounds, and garbage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed import messages
from flowerbed.compression import (
    INDICES,
    MASK,
    NAMES,
    PACKED,
    SCALES,
    VALUES,
    Scheme,
    UnpackError,
    compress,
    decompress,
    unpacked,
)
from flowerbed.errors import ConfigError

Tensors = dict[str, torch.Tensor]
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


def tensors(*values: float) -> Tensors:
    """Return numbers as two tensors, so that every case crosses a border between tensors."""
    flat = torch.tensor(values, dtype=torch.float32)
    return {"a": flat[:1].reshape(1, 1), "b": flat[1:]}


def flat(found: Tensors) -> list[float]:
    return torch.cat([value.reshape(-1) for value in found.values()]).tolist()


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_keeping_everything_is_the_identity_to_the_bit(pairs: list[tuple[float, float]]) -> None:
    w, b = tensors(*(p[0] for p in pairs)), tensors(*(p[1] for p in pairs))
    made = compress(w, b, Scheme(1.0), {})
    received = decompress(made.arrays, b)
    assert all(torch.equal(received[n], w[n]) for n in w)
    # Also when a round of feedback owes nothing.
    again = compress(w, b, Scheme(1.0), made.owed)
    assert all(torch.equal(decompress(again.arrays, b)[n], w[n]) for n in w)


def test_top_k_by_hand() -> None:
    b = tensors(1.0, 1.0, 1.0, 1.0, 1.0)
    w = tensors(1.5, 0.0, 3.0, 0.0, 1.25)  # updates 0.5, -1, 2, -1, 0.25; the tie goes to the lower index
    made = compress(w, b, Scheme(0.4), {})
    assert flat(decompress(made.arrays, b)) == [1.0, 0.0, 3.0, 1.0, 1.0]
    assert flat(made.owed) == [0.5, 0.0, 0.0, -1.0, 0.25]
    # What is owed joins the next update: 0.5 + 0.5, 0 + 0.125, 0, -1, 0.25.
    after = compress(tensors(1.5, 1.125, 1.0, 1.0, 1.0), b, Scheme(0.4), made.owed)
    assert flat(decompress(after.arrays, b)) == [2.0, 1.0, 1.0, 0.0, 1.0]
    assert flat(after.owed) == [0.0, 0.125, 0.0, 0.0, 0.25]


@given(st.lists(st.integers(-64, 64), min_size=3, max_size=12), st.integers(1, 6), st.sampled_from([8, 32]))
@settings(max_examples=40, deadline=None)
def test_with_feedback_nothing_is_lost_over_rounds(update: list[int], rounds: int, bits: int) -> None:
    """T rounds of the update u: what the server has added and what is owed are T u together."""
    model, u = tensors(*([0.0] * len(update))), tensors(*(float(v) for v in update))
    owed: Tensors = {}
    for _ in range(rounds):
        w = {n: model[n] + u[n] for n in model}
        made = compress(w, model, Scheme(0.3, bits), owed)
        model, owed = decompress(made.arrays, model), made.owed
    whole = [a + b for a, b in zip(flat(model), flat(owed), strict=True)]
    tolerance = 0.0 if bits == 32 else 1e-3  # Small whole numbers are exact; int8's steps are not.
    assert whole == pytest.approx([rounds * v for v in update], abs=tolerance)


def slow_top_k(updates: list[list[float]], keep: float) -> list[float]:
    """Error feedback as in Stich et al. 2018, in plain Python: memory m; send top-k of m + u."""
    size = len(updates[0])
    memory, added = [0.0] * size, [0.0] * size
    for update in updates:
        whole = [m + v for m, v in zip(memory, update, strict=True)]
        order = sorted(range(size), key=lambda i: (-abs(whole[i]), i))[: max(1, round(keep * size))]
        added = [a + whole[i] if i in order else a for i, a in enumerate(added)]
        memory = [0.0 if i in order else v for i, v in enumerate(whole)]
    return added


@given(
    st.lists(st.lists(st.integers(-8, 8), min_size=6, max_size=6), min_size=1, max_size=5),
    st.sampled_from([0.17, 0.34, 0.5, 0.9]),
)
@settings(max_examples=40, deadline=None)
def test_feedback_against_a_slow_twin(updates: list[list[int]], keep: float) -> None:
    model, owed = tensors(*[0.0] * 6), {}
    for update in updates:
        u = tensors(*(float(v) for v in update))
        made = compress({n: model[n] + u[n] for n in model}, model, Scheme(keep), owed)
        model, owed = decompress(made.arrays, model), made.owed
    assert flat(model) == slow_top_k([[float(v) for v in u] for u in updates], keep)


def test_int8_by_hand() -> None:
    b = {"a": torch.zeros(3), "b": torch.zeros(2)}
    w = {"a": torch.tensor([127.0, -63.6, 0.4]), "b": torch.tensor([0.0, 254.0])}  # steps of 1 and of 2
    made = compress(w, b, Scheme(1.0, 8), {})
    assert made.arrays[VALUES].tolist() == [127, -64, 0, 0, 127]
    assert made.arrays[SCALES].tolist() == [1.0, 2.0]
    assert flat(decompress(made.arrays, b)) == [127.0, -64.0, 0.0, 0.0, 254.0]
    assert flat(made.owed) == pytest.approx([0.0, 0.4, 0.4, 0.0, 0.0], abs=1e-5)


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-10, 10, width=32)), min_size=2, max_size=30)
)
@settings(max_examples=60, deadline=None)
def test_int8_is_off_by_half_a_step_at_most(pairs: list[tuple[float, float]]) -> None:
    w, b = tensors(*(p[0] for p in pairs)), tensors(*(p[1] for p in pairs))
    received = decompress(compress(w, b, Scheme(1.0, 8), {}).arrays, b)
    for name in w:
        update = (w[name].double() - b[name].double()).abs()
        step = float(update.max()) / 127
        # Beside the quantisation, the sum b + s q is rounded to float32.
        rounding = 2.0**-23 * float(torch.maximum(w[name].abs(), b[name].abs()).max())
        assert float((received[name].double() - w[name].double()).abs().max()) <= step / 2 + rounding + 1e-30


@pytest.mark.parametrize(
    ("scheme", "total", "fields"),
    [
        (Scheme(1.0), 1000, {VALUES: 4000}),
        (Scheme(0.5), 1000, {VALUES: 2000, MASK: 125}),
        (Scheme(0.01), 1000, {VALUES: 40, INDICES: 40}),
        (Scheme(0.5, 8), 1000, {VALUES: 500, MASK: 125}),
    ],
)
def test_positions_travel_in_the_smaller_form(scheme: Scheme, total: int, fields: dict[str, int]) -> None:
    w = {"w": torch.from_numpy(np.random.default_rng(0).normal(size=total).astype(np.float32))}
    arrays = compress(w, {"w": torch.zeros(total)}, scheme, {}).arrays
    assert {name: a.nbytes for name, a in arrays.items() if name not in (NAMES, SCALES)} == fields
    assert scheme.nbytes(total) == sum(fields.values())


def test_a_million_numbers_have_exactly_k_of_them_chosen_also_among_ties() -> None:
    w = {"w": torch.ones(10_000)}
    made = compress(w, {"w": torch.zeros(10_000)}, Scheme(0.0123), {})
    assert made.arrays[INDICES].tolist() == list(range(123))


def test_other_types_are_refused() -> None:
    mixed = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(ConfigError, match=r"float32.*float64"):
        compress(mixed, mixed, Scheme(), {})
    with pytest.raises(ConfigError, match="keep is 0"):
        Scheme(0.0)


BASE = {"w": torch.zeros(200), "count": torch.tensor(3)}


def good() -> Tensors:
    w = {"w": torch.arange(200, dtype=torch.float32)}
    return compress(w, {"w": BASE["w"]}, Scheme(0.01), {}).arrays


BROKEN = {
    "no names": {NAMES: None},
    "names that are no text": {NAMES: torch.tensor([255, 254], dtype=torch.uint8)},
    "an unknown tensor": {NAMES: torch.tensor(list(b"other"), dtype=torch.uint8)},
    "a tensor of integers": {NAMES: torch.tensor(list(b"count"), dtype=torch.uint8)},
    "the same tensor twice": {NAMES: torch.tensor(list(b"w\nw"), dtype=torch.uint8)},
    "no values": {VALUES: None},
    "too many values": {VALUES: torch.zeros(3)},
    "values of another type": {VALUES: torch.zeros(2, dtype=torch.float64)},
    "int8 without scales": {VALUES: torch.zeros(2, dtype=torch.int8)},
    "too many scales": {VALUES: torch.zeros(2, dtype=torch.int8), SCALES: torch.zeros(2)},
    "a position beyond the end": {INDICES: torch.tensor([3, 200], dtype=torch.int32)},
    "a negative position": {INDICES: torch.tensor([-1, 4], dtype=torch.int32)},
    "positions out of order": {INDICES: torch.tensor([4, 3], dtype=torch.int32)},
    "the same position twice": {INDICES: torch.tensor([4, 4], dtype=torch.int32)},
    "positions in another shape": {INDICES: torch.tensor([[4, 5]], dtype=torch.int32)},
    "more positions than numbers": {INDICES: torch.arange(201, dtype=torch.int32)},
    "a mask of another size": {INDICES: None, MASK: torch.zeros(2, dtype=torch.uint8)},
    "a mask with other values": {INDICES: None, MASK: torch.zeros(25, dtype=torch.uint8)},
    "whole without all values": {INDICES: None},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_garbage_is_named(change: dict[str, torch.Tensor | None]) -> None:
    arrays: dict[str, torch.Tensor | None] = {**good(), **change}
    if MASK in change:
        arrays.pop(INDICES)
    with pytest.raises(UnpackError):
        decompress({n: v for n, v in arrays.items() if v is not None}, BASE)


@given(
    st.dictionaries(
        st.sampled_from([NAMES, VALUES, INDICES, MASK, SCALES]),
        st.tuples(
            st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.float32, torch.int64]),
            st.lists(st.integers(0, 119), max_size=25),
        ),
    )
)
@settings(max_examples=80, deadline=None)
def test_whatever_arrives_ends_in_tensors_or_in_one_error(
    parts: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    arrays = good() | {name: torch.tensor(values, dtype=kind) for name, (kind, values) in parts.items()}
    try:
        found = decompress(arrays, BASE)
    except UnpackError:
        return
    assert found["w"].shape == (200,)


def test_a_reply_is_whole_again_in_the_order_that_was_sent() -> None:
    sent = {"w": torch.ones(4), "mean": torch.ones(2), "v": torch.ones(3)}
    w = {"w": torch.tensor([1.0, 5.0, 1.0, 1.0]), "v": torch.tensor([1.0, 1.0, 9.0])}
    packed = compress(w, {n: sent[n] for n in w}, Scheme(2 / 7), {})
    reply = RecordDict(
        {
            "arrays": messages.array_record({"mean": torch.zeros(2)}),
            f"{PACKED}arrays": messages.array_record(packed.arrays),
            "other": ConfigRecord({"x": 1}),
        }
    )
    whole = unpacked(reply, RecordDict({"arrays": messages.array_record(sent)}))
    found = messages.tensors(whole.array_records["arrays"])
    assert list(found) == ["w", "mean", "v"]
    assert found["w"].tolist() == [1.0, 5.0, 1.0, 1.0]
    assert found["mean"].tolist() == [0.0, 0.0]
    assert found["v"].tolist() == [1.0, 1.0, 9.0]
    assert set(whole) == {"arrays", "other"}


def test_streams_of_changes_count_from_zero_and_unsent_ones_are_refused() -> None:
    control = {"w": torch.tensor([7.0, 7.0])}
    change = {"w": torch.tensor([0.0, 0.5])}
    packed = compress(change, {"w": torch.zeros(2)}, Scheme(0.5), {})
    reply = RecordDict({f"{PACKED}control": messages.array_record(packed.arrays)})
    whole = unpacked(reply, RecordDict({"control": messages.array_record(control)}))
    assert messages.tensors(whole.array_records["control"])["w"].tolist() == [0.0, 0.5]
    with pytest.raises(UnpackError, match="'control' is compressed and was not sent"):
        unpacked(reply, RecordDict({"arrays": messages.array_record(control)}))


def test_the_share_of_bytes() -> None:
    assert Scheme(1.0, 8).nbytes(100) / 400 == 0.25
    assert math.isclose(Scheme(0.01).nbytes(10_000) / 40_000, 0.02)
