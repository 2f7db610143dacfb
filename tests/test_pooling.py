"""Sums along the tree: exact metrics, the same bits whoever adds up what, and the means of plain numpy."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.errors import RunError
from flowerbed.pooling import (
    SMALL,
    UNIFORM,
    Adder,
    Exact,
    Ladder,
    Layout,
    Mean,
    Metric,
    Pool,
    Pooled,
    Streams,
    Tally,
    added,
    block_size,
    blocks,
    means,
)
from flowerbed.server.grids.parts import Branches, Part, cut
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.fedavg import FedAvg

NUMBERS = st.one_of(
    st.integers(-(10**6), 10**6), st.floats(-1e12, 1e12, allow_nan=False), st.floats(-1e-9, 1e-9, allow_nan=False)
)  # fmt: skip
POOLING = {"model": Mean("arrays"), "control": Mean("control", UNIFORM)}
Reply = tuple[int, Streams, Mapping[str, Metric]]


def replies(count: int, seed: int = 0, missing: frozenset[int] = frozenset()) -> list[Reply]:
    """Return replies with numbers of very different size, so that another order would give other bits."""
    rng = np.random.default_rng(seed)
    found: list[Reply] = []
    for place in range(count):
        scale = np.float32(10.0 ** rng.integers(-4, 5))
        arrays = {
            "w": torch.from_numpy(rng.normal(size=(3, 5)).astype(np.float32) * scale),
            "steps": torch.tensor(int(rng.integers(0, 99))),
        }
        control = {"w": torch.from_numpy(rng.normal(size=7) * float(scale))}
        metrics: dict[str, Metric] = {
            "num-examples": int(rng.integers(1, 500)),
            "loss": float(rng.normal() * scale),
        }
        if place not in missing:
            found.append((place, {"arrays": arrays, "control": control}, metrics))
    return found


def the_sums(pool: Pool) -> tuple[Layout, dict[Mean, torch.Tensor], Tally]:
    ((layout, sums),) = pool.sums.items()
    return layout, sums.rows, sums.tally


def tree(rows: list[list[np.ndarray]], start: int, stop: int) -> np.ndarray | None:
    """Return the sum of weighted rows of the blocks start to stop, written down as the definition says."""
    if stop - start == 1:
        total = None
        for row in rows[start]:
            total = row if total is None else total + row
        return total
    half = 2 ** math.ceil(math.log2(stop - start) - 1)
    left, right = tree(rows, start, start + half), tree(rows, start + half, stop)
    return left if right is None else right if left is None else left + right


@given(st.lists(NUMBERS, max_size=30), st.randoms())
def test_exact_sums_are_those_of_fractions_in_any_order_and_grouping(
    numbers: list[float], random: object
) -> None:
    parts = [Exact(), Exact(), Exact()]
    shuffled = list(numbers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for i, number in enumerate(shuffled):
        parts[i % 3].add(number)
    parts[1].merge(parts[2])
    parts[0].merge(parts[1])
    assert parts[0].value == float(sum(map(Fraction, numbers)))
    if all(isinstance(n, int) for n in numbers):
        assert type(parts[0].value) is int


def test_what_is_not_finite_stays_so() -> None:
    total = Exact()
    for x in (1.0, math.inf, 2.0):
        total.add(x)
    assert total.value == math.inf
    total.add(-math.inf)
    assert math.isnan(total.value)


def test_lists_add_up_whole_numbers_or_not() -> None:
    first, second = Tally(), Tally()
    first.add({"num-examples": 1, "hits": [1, 2], "sure": [0.1, 0.2]})
    second.add({"num-examples": 1, "hits": [3, 4], "sure": [0.2, 1]})
    second.add({"num-examples": 1, "hits": [0.5, 0], "sure": [1, 1]})
    first.merge(second)
    assert first.sum_of("hits") == [4.5, 6]
    assert first.sum_of("sure") == [float(Fraction(0.1) + Fraction(0.2) + 1), float(Fraction(0.2) + 2)]
    assert type(first.sum_of("num-examples")) is int


@given(st.integers(1, 20_000))
def test_blocks_cover_the_cohort_in_order_and_are_few(cohort: int) -> None:
    found = blocks(cohort)
    assert [place for block in found for place in block] == list(range(cohort))
    assert len(found) <= 128
    assert block_size(cohort) == len(found[0])
    if cohort <= 32:
        assert block_size(cohort) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.integers(0, 99), st.sets(st.integers(0, 89), max_size=20))
def test_the_sum_is_the_tree_of_the_definition(cohort: int, seed: int, missing: set[int]) -> None:
    given_ = replies(cohort, seed, frozenset(missing))
    if not given_:
        return
    _, rows, tally = the_sums(added(Adder(POOLING), given_, cohort))
    for mean in POOLING.values():
        weighted = [
            [
                (m["num-examples"] if mean.weight != UNIFORM else 1)
                * s[mean.stream]["w"].double().numpy().reshape(-1)
                for place, s, m in given_
                if place in block
            ]
            for block in blocks(cohort)
        ]
        assert np.array_equal(tree(weighted, 0, len(weighted)), rows[mean].numpy())
    expected = sum(Fraction(m["loss"]) for _, _, m in given_)  # type: ignore[arg-type]
    assert tally.sum_of("loss") == float(expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.integers(1, 9), st.integers(0, 99), st.randoms())
def test_any_workers_in_any_order_give_the_bits_of_one(
    cohort: int, workers: int, seed: int, random: object
) -> None:
    given_ = replies(cohort, seed, frozenset({1, 5, 6}) if cohort > 7 else frozenset())
    whole = the_sums(added(Adder(POOLING), given_, cohort))
    by_place = {place: reply for place, *reply in given_}
    cohort_blocks = blocks(cohort)
    rng = np.random.default_rng(seed)
    parts = cut(rng.random(len(cohort_blocks)).tolist(), workers)
    random.shuffle(parts)  # type: ignore[attr-defined]
    branches = Branches()
    for part in parts:
        ladder = Ladder(adder := Adder(POOLING))
        for i in part.blocks:
            pool = Pool()
            for place in cohort_blocks[i]:
                if place in by_place:
                    adder.add(pool, place, *by_place[place])
            ladder.push(pool)
        branches.put(part, ladder.top())
    layout, rows, tally = the_sums(branches.top())
    assert layout == whole[0]
    assert all(torch.equal(row, whole[1][mean]) for mean, row in rows.items())
    assert tally == whole[2] or tally.sum_of("loss") == whole[2].sum_of("loss")


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=140), st.integers(1, 12))
def test_parts_cover_the_blocks_and_keep_all_workers_busy(loads: list[float], workers: int) -> None:
    parts = cut(loads, workers)
    assert sorted(i for part in parts for i in part.blocks) == list(range(len(loads)))
    assert all(part.start % 2**part.level == 0 for part in parts)
    assert [p.load for p in parts] == sorted((p.load for p in parts), reverse=True)
    assert all(p.load == pytest.approx(sum(loads[i] for i in p.blocks)) for p in parts)
    # Graham's bound for longest-first.
    finish = [0.0] * workers
    for part in parts:
        finish[finish.index(min(finish))] += part.load
    assert max(finish) <= sum(loads) / workers + max(max(loads), sum(loads) / (5 * workers)) + 1e-9


def test_uneven_branches_are_merged_where_they_belong() -> None:
    """Five blocks: ((01)(23))4, whatever comes first."""
    branches = Branches()
    for place in (4, 2, 0, 3, 1):
        pool = Pool()
        Adder({"m": Mean("s", UNIFORM)}).add(
            pool, place, {"s": {"x": torch.tensor([10.0**place])}}, {"num-examples": 1}
        )
        branches.put(Part(place), pool)
    _, rows, _ = the_sums(branches.top())
    assert rows[Mean("s", UNIFORM)].tolist() == [11111.0]


def test_means_are_numpys_and_types_are_kept() -> None:
    rng = np.random.default_rng(1)
    kinds = {"f16": torch.float16, "f32": torch.float32, "f64": torch.float64, "c64": torch.complex64}
    weights = [3, 1, 7]
    values = [
        {n: torch.from_numpy(rng.normal(size=4) + 1j * rng.normal(size=4)) for n in kinds} for _ in weights
    ]
    models = [
        {n: (v if kinds[n].is_complex else v.real).to(kinds[n]) for n, v in one.items()}
        | {"count": torch.tensor(9 - i), "flag": torch.tensor(i == 1), "empty": torch.empty(0)}
        for i, one in enumerate(values)
    ]
    rows = [(i, {"s": m}, {"num-examples": w}) for i, (m, w) in enumerate(zip(models, weights, strict=True))]
    found = means(rows, {"mean": Mean("s")}, 3)["mean"]
    for name, kind in kinds.items():
        expected = np.average(
            np.stack([m[name].numpy().astype(complex) for m in models]), axis=0, weights=weights
        )
        assert found[name].dtype == kind
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-3 if name == "f16" else 1e-6)
    assert found["count"] == 9
    assert found["flag"].dtype == torch.bool
    assert bool(found["flag"])
    assert found["empty"].shape == (0,)


def test_large_streams_of_one_layout_keep_their_own_numbers() -> None:
    # Beyond SMALL numbers the flat row lies in memory that is kept, of which every stream needs its own.
    def one(place: int) -> Reply:
        streams = {
            "arrays": {"w": torch.full((SMALL + 1,), place + 1.0)},
            "control": {"w": torch.full((SMALL + 1,), 100.0)},
        }
        return place, streams, {"num-examples": 1}

    found = means([one(place) for place in range(3)], POOLING, 3)
    assert torch.equal(found["model"]["w"], torch.full((SMALL + 1,), 2.0))
    assert torch.equal(found["control"]["w"], torch.full((SMALL + 1,), 100.0))


@given(order=st.permutations(range(40)))
@settings(max_examples=10, deadline=None)
def test_replies_in_any_order_give_the_same_bits(order: list[int]) -> None:
    given_ = replies(40)
    wanted, found = means(given_, POOLING, 40), means([given_[i] for i in order], POOLING, 40)
    for name, tensors in wanted.items():
        for key, value in tensors.items():
            assert torch.equal(found[name][key], value)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(0, 99))
def test_equal_models_are_a_fixed_point_bit_for_bit(cohort: int, seed: int) -> None:
    (_, streams, _), *_ = replies(1, seed)
    weights = np.random.default_rng(seed).integers(1, 500, size=cohort)
    rows = [(i, streams, {"num-examples": int(w)}) for i, w in enumerate(weights)]
    assert torch.equal(means(rows, {"m": Mean("arrays")}, cohort)["m"]["w"], streams["arrays"]["w"])


def test_a_reply_is_only_read_and_only_once() -> None:
    model = {"w": torch.tensor([1.0, 2.0])}
    pool, adder = Pool(), Adder({"m": Mean("s", UNIFORM)})
    adder.add(pool, 0, {"s": model}, {"num-examples": 1})
    model["w"].zero_()
    adder.add(pool, 1, {"s": model}, {"num-examples": 1})
    _, rows, _ = the_sums(pool)
    assert rows[Mean("s", UNIFORM)].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("streams", "metrics", "kind"),
    [
        ({"s": {"x": torch.tensor([1.0, math.nan])}}, {"num-examples": 1}, "non-finite"),
        ({"other": {"x": torch.tensor([math.inf])}}, {"num-examples": 1}, "non-finite"),
        ({"s": {"x": torch.ones(2)}}, {"num-examples": 1, "loss": math.nan}, "non-finite"),
        ({"s": {"x": torch.ones(2)}}, {"loss": 1.0}, "missing-metric"),
        ({"s": {"x": torch.ones(2)}}, {"num-examples": -1}, "missing-metric"),
        ({"s": {"x": torch.ones(2)}}, {"num-examples": [1]}, "missing-metric"),
    ],
)
def test_a_bad_reply_is_refused_and_changes_nothing(
    streams: Streams, metrics: Mapping[str, Metric], kind: str
) -> None:
    pool, adder = Pool(), Adder({"m": Mean("s", UNIFORM)})
    assert not adder.add(pool, 4, streams, metrics)
    assert [(r.place, r.kind) for r in pool.refused] == [(4, kind)]
    assert not pool.sums


def test_large_finite_numbers_whose_sum_overflows_are_fine() -> None:
    pool, adder = Pool(), Adder({"m": Mean("s", UNIFORM)})
    assert adder.add(pool, 0, {"s": {"x": torch.full((4,), 3e38)}}, {"num-examples": 1})


def test_stacked_replies_are_nearly_those_added_one_by_one_and_bad_ones_are_left_out() -> None:
    given_ = replies(9)
    stacked = {
        s: {n: torch.stack([reply[1][s][n] for reply in given_]) for n in given_[0][1][s]}
        for s in ("arrays", "control")
    }
    metrics = [dict(reply[2]) for reply in given_]
    one, other = Pool(), Pool()
    adder = Adder(POOLING)
    for place, streams, own in given_:
        if place not in (2, 5):
            adder.add(one, place, streams, own)
    stacked["arrays"]["w"][2, 0, 0] = math.nan
    del metrics[5]["num-examples"]
    assert adder.add_block(other, list(range(9)), stacked, metrics) == [k not in (2, 5) for k in range(9)]
    assert sorted((r.place, r.kind) for r in other.refused) == [(2, "non-finite"), (5, "missing-metric")]
    (layout, rows, tally), (layout_2, rows_2, tally_2) = the_sums(one), the_sums(other)
    assert layout == layout_2
    for mean, row in rows.items():
        torch.testing.assert_close(rows_2[mean], row, rtol=1e-5, atol=float(row.abs().max()) * 1e-6)
    assert tally.sum_of("loss") == tally_2.sum_of("loss")


def test_weights_of_zero_and_replies_that_differ_are_errors() -> None:
    rows: list[Reply] = [(0, {"s": {"x": torch.ones(1)}}, {"num-examples": 0})]
    with pytest.raises(RunError, match="weigh nothing"):
        means(rows, {"m": Mean("s")}, 1)
    rows = [(i, {"s": {"x": torch.ones(i + 1)}}, {"num-examples": 1}) for i in range(2)]
    with pytest.raises(RunError, match="differ"):
        means(rows, {"m": Mean("s")}, 2)


def test_a_stream_that_nobody_sends_is_named() -> None:
    pool, adder = Pool(), Adder({"m": Mean("absent")})
    adder.add(pool, 0, {"s": {"x": torch.ones(1)}}, {"num-examples": 1})
    ((layout, sums),) = pool.sums.items()
    with pytest.raises(RunError, match="'absent'"):
        Pooled.of({"m": Mean("absent")}, layout, sums)


def test_a_layout_is_found_again_in_a_process_with_other_hashes() -> None:
    layout = Layout.of({"s": {"x": torch.ones(2)}}, {"num-examples": 1})
    hash(layout)
    code = (
        "import pickle, sys, torch\n"
        "from flowerbed.pooling import Layout\n"
        "found = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "assert {Layout.of({'s': {'x': torch.ones(2)}}, {'num-examples': 1}): 7}[found] == 7\n"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, pickle.dumps(layout).hex()],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            check=True,
        )


def test_replies_by_message_take_their_place_in_the_tree_also_where_others_failed() -> None:
    """In float64, where another tree shows: 40 of 75 replies have other neighbours if the missing ones close up."""
    rng = np.random.default_rng(0)
    strategy = FedAvg()
    strategy.asked = range(1000, 1075)
    replies_ = [
        ClientReply(
            node,
            {"arrays": {"w": torch.from_numpy(rng.normal(size=50))}},
            {"num-examples": int(rng.integers(1, 99))},
        )
        for node in strategy.asked
        if node % 5
    ]
    found = strategy.aggregate(1, {}, replies_)["w"]
    there = [(r.node - 1000, r.streams, r.metrics) for r in replies_]
    closed_up = [(i, r.streams, r.metrics) for i, r in enumerate(replies_)]
    pooling = strategy.pooled
    assert pooling is not None
    assert torch.equal(found, means(there, pooling, 75)["arrays"]["w"])
    assert not torch.equal(found, means(closed_up, pooling, 60)["arrays"]["w"])
