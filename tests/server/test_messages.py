"""LazyArray against Flower's own Array, which is the oracle for bytes, ids and equality."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flowerbed.errors import ConfigError
from flowerbed.messages import ARRAY_OVERHEAD_BYTES, LazyArray, array_record, nbytes, tensors
from flowerbed.server.grids.wire import pack, pack_content, unpack, unpack_content

DTYPES = st.sampled_from(["f2", "f4", "f8", "i1", "i4", "i8", "u1", "?", "c8", "c16"])
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(
        np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    )
)


@given(ARRAYS, st.booleans())
def test_bytes_ids_and_equality_are_those_of_a_plain_array(values: np.ndarray, transpose: bool) -> None:
    values = values.T if transpose else values
    lazy, plain = LazyArray(values), Array(values)
    assert (lazy.dtype, lazy.shape, lazy.stype, lazy.data) == (
        plain.dtype,
        plain.shape,
        plain.stype,
        plain.data,
    )
    assert lazy.object_id == plain.object_id
    assert lazy.deflate() == plain.deflate()
    assert list(lazy.children) == list(plain.children)
    assert lazy == plain
    assert plain == lazy
    inflated = Array.inflate(lazy.deflate(), children=lazy.children)
    assert inflated == plain


@given(ARRAYS, ARRAYS)
def test_two_lazy_arrays_are_equal_exactly_when_plain_ones_are(left: np.ndarray, right: np.ndarray) -> None:
    assert (LazyArray(left) == LazyArray(right)) == (Array(left) == Array(right))
    assert LazyArray(left) == LazyArray(left.copy())


@given(ARRAYS)
def test_numpy_is_a_writable_copy_and_view_is_neither(values: np.ndarray) -> None:
    lazy = LazyArray(values)
    fresh = lazy.numpy()
    assert fresh.flags.writeable
    assert not np.shares_memory(fresh, values)
    assert fresh.dtype == values.dtype
    assert fresh.tobytes() == values.tobytes()
    assert not lazy.view().flags.writeable
    assert values.size == 0 or np.shares_memory(lazy.view(), values)
    assert values.flags.writeable


def test_an_array_in_neither_order_is_copied() -> None:
    values = np.arange(24.0).reshape(4, 6)[::2, ::-2]
    lazy = LazyArray(values)
    assert not np.shares_memory(lazy.view(), values)
    assert lazy.data == Array(values).data
    assert lazy == LazyArray(np.ascontiguousarray(values))


@given(ARRAYS)
def test_pickle_travels_out_of_band_and_reads_without_a_copy(values: np.ndarray) -> None:
    buffers: list[pickle.PickleBuffer] = []
    lazy = LazyArray(values)
    stream = pickle.dumps(lazy, protocol=5, buffer_callback=buffers.append)
    again = pickle.loads(stream, buffers=buffers)
    assert again == lazy
    assert type(again) is LazyArray
    assert values.size == 0 or np.shares_memory(again.view(), values)
    assert len(stream) < 400
    assert copy.deepcopy(lazy) == lazy


def test_records_equal_flowers_and_share_the_memory_of_the_tensors() -> None:
    state = {
        "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "steps": torch.tensor(7),
        "turn": torch.randn(2, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    record, stock = array_record(state), ArrayRecord(state)
    assert record == stock
    assert record.object_id == stock.object_id
    back = tensors(record)
    assert list(back) == list(state)
    assert all(torch.equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)
    assert back["weight"].data_ptr() == state["weight"].data_ptr()
    decoded = tensors(stock)
    assert torch.equal(decoded["turn"], state["turn"])
    assert decoded["weight"].data_ptr() != state["weight"].data_ptr()
    model = record.to_torch_state_dict()
    model["weight"].add_(1)
    assert torch.equal(back["weight"], state["weight"])


def test_conjugated_views_send_their_values() -> None:
    turn = torch.tensor([1 + 2j, 3 - 4j])
    assert tensors(array_record({"c": turn.conj()}))["c"].tolist() == [1 - 2j, 3 + 4j]


def test_reading_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors(array_record({"w": torch.ones(2)}))


def test_types_without_a_numpy_twin_are_named() -> None:
    with pytest.raises(ConfigError, match=r"Tensor 'head' of type torch.bfloat16 .* tensor.float\(\)"):
        array_record({"head": torch.ones(2, dtype=torch.bfloat16)})
    with pytest.raises(ConfigError, match="dtype object"):
        LazyArray(np.array([None]))


def test_bytes_cannot_be_assigned() -> None:
    with pytest.raises(AttributeError):
        LazyArray(np.ones(2)).data = b""


def test_nbytes_by_hand_and_without_serialising() -> None:
    lazy = array_record({"w": torch.ones(3, 4), "n": torch.tensor(1)})
    content = RecordDict(
        {
            "arrays": lazy,
            "metrics": MetricRecord({"loss": 0.5, "hist": [1, 2, 3]}),
            "config": ConfigRecord({"name": "abc", "flag": True, "none": "", "list": [], "raw": b"1234"}),
        }
    )
    arrays = (6 + 1 + 48 + 1 + 8) + 2 * ARRAY_OVERHEAD_BYTES
    metrics = 7 + (4 + 8) + (4 + 24)
    config = 6 + (4 + 3) + (4 + 1) + 4 + 4 + (3 + 4)
    assert nbytes(content) == arrays + metrics + config
    assert all("_plain" not in array.__dict__ for array in lazy.values())
    stock = RecordDict({"arrays": ArrayRecord({"w": torch.ones(3, 4), "n": torch.tensor(1)})})
    assert nbytes(stock) == arrays
    serialised = sum(len(array.data) + len(name) for name, array in stock["arrays"].items()) + len("arrays")
    assert nbytes(stock) == serialised


@given(st.dictionaries(st.text(max_size=5), ARRAYS, max_size=4), st.booleans())
def test_packing_gives_back_equal_records(values: dict[str, np.ndarray], stock: bool) -> None:
    record = ArrayRecord()
    for name, array in values.items():
        record[name] = Array(array) if stock else LazyArray(array)
    content = RecordDict(
        {"a": record, "m": MetricRecord({"x": 1.5, "y": [1]}), "c": ConfigRecord({"s": "t", "b": [True]})}
    )
    packed = pickle.loads(pickle.dumps(pack_content(content), protocol=5))
    again = unpack_content(packed)
    assert again == content
    assert list(again) == list(content)
    assert list(again["a"]) == list(record)
    assert [type(r) for r in again.values()] == [ArrayRecord, MetricRecord, ConfigRecord]


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_serialised_arrays_are_read_in_place(order: str) -> None:
    values = np.asarray(np.arange(40_000.0).reshape(200, 200), order=order)
    array = Array(values)
    kind, names, packed = pack(ArrayRecord({"w": array}))
    assert (kind, names) == (ArrayRecord, ("w",))
    assert np.array_equal(packed[0], values)
    assert not packed[0].flags.owndata
    assert unpack((kind, names, packed))["w"] == array


def test_unknown_serialisations_pass_through() -> None:
    array = Array("float32", (2,), "somebody.else", b"x" * 100_000)
    again = unpack(pack(ArrayRecord({"w": array})))["w"]
    assert type(again) is Array
    assert again == array
