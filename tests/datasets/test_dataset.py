"""Split and Dataset: normalisation by hand, refusal of what does not fit, pickling without copies."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch

from flowerbed.datasets.dataset import Dataset, Split, as_tensor
from flowerbed.errors import DataError


def images(mean: tuple[float, ...] = (0.5, 0.25), std: tuple[float, ...] = (0.5, 2.0)) -> Dataset:
    inputs = torch.arange(5 * 2 * 3 * 3).reshape(5, 2, 3, 3).to(torch.uint8)
    labels = torch.tensor([0, 1, 2, 1, 0])
    train = Split(inputs, labels, {"domain": torch.tensor([0, 0, 1, 1, 1])})
    return Dataset(
        "made", train, Split(inputs[:2], labels[:2]), ("a", "b", "c"), mean, std, domains=("x", "y")
    )


def test_facts() -> None:
    data = images()
    assert (len(data.train), len(data.test), data.input_shape, data.num_classes) == (5, 2, (2, 3, 3), 3)


def test_prepare_scales_and_normalises_each_channel() -> None:
    data = images()
    batch = torch.tensor([[[[255]], [[51]]]], dtype=torch.uint8)
    # channel 0: (1 - 0.5) / 0.5; channel 1: (0.2 - 0.25) / 2
    torch.testing.assert_close(data.prepare(batch), torch.tensor([[[[1.0]], [[-0.025]]]]))
    cohort = torch.stack([batch, batch])
    torch.testing.assert_close(data.prepare(cohort)[1], data.prepare(batch))
    assert batch[0, 0, 0, 0] == 255


def test_prepare_leaves_floats_unscaled_and_unchanged() -> None:
    data = images()
    batch = torch.full((1, 2, 3, 3), 1.5)
    result = data.prepare(batch)
    assert result[0, :, 0, 0].tolist() == [2.0, 0.625]
    assert (batch == 1.5).all()


def test_prepare_features_and_tokens() -> None:
    rows = Split(torch.tensor([[1.0, 4.0], [3.0, 8.0]]), torch.tensor([0, 1]))
    data = Dataset("rows", rows, rows, ("0", "1"), mean=(2.0, 6.0), std=(1.0, 2.0))
    assert data.prepare(rows.inputs).tolist() == [[-1.0, -1.0], [1.0, 1.0]]
    ids = Split(torch.tensor([[0, 1, 1]]), torch.tensor([[1, 1, 0]]))
    text = Dataset("text", ids, ids, ("a", "b"), (0.0,), (1.0,), task="next-token")
    assert text.prepare(ids.inputs) is ids.inputs


@pytest.mark.parametrize(
    ("inputs", "labels", "extras", "message"),
    [
        (torch.zeros(2, 1), torch.zeros(2), {}, "int64"),
        (torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2).long(), {}, "float64"),
        (torch.zeros(2, 1), torch.zeros(3).long(), {}, "2 inputs but 3 labels"),
        (torch.zeros(2, 1), torch.zeros(2).long(), {"domain": torch.zeros(1)}, "1 domain"),
    ],
)
def test_split_refuses(
    inputs: torch.Tensor, labels: torch.Tensor, extras: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Split(inputs, labels, extras)


def test_dataset_refuses() -> None:
    with pytest.raises(DataError, match="mean and std"):
        images(mean=(0.1, 0.2, 0.3))
    with pytest.raises(DataError, match="above 0"):
        images(std=(0.0, 1.0))
    rows = Split(torch.zeros(2, 3), torch.tensor([0, 5]))
    with pytest.raises(DataError, match=r"train labels of 'rows' must lie in 0\.\.1"):
        Dataset("rows", rows, rows, ("0", "1"), (0.0,), (1.0,))
    with pytest.raises(DataError, match="differ in shape"):
        Dataset("rows", rows, Split(torch.zeros(1, 4), torch.tensor([0])), ("0",) * 6, (0.0,), (1.0,))


def test_pickle_moves_every_tensor_out_of_band_and_shares_memory() -> None:
    data = images()
    buffers: list[pickle.PickleBuffer] = []
    payload = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 5
    assert len(payload) < 1000
    frozen = [memoryview(bytes(buffer.raw())) for buffer in buffers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = pickle.loads(payload, buffers=frozen)
    assert torch.equal(copy.train.inputs, data.train.inputs)
    assert torch.equal(copy.train.extras["domain"], data.train.extras["domain"])
    assert (copy.classes, copy.mean, copy.domains) == (data.classes, data.mean, data.domains)
    addresses = {np.frombuffer(view, np.uint8).__array_interface__["data"][0] for view in frozen}
    assert copy.train.inputs.data_ptr() in addresses
    assert copy.train.labels.data_ptr() in addresses


def test_as_tensor_is_silent_on_read_only_arrays() -> None:
    array = np.zeros(3)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_tensor(array).data_ptr() == array.__array_interface__["data"][0]
