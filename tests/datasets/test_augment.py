"""flip_crop against a slow twin that handles one image at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.datasets.augment import AUGMENTATIONS, flip_crop
from flowerbed.errors import ConfigError


def slow_twin(inputs: torch.Tensor, seed: int, padding: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count, channels, height, width = inputs.shape
    flips = torch.randint(2, (count,), generator=generator).tolist()
    tops = torch.randint(2 * padding + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(2 * padding + 1, (count,), generator=generator).tolist()
    results = []
    for image, flip, top, left in zip(inputs, flips, tops, lefts):
        if flip:
            image = image.flip(-1)
        canvas = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=inputs.dtype)
        canvas[:, padding : padding + height, padding : padding + width] = image
        results.append(canvas[:, top : top + height, left : left + width])
    return torch.stack(results)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    padding=st.integers(0, 4),
    seed=st.integers(0, 2**32),
    raw=st.booleans(),
)
def test_equals_the_slow_twin(shape: tuple[int, ...], padding: int, seed: int, raw: bool) -> None:
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if raw:
        inputs = (inputs.abs() * 100).clamp(max=255).to(torch.uint8)
    before = inputs.clone()
    result = flip_crop(inputs, torch.Generator().manual_seed(seed), padding)
    assert result.dtype == inputs.dtype
    assert torch.equal(result, slow_twin(inputs, seed, padding))
    assert torch.equal(inputs, before)


def test_reaches_every_offset_and_both_mirrorings() -> None:
    picture = torch.zeros(1, 1, 5, 5)
    picture[0, 0, 2, 1] = 1  # off the vertical axis, so that mirroring shows
    batch = picture.expand(2000, 1, 5, 5)
    result = flip_crop(batch, torch.Generator().manual_seed(0), padding=1)
    places = {tuple(image.nonzero()[0].tolist()) for image in result[:, 0]}
    assert places == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2, 3, 4)}


def test_registry_and_refusal() -> None:
    batch = torch.zeros(2, 3)
    assert AUGMENTATIONS.get("none")(batch, torch.Generator()) is batch
    assert {"flip_crop", "none"} <= set(AUGMENTATIONS.names())
    with pytest.raises(ConfigError, match="B, C, H, W"):
        AUGMENTATIONS.get("flip_crop")(batch, torch.Generator())
