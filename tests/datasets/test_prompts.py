"""Prompts of random regression problems: their laws, by moments and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowerbed.datasets.prompts import Prompts, prompts
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError

FACTORY = "flowerbed.datasets.prompts:prompts"


def table(**options: Any) -> Prompts:
    train = prompts(**options).train
    return Prompts.of(train.inputs, train.extras)


def drawn(count: int = 40_000, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return table(**options).draw(count, torch.Generator().manual_seed(0))


def test_the_query_is_last_and_its_label_masked() -> None:
    tokens, y, rows = drawn(100, d=3, n=4)
    assert tokens.shape == (100, 5, 4)
    assert y.shape == (100,)
    assert rows.tolist() == [0] * 100
    assert (tokens[:, -1, -1] == 0).all()
    assert (tokens[:, :-1, -1] != 0).all()
    assert (y != 0).all()


def test_inputs_have_the_spectrum_and_outputs_do_not_depend_on_it() -> None:
    """w ~ N(0, Sigma^-1): the variance of w . x is d whatever Sigma is; the noise is on the query as well."""
    tokens, y, _ = drawn(d=3, n=4, noise=2.0, spectra=[[0.1, 1.0, 9.0]])
    x = tokens[:, :, :3].flatten(0, 1)
    torch.testing.assert_close(
        x.T @ x / len(x), torch.diag(torch.tensor([0.1, 1.0, 9.0])), rtol=0.02, atol=0.02
    )
    for outputs in (tokens[:, :-1, -1].flatten(), y):
        assert float(outputs.var()) == pytest.approx(3 + 4.0, rel=0.03)


def test_pairs_of_a_prompt_share_one_function() -> None:
    tokens, y, _ = drawn(50, d=3, n=6, noise=0.0)
    w = torch.linalg.lstsq(tokens[:, :-1, :3], tokens[:, :-1, 3:]).solution
    torch.testing.assert_close((tokens[:, -1, None, :3] @ w).flatten(), y, rtol=1e-3, atol=1e-3)
    assert w.flatten(1).std(0).min() > 0.5


def test_relu_functions_have_one_sign_a_prompt_and_half_their_values_are_zero() -> None:
    tokens, y, _ = drawn(2_000, d=3, n=10, noise=0.0, function="relu")
    values = tokens[:, :-1, -1]
    assert ((values >= 0).all(1) | (values <= 0).all(1)).all()
    assert float((values == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((values.sum(1) > 0).float().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(y.square().mean()) == pytest.approx(3 / 2, rel=0.15)


def test_each_row_is_a_distribution_and_prompts_come_from_all() -> None:
    tokens, _, rows = drawn(d=2, n=3, spectra=[[1.0, 4.0], [4.0, 1.0]])
    assert float(rows.float().mean()) == pytest.approx(0.5, abs=0.02)
    for row, spectrum in enumerate(([1.0, 4.0], [4.0, 1.0])):
        assert tokens[rows == row][:, 0, :2].var(0).tolist() == pytest.approx(spectrum, rel=0.05)


def test_it_is_a_data_set_of_shapes_and_tables() -> None:
    data = load_dataset(FACTORY, d=2, n=7, spectra=[[1.0, 2.0], [2.0, 1.0]], judged=30)
    assert data.input_shape == (8, 3)
    assert data.task == "measured"
    assert len(data.train) == 2
    assert data.test.extras["prompts"].tolist() == [30, 30]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n": 0}, "dataset.n are 5 and 0"),
        ({"noise": -1.0}, "dataset.noise is -1.0"),
        ({"function": "cubic"}, "dataset.function is 'cubic'"),
        ({"spectra": [[1.0, 1.0]]}, "5 eigenvalues above 0"),
        ({"spectra": [[1.0, 1.0, 0.0, 1.0, 1.0]]}, "5 eigenvalues above 0"),
        ({"judged": 0}, "dataset.judged is 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        prompts(**options)
