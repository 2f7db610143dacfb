"""Per-sample memory: by id, across rounds, and nothing for strangers."""

from __future__ import annotations

import pytest
import torch
import worlds
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.memory import SampleMemory
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import ClientState
from flowerbed.errors import ClientError


def opened(ids: list[int], state: ClientState | None = None) -> LocalRound:
    count = len(ids)
    data = ClientData(torch.zeros(count, 6), torch.zeros(count, dtype=torch.int64), torch.tensor(ids), {})
    return worlds.open_round(LocalParams(), data=data, state=state)


def numbered(data: ClientData) -> torch.Tensor:
    return data.index.float()


@given(st.lists(st.integers(0, 99), min_size=1, max_size=20, unique=True), st.data())
def test_it_is_a_dictionary_by_sample_id(ids: list[int], data: st.DataObject) -> None:
    local, twin = opened(ids), {i: (float(i), -1) for i in ids}
    memory = SampleMemory.open(local, "m", numbered)
    for step in range(3):
        batch = data.draw(st.lists(st.sampled_from(ids), max_size=len(ids), unique=True))
        values = torch.tensor([100.0 * step + i for i in batch])
        memory.write(torch.tensor(batch, dtype=torch.int64), values, step)
        twin |= {i: (float(v), step) for i, v in zip(batch, values.tolist(), strict=True)}
        # The next round, by way of the state, the data in another order.
        memory.keep(local.state, "m")
        local = opened(list(reversed(ids)), local.state)
        memory = SampleMemory.open(local, "m", numbered)
    asked = data.draw(st.permutations(ids))
    assert memory.read(torch.tensor(asked)).tolist() == [twin[i][0] for i in asked]
    assert memory.written[memory.rows(torch.tensor(asked))].tolist() == [twin[i][1] for i in asked]


def test_reading_gives_a_copy_and_writing_detaches() -> None:
    memory = SampleMemory.open(opened([4, 2]), "m", numbered)
    read = memory.read(torch.tensor([4]))
    memory.write(torch.tensor([4]), torch.tensor([7.0], requires_grad=True), 0)
    assert read.tolist() == [4.0]
    assert memory.values.tolist() == [2.0, 7.0]
    assert not memory.values.requires_grad


def test_strangers_are_refused() -> None:
    local = opened([1, 5])
    memory = SampleMemory.open(local, "m", numbered)
    for index in ([3], [9], [0]):
        with pytest.raises(ClientError, match="does not know"):
            memory.read(torch.tensor(index))
    memory.keep(local.state, "m")
    with pytest.raises(ClientError, match="other samples"):
        SampleMemory.open(opened([1, 6], local.state), "m", numbered)
